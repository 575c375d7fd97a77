"""The measurement of one case, in this process: a run is prepared as by `alignax train`, and its own programs are timed.

Useful tokens are those of prompts and completions that the training step reads, each member of an ensemble its own; padding is none. Of
sampling alone they are the tokens made. Figures are medians over the turns after the first two; a turn is a training step, or a
rollout with all the steps on it.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.averages import PROPOSAL
from alignax.bench import flops, machine
from alignax.bench.case import WARM
from alignax.bench.flops import Rows
from alignax.compiled import COUNTED
from alignax.config import DATA, PRETRAIN, ROLLOUTS, Experiment, asked, flat, steps_of_turn
from alignax.generate import Completions
from alignax.host.functions import models_asked
from alignax.mesh import make_mesh
from alignax.models.reward import CRITIC
from alignax.run.feed import make_feed
from alignax.run.prepare import Run, prepare
from alignax.run.roles import GOLD, REFERENCE, STORED, Role
from alignax.run.rollout import Rollouts
from alignax.run.sampling import EVALUATION, ROLLOUT, sampled_rows, speaker_params
from alignax.run.start import Started, start
from alignax.run.state import off_policy
from alignax.types import Batch


class Turn(NamedTuple):
    """What a turn did."""

    tokens: int  # useful ones
    flops: float  # of the models, see `alignax.bench.flops`
    filled: float  # share of the computed positions that hold a token
    seconds: dict[str, float]  # wall seconds of parts of the turn


class Clocked(NamedTuple):
    """A turn and its seconds, of the wall clock and of the processors."""

    turn: Turn
    wall: float
    cpu: float


def measured(experiment: Experiment, sampling: bool, single: bool = False, alone: bool = False) -> dict[str, Any]:
    """Times the turns of an experiment's run after the first two, or with `sampling` of its sampler; `alone`: the first turn only.

    The run takes the mesh of its config, or with `single` one device.

    Raises:
      ValueError: for what no run can do, and for a run that samples nothing, or outside of alignax.
    """
    if sampling and experiment.sampler is not None:
        raise ValueError(f"sampler() of {experiment.file} samples the rollouts, outside of alignax; leave the word generate out")
    turns = experiment.config.steps // steps_of_turn(experiment.config)
    run, began = prepare(experiment, make_mesh({}, jax.devices()[:1]) if single else None), time.perf_counter()
    if sampling and not run.samplers:
        raise ValueError(f"{experiment.file} samples nothing; set rollout.samples or eval.samples, or leave the word generate out")
    started = start(run, write=False)
    ready = time.perf_counter() - began
    try:
        step = sampler_turns(started) if sampling else training_turns(started)
        first, programs = clocked(step), COUNTED.programs
        seen = [clocked(step) for _ in range(0 if alone else turns - 1)]
        after, used = COUNTED.programs - programs, memory(started)
    finally:
        run.workers.close()
        started.checkpoints.close()
    found = {"first_step_s": first.wall, "first_step_cpu_s": first.cpu, "start_s": ready}
    return found if alone else found | {"compilations_later": after} | used | figures(started, seen[WARM - 1 :], sampling)


def clocked(step: Callable[[], Callable[[], Turn]]) -> Clocked:
    """The next turn with its seconds; what is counted after it takes no part of them."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Clocked(count(), wall, cpu)


