"""Sampling of completions for prompts: the host's loop over the prefill and decode programs.

The loop's decisions depend only on data that all processes have, so it runs on any mesh.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignax import mesh as meshes
from alignax.generate.engine import Emitted, Engine, Queue, Shape, Staged, State
from alignax.generate.sampling import Sampling
from alignax.generate.speakers import Speaker, positions, speaker
from alignax.generate.stops import LENGTH, STOP_ID, STOP_STRING, Stops, bare
from alignax.models.kernels import platform
from alignax.models.transformer import ModelConfig
from alignax.program import Program

Prompts = Sequence[Sequence[int]]
SLOTS = 64  # rows that are decoded at once where memory is no guide
# Seconds that a call of `decode` may take: a signal is looked at after each.
CALL = 0.1
CHUNK = 64  # the most decoding steps of one call
STRINGS = 8  # the same where stop strings end completions, since a row makes tokens in vain until the host has found the string


class Completions(NamedTuple):
    """Sampled completions of B prompts, n each, on the host; arrays are 0 and False after a completion's end."""

    tokens: np.ndarray  # [B, n, C] int32, with the stop id, or the tokens of the stop string, at the end
    mask: np.ndarray  # [B, n, C] bool, True at the tokens of a completion
    logps: np.ndarray  # [B, n, C] float32, log-probs under the speaker's own distribution, in nats
    ended: np.ndarray  # [B, n] text: STOP_ID, STOP_STRING or LENGTH
    sampling: Sampling = Sampling()
    steps: int = 0  # decoding steps in all; a step decodes all rows
    prefills: int = 0  # calls of the prefill program
    drawn: np.ndarray | None = None  # [B, n, C] float32, log-probs that tokens were sampled with (greedy: 0); None: equal to `logps`
    of_model: bool = True  # whether the speaker's distribution is that of one model, neither combined nor processed

    @property
    def exact(self) -> bool:
        """Whether the completions are samples of a model's own distribution, so that `logps` are the log-probs of sampling."""
        return self.sampling.exact and self.of_model

    def rows(self) -> list[list[np.ndarray]]:
        """The tokens of each prompt's completions, [B][n] arrays without padding."""
        return [[t[m] for t, m in zip(*pair, strict=True)] for pair in zip(self.tokens, self.mask, strict=True)]

    def drawn_rows(self) -> list[list[np.ndarray]]:
        """The log-probs that the tokens of each prompt's completions were sampled with, [B][n] arrays without padding."""
        drawn = self.logps if self.drawn is None else self.drawn
        return [[x[m] for x, m in zip(*pair, strict=True)] for pair in zip(drawn, self.mask, strict=True)]

    def answers(self) -> list[list[np.ndarray]]:
        """The tokens of each prompt's completions without a stop id at the end, [B][n] arrays."""
        return [[bare(*one) for one in zip(*pair, strict=True)] for pair in zip(self.rows(), self.ended, strict=True)]


