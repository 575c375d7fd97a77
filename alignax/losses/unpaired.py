"""Losses on single responses with a label: N = 1 and the batch field `labels` [B, 1] bool, True for a desirable response.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, examples, make_loss, sequence, token_logps
from alignax.losses.pairs import check_positive, check_range, field, ref_logps
from alignax.types import Batch, Metrics, Outputs


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306).

    desirable_weight (1 - sigmoid(r - beta z))      where the label is True
    undesirable_weight (1 - sigmoid(beta z - r))    where it is False,      r = beta log pi/ref(y), averaged over all rows

    z is the field `kto_kl` [B], an estimate of KL(pi || ref) from mismatched responses, which `mismatched_kl(policy, reference)` writes. A
    response far on the wrong side has no gradient, so the loss ignores noise, but hard examples too. With rows of one label only, the loss
    is finite and pushes all responses one way.

    >>> logps = jnp.array([[[0.0, -1.0]], [[0.0, -4.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0]], [[0.0, -3.0]]])}
    >>> batch |= {"labels": jnp.array([[True], [False]]), "kto_kl": jnp.zeros(2)}
    >>> value, _ = kto(1.0)(Outputs(logps, -logps), batch, kto(1.0).normalised(batch))
    >>> print(f"{value:.3f}")  # 1 - sigmoid(1)
    0.269

    Args:
      beta: aversion to risk; scale of the rewards.
      desirable_weight: with `undesirable_weight`, corrects an imbalance of the labels; the paper keeps
        (desirable_weight * desirable rows) / (undesirable_weight * undesirable rows) between 1 and 3/2.
      undesirable_weight: weight of rows whose label is False.
    """
    shift = lambda batch: field(batch, "kto_kl", "mismatched_kl(policy, reference)")
    return _labelled("kto", beta, desirable_weight, undesirable_weight, shift)


def apo_zero_unpaired(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """Anchored preference optimisation, zero, on single responses (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    desirable_weight (1 - sigmoid(r)) or undesirable_weight sigmoid(r),   r = beta log pi/ref(y)

    It is KTO with the reference point 0, so no mismatched responses need to be scored.
    """
    return _labelled("apo_zero_unpaired", beta, desirable_weight, undesirable_weight, lambda batch: 0.0 * examples(batch))


def _labelled(name: str, beta: float, desirable_weight: float, undesirable_weight: float, shift: Callable[[Batch], jax.Array]) -> Loss:
    """The loss, and two terms with coefficient 0 that report metrics over the rows of each label."""
    check_positive("beta", beta)
    check_range("desirable_weight", desirable_weight, 0, float("inf"), "a weight")
    check_range("undesirable_weight", undesirable_weight, 0, float("inf"), "a weight")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        ratio, z = _ratios(out, batch), shift(batch)  # [B], [B]
        desirable = desirable_weight * jax.nn.sigmoid(beta * (z - ratio))
        undesirable = undesirable_weight * jax.nn.sigmoid(beta * (ratio - z))
        return jnp.where(_desirable(batch), desirable, undesirable), {"kl": z}

    def report(side: str) -> Callable[[Outputs, Batch], tuple[jax.Array, Metrics]]:
        def observed(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            rewards, logps = beta * _ratios(out, batch), sequence(out.logps, batch)[:, 0]
            return jax.lax.stop_gradient(value(out, batch)[0]), {f"rewards/{side}": rewards, f"logps/{side}": logps}

        return observed

    chosen = Term(f"{name}_chosen", report("chosen"), lambda batch: examples(batch) & _desirable(batch))
    rejected = Term(f"{name}_rejected", report("rejected"), lambda batch: examples(batch) & ~_desirable(batch))
    return make_loss(name, value) + Loss(((0.0, chosen), (0.0, rejected)))


def _ratios(out: Outputs, batch: Batch) -> jax.Array:
    """The log-ratio log pi/ref of each response, summed over its tokens: [B]."""
    if token_logps(out).shape[1] != 1:
        raise ValueError(
            f"an unpaired loss takes single responses, but these examples have {out.logps.shape[1]} responses per prompt; give data with "
            "labels"
        )
    return sequence(out.logps - ref_logps(batch), batch)[:, 0]


def _desirable(batch: Batch) -> jax.Array:
    if "labels" not in batch:
        raise ValueError('the batch has no "labels"; an unpaired loss needs data with a label for each response, desirable or undesirable')
    return batch["labels"][:, 0]
