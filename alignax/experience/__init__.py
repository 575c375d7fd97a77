"""Experience functions, which write fields of a batch that carry no gradient: reference log-probs, rewards, advantages and returns."""

from alignax.experience.advantages import batch_scaled as batch_scaled
from alignax.experience.advantages import gae as gae
from alignax.experience.advantages import gdpo as gdpo
from alignax.experience.advantages import group_relative as group_relative
from alignax.experience.advantages import leave_one_out as leave_one_out
from alignax.experience.advantages import reinforce_plus_plus as reinforce_plus_plus
from alignax.experience.advantages import rewards_to_go as rewards_to_go
from alignax.experience.advantages import top_entropy as top_entropy
from alignax.experience.advantages import whiten_advantages as whiten_advantages
from alignax.experience.advantages import whiten_responses as whiten_responses
from alignax.experience.chain import Experience as Experience
from alignax.experience.chain import Stateful as Stateful
from alignax.experience.chain import advance as advance
from alignax.experience.chain import chain as chain
from alignax.experience.chain import first_carry as first_carry
from alignax.experience.chain import report as report
from alignax.experience.constraints import all_ppo as all_ppo
from alignax.experience.constraints import mu_ppo as mu_ppo
from alignax.experience.constraints import ppo_sat as ppo_sat
from alignax.experience.constraints import xi_ppo as xi_ppo
from alignax.experience.ensembles import mean as mean
from alignax.experience.ensembles import median as median
from alignax.experience.ensembles import quantile as quantile
from alignax.experience.ensembles import score as score
from alignax.experience.ensembles import uwo as uwo
from alignax.experience.ensembles import wco as wco
from alignax.experience.exploration import low_probability_tokens as low_probability_tokens
from alignax.experience.fdpg import adopt_if_better as adopt_if_better
from alignax.experience.fdpg import boolean_target as boolean_target
from alignax.experience.fdpg import exponential_target as exponential_target
from alignax.experience.fdpg import fit_moments as fit_moments
from alignax.experience.fdpg import proposal_evidence as proposal_evidence
from alignax.experience.fdpg import reward_target as reward_target
from alignax.experience.fdpg import running_baseline as running_baseline
from alignax.experience.fdpg import running_log_z as running_log_z
from alignax.experience.kto import mismatched_kl as mismatched_kl
from alignax.experience.logps import logps as logps
from alignax.experience.matching import chi2_estimate as chi2_estimate
from alignax.experience.matching import matched_margins as matched_margins
from alignax.experience.matching import matched_ratios as matched_ratios
from alignax.experience.matching import reward_shift as reward_shift
from alignax.experience.pama import pama as pama
from alignax.experience.quark import quark_pool as quark_pool
from alignax.experience.quark import unconditioned as unconditioned
from alignax.experience.selection import best_and_worst as best_and_worst
from alignax.experience.shaping import adaptive_kl_reward as adaptive_kl_reward
from alignax.experience.shaping import clip_rewards as clip_rewards
from alignax.experience.shaping import kl_reward as kl_reward
from alignax.experience.shaping import missing_eos_penalty as missing_eos_penalty
from alignax.experience.shaping import overlong_penalty as overlong_penalty
from alignax.experience.shaping import shaping as shaping
from alignax.experience.shaping import whiten_rewards as whiten_rewards
from alignax.experience.simplex import nelder_mead as nelder_mead
from alignax.experience.statistics import token_statistic as token_statistic
from alignax.experience.thresholds import nm_ppo as nm_ppo
from alignax.experience.thresholds import proxy_point as proxy_point
from alignax.models.statistics import min_p, top_k

__all__ = [
    "Experience", "Stateful", "adaptive_kl_reward", "adopt_if_better", "advance", "all_ppo", "batch_scaled", "best_and_worst",
    "boolean_target", "chain", "chi2_estimate", "clip_rewards", "exponential_target", "first_carry", "fit_moments", "gae", "gdpo",
    "group_relative", "kl_reward", "leave_one_out", "logps", "low_probability_tokens", "matched_margins",
    "matched_ratios", "mean", "median", "min_p", "mismatched_kl", "missing_eos_penalty", "mu_ppo", "nelder_mead", "nm_ppo",
    "overlong_penalty", "pama", "ppo_sat", "proposal_evidence", "proxy_point", "quantile", "quark_pool", "reinforce_plus_plus",
    "report", "reward_shift", "reward_target", "rewards_to_go", "running_baseline", "running_log_z", "score", "shaping",
    "token_statistic", "top_entropy", "top_k", "unconditioned", "uwo", "wco", "whiten_advantages", "whiten_responses", "whiten_rewards",
    "xi_ppo",
]  # fmt: skip
