"""The heads of a model: per-token log-probs and vocabulary statistics, reward scores and critic values, from the final hidden states.

Log-probs and statistics are float32, and no array of logits `[.., T, V]` is ever held. Only completion positions are scored: each
batch shard moves its completion positions to the front, and the loop over chunks stops when the fullest shard is done. With a context
axis the positions of a batch shard are dealt to its context shards. Logits exist for one chunk at a time. The backward pass computes
them again; it is hand-written:

    z = x W, p = softmax(z):   d log p(y) / dz = onehot(y) - p,   and for each statistic its slope, see `alignax.models.statistics`

With a soft cap and a temperature s, z = cap tanh(x W / cap) / s, and both gradients get the factor
dz / d(x W) = (1 - (s z / cap)^2) / s. A token that is never predicted has a logit so low that its probability is 0, and no gradient.

Automatic differentiation would pass three to four times over the logits of a chunk instead of once. It would also sum the gradient of
W over the data shards in every chunk instead of once. A statistic that no loss reads is not computed, or not differentiated.

On a mesh with fsdp the backward pass goes through the vocabulary in blocks, and through the chunks of positions in each: the sums of the
softmax are known from the forward pass, so a block needs its own columns of W alone. The gradient of a block is then reduce-scattered,
and no device holds that of the whole W. See `_by_blocks`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.models.rows import at_places
from alignax.models.statistics import (
    Chunk,
    Statistic,
    check_statistics,
    entropy,
    generalised_jsd,
    log_sum_sq,
    merged,
    policy_kl,
    ref_kl,
)
from alignax.types import Outputs

Teacher = tuple[jax.Array, jax.Array] | None  # the teacher's hidden states and output weight; the student's vocabulary
Taught = tuple[jax.Array, jax.Array, jax.Array | None] | None  # the same, and the places of packed rows
NEVER = -1e30  # the logit of a token that is never predicted: its probability is 0, and the logit itself is finite


class Shaping(NamedTuple):
    """The changes to logits before their softmax, in this order: soft cap, temperature, tokens that are never predicted."""

    cap: float | None = None  # see `soft_cap`
    temperature: float = 1.0
    unused: tuple[tuple[int, int], ...] = ()  # ranges [first, end) of token ids that are never predicted


PLAIN = Shaping()


@jax.named_scope("head")
def token_logps(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 256,
    mesh: Mesh | None = None,
    how: Shaping = PLAIN,
    teacher: Taught | Teacher = None,
    mixture: tuple[float, float] = (0.5, 1.0),
    statistics: tuple[Statistic, ...] = (),
    places: jax.Array | None = None,
) -> Outputs:
    """The log-prob of each target token, and statistics of the distribution that predicts it; 0 where `mask` is False.

    Args:
      hidden: [R, T, D] hidden states in the compute dtype; `hidden[:, t]` predicts `targets[:, t]`.
      weight: [D, V] output weight, in its storage dtype.
      targets: [R, T] int.
      mask: [R, T] bool, True at the positions to score.
      chunk: positions that each batch shard scores at a time; memory is a few times `chunk * V` floats.
      mesh: gives the number of batch shards; a position is computed in its own shard. None for one device.
      how: the changes to the logits, the teacher's too.
      teacher: hidden states [R, T, E] in the compute dtype and output weight [E, V] of another model. The outputs then have
        `ref_kl` = KL(teacher || softmax), `policy_kl` = KL(softmax || teacher) and `jsd`. The teacher gets no gradient.
      mixture: beta and temperature of `jsd`.
      statistics: further statistics, beside the entropy, the log sum of squares and those of the teacher.
      places: [R, T] int, for hidden states [S, P, D] of packed rows: the position among the P of its batch shard whose state predicts a
        target. The teacher's third value is the like for its own states.

    Returns:
      Outputs with [R, T] float32 arrays; `log_sum_sq` carries no gradient.

    Raises:
      ValueError: for two statistics with the same name, and for a statistic that needs a teacher if there is none.
    """
    own = {"entropy": entropy, "log_sum_sq": log_sum_sq}
    if teacher is not None:
        own |= {"ref_kl": ref_kl, "policy_kl": policy_kl, "jsd": generalised_jsd(*mixture)}
    every = merged(tuple(own.values()), statistics)
    check_statistics(every, teacher is not None)
    R, T = targets.shape
    S = hidden.shape[0] if places is not None else meshes.batch_shards(mesh) if mesh is not None else 1
    S = S if R % S == 0 else 1  # an evaluation may have too few rows
    P = R // S * T  # positions of a shard
    C = 1 if mesh is None else mesh.shape["context"]
    most = -(-(P if places is None else min(P, hidden.shape[1])) // C)  # scored ones; of a packed row each has a place of its own
    chunk = min(chunk, most)
    size = -(-most // chunk) * chunk
    scored = mask.reshape(S, P)
    rank = jnp.cumsum(scored, axis=1) - 1  # [S, P] of a completion position among those of its shard
    rank = rank % C * size + rank // C  # its place, where they are dealt to the C context shards
    move = lambda to: jnp.zeros(C * size, jnp.int32).at[to].set(jnp.arange(P, dtype=jnp.int32), mode="drop")
    order = jax.vmap(move)(jnp.where(scored, rank, C * size))  # [S, C size], completion positions first
    count = -(-scored.sum(axis=1).max() // C)  # of the fullest shard

    def packed(states: jax.Array, places: jax.Array | None) -> jax.Array:
        at = order if places is None else jnp.take_along_axis(places.reshape(S, P), order, axis=1)
        part = jnp.take_along_axis(states.reshape(S, -1, states.shape[-1]), at[..., None], axis=1)  # [S, C size, D]
        return meshes.constrain(part.reshape(S * C, size, -1), mesh, "scored", None, None)

    x, y = packed(hidden, places), jnp.take_along_axis(targets.reshape(S, P), order, axis=1).reshape(S * C, size)
    taught = None if teacher is None else (packed(teacher[0], teacher[2] if len(teacher) == 3 else None), teacher[1])
    scores: Any = score(chunk, mesh, how, every, x, weight, y, count, taught)
    back = jnp.maximum(rank, 0)
    restore = lambda a: jnp.where(mask, jnp.take_along_axis(a.reshape(S, -1), back, axis=1).reshape(R, T), 0.0)
    logps, *values = map(restore, scores)
    found = dict(zip(every, values, strict=True))
    found[log_sum_sq] = jax.lax.stop_gradient(found[log_sum_sq])
    fields: Any = {name: found[statistic] for name, statistic in own.items()}
    return Outputs(logps, **fields, statistics={statistic.name: found[statistic] for statistic in statistics})


@jax.named_scope("head")
def last_scores(hidden: jax.Array, mask: jax.Array, weight: jax.Array, offset: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """A reward model's scores of rows, [R, labels] float32, from the last real token, as in transformers.

    Args:
      hidden: [R, T, D] hidden states, or [S, P, D] of packed rows.
      mask: [R, T] bool, True for real tokens, also those that a chat template writes after the completion. Padding may stand at
        either end. A row without real tokens has score 0.
      weight: [D, labels].
      offset: [labels], subtracted from every score: the mean score of the initial policy's samples, say. It is not trained.
      places: [R, T] int, see `alignax.models.rows.Laid`.
    """
    scores = last_states(hidden, mask, places) @ weight.astype(jnp.float32) - jax.lax.stop_gradient(offset)[None]
    return jnp.where(mask.any(axis=1)[:, None], scores, 0.0)


def last_states(hidden: jax.Array, mask: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """The hidden state of each row's last real token: [R, D] float32.

    Args:
      hidden: [R, T, D], or [S, P, D] of packed rows.
      mask: [R, T] bool, True for real tokens; a row without any gives its last position.
      places: [R, T] int, see `alignax.models.rows.Laid`.
    """
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)[:, None]  # [R, 1]
    if places is None:
        return jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0].astype(jnp.float32)
    return at_places(hidden, jnp.take_along_axis(places, last, axis=1))[:, 0].astype(jnp.float32)


@jax.named_scope("head")
def token_values(
    hidden: jax.Array, scored: jax.Array, weight: jax.Array, offset: jax.Array | None = None, places: jax.Array | None = None
) -> jax.Array:
    """A critic's values: its estimates of the return before tokens[t] is chosen, [B, N, T] float32, or [B, N, T, H] of H heads.

    Args:
      hidden: [R, T, D] hidden states, R = B * N; or [S, P, D] of packed rows.
      scored: [B, N, T] bool, True for completion tokens; other values are 0.
      weight: [D, H].
      offset: [H], subtracted from the values as from a reward model's scores, and not trained; None: no offset.
      places: [R, T] int, see `alignax.models.rows.Laid`.
    """
    before = hidden[:, :-1] if places is None else hidden
    values = before.astype(jnp.float32) @ weight.astype(jnp.float32)  # [R, T - 1, H]
    if offset is not None:
        values = values - jax.lax.stop_gradient(offset)[None, None]
    values = at_places(values, None if places is None else places[:, :-1])
    values = jnp.pad(values, ((0, 0), (1, 0), (0, 0))).reshape(*scored.shape, -1)
    values = jnp.where(scored[..., None], values, 0.0)
    return values[..., 0] if values.shape[-1] == 1 else values


def soft_cap(z: jax.Array, cap: float | None) -> jax.Array:
    """Soft-capped logits cap * tanh(z / cap), within +-cap (Gemma 2, arXiv:2408.00118), of the shape of z; z itself without a cap."""
    return z if cap is None else cap * jnp.tanh(z / cap)


def shaped(z: jax.Array, how: Shaping, begin: jax.Array | int = 0) -> jax.Array:
    """The logits [.., V] whose softmax is the model's distribution, from the raw logits z [.., V] of V tokens from id `begin` on."""
    z = soft_cap(z, how.cap)
    z = z if how.temperature == 1 else z / how.temperature
    return jnp.where(predicted(how, z, begin), z, NEVER) if how.unused else z


