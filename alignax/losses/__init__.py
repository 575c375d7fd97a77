"""Loss functions for alignment, and the parts that they are made of: terms, divergences, penalties and aggregates."""

from alignax.losses.algebra import Loss as Loss
from alignax.losses.algebra import Objective as Objective
from alignax.losses.algebra import Term as Term
from alignax.losses.algebra import at_step as at_step
from alignax.losses.algebra import chosen_examples as chosen_examples
from alignax.losses.algebra import chosen_tokens as chosen_tokens
from alignax.losses.algebra import examples as examples
from alignax.losses.algebra import lengths as lengths
from alignax.losses.algebra import make_loss as make_loss
from alignax.losses.algebra import observe as observe
from alignax.losses.algebra import sequence as sequence
from alignax.losses.algebra import statistics_of as statistics_of
from alignax.losses.divergences import alpha_divergence as alpha_divergence
from alignax.losses.divergences import chi_squared as chi_squared
from alignax.losses.divergences import diverged as diverged
from alignax.losses.divergences import f_dpo as f_dpo
from alignax.losses.divergences import forward_kl as forward_kl
from alignax.losses.divergences import jensen_shannon as jensen_shannon
from alignax.losses.divergences import reverse_kl as reverse_kl
from alignax.losses.divergences import total_variation as total_variation
from alignax.losses.exploration import lp_reg as lp_reg
from alignax.losses.fdpg import FDivergence as FDivergence
from alignax.losses.fdpg import alpha_pi_p as alpha_pi_p
from alignax.losses.fdpg import chi2_p_pi as chi2_p_pi
from alignax.losses.fdpg import chi2_pi_p as chi2_pi_p
from alignax.losses.fdpg import fdpg as fdpg
from alignax.losses.fdpg import hellinger_pi_p as hellinger_pi_p
from alignax.losses.fdpg import js_pi_p as js_pi_p
from alignax.losses.fdpg import kl_p_pi as kl_p_pi
from alignax.losses.fdpg import kl_pi_p as kl_pi_p
from alignax.losses.fdpg import target_divergences as target_divergences
from alignax.losses.fdpg import tv_pi_p as tv_pi_p
from alignax.losses.length import desensitised as desensitised
from alignax.losses.length import ipo_mean as ipo_mean
from alignax.losses.length import ld_dpo as ld_dpo
from alignax.losses.length import r_dpo as r_dpo
from alignax.losses.length import sigmoid_norm as sigmoid_norm
from alignax.losses.multi_objective import implicit_rewards as implicit_rewards
from alignax.losses.multi_objective import modpo as modpo
from alignax.losses.pairs import mean_logps as mean_logps
from alignax.losses.pairs import mean_ratios as mean_ratios
from alignax.losses.pairs import pair_logps as pair_logps
from alignax.losses.pairs import pair_metrics as pair_metrics
from alignax.losses.pairs import pair_ratios as pair_ratios
from alignax.losses.pairs import pairwise as pairwise
from alignax.losses.penalties import chi2 as chi2
from alignax.losses.penalties import chi2_exact as chi2_exact
from alignax.losses.penalties import entropy_bonus as entropy_bonus
from alignax.losses.penalties import gkd as gkd
from alignax.losses.penalties import kl_k1 as kl_k1
from alignax.losses.penalties import kl_k2 as kl_k2
from alignax.losses.penalties import kl_k3 as kl_k3
from alignax.losses.penalties import kl_k3_weighted as kl_k3_weighted
from alignax.losses.penalties import kl_pi_ref as kl_pi_ref
from alignax.losses.penalties import kl_ref_pi as kl_ref_pi
from alignax.losses.penalties import square_root as square_root
from alignax.losses.penalties import value_loss as value_loss
from alignax.losses.pointwise import apo_down as apo_down
from alignax.losses.pointwise import apo_zero as apo_zero
from alignax.losses.pointwise import bco as bco
from alignax.losses.pointwise import nca as nca
from alignax.losses.pointwise import sppo as sppo
from alignax.losses.policy import cispo as cispo
from alignax.losses.policy import gmpo as gmpo
from alignax.losses.policy import grpo as grpo
from alignax.losses.policy import gspo as gspo
from alignax.losses.policy import ppo as ppo
from alignax.losses.policy import reinforce as reinforce
from alignax.losses.policy import rloo as rloo
from alignax.losses.policy import sapo as sapo
from alignax.losses.policy import vespo as vespo
from alignax.losses.preference import discopop as discopop
from alignax.losses.preference import dpo as dpo
from alignax.losses.preference import dpop as dpop
from alignax.losses.preference import exo as exo
from alignax.losses.preference import hinge as hinge
from alignax.losses.preference import ipo as ipo
from alignax.losses.preference import ipo_daa as ipo_daa
from alignax.losses.preference import robust_dpo as robust_dpo
from alignax.losses.preference import rpo as rpo
from alignax.losses.preference import rpo_token_mean as rpo_token_mean
from alignax.losses.quark import quark as quark
from alignax.losses.reference_free import cpo as cpo
from alignax.losses.reference_free import log_odds as log_odds
from alignax.losses.reference_free import orpo as orpo
from alignax.losses.reference_free import simpo as simpo
from alignax.losses.reference_free import slic_hf as slic_hf
from alignax.losses.responses import Aggregate as Aggregate
from alignax.losses.responses import by_mean as by_mean
from alignax.losses.responses import by_response as by_response
from alignax.losses.responses import by_token as by_token
from alignax.losses.responses import finished as finished
from alignax.losses.responses import importance_masked as importance_masked
from alignax.losses.responses import importance_weighted as importance_weighted
from alignax.losses.responses import log_ratios as log_ratios
from alignax.losses.responses import off_policy_masked as off_policy_masked
from alignax.losses.responses import policy_metrics as policy_metrics
from alignax.losses.responses import response_mean as response_mean
from alignax.losses.responses import token_mean as token_mean
from alignax.losses.responses import token_sum as token_sum
from alignax.losses.reward import attribute_regression as attribute_regression
from alignax.losses.reward import bradley_terry as bradley_terry
from alignax.losses.reward import centring as centring
from alignax.losses.reward import grm_sft as grm_sft
from alignax.losses.reward import score_l2 as score_l2
from alignax.losses.supervised import per_sequence as per_sequence
from alignax.losses.supervised import sft as sft
from alignax.losses.supervised import summed_sft as summed_sft
from alignax.losses.token import tdpo as tdpo
from alignax.losses.token import tdpo2 as tdpo2
from alignax.losses.transport import aot as aot
from alignax.losses.transport import aot_unpaired as aot_unpaired
from alignax.losses.unpaired import apo_zero_unpaired as apo_zero_unpaired
from alignax.losses.unpaired import kto as kto
from alignax.losses.weighting import wpo as wpo

