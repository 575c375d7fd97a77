"""A Bradley-Terry reward model (Stiennon et al. 2020, arXiv:2009.01325) on the preference pairs of Anthropic HH.

Command:
  alignax train --config experiments/rm_hh.py --config.workdir=runs/rm_hh \\
    --config.model.path=MODEL --config.data.train=HH/train.jsonl --config.data.eval=HH/dev.jsonl

MODEL is the folder of a language model, whose head is replaced by a score, or of a reward model. The run writes a folder `export` at its
end; transformers loads it as a model for sequence classification.

Expected, from the 260k-parameter stories model after sft_hh.py on harmless-base: held-out accuracy 0.64 to 0.65 (a bag of words: 0.651).
On helpful pairs (--config.data.ood of `alignax eval-rm`) it is 0.39 to 0.40, worse than chance. One seed at commit a4f415f gave 0.642 and
0.404.

Hardware: 2 CPU cores for a model of a few 100k parameters; a pod for 7B, with --config.mesh.fsdp=-1.
"""

from alignax import bradley_terry, default_config
from alignax.losses import score_l2


def get_config():
    """The config: one epoch over the pairs."""
    config = default_config()
    config.score_l2 = 0.001
    config.model.num_labels = 1
    config.data.max_length = 160
    config.data.max_prompt_length = 64
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.eval.every = 100
    config.eval.samples = 0
    return config


def loss(config):
    """The Bradley-Terry loss, with a small penalty that keeps scores near 0."""
    return bradley_terry() + config.score_l2 * score_l2()
