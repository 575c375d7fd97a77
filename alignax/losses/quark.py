"""Quark's loss: the likelihood of the pool's responses behind their reward token, a KL from the reference, and an entropy bonus.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable

import jax

from alignax.losses.algebra import Loss, token_logps
from alignax.losses.pairs import check_range
from alignax.losses.penalties import entropy_bonus, kl_ref_pi
from alignax.losses.responses import Aggregate, token_mean
from alignax.types import Batch, Metrics, Outputs


def quark(beta: float = 0.05, entropy: float = 0.06, kl: Callable[[Aggregate], Loss] = kl_ref_pi) -> Loss:
    """Quantised reward konditioning (Lu et al. 2022, arXiv:2205.13636): the likelihood of responses behind a token of their reward.

    -log pi(y_t | r_k, x, y_<t) + beta KL(ref(. | x, y_<t) || pi(. | r_k, x, y_<t)) - entropy H(pi(. | r_k, x, y_<t)),   over tokens

    r_k is the token of the quantile of the response's reward. `quark_pool` puts it into the prompt, and writes the prompt without it for
    the reference. N may be any number. Needs `--config.reference.token_kl=true`.

    >>> quark(beta=0.05, entropy=0.06)
    quark + 0.05 * kl_ref_pi + 0.06 * entropy_bonus

    Args:
      beta: weight of the KL, at least 0.
      entropy: weight of the entropy, which the authors' code has but not their formula; 0 gives the formula.
      kl: `kl_ref_pi`, the paper's, or `kl_pi_ref`, which the authors' code computes under the same name.
    """
    check_range("beta", beta, 0, float("inf"), "a weight")
    check_range("entropy", entropy, 0, float("inf"), "a weight")
    return token_mean("quark", _likelihood) + beta * kl(token_mean) + entropy * entropy_bonus()


def _likelihood(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
    logps = token_logps(out)
    return -logps, {"logps": logps}
