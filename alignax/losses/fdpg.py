"""f-DPG: training a policy towards a target distribution by the gradient of an f-divergence (Go et al. 2023, arXiv:2302.08215).

The target is p(x) = P(x) / Z, where P(x) >= 0 is known and Z is not. pi is the policy, t = pi / p the ratio of a whole response,
x = log t. A divergence is named by its formula, D(first, second), since libraries swap the two chi-squareds.

    D_f(pi, p) = E_p[f(t)],   its gradient is E_pi[f'(t) grad log pi]

The forward KL is DPG, GDC and CDPG (Parshakova et al. 2019; Khalifa et al. 2021; Korbak et al. 2022): maximum likelihood of the target.
The reverse KL to a reward's target is RLHF. `js_pi_p` is the paper's best default.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, make_loss, sequence, token_logps
from alignax.losses.divergences import exp
from alignax.losses.pairs import field, of_rollout
from alignax.types import Batch, Metrics, Outputs

FURTHEST = 1000.0  # nats; log-ratios are clipped to +-FURTHEST, since they are infinite where P = 0


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight w that multiplies exponentials, w exp(x), in log space: w may vanish where exp(x) explodes."""

    log: jax.Array

    def __call__(self, x: jax.Array | float) -> jax.Array:
        """The weighted exponential w exp(x), any shape."""
        return exp(self.log + x)

    def rise(self, x: jax.Array) -> jax.Array:
        """The weighted difference w (exp(x) - 1), without cancellation; any shape."""
        return -jnp.sign(x) * jnp.expm1(-jnp.abs(x)) * self(jnp.maximum(x, 0.0))


@dataclasses.dataclass(frozen=True)
class FDivergence:
    """An f-divergence of pi from p, given by functions of x = log pi/p and of a weight w, any shape."""

    slope: Callable[[jax.Array, Weight], jax.Array]  # w f'(t)
    value: Callable[[jax.Array, Weight], jax.Array]  # w f(t) / t, with f'(1) = 0 so that it is at least 0: its mean is D


kl_p_pi = FDivergence(lambda x, w: -w(-x), lambda x, w: -w.rise(-x) - x * w(-x))
"""Forward KL, KL(p || pi), f = -log t: covers the target. The weight P / (Z q) in its gradient does not depend on the policy."""

kl_pi_p = FDivergence(lambda x, w: (x + 1.0) * w(0.0), lambda x, w: w.rise(-x) + x * w(0.0))
"""Reverse KL, KL(pi || p), f = t log t: seeks modes. Needs P > 0 everywhere; P = 0 counts as 1000 nats."""

js_pi_p = FDivergence(
    lambda x, w: (math.log(2.0) - jax.nn.softplus(-x)) * w(0.0),
    lambda x, w: (math.log(2.0) - jax.nn.softplus(-x)) * w(0.0) + (math.log(2.0) - jax.nn.softplus(x)) * w(-x),
)
"""Twice the Jensen-Shannon divergence, f = t log(2 t / (t + 1)) + log(2 / (t + 1)): the pseudo-reward is at least -log 2."""

tv_pi_p = FDivergence(lambda x, w: 0.5 * jnp.sign(x) * w(0.0), lambda x, w: 0.5 * jnp.abs(w.rise(-x)))
"""Total variation, f = |t - 1| / 2: the pseudo-reward is +-1/2 and says only on which side of the target a response is."""

hellinger_pi_p = FDivergence(lambda x, w: -w.rise(-0.5 * x), lambda x, w: w.rise(-x) - 2.0 * w.rise(-0.5 * x))
"""Squared Hellinger distance, sum (sqrt(pi) - sqrt(p))^2, f = (sqrt(t) - 1)^2."""

chi2_p_pi = FDivergence(lambda x, w: -w.rise(-2.0 * x), lambda x, w: w.rise(-2.0 * x) - 2.0 * w.rise(-x))
"""Neyman's chi-squared, sum (p - pi)^2 / pi, f = (t - 1)^2 / t: covers the target more than any other here."""

chi2_pi_p = FDivergence(lambda x, w: 2.0 * w.rise(x), lambda x, w: w.rise(x) + w.rise(-x))
"""Pearson's chi-squared, sum (pi - p)^2 / p, f = (t - 1)^2. Needs P > 0 everywhere, like the reverse KL; else it explodes."""


