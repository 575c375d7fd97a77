from alignax.experience.chain import Experience, Stateful, advance, chain, first_carry
from alignax.experience.ensembles import quantile, score, uwo, wco
from alignax.experience.kto import mismatched_kl
from alignax.experience.logps import logps
from alignax.experience.matching import matched_margins, matched_ratios, reward_shift

__all__ = [
    "Experience", "Stateful", "advance", "chain", "first_carry", "logps", "matched_margins", "matched_ratios", "mismatched_kl",
    "quantile", "reward_shift", "score", "uwo", "wco",
]  # fmt: skip
