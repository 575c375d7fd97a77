"""Figures of evaluation samples: means with their standard errors over prompts, and pass@k."""

import itertools
import math

import numpy as np
import pytest

from alignax.run.evaluation import line, pass_at, spread, tries


def test_pass_at_k_by_hand():
    """Chen et al. 2021, eq. 1: of 4 samples 0, 1, 2 and 4 pass; 1 - C(4 - c, 2) / C(4, 2) = 0, 1/2, 5/6, 1."""
    passed = np.array([[False] * 4, [False, True, False, False], [True, False, True, False], [True] * 4])
    np.testing.assert_allclose(pass_at(passed, 1), [0, 1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(pass_at(passed, 2), [0, 1 / 2, 5 / 6, 1])
    np.testing.assert_allclose(pass_at(passed, 4), [0, 1, 1, 1])
    assert [tries(n) for n in (1, 2, 3, 4, 9)] == [[], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_pass_at_k_is_the_mean_over_every_choice_of_k_samples():
    passed = np.random.default_rng(0).random((5, 7)) < 0.3
    for k in tries(7):
        every = [[any(row[list(chosen)]) for chosen in itertools.combinations(range(7), k)] for row in passed]
        np.testing.assert_allclose(pass_at(passed, k), np.mean(every, axis=1), atol=1e-12)


def test_a_standard_error_is_over_prompts_and_leaves_out_what_is_not_known():
    """Prompts' means 1, 4 and 2: their standard deviation is sqrt(7/3)."""
    values = np.array([[0.0, 2.0], [4.0, np.nan], [2.0, 2.0], [np.nan, np.nan]])
    found = spread("gold", values)
    assert found["gold"] == pytest.approx(10 / 5) and found["gold_se"] == pytest.approx(math.sqrt(7 / 3 / 3))
    assert spread("gold", values[:1]) == {"gold": 1.0} and spread("gold", values[3:]) == {}


def test_an_evaluation_says_of_how_many_prompts_it_is():
    scores = {"loss": 1.0, "gold": 0.25, "gold_se": 0.125, "kl": 2.0, "prompts": 4.0}
    assert line(scores, 1) == "loss 1.0000  kl 2.0000  gold 0.2500 +- 0.1250  (samples: 4 prompts)"
    assert line(scores, 8).endswith("(samples: 4 prompts x 8)")
    assert line({"loss": 1.0, "prompts": 4.0}, 1) == "loss 1.0000"
    assert line(scores | {"bad_rewards": 0.0, "bad_gold": 0.0}, 8).endswith("(samples: 4 prompts x 8)")
    told = line(scores | {"bad_rewards": 3.0, "bad_gold": 1.0}, 8)
    assert told.endswith("(samples: 4 prompts x 8, 3 without a reward, 1 without a gold reward)"), "means are over the others"
