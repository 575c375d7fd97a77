from alignax.experience.kto import mismatched_kl
from alignax.experience.logps import Experience, chain, logps
from alignax.experience.matching import matched_margins, matched_ratios, reward_shift

__all__ = ["Experience", "chain", "logps", "matched_margins", "matched_ratios", "mismatched_kl", "reward_shift"]
