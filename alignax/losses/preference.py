"""Losses on the margin of a preference pair: DPO and what else is put on h = log pi/ref(chosen) - log pi/ref(rejected).

Sequence log-probs are sums over the completion tokens, EOS included, unless a docstring says mean. z is beta h. All need the batch
field `ref_logps`, unless other `scores` are given.
"""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss
from alignax.losses.pairs import Scores, check_positive, check_range, check_smoothing, logistic, pair_ratios, pairwise
from alignax.losses.supervised import per_sequence, sft, summed_sft


def dpo(beta: float = 0.1, label_smoothing: float = 0.0, scores: Scores = pair_ratios) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), with cDPO's label smoothing.

    -(1 - e) log sigmoid(z) - e log sigmoid(-z),   z = beta (log pi/ref(chosen) - log pi/ref(rejected))

    Only the difference is trained: both responses may lose probability. Without smoothing the margin of a pair that is always
    labelled the same way has no limit.

    Args:
      beta: strength of the KL penalty; rewards are beta * log(pi / ref).
      label_smoothing: e, the probability that a label is flipped, in [0, 0.5) (Mitchell 2023, "A note on DPO with noisy
        preferences"). Its minimum is at z = log((1 - e) / e).
      scores: what stands for log pi/ref, see `alignax.losses.pairs`.
    """
    check_smoothing(label_smoothing)
    return pairwise("dpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), scores)


def robust_dpo(beta: float = 0.1, label_smoothing: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): the unbiased estimate of DPO's loss on labels without flips.

    (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

    Not cDPO, which adds the flipped loss where this one takes it off. Unbounded below: as z grows it falls like -e z / (1 - 2 e).

    Args:
      beta: strength of the KL penalty.
      label_smoothing: e, the known probability that a label is flipped, in [0, 0.5).
      scores: what stands for log pi/ref.
    """
    check_smoothing(label_smoothing)
    e = label_smoothing
    value = lambda z: ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)
    return pairwise("robust_dpo", beta, lambda chosen, rejected: value(chosen - rejected), scores)


def ipo(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    (h - 1 / (2 beta))^2,   h = log pi/ref(chosen) - log pi/ref(rejected), sums over tokens

    Its gradient grows with the distance to the target, so long responses, whose log-ratios are large, dominate a batch.
    """
    # TRL's "ipo" averages over tokens: that is ipo_mean, with a beta of another size.
    return pairwise("ipo", beta, lambda chosen, rejected: jnp.square((chosen - rejected - 0.5) / beta), scores)


def ipo_daa(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """IPO as the scaling laws of direct alignment have it (Rafailov et al. 2024, arXiv:2406.02900).

    (z - 1)^2,   z = beta h

    That is beta^2 times `ipo(beta / 2)`: the same optimum, and a loss whose size does not depend on beta.
    """
    return pairwise("ipo_daa", beta, lambda chosen, rejected: jnp.square(chosen - rejected - 1.0), scores)


def hinge(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """The hinge on DPO's margin: SLiC's calibration with a reference (Liu et al. 2023, RSO, arXiv:2309.06657).

    max(0, 1 - z)

    A pair beyond the margin has no gradient, a mislabelled one a constant gradient for ever. SLiC-HF itself: `slic_hf`.
    """
    return pairwise("hinge", beta, lambda chosen, rejected: jnp.maximum(0.0, 1.0 - (chosen - rejected)), scores)


def exo(beta: float = 0.1, label_smoothing: float = 1e-3, scores: Scores = pair_ratios) -> Loss:
    """Efficient exact optimisation on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16): the KL of DPO's cross-entropy reversed.

    KL(p || q) = sigmoid(z) log(sigmoid(z) / (1 - e)) + sigmoid(-z) log(sigmoid(-z) / e)

    At a very wrong margin the gradient vanishes, since sigmoid(z) does.

    Args:
      beta: strength of the KL penalty.
      label_smoothing: e, in (0, 0.5); at 0 the divergence is infinite.
      scores: what stands for log pi/ref.
    """
    check_smoothing(label_smoothing)
    check_positive("label_smoothing", label_smoothing)
    log_q, log_not_q = math.log1p(-label_smoothing), math.log(label_smoothing)
    side = lambda z, target: jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - target)
    value = lambda z: side(z, log_q) + side(-z, log_not_q)
    return pairwise("exo", beta, lambda chosen, rejected: value(chosen - rejected), scores)


def discopop(beta: float = 0.1, tau: float = 0.05, scores: Scores = pair_ratios) -> Loss:
    """Discovered preference optimisation, LRML (Lu et al. 2024, arXiv:2406.08414, eq. 5).

    (1 - m) (-log sigmoid(z)) + m exp(-z),   m = sigmoid(z / tau)

    Neither convex nor monotone: at tau 0.05 it has a minimum at z = -0.12 and a hump at 0.07, so a pair may stay on the wrong side.

    Args:
      beta: strength of the KL penalty.
      tau: temperature of the mixture, in (0, 1]; above 1 the exponential would win as z falls.
      scores: what stands for log pi/ref.
    """
    check_positive("tau", tau)
    if tau > 1:
        raise ValueError(f"tau is {tau}; it must be at most 1 (0.05 is the paper's)")

    def value(z: jax.Array) -> jax.Array:
        # m exp(-z) as one exponential: apart, 0 * inf is NaN from z = -90 on.
        return jax.nn.sigmoid(-z / tau) * logistic(z) + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)

    return pairwise("discopop", beta, lambda chosen, rejected: value(chosen - rejected), scores)


def dpop(beta: float = 0.1, penalty: float = 50.0, scores: Scores = pair_ratios) -> Loss:
    """DPO-positive, Smaug (Pal et al. 2024, arXiv:2402.13228): DPO that must not lower the chosen response.

    -log sigmoid(beta (h - penalty * max(0, log ref/pi(chosen))))

    While the chosen response is below its reference, its gradient is (1 + penalty) times DPO's; rows with a wrong label pay that too.

    Args:
      beta: strength of the KL penalty.
      penalty: the paper's lambda, at least 0.
      scores: what stands for log pi/ref.
    """
    check_range("penalty", penalty, 0, math.inf, "a weight")
    value = lambda chosen, rejected: logistic(chosen - rejected - penalty * jnp.maximum(0.0, -chosen))
    return pairwise("dpop", beta, value, scores)


def rpo(beta: float = 0.1, eta: float = 0.005) -> Loss:
    """Regularised preference optimisation: DPO and the chosen response's summed NLL (Liu et al. 2024, arXiv:2405.16436).

    dpo(beta) - eta beta log pi(chosen)

    The form of the paper's main experiments (eta 0.005). Not the `rpo_alpha` of other libraries (Pang et al. 2024), whose NLL is
    length-normalised.
    """
    return dpo(beta) + (eta * beta) * summed_sft()


def rpo_token_mean(beta: float = 0.5, eta: float = 0.2) -> Loss:
    """The paper's second form (Liu et al. 2024, arXiv:2405.16436, appendix F): the NLL averaged over each response's tokens.

    dpo(beta) - eta (1 / |y|) log pi(chosen),   averaged over examples
    """
    return dpo(beta) + eta * sft(over=per_sequence)
