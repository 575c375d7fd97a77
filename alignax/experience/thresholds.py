"""Thresholds for constrained RLHF, beyond which a higher score is no longer better: from earlier runs, or found during a run.

proxy_point(scores, gold)                                   # for one reward model, from evaluations of runs that maximise it
nelder_mead(objective, simplex)                             # for all models, with a run for each trial: see alignax.experience.simplex
chain(.., score(ensemble), nm_ppo(simplex, patience=50))    # for all models, inside one run

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from alignax.experience.advantages import leave_one_out
from alignax.experience.chain import Experience, Stateful, numbered, report
from alignax.experience.constraints import XI, Multipliers, check_descent, first_multipliers, slack_of
from alignax.experience.simplex import DONE, Rules, Search, first_search, told
from alignax.losses.pairs import check_positive
from alignax.types import Batch


def proxy_point(proxy: Sequence[float], gold: Sequence[float], degree: int = 10) -> float:
    """The score of a reward model beyond which the gold reward falls (Moskovitz et al. 2023): a threshold for it.

    It is the argmax, over the observed range of scores, of the polynomial that best fits gold as a function of proxy. The scores are of
    runs that maximise this reward model alone, without a KL penalty. Correlated reward models shift each other's points, which this
    function ignores; the paper then fits a surface of two models.

    >>> print(f"{proxy_point([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 4.0, 3.0], degree=2):.2f}")
    2.00

    Args:
      proxy: mean scores of the reward model at E evaluations of such runs: [E].
      gold: gold rewards at the same evaluations: [E].
      degree: of the polynomial; it needs more than `degree` evaluations of different scores.
    """
    x, y = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) <= degree:
        raise ValueError(
            f"{x.shape} proxy and {y.shape} gold rewards do not determine a polynomial of degree {degree}; give more evaluations, or "
            "lower degree"
        )
    fit = np.polynomial.Polynomial.fit(x, y, degree)
    grid = np.linspace(x.min(), x.max(), 10_001)
    return float(grid[np.argmax(fit(grid))])


class Searching(NamedTuple):
    """The carry of `nm_ppo`."""

    multipliers: Multipliers
    search: Search
    rollouts: jax.Array  # [] int32: rollouts of the current trial so far
    gold: jax.Array  # [last] mean gold rewards of the trial's rollouts, the latest first


def nm_ppo(
    simplex: Sequence[Sequence[float]],
    patience: int,
    last: int = 1,
    within: float = 0.05,
    most: int = 10,
    tolerance: float = 0.01,
    near: float = 5e-3,
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """NM-PPO (Moskovitz et al. 2023, arXiv:2310.04373): `xi_ppo` with a Nelder-Mead search for the thresholds during the run.

    A trial of thresholds lasts until every mean score is within 5 % of its threshold, or for `patience` rollouts. Then the mean gold reward
    decides which thresholds are tried next. The policy and the multipliers continue from where they are. After the search the best
    thresholds stay. The search is in the carry, so a run that was stopped continues it. Thresholds that cannot be reached together mislead
    the search, since the policy that is judged is not at them; docs/online.md says how often this happens on a bandit.

    Reads the fields of `xi_ppo`, and `gold` [B, N] from the experiment's gold(..). Since the search uses the gold reward, that reward no
    longer measures the run. Writes and reports the same as `xi_ppo`. Also reports `constraint/threshold_k`, the current thresholds;
    `constraint/phase` (0 a first or a smaller simplex, 1 reflection, 2 expansion, 3 contraction, 5 the end); and
    `constraint/evaluations`, the number of earlier trials.

    Args:
      simplex: K + 1 thresholds to begin with: [K + 1, K], as far apart as thresholds may differ.
      patience: rollouts after which thresholds that are not reached are judged anyway; at least `last`.
      last: rollouts at the end of a trial over which gold rewards are averaged, and the shortest trial; the noise of a single rollout
        misleads the search.
      within: how near a mean score must be, as a share of its threshold. A threshold of 0 is never reached, only judged after `patience`.
      most: largest number of iterations of the search; this and the next two have the authors' defaults.
      tolerance: the search ends when the gold rewards of the simplex have a smaller standard deviation.
      near: thresholds that differ by no more are not tried again.
      learning_rate: as in `xi_ppo`.
      momentum: as in `xi_ppo`.
      initial: as in `xi_ppo`.
      estimator: as in `xi_ppo`.
    """
    rules = Rules(most, tolerance, near)
    search = first_search(rules, simplex)
    check_descent(learning_rate, momentum)
    check_positive("last", last)
    check_positive("within", within)
    if not patience >= last:
        raise ValueError(
            f"patience is {patience} rollouts, but gold rewards are averaged over the last {last} rollouts; set patience to at least {last}"
        )
    first = Searching(first_multipliers(search.asked.size, initial), search, jnp.zeros((), jnp.int32), jnp.zeros(last, jnp.float32))
    return Stateful("nm_ppo", first, Partial(_Searched(rules, patience, within), learning_rate, momentum, estimator or leave_one_out()))


@dataclasses.dataclass(frozen=True)
class _Searched:
    """The static part of `nm_ppo`."""

    rules: Rules
    patience: int
    within: float

    def __call__(
        self, rate: jax.Array, momentum: jax.Array, estimator: Experience, carry: Searching, batch: Batch
    ) -> tuple[Searching, Batch]:
        search, following = carry.search, self.judged(carry, batch)
        multipliers, after = XI(search.asked, rate, momentum, estimator, carry.multipliers, batch)
        metrics = {"constraint/phase": search.phase, "constraint/evaluations": search.evaluations}
        after = report(after, **metrics, **numbered("constraint/threshold", search.asked))
        return following._replace(multipliers=multipliers), after

    def judged(self, carry: Searching, batch: Batch) -> Searching:
        """The carry after one more rollout with the thresholds that the search asked for."""
        theta = carry.search.asked
        slack, known = slack_of(theta, batch)
        if "gold" not in batch:
            raise ValueError("nm_ppo needs gold rewards, but the batch has none; add gold(prompts, completions) to the experiment file")
        known &= jnp.isfinite(batch["gold"])  # [B, N]
        mean = jnp.where(known, batch["gold"], 0.0).sum() / jnp.maximum(known.sum(), 1)
        seen = known.any()  # a rollout without a gold reward does not count
        rollouts = carry.rollouts + seen
        recent = jnp.where(seen, jnp.concatenate([mean[None], carry.gold[:-1]]), carry.gold)
        met = (jnp.abs(slack) <= self.within * jnp.abs(theta)).all() & (rollouts >= recent.size)
        ends = seen & (met | (rollouts >= self.patience)) & (carry.search.phase != DONE)
        search = jax.lax.cond(ends, functools.partial(told, self.rules), lambda search, _: search, carry.search, recent.mean())
        return Searching(carry.multipliers, search, jnp.where(ends, 0, rollouts), recent)
