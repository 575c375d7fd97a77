"""Batches from sampled completions: prompts and completions as arrays [B, N, T], ready to be scored and trained on."""

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
    rows: np.ndarray  # [B] rows of the data that hold the prompts
    prompts: Sequence[Sequence[int]]  # [B] token ids of the policy's tokenizer
    completions: Completions
    texts: list[list[str]]  # [B][N], without special tokens and stop strings


def token_batch(prompts: Sequence[Sequence[int]], completions: Completions, length: int = 0) -> dict[str, np.ndarray]:
    """The batch fields `tokens`, `mask` and `completion_mask`, each [B, n, T], of prompts and their completions.

    Args:
      prompts: token ids of the B prompts.
      completions: n sampled completions of each prompt.
      length: T; 0: the length of the longest prompt plus C, the longest possible completion.

    Raises:
      ValueError: for a T that is too small.
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
    """The batch fields of `token_batch`, and `sampled_logps` [B, n, T]: the log-probs under the distribution that was sampled from.

    If `completions.exact`, that distribution is the model's own. Otherwise a method that assumes samples of the model needs a correction.
    Arguments and errors are those of `token_batch`.
    """
    batch = token_batch(prompts, completions, length)
    drawn = completions.logps if completions.drawn is None else completions.drawn
    logps = np.zeros(batch["tokens"].shape, np.float32)
    logps[_places(prompts, completions, length)[0]] = drawn[completions.mask]
    return batch | {"sampled_logps": logps}


def sampler_gap(logps: jax.Array, batch: Batch) -> jax.Array:
    """The largest difference |scored log-prob - sampled log-prob| over all completion tokens, in nats: [] float32.

    Args:
      logps: [B, N, T] log-probs of the model that generated the samples, from a forward pass.
      batch: a batch with `sampled_logps`.
    """
    return jnp.where(batch["completion_mask"], jnp.abs(logps - batch["sampled_logps"]), 0.0).max()


def _places(prompts: Sequence[Sequence[int]], completions: Completions, length: int) -> tuple[tuple, np.ndarray, int]:
    """The indices of all completion tokens in [B, n, T], the lengths of the prompts [B, 1], and T."""
    sizes = np.array([len(p) for p in prompts])
    length = length or int(sizes.max()) + completions.tokens.shape[-1]
    need = int((sizes[:, None] + completions.mask.sum(axis=-1)).max())
    if need > length:
        raise ValueError(f"rows of {length} tokens are too short for a prompt and completion of {need} tokens; raise the length")
    b, n, t = np.nonzero(completions.mask)
    return (b, n, sizes[b] + t), sizes[:, None], length
