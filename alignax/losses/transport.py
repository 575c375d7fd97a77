"""Alignment by optimal transport: losses that compare distributions of rewards, sorted value against sorted value.

Sorting needs the whole batch, and a loss sees only a part of it. So an experience sorts before the step, with the current policy. The
rank of a value selects the value that it is compared with. A small change of the policy keeps the ranks, so the gradients are those of
the sorted loss.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax

from alignax.losses.algebra import Loss, make_loss
from alignax.losses.pairs import check_positive, check_smoothing, field, logistic, pair_logps, pair_metrics, pair_ratios
from alignax.types import Batch, Metrics, Outputs


def aot(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Alignment via optimal transport on pairs (Melnyk et al. 2024, arXiv:2406.05882, algorithm 1).

    -log sigmoid(beta (m_(k) - n_(k))) over ranks k,   m = log pi(chosen) - log pi(rejected), n that of the reference

    The distribution of the policy's margins should dominate that of the reference's; DPO demands it of every pair. The batch is the sample,
    so a small batch says little about the distribution.

    Needs `ref_logps` and `aot_margins`, which `matched_margins()` writes.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]]), "aot_margins": jnp.ones(1)}
    >>> value, _ = aot(0.1)(Outputs(logps, -logps), batch, aot(0.1).normalised(batch))
    >>> print(f"{value:.3f}")  # z = 0.1 (3 - 1)
    0.598
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps = pair_logps(out, batch)  # [B, 2]
        target = field(batch, "aot_margins", "matched_margins()")  # [B]
        nll = logistic(beta * (logps[:, 0] - logps[:, 1] - target), label_smoothing)
        return nll, pair_metrics(beta * pair_ratios(out, batch), out, batch)

    return make_loss("aot", value)


def aot_unpaired(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Alignment via optimal transport without pairs (Melnyk et al. 2024, arXiv:2406.05882, algorithm 2).

    -log sigmoid(beta (u_(k) - v_(k))) over ranks k,   u = log pi/ref(chosen), v = log pi/ref(rejected)

    It does not use which chosen response was preferred to which rejected one.

    Needs `ref_logps` and `aot_ratios`, which `matched_ratios()` writes.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        ratios = pair_ratios(out, batch)  # [B, 2]
        other = field(batch, "aot_ratios", "matched_ratios()")  # [B, 2]
        chosen = logistic(beta * (ratios[:, 0] - other[:, 0]), label_smoothing)
        rejected = logistic(beta * (other[:, 1] - ratios[:, 1]), label_smoothing)
        # Every matched pair appears twice, once from each side: its value counts once, its gradient on both sides.
        return chosen + rejected - jax.lax.stop_gradient(rejected), pair_metrics(beta * ratios, out, batch)

    return make_loss("aot_unpaired", value)
