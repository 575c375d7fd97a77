"""Losses on the margin of a preference pair, h = log pi/ref(chosen) - log pi/ref(rejected): DPO and its relatives.

Log-probs of sequences are sums over the completion tokens, EOS included, unless a docstring says mean. z is beta h. All losses need the
batch field `ref_logps`, unless other `scores` are given.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
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

    DPO trains only the difference, so both responses may lose probability. Without smoothing the margin of a pair that always has the
    same label grows without limit.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> value, metrics = dpo(0.1)(Outputs(logps, -logps), batch, dpo(0.1).normalised(batch))
    >>> print(f"{value:.3f}, {metrics['rewards/margins']:.3f}")  # log(1 + exp(-0.2)), and the margin
    0.598, 0.200

    Args:
      beta: strength of the KL penalty; rewards are beta * log(pi / ref).
      label_smoothing: e, the probability that a label is flipped, in [0, 0.5) (Mitchell 2023, "A note on DPO with noisy
        preferences"). The loss is least at z = log((1 - e) / e).
      scores: replaces log pi/ref, see `alignax.losses.pairs`.
    """
    check_smoothing(label_smoothing)
    return pairwise("dpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), scores)


def robust_dpo(beta: float = 0.1, label_smoothing: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): an unbiased estimate of DPO's loss on labels without flips.

    (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

    It subtracts the loss of the flipped label, which cDPO adds. It has no lower bound: as z grows it falls like -e z / (1 - 2 e).

    Args:
      beta: strength of the KL penalty.
      label_smoothing: e, the known probability that a label is flipped, in [0, 0.5).
      scores: replaces log pi/ref, see `alignax.losses.pairs`.
    """
    check_smoothing(label_smoothing)
    e = label_smoothing
    value = lambda z: ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)
    return pairwise("robust_dpo", beta, lambda chosen, rejected: value(chosen - rejected), scores)


def ipo(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    (h - 1 / (2 beta))^2,   h = log pi/ref(chosen) - log pi/ref(rejected), sums over tokens

    The gradient grows with the distance to the target, so long responses, which have large log-ratios, dominate a batch.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> value, _ = ipo(0.1)(Outputs(logps, -logps), batch, ipo(0.1).normalised(batch))
    >>> print(f"{value:.3f}")  # (2 - 5)^2
    9.000
    """
    # TRL's "ipo" averages over tokens, as ipo_mean does, and needs a beta of another size.
    return pairwise("ipo", beta, lambda chosen, rejected: jnp.square((chosen - rejected - 0.5) / beta), scores)


def ipo_daa(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """IPO in the form of the scaling laws of direct alignment (Rafailov et al. 2024, arXiv:2406.02900).

    (z - 1)^2,   z = beta h

    It is beta^2 times `ipo(beta / 2)`: the optimum is the same, and the size of the loss does not depend on beta.
    """
    return pairwise("ipo_daa", beta, lambda chosen, rejected: jnp.square(chosen - rejected - 1.0), scores)


def hinge(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """The hinge loss on DPO's margin: SLiC's calibration with a reference (Liu et al. 2023, RSO, arXiv:2309.06657).

    max(0, 1 - z)

    A pair beyond the margin has no gradient; a mislabelled pair always has the same gradient. For SLiC-HF itself see `slic_hf`.
    """
    return pairwise("hinge", beta, lambda chosen, rejected: jnp.maximum(0.0, 1.0 - (chosen - rejected)), scores)


def exo(beta: float = 0.1, label_smoothing: float = 1e-3, scores: Scores = pair_ratios) -> Loss:
    """Efficient exact optimisation on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16): DPO with the reverse KL to the labels.

    KL(p || q) = sigmoid(z) log(sigmoid(z) / (1 - e)) + sigmoid(-z) log(sigmoid(-z) / e)

    At a very wrong margin the gradient vanishes, since sigmoid(z) goes to 0.

    Args:
      beta: strength of the KL penalty.
      label_smoothing: e, in (0, 0.5); at 0 the divergence is infinite.
      scores: replaces log pi/ref, see `alignax.losses.pairs`.
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

    It is neither convex nor monotone: at tau 0.05 it has a minimum at z = -0.12 and a hump at 0.07, so a pair may stay on the wrong side.

    Args:
      beta: strength of the KL penalty.
      tau: temperature of the mixture, in (0, 1]; above 1 the exponential would dominate as z falls.
      scores: replaces log pi/ref, see `alignax.losses.pairs`.
    """
    check_positive("tau", tau)
    if tau > 1:
        raise ValueError(f"tau is {tau}; it must be at most 1 (the paper uses 0.05)")

    def value(z: jax.Array) -> jax.Array:
        # m exp(-z) is one exponential, since as a product it is 0 * inf = NaN below z = -90.
        return jax.nn.sigmoid(-z / tau) * logistic(z) + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)

    return pairwise("discopop", beta, lambda chosen, rejected: value(chosen - rejected), scores)


def dpop(beta: float = 0.1, penalty: float = 50.0, scores: Scores = pair_ratios) -> Loss:
    """DPO-positive, Smaug (Pal et al. 2024, arXiv:2402.13228): DPO with a penalty on a chosen response that loses probability.

    -log sigmoid(beta (h - penalty * max(0, log ref/pi(chosen))))

    While the chosen response is below its reference, its gradient is (1 + penalty) times DPO's, on rows with a wrong label too.

    Args:
      beta: strength of the KL penalty.
      penalty: the paper's lambda, at least 0.
      scores: replaces log pi/ref, see `alignax.losses.pairs`.
    """
    check_range("penalty", penalty, 0, math.inf, "a weight")
    value = lambda chosen, rejected: logistic(chosen - rejected - penalty * jnp.maximum(0.0, -chosen))
    return pairwise("dpop", beta, value, scores)


def rpo(beta: float = 0.1, eta: float = 0.005) -> Loss:
    """Regularised preference optimisation: DPO plus the summed NLL of the chosen response (Liu et al. 2024, arXiv:2405.16436).

    dpo(beta) - eta beta log pi(chosen)

    It is the form of the paper's main experiments (eta 0.005). The `rpo_alpha` of other libraries is another loss (Pang et al. 2024),
    whose NLL is length-normalised.

    >>> rpo(beta=0.1, eta=0.005)
    dpo + 0.0005 * sft
    """
    return dpo(beta) + (eta * beta) * summed_sft()


def rpo_token_mean(beta: float = 0.5, eta: float = 0.2) -> Loss:
    """RPO in its second form (Liu et al. 2024, arXiv:2405.16436, appendix F): DPO plus the NLL averaged over each response's tokens.

    dpo(beta) - eta (1 / |y|) log pi(chosen),   averaged over examples
    """
    return dpo(beta) + eta * sft(over=per_sequence)
