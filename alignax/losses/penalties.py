"""Terms beside a policy gradient: the KL from the reference, exact and by three estimators, chi-squared, the entropy, a critic's error.

As part of the loss an estimator's value and its gradient are estimates of different things: averaged over samples of the policy each of
k1, k3 and chi-squared's surrogate has the value of its divergence, and the gradient of something else, since samples come from the
policy too and that is not differentiated. Each docstring says what its gradient is. As part of the reward (`kl_reward`) k1 has the
gradient of KL(pi || ref) of whole responses. d is log pi/ref of a token; of tokens, at the prefixes that were sampled.

A KL of tokens is averaged as the surrogate beside it: by response unless told, as GRPO's (Shao et al. 2024, arXiv:2402.03300, eq. 3);
beside a surrogate of another average give it the same, `ppo() + beta * kl_k2(token_mean)`.
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

FAR = 10.0  # nats of a response's log-ratio at which chi-squared goes on along its tangent, as in the paper's code
LEAST_CHI2 = 1e-4  # under the root, whose slope is infinite at 0


def kl_k1(aggregate: Aggregate = response_mean) -> Loss:
    """The log-ratio itself, d (Schulman 2020, "Approximating KL divergence"): signed, its mean is KL(pi || ref).

    Its gradient is that of log pi, whose mean over samples of the policy is 0: as a loss it only adds noise. It is here to measure by;
    take `kl_k2`, `kl_k3_weighted`, or `kl_reward`.
    """
    return _kl("kl_k1", lambda d: d, aggregate)


def kl_k2(aggregate: Aggregate = response_mean) -> Loss:
    """d^2 / 2 (Schulman 2020): at least 0, a biased value, and the gradient of KL(pi || ref), the reverse KL."""
    return _kl("kl_k2", lambda d: 0.5 * jnp.square(d), aggregate)


def kl_k3(aggregate: Aggregate = response_mean) -> Loss:
    """exp(-d) - 1 + d (Schulman 2020), as in GRPO's loss: at least 0, its mean is KL(pi || ref).

    Its gradient is that of the other one, KL(ref || pi), the forward KL: weak where the policy says what the reference would not.
    """
    return _kl("kl_k3", k3, aggregate)


def kl_k3_weighted(aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """rho (exp(-d) - 1 + d), rho = pi / old: k3 with the importance ratio in the gradient, as DeepSeek-V3.2 corrects it.

    On samples of the old policy its mean is KL(pi || ref), and its gradient is that of KL(pi || ref): the reverse KL, without bias.

    Args:
      aggregate: how tokens are averaged.
      level: whose ratio rho is; that of the surrogate beside it.
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
    """KL(ref || pi) of the next-token distributions, exact over the whole vocabulary, at the prefixes that the batch holds.

    sum_v ref(v) (log ref(v) - log pi(v)),   gradient pi - ref at the logits

    It keeps what the reference says likely. Needs a model that gives `ref_kl`: `--config.reference.token_kl=true`, or
    `alignax.forward(.., teacher=..)`. The reference reads `ref_tokens` where the batch has them, another prompt say.
    """
    return aggregate("kl_ref_pi", lambda out, batch: _exact(out.ref_kl, "ref_kl", "kl/ref_pi"))


def kl_pi_ref(aggregate: Aggregate = response_mean) -> Loss:
    """KL(pi || ref) of the next-token distributions, exact over the whole vocabulary, at the prefixes that the batch holds.

    sum_v pi(v) (log pi(v) - log ref(v)),   gradient pi (log pi - log ref - KL) at the logits

    It keeps the policy from what the reference says unlikely. Needs a model that gives `policy_kl`, as `kl_ref_pi` does `ref_kl`.
    """
    return aggregate("kl_pi_ref", lambda out, batch: _exact(out.policy_kl, "policy_kl", "kl/pi_ref"))


def gkd(aggregate: Aggregate = response_mean) -> Loss:
    """Generalised knowledge distillation (Agarwal et al. 2023, arXiv:2306.13649, eq. 1): a divergence of next-token distributions.

    beta KL(t || m) + (1 - beta) KL(pi || m),   m = beta t + (1 - beta) pi,   t the teacher, the reference of the run

    Exact over the whole vocabulary, at the prefixes that the batch holds: the data's, or of rollouts the policy's own. beta and a
    temperature that both distributions have are `--config.reference.jsd_beta` and `.jsd_temperature`; beta 0 is the forward KL(t || pi),
    1 the reverse KL(pi || t). By response, as in the paper; TRL averages over tokens. Needs `--config.reference.token_kl=true`, or
    `alignax.forward(.., teacher=..)`.
    """
    return aggregate("gkd", lambda out, batch: _exact(out.jsd, "jsd", "jsd"))


