"""Preference losses for one of several objectives: frozen models give the rewards of the others.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alignax.config.blame import check_call
from alignax.losses.algebra import Loss, sequence
from alignax.losses.pairs import field, logistic, pair_ratios, pairwise, ref_logps
from alignax.types import Batch, Outputs

Margins = Callable[[Batch], jax.Array]  # Batch -> rewards of both responses by the other objectives, [B, 2, K - 1]


def modpo(weights: Sequence[float], margins: Margins, beta: float = 0.1) -> Loss:
    """Multi-objective DPO (Zhou et al. 2023, arXiv:2310.03708), on pairs that are labelled by the first of K objectives.

    -log sigmoid(r(chosen) - r(rejected)),   r = (beta log pi/ref - sum_k w_k margin_k) / w_0

    The optimum is the policy that maximises the weighted sum of all rewards, pi(y) ~ ref(y) exp(sum_k w_k r_k(y) / beta). The margins are
    subtracted. With the opposite sign the optimum is another policy, and no error shows it.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]]), "scores": jnp.array([[[1.0], [0.0]]])}
    >>> loss = modpo([0.5, 0.5], lambda batch: batch["scores"])
    >>> value, _ = loss(Outputs(logps, -logps), batch, loss.normalised(batch))
    >>> print(f"{value:.3f}")  # z = (0.2 - 0.5) / 0.5
    1.037

    Args:
      weights: w [K]: first the weight of the objective that labels the pairs, above 0, then one for each other objective; they usually
        sum to 1.
      margins: batch -> [B, 2, K - 1], the rewards of the other objectives; no gradient goes through them. For a language model take
        `implicit_rewards("margin_logps")`, for reward models `lambda batch: batch["scores"]`.
      beta: strength of the KL penalty.

    Raises:
      ValueError: for bad weights; in the step, for margins of another shape.
    """
    first, *others = weights
    if not first > 0 or not others:
        raise ValueError(
            f"the weights are {list(weights)}; give first a weight above 0 for the objective of the pairs, then one for each other "
            "objective"
        )
    check_call(margins, "margins of modpo()", "batch")

    def scores(out: Outputs, batch: Batch) -> jax.Array:
        ratios, given = pair_ratios(out, batch), jax.lax.stop_gradient(margins(batch))
        if given.shape != (*ratios.shape, len(others)):
            raise ValueError(
                f"margins have shape {given.shape}, but the weights of {len(others)} other objectives need {(*ratios.shape, len(others))}"
            )
        return (ratios - given @ jnp.array(others, jnp.float32) / beta) / first

    return pairwise("modpo", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def implicit_rewards(name: str, beta: float = 0.1) -> Margins:
    """The rewards of a language model that was trained by DPO, a function batch -> [B, 2, 1]: beta log margin/ref of each response.

    `logps("margin_logps", margin)` in the experience writes the field that it reads.

    Args:
      name: the field of the model's log-probs, [B, 2, T].
      beta: the beta that the model was trained with.
    """
    return lambda batch: beta * sequence(field(batch, name, f'logps("{name}", model)') - ref_logps(batch), batch)[..., None]
