"""Fits of the laws of reward overoptimisation: gold reward as a function of d = sqrt(KL(policy || initial policy)), in sqrt(nats)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SMALLEST = 0.3  # sqrt(nats); the slope of the RL law is infinite at 0, and its authors do not trust it near there


class Law(NamedTuple):
    """A law R(d) = d (alpha - beta f(d)) (Gao et al. 2022, arXiv:2210.10760): linear in alpha and beta, and 0 at d = 0."""

    formula: str
    f: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float, float], float]  # alpha, beta -> the d where R is largest


BON = Law("d (α − β d)", lambda d: d, lambda alpha, beta: alpha / (2 * beta))
RL = Law("d (α − β log d)", np.log, lambda alpha, beta: math.exp(alpha / beta - 1))


class Fit(NamedTuple):
    """A fitted law. `peak_d` and `peak` are None if R has no maximum at a d above 0."""

    alpha: float
    beta: float
    r2: float  # 1 - squared residuals / squared distances from the mean, over the fitted points
    peak_d: float | None
    peak: float | None  # R at its peak
    points: int


def value(law: Law, alpha: float, beta: float, d: np.ndarray) -> np.ndarray:
    """The values R(d) of a law at each d > 0: [E] -> [E]."""
    return d * (alpha - beta * law.f(d))


def fit(law: Law, d: ArrayLike, reward: ArrayLike, smallest: float = SMALLEST) -> Fit | None:
    """The least-squares fit of a law in alpha and beta. None if fewer than 3 different d are at least `smallest`.

    Args:
      law: BON for best-of-n, RL for trained policies.
      d: sqrt(KL) of each point, [E].
      reward: gold reward of each point less that of the initial policy, [E]; the law is 0 at d = 0.
      smallest: points with a smaller d are left out.

    Raises:
      ValueError: for values that are not finite.
    """
    x, y = np.asarray(d, np.float64), np.asarray(reward, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        bad = int((~np.isfinite(x) | ~np.isfinite(y)).sum())
        raise ValueError(f"{bad} of {x.size} points are not finite; leave them out; a law is fitted only to finite points")
    x, y = x[keep := x >= smallest], y[keep]
    if np.unique(x).size < 3:
        return None
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([x, -x * law.f(x)], axis=1), y, rcond=None)
    residual, spread = np.sum(np.square(y - value(law, alpha, beta, x))), np.sum(np.square(y - y.mean()))
    at = law.peak(alpha, beta) if beta > 0 and alpha / beta < 700 else math.nan  # exp overflows a little above 700
    there = at > 0 and math.isfinite(at)
    top = float(value(law, alpha, beta, np.array(at))) if there else None
    return Fit(float(alpha), float(beta), float(1 - residual / spread) if spread > 0 else 1.0, at if there else None, top, x.size)
