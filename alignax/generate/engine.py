"""The two compiled programs of generation: `prefill` reads prompts, `decode` starts completions and adds tokens to all rows at once.

There are S rows of a static shape. When a completion ends, `decode` itself gives its row to the next completion, before its next step;
this copies the keys and values of its prompt from the result of `prefill`. So a prompt is read once, for any number of samples, and no
row waits for the host. The random numbers of a completion depend only on the key, the prompt's number, the sample's number and the
position: not on other rows, the row's index or the mesh.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.generate.sampling import Sampling, draw
from alignax.generate.speakers import Speaker
from alignax.mesh import constrain, sharding


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of the two programs; only a new Shape compiles the programs of an engine again."""

    prompt: int  # P, the most tokens of a prompt
    new: int  # C, the most tokens of a completion, at least 1
    slots: int  # S, the rows that are decoded at once
    prefill: int  # Q, the prompts that are read at once
    chunk: int  # the most decoding steps of one call


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


class Queue(NamedTuple):
    """The completions that wait for a row, by number: completion i is sample i % n of prompt i // n."""

    next: Any  # [] int32, the first that waits
    end: Any  # [] int32, the first whose prompt is not staged; those before it are started in order
    more: Any  # [] bool, whether there are completions from `end` on
    n: Any  # [] int32, samples of each prompt