def figures(started: Started, seen: list[Clocked], sampling: bool) -> dict[str, Any]:
    """The figures of timed turns."""
    run, devices = started.run, list(started.run.mesh.devices.flat)
    on_cpu = devices[0].platform == "cpu"
    middle = lambda each: float(statistics.median(each))
    wall, cpu, tokens = (middle(x) for x in ([c.wall for c in seen], [c.cpu for c in seen], [c.turn.tokens for c in seen]))
    rate = middle(c.turn.flops / (c.cpu if on_cpu else c.wall) for c in seen)
    about = machine.described(devices, run.policy.dtype)
    name = (ROLLOUT if ROLLOUT in run.samplers else EVALUATION) + "/decode" if sampling else "train"
    return {
        "tokens": tokens,
        "wall_s": wall,
        "cpu_s": cpu,
        "tokens_per_second": middle(c.turn.tokens / c.wall for c in seen),
        "tokens_per_cpu_second": middle(c.turn.tokens / c.cpu for c in seen),
        "model_flops": middle(c.turn.flops for c in seen),
        "model_flops_per_second": middle(c.turn.flops / c.wall for c in seen),
        "model_flops_per_cpu_second": middle(c.turn.flops / c.cpu for c in seen),
        "mfu": rate / about["rate"] / (1 if on_cpu else len(devices)),
        "real_positions": middle(c.turn.filled for c in seen),
        "seconds": {part: middle(c.turn.seconds[part] for c in seen) for part in seen[0].turn.seconds},
        "program": name,
        "parameters": sum(x.size for x in jax.tree.leaves(started.state.params)),
        "turns": len(seen),
        "machine": about,
        "config": flat(run.config),
    } | compiler(started, name, devices[0].platform)


