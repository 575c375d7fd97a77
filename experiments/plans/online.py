"""GRPO and PPO as experiments to plan, see llamas.py: a rule rewards the rollouts, so no reward model is needed.

Command: alignax plan --config experiments/plans/online.py --config.method=grpo --topology v5e:4x4 and the fields of llamas.py.

GRPO: Shao et al. 2024, arXiv:2402.03300.  PPO: Schulman et al. 2017, arXiv:1707.06347.  Hardware: as the plan says.
"""

from alignax import default_config, group_relative, grpo, ppo
from alignax.experience import chain, gae, kl_reward, logps, whiten_advantages
from alignax.losses import kl_k3, value_loss


def get_config():
    """The config: eight responses to each prompt."""
    config = default_config()
    config.method = "grpo"  # or "ppo", with model.critic=head
    config.data.kind = "prompt"
    config.rollout.samples = 8
    return config


def loss(config):
    """The loss: the policy's, with the distance from the reference or the critic's error."""
    return grpo() + 0.04 * kl_k3() if config.method == "grpo" else ppo() + 0.1 * value_loss()


def experience(config, reference):
    """The experience: the reference's log-probs, and the advantages."""
    known = logps("ref_logps", reference, config.microbatches)
    return chain(known, group_relative()) if config.method == "grpo" else chain(known, kl_reward(0.05), gae(), whiten_advantages())


def reward(prompts, completions):
    """The rewards: the number of characters."""
    return [float(len(text)) for text in completions]
