"""Align language models with JAX on TPU and GPU meshes."""

from alignax.averages import ema, mean, sync
from alignax.config import default_config
from alignax.experience import (
    Experience,
    chain,
    logps,
    matched_margins,
    matched_ratios,
    mismatched_kl,
    quantile,
    reward_shift,
    score,
    uwo,
    wco,
)
from alignax.losses import (
    Loss,
    Objective,
    alpha_divergence,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    apo_zero_unpaired,
    attribute_regression,
    bco,
    bradley_terry,
    centring,
    chi_squared,
    cpo,
    discopop,
    dpo,
    dpop,
    exo,
    f_dpo,
    forward_kl,
    hinge,
    ipo,
    ipo_daa,
    ipo_mean,
    jensen_shannon,
    kto,
    ld_dpo,
    nca,
    orpo,
    r_dpo,
    reverse_kl,
    robust_dpo,
    rpo,
    rpo_token_mean,
    score_l2,
    sft,
    sigmoid_norm,
    simpo,
    slic_hf,
    sppo,
    summed_sft,
    tdpo,
    tdpo2,
    total_variation,
    wpo,
)
from alignax.mesh import make_mesh
from alignax.models.transformer import ModelConfig, forward
from alignax.train import init_state, make_evaluation, make_step
from alignax.types import Batch, Model, Outputs, TrainState

__version__ = "0.1.0"
__all__ = [
    "Batch", "Experience", "Loss", "Model", "ModelConfig", "Objective", "Outputs", "TrainState", "alpha_divergence", "aot", "aot_unpaired",
    "apo_down", "apo_zero", "apo_zero_unpaired", "attribute_regression", "bco", "bradley_terry", "centring", "chain", "chi_squared", "cpo",
    "default_config", "discopop", "dpo", "dpop", "ema", "exo", "f_dpo", "forward", "forward_kl", "hinge", "init_state", "ipo", "ipo_daa",
    "ipo_mean", "jensen_shannon", "kto", "ld_dpo", "logps", "make_evaluation", "make_mesh", "make_step", "matched_margins",
    "matched_ratios", "mean", "mismatched_kl", "nca", "orpo", "quantile", "r_dpo", "reverse_kl", "reward_shift", "robust_dpo", "rpo",
    "rpo_token_mean", "score", "score_l2", "sft", "sigmoid_norm", "simpo", "slic_hf", "sppo", "summed_sft", "sync", "tdpo", "tdpo2",
    "total_variation", "uwo", "wco", "wpo",
]  # fmt: skip