class Generator:
    """A sampler of one static shape: its two programs are compiled at the first call, and serve any parameters and any prompts that fit.

    Another key, other stop strings, or another number of prompts or samples need no compilation. Another `Shape`, `Sampling`, set of
    stop ids or speaker needs another Generator.
    """

    def __init__(
        self,
        model: ModelConfig | Speaker,
        shape: Shape,
        sampling: Sampling | None = None,
        *,
        stop_ids: Sequence[int] = (),
        stops: Stops | None = None,
        dtype: Any = None,
        cache_dtype: str = "",
        mesh: Mesh | None = None,
    ):
        """Checks all arguments; computes nothing.

        Args:
          model: the speaker to sample from, such as several models combined, see `alignax.generate.speakers`; the config of a model
            stands for `speaker(config, dtype, cache_dtype, mesh)`.
          shape: the static sizes, see `shape_for`.
          sampling: how to sample; default: from the speaker's own distribution.
          stop_ids: ids of the tokens that end a completion.
          stops: strings that end a completion.
          dtype: dtype of activations, default float32. This argument and the next two go with a model's config; a speaker has its own.
          cache_dtype: dtype of the cache, "float32", "bfloat16" or "int8"; empty: the dtype of activations.
          mesh: the mesh of the parameters; None for one device.

        Raises:
          ValueError: for sizes, ids or dtypes that are not possible.
        """
        if isinstance(model, Speaker):
            if (dtype, cache_dtype, mesh) != (None, "", None):
                raise ValueError("a speaker already has a dtype, cache_dtype and mesh; give these to speaker(..) instead")
            self.speaker = model
        else:
            self.speaker = speaker(model, dtype or jnp.float32, cache_dtype, mesh)
        check(self.speaker, shape, stop_ids)
        self.shape, self.stops, self.mesh = shape, stops, self.speaker.mesh
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(map(int, stop_ids))
        self.engine = Engine(self.speaker, shape, self.sampling, tuple(sorted(self.stop_ids)))
        state, staged, emitted = self.engine.layout()
        self._lay = jax.jit(self.engine.lay)
        self._empty = jax.jit(self.engine.empty, out_shardings=state)
        self._prefill = jax.jit(self.engine.prefill, out_shardings=staged)
        self._decode = jax.jit(self.engine.decode, donate_argnums=1, out_shardings=(state, emitted))

    def __call__(self, params: Any, prompts: Prompts, key: jax.Array, n: int = 1, look: Callable[[], None] = lambda: None) -> Completions:
        """Samples `n` completions of each prompt. Every process calls this function with the same prompts.

        Args:
          params: the speaker's parameters, on the mesh; every call may have those of another training step.
          prompts: token ids of each prompt.
          key: PRNG key; the random numbers depend on the key, the prompt's number, the sample's number and the position.
          n: completions of each prompt; the prompt is prefilled once for all of them.
          look: called between two programs; an exception that it raises ends the call.

        Raises:
          ValueError: for n below 1, for no prompts, for empty or too long prompts, and for token ids outside the vocabulary.
        """
        check_prompts(self.shape.prompt, self.speaker.vocab_size, prompts, n)
        return Batching(self, self.lay(params), prompts, key, n).run(look)

    def lay(self, params: Any) -> Any:
        """The parameters laid out for decoding: a copy, which one call of the generator needs, or these if they lie so already."""
        return params if lies(params, self.speaker.laid(params)) else self._lay(params)

    def programs(self, params: Any) -> dict[str, Program]:
        """The programs of the generator by name, with the shapes of their arguments: "prefill", "decode", and "lay" if it calls that.

        Args:
          params: shapes, types and (with a mesh) shardings of the speaker's parameters.
        """
        S, P, Q = self.shape.slots, self.shape.prompt, self.shape.prefill
        one = None if self.mesh is None else meshes.sharding(self.mesh)
        whole = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        state, staged, _ = self.engine.layout()
        laid = self.speaker.laid(params)
        lay = {} if lies(params, laid) else {"lay": Program(self._lay, (params,))}
        prefill = Program(self._prefill, (laid, whole(Q, P), whole(Q)))
        key = whole(*jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape, dtype=jnp.uint32)
        arguments = placed(jax.eval_shape(self._empty), state), placed(prefill.shapes(), staged)
        queue = Queue(whole(), whole(), whole(dtype=jnp.bool_), whole())
        count, each = (1, None) if self.mesh is None else (self.mesh.size, every_device(self.mesh))
        steps = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=each)
        decode = Program(self._decode, (laid, *arguments, queue, whole(S), key, steps))
        return lay | {"prefill": prefill, "decode": decode}

    def place(self, x: Any) -> Any:
        """Puts a small host array on every device."""
        if self.mesh is None:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, meshes.sharding(self.mesh), lambda index: x[index])

    def proposed(self, steps: int) -> Any:
        """The argument `steps` of `decode`, [devices] int32: on each device the number that its process proposes."""
        own = np.full(1, steps, np.int32)
        return own if self.mesh is None else jax.make_array_from_callback((self.mesh.size,), every_device(self.mesh), lambda _: own)


