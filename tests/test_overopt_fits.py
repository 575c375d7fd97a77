"""Fits recover what was planted, and peaks are where a grid finds them."""

import math

import numpy as np
import pytest

from alignax.overopt.fits import BON, RL, fit, value

D = np.linspace(0.0, 4.0, 21)


@pytest.mark.parametrize("law", [BON, RL], ids=["bon", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.3, 0.4), (0.5, 0.12), (0.7, -0.2)])
def test_planted_coefficients(law, alpha, beta):
    reward = np.where(D > 0, value(law, alpha, beta, np.maximum(D, 1e-9)), 0.0)
    own = fit(law, D, reward)
    assert (own.alpha, own.beta) == pytest.approx((alpha, beta), abs=1e-6) and own.r2 == pytest.approx(1.0)
    assert own.points == int((D >= 0.3).sum())
    if beta < 0:
        assert own.peak_d is None and own.peak is None
    else:
        grid = np.linspace(1e-3, 60, 2_000_001)
        curve = value(law, alpha, beta, grid)
        assert own.peak_d == pytest.approx(grid[curve.argmax()], abs=1e-3) and own.peak == pytest.approx(curve.max(), abs=1e-6)


def test_peaks_in_closed_form():
    assert fit(BON, D, D * (0.5 - 0.12 * D)).peak == pytest.approx(0.5**2 / (4 * 0.12))
    assert fit(RL, D[1:], value(RL, 0.5, 0.12, D[1:])).peak == pytest.approx(2.84739, abs=1e-5)


def test_noise_lowers_r2():
    noisy = D * (1.3 - 0.4 * D) + np.random.default_rng(0).normal(size=D.size)
    own = fit(BON, D, noisy)
    assert 0 < own.r2 < 0.9
    other = fit(RL, D, noisy)
    assert math.isfinite(other.r2)


def test_points_near_zero_and_too_few_points():
    assert fit(BON, [0.1, 0.2, 1.0, 2.0], [9, 9, 1, 1]) is None
    assert fit(BON, [1.0, 1.0, 1.0, 2.0], [1, 1, 1, 1]) is None
    reward = D * (1.0 - 0.3 * D)
    reward[(D > 0) & (D < 0.3)] = 50.0
    assert fit(BON, D, reward).alpha == pytest.approx(1.0)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="1 of 3 points are not finite"):
        fit(BON, [1.0, 2.0, 3.0], [1.0, np.nan, 2.0])