def predicted(how: Shaping, z: jax.Array, begin: jax.Array | int = 0) -> jax.Array:
    """Whether each of the V tokens from id `begin` on is ever predicted: [1, .., 1, V] bool, of the rank of z [.., V].

    `how.unused` must not be empty.
    """
    at = begin + jax.lax.broadcasted_iota(jnp.int32, (1,) * (z.ndim - 1) + z.shape[-1:], z.ndim - 1)
    return functools.reduce(jnp.logical_and, [(at < first) | (at >= behind) for first, behind in how.unused])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def score(
    chunk: int,
    mesh: Mesh | None,
    how: Shaping,
    statistics: tuple[Statistic, ...],
    x: jax.Array,
    weight: jax.Array,
    y: jax.Array,
    count: jax.Array,
    teacher: Teacher,
) -> tuple[jax.Array, ...]:
    """The log-probs of targets y [S, P] and the statistics of softmax(x W), each [S, P] float32, from x [S, P, D] and W [D, V].

    S are the shards of scored positions, P the positions of each. Those after the first `count` are not scored. The teacher has hidden
    states [S, P, E] and output weight [E, V].
    """
    return _scores(chunk, mesh, how, statistics, x, weight, y, count, teacher)[0]


def _forward(chunk: int, mesh: Mesh | None, how: Shaping, statistics: tuple[Statistic, ...], *primals: Any) -> Any:
    return _scores(chunk, mesh, how, statistics, *jax.tree.map(lambda x: x.value, primals))


