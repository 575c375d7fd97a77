"""What follows from a config: sizes and names that several of its fields, or none, say."""

from typing import Any

ROLLOUTS, PRETRAIN = "rollouts", "pretrain"  # the batches that losses of online training may be of, by name
DATA = "data"  # the batch of training that is not online
HEAD = "head"  # what `model.critic` is of a critic on the policy's trunk


def eval_batch_size(config: Any) -> int:
    """Examples of an evaluation batch."""
    return config.eval.batch_size or config.batch_size


def trunk_values(config: Any) -> int:
    """Values of a token that are read off the policy's own trunk."""
    return config.model.critic_heads if config.model.critic == HEAD else 0


def prompts_of_rollout(config: Any) -> int:
    """Prompts of a rollout: B."""
    return config.rollout.minibatches * config.batch_size


def steps_of_turn(config: Any) -> int:
    """Training steps between two rollouts; 1 where there are none."""
    return config.rollout.minibatches * config.rollout.epochs if config.rollout.samples else 1


def longest_answer(config: Any) -> int:
    """Tokens of the longest completion that an online run samples."""
    c = config.eval
    return max(config.rollout.max_new_tokens, c.max_new_tokens if max(c.samples, c.sample_prompts) else 0)
