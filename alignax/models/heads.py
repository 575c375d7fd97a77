"""Per-token log-probs and entropy from the final hidden state, in float32, never holding `[.., T, V]` logits.

Only completion positions are scored: each batch shard moves its own to the front, and chunks that hold none are skipped. Logits
exist for one chunk at a time and are recomputed in the backward pass.
"""

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

    def score(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # [S, C, D], [S, C]
        logits = jnp.einsum("scd,dv->scv", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        entropy = lse - (jax.nn.softmax(logits, axis=-1) * logits).sum(-1)
        return target - lse, entropy

    @jax.checkpoint
    def step(i: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing = jnp.zeros(y.shape, jnp.float32)
        return jax.lax.cond(i * chunk < used, score, lambda *_: (nothing, nothing), x, y)

    split = lambda a: a.reshape(S, chunks, chunk, *a.shape[2:]).swapaxes(0, 1)  # [chunks, S, C, ...]
    out = jax.lax.map(lambda args: step(*args), (jnp.arange(chunks), split(x), split(y)))
    merge = lambda a: a.swapaxes(0, 1).reshape(S, chunks * chunk)[:, :P]
    back = jnp.argsort(order[:, :P], axis=1)
    restore = lambda a: jnp.where(mask, jnp.take_along_axis(merge(a), back, axis=1).reshape(R, T), 0.0)
    return Outputs(*map(restore, out))
