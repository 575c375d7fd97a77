"""The summary of a run that is printed before it starts: models, data and number of steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from alignax import mesh as meshes
from alignax.losses.algebra import by_name
from alignax.losses.responses import differing
from alignax.models import parameters
from alignax.models.reward import CRITIC
from alignax.run.prepare import Run, real_share
from alignax.run.roles import BASE, REFERENCE, abstract, abstract_trained, kernel
from alignax.run.sampling import told
from alignax.types import Params


def parameter_count(tree: Params) -> int:
    """The number of parameters of a tree, which may be abstract."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def sizes(run: Run) -> str:
    """The size of the policy in words: parameters, trained parameters and dtypes."""
    policy, dtype = run.policy, run.policy.dtype.name
    whole, trained = parameter_count(parameters.abstract_params(policy.source.config)), parameter_count(abstract_trained(run.roles))
    if policy.lora is None:
        return f"{whole / 1e6:.3f} M parameters, {dtype} on float32 weights"
    held = "int8" if policy.lora.int8 else dtype
    return f"{whole / 1e6:.3f} M parameters in {held}, {trained / 1e6:.3f} M more in float32 that are trained"


def rows_of(run: Run) -> list[str]:
    """The line that says how full padded rows would be, where rows are packed; the share after packing is logged as `packed_positions`."""
    if run.packing is None:
        return []
    N, T = run.config.rollout.samples or run.data.train.examples.N, run.data.train.length
    P = -(-max(run.packing.positions, N * T) // run.packing.block) * run.packing.block
    prompts = "; responses share their prompt" if run.packing.shared and N > 1 else ""
    if run.config.rollout.samples:
        return [f"rows are packed into parts of at most {P:,} positions{prompts}"]
    real, left = real_share(run.data.train.examples, T, False), real_share(run.data.train.examples, T, True)
    less = f", {left:.0%} with each prompt once" if prompts else ""
    return [f"{real:.0%} of the positions of padded rows are tokens{less}: rows are packed into parts of at most {P:,} positions{prompts}"]


def attention(run: Run) -> str:
    """What computes the attention of a run's models in words; and where "auto" did not take the platform's own kernel, why."""

    def words(block: int) -> str:
        by_choice: dict[tuple[str, str], list[str]] = {}
        for name, role in run.roles.items():
            by_choice.setdefault(kernel(role, run.config, run.mesh, run.train.length, block), []).append(name)
        of = lambda names: f" of {', '.join(names)}" if len(by_choice) > 1 else ""
        return "; ".join(found + (f" ({why})" if why else "") + of(names) for (found, why), names in by_choice.items())

    if run.packing is None:
        return f"attention: {words(0)}"
    return f"attention: packed rows by {words(run.packing.block)}; padded rows by {words(0)}"


def remat(run: Run) -> list[str]:
    """The line that says which policy `model.remat` "auto" chose; none for a policy by name."""
    return [f"remat: {run.remat}"] if run.remat else []


def summary(run: Run, about: dict[str, Any], start: int) -> list[str]:
    """The lines of a run's summary; `about` has the names of its models, `start` is the step it goes on from."""
    policy, data = run.policy, run.data
    lines = [
        f"model {run.config.model.path}: {sizes(run)}; mesh {meshes.words(run.mesh)}",
        f"policy {about['policy']}" + (f", reference {about['reference']}" if about["reference"] else ", no reference"),
    ]
    lines += [attention(run), *remat(run)]
    if policy.lora is not None and not policy.lora.targets:
        lines.append("the trunk is frozen: only the head is trained")
    elif policy.lora is not None and not policy.members:
        base = "; the reference is their base, without adapters" if REFERENCE in run.roles and run.roles[REFERENCE].tree == BASE else ""
        lines.append(f"adapters {about['adapters']} of rank {policy.lora.rank} on {', '.join(policy.lora.targets)}{base}")
    if CRITIC in run.roles:
        size = parameter_count(parameters.abstract_params(run.roles[CRITIC].config)) / 1e6
        lines.append(f"critic {about['critic']} with separate parameters, {run.config.model.critic}: {size:.3f} M parameters")
    if policy.members:
        kind = "parameters" if policy.lora is None else "adapters" if policy.lora.targets else "head"
        lines.append(f"ensemble of {policy.members} members {about['members']}, each with its own {kind}; seeds from {run.config.seed} on")
    for name in run.config.models:
        size = parameter_count(abstract(run.roles[name])) / 1e6
        lines.append(f"{name} {about[name]}, {run.config.models[name].path}: {size:.3f} M parameters")
    lines += filter(None, map(differing, by_name(run.learning.objectives, jnp.zeros((), jnp.int32)).values()))
    for name, report in data.reports.items():
        lines += [f"{name} data: {line}" if i == 0 else f"  {line}" for i, line in enumerate(report.lines())]
    for stream in (data.train, data.pretrain):
        if stream is not None and stream.mixture:
            lines += [f"mixture: {line}" for line in stream.mixture.lines(run.steps * run.config.batch_size)]
    if run.words.unused and not policy.source.config.num_labels:
        count, rows = sum(behind - first for first, behind in run.words.unused), policy.source.config.vocab_size
        lines.append(f"{count:,} of the {rows:,} tokens of the model's head are not in the tokenizer: they are never sampled")
    if run.config.batch_size > len(data.train.examples):
        lines.append(
            f"a batch of {run.config.batch_size} is larger than the {len(data.train.examples)} rows of the data: a batch repeats rows"
        )
    lines.append(f"steps {run.steps} of {run.config.batch_size} examples, rows of {data.train.length} tokens, workdir {run.workdir}")
    lines += rows_of(run)
    lines += [told(name, generator, run.roles, run.mesh) for name, generator in run.samplers.items()]
    if start >= run.steps:
        lines.append(f"this run is complete: step {start} is saved; with a larger --config.steps it goes on")
    elif start:
        lines.append(f"going on after step {start}")
    return lines
