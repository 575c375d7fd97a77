"""The generators of a run, which sample its rollouts and its evaluations."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from alignax.config import Experiment, asked, prompts_of_rollout
from alignax.config.blame import blaming
from alignax.data import Examples
from alignax.generate import Generator, Speaker, policy_config, policy_sampling, sampler, speaker, stops_of
from alignax.models.reward import CRITIC
from alignax.run.opening import Vocabulary
from alignax.run.roles import POLICY, Roles, whole
from alignax.text import short
from alignax.types import Params

ROLLOUT, EVALUATION = "rollout", "eval"  # the generators by name, which are also the sections of the config


def make_samplers(
    experiment: Experiment, roles: Roles, words: Vocabulary, mesh: Mesh, train: Examples, evaluated: Examples
) -> dict[str, Generator]:
    """The generators of a run by name: "rollout" if the run is online, "eval" if its evaluations sample.

    Args:
      experiment: the experiment of the run.
      roles: the models of the run.
      words: the policy's vocabulary.
      mesh: the mesh of the models' parameters.
      train: the data with the prompts of rollouts.
      evaluated: the data with the prompts of evaluations.

    Raises:
      ValueError: for lengths, token ids or options that no generator can have, and for a `speaker(..)` that no run can sample from.
    """
    config, out = experiment.config, {}
    if config.rollout.samples:
        c = config.rollout
        count, longest = prompts_of_rollout(config) * c.samples, int(train.prompt_lengths.max())
        out[ROLLOUT] = sampler(
            make_speaker(experiment, roles, words, mesh, c.temperature),
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
            make_speaker(experiment, roles, words, mesh, c.temperature),
            len(rows) * c.samples_per_prompt,
            max(len(evaluated.prompt_tokens(i)) for i in rows),
            c.max_new_tokens,
            policy_sampling(c.temperature, c.top_p),
            ends=words.ends,
            stops=stops_of(words.tokenizer, c.stop),
        )
    return out


def make_speaker(experiment: Experiment, roles: Roles, words: Vocabulary, mesh: Mesh, temperature: float) -> Speaker:
    """The speaker that a sampler reads: the policy at a temperature, or what `speaker(..)` of the experiment makes of such models.

    It is exact only if its distribution is the policy's own.

    Raises:
      ValueError: for a model that predicts no token, and for what is no speaker of models that the run holds.
    """

    def of(name: str) -> Speaker:
        role = roles[name]
        if role.members:
            raise ValueError(f"speaker() of {file} asks for {name!r}, a reward model, which predicts no token; give it a language model")
        return speaker(policy_config(role.config, temperature, words.unused), role.dtype, mesh=mesh, name=name)

    file, make, policy = experiment.file, experiment.speaker, of(POLICY)
    if make is None:
        return policy
    given = {name: experiment.config if name == "config" else of(name) for name in asked(make)}
    with blaming(file):
        made = make(**given)
    if not isinstance(made, Speaker):
        raise ValueError(f"speaker() of {file} returns {short(made)}; return a Speaker, combined([policy, ..], [1.0, ..]) say")
    known = [name for name in given if name != "config"]
    if odd := [name for name in jax.tree.leaves(made.names) if name not in known]:
        raise ValueError(
            f"speaker() of {file} returns a speaker with parameters of {odd[0]!r}, and it is given {', '.join(known) or 'no model'}; make "
            "it of the speakers that are its arguments"
        )
    if (made.vocab_size, made.mesh) != (policy.vocab_size, mesh):
        raise ValueError(
            f"speaker() of {file} returns a speaker of {made.vocab_size} tokens, the policy has {policy.vocab_size}; they must share "
            "the vocabulary and the mesh"
        )
    return made._replace(exact=made.exact and made.names == POLICY)


def speaker_params(speaker: Speaker, roles: Roles, held: Mapping[str, Params], params: Params) -> Any:
    """The parameters of a speaker, from the trained parameters `params` of the policy and the frozen trees of the run."""
    trunk = {name: x for name, x in whole(roles, held, params).items() if name != CRITIC}
    return jax.tree.map(lambda name: trunk if name == POLICY else held[roles[name].tree], speaker.names)


def sampled_rows(config: Any, evaluated: Examples) -> range:
    """The first rows of the evaluation data, for whose prompts evaluations sample completions."""
    return range(min(max(config.eval.samples, config.eval.sample_prompts), len(evaluated)))
