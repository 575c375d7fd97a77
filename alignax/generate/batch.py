"""Completions as a batch: the prompt and what was sampled, `[B, N, T]`, ready to be scored and trained on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.data import Examples
from alignax.generate.generator import Completions
from alignax.types import Batch


class Answers(NamedTuple):
    """Completions of B prompts of the data, N each, with their texts."""

    examples: Examples  # the data
    rows: np.ndarray  # [B] of the data, which the prompts are of
    prompts: Sequence[Sequence[int]]  # in the policy's tokens
    completions: Completions
    texts: list[list[str]]  # [B][N], without special tokens and stop strings


def token_batch(prompts: Sequence[Sequence[int]], completions: Completions, length: int = 0) -> dict[str, np.ndarray]:
    """`tokens`, `mask` and `completion_mask` [B, n, T] of prompts and their completions.

    Args:
      prompts: those that were sampled from.
      completions: what was sampled.
      length: T; 0: the longest prompt and the longest completion that there could be.
    """
    place, begin, length = _places(prompts, completions, length)
    end = begin[..., None] + completions.mask.sum(axis=-1, keepdims=True)  # [B, n, 1]
    mask = np.broadcast_to(np.arange(length) < end, (*completions.mask.shape[:2], length))
    tokens = np.zeros(mask.shape, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:, : len(prompt)] = prompt
    tokens[place] = completions.tokens[completions.mask]
    return {"tokens": tokens, "mask": mask.copy(), "completion_mask": mask & (np.arange(length) >= begin[..., None])}


def sampled_batch(prompts: Sequence[Sequence[int]], completions: Completions, length: int = 0) -> dict[str, np.ndarray]:
    """`token_batch` with `sampled_logps` [B, n, T], the log-probs that the completions were drawn with.

    They are the model's own where `completions.exact`; otherwise, the samples are another distribution's, and a method that
    takes them for the model's is to be corrected for it.
    """
    batch = token_batch(prompts, completions, length)
    drawn = completions.logps if completions.drawn is None else completions.drawn
    logps = np.zeros(batch["tokens"].shape, np.float32)
    logps[_places(prompts, completions, length)[0]] = drawn[completions.mask]
    return batch | {"sampled_logps": logps}


def sampler_gap(logps: jax.Array, batch: Batch) -> jax.Array:
    """max |log-prob when sampled - log-prob when scored| over completion tokens, in nats: [] float32.

    Args:
      logps: [B, N, T] of the model that the samples are from.
      batch: with `sampled_logps`.
    """
    return jnp.where(batch["completion_mask"], jnp.abs(logps - batch["sampled_logps"]), 0.0).max()


def _places(prompts: Sequence[Sequence[int]], completions: Completions, length: int) -> tuple[tuple, np.ndarray, int]:
    """Where each token of a completion goes in `[B, n, T]`, where each prompt ends [B, 1], and T."""
    sizes = np.array([len(p) for p in prompts])
    length = length or int(sizes.max()) + completions.tokens.shape[-1]
    need = int((sizes[:, None] + completions.mask.sum(axis=-1)).max())
    if need > length:
        raise ValueError(f"rows of {length} tokens do not hold a prompt and completion of {need}; raise the length")
    b, n, t = np.nonzero(completions.mask)
    return (b, n, sizes[b] + t), sizes[:, None], length