__all__ = [
    "Aggregate", "FDivergence", "Loss", "Objective", "Term", "alpha_divergence", "alpha_pi_p", "aot", "aot_unpaired", "apo_down",
    "apo_zero", "apo_zero_unpaired", "at_step", "attribute_regression", "bco", "bradley_terry", "by_mean", "by_response", "by_token",
    "centring", "chi2", "chi2_exact", "chi2_p_pi", "chi2_pi_p", "chi_squared", "chosen_examples", "chosen_tokens", "cispo", "cpo",
    "desensitised", "discopop", "diverged", "dpo", "dpop", "entropy_bonus", "examples", "exo", "f_dpo", "fdpg", "finished",
    "forward_kl", "gkd", "gmpo", "grm_sft", "grpo", "gspo", "hellinger_pi_p", "hinge", "implicit_rewards", "importance_masked",
    "importance_weighted", "ipo", "ipo_daa", "ipo_mean", "jensen_shannon", "js_pi_p", "kl_k1", "kl_k2", "kl_k3", "kl_k3_weighted",
    "kl_p_pi", "kl_pi_p", "kl_pi_ref", "kl_ref_pi", "kto", "ld_dpo", "lengths", "log_odds", "log_ratios", "lp_reg", "make_loss",
    "mean_logps", "mean_ratios", "modpo", "nca", "observe", "off_policy_masked", "orpo", "pair_logps", "pair_metrics", "pair_ratios",
    "pairwise", "per_sequence", "policy_metrics", "ppo", "quark", "r_dpo", "reinforce", "response_mean", "reverse_kl", "rloo",
    "robust_dpo", "rpo", "rpo_token_mean", "sapo", "score_l2", "sequence", "sft", "sigmoid_norm", "simpo", "slic_hf", "sppo",
    "square_root", "statistics_of", "summed_sft", "target_divergences", "tdpo", "tdpo2", "token_mean", "token_sum", "total_variation",
    "tv_pi_p", "value_loss", "vespo", "wpo",
]  # fmt: skip
