"""Sizes and names that follow from several fields of a config, or from none."""

from typing import Any

ROLLOUTS, PRETRAIN = "rollouts", "pretrain"  # the batches of online training; a loss is of one of them
DATA = "data"  # the batch of offline training
HEAD = "head"  # value of `model.critic` for a critic on the policy's trunk


def eval_batch_size(config: Any) -> int:
    """The number of examples in an evaluation batch."""
    return config.eval.batch_size or config.batch_size


def trunk_values(config: Any) -> int:
    """The number of values per token that a critic reads from the policy's own trunk; 0 without such a critic."""
    return config.model.critic_heads if config.model.critic == HEAD else 0


def prompts_of_rollout(config: Any) -> int:
    """The number of prompts in a rollout."""
    return config.rollout.minibatches * config.batch_size


def steps_of_turn(config: Any) -> int:
    """The number of training steps between two rollouts; 1 in offline training."""
    return config.rollout.minibatches * config.rollout.epochs if config.rollout.samples else 1


def longest_answer(config: Any) -> int:
    """The longest completion that an online run samples, in tokens, evaluation included."""
    c = config.eval
    return max(config.rollout.max_new_tokens, c.max_new_tokens if max(c.samples, c.sample_prompts) else 0)
