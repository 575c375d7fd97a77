"""How a run samples: the generators of its rollouts and of its evaluations, in one place."""

from typing import Any

from jax.sharding import Mesh

from alignax.config import prompts_of_rollout
from alignax.data import Examples
from alignax.generate import Generator, policy_config, policy_sampling, sampler, speaker, stops_of
from alignax.run.opening import Vocabulary
from alignax.run.roles import Role

ROLLOUT, EVALUATION = "rollout", "eval"  # the generators by name, which are also the sections of the config


def make_samplers(config: Any, policy: Role, words: Vocabulary, mesh: Mesh, train: Examples, evaluated: Examples) -> dict[str, Generator]:
    """The generators of a run by name: "rollout" of an online run, "eval" where evaluations sample.

    Args:
      config: the run's.
      policy: its role.
      words: its vocabulary.
      mesh: of its parameters.
      train: the data that rollouts are of.
      evaluated: the data that evaluations sample of.

    Raises:
      ValueError: for what no generator can be.
    """
    out: dict[str, Generator] = {}
    if config.rollout.samples:
        c = config.rollout
        count, longest = prompts_of_rollout(config) * c.samples, int(train.prompt_lengths.max())
        out[ROLLOUT] = sampler(
            speaker(policy.config, policy.dtype, mesh=mesh),
            count,
            longest,
            c.max_new_tokens,
            policy_sampling(c.temperature, c.top_p),
            ends=words.ends,
            stops=stops_of(words.tokenizer, c.stop),
            slots=c.slots,
        )
    if rows := sampled_rows(config, evaluated):
        c = config.eval
        out[EVALUATION] = sampler(
            speaker(policy_config(policy.config, c.temperature, words.unused), policy.dtype, mesh=mesh),
            len(rows) * c.samples_per_prompt,
            max(len(evaluated.prompt_tokens(i)) for i in rows),
            c.max_new_tokens,
            policy_sampling(c.temperature, c.top_p),
            ends=words.ends,
            stops=stops_of(words.tokenizer, c.stop),
        )
    return out


def sampled_rows(config: Any, evaluated: Examples) -> range:
    """The rows of the evaluation data whose prompts are sampled; the first ones."""
    return range(min(max(config.eval.samples, config.eval.sample_prompts), len(evaluated)))
