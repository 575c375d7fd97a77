"""The generators of a run, which sample its rollouts and its evaluations."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output, paths
from alignax.config import Experiment, asked, prompts_of_rollout
from alignax.config.blame import blaming, check_call
from alignax.data import Examples
from alignax.distributed import is_main, together
from alignax.generate import Generator, Shape, Speaker, policy_config, policy_sampling, sampler, speaker, stops_of
from alignax.generate.generator import lies
from alignax.models import hf, lora
from alignax.models.layout import leaf_name
from alignax.models.lora import MATRICES
from alignax.models.reward import CRITIC
from alignax.run.external import External
from alignax.run.opening import Vocabulary
from alignax.run.roles import POLICY, Roles, abstract_frozen, abstract_trained, whole
from alignax.text import short
from alignax.types import Params

ROLLOUT, EVALUATION = "rollout", "eval"  # the generators by name, which are also the sections of the config


def make_samplers(
    experiment: Experiment,
    roles: Roles,
    words: Vocabulary,
    mesh: Mesh,
    train: Examples,
    evaluated: Examples,
    held: Callable[[], int] = lambda: 0,
) -> dict[str, Generator | External]:
    """The generators of a run by name: "rollout" if the run is online, "eval" if its evaluations sample.

    Rollouts are sampled by what `sampler(..)` of the experiment returns, if the experiment has it.

    Args:
      experiment: the experiment of the run.
      roles: the models of the run.
      words: the policy's vocabulary.
      mesh: the mesh of the models' parameters.
      train: the data with the prompts of rollouts.
      evaluated: the data with the prompts of evaluations.
      held: gives the bytes of a device that the run's own arrays take.

    Raises:
      ValueError: for lengths, token ids or options that no generator can have, and for a `speaker(..)` or `sampler(..)` that no run can
        sample from.
    """
    config = experiment.config
    out: dict[str, Generator | External] = {}
    free = lambda own: meshes.device_memory(mesh) - held() - meshes.device_bytes(laid_out(own, roles, mesh))
    if config.rollout.samples:
        c = config.rollout
        count, longest = prompts_of_rollout(config) * c.samples, int(train.prompt_lengths.max())
        if experiment.sampler is not None:
            out[ROLLOUT] = make_external(experiment, roles, words, mesh, Shape(longest, c.max_new_tokens, count, count, 1))
        else:
            own = make_speaker(experiment, roles, words, mesh, c.temperature, c.int8)
            out[ROLLOUT] = sampler(
                own,
                count,
                longest,
                c.max_new_tokens,
                policy_sampling(c.temperature, c.top_p),
                ends=words.ends,
                stops=stops_of(words.tokenizer, c.stop),
                slots=c.slots,
                free=free(own),
            )
    if rows := sampled_rows(config, evaluated):
        c = config.eval
        own = make_speaker(experiment, roles, words, mesh, c.temperature)
        out[EVALUATION] = sampler(
            own,
            len(rows) * c.samples_per_prompt,
            max(len(evaluated.prompt_tokens(i)) for i in rows),
            c.max_new_tokens,
            policy_sampling(c.temperature, c.top_p),
            ends=words.ends,
            stops=stops_of(words.tokenizer, c.stop),
            free=free(own),
        )
    return out


def make_external(experiment: Experiment, roles: Roles, words: Vocabulary, mesh: Mesh, shape: Shape) -> External:
    """The sampler of rollouts that `sampler(..)` of the experiment makes; calls that function, and not yet what it returns.

    Raises:
      ValueError: for fields that only our own sampler reads, and for what cannot be called with (params, prompts, key, n).
    """
    c, file, make = experiment.config.rollout, experiment.file, experiment.sampler
    assert make is not None
    for name, default in (("int8", False), ("slots", 0)):
        if c[name] != default:
            raise ValueError(
                f"rollout.{name} is {c[name]}, and sampler() of {file} samples the rollouts in place of our own sampler; leave "
                f"rollout.{name}={default}, and set up what samples"
            )
    given = {"config": experiment.config, "tokenizer": words.tokenizer, "ends": words.ends, "save": saving(roles, words, mesh, file)}
    with blaming(file):
        made = make(**{name: given[name] for name in asked(make)})
    check_call(made, f"what sampler() of {file} returns", "params", "prompts", "key", "n")
    policy = make_speaker(experiment._replace(speaker=None), roles, words, mesh, c.temperature)._replace(exact=False)
    stops, ends = stops_of(words.tokenizer, c.stop), frozenset(words.ends)
    return External(file, made, policy, shape, policy_sampling(c.temperature, c.top_p), stops, ends, words.unused)


def saving(roles: Roles, words: Vocabulary, mesh: Mesh, file: Path) -> Callable[..., None]:
    """The function `save(params, folder, dtype="float32")` that `sampler(..)` of the experiment `file` may ask for."""
    source, spec = roles[POLICY].source, roles[POLICY].lora
    merge = jax.jit(functools.partial(lora.merge, spec), donate_argnums=0) if spec is not None else None  # compiled once
    origin, claimed = f"the sampler of {file.name}", set()

    def save(params: Params, folder: str | os.PathLike, dtype: str = "float32") -> None:
        """Writes the policy that `params` are to a Hugging Face folder, with adapters merged; every process calls it, process 0 writes."""
        place = paths.of(folder)
        if place not in claimed:  # reading the files of an earlier folder again before each rollout would take long
            with together():
                if is_main():
                    output.claim(place, origin, remedy="choose another folder")
            claimed.add(place)
        whole = params if merge is None else merge(hf.load_params(source, mesh), lora.split(params)[1])
        hf.export(whole, source, place, dtype, eos=words.tokenizer.eos_token_id, origin=origin)

    return save


def make_speaker(experiment: Experiment, roles: Roles, words: Vocabulary, mesh: Mesh, temperature: float, int8: bool = False) -> Speaker:
    """The speaker that a sampler reads: the policy at a temperature, or what `speaker(..)` of the experiment makes of such models.

    It is exact only if its distribution is the policy's own. With `int8` all models are sampled from in int8.

    Raises:
      ValueError: for a model that predicts no token, and for what is no speaker of models that the run holds.
    """

    def of(name: str) -> Speaker:
        role = roles[name]
        if role.members:
            raise ValueError(f"speaker() of {file} asks for {name!r}, a reward model, which predicts no token; give it a language model")
        config, layout = policy_config(role.config, temperature, words.unused), experiment.config.rollout.mesh
        return speaker(config, role.dtype, mesh=mesh, name=name, weights=layout, int8=int8)

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
    trunk = lambda: {name: x for name, x in whole(roles, held, params).items() if name != CRITIC}
    return jax.tree.map(lambda name: trunk() if name == POLICY else held[roles[name].tree], speaker.names)


def laid_out(speaker: Speaker, roles: Roles, mesh: Mesh) -> Any:
    """The copy of a speaker's weights that is laid out for decoding, as shapes; () if they lie as they are trained."""
    params = speaker_params(speaker, roles, abstract_frozen(roles, mesh), abstract_trained(roles, mesh))
    laid = speaker.laid(params)
    return () if lies(params, laid) else laid


