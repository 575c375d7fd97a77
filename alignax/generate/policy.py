"""The generators of policies, for rollouts, evaluations, `alignax generate` and the laboratory.

A policy at a temperature is a model of its own: the temperature is in its config (`policy_config`), so its samples are scored at that
temperature, too. All other changes of the distribution are in `Sampling`; samples with such changes are not exact (`Completions.exact`).
"""

import dataclasses
from collections.abc import Sequence

from alignax.generate.generator import Generator, room_for, shape_for
from alignax.generate.sampling import Sampling
from alignax.generate.speakers import Speaker
from alignax.generate.stops import Stops
from alignax.models.transformer import ModelConfig


def policy_config(config: ModelConfig, temperature: float, unused: tuple[tuple[int, int], ...]) -> ModelConfig:
    """The config of a policy for sampling and scoring: at a temperature, without the tokens that its tokenizer lacks.

    Args:
      config: the config of the model.
      temperature: `rollout.temperature` or `eval.temperature`; 0, which is greedy, scores at 1.
      unused: ranges of token ids, see `alignax.models.hf.with_vocabulary`.
    """
    return dataclasses.replace(config, unused_tokens=unused, temperature=temperature or 1.0)


def policy_sampling(temperature: float, top_p: float) -> Sampling:
    """The sampling of a policy whose `policy_config` has this temperature: exact, unless it is 0 (greedy) or `top_p` is below 1."""
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
    free: int | None = None,
) -> Generator:
    """A generator with a shape that fits the given number and lengths of completions.

    Args:
      speaker: the speaker to sample from; for a policy, `speaker(policy_config(..), dtype, mesh=mesh)`.
      completions: number of completions of all prompts.
      longest: tokens of the longest prompt.
      new: the largest number of tokens in a completion.
      sampling: for a policy, `policy_sampling(temperature, top_p)`; default: the speaker's own distribution.
      ends: ids of tokens that end a completion, see `alignax.models.hf.end_ids`.
      stops: strings that end a completion, see `stops_of`.
      slots: completions that are decoded side by side; 0: all, as far as memory allows, see `room_for`.
      free: bytes of a device that are free for these completions and for computing; None: three quarters of its memory.

    Raises:
      ValueError: for sizes, stop ids or lengths that no generator of the speaker can have.
    """
    room = slots or room_for(speaker, longest + new, free)
    shape = shape_for(completions, longest, new, mesh=speaker.mesh, slots=slots, room=room)
    return Generator(speaker, shape, sampling, stop_ids=ends, stops=stops)
