"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) on Anthropic HH (Bai et al. 2022, arXiv:2204.05862).

Command, after sft_hh.py:
  alignax train --config experiments/dpo_hh.py --config.workdir=runs/dpo_hh \\
    --config.model.path=runs/sft_hh/export --config.data.train=HH/train.jsonl --config.data.eval=HH/dev.jsonl

Hardware: any. The defaults suit a model of a few hundred thousand parameters on 2 CPU cores; for one of billions set
learning_rate 5e-7, max_length 2048, and the mesh.

Expected, with the 260k-parameter stories model after sft_hh.py, on harmless-base: held-out accuracy at least 0.60, loss at most 0.68,
margin 0.2 to 0.6. One seed at commit cc1d45d gave 0.649, 0.658 and 0.43, with the chosen log-probs 9.0 nats lower. A learning rate of
1e-3 is too high: the loss ends above ln 2. A policy trained only on harmless pairs ranks helpful pairs worse than chance.
"""

from alignax import chain, default_config, dpo, logps


def get_config():
    """The config: one epoch over the pairs."""
    config = default_config()
    config.beta = 0.1
    config.data.max_length = 160
    config.data.max_prompt_length = 64
    config.batch_size = 32
    config.optimizer.learning_rate = 2e-4
    config.eval.every = 100
    config.eval.samples = 4
    config.eval.sample_prompts = 64
    return config


def loss(config):
    """The loss of the paper, eq. 7."""
    return dpo(beta=config.beta)


def experience(config, reference):
    """The experience: log-probs of the reference, which is the policy at the start of the run."""
    return chain(logps("ref_logps", reference, config.microbatches))