def _scores(
    chunk: int,
    mesh: Mesh | None,
    how: Shaping,
    statistics: tuple[Statistic, ...],
    x: jax.Array,
    weight: jax.Array,
    y: jax.Array,
    count: jax.Array,
    teacher: Teacher,
) -> Any:
    w = _whole(weight, x.dtype, mesh)
    taught = None if teacher is None else (teacher[0], _whole(teacher[1], teacher[0].dtype, mesh))

    def body(chunk: int, first: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        z = shaped(_logits(_part(x, first, chunk), w), how)
        top = z.max(axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        total = e.sum(axis=-1)
        at = Chunk(z, _part(y, first, chunk), top[..., 0] + jnp.log(total), e, total)
        if taught is not None:
            zt = shaped(_logits(_part(taught[0], first, chunk), taught[1]), how)
            at = dataclasses.replace(at, zt=zt, lse_t=jax.nn.logsumexp(zt, axis=-1))
        logp = at.of_target(z) - at.lse
        parts = (logp, *(_of_shape(s.forward(at), y.shape[0], chunk, s) for s in statistics), at.lse)
        parts += () if at.lse_t is None else (at.lse_t,)
        return tuple(_place(a, b, first) for a, b in zip(out, parts, strict=True))

    zeros = (jnp.zeros(y.shape, jnp.float32),) * (len(statistics) + (2 if teacher is None else 3))
    logp, *rest = _over_chunks(chunk, count, body, zeros)
    values, sums = rest[: len(statistics)], rest[len(statistics) :]
    return (logp, *values), (x, weight, y, count, teacher, values, sums)


def _of_shape(value: jax.Array, S: int, C: int, statistic: Statistic) -> jax.Array:
    if jnp.shape(value) != (S, C):
        raise ValueError(
            f"the statistic {statistic.name!r} of {C} positions in {S} batch shards has shape {jnp.shape(value)}; it must be {(S, C)}, a "
            "number for each position"
        )
    return value.astype(jnp.float32)


def _backward(
    chunk: int, mesh: Mesh | None, how: Shaping, statistics: tuple[Statistic, ...], saved: Any, cotangents: tuple[Any, ...]
) -> Any:
    x, weight, y, count, teacher, values, sums = saved
    every = list(zip(statistics, values, cotangents[1:], strict=True))
    read = [entry for entry in every if not isinstance(entry[2], SymbolicZero)]
    if flat := [s.name for s, _, _ in read if s.slope is None]:
        raise ValueError(f"the statistic {flat[0]!r} is differentiated and has no slope; give it one, or read it under stop_gradient")
    dlogps = jnp.zeros_like(sums[0]) if isinstance(cotangents[0], SymbolicZero) else cotangents[0]
    states, w, w_t = None, _whole(weight, x.dtype, mesh), None
    if teacher is not None and any(s.taught for s, _, _ in read):
        states, w_t = teacher[0], _whole(teacher[1], teacher[0].dtype, mesh)
    of_block = functools.partial(_of_block, chunk, how, tuple(s for s, _, _ in read))
    rows = _Rows(x, y, dlogps, sums, [entry[1:] for entry in read], states)
    if mesh is not None and _in_blocks(mesh, x.shape[0], weight.shape[0]) and all(s.local for s, _, _ in read):
        dx, dw = _by_blocks(mesh, of_block, count, rows, w, w_t)
    else:
        dw = meshes.constrain(jnp.zeros((x.shape[0], *w.shape), jnp.float32), mesh, "scored", None, "vocab")
        dx, dw = of_block(count, rows, w, w_t, 0, (jnp.zeros_like(x), dw))
        dw = meshes.constrain(dw.sum(axis=0), mesh, "embed", "vocab")
    return dx, dw.astype(weight.dtype), None, None, None


class _Rows(NamedTuple):
    """What the backward pass knows of the positions: arrays [S, P, ...]."""

    x: jax.Array
    y: jax.Array
    dlogps: jax.Array
    sums: list[jax.Array]  # the logsumexp of the logits, and perhaps of the teacher's
    read: list[tuple[jax.Array, jax.Array]]  # values and cotangents of the statistics that a loss reads
    states: jax.Array | None  # the teacher's


def _of_block(
    chunk: int,
    how: Shaping,
    statistics: tuple[Statistic, ...],
    count: jax.Array,
    rows: _Rows,
    w: jax.Array,
    w_t: jax.Array | None,
    first_id: jax.Array | int,
    sums: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Adds the gradients of the tokens from `first_id` on to those of x [S, P, D] and of their columns w [D, V], [S, D, V]."""

    def body(chunk: int, first: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (dx, dw), here = sums, lambda a: _part(a, first, chunk)
        part, y, dlogps, lse, read, states = jax.tree.map(here, rows)
        dlogp = dlogps[..., None]
        z = shaped(_logits(part, w), how, first_id)
        at = Chunk(z, y, lse[0], first=first_id)
        if w_t is not None:
            at = dataclasses.replace(at, zt=shaped(_logits(states, w_t), how, first_id), lse_t=lse[1])
        q, hit, scale = at.logps, at.hit, dlogp
        for statistic, (value, cotangent) in zip(statistics, read, strict=True):
            if statistic == entropy:  # shares the product with p; further statistics then change no bit of these gradients
                scale = dlogp + cotangent[..., None] * (q + value[..., None])
        dz = jnp.where(hit, dlogp, 0.0) - at.probs * scale
        for statistic, (value, cotangent) in zip(statistics, read, strict=True):
            if statistic != entropy and statistic.slope is not None:
                slope = statistic.slope(at, value)
                factors = slope if isinstance(slope, tuple) else (slope,)
                dz = dz + functools.reduce(jnp.multiply, factors, cotangent[..., None])
        if how.cap is not None:
            dz = dz * (1 - jnp.square(z * (how.temperature / how.cap)))
        if how.temperature != 1:
            dz = dz / how.temperature
        if how.unused:
            dz = jnp.where(predicted(how, dz, first_id), dz, 0.0)
        dz = dz.astype(part.dtype)  # matrix units take the compute dtype; sums stay float32
        dpart = jnp.einsum("scv,dv->scd", dz, w, preferred_element_type=jnp.float32)
        # A product of two matrices: as a contraction of their second axes it took a third longer on a CPU.
        dw = dw + jnp.matmul(part.swapaxes(1, 2), dz, preferred_element_type=jnp.float32)
        return _place(dx, (here(dx) + dpart).astype(dx.dtype), first), dw

    return _over_chunks(chunk, count, body, sums)


def _in_blocks(mesh: Mesh, S: int, D: int) -> bool:
    """Whether the gradient of a weight with D rows is computed in blocks of the vocabulary: fsdp shards both it and the positions."""
    fsdp = mesh.shape["fsdp"]
    return fsdp > 1 and D % fsdp == 0 and S == meshes.batch_shards(mesh) * mesh.shape["context"]


def _by_blocks(
    mesh: Mesh, of_block: Callable[..., Any], count: jax.Array, rows: _Rows, w: jax.Array, w_t: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x [S, P, D] and, sharded as the weight is, of W [D, V]; `of_block` is `_of_block` of these rows' statistics.

    There are as many blocks as fsdp shards: the float32 sums of a block are as large as the shard of the gradient that a device keeps.
    A block has D columns or more, though, so that its products are no smaller than those of a layer.
    """
    (D, V), vocab = w.shape, meshes.sharding(mesh, (None, "vocab"), w.shape).spec
    split = vocab[1] is not None  # else every tensor shard computes all of the vocabulary

    def run(count: jax.Array, rows: _Rows, w: jax.Array, w_t: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        fsdp, x, V = mesh.shape["fsdp"], rows.x, w.shape[1]  # V of this tensor shard
        begin = jax.lax.axis_index("tensor") * V if split else 0

        def body(size: int, first: jax.Array | int, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dx, dw = sums
            own, taught = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, first, size, axis=1), (w, w_t))
            dx, part = of_block(count, rows, own, taught, begin + first, (dx, jnp.zeros((1, D, size), jnp.float32)))
            part = jax.lax.psum(_reduce_scattered(part[0], "fsdp", fsdp), ("data", "context"))  # [D_fsdp, size]
            return dx, jax.lax.dynamic_update_slice_in_dim(dw, part, first, axis=1)

        size = min(max(-(-V // fsdp), D), V)
        sums = jnp.zeros(x.shape, jnp.float32), jnp.zeros((D // fsdp, V), jnp.float32)
        sums = jax.lax.fori_loop(0, V // size, lambda i, sums: body(size, i * size, sums), sums)
        dx, dw = body(V % size, V - V % size, sums) if V % size else sums
        dx = dx.astype(x.dtype)
        return jax.lax.psum(dx, "tensor") if split else dx, dw

    scored, whole = (meshes.sharding(mesh, axes).spec for axes in (("scored",), ()))
    out = scored, meshes.sharding(mesh, ("embed", "vocab"), (D, V)).spec
    specs: Any = (whole, scored, vocab, vocab)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(count, rows, w, w_t)


score.defvjp(_forward, _backward, symbolic_zeros=True)


def _reduce_scattered(x: jax.Array, axis: str, size: int) -> jax.Array:
    """The sum of x [D, V] over a mesh axis of `size` devices, sharded over them: [D / size, V]; for use in a `shard_map`.

    More than four devices take two steps: over the columns of the devices in a rectangle, then over its rows. XLA for TPU reduce-scatters
    over the rows and columns of a slice; over a whole slice such as 4 x 4 it makes an all-reduce, which sends almost twice as much.
    """
    across = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0) if size > 4 else 1
    at = np.arange(size).reshape(-1, across)
    x = x.reshape(*at.shape, -1, x.shape[-1])
    for groups in (at.T, at):
        x = jax.lax.psum_scatter(x, axis, axis_index_groups=groups.tolist()) if groups.shape[1] > 1 else x[0]
    return x


def _whole(weight: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """The output weight [D, V] in the compute dtype, gathered over fsdp once instead of in every chunk."""
    return meshes.constrain(weight.astype(dtype), mesh, None, "vocab")


def _logits(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("scd,dv->scv", x, w, preferred_element_type=jnp.float32)  # [S, C, V]


def _over_chunks(chunk: int, count: jax.Array, body: Callable[[int, jax.Array, Any], Any], sums: Any) -> Any:
    """Calls `body(size, first position, sums)` for chunks of `chunk` positions, and of a quarter of it for those left of `count`."""
    small, whole = max(chunk // 4, 1) if chunk % 4 == 0 else chunk, count // chunk
    sums = jax.lax.fori_loop(0, whole, lambda i, sums: body(chunk, i * chunk, sums), sums)
    left = count - whole * chunk
    return jax.lax.fori_loop(0, -(-left // small), lambda i, sums: body(small, whole * chunk + i * small, sums), sums)


def _part(a: jax.Array, first: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, first, chunk, axis=1)  # [S, C, ...]


def _place(a: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part, first, axis=1)
