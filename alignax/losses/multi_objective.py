"""Preference losses of one objective among several: the others are rewards of frozen models."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alignax.config.blame import check_call
from alignax.losses.algebra import Loss, sequence
from alignax.losses.pairs import field, logistic, pair_ratios, pairwise, ref_logps
from alignax.types import Batch, Outputs

Margins = Callable[[Batch], jax.Array]  # Batch -> rewards of both responses by the other objectives, [B, 2, K - 1]


def modpo(weights: Sequence[float], margins: Margins, beta: float = 0.1) -> Loss:
    """Multi-objective DPO (Zhou et al. 2023, arXiv:2310.03708): pairs are labelled on the first of K objectives.

    -log sigmoid(r(chosen) - r(rejected)),   r = (beta log pi/ref - sum_k w_k margin_k) / w_0

    Its optimum is the policy that maximises the weighted sum of all rewards, pi(y) ~ ref(y) exp(sum_k w_k r_k(y) / beta). The margins are
    subtracted: with the other sign training goes to another policy, and nothing says so.

    Args:
      weights: w, of the objective that pairs are labelled on, above 0, and of each of the others; they sum to 1 as a rule.
      margins: the rewards of the others, without gradient: `implicit_rewards("margin_logps")` of a language model, or
        `lambda batch: batch["scores"]` of reward models.
      beta: strength of the KL penalty.

    Raises:
      ValueError: for weights that are none, and for margins of another shape.
    """
    first, *others = weights
    if not first > 0 or not others:
        raise ValueError(f"the weights are {list(weights)}; give one above 0 for the objective of the pairs, and one for each other")
    check_call(margins, "margins of modpo()", "batch")

    def scores(out: Outputs, batch: Batch) -> jax.Array:
        ratios, given = pair_ratios(out, batch), jax.lax.stop_gradient(margins(batch))
        if given.shape != (*ratios.shape, len(others)):
            raise ValueError(f"margins have shape {given.shape}, and {len(others)} weights ask for {(*ratios.shape, len(others))}")
        return (ratios - given @ jnp.array(others, jnp.float32) / beta) / first

    return pairwise("modpo", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def implicit_rewards(name: str, beta: float = 0.1) -> Margins:
    """What a language model that was trained by DPO rewards: beta log margin/ref of a response, [B, 2, 1].

    `logps("margin_logps", margin)` in the experience writes the field.

    Args:
      name: the field of the model's log-probs, [B, 2, T].
      beta: that it was trained with.
    """
    return lambda batch: beta * sequence(field(batch, name, f'logps("{name}", model)') - ref_logps(batch), batch)[..., None]
