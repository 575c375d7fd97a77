"""Configuration in Python: an experiment file builds a ConfigDict and names its loss; the command line overrides fields."""

from alignax.config.blame import BadInput
from alignax.config.defaults import default_config
from alignax.config.derived import (
    DATA,
    HEAD,
    PRETRAIN,
    ROLLOUTS,
    eval_batch_size,
    longest_answer,
    prompts_of_rollout,
    steps_of_turn,
    trunk_values,
)
from alignax.config.experiment import Experiment, asked, load_experiment, load_module
from alignax.config.identity import (
    changed_files,
    changed_modules,
    check_kept,
    code,
    difference,
    effective,
    identity,
    module_files,
    modules,
)
from alignax.config.overrides import check_path, flat, set_field
from alignax.config.source import of_run

__all__ = [
    "DATA", "HEAD", "PRETRAIN", "ROLLOUTS", "BadInput", "Experiment", "asked", "changed_files", "changed_modules", "check_kept",
    "check_path", "code", "default_config", "difference", "effective", "eval_batch_size", "flat", "identity", "load_experiment",
    "load_module", "longest_answer", "module_files", "modules", "of_run", "prompts_of_rollout", "set_field", "steps_of_turn",
    "trunk_values",
]  # fmt: skip
