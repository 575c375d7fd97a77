"""The loop: batch, step, log, evaluate, save; readable top to bottom."""

import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignax import mesh as meshes
from alignax.config import steps_of_turn
from alignax.distributed import is_main
from alignax.evaluate import Evaluation
from alignax.host_rewards import RewardFailed
from alignax.losses.algebra import by_name
from alignax.losses.responses import differing
from alignax.metrics import Log
from alignax.models import hf, parameters, peft
from alignax.models.reward import CRITIC
from alignax.prepare import Run, origin
from alignax.rollout import trained_on
from alignax.run.feed import make_feed
from alignax.run.roles import BASE, REFERENCE, abstract, abstract_trained
from alignax.start import Started
from alignax.types import Metrics, Params, TrainState
from alignax.workers import Abandoned, never

DRIFT = 2.0  # nats that the chosen response falls before the notice
EQUAL = {"float32": 1e-3, "bfloat16": 0.1}  # nats that the margin of equal models may differ from 0 by rounding
QUIET = 3  # rollouts in a row that say nothing before the notice
SAME = 0.2  # of the first rollout's different completions: with fewer there is a notice
AGREE = 10  # steps between the processes' agreements on whether to stop
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}  # exit codes: 128 + the number


def fit(started: Started) -> dict[str, dict[str, float]]:
    """Trains to the end; returns evaluation metrics, {"before": .., "after": ..}.

    Everything goes into the workdir: `config.py` (runs the same again), `metrics.jsonl`, `samples.jsonl`, `tensorboard/`,
    `rollouts.jsonl` (online), `checkpoints/`, `export/`.

    Raises:
      SystemExit: 143 after SIGTERM, 130 after Ctrl-C and 129 after SIGHUP, once the state is saved.
      FloatingPointError: when `max_skipped` steps in a row are not finite, or all there are.
    """
    run, first = started.run, started.step
    c = run.config.log
    log = Log(run.workdir, steps=run.steps, start=first, every=c.every, tensorboard=c.tensorboard, writes=is_main())
    run.workers.say = log.line
    with closing(started.lock), closing(log), closing(run.workers), Stop() as stop:
        for line in summary(run, started.about, first):
            log.line(line)
        with closing(started.checkpoints):  # waits until the last one is whole
            state, results = loop(started, log, stop)
        if int(state.skipped.max()) >= run.steps:
            raise FloatingPointError(
                f"none of the {run.steps} steps was finite, nothing was learnt, and nothing is exported; "
                "lower optimizer.learning_rate, or look at the rows, and choose another workdir"
            )
        if run.config.export.final:
            export(run, state, log)
    return results


