"""How a run samples: the one place that makes generators, for rollouts, evaluations, `alignax generate` and the laboratory.

A policy at a temperature is a model of its own: its config has the temperature, so that whatever scores its samples scores them at
that temperature (`policy_config`). What else changes the distribution is `Sampling`, and then samples are not exact (`Completions.exact`).
"""

import dataclasses
from collections.abc import Sequence

from alignax.generate.generator import Generator, shape_for
from alignax.generate.sampling import Sampling
from alignax.generate.speakers import Speaker
from alignax.generate.stops import Stops
from alignax.models.transformer import ModelConfig


def policy_config(config: ModelConfig, temperature: float, unused: tuple[tuple[int, int], ...]) -> ModelConfig:
    """A policy as it is sampled and scored: at a temperature (of greedy samples, 0, at 1), without the tokens that its tokenizer has not.

    Args:
      config: the model.
      temperature: `rollout.temperature` or `eval.temperature`.
      unused: ranges of token ids, see `alignax.models.hf.with_vocabulary`.
    """
    return dataclasses.replace(config, unused_tokens=unused, temperature=temperature or 1.0)


def policy_sampling(temperature: float, top_p: float) -> Sampling:
    """How a policy is sampled whose `policy_config` has this temperature: exactly, unless it is 0 (greedy) or `top_p` below 1."""
    return Sampling(temperature=float(temperature > 0), top_p=top_p)


def sampler(
    speaker: Speaker,
    completions: int,
    longest: int,
    new: int,
    sampling: Sampling | None = None,
    *,
    ends: Sequence[int],
    stops: Stops | None = None,
    slots: int = 0,
) -> Generator:
    """The generator of a run, of so many completions.

    Args:
      speaker: what is sampled from: of a policy `speaker(policy_config(..), dtype, mesh=mesh)`.
      completions: in all, of all prompts.
      longest: tokens of the longest prompt.
      new: the most tokens of a completion.
      sampling: of a policy `policy_sampling(temperature, top_p)`; default: the speaker's own distribution.
      ends: tokens that end a completion, see `alignax.models.hf.end_ids`.
      stops: strings that do, see `stops_of`.
      slots: completions that are sampled side by side; 0: all, at most 64.

    Raises:
      ValueError: for what no generator can be.
    """
    shape = shape_for(completions, longest, new, mesh=speaker.mesh, slots=slots)
    return Generator(speaker, shape, sampling, stop_ids=ends, stops=stops)
