"""The loop: batch, step, log, evaluate, save; readable top to bottom."""

import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alignax import ensemble
from alignax import mesh as meshes
from alignax.averages import averaged
from alignax.checkpoint import Checkpoints, nbytes, require_space
from alignax.config import asked, blaming, effective
from alignax.distributed import is_main, together
from alignax.evaluate import SAMPLED, Evaluation
from alignax.experience import Experience, chain
from alignax.metrics import Log
from alignax.models import hf, peft, reward
from alignax.models.lora import Lora, merge, quantise, split
from alignax.prepare import (
    Run,
    abstract_batch,
    abstract_frozen,
    abstract_state,
    abstract_trained,
    batch_sizes,
    frozen_dtype,
    frozen_sources,
    new_state,
    policy_model,
    reference_model,
    reference_name,
    state_shardings,
    stored_outputs,
    taught_apply,
)
from alignax.reference import with_stored
from alignax.train import digest, make_evaluation, make_step
from alignax.types import Batch, Metrics, Model, Outputs, Params, TrainState

DRIFT = 2.0  # nats that the chosen response falls before the notice
EQUAL = {"float32": 1e-3, "bfloat16": 0.1}  # nats that the margin of equal models may differ from 0 by rounding
AGREE = 10  # steps between the processes' agreements on whether to stop
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}  # exit codes: 128 + the number


class Started(NamedTuple):
    """A run with its arrays on the mesh, at step 0 or where it was stopped."""

    run: Run
    state: TrainState
    step: int  # steps taken
    frozen: dict[str, Params]  # what it holds and does not train: "reference", if there is one
    about: dict[str, str]  # digests of the policy and the reference that it started from
    checkpoints: Checkpoints


def start(run: Run, write: bool = True) -> Started:
    """Loads models and the newest checkpoint, if there is one. Nothing is trained yet; only with `write` is the workdir touched.

    Raises:
      ValueError: for weights that are not finite, and for a checkpoint that is damaged or is not this run's.
      OSError: when the disk has no room for a checkpoint.
    """
    config = run.config
    with together():
        check_step(run)
        params = initial_params(run)
        original = reference_params(run, params)
    about = {"policy": fingerprint(params), "reference": fingerprint(original), "data": f"{run.train.digest():08x}"}
    stored = {"base": split(params)[0], "reference": original}
    frozen = {name: frozen_copy(run, name, stored[name]) for name in frozen_sources(run)}
    if config.reference.cache:
        name = reference_name(run)
        scorer = frozen[name] if name in frozen else frozen_copy(run, name, original)
        say = lambda line: print(line, file=sys.stderr, flush=True) if is_main() else None
        run = with_stored(run, scorer, about["reference"], say)
        del scorer
    if run.members:
        params = original = spread(run, params, frozen.get("base"))
        about["members"] = fingerprint(params)
    elif run.lora is not None:
        params = original = initial_adapters(run, params, frozen["base"])
        about["adapters"] = fingerprint(params)
    del stored
    if write:
        with together():
            require_space(run.workdir, nbytes(abstract_state(run)))
            open_workdir(run)
    checkpoints = Checkpoints(run.workdir, config.checkpoint.keep, config.checkpoint.best)
    step = checkpoints.latest() or 0
    if step:
        saved = checkpoints.about(step)
        compared = about if write else {name: x for name, x in about.items() if name != "data"}  # evaluation may have other data
        check_same(run.workdir, step, saved, compared)
        del params, original  # one training state at a time
        state = checkpoints.restore(step, abstract_state(run))
    else:
        own = {} if original is params else {"reference": original}  # what is given away may not be an argument twice
        fresh = lambda p, key, own: new_state(run, p, key, {name: own.get(name, p) for name in run.averages})
        create = jax.jit(fresh, out_shardings=state_shardings(run), donate_argnums=0)
        state = create(params, jax.random.key(config.seed), own)
    return Started(run, state, step, frozen, about, checkpoints)


