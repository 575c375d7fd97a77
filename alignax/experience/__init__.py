from alignax.experience.advantages import (
    batch_scaled,
    gae,
    gdpo,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    rewards_to_go,
    top_entropy,
    whiten_advantages,
    whiten_responses,
)
from alignax.experience.chain import Experience, Stateful, advance, chain, first_carry
from alignax.experience.constraints import all_ppo, mu_ppo, ppo_sat, xi_ppo
from alignax.experience.ensembles import mean, median, quantile, score, uwo, wco
from alignax.experience.exploration import low_probability_tokens
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
from alignax.experience.matching import chi2_estimate, matched_margins, matched_ratios, reward_shift
from alignax.experience.quark import quark_pool, unconditioned
from alignax.experience.selection import best_and_worst
from alignax.experience.shaping import (
    adaptive_kl_reward,
    clip_rewards,
    kl_reward,
    missing_eos_penalty,
    overlong_penalty,
    shaping,
    whiten_rewards,
)
from alignax.experience.simplex import nelder_mead
from alignax.experience.statistics import token_statistic
from alignax.experience.thresholds import nm_ppo, proxy_point

__all__ = [
    "Experience", "Stateful", "adaptive_kl_reward", "adopt_if_better", "advance", "all_ppo", "batch_scaled", "best_and_worst",
    "boolean_target", "chain", "chi2_estimate", "clip_rewards", "exponential_target", "first_carry", "fit_moments", "gae", "gdpo",
    "group_relative", "kl_reward", "leave_one_out", "logps", "low_probability_tokens", "matched_margins", "matched_ratios", "mean",
    "median", "mismatched_kl", "missing_eos_penalty", "mu_ppo", "nelder_mead", "nm_ppo", "overlong_penalty", "ppo_sat",
    "proposal_evidence", "proxy_point", "quantile", "quark_pool", "reinforce_plus_plus", "reward_shift", "reward_target",
    "rewards_to_go", "running_baseline", "running_log_z", "score", "shaping", "token_statistic", "top_entropy", "unconditioned", "uwo",
    "wco", "whiten_advantages", "whiten_responses", "whiten_rewards", "xi_ppo",
]  # fmt: skip
