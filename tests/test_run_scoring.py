"""Scores of samples by the frozen models of a run: whom they are for, and that each model reads samples once."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from alignax.config import default_config
from alignax.program import Program
from alignax.run.scoring import Scorers

SCORES = {
    "gold": np.array([[[1.0, 3.0], [np.nan, np.nan]]]),
    "helpful": np.array([[[5.0], [6.0]]]),
    "twin": np.array([[[-1.0, -2.0, 0.0]] * 2]),
}
SCORED = np.array([[[True, False, False], [True, True, False]]])


def scorers(monkeypatch, names, metrics=None, reward=None):
    """Scorers of stand-ins for models, and the list of the models that were run; "gold" is an ensemble of two."""
    read = []

    def said(self, name, answers):
        read.append(name)
        return SCORES[name], SCORED

    monkeypatch.setattr(Scorers, "said", said)
    config = default_config()
    config.models = dict.fromkeys(names, {"path": "x"})
    experiment = SimpleNamespace(config=config, gold=None, metrics=metrics, reward=reward)
    programs = {f"rollout/score/{name}": Program(None, ()) for name in names} | {"eval/score/other": Program(None, ())}
    run: Any = SimpleNamespace(experiment=experiment, roles={name: SimpleNamespace(members=name != "twin") for name in names})
    score: Any = Scorers(run, {}, programs, "rollout")
    return score, read


def test_a_gold_model_that_metrics_ask_for_reads_samples_once(monkeypatch):
    score, read = scorers(
        monkeypatch, ["gold", "helpful"], lambda prompts, completions, gold: {}, lambda prompts, completions, gold, helpful: []
    )
    models, gold = score(None)
    assert sorted(read) == ["gold", "helpful"]
    np.testing.assert_array_equal(gold, [[2.0, np.nan]])
    assert models["helpful"] == [5.0, 6.0]
    np.testing.assert_array_equal(models["gold"], [[1.0, 3.0], [np.nan, np.nan]])


def test_models_are_given_to_those_who_ask_and_gold_needs_no_one(monkeypatch):
    models, gold = scorers(monkeypatch, ["gold", "twin"], lambda prompts, completions, twin: {})[0](None)
    assert models == {"twin": [[-1.0], [-1.0, -2.0]]} and gold is not None
    models, gold = scorers(monkeypatch, ["helpful"], reward=lambda prompts, completions, helpful: [])[0](None)
    assert models == {"helpful": [5.0, 6.0]} and gold is None
    assert scorers(monkeypatch, [])[0](None) == ({}, None)
