"""GRPO from scratch on sums modulo 10, which this file writes. An answer is rewarded if its last number is right.

  GRPO: Shao et al. 2024, arXiv:2402.03300.  A reward that is a program: Cobbe et al. 2021, arXiv:2110.14168 (the last number counts).

Command:
  alignax train --config experiments/grpo_arithmetic.py

Hardware: 2 CPU cores, one process.

A model with random weights gets the prompt "3 + 4 =" and samples an answer. It never sees a right answer in training.

Expected, with seed 0 (5 minutes of CPU time on an AMD EPYC), the share of right answers at temperature 1, one sample for each of 100
sums: 0.14 at first, 0.88 after 100 steps, 0.93 after 300, 0.96 after 700. Seed 1: 0.10, 0.97, 0.98, 0.99. Seed 2: 0.09, 0.91, 0.90,
0.96. The other sums have 16 samples with the same wrong answer; such a group has no gradient. No answer ends with an EOS: `1 1 1` is as
good as `1`, because only the last number counts.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from alignax import default_config, entropy_bonus, group_relative, grpo, paths
from alignax.cli import commands
from alignax.config import BadInput
from alignax.losses import response_mean
from alignax.rewards.rules import last_number

MODULUS = 10
EOS = "</s>"


def get_config():
    """The config: sizes for a few minutes on 2 cores."""
    config = default_config()
    config.workdir = "runs/grpo_arithmetic"
    config.width = 64
    config.steps = 700
    config.batch_size = 64
    config.data.kind = "prompt"
    config.model.init = "random"
    config.model.remat = "none"
    config.rollout.samples = 16
    config.rollout.max_new_tokens = 3
    config.rollout.slots = 1024
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.eval.every = 100
    config.eval.batch_size = 128
    config.eval.sample_prompts = 100
    config.eval.max_new_tokens = 3
    config.log.every = 20
    return config


def loss(config):
    """The loss: GRPO without a KL, since there is no reference. The entropy bonus helps prompts whose samples are all wrong."""
    return grpo() + 0.003 * entropy_bonus(response_mean)


def experience(config):
    """The experience: each reward compared with the other rewards of its group."""
    return group_relative()


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[int]) -> list[float]:
    """The rewards: 1 if the last number is right, else 0."""
    return [float(last_number(text) == right) for text, right in zip(completions, answer, strict=True)]


def main(experiment):
    """Writes the prompts and the model folder, then trains."""
    config = experiment.config
    if not config.model.path:
        if config.data.train:
            raise BadInput(f"data.train is {config.data.train!r}, and the sums are written here; leave it empty, or give model.path too")
        config = config.copy_and_resolve_references()
        world = paths.here(config.workdir, "workdir") / "world"
        write_world(world, config.width)
        config.model.path, config.data.train = str(world / "model"), str(world / "prompts.jsonl")
        config.workdir = str(paths.here(config.workdir, "workdir") / "run")
    return commands.run(experiment._replace(config=config, main=None))


def write_world(folder: Path, width: int) -> None:
    """Writes all sums as prompts, and a model folder without weights: a config and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = range(MODULUS)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    words = [EOS, "+", "=", *map(str, numbers)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS).save_pretrained(folder / "model")
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(words), "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": width // 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False, "initializer_range": 0.05,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(description, indent=2))
    rows = [{"prompt": f"{a} + {b} =", "answer": (a + b) % MODULUS} for a in numbers for b in numbers]
    tmp = folder / "prompts.tmp"
    tmp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(tmp, folder / "prompts.jsonl")
