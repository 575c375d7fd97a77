"""Checks of a run before any compute; each raises ValueError with the value and the remedy."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output, paths
from alignax.averages import PROPOSAL, Average, Turning
from alignax.config import HEAD, PRETRAIN, ROLLOUTS, Experiment, asked, check_path, eval_batch_size, flat, steps_of_turn
from alignax.config.blame import check_call, explained
from alignax.data import Examples
from alignax.generate.generator import check_room
from alignax.generate.speakers import WEIGHTS
from alignax.host import functions
from alignax.losses.algebra import Loss
from alignax.models import hf
from alignax.run.stored import OFF

LEAST = {
    "batch_size": 1, "microbatches": 1, "max_skipped": 1, "steps": 0, "checkpoint.every": 1, "checkpoint.keep": 1, "log.every": 1,
    "model.packing": -1, "model.logps_chunk": 1, "eval.every": 0, "eval.batch_size": 0, "eval.samples": 0, "eval.sample_prompts": 0,
    "eval.max_new_tokens": 1, "eval.samples_per_prompt": 1,
    "model.critic_heads": 1, "data.limit": 0, "seed": 0, "model.num_labels": 0, "ensemble.members": 0, "rollout.samples": 0,
    "rollout.max_new_tokens": 1, "rollout.minibatches": 1, "rollout.epochs": 1, "rollout.slots": 0,
    "rollout.reward_workers": 1, "rollout.refill": 0, "log.rollouts": 0, "log.profile": 0,
    "epochs": 0, "eval.temperature": 0, "optimizer.clip": 0, "optimizer.final": 0, "optimizer.weight_decay": 0,
    "optimizer.b1": 0, "optimizer.b2": 0, "optimizer.eps": 0,
}  # fmt: skip


def check_fields(config: Any) -> None:
    """Refuses config fields with impossible values."""
    fields = flat(config)
    for name, value in fields.items():
        check_path(name, value)
    for name, least in LEAST.items():
        if fields[name] < least:
            raise ValueError(f"config field {name!r} is {fields[name]}; it must be at least {least}")
    for name in ("optimizer.b1", "optimizer.b2"):
        if fields[name] >= 1:
            raise ValueError(f"config field {name!r} is {fields[name]}; it must be below 1")
    if config.rollout.mesh not in WEIGHTS:
        raise ValueError(f"rollout.mesh {config.rollout.mesh!r} is unknown; use {', '.join(WEIGHTS)}")
    for name in ("rollout.top_p", "eval.top_p"):
        if not 0 < fields[name] <= 1:
            raise ValueError(f"config field {name!r} is {fields[name]}; it must be above 0 and at most 1 (all tokens)")
    if not config.rollout.temperature > 0:
        raise ValueError(f"config field 'rollout.temperature' is {config.rollout.temperature}; it must be above 0, to sample from")
    if config.eval.temperature == 0 and config.eval.samples_per_prompt > 1:
        raise ValueError(
            f"eval.samples_per_prompt is {config.eval.samples_per_prompt}, but at eval.temperature 0 all samples of a prompt are the "
            "same; raise eval.temperature, or set eval.samples_per_prompt to 1"
        )
    beta, temperature = config.reference.jsd_beta, config.reference.jsd_temperature
    if not 0 <= beta <= 1:
        raise ValueError(f"reference.jsd_beta is {beta}; it must be the teacher's share of the mixture, in [0, 1] (0.5 is usual)")
    if not temperature > 0:
        raise ValueError(f"reference.jsd_temperature is {temperature}; it must be above 0 (1 is usual)")
    if config.model.critic.lower() in ("true", "false"):
        raise ValueError(
            f"model.critic {config.model.critic!r} is not a critic; use {HEAD!r} (on the policy's trunk), a folder, or leave it empty"
        )
    if config.model.critic_heads > 1 and not config.model.critic:
        raise ValueError(
            f"model.critic_heads is {config.model.critic_heads} and there is no critic; set model.critic to {HEAD!r} or a folder"
        )
    if config.model.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"model.dtype {config.model.dtype!r} is unknown; use auto, float32 or bfloat16")
    if config.optimizer.gradient_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"optimizer.gradient_dtype {config.optimizer.gradient_dtype!r} is unknown; use float32 or bfloat16")
    if config.export.dtype not in hf.DTYPES:
        raise ValueError(f"export.dtype {config.export.dtype!r} is unknown; use {', '.join(hf.DTYPES)}")
    best = config.checkpoint.best.removeprefix("-")
    if best and not (config.data.eval and config.eval.every):
        raise ValueError(f"checkpoint.best {best!r} needs evaluations; set data.eval and eval.every")


def check_profile(config: Any, steps: int) -> None:
    """Refuses to trace more steps than there are after the first turn."""
    turn = steps_of_turn(config)
    if config.log.profile > max(steps - turn, 0):
        first = "step, which compiles" if turn == 1 else f"{turn} steps, which compile"
        raise ValueError(
            f"log.profile is {config.log.profile}, and only {max(steps - turn, 0)} of {steps} steps follow the first {first}; lower it, or "
            "raise steps"
        )


def check_head(config: Any, source: hf.Source, experiment: Experiment) -> None:
    """Refuses settings that a reward model cannot have: sampling, a critic, a reference without log-probs, a missing output layer."""
    if not source.config.num_labels:
        if config.model.language_head:
            raise ValueError(
                "model.language_head keeps the output layer of a reward model, but this model is a language model; set "
                "model.language_head to false"
            )
        return
    if samples := config.rollout.samples:
        raise ValueError(f"rollout.samples is {samples}, and a reward model gives scores and no text; train a language model")
    if config.model.language_head and source.stored.num_labels and not source.config.tie_word_embeddings:
        raise ValueError(
            f"model.language_head is true, but the reward model in {str(source.path)!r} has no output layer; start from its language "
            "model, or set model.language_head to false"
        )
    if not (config.model.language_head or config.reference.path) and "reference" in asked(experiment.experience):
        raise ValueError(
            f"experience() of {experiment.file} asks for reference, but the reward model that the run starts from gives no log-probs; set "
            "model.language_head=true, name a language model in reference.path, or do not ask for reference"
        )
    if config.model.critic:
        raise ValueError("model.critic gives values to a language model, but this model is a reward model; leave model.critic empty")
    if max(config.eval.samples, config.eval.sample_prompts):
        raise ValueError("a reward model gives scores and no text; set eval.samples and eval.sample_prompts to 0")
    for name, function in (("gold", experiment.gold), ("metrics", experiment.metrics), ("speaker", experiment.speaker)):
        if function is not None:
            raise ValueError(f"{name}() of {experiment.file} is for text, which a reward model does not give; remove it")


def check_members(config: Any, mesh: Mesh) -> None:
    """Refuses ensemble settings without members, members of language models, and members that the mesh does not divide."""
    members, axis = config.ensemble.members, mesh.shape["member"]
    if not members and (axis > 1 or config.ensemble.bootstrap or config.ensemble.own_noise):
        raise ValueError(f"mesh.member is {axis} and ensemble.members is 0; set ensemble.members, or leave bootstrap and own_noise out")
    if members and not config.model.num_labels:
        raise ValueError(f"ensemble.members is {members}, and only reward models have members; set model.num_labels to 1")
    if members % axis:
        raise ValueError(f"ensemble.members {members} does not divide over mesh.member {axis}; use a multiple of {axis}")


def check_rollout(config: Any, readers: Sequence[hf.Source], experiment: Experiment, examples: dict[str, Examples]) -> None:
    """Refuses online training with impossible settings, reward functions or lengths, and prompts or rewards in offline training.

    `readers` are the models that read samples, the policy first.
    """
    c = config.rollout
    functions.check(experiment, examples)
    if not c.samples:
        if c.ahead:
            raise ValueError("rollout.ahead is true, and rollout.samples is 0: there are no rollouts to sample ahead; set it to false")
        if c.int8:
            raise ValueError(
                "rollout.int8 is true, and rollout.samples is 0: there are no rollouts, and evaluations sample from the policy's own "
                "weights; set it to false"
            )
        if config.data.kind == "prompt":
            raise ValueError(
                "data of kind 'prompt' has no completions; set rollout.samples, the completions that are sampled of each prompt"
            )
        for name, function in (("reward", experiment.reward), ("sampler", experiment.sampler)):
            if function is not None:
                raise ValueError(f"{name}() of {experiment.file} is for samples, but rollout.samples is 0; set it, for example to 8")
        return
    if c.bad_rewards not in ("error", "drop"):
        raise ValueError(f"rollout.bad_rewards is {c.bad_rewards!r}; use 'error' or 'drop'")
    if c.refill and (c.ahead or c.samples < 2 or "rewards" not in functions.reward_fields(experiment)):
        raise ValueError(
            f"rollout.refill is {c.refill}: it uses the rewards of groups before the step, so it needs reward(..) in {experiment.file} "
            "(with rollout.reward_weights if reward(..) gives several numbers), rollout.samples of 2 or more, and rollout.ahead=false"
        )
    if not c.timeout > 0:
        raise ValueError(f"rollout.timeout is {c.timeout}; it must be a number of seconds above 0")
    if c.temperature != 1 and config.data.pretrain:
        raise ValueError(
            f"rollout.temperature is {c.temperature}, but data.pretrain is learnt at 1; set rollout.temperature to 1, or leave "
            "data.pretrain empty"
        )
    if config.reference.cache not in ("", OFF):
        raise ValueError(
            "reference.cache holds log-probs of the data's own rows, but online training scores samples; leave reference.cache empty"
        )
    longest = max(int(e.prompt_lengths.max()) for e in examples.values())
    for model in readers:
        check_room(model.config, longest, c.max_new_tokens, "rollout.max_new_tokens")


def check_moments(experiment: Experiment) -> None:
    """Refuses `optimizer.moments` for an optimizer that the experiment makes itself."""
    moments = experiment.config.optimizer.moments
    if experiment.optimizer is not None and moments != "float32":
        raise ValueError(
            f"optimizer.moments is {moments!r}, and optimizer() of {experiment.file} makes its own; let it return "
            f"alignax.moments.compact(optimizer, {moments!r}), and leave optimizer.moments at float32"
        )


def check_token_kl(source: hf.Source, reference: hf.Source | None) -> None:
    """Refuses `reference.token_kl` without a reference, or with one whose head differs from the policy's."""
    if reference is None:
        raise ValueError("reference.token_kl is true, but the run has no reference; let experience(..) ask for reference")
    caps = [s.config.final_logit_softcapping for s in (source, reference)]
    if caps[0] != caps[1]:
        raise ValueError(
            f"reference.token_kl needs one final_logit_softcapping, but policy and reference have {caps}; set reference.token_kl to false"
        )
    policy, own = (s.config.predicted_tokens or s.config.vocab_size for s in (source, reference))
    if policy != own:
        raise ValueError(
            "reference.token_kl needs a reference with a probability for every token of the policy, but the policy predicts "
            f"{policy} tokens and the reference {own}; add the same tokens to both"
        )