def _exact(values: jax.Array | None, name: str, metric: str) -> tuple[jax.Array, Metrics]:
    if values is None:
        raise ValueError(
            f"a divergence of whole distributions needs Outputs.{name}, which this model leaves out; set reference.token_kl=true"
        )
    return values, {metric: values}


def chi2() -> Loss:
    """The chi-squared penalty as its authors released it (Laidlaw et al. 2024, arXiv:2403.03185), averaged over responses.

    (u - 1) + (1 / u - 1),   u = pi(y) / ref(y), the sum of the log-ratios

    On samples of the policy its mean is chi2(pi || ref) = E[u - 1]. Its gradient is that of chi2(pi || ref) / 2 + KL(ref || pi): it
    pulls to the reference too, but it is not the penalty's; `chi2_exact` is. Beyond 10 nats it goes on along its tangent.

    The paper's penalty is the root: `coefficient * square_root(chi2())`.
    """
    return _of_responses("chi2", chi2_of)


def chi2_of(log_ratio: jax.Array) -> jax.Array:
    """(u - 1) + (1 / u - 1) of log u, of responses: [B, N]."""
    return expm1(log_ratio, FAR) + expm1(-log_ratio, FAR)


def chi2_exact() -> Loss:
    """The chi-squared penalty with its own gradient: chi2(pi || ref) = E_pi[pi / ref] - 1 (Laidlaw et al. 2024, arXiv:2403.03185).

    u - 1 in value, 2 u in gradient,   u = pi(y) / ref(y), the sum of the log-ratios

    Half of the gradient is that of u, half that of whom the samples come from. Rare responses of a large u rule its variance; beyond 10
    nats u goes on along its tangent.
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
    """The root of a chi-squared, by its chain rule: `square_root(chi2())` has the gradient of sqrt(chi2) where it is `chi2`'s.

    value / (2 sqrt(max(c, 1e-4))),   c the batch field `chi2`, which `chi2_estimate()` writes

    A root of an average is no average: c is data, estimated from `old_logps` on the global batch, so that parts still add up.
    """
    return objective.mapped(lambda term: term._replace(value=_rooted(term)))


def _rooted(term: Term) -> Value:
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        values, metrics = term.value(out, batch)
        c = jnp.maximum(field(batch, "chi2", "chi2_estimate()"), LEAST_CHI2)  # [B]
        return values / (2.0 * jnp.sqrt(jnp.expand_dims(c, tuple(range(1, values.ndim))))), metrics

    return value


def entropy_bonus(aggregate: Aggregate = token_mean) -> Loss:
    """Minus the entropy of next-token distributions: `ppo() + 0.01 * entropy_bonus()` keeps the policy from settling too soon.

    Of all tokens alike, so noise gains most. Beside a surrogate of another average give it the same.
    """
    return aggregate("entropy_bonus", lambda out, batch: (-out.entropy, {"entropy": out.entropy}))


def value_loss(clip: float = 0.2, aggregate: Aggregate = token_mean, heads: Sequence[float] = ()) -> Loss:
    """A critic's squared error, clipped as PPO's (Schulman et al. 2017; the clip: openai/baselines, and Huang et al. 2024).

    max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2,   R the field `returns`, V_old the field `values`

    A value that has moved beyond the clip towards its return has no gradient. Needs a model that gives `Outputs.values`. Of a critic of H
    heads, [B, N, T, H], it is a weighted sum over heads: their mean, unless `heads` says otherwise. Metrics are then each head's own,
    `values/mean/head_0`.

    Metrics: the explained variance is 1 - (e - m^2) / (q - r^2) of e = `values/squared_error`, r = `returns/mean`,
    q = `returns/mean_square`, m = r - `values/mean`.

    Args:
      clip: how far a value may move in one rollout, in rewards, above 0; infinity does not clip.
      aggregate: how tokens are averaged.
      heads: the weight of each head, the KL's first; () is 1 / H each. Moskovitz et al. 2023 (arXiv:2310.04373) have 0.2 for the KL and
        0.5 for each reward model.
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
            raise ValueError(f"value_loss has weights for {len(heads)} heads, and the critic has {H}; give one for each")
        if not several:
            return loss * (heads[0] if heads else 1.0), metrics
        own = {f"{name}/head_{h}": x[..., h] for name, x in metrics.items() for h in range(H)}
        return loss @ jnp.asarray(list(heads) or [1 / H] * H, jnp.float32), own

    return aggregate("value_loss", value)
