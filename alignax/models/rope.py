"""Rotary position embeddings, with the scalings of Hugging Face models."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.models.config import ModelConfig

Rope = tuple[jax.Array, jax.Array]  # cos and sin


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Applies a rotary position embedding to x [R, T, heads, head_dim]; pairs are (i, i + dim / 2), as in Hugging Face.

    Args:
      x: [R, T, heads, head_dim] queries or keys.
      rope: cos and sin, [R, T, dim / 2] each. If dim < head_dim, only the first dim dimensions rotate.

    Returns:
      [R, T, heads, head_dim] in the dtype of x.
    """
    cos, sin = rope[0][:, :, None], rope[1][:, :, None]  # [R, T, 1, head_dim / 2]
    pairs = cos.shape[-1]
    turning, still = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


def rope_tables(c: ModelConfig, positions: jax.Array, lengths: jax.Array | None = None) -> Rope:
    """The tables cos and sin of the rotary angles for positions [R, T]: [R, T, dim / 2] each.

    If layers with a window have a theta of their own, the tables are [2, R, T, dim / 2]: index 1 is for layers with a window. `lengths`
    [R, T] are those of each token's own sequence; None: each row is one sequence.
    """
    length = positions.max(axis=1, keepdims=True) + 1 if lengths is None else lengths
    whole = rope_angles(c, positions, length)
    if c.local_rope_theta is None or not any(c.sliding_windows):
        return whole
    local = rope_angles(dataclasses.replace(c, rope_theta=c.local_rope_theta, rope_scaling=()), positions, length)
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), whole, local)


def rope_angles(c: ModelConfig, positions: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cos and sin of the rotary angles, [R, T, dim / 2] float32 each, for the dim dimensions of a head that rotate.

    Su et al. 2021, arXiv:2104.09864. All rope scalings of transformers are supported: linear (Chen et al. 2023, arXiv:2306.15595),
    dynamic NTK, YaRN (Peng et al. 2023, arXiv:2309.00071), LongRoPE (Ding et al. 2024, arXiv:2402.13753) and the Llama 3.1 ramp.
    Dynamic NTK and LongRoPE depend on the length of a sequence. We use each row's own length, so that a row's log-probs do not depend on
    other rows; transformers uses the longest row of the batch.

    Args:
      c: the model config.
      positions: [R, T] int.
      length: [R, 1] or [R, T] int, the number of real tokens in each row or of a token's own sequence; with a cache, of those read so far.
    """
    s, dim = dict(c.rope_scaling), int(c.head_dim * c.partial_rotary_factor)
    kind = s.get("rope_type", "default")
    half = np.arange(0, dim, 2, dtype=np.float64) / dim
    freq = c.rope_theta**-half  # [dim / 2]
    original = s.get("original_max_position_embeddings") or c.max_position_embeddings
    factor = s.get("factor") or c.max_position_embeddings / original
    scale = 1.0
    if kind == "linear":
        freq = freq / factor
    elif kind == "llama3":
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = original * freq / (2 * np.pi)  # rotations over the original context
        ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
        freq = freq / factor * (1 - ramp) + freq * ramp
    elif kind == "yarn":
        turn = lambda n: dim * np.log(original / (n * 2 * np.pi)) / (2 * np.log(c.rope_theta))
        low, high = turn(s.get("beta_fast") or 32), turn(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        freq = freq / factor * ramp + freq * (1 - ramp)
        scale = _yarn_scale(s, factor)
    elif kind == "longrope":
        scale = s.get("attention_factor") or (1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))
        long, short = (jnp.asarray(freq / s[name], jnp.float32)[None] for name in ("long_factor", "short_factor"))
        freq = jnp.where((length > original)[..., None], long[None], short[None])  # [R, 1 or T, dim / 2]
    elif kind == "dynamic":
        context = c.max_position_embeddings  # dynamic NTK scales from this, even if the config has another original context
        stretch = 1 + factor * (jnp.maximum(length, context) / context - 1)  # [R, 1 or T], 1 within the original context
        theta = c.rope_theta * stretch ** (dim / (dim - 2))
        freq = theta[..., None] ** -jnp.asarray(half, jnp.float32)[None, None]  # [R, 1 or T, dim / 2]
    freq = jnp.broadcast_to(jnp.asarray(freq, jnp.float32), (1, 1, dim // 2)) if jnp.ndim(freq) == 1 else freq
    angles = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _yarn_scale(s: dict[str, Any], factor: float) -> float:
    """YaRN's attention scale; DeepSeek's variant if both of its coefficients, mscale and mscale_all_dim, are given."""
    get = lambda scale, m: 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0
    if s.get("attention_factor") is not None:
        return s["attention_factor"]
    if s.get("mscale") and s.get("mscale_all_dim"):
        return get(factor, s["mscale"]) / get(factor, s["mscale_all_dim"])
    return get(factor, 1.0)


def shares_prompts(config: ModelConfig) -> bool:
    """Whether responses of different lengths may share the states of their prompt: rotary angles must not depend on a row's length."""
    return dict(config.rope_scaling).get("rope_type") not in ("dynamic", "longrope")