def check_cache(config: Any, averages: dict[str, Average], reference: Any) -> None:
    """Refuses `reference.cache` without a reference, with a moving reference, and with token_kl."""
    if config.reference.cache in ("", OFF):
        return
    where = f"reference.cache {config.reference.cache!r}"
    place = paths.of(config.reference.cache)
    if place.is_file():
        raise ValueError(f"{where} is a file; give a folder")
    if paths.remote(place) and (why := output.closed(place / "part")):
        raise ValueError(f"{where} cannot be written: {why}")
    if reference is None:
        raise ValueError(
            f"{where} is set, but the run has no reference; let experience(..) ask for reference, or leave reference.cache empty"
        )
    if "reference" in averages:
        raise ValueError(f"{where} would become outdated: the average 'reference' moves; leave reference.cache empty")
    if config.reference.token_kl:
        raise ValueError(f"{where} holds no distributions, which reference.token_kl needs; leave one of them out")


def check_averages(config: Any, averages: dict[str, Average], reference: Any, frozen: Sequence[str]) -> None:
    """Refuses averages with impossible names or rules, and config fields that name an average that does not exist.

    `frozen` are the models that reward functions and the speaker ask for; they stand still.
    """
    for name, rule in averages.items():
        check_call(rule, f"the average {name!r}", "average", "params", "step")
    known = ["policy", *(name for name in averages if name != "reference")]
    for field, name in (("eval.params", config.eval.params), ("export.params", config.export.params)):
        if name not in known:
            raise ValueError(f"config field {field!r} is {name!r}; this experiment has {', '.join(known)}")
    if "reference" in averages and config.reference.token_kl:
        raise ValueError("reference.token_kl needs a fixed reference; remove the average 'reference', or set reference.token_kl to false")
    if PROPOSAL in averages and config.rollout.ahead:
        raise ValueError(
            f"rollout.ahead samples from the policy, but the average {PROPOSAL!r} is meant for sampling; leave one of them out"
        )
    if "policy" in averages or ("reference" in averages and reference is None):
        raise ValueError(
            'an average is called "policy", or is called "reference" while experience(..) asks for no reference; rename or remove it'
        )
    if "reference" in averages and config.reference.path and (config.reference.path != config.model.path):
        raise ValueError(
            f"a moving reference starts from the policy, not from reference.path {config.reference.path!r}; leave reference.path empty"
        )
    if "reference" in averages and "reference" in frozen:
        raise ValueError(
            "reward(..), gold(..), metrics(..) or speaker(..) ask for reference, but the average 'reference' changes it during "
            "training; let experience(..) ask for it, or give the functions a fixed model under another name: models.initial.path"
        )
    turn = steps_of_turn(config)
    for name, rule in averages.items():
        if isinstance(rule, Turning) and rule.every % turn:  # the rest of the rollout would come from the old policy
            raise ValueError(
                f"the average {name!r} changes models every {rule.every} steps, in the middle of a rollout of {turn} steps; use a "
                f"multiple of {turn}"
            )
    if PROPOSAL in averages and not config.rollout.samples:
        raise ValueError(
            f"the average {PROPOSAL!r} samples rollouts, but rollout.samples is 0; set rollout.samples, or give the average another name"
        )


