"""The public names of `alignax`: everyday names, the parts of a training loop by hand, and the namespaces with all further names.

For example, `alignax.dpo` is `alignax.losses.dpo`, while `kl_k3` is only in `alignax.losses`.
"""

from alignax import data, experience, generate, losses, rewards
from alignax.averages import ema, sync
from alignax.config import default_config, load_experiment
from alignax.data import Batches
from alignax.experience import chain, gae, group_relative, kl_reward, logps, mean, report, score, uwo, wco
from alignax.generate import Generator
from alignax.losses import (
    Loss,
    bradley_terry,
    dpo,
    entropy_bonus,
    fdpg,
    grpo,
    ipo,
    kto,
    make_loss,
    observe,
    orpo,
    ppo,
    reinforce,
    rloo,
    rpo,
    sft,
    simpo,
)
from alignax.mesh import make_mesh, put_batch
from alignax.models.hf import export, load_params, open_folder
from alignax.models.statistics import Statistic
from alignax.models.tokenizers import load_tokenizer
from alignax.models.transformer import ModelConfig, forward
from alignax.run.loop import fit
from alignax.run.prepare import prepare
from alignax.run.start import start
from alignax.train import init_state, make_evaluation, make_step
from alignax.types import Batch, Model, Outputs, TrainState

__all__ = [
    "Batch", "Batches", "Generator", "Loss", "Model", "ModelConfig", "Outputs", "Statistic", "TrainState", "bradley_terry", "chain", "data",
    "default_config", "dpo", "ema", "entropy_bonus", "experience", "export", "fdpg", "fit", "forward", "gae", "generate", "group_relative",
    "grpo", "init_state", "ipo", "kl_reward", "kto", "load_experiment", "load_params", "load_tokenizer", "logps", "losses",
    "make_evaluation", "make_loss", "make_mesh", "make_step", "mean", "observe", "open_folder", "orpo", "ppo", "prepare", "put_batch",
    "reinforce", "report", "rewards", "rloo", "rpo", "score", "sft", "simpo", "start", "sync", "uwo", "wco",
]  # fmt: skip
