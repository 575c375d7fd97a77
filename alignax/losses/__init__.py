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
from alignax.losses.length import desensitised, ipo_mean, ld_dpo, r_dpo, sigmoid_norm
from alignax.losses.pairs import mean_logps, mean_ratios, pair_logps, pair_metrics, pair_ratios, pairwise
from alignax.losses.pointwise import apo_down, apo_zero, bco, nca, sppo
from alignax.losses.preference import discopop, dpo, dpop, exo, hinge, ipo, ipo_daa, robust_dpo, rpo, rpo_token_mean
from alignax.losses.reference_free import cpo, log_odds, orpo, simpo, slic_hf
from alignax.losses.reward import attribute_regression, bradley_terry, centring, score_l2
from alignax.losses.supervised import per_sequence, sft, summed_sft
from alignax.losses.token import tdpo, tdpo2
from alignax.losses.transport import aot, aot_unpaired
from alignax.losses.unpaired import apo_zero_unpaired, kto
from alignax.losses.weighting import wpo

__all__ = [
    "Loss", "Objective", "Term", "alpha_divergence", "aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "at_step",
    "attribute_regression", "bco", "bradley_terry", "centring", "chi_squared", "chosen_examples", "chosen_tokens", "cpo", "desensitised",
    "discopop", "diverged", "dpo", "dpop", "examples", "exo", "f_dpo", "forward_kl", "hinge", "ipo", "ipo_daa", "ipo_mean",
    "jensen_shannon", "kto", "ld_dpo", "lengths", "log_odds", "make_loss", "mean_logps", "mean_ratios", "nca", "orpo", "pair_logps",
    "pair_metrics", "pair_ratios", "pairwise", "per_sequence", "r_dpo", "reverse_kl", "robust_dpo", "rpo", "rpo_token_mean", "score_l2",
    "sequence", "sft", "sigmoid_norm", "simpo", "slic_hf", "sppo", "summed_sft", "tdpo", "tdpo2", "total_variation", "wpo",
]  # fmt: skip
