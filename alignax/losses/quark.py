"""Quark's loss: what the pool's responses say, behind the token of their reward, near the reference."""

from collections.abc import Callable

import jax

from alignax.losses.algebra import Loss, token_logps
from alignax.losses.pairs import check_range
from alignax.losses.penalties import entropy_bonus, kl_ref_pi
from alignax.losses.responses import Aggregate, token_mean
from alignax.types import Batch, Metrics, Outputs


def quark(beta: float = 0.05, entropy: float = 0.06, kl: Callable[[Aggregate], Loss] = kl_ref_pi) -> Loss:
    """Quantised reward konditioning (Lu et al. 2022, arXiv:2205.13636): likelihood of responses whose prompts say how good they are.

    -log pi(y_t | r_k, x, y_<t) + beta KL(ref(. | x, y_<t) || pi(. | r_k, x, y_<t)) - entropy H(pi(. | r_k, x, y_<t)),   over tokens

    r_k is the token of the quantile that the response's reward is in: `quark_pool` puts it there, and writes what the reference
    reads, the prompt without it. Any number of responses. Needs `--config.reference.token_kl=true`.

    Args:
      beta: weight of the KL, at least 0.
      entropy: weight of the entropy, which the authors' code has and their formula has not; 0 is the formula.
      kl: `kl_ref_pi`, the paper's, or `kl_pi_ref`, which the authors' code computes and calls by the same name.
    """
    check_range("beta", beta, 0, float("inf"), "a weight")
    check_range("entropy", entropy, 0, float("inf"), "a weight")
    return token_mean("quark", _likelihood) + beta * kl(token_mean) + entropy * entropy_bonus()


def _likelihood(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
    logps = token_logps(out)
    return -logps, {"logps": logps}
