"""Reward models in use: ensembles, their inputs, closed-form heads, routed models, and reward rules without a model."""

from alignax.rewards.ensembles import (
    anchored,
    assess,
    check_one_score,
    described,
    ensemble_apply,
    ensemble_model,
    load_ensemble,
    load_members,
    open_ensemble,
    rated,
    rounded,
    score_examples,
    stack,
)
from alignax.rewards.ridge import fit_ridge
from alignax.rewards.rules import exact_match, last_number, matches, near_length

__all__ = [
    "anchored", "assess", "check_one_score", "described", "ensemble_apply", "ensemble_model", "exact_match", "fit_ridge", "last_number",
    "load_ensemble", "load_members", "matches", "near_length", "open_ensemble", "rated", "rounded", "score_examples", "stack",
]  # fmt: skip
