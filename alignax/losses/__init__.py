from alignax.losses.algebra import (
    Loss,
    Objective,
    Term,
    at_step,
    chosen_examples,
    chosen_tokens,
    examples,
    lengths,
    make_loss,
    sequence,
    statistics_of,
)
from alignax.losses.divergences import (
    alpha_divergence,
    chi_squared,
    diverged,
    f_dpo,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    total_variation,
)
from alignax.losses.exploration import lp_reg
from alignax.losses.fdpg import (
    FDivergence,
    alpha_pi_p,
    chi2_p_pi,
    chi2_pi_p,
    fdpg,
    hellinger_pi_p,
    js_pi_p,
    kl_p_pi,
    kl_pi_p,
    target_divergences,
    tv_pi_p,
)
from alignax.losses.length import desensitised, ipo_mean, ld_dpo, r_dpo, sigmoid_norm
from alignax.losses.pairs import mean_logps, mean_ratios, pair_logps, pair_metrics, pair_ratios, pairwise
from alignax.losses.penalties import (
    chi2,
    chi2_exact,
    entropy_bonus,
    gkd,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_weighted,
    kl_pi_ref,
    kl_ref_pi,
    square_root,
    value_loss,
)
from alignax.losses.pointwise import apo_down, apo_zero, bco, nca, sppo
from alignax.losses.policy import cispo, gmpo, grpo, gspo, ppo, reinforce, rloo, sapo, vespo
from alignax.losses.preference import discopop, dpo, dpop, exo, hinge, ipo, ipo_daa, robust_dpo, rpo, rpo_token_mean
from alignax.losses.quark import quark
from alignax.losses.reference_free import cpo, log_odds, orpo, simpo, slic_hf
from alignax.losses.responses import (
    Aggregate,
    by_mean,
    by_response,
    by_token,
    finished,
    importance_masked,
    importance_weighted,
    log_ratios,
    off_policy_masked,
    policy_metrics,
    response_mean,
    token_mean,
    token_sum,
)
from alignax.losses.reward import attribute_regression, bradley_terry, centring, grm_sft, score_l2
from alignax.losses.supervised import per_sequence, sft, summed_sft
from alignax.losses.token import tdpo, tdpo2
from alignax.losses.transport import aot, aot_unpaired
from alignax.losses.unpaired import apo_zero_unpaired, kto
from alignax.losses.weighting import wpo

__all__ = [
    "Aggregate", "FDivergence", "Loss", "Objective", "Term", "alpha_divergence", "alpha_pi_p", "aot", "aot_unpaired", "apo_down",
    "apo_zero", "apo_zero_unpaired", "at_step", "attribute_regression", "bco", "bradley_terry", "by_mean", "by_response", "by_token",
    "centring", "chi2", "chi2_exact", "chi2_p_pi", "chi2_pi_p", "chi_squared", "chosen_examples", "chosen_tokens", "cispo", "cpo",
    "desensitised", "discopop", "diverged", "dpo", "dpop", "entropy_bonus", "examples", "exo", "f_dpo", "fdpg", "finished",
    "forward_kl", "gkd", "gmpo", "grm_sft", "grpo", "gspo", "hellinger_pi_p", "hinge", "importance_masked", "importance_weighted",
    "ipo", "ipo_daa", "ipo_mean", "jensen_shannon", "js_pi_p", "kl_k1", "kl_k2", "kl_k3", "kl_k3_weighted", "kl_p_pi", "kl_pi_p",
    "kl_pi_ref", "kl_ref_pi", "kto", "ld_dpo", "lengths", "log_odds", "log_ratios", "lp_reg", "make_loss", "mean_logps", "mean_ratios",
    "nca", "off_policy_masked", "orpo", "pair_logps", "pair_metrics", "pair_ratios", "pairwise", "per_sequence", "policy_metrics",
    "ppo", "quark", "r_dpo", "reinforce", "response_mean", "reverse_kl", "rloo", "robust_dpo", "rpo", "rpo_token_mean", "sapo",
    "score_l2", "sequence", "sft", "sigmoid_norm", "simpo", "slic_hf", "sppo", "square_root", "statistics_of", "summed_sft",
    "target_divergences", "tdpo", "tdpo2", "token_mean", "token_sum", "total_variation", "tv_pi_p", "value_loss", "vespo", "wpo",
]  # fmt: skip
