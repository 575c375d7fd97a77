"""Thresholds for constrained RLHF: where more of a score is no longer better, found in earlier runs or while a run trains.

proxy_point(scores, gold)                                   # of one reward model, in evaluations of runs that maximise it
nelder_mead(objective, simplex)                             # of all, a run for each trial: see alignax.experience.simplex
chain(.., score(ensemble), nm_ppo(simplex, patience=50))    # of all, inside one run
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

    The argmax, over the range of scores that was seen, of the polynomial that fits gold over proxy best. The scores are of runs that
    maximise this reward model alone, without a KL penalty. Reward models that are correlated shift one another's points, which this
    does not see: the paper then fits a surface of two.

    Args:
      proxy: mean scores of one reward model at evaluations of such runs: [E].
      gold: gold rewards there: [E].
      degree: of the polynomial; needs more evaluations than that.
    """
    x, y = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) <= degree:
        raise ValueError(
            f"{x.shape} proxy and {y.shape} gold rewards do not fix a polynomial of degree {degree}; give more evaluations, or lower degree"
        )
    fit = np.polynomial.Polynomial.fit(x, y, degree)
    grid = np.linspace(x.min(), x.max(), 10_001)
    return float(grid[np.argmax(fit(grid))])


class Searching(NamedTuple):
    """The carry of `nm_ppo`."""

    multipliers: Multipliers
    search: Search
    rollouts: jax.Array  # [] int32: of the present evaluation so far
    gold: jax.Array  # [last] mean gold rewards of its rollouts, the latest first


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
    """NM-PPO (Moskovitz et al. 2023, arXiv:2310.04373): `xi_ppo` whose thresholds are searched for while it trains, by Nelder and Mead.

    Thresholds are tried for as long as it takes until every mean score is within 5 % of its own, or `patience` rollouts; then the mean
    gold reward decides what is tried next. Policy and multipliers go on from where they are. At the end of the search the best thresholds
    stay. The search lives in the carry, so a run that is stopped goes on with it. Thresholds that are not reached together mislead it,
    since what is judged then is a policy that is elsewhere: see docs/online.md for how often, on a bandit.

    Reads what `xi_ppo` reads, and `gold` [B, N]: of an experiment that has gold(..), and of which these runs are therefore no measure any
    more. Writes and reports what it does, and reports `constraint/threshold_k`, those in force, `constraint/phase` (0 a first or a smaller
    simplex, 1 reflection, 2 expansion, 3 contraction, 5 the end) and `constraint/evaluations`, how many have been tried before.

    Args:
      simplex: K + 1 thresholds to begin with: [K + 1, K], as far apart as thresholds may differ.
      patience: rollouts after which thresholds that are not reached are judged all the same; at least `last`.
      last: rollouts at the end of a trial, and its least length, over which gold rewards are averaged: noise of one misleads the search.
      within: how near a mean score must be, in units of its threshold. One of 0 is never reached, only judged.
      most: iterations of the search; this and the next two have the authors' defaults.
      tolerance: it ends where the gold rewards of the simplex have a smaller standard deviation.
      near: thresholds of which none differs by more are not tried again.
      learning_rate: this and the others as `xi_ppo` has them.
      momentum: see there.
      initial: see there.
      estimator: see there.
    """
    rules = Rules(most, tolerance, near)
    search = first_search(rules, simplex)
    check_descent(learning_rate, momentum)
    check_positive("last", last)
    check_positive("within", within)
    if not patience >= last:
        raise ValueError(f"patience is {patience} rollouts, of which gold rewards are averaged over {last}; give as many at least")
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
        """The search after one more rollout with the thresholds that it asked for."""
        theta = carry.search.asked
        slack, known = slack_of(theta, batch)
        if "gold" not in batch:
            raise ValueError("nm_ppo searches by gold rewards, of which the batch has none; give the experiment gold(prompts, completions)")
        known &= jnp.isfinite(batch["gold"])  # [B, N]
        mean = jnp.where(known, batch["gold"], 0.0).sum() / jnp.maximum(known.sum(), 1)
        seen = known.any()  # a rollout without a gold reward says nothing
        rollouts = carry.rollouts + seen
        recent = jnp.where(seen, jnp.concatenate([mean[None], carry.gold[:-1]]), carry.gold)
        met = (jnp.abs(slack) <= self.within * jnp.abs(theta)).all() & (rollouts >= recent.size)
        ends = seen & (met | (rollouts >= self.patience)) & (carry.search.phase != DONE)
        search = jax.lax.cond(ends, functools.partial(told, self.rules), lambda search, _: search, carry.search, recent.mean())
        return Searching(carry.multipliers, search, jnp.where(ends, 0, rollouts), recent)