def check_step(run: Run) -> None:
    """Traces the training step on shapes alone, so that a loss that does not fit its data is refused before anything is written."""
    step, evaluate = make_programs(run)
    state, frozen, batch = abstract_state(run), abstract_frozen(run), abstract_batch(run)
    try:
        with blaming(run.experiment.file, always=False):
            jax.eval_shape(step, state, frozen, batch)
            metrics = jax.eval_shape(evaluate, state, frozen, abstract_batch(run, evaluation=True))
    except KeyError as e:
        raise ValueError(
            f"the batch has no field {e.args[0]!r}, which the loss or the experience reads; let an experience write it, or bring it "
            "with the data (data.kind, data.columns)"
        ) from e
    check_gold(run)
    best = run.config.checkpoint.best.removeprefix("-")
    names = {"loss", *SAMPLED, *(name for name in metrics if not name.startswith("loss:"))}
    if best and best not in names:
        raise ValueError(f"checkpoint.best {best!r} is no metric of the evaluation; use one of {', '.join(sorted(names))}")


def check_gold(run: Run) -> None:
    """Calls the experiment's gold reward once, on a prompt of the data and the answer that stands there."""
    if run.experiment.gold is None:
        return
    examples, file = run.evaluation or run.train.examples, run.experiment.file
    answer = examples.tokens[: examples.offsets[1]][examples.scored[: examples.offsets[1]]]
    with blaming(file):
        rewards = list(run.experiment.gold(examples.prompts[:1], [run.tokenizer.decode(answer, skip_special_tokens=True)]))
        fine = len(rewards) == 1 and math.isfinite(float(rewards[0]))
    if not fine:
        raise ValueError(f"gold() of {file} returns {rewards!r} for one prompt and its completion; it must return a finite number for each")


def fit(started: Started) -> dict[str, dict[str, float]]:
    """Trains to the end; returns evaluation metrics, {"before": .., "after": ..}.

    Everything goes into the workdir: `config.py` (runs the same again), `metrics.jsonl`, `samples.jsonl`, `tensorboard/`,
    `checkpoints/`, `export/`.

    Raises:
      SystemExit: 143 after SIGTERM and 130 after Ctrl-C, once the state is saved.
      FloatingPointError: when `max_skipped` steps in a row are not finite.
    """
    run, first = started.run, started.step
    c = run.config.log
    log = Log(run.workdir, steps=run.steps, start=first, every=c.every, tensorboard=c.tensorboard, writes=is_main())
    with closing(log), Stop() as stop:
        for line in summary(run, started.about, first):
            log.line(line)
        with closing(started.checkpoints):  # waits until the last one is whole
            state, results = loop(started, log, stop)
        if run.config.export.final:
            export(run, state, log)
    return results


def loop(started: Started, log: Log, stop: "Stop") -> tuple[TrainState, dict[str, dict[str, float]]]:
    """The steps that are left, with evaluation and saving between them."""
    run, state, first, frozen, about, checkpoints = started
    config = run.config
    step, evaluate_batch = make_programs(run)
    evaluate = Evaluation(run, evaluate_batch, frozen, log)
    fresh = not run.config.lora.path  # adapters that were trained before are not their base
    draw = run.train.batch
    if run.members:
        draw = functools.partial(ensemble.member_batch, ensemble.member_batches(run.train, run.members, config.ensemble.own_noise))
    observe = Observer(run, log, equal=fresh and about["policy"] == about["reference"])
    results: dict[str, dict[str, float]] = {}
    pending: tuple[int, Metrics] | None = None
    if first == 0:
        results["before"] = evaluate(state, 0)
    for s in range(first + 1, run.steps + 1):
        batch = meshes.put_batch(run.mesh, functools.partial(draw, s - 1), *batch_sizes(run))
        state, metrics = step(state, frozen, batch)
        if pending:  # fetched a step late, so that the device never waits for the host
            observe(*pending)
        pending = (s, metrics)
        stopping = stop.requested(s)
        evaluating = s == run.steps or (config.eval.every and s % config.eval.every == 0)
        saving = s == run.steps or s % config.checkpoint.every == 0 or (evaluating and config.checkpoint.best)
        if stopping or evaluating or saving:  # the log is never behind a checkpoint
            observe(*pending)
            pending = None
        with log.paused():
            scores = evaluate(state, s) if evaluating else {}
            if stopping or saving:
                checkpoints.save(state, about, scores)
        if s == run.steps:
            results["after"] = scores
        elif stopping:
            checkpoints.close()
            log.line(f"stopped by {SIGNALS[signal.Signals(stop.signal)]} after step {s}; saved. The same command goes on from here.")
            raise SystemExit(128 + stop.signal)
    return state, results