def memory(started: Started) -> dict[str, Any]:
    """The largest memory so far, in bytes: of a device, where the platform says it, and of the process."""
    stats = started.run.mesh.devices.flat[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device_peak_bytes": stats.get("peak_bytes_in_use"), "process_peak_bytes": used}


def compiler(started: Started, name: str, platform: str) -> dict[str, Any]:
    """What the compiler says of a program: its memory, and its FLOPs and bytes, in which the body of a loop counts once."""
    program = started.programs[name].compiled(platform)
    cost, plan = program.cost_analysis() or {}, program.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {"xla_flops": cost.get("flops"), "xla_bytes": cost.get("bytes accessed"), "program_bytes": planned}


# Turns ----------------------------------------------------------------------------------------------------------------------


def training_turns(started: Started) -> Callable[[], Callable[[], Turn]]:
    """A function that takes the next turn of a run, as the training loop does, and returns what counts the turn."""
    run, held, learn = started.run, started.held, started.programs["train"].call
    feed = make_feed(run, held, started.programs)
    steps = iter(range(0, run.steps, steps_of_turn(run.config)))
    state = started.state

    def turn() -> Callable[[], Turn]:
        nonlocal state
        began = time.perf_counter()
        state, batches, seen = feed(state, next(steps))
        fed = time.perf_counter() - began
        state, metrics = learn(state, held, batches)
        state, more = feed.after(state, metrics)
        jax.block_until_ready((state, metrics))
        online = {name.removeprefix("time/"): float(x) for name, x in {**seen, **more}.items() if name.startswith("time/")}
        seconds = online or {"feed": fed, "learn": time.perf_counter() - began - fed}
        return lambda: Turn(*counted(run, batches), filled(metrics, batches), seconds)

    return turn


def sampler_turns(started: Started) -> Callable[[], Callable[[], Turn]]:
    """A function that samples the next rollout, or the completions of an evaluation, and returns what counts them."""
    run, state, held = started.run, started.state, started.held
    steps: Iterator[int] = iter(range(0, run.steps, steps_of_turn(run.config)))

    def turn() -> Callable[[], Turn]:
        began = time.perf_counter()
        prompts, completions = sampled(started, next(steps))
        seconds = {"generate": time.perf_counter() - began}
        made, lengths = completions.mask.sum(axis=-1), np.array([len(prompt) for prompt in prompts])
        slots = generator.shape.slots
        work = sum(flops.sampling(run.roles[name].config, lengths, made) for name in jax.tree.leaves(generator.speaker.names))
        return lambda: Turn(int(made.sum()), work, float(made.sum() / (completions.steps * slots)), seconds)

    def sampled(started: Started, step: int) -> tuple[Any, Completions]:
        if ROLLOUT in run.samplers:
            out = rollouts.sample(state, held, step)
            return out.prompts, out.completions
        own = run.data.evaluated
        prompts = [own.prompt_tokens(i).tolist() for i in sampled_rows(run.config, own)]
        params = speaker_params(generator.speaker, run.roles, held, state.averages.get(PROPOSAL, state.params))
        return prompts, generator(params, prompts, jax.random.fold_in(state.key, step), run.config.eval.samples_per_prompt)

    generator = run.samplers.get(ROLLOUT) or run.samplers[EVALUATION]
    rollouts: Any = Rollouts(run) if ROLLOUT in run.samplers else None
    return turn


# Counts ---------------------------------------------------------------------------------------------------------------------


def filled(metrics: Any, batches: dict[str, Batch]) -> float:
    """The share of the positions that the training step computes, and that hold a token."""
    real = [np.asarray(batch["mask"]) for batch in batches.values()]
    return float(metrics.get("packed_positions", sum(x.sum() for x in real) / sum(x.size for x in real)))


def rows_of(batch: Batch, role: str = "") -> Rows:
    """The rows of a batch as a role reads them: its own tokens where the batch has such."""
    own = f"{role}_" if role and f"{role}_mask" in batch else ""
    lengths = lambda name: np.asarray(batch[own + name]).sum(axis=-1).ravel()
    return Rows(lengths("mask"), lengths("completion_mask"))


def counted(run: Run, batches: dict[str, Batch]) -> tuple[int, float]:
    """The useful tokens and the model FLOPs of the turn on these batches."""
    epochs, main = run.config.rollout.epochs if ROLLOUTS in batches else 1, batches.get(DATA, batches.get(ROLLOUTS, {}))
    rows = rows_of(main)
    work = epochs * sum(flops.training(role.config, rows) for role in trained(run))
    tokens = epochs * rows.tokens
    for role in frozen(run, ROLLOUTS in batches):
        work += max(role.members if not role.trained else 1, 1) * flops.forward(role.config, rows_of(main, role.name)).total
    if ROLLOUTS in batches:
        work += sampled_flops(run, main)
    if PRETRAIN in batches:
        further = rows_of(batches[PRETRAIN])
        work, tokens = work + flops.training(run.policy.config, further), tokens + further.tokens
    return tokens, work


def trained(run: Run) -> list[Role]:
    """The models that are trained: the policy, and a critic with its own trunk."""
    return [run.policy, *(role for name, role in run.roles.items() if name == CRITIC)]


def frozen(run: Run, online: bool) -> list[Role]:
    """The models that read the batch without a gradient, once each.

    They are those that the experience, the loss, and on rollouts the reward functions ask for, unless their log-probs are stored; and on
    rollouts with several steps, or of another policy, the policy and its critic, whose old log-probs and values are needed.
    """
    experiment = run.experiment
    names = [*asked(experiment.experience), *asked(experiment.loss)[1:]]
    if run.config.reference.token_kl:
        names.append(REFERENCE)
    if online:
        names += [*models_asked(experiment), GOLD, CRITIC]
        if steps_of_turn(run.config) > 1 or off_policy(run):
            names.append(run.policy.name)
    averaged = [run.policy] if REFERENCE in names and REFERENCE in run.learning.averages else []
    return averaged + [run.roles[name] for name in dict.fromkeys(names) if name in run.roles and run.roles[name].tree != STORED]


def sampled_flops(run: Run, batch: Batch) -> float:
    """The FLOPs of sampling a rollout; none of a sampler outside of alignax."""
    if run.experiment.sampler is not None:
        return 0.0
    real = np.asarray(batch["mask"]).sum(axis=-1)  # [B, N]
    prompts = np.array([len(run.data.train.examples.prompt_tokens(int(row))) for row in np.asarray(batch["prompt_id"])])
    names = jax.tree.leaves(run.samplers[ROLLOUT].speaker.names)
    return sum(flops.sampling(run.roles[name].config, prompts, real - prompts[:, None]) for name in names)
