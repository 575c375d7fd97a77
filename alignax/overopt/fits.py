"""The laws of reward overoptimisation, fitted: gold reward over d = sqrt(KL(policy || initial policy)), in sqrt(nats)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SMALLEST = 0.3  # sqrt(nats): nearer to 0 the RL law's slope is infinite, and its authors do not trust it


class Law(NamedTuple):
    """R(d) = d (alpha - beta f(d)) (Gao et al. 2022, arXiv:2210.10760): linear in alpha and beta, 0 at d = 0."""

    formula: str
    f: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float, float], float]  # alpha, beta -> d of the largest R


BON = Law("d (α − β d)", lambda d: d, lambda alpha, beta: alpha / (2 * beta))
RL = Law("d (α − β log d)", np.log, lambda alpha, beta: math.exp(alpha / beta - 1))


class Fit(NamedTuple):
    """A fitted law; the peak is None where the fit has none above 0."""

    alpha: float
    beta: float
    r2: float  # 1 - squared residuals / squared distances from the mean, over the points that were fitted
    peak_d: float | None
    peak: float | None  # R at its peak
    points: int


def value(law: Law, alpha: float, beta: float, d: np.ndarray) -> np.ndarray:
    """R(d); d > 0."""
    return d * (alpha - beta * law.f(d))


def fit(law: Law, d: ArrayLike, reward: ArrayLike, smallest: float = SMALLEST) -> Fit | None:
    """Least squares in alpha and beta; None where fewer than 3 different d are at least `smallest`.

    Args:
      law: BON for best-of-n, RL for trained policies.
      d: sqrt(KL).
      reward: gold reward, less that of the initial policy: the law is 0 at 0.
      smallest: points nearer to 0 are left out.

    Raises:
      ValueError: for values that are not finite.
    """
    x, y = np.asarray(d, np.float64), np.asarray(reward, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        bad = int((~np.isfinite(x) | ~np.isfinite(y)).sum())
        raise ValueError(f"{bad} of {x.size} points are not finite; leave them out, a law is fitted to finite ones")
    x, y = x[keep := x >= smallest], y[keep]
    if np.unique(x).size < 3:
        return None
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([x, -x * law.f(x)], axis=1), y, rcond=None)
    residual, spread = np.sum(np.square(y - value(law, alpha, beta, x))), np.sum(np.square(y - y.mean()))
    at = law.peak(alpha, beta) if beta > 0 and alpha / beta < 700 else math.nan  # exp(700) is the last that is finite
    there = at > 0 and math.isfinite(at)
    top = float(value(law, alpha, beta, np.array(at))) if there else None
    return Fit(float(alpha), float(beta), float(1 - residual / spread) if spread > 0 else 1.0, at if there else None, top, x.size)
