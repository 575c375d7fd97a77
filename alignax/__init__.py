"""Align language models with JAX on TPU and GPU meshes."""

from alignax.averages import ema, mean, sync
from alignax.config import default_config
from alignax.experience import Experience, chain, logps
from alignax.losses import Loss, Objective, dpo, ipo, rpo, rpo_token_mean, sft, summed_sft
from alignax.mesh import make_mesh
from alignax.models.transformer import ModelConfig, forward
from alignax.train import init_state, make_evaluation, make_step
from alignax.types import Batch, Model, Outputs, TrainState

__version__ = "0.1.0"
__all__ = [
    "Batch", "Experience", "Loss", "Model", "ModelConfig", "Objective", "Outputs", "TrainState", "chain", "default_config", "dpo",
    "ema", "forward", "init_state", "ipo", "logps", "make_evaluation", "make_mesh", "make_step", "mean", "rpo", "rpo_token_mean", "sft",
    "summed_sft", "sync",
]  # fmt: skip