def told(name: str, generator: Generator | External, roles: Roles, mesh: Mesh) -> str:
    """How a sampler of a run computes, in words."""
    if isinstance(generator, External):
        return f"{name}: {generator.shape.slots} completions are sampled by sampler() of {generator.file}, outside of alignax"
    rows, laid = f"{name}: {generator.shape.slots} completions are sampled side by side", laid_out(generator.speaker, roles, mesh)
    if not laid:
        return rows
    leaves = {leaf_name(path).rpartition(".")[2]: x for path, x in jax.tree_util.tree_leaves_with_path(laid)}
    whole = [name for name, x in leaves.items() if name in MATRICES and x.sharding.is_fully_replicated]
    parts = len(whole) < sum(name in MATRICES for name in leaves)
    where = "in parts" + (f" (but {', '.join(whole)} whole, which its parts do not divide)" if whole else "") if parts else "whole"
    dtypes = " and ".join(dict.fromkeys(str(x.dtype) for name, x in leaves.items() if name in MATRICES))
    return f"{rows}, from a copy of the weights in {dtypes}, {where}, with {meshes.device_bytes(laid) / 1e9:.3f} GB on each device"


def sampled_rows(config: Any, evaluated: Examples) -> range:
    """The first rows of the evaluation data, for whose prompts evaluations sample completions."""
    return range(min(max(config.eval.samples, config.eval.sample_prompts), len(evaluated)))
