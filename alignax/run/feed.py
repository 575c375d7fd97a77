"""The feeds of a run: batches of the data, rollouts of the current policy, or rollouts that were sampled a turn ahead.

A turn is the training steps on one rollout. A feed is a function of the state and the step, so a stopped run goes on bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from alignax import mesh as meshes
from alignax.compiled import COUNTED
from alignax.config import DATA, PRETRAIN, ROLLOUTS, steps_of_turn
from alignax.host.workers import Abandoned
from alignax.program import Program
from alignax.rewards import members
from alignax.run.host_rewards import RewardFailed
from alignax.run.prefetch import Prefetch
from alignax.run.prepare import Run
from alignax.run.rollout import Rollouts, Sampled
from alignax.run.sampling import ROLLOUT
from alignax.run.scoring import Scorers
from alignax.run.state import AHEAD, Held, batch_sizes
from alignax.types import Batch, TrainState

Seen = Mapping[str, Any]  # metrics
Fed = tuple[TrainState, dict[str, Any], Seen]


class Feed(Protocol):
    """A source of the batches that a run's training program takes, see `alignax.run.state.abstract_batches`."""

    waits: bool  # whether the host waits for the device at the end of a turn

    def __call__(self, state: TrainState, step: int) -> Fed:
        """The state, the batches of the turn that begins with training step `step`, and metrics of these batches."""
        ...

    def after(self, state: TrainState, metrics: Seen) -> tuple[TrainState, Seen]:
        """The state after the steps on these batches, and further metrics, such as times; `metrics` are those of the steps."""
        ...

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        ...


def make_feed(run: Run, held: Held, programs: Mapping[str, Program], look: Callable[[], None] = lambda: None) -> Feed:
    """The feed that the config asks for. `look` is called while the feed samples; it may raise an exception to end that."""
    if not run.config.rollout.samples:
        return Offline(run)
    return (Ahead if run.config.rollout.ahead else Online)(run, held, Rollouts(run, look, Scorers(run, held, programs, ROLLOUT)))


class Offline:
    """A feed of data: one batch for every step, which is made ahead."""

    waits = False

    def __init__(self, run: Run):
        """Draws no batch yet."""
        draw, sizes = run.data.train.batch, batch_sizes(run)
        if run.policy.members:
            streams = members.member_batches(run.data.train, run.policy.members, run.config.ensemble.own_noise)
            draw = functools.partial(members.member_batch, streams)
        self.batch = Prefetch(lambda step: meshes.put_batch(run.mesh, functools.partial(draw, step), *sizes), run.steps)

    def __call__(self, state: TrainState, step: int) -> Fed:
        """The unchanged state, the batch of training step `step`, and no metrics."""
        return state, {DATA: self.batch(step)}, {}

    def after(self, state: TrainState, metrics: Seen) -> tuple[TrainState, Seen]:
        """The unchanged state and no metrics; does not wait for the device."""
        return state, {}

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self.batch.close()


class Online:
    """A feed of rollouts of the current policy, with pretraining batches if the run has such data."""

    waits = True

    def __init__(self, run: Run, held: Held, rollouts: Rollouts):
        """Compiles nothing yet."""
        self.run, self.held, self.rollouts = run, held, rollouts
        self.pretraining = Prefetch(self._pretraining, run.steps // steps_of_turn(run.config))

    def __call__(self, state: TrainState, step: int) -> Fed:
        """The state, the rollout before training step `step` with any pretraining batches, and metrics of the rollout."""
        self._begin()
        batch, metrics = self.rollouts(state, self.held, step)
        return self._fed(state, step, batch, metrics)

    def after(self, state: TrainState, metrics: Seen) -> tuple[TrainState, Seen]:
        """Waits for the device; returns the state, how long each part of the turn took, and the number of new programs."""
        jax.block_until_ready((state, metrics))
        return state, self._timed()

    def close(self) -> None:
        """Ends the thread that makes pretraining batches."""
        self.pretraining.close()

    def _begin(self) -> None:
        self._programs, self._began, self._times = COUNTED.programs, time.monotonic(), dict.fromkeys(("generate", "reward"), 0.0)

    def _fed(self, state: TrainState, step: int, batch: Batch, metrics: Seen) -> Fed:
        self._note(metrics)
        batches = self._batches(step, batch)
        self._handed = time.monotonic()
        return state, batches, metrics

    def _note(self, metrics: Seen) -> None:
        self._times = {part: seconds + float(metrics[f"time/{part}"]) for part, seconds in self._times.items()}

    def _timed(self) -> dict[str, Any]:
        now = time.monotonic()
        times: dict[str, Any] = {f"time/{part}": seconds for part, seconds in (self._times | {"learn": now - self._handed}).items()}
        host = {"time/host": now - self._began - sum(times.values()), "compilations": COUNTED.programs - self._programs}
        return times | host

    def _batches(self, step: int, rollout: Batch) -> dict[str, Batch]:
        """The batches of the turn that begins with `step`: its rollout and, if the run has such data, its pretraining batches."""
        more = {} if self.run.data.pretrain is None else {PRETRAIN: self.pretraining(step // steps_of_turn(self.run.config))}
        return {ROLLOUTS: rollout} | more

    def _pretraining(self, turn: int) -> Batch:
        """The pretraining batches of a turn: [steps, B, 1, T]."""
        stream, count = self.run.data.pretrain, steps_of_turn(self.run.config)
        assert stream is not None
        steps = range(turn * count, (turn + 1) * count)

        def make(which: slice, rows: slice) -> dict[str, np.ndarray]:
            parts = [stream.batch(s, rows) for s in steps[which]]
            return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

        return meshes.put_batch(self.run.mesh, make, count, self.run.config.batch_size)


class Ahead(Online):
    """A feed of rollouts that were sampled a turn ago: while the device learns, the host judges the next rollout, kept in the carry.

    `time/learn` is how long the device went on after the host was done. Nothing overlaps before the first turn and after the last. If a
    signal ends the wait for rewards, or rewards fail, the turn is still completed, because its first state is donated to the training
    program by then. The rollout is kept without rewards, and judged before the next turn.
    """

    def __call__(self, state: TrainState, step: int) -> Fed:
        """The state, the rollout that was sampled a turn ago, and its metrics if they are new; also samples the next rollout."""
        self._begin()
        carry = dict(state.carry)
        batch = carry.pop(AHEAD)
        state = dataclasses.replace(state, carry=carry)
        waits = self.rollouts.sample(state, self.held, step) if step == 0 else self.rollouts.waiting(batch)
        newest: Seen = {}
        if waits is not None:
            batch, seen = self.rollouts.judge(waits)
            self._note(seen)
            newest = seen if step == 0 else {}  # an unjudged rollout's metrics were logged after it was sampled
        following = step + steps_of_turn(self.run.config)
        self.batch: Batch = batch
        self.sampled: Sampled | None = self.rollouts.sample(state, self.held, following) if following < self.run.steps else None
        return state, self._batches(step, batch), newest

    def after(self, state: TrainState, metrics: Seen) -> tuple[TrainState, Seen]:
        """Judges the next rollout while the device learns, then waits for the device; the state with that rollout, and metrics."""
        newest: Seen = {}
        if self.sampled is not None:
            try:
                self.batch, newest = self.rollouts.judge(self.sampled)
            except (Abandoned, RewardFailed):
                self.batch, newest = self.rollouts.unjudged(self.sampled)
            self._note(newest)
        self._handed = time.monotonic()
        jax.block_until_ready((state, metrics))
        return dataclasses.replace(state, carry=state.carry | {AHEAD: self.batch}), {**newest, **self._timed()}
