"""Losses on demonstrations: the negative log-likelihood of the first response, by token or by response.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Over, chosen_examples, chosen_tokens, lengths, make_loss, sequence, token_logps
from alignax.types import Batch


def sft(over: Over = chosen_tokens) -> Loss:
    """Supervised fine-tuning on the first response: the average negative log-prob of a completion token.

    -sum_t log pi(y_t | x, y_<t) / (completion tokens of the batch)

    >>> logps = jnp.array([[[0.0, -4.0, 0.0]], [[0.0, -1.0, -1.0]]])  # [B, N, T]; completions of 1 token and of 2
    >>> batch = {"completion_mask": logps < 0}
    >>> value, _ = sft()(Outputs(logps, -logps), batch, sft().normalised(batch))
    >>> print(f"{value:.3f}")
    2.000

    Args:
      over: `chosen_tokens` averages over the tokens of the global batch, so every token counts the same. `per_sequence` averages over the
        tokens of each response, then over responses, so every response counts the same.
    """
    return make_loss("sft", lambda out, batch: (-token_logps(out)[:, 0], {"entropy": out.entropy[:, 0]}), over)


def summed_sft() -> Loss:
    """Supervised fine-tuning by whole responses: -log pi(y | x), summed over the tokens of y, averaged over the examples."""
    return make_loss("sft", lambda out, batch: (-sequence(token_logps(out), batch)[:, 0], {}), chosen_examples)


def per_sequence(batch: Batch) -> jax.Array:
    """The weight of each token of the first response: 1 / length for completion tokens, else 0: [B, T]."""
    return chosen_tokens(batch) / jnp.maximum(lengths(batch)[:, :1], 1.0)