class Emitted(NamedTuple):
    """What one call of `decode` has done, replicated over all devices. Where `numbers` is -1 the others mean nothing."""

    tokens: Any  # [S, chunk] int32, a column for each step
    logps: Any  # [S, chunk] log-probs of the tokens under the speaker's own distribution
    drawn: Any  # [S, chunk] log-probs of the tokens under the distribution that was sampled from
    numbers: Any  # [S, chunk] int32, the completion that each token belongs to; -1: no token was added
    owner: Any  # [S] int32, the completion that each row decodes next; -1: the row is free
    next: Any  # [] int32, the first completion that still waits


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
        return State(cache, jnp.zeros((S, width), jnp.int32), zeros, zeros)

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
        return State(of("batch"), split, split, split), Staged(of(None), whole, whole), Emitted(*[whole] * 6)

    def lay(self, params: Any) -> Any:
        """The parameters laid out for decoding: in the form, the dtypes and with the shardings of `Speaker.laid`."""

        def one(x: Any, wanted: Any) -> Any:
            cast = x if x is wanted else x.astype(wanted.dtype)  # before it travels
            return cast if x is wanted or wanted.sharding is None else jax.lax.with_sharding_constraint(cast, wanted.sharding)

        return jax.tree.map(one, self.speaker.formed(params), self.speaker.laid(params))

    def prefill(self, params: Any, tokens: jax.Array, lengths: jax.Array) -> Staged:
        """Reads prompts, `tokens` [Q, P] int32 padded on the right; `decode` reads their last tokens again, to sample from the logits."""
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return Staged(self.speaker.read(params, tokens, real), tokens, lengths)

    def decode(
        self, params: Any, state: State, staged: Staged, queue: Queue, owner: jax.Array, key: jax.Array, steps: jax.Array
    ) -> tuple[State, Emitted]:
        """Samples tokens of all rows, one per step; before the first step and after each, free rows start the next completions.

        It ends after the given steps, when no row has a completion, and when a row is free whose next completion is not staged.

        Args:
          params: the speaker's parameters.
          state: the rows.
          staged: the prompts of the completions that are started.
          queue: the completions that wait.
          owner: [S] int32, the completion that each row decodes; -1: the row is free.
          key: the data of a PRNG key, because every process can place plain data on its devices.
          steps: [devices] int32, the most steps, at most `chunk`: the least counts, so that processes may propose different numbers.
        """
        S, chunk, mesh = self.shape.slots, self.shape.chunk, self.speaker.mesh
        head, key, most = self.speaker.head(params), jax.random.wrap_key_data(key), steps.min()
        nothing = jnp.zeros((S, chunk))
        out = nothing.astype(jnp.int32), nothing, nothing, nothing.astype(jnp.int32) - 1

        def going(carry: Any) -> jax.Array:
            t, _, _, owner, _ = carry
            free = owner < 0
            return (t < most) & ~free.all() & ~(queue.more & free.any())

        def step(carry: Any) -> Any:
            t, state, first, owner, out = carry
            state, token, *logps = self.step(params, head, state, owner, queue.n, key)
            put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x[:, None], t, axis=1)
            made: Any = map(put, out, (token, *logps, owner))
            stopped = (token[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None]).any(axis=1)
            ended = constrain(stopped | (state.at - state.begin + 1 >= self.shape.new), mesh, None)
            return t + 1, *fill(state, staged, queue._replace(next=first), jnp.where(ended, -1, owner)), tuple(made)

        begin = jnp.int32(0), *fill(state, staged, queue, owner), out
        _, state, first, owner, (tokens, logps, drawn, numbers) = jax.lax.while_loop(going, step, begin)
        return state, Emitted(tokens, logps, drawn, numbers, owner, first)

    def step(self, params: Any, head: Any, state: State, owner: jax.Array, n: jax.Array, key: jax.Array) -> Any:
        """Samples one more token of each row; a free row keeps its tokens. The arguments are those of `decode`, with `n` of its queue.

        Returns the state, the tokens [S] int32, and their log-probs `logp` and `drawn` of `Drawn`, [S] float32 each.
        """
        place, fold = jnp.arange(state.tokens.shape[1])[None], jax.random.fold_in
        logits, cache = self.speaker.logits(params, head, state.cache, state.tokens, state.at)
        uniform = jax.vmap(lambda i, t: jax.random.uniform(fold(fold(fold(key, i // n), i % n), t)))(owner, state.at)
        token, logp, drawn = draw(self.sampling, logits, state.tokens, place <= state.at[:, None], uniform)
        at = jnp.where(owner >= 0, state.at + 1, state.at)
        new = (owner >= 0)[:, None] & (place == at[:, None])
        return state._replace(cache=cache, tokens=jnp.where(new, token[:, None], state.tokens), at=at), token, logp, drawn


def fill(state: State, staged: Staged, queue: Queue, owner: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """Gives free rows to the completions that wait, as far as their prompts are staged, and copies these prompts into the rows.

    A row's former content is overwritten, or stands after the positions that are read. Returns the state, `Queue.next` and the owners.
    """

    def filled(state: State, owner: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        Q, P = staged.tokens.shape
        number = queue.next + jnp.cumsum(owner < 0) - 1  # [S], of free rows
        new = (owner < 0) & (number < queue.end)
        sources, rows, count = number // queue.n % Q, jnp.flatnonzero(new, size=owner.shape[0], fill_value=0), new.sum()

        def copy(i: jax.Array, cache: Any) -> Any:
            def one(whole: jax.Array, prompt: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_index_in_dim(prompt, sources[rows[i]], axis=1)
                return jax.lax.dynamic_update_slice(whole, part, (0, rows[i], *(0,) * (whole.ndim - 2)))

            return jax.tree.map(one, cache, staged.cache)

        lengths = staged.lengths[sources]
        state = State(
            cache=jax.lax.fori_loop(0, count, copy, state.cache),
            tokens=state.tokens.at[:, :P].set(jnp.where(new[:, None], staged.tokens[sources], state.tokens[:, :P])),
            at=jnp.where(new, lengths - 1, state.at),
            begin=jnp.where(new, lengths, state.begin),
        )
        return state, queue.next + count, jnp.where(new, number, owner)

    # Most steps start no completion: without the condition a step took a fifth longer on a CPU.
    some = (owner < 0).any() & (queue.next < queue.end)
    return jax.lax.cond(some, filled, lambda state, owner: (state, queue.next, owner), state, owner)