def initial_params(run: Run) -> Params:
    """The policy's parameters at step 0."""
    if run.config.model.init == "random":
        return hf.init_params(run.source.config, run.mesh, jax.random.key(run.config.seed))
    return hf.load_params(run.source, run.mesh, jax.random.key(run.config.seed))


def spread(run: Run, params: Params, base: Params | None) -> Params:
    """What the members of an ensemble train, at step 0 [K, ...]: all parameters, or adapters of the base, and each its own head.

    The head is what each member's seed gives, unless the folder has one: then all begin with that.
    """
    config, lora = run.source.config, run.lora
    own = run.source.stored.num_labels != config.num_labels
    layout = jax.tree.map(lambda x: x.sharding, abstract_trained(run, run.mesh))

    def member(params: Params, base: Params, key: jax.Array) -> Params:
        trained = params if lora is None else hf.fresh_adapters(config, lora, base, key)
        fresh = hf.fresh(config, key) if own else params
        return trained | {name: fresh[name] for name in reward.HEAD}

    every = ensemble.over_members(member, (None, None, 0), 0)
    return jax.jit(every, out_shardings=layout)(params, base, ensemble.keys(run.config.seed, run.members))


def initial_adapters(run: Run, params: Params, base: Params) -> Params:
    """The adapters at step 0, with a reward model's head."""
    assert run.lora is not None
    head = {name: params[name] for name in reward.HEAD if name in params}
    if path := run.config.lora.path:
        with together():
            return peft.read_adapter(Path(path), run.source, run.mesh)[1]
    return hf.init_adapters(run.source, run.lora, run.mesh, base, jax.random.key(run.config.seed)) | head


def reference_params(run: Run, params: Params) -> Params | None:
    """The reference's parameters as they were stored: those that the run starts from unless `reference.path` is another folder's."""
    if run.reference is None or run.reference is run.source:
        return params if run.reference else None
    return hf.load_params(run.reference, run.mesh)


def fingerprint(params: Params | None) -> str:
    """The digest of parameters, as text; none of none."""
    return "" if params is None else f"{int(jax.jit(digest)(params)):08x}"


def frozen_copy(run: Run, name: str, params: Params) -> Params:
    """Parameters that are only read, "base" or "reference", in the types that `frozen_dtype` says."""
    if name == "base" and run.lora is not None and run.lora.int8:
        params = jax.jit(quantise)(params)
    # Copies, never aliases: the training step gives the policy's own buffers away.
    freeze = lambda path, x: jnp.array(x, frozen_dtype(path, run, name), copy=True)
    return jax.tree_util.tree_map_with_path(freeze, params)


def export(run: Run, state: TrainState, log: Log) -> None:
    """Writes the Hugging Face folder `export`, adapters merged into their base, and the adapters themselves as PEFT's folder `adapter`.

    Of an ensemble a folder each: `export/member_0`, `adapter/member_0`.
    """
    c, params = run.config.export, state.params
    params = params if c.params == "policy" else state.averages[c.params]
    for name, one in members_of(params, run.members):
        if run.lora is not None and run.lora.targets:
            peft.write_adapter(one, run.lora, run.source, run.config.model.path, run.workdir / "adapter" / name)
            log.line(f"adapters written to {run.workdir / 'adapter' / name}")
        whole = merged(run.source, run.lora, one, run.mesh) if run.lora is not None else one
        hf.export(whole, run.source, run.workdir / "export" / name, c.dtype, eos=run.tokenizer.eos_token_id)
        log.line(f"exported to {run.workdir / 'export' / name}")


def members_of(params: Params, members: int) -> Iterator[tuple[str, Params]]:
    """Name and parameters of each member; without members the model itself, whose name is empty."""
    take = jax.jit(lambda tree, k: jax.tree.map(lambda x: x[k], tree), static_argnums=1)
    return ((f"member_{k}", take(params, k)) for k in range(members)) if members else iter([("", params)])


def merged(source: hf.Source, lora: Lora, adapters: Params, mesh: Mesh) -> Params:
    """The base's parameters, read again in full precision, with the adapters folded in."""
    return jax.jit(functools.partial(merge, lora), donate_argnums=0)(hf.load_params(source, mesh), adapters)


