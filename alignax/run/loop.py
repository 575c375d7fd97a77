"""The training loop: batch, step, log, evaluate, save; readable top to bottom."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.compiled import COUNTED
from alignax.config import steps_of_turn
from alignax.distributed import is_main
from alignax.host.workers import Abandoned, never
from alignax.run.evaluation import Evaluation
from alignax.run.export import export
from alignax.run.external import SamplerFailed
from alignax.run.feed import Feed, make_feed
from alignax.run.host_rewards import RewardFailed
from alignax.run.log import Log
from alignax.run.observer import Observer
from alignax.run.profile import Profile
from alignax.run.start import Started
from alignax.run.stop import SIGNALS, Stop
from alignax.run.summary import summary
from alignax.types import Metrics, TrainState


def fit(started: Started) -> dict[str, dict[str, float]]:
    """Trains a run to its end and returns the evaluation metrics, {"before": .., "after": ..}.

    All files go into the workdir: `config.py` (an experiment that repeats the run), `metrics.jsonl`, `samples.jsonl`, `tensorboard/`,
    `rollouts.jsonl` (online), `checkpoints/`, `export/`.

    Raises:
      SystemExit: 143 after SIGTERM, 130 after Ctrl-C and 129 after SIGHUP, once the state is saved.
      FloatingPointError: if `max_skipped` steps in a row are not finite, or no step of the run is.
    """
    run, first = started.run, started.step
    c = run.config.log
    turn = steps_of_turn(run.config)
    log = Log(run.workdir, steps=run.steps, start=first, every=c.every, tensorboard=c.tensorboard, writes=is_main(), turn=turn)
    run.workers.say = log.line
    with closing(started.lock), closing(log), closing(run.workers), Stop() as stop:
        for line in summary(run, started.about, first):
            log.line(line)
        feed, profile = make_feed(run, started.held, started.programs, stop.look), Profile(run, log, first)
        with closing(started.checkpoints), closing(feed), closing(profile):  # closing waits until the last checkpoint is complete
            state, results = loop(started, feed, profile, log, stop)
        if first == run.steps:
            log.line(str(COUNTED))
        if int(state.skipped.max()) >= run.steps:
            raise FloatingPointError(
                f"none of the {run.steps} steps was finite, nothing was learnt, and nothing is exported; "
                "lower optimizer.learning_rate, or look at the rows, and choose another workdir"
            )
        if run.config.export.final:
            export(run, state, log)
    return results


def loop(started: Started, feed: Feed, profile: Profile, log: Log, stop: Stop) -> tuple[TrainState, dict[str, dict[str, float]]]:
    """Takes the remaining steps, with evaluation and saving in between; returns the last state and the evaluation metrics."""
    run, state, first, held, programs, about, checkpoints, _ = started
    config = run.config
    evaluate = Evaluation(run, held, programs, log, stop.look)
    fresh = not run.config.lora.path  # trained adapters already differ from their base
    turn = steps_of_turn(config)  # steps in each call of the training program: 1, or all on one rollout
    learn = programs["train"].call
    observe = Observer(run, log, equal=fresh and about["policy"] == about["reference"])
    results: dict[str, dict[str, float]] = {}
    pending: tuple[int, Metrics, Future[float]] | None = None
    clock = ThreadPoolExecutor(1)  # times the end of a step in a thread, since the host may look much later
    due = lambda every, s: s == run.steps or (every > 0 and s // every > (s - turn) // every)
    if first == 0 or (due(config.eval.every, first) and not evaluated(log)):  # stopped before that evaluation ended
        with log.paused(), leaving(started, log, stop, state, first, "the evaluation"):
            scores = evaluate(state, first)
        if first in (0, run.steps):
            results["after" if first else "before"] = scores
    for s in range(first + turn, run.steps + 1, turn):
        with profile.step(s - turn, state), leaving(started, log, stop, state, s - turn, "a rollout"):
            state, batches, seen = feed(state, s - turn)
            state, metrics = learn(state, held, batches)
            state, more = feed.after(state, metrics)
            metrics = metrics | seen | more
        if s == first + turn:
            log.line(str(COUNTED))  # all programs of a turn are there by now
        if pending:  # fetched a step late, so that the device never waits for the host
            observe(*pending)
        pending = (s, metrics, clock.submit(over, metrics))
        stopping = stop.requested()
        checkpoints.check()
        evaluating = due(config.eval.every, s)
        saving = due(config.checkpoint.every, s) or (evaluating and config.checkpoint.best)
        if stopping or evaluating or saving or feed.waits:  # logged before a checkpoint; a feed that waits has no more to wait for
            with leaving(started, log, stop, state, s, "a rollout"):
                observe(*pending)
            pending = None
        with log.paused(), leaving(started, log, stop, state, s, "the evaluation"):
            scores = evaluate(state, s) if evaluating and not stopping else {}  # done at the next start
            if stopping or saving:
                log.publish()
                checkpoints.save(state, about, scores)
        if stopping:
            checkpoints.close()
            log.line(f"stopped by {SIGNALS[signal.Signals(stop.signal)]} after step {s}; saved. The same command goes on from here.")
            raise SystemExit(128 + stop.signal)
        if s == run.steps:
            results["after"] = scores
    return state, results


def over(metrics: Metrics) -> float:
    """The time when a step ends, on the clock of `time.monotonic`; waits for the step."""
    jax.block_until_ready(metrics)
    return time.monotonic()


@contextmanager
def leaving(started: Started, log: Log, stop: Stop, state: TrainState, step: int, what: str) -> Iterator[None]:
    """Lets a signal end `what` (a rollout or an evaluation) as if the signal had come right after `step`, the last step learnt.

    The state after that step is saved, also if a reward function or the experiment's own sampler fails.
    """
    workers = started.run.workers
    workers.stop = lambda: stop.signal
    try:
        yield
    except Abandoned as e:
        where = "before the first step; the same command begins again."
        if step:
            log.publish()
            started.checkpoints.save(state, started.about, {})
            started.checkpoints.close()
            where = f"after step {step}, in {what}; saved. The same command goes on from here."
        log.line(f"stopped by {SIGNALS[signal.Signals(e.number)]} {where}")
        raise SystemExit(128 + e.number) from None
    except (RewardFailed, SamplerFailed) as e:
        repaired = "the sampler uses is repaired"
        if isinstance(e, RewardFailed):
            repaired = "the reward uses is repaired, or with rollout.bad_rewards=drop or a longer rollout.timeout"
        if step:
            log.publish()
            started.checkpoints.save(state, started.about, {})
            log.line(
                f"saved after step {step}. The same command goes on from there after a service or module that {repaired}. If "
                f"{started.run.experiment.file.name} changes, it is another run, which may begin with the model that `alignax export "
                f"{started.run.workdir} FOLDER` writes."
            )
        raise
    finally:
        workers.stop = never


def evaluated(log: Log) -> bool:
    """Whether the step from which a resumed run goes on was evaluated, according to the log of process 0."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(log.evaluated)))