class Batching:
    """The state of one call of a generator: completions so far, and which completion each row decodes."""

    def __init__(self, generator: Generator, params: Any, prompts: Prompts, key: jax.Array, n: int):
        """Allocates the arrays; reads no prompt yet."""
        self.own, self.params, self.prompts, self.n, shape = generator, params, prompts, n, generator.shape
        self.key = np.asarray(jax.random.key_data(key).addressable_data(0))
        self.state: State = generator._empty()
        self.staged: Staged | None = None
        self.block = -1  # prompts block * Q .. block * Q + Q - 1 are staged
        self.next = 0  # number of the next completion to begin, sample next % n of prompt next // n
        self.owner = np.full(shape.slots, -1, np.int32)  # [slots] number of the completion that each row decodes; -1: free
        self.steps, self.pace = 0, 1  # decoding steps so far, and of a call that takes `CALL` seconds, by the last call
        self.longest = min(shape.chunk, STRINGS) if generator.stops else shape.chunk
        total = len(prompts) * n
        self.tokens = np.zeros((total, shape.new), np.int32)
        self.logps, self.drawn = np.zeros((2, total, shape.new), np.float32)
        self.length = np.zeros(total, np.int64)
        self.ended = np.full(total, LENGTH, dtype="<U11")

    def run(self, look: Callable[[], None]) -> Completions:
        """Decodes until all completions have ended; `look` is called between two programs."""
        while self.next < len(self.length) or (self.owner >= 0).any():
            look()
            self.stage()
            self.take(self.decode())
        split = lambda x: x.reshape(len(self.prompts), self.n, *x.shape[1:])
        mask = np.arange(self.own.shape.new) < self.length[:, None]
        tokens, mask, logps, drawn, ended = map(split, (self.tokens, mask, self.logps, self.drawn, self.ended))
        exact = self.own.speaker.exact
        return Completions(tokens, mask, logps, ended, self.own.sampling, self.steps, self.block + 1, drawn, exact)

    def stage(self) -> None:
        """Stages the next block of prompts, once no staged prompt has a completion that waits: runs the prefill program on them."""
        Q, P = self.own.shape.prefill, self.own.shape.prompt
        if self.next == len(self.length) or self.next // self.n // Q <= self.block:
            return
        self.block += 1
        tokens, lengths = np.zeros((Q, P), np.int32), np.ones(Q, np.int32)
        for i, prompt in enumerate(self.prompts[self.block * Q : (self.block + 1) * Q]):
            tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        self.staged = self.own._prefill(self.params, *map(self.own.place, (tokens, lengths)))

    def decode(self) -> Emitted:
        """Runs the decode program, and finds from its time how many steps the next call may have."""
        end = min((self.block + 1) * self.own.shape.prefill * self.n, len(self.length))
        queue = Queue(np.int32(self.next), np.int32(end), np.bool_(end < len(self.length)), np.int32(self.n))
        small = jax.tree.map(self.own.place, (queue, self.owner, self.key))
        began = time.monotonic()
        self.state, out = self.own._decode(self.params, self.state, self.staged, *small, self.own.proposed(min(self.pace, self.longest)))
        out = Emitted(*(np.asarray(x.addressable_data(0)) for x in out))
        if steps := int((out.numbers >= 0).any(axis=0).sum()):
            self.steps += steps
            self.pace = max(int(CALL * steps / (time.monotonic() - began)), 1)
        return out

    def take(self, out: Emitted) -> None:
        """Adds the tokens of a call to the completions, and frees the rows of those that a stop string ends."""
        self.next, self.owner = int(out.next), out.owner.copy()
        real = out.numbers >= 0
        numbers = out.numbers[real]  # the tokens of a completion stand in one row, behind one another
        own, first, inverse, count = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        begin = self.length[own]
        places = begin[inverse] + np.arange(len(numbers)) - first[inverse]
        for mine, made in ((self.tokens, out.tokens), (self.logps, out.logps), (self.drawn, out.drawn)):
            mine[numbers, places] = made[real]
        self.length[own] = begin + count
        stops = self.own.stops
        for i, seen in zip(own, begin, strict=True) if stops else ():
            if stops and (cut := stops.end(self.tokens[i, : self.length[i]], seen)) is not None:
                self.tokens[i, cut:], self.logps[i, cut:], self.drawn[i, cut:], self.length[i] = 0, 0.0, 0.0, cut
                self.ended[i] = STOP_STRING
        last = self.tokens[own, self.length[own] - 1]
        self.ended[own[np.isin(last, list(self.own.stop_ids))]] = STOP_ID
        self.owner[(self.owner >= 0) & (self.ended[self.owner] != LENGTH)] = -1


def every_device(mesh: Mesh) -> NamedSharding:
    """The sharding of an array with one value for each device."""
    return NamedSharding(mesh, PartitionSpec(meshes.AXES))


def lies(params: Any, laid: Any) -> bool:
    """Whether parameters have the dtypes and shardings that they are to be laid out in."""

    def one(x: Any, wanted: Any) -> bool:
        there = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
        return x is wanted or (
            x.dtype == wanted.dtype and (wanted.sharding is None or (there and wanted.sharding.is_equivalent_to(x.sharding, x.ndim)))
        )

    return jax.tree.structure(params) == jax.tree.structure(laid) and jax.tree.all(jax.tree.map(one, params, laid))


def placed(shapes: Any, layout: Any) -> Any:
    """The tree of shapes with the shardings of a layout, where one sharding, or None, may stand for a whole subtree."""
    place = lambda sharding, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)
    return jax.tree.map(place, layout, shapes, is_leaf=lambda x: x is None or isinstance(x, jax.sharding.Sharding))


