"""The two programs of generation: `prefill` reads prompts, `decode` gives them places and adds tokens to all rows at once.

Rows are S places of a static shape. A row that has ended gives its place to the next completion, which takes the keys and values of its
prompt from where `prefill` has left them: a prompt is read once, whatever the number of its samples. What a row draws depends on the key,
its prompt's number, its sample's number and the position alone, so on no other row, place or mesh.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.generate.sampling import Sampling, draw
from alignax.generate.speakers import Speaker
from alignax.mesh import sharding


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that the two programs are compiled for; another one compiles them again, and nothing else does."""

    prompt: int  # P, the most tokens of a prompt
    new: int  # C, the most tokens of a completion, at least 1
    slots: int  # S rows that are decoded at once
    prefill: int  # Q prompts that are read at once
    chunk: int  # steps between two looks of the host at what has ended


class Staged(NamedTuple):
    """Prompts that were read."""

    cache: Any  # the speaker's, of Q rows with P places; a model's [L, Q, KV, P, h]
    tokens: jax.Array  # [Q, P]
    lengths: jax.Array  # [Q]


class State(NamedTuple):
    """The rows. A row's tokens at places 0 .. at - 1 are in the cache; the one at `at` is the next to go in."""

    cache: Any  # the speaker's, of S rows with P + C places; a model's [L, S, KV, P + C, h]
    tokens: jax.Array  # [S, P + C] int32
    at: jax.Array  # [S] int32
    begin: jax.Array  # [S] int32, the prompt's length
    keys: jax.Array  # [S] PRNG keys, of prompt and sample


class Entries(NamedTuple):
    """Completions that are to begin, `count` of them; arrays [S], those beyond are not read."""

    count: Any  # [] int32
    slots: Any  # the row that each gets; S for those that are not there
    sources: Any  # the staged prompt that each continues
    prompts: Any  # numbers that the random stream depends on
    samples: Any


class Emitted(NamedTuple):
    """What a call has added, on every device: [S, chunk]; `real` is True where a token was added."""

    tokens: jax.Array
    logps: jax.Array
    drawn: jax.Array  # log-probs of what was sampled from
    real: jax.Array


@dataclasses.dataclass(frozen=True)
class Engine:
    """Pure programs, to be jitted. Parameters are arguments: those that are trained, as they are laid out."""

    speaker: Speaker
    shape: Shape
    sampling: Sampling
    stop_ids: tuple[int, ...]  # tokens that end a completion, as its last token

    def empty(self) -> State:
        """Rows that hold nothing."""
        S, width = self.shape.slots, self.shape.prompt + self.shape.new
        cache = self.speaker.empty(S, width)
        zeros = jnp.zeros(S, jnp.int32)
        return State(cache, jnp.zeros((S, width), jnp.int32), zeros, zeros, jax.random.split(jax.random.key(0), S))

    def layout(self) -> tuple[Any, Any, Any]:
        """Where a state, staged prompts and what is emitted lie: rows over the batch axes, heads as those of the weights, all else whole.

        Stated for inputs and outputs alike, since a program whose state came back laid out otherwise would be compiled again.
        """
        mesh, of = self.speaker.mesh, self.speaker.layout
        if mesh is None:
            return None, None, None
        whole: Any = sharding(mesh)
        split: Any = sharding(mesh, ("batch",))
        return State(of("batch"), split, split, split, split), Staged(of(None), whole, whole), Emitted(*[whole] * 4)

    def prefill(self, params: Any, tokens: jax.Array, lengths: jax.Array) -> Staged:
        """Reads prompts [Q, P], right padded. Their last token is left to `decode`."""
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return Staged(self.speaker.read(params, tokens, real), tokens, lengths)

    def decode(
        self, params: Any, state: State, staged: Staged, entries: Entries, alive: jax.Array, key: jax.Array, steps: jax.Array
    ) -> tuple[State, Emitted]:
        """Begins the completions of `entries`, then adds up to `steps` tokens, at most `chunk`, to the rows that are `alive` [S].

        `key` is the data of one, which every process can place on its devices.
        """
        S, chunk = self.shape.slots, self.shape.chunk
        state = enter(state, staged, entries, jax.random.wrap_key_data(key))
        head = self.speaker.head(params)
        blank = jnp.zeros((S, chunk))
        out = Emitted(blank.astype(jnp.int32), blank, blank, blank > 0)

        def going(carry: Any) -> jax.Array:
            t, _, alive, _ = carry
            return (t < steps) & alive.any()

        def step(carry: Any) -> Any:
            t, state, alive, out = carry
            state, token, *logps = self.step(params, head, state, alive)
            put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x[:, None], t, axis=1)
            logp, drawn = (put(there, jnp.where(alive, x, 0.0)) for there, x in zip((out.logps, out.drawn), logps, strict=True))
            out = Emitted(put(out.tokens, jnp.where(alive, token, 0)), logp, drawn, put(out.real, alive))
            stopped = (token[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None]).any(axis=1)
            alive = alive & ~stopped & (state.at - state.begin + 1 < self.shape.new)
            return t + 1, state, alive, out

        _, state, _, out = jax.lax.while_loop(going, step, (jnp.int32(0), state, alive, out))
        return state, out

    def step(self, params: Any, head: Any, state: State, alive: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """One more token of each row, and its log-probs (see `draw`); a row that is not alive stays as it is."""
        place = jnp.arange(state.tokens.shape[1])[None]
        logits, cache = self.speaker.logits(params, head, state.cache, state.tokens, state.at)
        uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(state.keys, state.at)
        token, logp, drawn = draw(self.sampling, logits, state.tokens, place <= state.at[:, None], uniform)
        at = jnp.where(alive, state.at + 1, state.at)
        new = alive[:, None] & (place == at[:, None])
        return state._replace(cache=cache, tokens=jnp.where(new, token[:, None], state.tokens), at=at), token, logp, drawn


def enter(state: State, staged: Staged, entries: Entries, key: jax.Array) -> State:
    """Puts staged prompts into rows, whose former content is overwritten or lies behind what is read."""
    P = staged.tokens.shape[1]
    count, slots, sources, prompts, samples = entries

    def copy(i: jax.Array, cache: Any) -> Any:
        def one(whole: jax.Array, prompt: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_index_in_dim(prompt, sources[i], axis=1)
            return jax.lax.dynamic_update_slice(whole, part, (0, slots[i], *(0,) * (whole.ndim - 2)))

        return jax.tree.map(one, cache, staged.cache)

    keys = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))(prompts, samples)
    lengths = staged.lengths[sources]
    return State(
        cache=jax.lax.fori_loop(0, count, copy, state.cache),
        tokens=state.tokens.at[slots, :P].set(staged.tokens[sources], mode="drop"),
        at=state.at.at[slots].set(lengths - 1, mode="drop"),
        begin=state.begin.at[slots].set(lengths, mode="drop"),
        keys=state.keys.at[slots].set(keys, mode="drop"),
    )
