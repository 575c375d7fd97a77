"""Supervised fine-tuning on the chosen side of Anthropic HH (Bai et al. 2022, arXiv:2204.05862), the step before DPO.

Command:
  alignax train --config experiments/sft_hh.py --config.workdir=runs/sft_hh \\
    --config.model.path=MODEL --config.data.train=HH/train.jsonl --config.data.eval=HH/dev.jsonl

MODEL is a Hugging Face folder of the Llama family; HH has rows of prompt, chosen and rejected. For the raw transcripts of
hh-rlhf, which have no prompt column, add --config.data.prompt_separator=$'\\n\\nAssistant:'.

Hardware: any. The defaults suit a model of a few hundred thousand parameters on 2 CPU cores (about 3 minutes with the 260k-parameter
stories model); for one of billions set learning_rate 2e-5, max_length 2048, and the mesh.

Expected, with stories260K on harmless-base: a loss of 1.85 to 1.95 nats a token after one epoch (1.911 of one seed at commit cc1d45d).
This counts the tokens of completions and their EOS only. With the tokens of prompts it would be 1.65 to 1.85.
"""

from alignax import default_config, sft


def get_config():
    """The config: one epoch over the chosen responses."""
    config = default_config()
    config.data.kind = "sft"
    config.data.max_length = 160
    config.data.max_prompt_length = 64
    config.batch_size = 32
    config.optimizer.learning_rate = 3e-3
    config.eval.samples = 4
    return config


def loss(config):
    """The loss: the mean over all tokens of the batch."""
    return sft()
