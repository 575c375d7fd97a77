"""Alignment by optimal transport: distributions of rewards are compared, sorted value against sorted value.

Sorting looks at the whole batch, which no loss sees. So it is done before, by an experience, on the policy as it stands: rank says
what each value is compared with, and a value keeps its rank under a small change, so the gradients are those of the sorted loss.
"""

import jax

from alignax.losses.algebra import Loss, make_loss
from alignax.losses.pairs import check_positive, check_smoothing, field, logistic, pair_logps, pair_metrics, pair_ratios
from alignax.types import Batch, Metrics, Outputs


def aot(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Alignment via optimal transport on pairs (Melnyk et al. 2024, arXiv:2406.05882, algorithm 1).

    -log sigmoid(beta (m_(k) - n_(k))) over ranks k,   m = log pi(chosen) - log pi(rejected), n that of the reference

    The policy's margins are to dominate the reference's as a distribution; DPO asks it of every pair. The batch is the sample: a small
    one says little of a distribution.

    Needs `ref_logps` and `aot_margins`, which `matched_margins()` writes.
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

    Which chosen response was preferred to which rejected one is not used.

    Needs `ref_logps` and `aot_ratios`, which `matched_ratios()` writes.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        ratios = pair_ratios(out, batch)  # [B, 2]
        other = field(batch, "aot_ratios", "matched_ratios()")  # [B, 2]
        chosen = logistic(beta * (ratios[:, 0] - other[:, 0]), label_smoothing)
        rejected = logistic(beta * (other[:, 1] - ratios[:, 1]), label_smoothing)
        # Every matched pair is met twice, from either side: its value counts once, its gradient on both.
        return chosen + rejected - jax.lax.stop_gradient(rejected), pair_metrics(beta * ratios, out, batch)

    return make_loss("aot_unpaired", value)