def check_objective(objective: Any, file: Path) -> None:
    """Refuses an objective that is no Loss, no function from the step to a Loss, and no mapping of names to these."""
    if isinstance(objective, Mapping):
        for own in objective.values():
            check_objective(own, file)
        return
    cause = ""
    if callable(objective) and not isinstance(objective, Loss):
        try:
            objective = objective(jnp.zeros((), jnp.int32))
        except Exception as e:
            cause = f" (called with a step: {explained(e, file)})"
    if not isinstance(objective, Loss):
        raise ValueError(
            f"loss(config) of {file} returns {objective!r}{cause}; return a loss, for example dpo(), or a function from the step to a loss"
        )


def check_pretrain(config: Any, objective: Any, file: Path, combined: bool = False) -> None:
    """Refuses named losses with unknown names, without rollouts or without pretraining data, and pretraining data without a loss.

    With `combined`, the experiment combines the gradients of its losses; they may then have any names, and share a batch.
    """
    names, example = (ROLLOUTS, PRETRAIN), f'{{"{ROLLOUTS}": ppo(), "{PRETRAIN}": 0.1 * sft()}}'
    if combined:
        return check_combined(config, objective, file)
    if not isinstance(objective, Mapping):
        if config.data.pretrain:
            raise ValueError(f"data.pretrain is set, but loss(config) of {file} has no loss for it; return for example {example}")
        return
    for name in objective:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.0)[0]
            raise ValueError(
                f"loss(config) of {file} names a loss {name!r}; the nearest name is {near!r}, and other names need combine(gradients)"
            )
    if absent := [name for name in names if name not in objective]:
        raise ValueError(f"loss(config) of {file} names no loss {absent[0]!r}; return for example {example}, or only the other loss")
    if not config.rollout.samples:
        raise ValueError(f"loss(config) of {file} has a loss of rollouts, but rollout.samples is 0; set it, for example to 8")
    if not config.data.pretrain:
        raise ValueError(
            f"loss(config) of {file} has a loss called {PRETRAIN!r}, but data.pretrain is empty; set --config.data.pretrain=FILE"
        )


