"""The two compiled programs of generation: `prefill` reads prompts, `decode` starts completions and adds tokens to all rows at once.

There are S rows of a static shape. When a completion ends, its row is given to the next completion, which copies the keys and values of
its prompt from the result of `prefill`. So a prompt is read once, for any number of samples. The random numbers of a completion depend
only on the key, the prompt's number, the sample's number and the position: not on other rows, the row's index or the mesh.
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
    """The static sizes of the two programs; only a new Shape compiles the programs of an engine again."""

    prompt: int  # P, the most tokens of a prompt
    new: int  # C, the most tokens of a completion, at least 1
    slots: int  # S, the rows that are decoded at once
    prefill: int  # Q, the prompts that are read at once
    chunk: int  # decoding steps of one call, after which the host looks for completions that have ended


class Staged(NamedTuple):
    """A block of Q prompts that `prefill` has read."""

    cache: Any  # the speaker's cache of Q rows with P positions; of a model [L, Q, KV, P, h]
    tokens: jax.Array  # [Q, P]
    lengths: jax.Array  # [Q]


class State(NamedTuple):
    """The state of the S rows. The cache holds a row's tokens at positions 0 .. at - 1; the token at `at` is the next to be read."""

    cache: Any  # the speaker's cache of S rows with P + C positions; of a model [L, S, KV, P + C, h]
    tokens: jax.Array  # [S, P + C] int32
    at: jax.Array  # [S] int32, the position of each row's last token
    begin: jax.Array  # [S] int32, the length of each row's prompt
    keys: jax.Array  # [S] PRNG keys, each for one prompt and sample


class Entries(NamedTuple):
    """The completions that `decode` starts: the first `count` entries of arrays [S] int32."""

    count: Any  # [] int32
    slots: Any  # [S] the row of each completion; S in unused entries
    sources: Any  # [S] the index of its prompt among the staged ones
    prompts: Any  # [S] the number of its prompt, for its random numbers
    samples: Any  # [S] the number of its sample, for its random numbers


class Emitted(NamedTuple):
    """The tokens that one call of `decode` has added, [S, chunk] each, replicated over all devices."""

    tokens: jax.Array  # int32
    logps: jax.Array  # log-probs of the tokens under the speaker's own distribution
    drawn: jax.Array  # log-probs of the tokens under the distribution that was sampled from
    real: jax.Array  # bool, True where a token was added


@dataclasses.dataclass(frozen=True)
class Engine:
    """The programs of generation as pure functions, to be jitted. The `params` of `prefill` and `decode` are from `lay`."""

    speaker: Speaker
    shape: Shape
    sampling: Sampling
    stop_ids: tuple[int, ...]  # tokens that end a completion; its last token is then one of them

    def empty(self) -> State:
        """The state of empty rows."""
        S, width = self.shape.slots, self.shape.prompt + self.shape.new
        cache = self.speaker.empty(S, width)
        zeros = jnp.zeros(S, jnp.int32)
        return State(cache, jnp.zeros((S, width), jnp.int32), zeros, zeros, jax.random.split(jax.random.key(0), S))

    def layout(self) -> tuple[Any, Any, Any]:
        """The shardings of State, Staged and Emitted; None for each without a mesh.

        The rows of State are sharded over the batch axes, heads as in the weights; everything else is replicated. Inputs and outputs have
        the same shardings, because a state that came back with other shardings would compile the program again.
        """
        mesh, of = self.speaker.mesh, self.speaker.layout
        if mesh is None:
            return None, None, None
        whole: Any = sharding(mesh)
        split: Any = sharding(mesh, ("batch",))
        return State(of("batch"), split, split, split, split), Staged(of(None), whole, whole), Emitted(*[whole] * 4)

    def lay(self, params: Any) -> Any:
        """The parameters laid out for decoding, in the dtypes and with the shardings of `Speaker.laid`."""

        def one(x: Any, wanted: Any) -> Any:
            cast = x if x is wanted else x.astype(wanted.dtype)  # before it travels
            return cast if x is wanted or wanted.sharding is None else jax.lax.with_sharding_constraint(cast, wanted.sharding)

        return jax.tree.map(one, params, self.speaker.laid(params))

    def prefill(self, params: Any, tokens: jax.Array, lengths: jax.Array) -> Staged:
        """Reads prompts, `tokens` [Q, P] int32 padded on the right; `decode` reads their last tokens again, to sample from the logits."""
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return Staged(self.speaker.read(params, tokens, real), tokens, lengths)

    def decode(
        self, params: Any, state: State, staged: Staged, entries: Entries, alive: jax.Array, key: jax.Array, steps: jax.Array
    ) -> tuple[State, Emitted]:
        """Starts completions, then samples tokens of all alive rows, one per step.

        Args:
          params: the speaker's parameters.
          state: the rows.
          staged: the prompts of the entries.
          entries: the completions to start.
          alive: [S] bool, the rows that are decoded, with those that start.
          key: the data of a PRNG key, because every process can place plain data on its devices.
          steps: [] int32, the most steps, at most `chunk`; it ends earlier if no row is alive.
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
        """Samples one more token of each row; a row that is not alive keeps its tokens.

        Returns the state, the tokens [S] int32, and their log-probs `logp` and `drawn` of `Drawn`, [S] float32 each.
        """
        place = jnp.arange(state.tokens.shape[1])[None]
        logits, cache = self.speaker.logits(params, head, state.cache, state.tokens, state.at)
        uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(state.keys, state.at)
        token, logp, drawn = draw(self.sampling, logits, state.tokens, place <= state.at[:, None], uniform)
        at = jnp.where(alive, state.at + 1, state.at)
        new = alive[:, None] & (place == at[:, None])
        return state._replace(cache=cache, tokens=jnp.where(new, token[:, None], state.tokens), at=at), token, logp, drawn


def enter(state: State, staged: Staged, entries: Entries, key: jax.Array) -> State:
    """The state with staged prompts copied into the rows of new completions.

    A row's former content is overwritten, or stands after the positions that are read.
    """
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