def alpha_pi_p(alpha: float) -> FDivergence:
    """The alpha-divergence, f = (t^alpha - alpha t - (1 - alpha)) / (alpha (alpha - 1)): the forward KL at 0, the reverse KL at 1.

    It is half of Neyman's chi-squared at -1, twice the squared Hellinger distance at 1/2, half of Pearson's chi-squared at 2.

    >>> alpha_pi_p(0) is kl_p_pi, alpha_pi_p(1) is kl_pi_p
    (True, True)
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; it must be finite (0 is the forward KL, 1 the reverse, 0.5 between them)")
    if alpha in (0, 1):
        return kl_pi_p if alpha else kl_p_pi
    beta = alpha - 1.0
    return FDivergence(lambda x, w: w.rise(beta * x) / beta, lambda x, w: (w.rise(beta * x) / beta + w.rise(-x)) / alpha)


def fdpg(divergence: FDivergence = js_pi_p) -> Loss:
    """f-DPG (Go et al. 2023, arXiv:2302.08215, theorem 1), on responses sampled by a proposal q.

    D_f(pi, p) in value, w (f'(t) + b) grad log pi in gradient,   w = pi / q, t = Z pi / P, neither differentiated

    The loss is averaged over the responses to prompts whose Z is above 0. Prompts without a sample in the target so far have weight 0.
    The pseudo-reward -f'(t) is computed with the current policy, so several steps on the same samples are unbiased. The proposal may be
    any distribution that covers the target. If q is the policy, w = 1.

    Reads `sampled_logps` [B, N, T], log q; `log_target` [B, N], log P; `log_z` [B]; and the baseline b, `fdpg_baseline` [B], a constant
    that adds no bias. `chain(logps("ref_logps", base), boolean_target(), running_log_z(), running_baseline(divergence))` writes these.

    Metrics: `divergence/*` are estimates by importance sampling; `loss/fdpg` estimates the divergence; `loss/fdpg_skipped` is the share of
    prompts that are left out.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.5]]]))  # [B, N, T]; pi = q = 1/2, and p = 1/4
    >>> batch = {"completion_mask": logps < 0, "sampled_logps": logps, "log_target": jnp.log(jnp.array([[0.25]]))}
    >>> batch |= {"log_z": jnp.zeros(1), "fdpg_baseline": jnp.zeros(1)}
    >>> _, metrics = fdpg()(Outputs(logps, -logps), batch, fdpg().normalised(batch))
    >>> print(f"{metrics['pseudo_rewards']:.3f}")  # -log(2 t / (t + 1)), t = 2
    -0.288

    Args:
      divergence: `js_pi_p`, `kl_p_pi` (DPG, GDC, CDPG), `kl_pi_p`, `tv_pi_p`, `hellinger_pi_p`, `chi2_p_pi`, `chi2_pi_p` or
        `alpha_pi_p(a)`. The divergences of `f_dpo` are functions of another ratio, pi / ref.
    """
    if not isinstance(divergence, FDivergence):
        raise ValueError(f"fdpg takes an FDivergence, not {divergence!r}; give one of those named by their formula: js_pi_p, kl_p_pi, ..")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps = sequence(token_logps(out), batch)  # [B, N]
        fixed = jax.lax.stop_gradient(logps)
        ratio, log_weight = log_ratio(fixed, batch), log_importance(fixed, batch)
        w = Weight(log_weight)
        baseline = field(batch, "fdpg_baseline", "running_baseline(divergence)")[:, None]
        push = divergence.slope(ratio, w) + baseline * w(0.0)  # [B, N]
        met = jnp.isfinite(batch["log_target"]).astype(jnp.float32)
        metrics = {"pseudo_rewards": pseudo_rewards(divergence, ratio), "importance_weight": w(0.0), "satisfied": met}
        return divergence.value(ratio, w) + push * (logps - fixed), metrics | target_divergences(ratio, log_weight)

    skipped = Term("fdpg_skipped", lambda out, batch: (unmet(batch).astype(jnp.float32), {}), sampled)
    return make_loss("fdpg", value, aimed) + Loss(((0.0, skipped),))


def target_divergences(ratio: jax.Array, log_weight: jax.Array) -> Metrics:
    """Estimates of the divergence of the policy from its target by importance sampling, one for each response; their mean estimates it.

    Args:
      ratio: log pi/p of responses that a proposal q sampled, any shape.
      log_weight: log pi/q, of the same shape.
    """
    w = Weight(log_weight)
    # As sum (pi - p)+, which is at most 1 on the policy's own samples, however poor Z is. sum |pi - p| / 2 of few samples may be larger.
    tv = jnp.maximum(-w.rise(-ratio), 0.0)
    return {"divergence/kl_p_pi": kl_p_pi.value(ratio, w), "divergence/kl_pi_p": kl_pi_p.value(ratio, w), "divergence/tv": tv}


def pseudo_rewards(divergence: FDivergence, ratio: jax.Array) -> jax.Array:
    """The pseudo-reward -f'(t) that f-DPG gives a response, from its log t, any shape."""
    return -divergence.slope(ratio, Weight(jnp.zeros_like(ratio)))


def log_ratio(logps: jax.Array, batch: Batch) -> jax.Array:
    """The log-ratio log t = log pi - (log P - log Z) [B, N] of responses' log-probs [B, N], clipped to +-1000 nats."""
    log_target = field(batch, "log_target", "boolean_target()")
    log_z = jnp.where(unmet(batch), 0.0, batch["log_z"])[:, None]
    return jnp.clip(logps - (log_target - log_z), -FURTHEST, FURTHEST)


def log_importance(logps: jax.Array, batch: Batch) -> jax.Array:
    """The log of the importance weight, log w = log pi - log q [B, N], of responses' log-probs [B, N]."""
    return logps - sequence(of_rollout(batch, "sampled_logps"), batch)


def aimed(batch: Batch) -> jax.Array:
    """The weight of each response: 1 if it was sampled and its prompt's Z is above 0, else 0: [B, N]."""
    return batch["completion_mask"].any(axis=-1) & ~unmet(batch)[:, None]


def sampled(batch: Batch) -> jax.Array:
    """The weight of each prompt: 1 if it has a sampled response, else 0: [B]."""
    return batch["completion_mask"].any(axis=(1, 2))


def unmet(batch: Batch) -> jax.Array:
    """True for each prompt without a sample of P > 0 so far: [B]. A NaN as Z is not such a prompt, and so stops the step."""
    return field(batch, "log_z", "running_log_z()") == -jnp.inf
