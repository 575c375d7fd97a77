"""Penalties beside a policy gradient: the KL from the reference (exact, or by three estimators), chi-squared, entropy, a critic's error.

In a loss, the value and the gradient of an estimator estimate different things. Averaged over samples of the policy, k1, k3 and the
surrogate of chi-squared have the value of their divergence. Their gradient is another one, since the sampling depends on the policy too
and is not differentiated. Each docstring says what the gradient is. In the reward (`kl_reward`) k1 has the gradient of KL(pi || ref) of
whole responses. Below, d is log pi/ref of a token. KLs of tokens are at the prefixes that were sampled.

A KL of tokens should have the same average as its surrogate. The default is by response, as in GRPO (Shao et al. 2024,
arXiv:2402.03300, eq. 3). With another average write, for example, `ppo() + beta * kl_k2(token_mean)`.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, Value, make_loss, sequence
from alignax.losses.divergences import exp, expm1
from alignax.losses.pairs import check_positive, field
from alignax.losses.responses import (
    Aggregate,
    Level,
    by_token,
    k3,
    log_ratios,
    reference_log_ratios,
    response_mean,
    responses,
    token_mean,
)
from alignax.types import Batch, Metrics, Outputs

FAR = 10.0  # nats of a response's log-ratio beyond which chi-squared follows its tangent, as in the paper's code
LEAST_CHI2 = 1e-4  # lower bound under the root, whose slope is infinite at 0


def kl_k1(aggregate: Aggregate = response_mean) -> Loss:
    """The estimator k1 of the KL, the log-ratio d (Schulman 2020, "Approximating KL divergence"): signed, its mean is KL(pi || ref).

    Its gradient is that of log pi, whose mean over samples of the policy is 0, so as a loss it only adds noise. Use it to measure the KL;
    to train with a KL use `kl_k2`, `kl_k3_weighted`, or `kl_reward`.
    """
    return _kl("kl_k1", lambda d: d, aggregate)


def kl_k2(aggregate: Aggregate = response_mean) -> Loss:
    """The estimator k2 of the KL, d^2 / 2 (Schulman 2020): at least 0, a biased value, the gradient of KL(pi || ref), the reverse KL."""
    return _kl("kl_k2", lambda d: 0.5 * jnp.square(d), aggregate)


def kl_k3(aggregate: Aggregate = response_mean) -> Loss:
    """The estimator k3 of the KL, exp(-d) - 1 + d (Schulman 2020), as in GRPO's loss: at least 0, its mean is KL(pi || ref).

    Its gradient is that of the forward KL, KL(ref || pi): weak on responses that the reference finds unlikely.

    >>> logps = jnp.array([[[0.0, -1.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0]]])}
    >>> value, _ = kl_k3()(Outputs(logps, -logps), batch, kl_k3().normalised(batch))
    >>> print(f"{value:.3f}")  # exp(-1) - 1 + 1
    0.368
    """
    return _kl("kl_k3", k3, aggregate)


def kl_k3_weighted(aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """The estimator k3 with an importance ratio, rho (exp(-d) - 1 + d), rho = pi / old: DeepSeek-V3.2's correction.

    On samples of the old policy both its mean and its gradient are those of KL(pi || ref), the reverse KL, without bias.

    Args:
      aggregate: how tokens are averaged.
      level: of the ratio rho: of a token, or of a response; the same as the surrogate's.
    """

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        d = reference_log_ratios(out, batch)
        return exp(level(log_ratios(out, batch), batch)) * k3(d), {"kl/ref_k1": d, "kl/ref_k3": k3(d)}

    return aggregate("kl_k3_weighted", value)


def _kl(name: str, estimate, aggregate: Aggregate) -> Loss:
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        d = reference_log_ratios(out, batch)
        return estimate(d), {"kl/ref_k1": d, "kl/ref_k3": k3(d)}

    return aggregate(name, value)


def kl_ref_pi(aggregate: Aggregate = response_mean) -> Loss:
    """The forward KL, KL(ref || pi), of the next-token distributions, exact over the vocabulary, at the prefixes that the batch holds.

    sum_v ref(v) (log ref(v) - log pi(v)),   gradient pi - ref at the logits

    It keeps tokens that the reference finds likely. Needs a model that gives `ref_kl`: `--config.reference.token_kl=true`, or
    `alignax.forward(.., teacher=..)`. If the batch has `ref_tokens` (for example with another prompt), the reference reads those.
    """
    return aggregate("kl_ref_pi", lambda out, batch: _exact(out.ref_kl, "ref_kl", "kl/ref_pi"))


def kl_pi_ref(aggregate: Aggregate = response_mean) -> Loss:
    """The reverse KL, KL(pi || ref), of the next-token distributions, exact over the vocabulary, at the prefixes that the batch holds.

    sum_v pi(v) (log pi(v) - log ref(v)),   gradient pi (log pi - log ref - KL) at the logits

    It keeps the policy from tokens that the reference finds unlikely. Needs a model that gives `policy_kl`, set as for `kl_ref_pi`.
    """
    return aggregate("kl_pi_ref", lambda out, batch: _exact(out.policy_kl, "policy_kl", "kl/pi_ref"))


def gkd(aggregate: Aggregate = response_mean) -> Loss:
    """Generalised knowledge distillation (Agarwal et al. 2023, arXiv:2306.13649, eq. 1): a divergence of next-token distributions.

    beta KL(t || m) + (1 - beta) KL(pi || m),   m = beta t + (1 - beta) pi,   t the teacher, the reference of the run

    It is exact over the vocabulary, at the prefixes that the batch holds: the data's, or in rollouts the policy's own. beta and the
    temperature of both distributions are `--config.reference.jsd_beta` and `.jsd_temperature`. beta 0 is the forward KL(t || pi), beta 1
    the reverse KL(pi || t). The average is by response, as in the paper; TRL averages over tokens. Needs
    `--config.reference.token_kl=true`, or `alignax.forward(.., teacher=..)`.
    """
    return aggregate("gkd", lambda out, batch: _exact(out.jsd, "jsd", "jsd"))


def _exact(values: jax.Array | None, name: str, metric: str) -> tuple[jax.Array, Metrics]:
    if values is None:
        raise ValueError(
            f"a divergence of whole distributions needs Outputs.{name}, which this model leaves out; set reference.token_kl=true"
        )
    return values, {metric: values}


def chi2() -> Loss:
    """The chi-squared penalty of its authors' code (Laidlaw et al. 2024, arXiv:2403.03185), averaged over responses.

    (u - 1) + (1 / u - 1),   u = pi(y) / ref(y), the sum of the log-ratios

    On samples of the policy its mean is chi2(pi || ref) = E[u - 1]. Its gradient is that of chi2(pi || ref) / 2 + KL(ref || pi), which
    also pulls to the reference; `chi2_exact` has the gradient of chi2(pi || ref). Beyond 10 nats it follows its tangent.

    The paper's penalty is the root: `coefficient * square_root(chi2())`.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.5]]]))  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.log(jnp.array([[[1.0, 0.25]]]))}  # u = 2
    >>> value, _ = chi2()(Outputs(logps, -logps), batch, chi2().normalised(batch))
    >>> print(f"{value:.3f}")
    0.500
    """
    return _of_responses("chi2", chi2_of)


def chi2_of(log_ratio: jax.Array) -> jax.Array:
    """The value (u - 1) + (1 / u - 1) of each response, from its log u: [B, N] -> [B, N]."""
    return expm1(log_ratio, FAR) + expm1(-log_ratio, FAR)


def chi2_exact() -> Loss:
    """The chi-squared penalty with its own gradient: chi2(pi || ref) = E_pi[pi / ref] - 1 (Laidlaw et al. 2024, arXiv:2403.03185).

    u - 1 in value, 2 u in gradient,   u = pi(y) / ref(y), the sum of the log-ratios

    Half of the gradient comes from u, half from the sampling distribution. Rare responses with a large u dominate its variance. Beyond
    10 nats u follows its tangent.
    """

    def value(log_ratio: jax.Array) -> jax.Array:
        constant = jax.lax.stop_gradient
        return constant(expm1(log_ratio, FAR)) + constant(2.0 * exp(log_ratio, FAR)) * (log_ratio - constant(log_ratio))

    return _of_responses("chi2_exact", value)


def _of_responses(name: str, value) -> Loss:
    def term(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio = sequence(reference_log_ratios(out, batch), batch)  # [B, N]
        return value(log_ratio), {"kl/sequence_k1": log_ratio}

    return make_loss(name, term, responses)


def square_root(objective: Loss) -> Loss:
    """The root of a chi-squared penalty, by the chain rule: `square_root(chi2())` has the gradient of sqrt(chi2).

    value / (2 sqrt(max(c, 1e-4))),   c the batch field `chi2`, which `chi2_estimate()` writes

    The root of an average is not an average. So c is data, estimated from `old_logps` on the global batch, and parts still add up.
    """
    return objective.mapped(lambda term: term._replace(value=_rooted(term)))


def _rooted(term: Term) -> Value:
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        values, metrics = term.value(out, batch)
        c = jnp.maximum(field(batch, "chi2", "chi2_estimate()"), LEAST_CHI2)  # [B]
        return values / (2.0 * jnp.sqrt(jnp.expand_dims(c, tuple(range(1, values.ndim))))), metrics

    return value


def entropy_bonus(aggregate: Aggregate = token_mean) -> Loss:
    """Minus the entropy of the next-token distributions: `ppo() + 0.01 * entropy_bonus()` keeps the policy from collapsing early.

    It acts on all tokens alike, so noise tokens gain most. Give it the same average as the surrogate.
    """
    return aggregate("entropy_bonus", lambda out, batch: (-out.entropy, {"entropy": out.entropy}))


def value_loss(clip: float = 0.2, aggregate: Aggregate = token_mean, heads: Sequence[float] = ()) -> Loss:
    """A critic's squared error, clipped as PPO's (Schulman et al. 2017; the clip: openai/baselines, and Huang et al. 2024).

    max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2,   R the field `returns`, V_old the field `values`

    A value that has moved beyond the clip towards its return has no gradient. Needs a model that gives `Outputs.values`. For a critic of H
    heads, [B, N, T, H], the loss is a weighted sum over heads: by default their mean, else with the weights `heads`. Each head then has
    its own metrics, for example `values/mean/head_0`.

    >>> logps = jnp.array([[[0.0, -1.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "returns": jnp.array([[[0.0, 1.0]]]), "values": jnp.zeros((1, 1, 2))}
    >>> out = Outputs(logps, -logps, values=jnp.full((1, 1, 2), 0.5))
    >>> value, _ = value_loss(0.2)(out, batch, value_loss(0.2).normalised(batch))
    >>> print(f"{value:.3f}")  # (0.2 - 1)^2 / 2
    0.320

    Metrics: the explained variance is 1 - (e - m^2) / (q - r^2) of e = `values/squared_error`, r = `returns/mean`,
    q = `returns/mean_square`, m = r - `values/mean`.

    Args:
      clip: how far a value may move in one rollout, in units of the reward, above 0; infinity: no clip.
      aggregate: how tokens are averaged.
      heads: the weight of each head, the KL's first; (): 1 / H each. Moskovitz et al. 2023 (arXiv:2310.04373) use 0.2 for the KL and 0.5
        for each reward model.
    """
    check_positive("clip", clip)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        if out.values is None:
            raise ValueError("value_loss needs Outputs.values, which this model leaves out; give the policy a critic (model.critic)")
        returns, old = field(batch, "returns", "gae()"), field(batch, "values", "a critic's values, gae()")
        near = old + jnp.clip(out.values - old, -clip, clip)
        error = jnp.square(out.values - returns)
        loss = 0.5 * jnp.maximum(error, jnp.square(near - returns))
        metrics = {
            "values/mean": out.values,
            "values/squared_error": error,
            "values/clipped": (jnp.abs(out.values - old) > clip).astype(jnp.float32),
            "returns/mean": returns,
            "returns/mean_square": jnp.square(returns),
        }
        several = loss.ndim > batch["completion_mask"].ndim
        H = loss.shape[-1] if several else 1
        if len(heads) not in (0, H):
            raise ValueError(f"value_loss has weights for {len(heads)} heads, but the critic has {H}; give one weight for each head")
        if not several:
            return loss * (heads[0] if heads else 1.0), metrics
        own = {f"{name}/head_{h}": x[..., h] for name, x in metrics.items() for h in range(H)}
        return loss @ jnp.asarray(list(heads) or [1 / H] * H, jnp.float32), own

    return aggregate("value_loss", value)
