"""Per-token log-probs and entropy from the final hidden state, in float32, never holding `[.., T, V]` logits.

Only completion positions are scored: each batch shard moves its own to the front, and chunks that hold none are skipped. Logits
exist for one chunk at a time and are recomputed in the backward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.types import Outputs


def token_logps(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 256,
    mesh: Mesh | None = None,
) -> Outputs:
    """Log-prob of each target and entropy of its distribution, where `mask` is True; 0 elsewhere.

    Args:
      hidden: [R, T, D], in the compute dtype; `hidden[:, t]` predicts `targets[:, t]`.
      weight: [D, V], in its storage dtype: it is cast inside the chunk, so that its gradient accumulates in float32.
      targets: [R, T] int.
      mask: [R, T] bool.
      chunk: positions scored at a time in each batch shard; memory is about `chunk * V` floats, a few times over.
      mesh: gives the number of batch shards; positions never leave theirs.

    Returns:
      Outputs with [R, T] float32 arrays.
    """
    R, T, D = hidden.shape
    S = meshes.batch_shards(mesh) if mesh is not None else 1
    S = S if R % S == 0 else 1  # evaluation of a few rows
    P = R // S * T  # positions of a shard
    chunk = min(chunk, P)
    chunks = -(-P // chunk)
    flat_mask = mask.reshape(S, P)
    order = jnp.argsort(~flat_mask, axis=1, stable=True)  # [S, P] completion positions first
    order = jnp.pad(order, ((0, 0), (0, chunks * chunk - P)))
    used = flat_mask.sum(axis=1).max()  # positions of the fullest shard
    x = jnp.take_along_axis(hidden.reshape(S, P, D), order[..., None], axis=1)
    y = jnp.take_along_axis(targets.reshape(S, P), order, axis=1)
    x = meshes.constrain(x, mesh, "batch", None, None)
    weight = meshes.constrain(weight, mesh, None, "vocab")  # gathered over fsdp once, not in every chunk

    def step(i: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing = jnp.zeros(y.shape, jnp.float32)
        return jax.lax.cond(i * chunk < used, score, lambda *_: (nothing, nothing), x, weight, y)

    split = lambda a: a.reshape(S, chunks, chunk, *a.shape[2:]).swapaxes(0, 1)  # [chunks, S, C, ...]
    out = jax.lax.map(lambda args: step(*args), (jnp.arange(chunks), split(x), split(y)))
    merge = lambda a: a.swapaxes(0, 1).reshape(S, chunks * chunk)[:, :P]
    back = jnp.argsort(order[:, :P], axis=1)
    restore = lambda a: jnp.where(mask, jnp.take_along_axis(merge(a), back, axis=1).reshape(R, T), 0.0)
    return Outputs(*map(restore, out))


@jax.custom_vjp
def score(x: jax.Array, weight: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-prob of y [S, C] and entropy under softmax(x W), from x [S, C, D] and W [D, V], both in float32.

    With z = x W, p = softmax(z), q = log p and H the entropy: d q_y / dz = onehot(y) - p and dH / dz = -p (q + H). Written out, the
    backward pass is one sweep over the recomputed logits; differentiated by machine it was three to four.
    """
    return _score(x, weight, y)[0]


def _logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    # The weight is cast here, in the chunk, so that its gradient accumulates over the chunks in float32.
    return jnp.einsum("scd,dv->scv", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def _score(x: jax.Array, weight: jax.Array, y: jax.Array) -> Any:
    z = _logits(x, weight)
    top = z.max(axis=-1, keepdims=True)
    e = jnp.exp(z - top)
    total = e.sum(axis=-1)
    lse = top[..., 0] + jnp.log(total)
    # As a product of vectors: the plain (e * z).sum() took XLA on CPU 15 times as long, its reduction over an exp being scalar code.
    entropy = lse - jnp.einsum("scv,scv->sc", e, z) / total
    logp = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - lse
    return (logp, entropy), (x, weight, y, lse, entropy)


def _score_backward(saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    x, weight, y, lse, entropy = saved
    dlogp, dentropy = (c[..., None] for c in cotangents)
    q = _logits(x, weight) - lse[..., None]
    hit = jnp.arange(weight.shape[1]) == y[..., None]
    dz = jnp.where(hit, dlogp, 0.0) - jnp.exp(q) * (dlogp + dentropy * (q + entropy[..., None]))
    dz = dz.astype(x.dtype)  # what a matrix unit takes; sums stay float32
    dx = jnp.einsum("scv,dv->scd", dz, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    dweight = jnp.einsum("scd,scv->dv", x, dz, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dweight.astype(weight.dtype), None


score.defvjp(_score, _score_backward)
