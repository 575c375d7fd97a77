"""Regularised preference optimisation: DPO + eta beta SFT (Liu et al. 2024, arXiv:2405.16436) on Anthropic HH.

Command, after sft_hh.py:
  alignax train --config experiments/rpo_hh.py --config.workdir=runs/rpo_hh \\
    --config.model.path=runs/sft_hh/export --config.data.train=HH/train.jsonl --config.data.eval=HH/dev.jsonl

Hardware: as dpo_hh.py. The two files share their settings, so that their results can be compared.

Expected, with the 260k-parameter stories model after sft_hh.py, on harmless-base: held-out accuracy 0.65 and DPO loss 0.66, as dpo_hh.py.
The chosen log-probs fall by 8.5 nats, under DPO by 9.0 (0.652, 0.656 and 8.5 of one seed at commit 53bdd18). With a larger eta they fall
less.
"""

from alignax import chain, default_config, dpo, logps
from alignax.losses import summed_sft


def get_config():
    """The config: one epoch over the pairs."""
    config = default_config()
    config.beta = 0.1
    config.eta = 0.005
    config.data.max_length = 160
    config.data.max_prompt_length = 64
    config.batch_size = 32
    config.optimizer.learning_rate = 2e-4
    config.eval.every = 100
    config.eval.samples = 4
    config.eval.sample_prompts = 64
    return config


def loss(config):
    """The loss in the paper's main form: the NLL of the chosen response is summed over its tokens."""
    return dpo(beta=config.beta) + config.eta * config.beta * summed_sft()


def experience(config, reference):
    """The experience: log-probs of the reference, which is the policy at the start of the run."""
    return chain(logps("ref_logps", reference, config.microbatches))
