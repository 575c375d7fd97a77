"""The experience of f-DPG: the target P(x), its running Z, the baseline, and the choice of the proposal.

    chain(logps("ref_logps", base), boolean_target(), running_log_z(prompts=len(data)), running_baseline(js_pi_p))

The target is an energy-based model: the base policy a(x) times a score of the response (Khalifa et al. 2021, arXiv:2012.11635; Go et al.
2023, arXiv:2302.08215). Its log P [B, N] is the field `log_target`, -inf for a response of probability 0.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpy.typing import ArrayLike

from alignax.averages import PROPOSAL, Average, chosen, still, turning
from alignax.experience.chain import Experience, Stateful
from alignax.losses.algebra import sequence
from alignax.losses.divergences import exp
from alignax.losses.fdpg import FDivergence, aimed, log_ratio, pseudo_rewards
from alignax.losses.pairs import check_positive, field, of_rollout, ref_logps
from alignax.types import Batch, TrainState

# --- targets ---


def boolean_target() -> Experience:
    """Writes `log_target` [B, N] of P = a(x) b(x): the base policy on responses that meet a constraint (`rewards` [B, N] are 1, not 0).

    >>> batch = {"completion_mask": jnp.ones((1, 2, 1), bool), "rewards": jnp.array([[1.0, 0.0]])}
    >>> batch["ref_logps"] = jnp.array([[[-1.0], [-2.0]]])
    >>> print(boolean_target()(batch)["log_target"])
    [[ -1. -inf]]
    """
    return Partial(_boolean_target)


def _boolean_target(batch: Batch) -> Batch:
    return _times_base(jnp.where(field(batch, "rewards", "score(model), mean") > 0.5, 0.0, -jnp.inf), batch)


def reward_target(beta: float = 0.1) -> Experience:
    """Writes `log_target` [B, N] of P = a(x) exp(r(x) / beta), r the field `rewards` [B, N]: the optimum of RLHF with beta KL(pi || a).

    Args:
      beta: strength of the KL, above 0, in rewards per nat.
    """
    check_positive("beta", beta)
    return Partial(_reward_target, beta)


def _reward_target(beta: float, batch: Batch) -> Batch:
    return _times_base(field(batch, "rewards", "score(model), mean") / beta, batch)


def exponential_target(coefficients: ArrayLike) -> Experience:
    """Writes `log_target` [B, N] of P = a(x) exp(coefficients . phi(x)), phi the field `scores` [B, N, K].

    Of all distributions with the same moments of phi, P is the nearest to the base (Khalifa et al. 2021, arXiv:2012.11635, eq. 2).

    Args:
      coefficients: [K], from `fit_moments`; infinity requires a binary feature to be 1.
    """
    return Partial(_exponential_target, jnp.asarray(coefficients, jnp.float32))


def _exponential_target(coefficients: jax.Array, batch: Batch) -> Batch:
    features = field(batch, "scores", "score(ensemble)")  # [B, N, K]
    if features.shape[-1:] != coefficients.shape:
        raise ValueError(f"coefficients of shape {coefficients.shape} for {features.shape[-1]} scores; give one coefficient for each score")
    required = coefficients == jnp.inf
    energy = features @ jnp.where(required, 0.0, coefficients)
    missed = (required[None, None] & (features < 0.5)).any(axis=-1)
    return _times_base(jnp.where(missed, -jnp.inf, energy), batch)


def _times_base(log_scorer: jax.Array, batch: Batch) -> Batch:
    """The batch with `log_target`, the log of base times scorer, from log_scorer [B, N]; 0 where there is no response."""
    real = batch["completion_mask"].any(axis=-1)
    return batch | {"log_target": jnp.where(real, sequence(ref_logps(batch), batch) + log_scorer, 0.0)}


def fit_moments(features: ArrayLike, moments: ArrayLike, log_weights: ArrayLike | None = None, tolerance: float = 1e-5) -> np.ndarray:
    """Fits the coefficients [K] of an exponential family to given moments, by self-normalised importance sampling.

    sum_i w_i phi_i / sum_i w_i = moments,   w_i = a(x_i) / q(x_i) exp(coefficients . phi_i)

    It runs on the host, in float64, by Newton's method on the convex dual log sum_i w_i - coefficients . moments. A binary feature whose
    moment is 1 becomes a constraint with coefficient infinity; if all features are such, P is the base times booleans.

    >>> print(fit_moments([[0.0], [1.0]], [0.75]).round(3))  # log 3
    [1.099]

    Args:
      features: phi [n, K] of n samples, a few hundred at least.
      moments: [K], the means of the features under the target.
      log_weights: log a/q [n] of the samples; None for samples of the base policy.
      tolerance: of the moments, in their units.

    Raises:
      ValueError: for moments that no weights on these samples have, or only weights that are 0 almost everywhere.
    """
    phi, wanted = np.asarray(features, np.float64), np.asarray(moments, np.float64)
    if phi.ndim != 2 or wanted.shape != phi.shape[1:] or not len(phi):
        raise ValueError(f"features of shape {phi.shape} for moments of shape {wanted.shape}; give [samples, K] and [K]")
    logs = np.zeros(len(phi)) if log_weights is None else np.asarray(log_weights, np.float64)
    required = (wanted == 1) & np.isin(phi, (0, 1)).all(axis=0)
    kept = phi[:, required].all(axis=1) & (logs > -np.inf)
    if not kept.any():
        raise ValueError(f"none of {len(phi)} samples has all of the features {np.flatnonzero(required).tolist()}; take more samples")
    found = np.full(len(wanted), np.inf)
    found[~required] = _newton(phi[kept][:, ~required], wanted[~required], logs[kept], tolerance)
    return found


def _newton(phi: np.ndarray, wanted: np.ndarray, logs: np.ndarray, tolerance: float) -> np.ndarray:
    """Minimises the convex log sum_i exp(logs_i + x . phi_i) - x . wanted by Newton steps, halved until they descend."""

    def dual(x: np.ndarray) -> tuple[float, np.ndarray]:
        energy = logs + phi @ x
        total = np.logaddexp.reduce(energy)
        return total - x @ wanted, np.exp(energy - total)

    x = np.zeros(len(wanted))
    value, p = dual(x)
    for _ in range(100):
        mean = p @ phi
        if np.abs(mean - wanted).max(initial=0.0) <= tolerance:
            return x
        covariance = (phi - mean).T @ (p[:, None] * (phi - mean))
        step, size = np.linalg.lstsq(covariance, wanted - mean, rcond=1e-10)[0], 1.0
        descent = step @ (wanted - mean)
        tried = dual(x + step)
        while size > 1e-8 and not tried[0] <= value - 1e-4 * size * descent:
            size *= 0.5
            tried = dual(x + size * step)
        x, (value, p) = x + size * step, tried
    raise ValueError(
        f"moments {wanted.tolist()} are out of reach of {len(phi)} samples: the features lie between {phi.min(0).tolist()} and "
        f"{phi.max(0).tolist()}, and the nearest moments are {(p @ phi).tolist()}; take more samples, or other moments"
    )


# --- carries ---


def running_log_z(prompts: int | None = None, max_z: float | None = None) -> Stateful:
    """Writes `log_z` [B]: log Z = log E_q[P / q] of each row's prompt, the mean over all samples so far, with those of this batch.

    The sums are in log space. The carry has a Z for each prompt, or one Z for all rows. Without a sample of P > 0 log Z is -inf.

    Args:
      prompts: number of prompts; `prompt_id` [B] int32 gives the prompt of a row. None: all rows have the same prompt.
      max_z: an upper bound of Z, 1 for a boolean target; the mean is clipped there, so that one unlikely sample cannot spoil it.
    """
    if max_z is not None:
        check_positive("max_z", max_z)
    size = 1 if prompts is None else prompts
    first = {"log_z": jnp.full(size, -jnp.inf), "count": jnp.zeros(size)}
    return Stateful("log_z", first, Partial(_LogZ(prompts is None, math.inf if max_z is None else math.log(max_z))))


@dataclasses.dataclass(frozen=True)
class _LogZ:
    """The static part of `running_log_z`."""

    shared: bool
    most: float  # nats

    def __call__(self, carry: dict[str, jax.Array], batch: Batch) -> tuple[dict[str, jax.Array], Batch]:
        real = batch["completion_mask"].any(axis=-1)  # [B, N]
        ratio = field(batch, "log_target", "boolean_target()") - sequence(of_rollout(batch, "sampled_logps"), batch)
        ratio = jnp.where(real, ratio, -jnp.inf)  # [B, N] log P/q
        ids = jnp.zeros(len(real), jnp.int32) if self.shared else of_rollout(batch, "prompt_id")
        peak = carry["log_z"].at[ids].max(ratio.max(axis=1))  # [prompts]
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        of_row = peak.at[ids].get(mode="fill", fill_value=0.0)[:, None]
        total = (carry["count"] * jnp.exp(carry["log_z"] - peak)).at[ids].add(jnp.exp(ratio - of_row).sum(axis=1))
        count = carry["count"].at[ids].add(real.sum(axis=1).astype(jnp.float32))
        mean = jnp.minimum(peak + jnp.log(total / jnp.maximum(count, 1.0)), self.most)
        # A prompt id out of range gives NaN, which stops the step; it must not read another prompt's Z.
        return {"log_z": mean, "count": count}, batch | {"log_z": mean.at[ids].get(mode="fill", fill_value=jnp.nan)}


def running_baseline(divergence: FDivergence, window: int = 1024) -> Stateful:
    """Writes `fdpg_baseline` [B]: the mean pseudo-reward of earlier batches, 0 before there is one.

    The baseline does not depend on the samples that it is subtracted from, so the gradient has no bias. The mean fades, with a memory of
    about `window` responses; the paper's code keeps the last 1024. Reads `log_target` [B, N], `log_z` [B], and `old_logps` [B, N, T] of the
    current policy.

    Args:
      divergence: the same as in `fdpg`.
      window: number of responses, at least 1.
    """
    if window < 1:
        raise ValueError(f"the window is {window}; it must be a number of responses, at least 1 (1024 is usual)")
    first = {"total": jnp.zeros(()), "count": jnp.zeros(())}
    return Stateful("fdpg_baseline", first, Partial(_Baseline(divergence, window)))


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """The static part of `running_baseline`."""

    divergence: FDivergence
    window: int

    def __call__(self, carry: dict[str, jax.Array], batch: Batch) -> tuple[dict[str, jax.Array], Batch]:
        baseline = carry["total"] / jnp.where(carry["count"] > 0, carry["count"], 1.0)
        rewards = pseudo_rewards(self.divergence, log_ratio(_policy(batch), batch))  # [B, N]
        real = aimed(batch)
        fade = (1.0 - 1.0 / self.window) ** real.sum()
        total = fade * carry["total"] + jnp.where(real, rewards, 0.0).sum()
        after = {"total": total, "count": fade * carry["count"] + real.sum()}
        return after, batch | {"fdpg_baseline": jnp.full(real.shape[0], baseline)}


# --- off-policy: the proposal is replaced when the policy is nearer to the target ---


def proposal_evidence() -> Stateful:
    """Sums evidence in its carry that the policy is nearer to the target than the proposal: KL(p || q) - KL(p || pi), in nats.

    sum_i P / (Z q) (log pi - log q), over samples of q, with the current Z. Reads the fields of `running_baseline` and `sampled_logps`.
    """
    return Stateful(PROPOSAL, {"gain": jnp.zeros(()), "count": jnp.zeros(())}, Partial(_proposal_evidence))


def _proposal_evidence(carry: dict[str, jax.Array], batch: Batch) -> tuple[dict[str, jax.Array], Batch]:
    policy, proposal = _policy(batch), sequence(of_rollout(batch, "sampled_logps"), batch)
    real = aimed(batch)
    gain = exp(-log_ratio(proposal, batch)) * (policy - proposal)  # [B, N]
    return {"gain": carry["gain"] + jnp.where(real, gain, 0.0).sum(), "count": carry["count"] + real.sum()}, batch


def adopt_if_better(every: int = 16) -> Average:
    """The average that is the proposal of off-policy f-DPG: the policy when it was last found to be the better proposal.

    Better is KL(p || pi) < KL(p || q), estimated on the samples of the last `every` steps by `proposal_evidence()` in the experience. Z
    does not depend on the proposal, so its estimate continues.

        averages(config) -> {"proposal": adopt_if_better(16)}

    Args:
      every: steps between decisions; online a multiple of the steps on a rollout.
    """
    return turning(still, every, _adopt)


def _adopt(state: TrainState, name: str, due: jax.Array) -> TrainState:
    if PROPOSAL not in state.carry:
        raise ValueError(
            "adopt_if_better() needs the evidence that proposal_evidence() gathers; put proposal_evidence() at the end of the "
            "experience's chain"
        )
    evidence = state.carry[PROPOSAL]
    adopted = chosen(due & (evidence["gain"] > 0), state.params, state.averages[name])
    fresh = jax.tree.map(lambda x: jnp.where(due, 0.0, x), evidence)
    return dataclasses.replace(state, averages=state.averages | {name: adopted}, carry=state.carry | {PROPOSAL: fresh})


def _policy(batch: Batch) -> jax.Array:
    """The log-probs of the responses [B, N] under the current policy."""
    return sequence(field(batch, "old_logps", 'logps("old_logps", policy)'), batch)
