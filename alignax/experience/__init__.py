from alignax.experience.chain import Experience, Stateful, advance, chain, first_carry
from alignax.experience.ensembles import quantile, score, uwo, wco
from alignax.experience.fdpg import (
    adopt_if_better,
    boolean_target,
    exponential_target,
    fit_moments,
    proposal_evidence,
    reward_target,
    running_baseline,
    running_log_z,
)
from alignax.experience.kto import mismatched_kl
from alignax.experience.logps import logps
from alignax.experience.matching import matched_margins, matched_ratios, reward_shift

__all__ = [
    "Experience", "Stateful", "adopt_if_better", "advance", "boolean_target", "chain", "exponential_target", "first_carry", "fit_moments",
    "logps", "matched_margins", "matched_ratios", "mismatched_kl", "proposal_evidence", "quantile", "reward_shift", "reward_target",
    "running_baseline", "running_log_z", "score", "uwo", "wco",
]  # fmt: skip