def parameter_count(tree: Params) -> int:
    """Parameters of a tree, which may be abstract."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def sizes(run: Run) -> str:
    """The model's size in words."""
    whole, trained = parameter_count(hf.abstract_params(run.source.config)), parameter_count(abstract_trained(run))
    if run.lora is None:
        return f"{whole / 1e6:.3f} M parameters, {run.dtype.name} on float32 weights"
    held = "int8" if run.lora.int8 else run.dtype.name
    return f"{whole / 1e6:.3f} M parameters in {held}, {trained / 1e6:.3f} M more in float32 that are trained"


def make_experience(run: Run, frozen: dict[str, Params], state: TrainState) -> Experience:
    """What the experiment puts in front of the step, from the models that it asks for; nothing, where it names none."""
    make = run.experiment.experience
    if make is None:
        return chain()
    given = {"config": run.config, "policy": policy_model(run, frozen, state.params), "reference": reference_model(run, frozen)}
    if run.config.reference.cache:
        given["reference"] = Model(stored_outputs, {})
    if "reference" in state.averages:
        given["reference"] = policy_model(run, frozen, state.averages["reference"])
    return make(**{name: given[name] for name in asked(make)})


def make_programs(run: Run) -> tuple[Callable, Callable]:
    """The jitted training step and the jitted evaluation of a batch, each behind the experience.

    Frozen parameters go in as an argument: they stay sharded where they are and are never compiled into the program.
    """
    after = averaged(run.averages)

    def step(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
        rate = run.schedule(state.step - state.skipped)
        train_step = make_step(taught_apply(run, frozen), run.objective, run.optimizer, run.config.microbatches)
        state, metrics = train_step(state, make_experience(run, frozen, state)(batch))
        state = after(state)
        return state, metrics | {"learning_rate": jnp.asarray(rate), "tokens": batch["mask"].sum(dtype=jnp.float32)}

    def evaluate(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[Any, Outputs]:
        batch = make_experience(run, frozen, state)(batch)
        out = taught_apply(run, frozen)(state.params, batch)
        return make_evaluation(lambda out, batch: out, run.objective)(out, state.step, batch), out

    if run.members:
        axes = ensemble.AXES
        train_all = ensemble.over_members(step, (axes, None, 0), (axes, 0))
        evaluate_all = ensemble.over_members(evaluate, (axes, None, None), 0)

        def steps(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
            state, metrics = train_all(state, frozen, batch)
            return state, ensemble.training_metrics(metrics)

        def evaluations(state: TrainState, frozen: dict[str, Params], batch: Batch) -> Any:
            sums, out = evaluate_all(state, frozen, batch)
            return ensemble.evaluation_sums(sums, out, batch)

        return jax.jit(steps, donate_argnums=0), jax.jit(evaluations)
    return jax.jit(step, donate_argnums=0), jax.jit(lambda *args: evaluate(*args)[0])


def open_workdir(run: Run) -> None:
    """Makes the workdir and writes the effective config into it, in one move; process 0 does."""
    if is_main():
        run.workdir.mkdir(parents=True, exist_ok=True)
        tmp = run.workdir / "config.py.tmp"
        tmp.write_text(effective(run.experiment), encoding="utf-8")
        os.replace(tmp, run.workdir / "config.py")


def check_same(workdir: Path, step: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses a checkpoint that grew from other models."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"checkpoint {step} in {str(workdir)!r} grew from another {name} ({saved.get(name)}, given now: {value}); "
                "give the same models and data, or choose another workdir"
            )


def summary(run: Run, about: dict[str, Any], start: int) -> list[str]:
    """What a run says before it starts."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    lines = [
        f"model {run.config.model.path}: {sizes(run)}; mesh {mesh}",
        f"policy {about['policy']}" + (f", reference {about['reference']}" if about["reference"] else ", no reference"),
    ]
    if run.lora is not None and not run.lora.targets:
        lines.append("the trunk is frozen: the head alone is trained")
    elif run.lora is not None and not run.members:
        base = "; the reference is their base, without adapters" if run.reference is run.source else ""
        lines.append(f"adapters {about['adapters']} of rank {run.lora.rank} on {', '.join(run.lora.targets)}{base}")
    if run.members:
        kind = "all parameters" if run.lora is None else "adapters" if run.lora.targets else "a head"
        lines.append(f"ensemble of {run.members} members {about['members']}, each with {kind} of its own; seeds from {run.config.seed} on")
    for name, report in run.reports.items():
        lines += [f"{name} data: {line}" if i == 0 else f"  {line}" for i, line in enumerate(report.lines())]
    if run.train.mixture:
        lines += [f"mixture: {line}" for line in run.train.mixture.lines(run.steps * run.config.batch_size)]
    if run.config.batch_size > len(run.train.examples):
        lines.append(
            f"a batch of {run.config.batch_size} is more than the {len(run.train.examples)} rows there are: it holds rows more than once"
        )
    lines.append(f"steps {run.steps} of {run.config.batch_size} examples, rows of {run.train.length} tokens, workdir {run.workdir}")
    if start >= run.steps:
        lines.append(f"this run is complete: step {start} is saved; a longer one needs another workdir")
    elif start:
        lines.append(f"going on after step {start}")
    return lines


class Observer:
    """Logs training metrics and says what a person should know of them, once each."""

    def __init__(self, run: Run, log: Log, equal: bool):
        """`equal`: policy and reference start as the same parameters."""
        self.run, self.log, self.equal = run, log, equal
        self._first: dict[str, float] = {}
        self._smooth: dict[str, float] = {}
        self._since = 0
        self._noticed = False

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Logs the metrics of a step, fetched now."""
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        infinite = [name.removeprefix("finite/") for name, x in values.items() if name.startswith("finite/") and not x]
        values = {name: x for name, x in values.items() if not name.startswith("finite/")}
        if step == 1 and self.equal and not values["skipped"] and "logps/chosen_drift" in values:
            self._check_equal(values)
        self.log.step(step, values, values.pop("tokens"))
        if values["skipped"]:
            self._skipped(step, values, infinite)
        elif "logps/chosen_drift" in values:
            self._since = self._since or step
            self._notice(step, values)

    def _skipped(self, step: int, values: dict[str, float], infinite: list[str]) -> None:
        losses = [name for name, x in values.items() if name.startswith("loss") and not np.isfinite(x)]
        what = ", ".join(losses) or f"the gradient of {', '.join(infinite[:3])}"
        row = int(values["skipped_in_a_row"])
        self.log.line(f"step {step}: {what} is not finite; step skipped ({int(values['skipped_total'])} so far, {row} in a row)")
        if row >= self.run.config.max_skipped:
            raise FloatingPointError(
                f"{row} steps in a row were not finite ({what} at step {step}); lower optimizer.learning_rate, or look at these rows"
            )

    def _check_equal(self, values: dict[str, float]) -> None:
        margin = max(abs(values[f"logps/{side}_drift"]) for side in ("chosen", "rejected"))
        if margin > EQUAL[self.run.dtype.name]:
            raise FloatingPointError(
                f"policy and reference are the same parameters, yet their log-probs differ by {margin:.3g} nats at step 0; "
                "is the experience given the right reference?"
            )
        self.log.line(f"step 0: policy = reference, margin {values['rewards/margins']:.1e}, loss {values['loss']:.4f}")

    def _notice(self, step: int, values: dict[str, float]) -> None:
        for name in ("logps/chosen_drift", "rewards/margins"):
            first = self._first.setdefault(name, values[name])
            self._smooth[name] = 0.9 * self._smooth.get(name, 0.0) + 0.1 * (values[name] - first)
        drift, margin = self._smooth["logps/chosen_drift"], self._smooth["rewards/margins"]
        if not self._noticed and drift < -DRIFT and margin > 0:
            self._noticed = True
            self.log.line(
                f"notice at step {step}: the chosen responses lose log-probability ({drift:.1f} nats since step {self._since}) while the "
                f"margin grows (+{margin:.2f}). Only their difference is trained. To hold them, use rpo(beta, eta=0.005) with a larger "
                "eta where that is not enough, or add sft() to the loss, with a larger weight where it is there."
            )


class Stop:
    """Notes SIGTERM and Ctrl-C, so that the loop can save before it ends; a second Ctrl-C does not wait for that."""

    def __enter__(self) -> "Stop":
        self.signal = 0  # the one that came
        self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; several processes agree on it every few steps, since that waits for the device."""
        if jax.process_count() == 1:
            return bool(self.signal)
        if step % AGREE == 0:
            self.signal = int(multihost_utils.process_allgather(np.array(self.signal)).max())
            return bool(self.signal)
        return False