def check_combined(config: Any, objective: Any, file: Path) -> None:
    """Refuses combined gradients of a single loss, of losses with bad names, and of pretraining without its data or rollouts."""
    example = '{"helpful": dpo(), "brief": 0.1 * sft()}'
    if not isinstance(objective, Mapping) or len(objective) < 2:
        raise ValueError(
            f"combine() of {file} takes gradients of several losses, but loss(config) returns one; return for example {example}"
        )
    if odd := [name for name in objective if not isinstance(name, str) or not name]:
        raise ValueError(f"loss(config) of {file} names a loss {odd[0]!r}; a name must be text, as in {example}")
    if (PRETRAIN in objective) != bool(config.rollout.samples and config.data.pretrain):
        raise ValueError(
            f"loss(config) of {file} names the losses {', '.join(objective)}: the name {PRETRAIN!r} is for data.pretrain in addition to "
            f"rollouts, but data.pretrain is {config.data.pretrain!r} and rollout.samples is {config.rollout.samples}; set both, or "
            "choose another name"
        )


def check_batches(config: Any, mesh: Mesh) -> None:
    """Refuses batch sizes that do not divide into batch shards and microbatches."""
    shards = meshes.batch_shards(mesh)
    parts = shards * config.microbatches
    for name, size in (("batch_size", config.batch_size), ("eval.batch_size", eval_batch_size(config))):
        if size % parts:
            raise ValueError(
                f"{name} {size} does not divide into {parts} parts ({shards} batch shards x {config.microbatches} microbatches); "
                f"use a multiple of {parts}"
            )


def check_positions(config: Any, source: hf.Source, examples: dict[str, Examples], every: dict[str, Examples]) -> None:
    """Refuses rows of `every` split, and samples for prompts of `examples`, longer than the model's positions; padding does not count."""
    most = source.config.max_position_embeddings
    longest = max(int(e.lengths.max()) for e in every.values())
    if longest > most and dict(source.config.rope_scaling).get("rope_type") != "dynamic":
        raise ValueError(f"rows of {longest} tokens exceed the {most} positions of {str(source.path)!r}; lower data.max_length")
    prompt = max(int(e.prompt_lengths.max()) for e in examples.values())
    if max(config.eval.samples, config.eval.sample_prompts):
        check_room(source.config, prompt, config.eval.max_new_tokens, "eval.max_new_tokens")


def check_judged(source: hf.Source, examples: list[Examples]) -> None:
    """Refuses rows of data longer than the positions of a reward model that reads the policy's tokens."""
    most, longest = source.config.max_position_embeddings, max(int(e.lengths.max()) for e in examples)
    if longest > most and dict(source.config.rope_scaling).get("rope_type") != "dynamic":
        raise ValueError(
            f"rows of {longest} tokens exceed the {most} positions of the reward model {str(source.path)!r}; lower data.max_length"
        )