def loop(started: Started, log: Log, stop: "Stop") -> tuple[TrainState, dict[str, dict[str, float]]]:
    """The steps that are left, with evaluation and saving between them."""
    run, state, first, held, programs, about, checkpoints, _ = started
    config = run.config
    evaluate = Evaluation(run, held, programs, log, stop.look)
    fresh = not run.config.lora.path  # adapters that were trained before are not their base
    turn = steps_of_turn(config)  # steps between two looks: 1, or those on a rollout
    feed, learn = make_feed(run, held, programs, stop.look), programs["train"].call
    observe = Observer(run, log, equal=fresh and about["policy"] == about["reference"])
    results: dict[str, dict[str, float]] = {}
    pending: tuple[int, Metrics, Future[float]] | None = None
    clock = ThreadPoolExecutor(1)  # a step may be over long before the host looks at it, or after it has given out the next
    due = lambda every, s: s == run.steps or (every > 0 and s // every > (s - turn) // every)
    if first == 0 or (due(config.eval.every, first) and not evaluated(log)):  # the run left before the end of that evaluation
        with log.paused(), leaving(started, log, stop, state, first, "the evaluation"):
            scores = evaluate(state, first)
        if first in (0, run.steps):
            results["after" if first else "before"] = scores
    for s in range(first + turn, run.steps + 1, turn):
        with leaving(started, log, stop, state, s - turn, "a rollout"):
            state, batches, seen = feed(state, s - turn)
            state, metrics = learn(state, held, batches)
            state, more = feed.after(state, metrics)
            metrics = metrics | seen | more
        if pending:  # fetched a step late, so that the device never waits for the host
            observe(*pending)
        pending = (s, metrics, clock.submit(over, metrics))
        stopping = stop.requested(s // turn, 1 if feed.waits else AGREE)
        evaluating = due(config.eval.every, s)
        saving = due(config.checkpoint.every, s) or (evaluating and config.checkpoint.best)
        if stopping or evaluating or saving or feed.waits:  # never behind a checkpoint; a turn has waited for the device
            with leaving(started, log, stop, state, s, "a rollout"):
                observe(*pending)
            pending = None
        with log.paused(), leaving(started, log, stop, state, s, "the evaluation"):
            scores = evaluate(state, s) if evaluating and not stopping else {}  # the next start makes it up
            if stopping or saving:
                checkpoints.save(state, about, scores)
        if stopping:
            checkpoints.close()
            log.line(f"stopped by {SIGNALS[signal.Signals(stop.signal)]} after step {s}; saved. The same command goes on from here.")
            raise SystemExit(128 + stop.signal)
        if s == run.steps:
            results["after"] = scores
    return state, results


def over(metrics: Metrics) -> float:
    """When a step is over, on the clock of `time.monotonic`; waits for it."""
    jax.block_until_ready(metrics)
    return time.monotonic()


@contextmanager
def leaving(started: Started, log: Log, stop: "Stop", state: TrainState, step: int, what: str) -> Iterator[None]:
    """Lets a signal end `what`, a rollout or an evaluation, as if it had come at `step`, after which nothing is learnt yet.

    Rewards that fail lose nothing of what was learnt before, either.
    """
    workers = started.run.workers
    workers.stop = lambda: stop.signal
    try:
        yield
    except Abandoned as e:
        where = "before the first step; the same command begins again."
        if step:
            started.checkpoints.save(state, started.about, {})
            started.checkpoints.close()
            where = f"after step {step}, in {what}; saved. The same command goes on from here."
        log.line(f"stopped by {SIGNALS[signal.Signals(e.number)]} {where}")
        raise SystemExit(128 + e.number) from None
    except RewardFailed:
        if step:
            started.checkpoints.save(state, started.about, {})
            log.line(
                f"saved after step {step}. The same command goes on from there: once what the reward asks, or a module that it imports, "
                "is mended, or with rollout.bad_rewards=drop or a longer rollout.timeout. Where "
                f"{started.run.experiment.file.name} changes it is another run, which may begin with the model that `alignax export "
                f"{started.run.workdir} FOLDER` writes."
            )
        raise
    finally:
        workers.stop = never


def evaluated(log: Log) -> bool:
    """Whether the step that a run goes on after was evaluated, as process 0 has it in its log."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(log.evaluated)))


def export(run: Run, state: TrainState, log: Log) -> None:
    """Writes the Hugging Face folder `export`, adapters merged into their base, and the adapters themselves as PEFT's folder `adapter`.

    Of an ensemble a folder each: `export/member_0`, `adapter/member_0`.
    """
    c, params, by = run.config.export, state.params, origin(run.experiment)
    params = params if c.params == "policy" else state.averages[c.params]
    source, lora = run.policy.source, run.policy.lora
    for name, one in members_of({leaf: x for leaf, x in params.items() if leaf != CRITIC}, run.policy.members):
        if lora is not None and lora.targets:
            peft.write_adapter(one, lora, source, run.config.model.path, run.workdir / "adapter" / name, by)
            log.line(f"adapters written to {run.workdir / 'adapter' / name}")
        whole = peft.merged(source, lora, one, run.mesh) if lora is not None else one
        hf.export(whole, source, run.workdir / "export" / name, c.dtype, eos=run.words.tokenizer.eos_token_id, origin=by)
        log.line(f"exported to {run.workdir / 'export' / name}")


def members_of(params: Params, members: int) -> Iterator[tuple[str, Params]]:
    """Name and parameters of each member; without members the model itself, whose name is empty."""
    take = jax.jit(lambda tree, k: jax.tree.map(lambda x: x[k], tree), static_argnums=1)
    return ((f"member_{k}", take(params, k)) for k in range(members)) if members else iter([("", params)])


def parameter_count(tree: Params) -> int:
    """Parameters of a tree, which may be abstract."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def sizes(run: Run) -> str:
    """The model's size in words."""
    policy, dtype = run.policy, run.policy.dtype.name
    whole, trained = parameter_count(parameters.abstract_params(policy.source.config)), parameter_count(abstract_trained(run.roles))
    if policy.lora is None:
        return f"{whole / 1e6:.3f} M parameters, {dtype} on float32 weights"
    held = "int8" if policy.lora.int8 else dtype
    return f"{whole / 1e6:.3f} M parameters in {held}, {trained / 1e6:.3f} M more in float32 that are trained"


def summary(run: Run, about: dict[str, Any], start: int) -> list[str]:
    """What a run says before it starts."""
    policy, data = run.policy, run.data
    lines = [
        f"model {run.config.model.path}: {sizes(run)}; mesh {meshes.words(run.mesh)}",
        f"policy {about['policy']}" + (f", reference {about['reference']}" if about["reference"] else ", no reference"),
    ]
    if policy.lora is not None and not policy.lora.targets:
        lines.append("the trunk is frozen: the head alone is trained")
    elif policy.lora is not None and not policy.members:
        base = "; the reference is their base, without adapters" if REFERENCE in run.roles and run.roles[REFERENCE].tree == BASE else ""
        lines.append(f"adapters {about['adapters']} of rank {policy.lora.rank} on {', '.join(policy.lora.targets)}{base}")
    if CRITIC in run.roles:
        size = parameter_count(parameters.abstract_params(run.roles[CRITIC].config)) / 1e6
        lines.append(f"critic {about['critic']} of its own tree, {run.config.model.critic}: {size:.3f} M parameters")
    if policy.members:
        kind = "all parameters" if policy.lora is None else "adapters" if policy.lora.targets else "a head"
        lines.append(
            f"ensemble of {policy.members} members {about['members']}, each with {kind} of its own; seeds from {run.config.seed} on"
        )
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
        lines.append(f"{count:,} of the {rows:,} tokens of the model's head are none of its tokenizer's: they are never sampled")
    if run.config.batch_size > len(data.train.examples):
        lines.append(
            f"a batch of {run.config.batch_size} is more than the {len(data.train.examples)} rows there are: it holds rows more than once"
        )
    lines.append(f"steps {run.steps} of {run.config.batch_size} examples, rows of {data.train.length} tokens, workdir {run.workdir}")
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
        self._told: set[str] = set()  # the notices of rollouts that were given
        self._seen = self._unrewarded = self._silent = self._cut = 0  # steps, and rollouts in a row

    def __call__(self, step: int, metrics: Metrics, ended: Future[float] | None = None) -> None:
        """Logs the metrics of a step, fetched now; `ended` tells when it was over, if not now."""
        fetched = jax.device_get(dict(metrics))
        if shown := fetched.pop("shown", None):
            self.log.rollouts(step, trained_on(self.run, shown))
        values = {name: float(x) for name, x in fetched.items()}
        infinite = [name.removeprefix("finite/") for name, x in values.items() if name.startswith("finite/") and not x]
        values = {name: x for name, x in values.items() if not name.startswith("finite/")}
        if step == 1 and self.equal and not values["skipped"] and "logps/chosen_drift" in values:
            self._check_equal(values)
        self.log.step(step, values, values.pop("tokens"), ended and ended.result())
        self._seen += 1
        if self._seen == 1 and values.get("grad_norm") == 0 and not values["skipped"]:
            self._notice_nothing(step, values)
        if "distinct" in values:
            self._check_rewards(step, values)
        if values["skipped"]:
            self._skipped(step, values, infinite)
        elif "distinct" in values:
            self._notice_sameness(step, values)
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

    def _check_rewards(self, step: int, values: dict[str, float]) -> None:
        """Stops a run without rewards, and tells of one whose rollouts say nothing."""
        # Where no group has a signal, a refill leaves nothing to train on, whatever its rewards were.
        each = [x for name, x in values.items() if name.startswith("score/")]  # of gdpo(), which makes no reward of them
        none = values.get("bad_rewards", 0) and np.isnan([values[n] for n in ("reward", "reward_sampled") if n in values] or each).all()
        self._unrewarded = self._unrewarded + 1 if none else 0
        if none and self._unrewarded >= self.run.config.max_skipped:
            raise RewardFailed(
                f"no completion of {self._unrewarded} rollouts in a row has a reward (max_skipped; the last one before step {step}); "
                "look at what the reward function or the reward models give"
            )
        self._silent = self._silent + 1 if values.get("signal_rate") == 0 and not values.get("advantage_std") and not none else 0
        if self._silent == QUIET:
            reward = values.get("reward_sampled", values["reward"])
            self._once(
                "silent",
                f"notice at step {step}: the rewards of no group differ, for {QUIET} rollouts (signal_rate 0, reward "
                f"{reward:.3g}), so nothing is learnt from comparing them. Take prompts that are neither hopeless nor solved, "
                "a reward with more than two values, or more samples of a prompt (rollout.samples).",
            )
        self._cut = self._cut + 1 if values.get("truncated_rate") == 1 else 0
        if self._cut == QUIET:
            self._once(
                "cut",
                f"notice at step {step}: every completion of {QUIET} rollouts was cut at rollout.max_new_tokens, none has ended. Raise "
                "it, or look at samples.jsonl for whether the policy ends what it says.",
            )
        if count := int(values.get("judge_cut", 0)):
            self._once(
                "judge",
                f"notice at step {step}: {count} answers do not fit into what the reward models read, and are scored without their end "
                "(judge_cut). Lower rollout.max_new_tokens, or leave out the longest prompts.",
            )

    def _once(self, name: str, line: str) -> None:
        """Says a line, unless one of that name was said."""
        if name not in self._told:
            self._told.add(name)
            self.log.line(line)

    def _notice_nothing(self, step: int, values: dict[str, float]) -> None:
        reward = values.get("reward_sampled", values.get("reward", math.nan))  # before any refill
        alike = f": the rewards of no group differ (reward {reward:.3g})" if values.get("signal_rate") == 0 else ""
        self.log.line(
            f"notice at step {step}: the gradient is exactly 0{alike}, so nothing was learnt. Where that does not change, look at the "
            "loss, at the masks of the data (`alignax check-data`), and at what the experience writes."
        )

    def _check_equal(self, values: dict[str, float]) -> None:
        margin = max(abs(values[f"logps/{side}_drift"]) for side in ("chosen", "rejected"))
        if margin > EQUAL[self.run.policy.dtype.name]:
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

    def _notice_sameness(self, step: int, values: dict[str, float]) -> None:
        first = self._first.setdefault("distinct", values["distinct"])
        if not self._noticed and values["distinct"] < SAME * first:
            self._noticed = True
            reward = values.get("reward", np.nan)
            self.log.line(
                f"notice at step {step}: {values['distinct']:.1%} of the completions differ ({first:.1%} at first), with an entropy of "
                f"{values['entropy']:.2g} nats a token, at a reward of {reward:.3g}. Where prompts have one right answer that is as it "
                "should be; otherwise look at samples.jsonl, and add 0.01 * entropy_bonus() or more KL to the reference."
            )


class Stop:
    """Notes SIGTERM, Ctrl-C and the end of the terminal, so that the loop can save before it ends; a second Ctrl-C does not wait for that.

    What is ignored stays so: `nohup` goes on without a terminal.
    """

    def __enter__(self) -> "Stop":
        self.signal = self._looks = 0  # the one that came
        self._old = {n: signal.signal(n, self._note) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        if signal.SIGINT in self._old:
            signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def look(self) -> None:
        """Leaves a rollout or an evaluation between two parts of it, of which every process has as many."""
        self._looks += 1
        if self.requested(self._looks):
            raise Abandoned(self.signal)

    def requested(self, turn: int, every: int = AGREE) -> bool:
        """Whether to stop after this turn; several processes agree on it every few turns, since that waits for the device."""
        if jax.process_count() == 1:
            return bool(self.signal)
        if turn % every:
            return False
        agreed = int(multihost_utils.process_allgather(np.array(self.signal)).max())
        if agreed:  # otherwise a signal that came while this waited is left for the next time
            self.signal = agreed
        return bool(agreed)
