from alignax.losses.algebra import (
    Loss,
    Objective,
    Term,
    at_step,
    chosen_examples,
    chosen_tokens,
    examples,
    lengths,
    loss,
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
from alignax.losses.reward import bradley_terry, centring, score_l2
from alignax.losses.supervised import per_sequence, sft, summed_sft
from alignax.losses.token import tdpo, tdpo2
from alignax.losses.transport import aot, aot_unpaired
from alignax.losses.unpaired import apo_zero_unpaired, kto
from alignax.losses.weighting import wpo

__all__ = [
    # the algebra, and what a loss of one's own is made of
    "Loss", "Objective", "Term", "at_step", "chosen_examples", "chosen_tokens", "desensitised", "diverged", "examples", "lengths",
    "log_odds", "loss", "mean_logps", "mean_ratios", "pair_logps", "pair_metrics", "pair_ratios", "pairwise", "per_sequence", "sequence",
    # divergences
    "alpha_divergence", "chi_squared", "forward_kl", "jensen_shannon", "reverse_kl", "total_variation",
    # losses
    "aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "bco", "bradley_terry", "centring", "cpo", "discopop", "dpo",
    "dpop", "exo", "f_dpo", "hinge", "ipo", "ipo_daa", "ipo_mean", "kto", "ld_dpo", "nca", "orpo", "r_dpo", "robust_dpo", "rpo",
    "rpo_token_mean", "score_l2", "sft", "sigmoid_norm", "simpo", "slic_hf", "sppo", "summed_sft", "tdpo", "tdpo2", "wpo",
]  # fmt: skip