def shape_for(
    prompts: int,
    longest: int,
    new: int,
    *,
    mesh: Mesh | None = None,
    slots: int = 0,
    prefill: int = 0,
    chunk: int = CHUNK,
    room: int = SLOTS,
) -> Shape:
    """The shape of a generator for a number of completions of prompts with at most `longest` tokens.

    Args:
      prompts: number of completions in all: prompts times samples of each.
      longest: P, the length of the longest prompt.
      new: C, the largest length of a completion.
      mesh: the mesh of the generator; default numbers of rows are multiples of its batch shards.
      slots: rows that are decoded at once; 0: as many as there are completions, at most `room`.
      prefill: prompts that are prefilled at once; 0: a quarter of the rows, at most 16, because every device holds the keys of all of them.
      chunk: the most decoding steps of one call; a call makes fewer where they would take more than a tenth of a second.
      room: the most rows that `slots` 0 gives, see `room_for`.
    """
    shards = 1 if mesh is None else meshes.batch_shards(mesh)
    whole = lambda count: -(-max(count, 1) // shards) * shards
    slots = slots or whole(min(prompts, room))
    return Shape(longest, new, slots, prefill or whole(min(slots, SLOTS) // 4), chunk)


def room_for(speaker: Speaker, positions: int, free: int | None = None) -> int:
    """The most rows of `positions` tokens that a speaker decodes at once by default.

    On an accelerator they are as many as fit into half of the free memory of a device, with their logits: one step reads all weights,
    however many rows share it. On a CPU every row costs its own time, so that 64 rows, which are filled again, waste least.

    Args:
      speaker: the speaker.
      positions: tokens of prompt and completion.
      free: bytes of a device that are free; None: three quarters of its memory.
    """
    mesh = speaker.mesh or Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1, 1), meshes.AXES)
    memory = meshes.device_memory(mesh)
    if platform(mesh) == "cpu" or not memory:
        return SLOTS
    shards = meshes.batch_shards(mesh)
    cache = jax.eval_shape(lambda: speaker.empty(shards, positions))  # a row of each shard
    cache = cache if speaker.mesh is None else placed(cache, speaker.layout("batch"))
    one = meshes.device_bytes(cache) + 16 * speaker.predicted  # logits, and what sampling makes of them
    return max((memory * 3 // 4 if free is None else free) // 2 // one, 1) * shards


def check(own: Speaker, shape: Shape, stop_ids: Sequence[int]) -> None:
    """Refuses sizes, stop ids and lengths that no generator of the speaker can have."""
    for field, value in dataclasses.asdict(shape).items():
        if value < 1:
            raise ValueError(f"{field} is {value} in {shape}; it must be 1 or more")
    shards = 1 if own.mesh is None else meshes.batch_shards(own.mesh)
    for field in ("slots", "prefill"):
        if getattr(shape, field) % shards:
            raise ValueError(f"{field} {getattr(shape, field)} do not divide into {shards} batch shards; use a multiple of {shards}")
    if odd := [i for i in stop_ids if not 0 <= i < own.vocab_size]:
        raise ValueError(f"stop ids {odd} are not among the model's {own.vocab_size} tokens; leave them out")
    check_length(own.positions, shape.prompt, shape.new)


def check_room(config: ModelConfig, prompt: int, new: int, field: str = "max_new_tokens") -> None:
    """Refuses prompts and completions that exceed a model's positions, see `alignax.generate.speakers.positions`."""
    check_length(positions(config), prompt, new, field)


def check_length(most: int, prompt: int, new: int, field: str = "max_new_tokens") -> None:
    """Refuses prompts and completions that exceed `most` positions together."""
    if prompt + new > most:
        raise ValueError(
            f"prompts of {prompt} tokens and {field} {new} exceed the model's {most} positions; "
            + (f"lower {field} to {most - prompt}" if prompt < most else f"shorten the prompts to less than {most} tokens")
        )


def check_prompts(longest: int, vocab_size: int, prompts: Prompts, n: int) -> None:
    """Refuses n below 1, no prompts, empty prompts, prompts of more than `longest` tokens, and token ids outside the vocabulary."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be 1 or more completions of each prompt")
    if not len(prompts):
        raise ValueError("there are no prompts; give at least one")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; it must have at least 1, and at most the {longest} of the cache")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {i} holds token ids from {min(prompt)} to {max(prompt)}; the model has {vocab_size} tokens")
