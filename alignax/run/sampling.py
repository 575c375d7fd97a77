"""The generators of a run, which sample its rollouts and its evaluations."""

from typing import Any

from jax.sharding import Mesh

from alignax.config import prompts_of_rollout
from alignax.data import Examples
from alignax.generate import Generator, policy_config, policy_sampling, sampler, speaker, stops_of
from alignax.run.opening import Vocabulary
from alignax.run.roles import Role

ROLLOUT, EVALUATION = "rollout", "eval"  # the generators by name, which are also the sections of the config


def make_samplers(config: Any, policy: Role, words: Vocabulary, mesh: Mesh, train: Examples, evaluated: Examples) -> dict[str, Generator]:
    """The generators of a run by name: "rollout" if the run is online, "eval" if its evaluations sample.

    Args:
      config: the config of the run.
      policy: the role of the policy.
      words: the policy's vocabulary.
      mesh: the mesh of the policy's parameters.
      train: the data with the prompts of rollouts.
      evaluated: the data with the prompts of evaluations.

    Raises:
      ValueError: for lengths, token ids or options that no generator can have.
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
    """The first rows of the evaluation data, for whose prompts evaluations sample completions."""
    return range(min(max(config.eval.samples, config.eval.sample_prompts), len(evaluated)))
