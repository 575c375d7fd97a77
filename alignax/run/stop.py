"""Signals that stop a run: each process notes them, and all processes agree to stop at the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.host.workers import Abandoned
from alignax.interrupts import SIGNALS, handler, leave, number_of

AGREE = 10  # steps between two agreements of the processes on whether to stop


class Stop:
    """Notes SIGTERM, Ctrl-C and SIGHUP, so that the loop can save before it ends; a second Ctrl-C ends the run at once.

    Ignored signals stay ignored: under `nohup`, a run goes on without a terminal.
    """

    def __enter__(self) -> "Stop":
        self.signal = self._looks = 0  # number of the signal that came; 0: none
        self._old = handled(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        restore(self._old)

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        if signal.SIGINT in self._old:
            signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def look(self) -> None:
        """Raises `Abandoned` if a signal came; called between parts of a rollout or evaluation, equally often in every process."""
        self._looks += 1
        if self.requested(self._looks):
            raise Abandoned(self.signal)

    def requested(self, turn: int, every: int = AGREE) -> bool:
        """Whether to stop after turn `turn`; several processes agree on it only every `every` turns, as that waits for the device."""
        if jax.process_count() == 1:
            return bool(self.signal)
        if turn % every:
            return False
        agreed = int(multihost_utils.process_allgather(np.array(self.signal)).max())
        if agreed:  # else a signal that came during the agreement would be lost; it counts in the next one
            self.signal = agreed
        return bool(agreed)


@contextmanager
def preparing() -> Iterator[None]:
    """A context in which a run is prepared: a signal ends it at once, since nothing is learnt yet, with a line as `Stop` has it.

    Raises:
      SystemExit: 128 + the number of the signal.
    """
    line = lambda number: f"stopped by {SIGNALS[signal.Signals(number)]} while the run was prepared; the same command prepares it again."
    old = handled(handler(line))
    try:
        yield
    except KeyboardInterrupt as e:
        raise SystemExit(leave(line(number_of(e)), number_of(e))) from None
    finally:
        restore(old)


def handled(by: Any) -> dict[int, Any]:
    """Sets the handler of the signals that stop a run, except of ignored ones; returns the earlier handlers."""
    return {n: signal.signal(n, by) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}


def restore(old: dict[int, Any]) -> None:
    """Sets the handlers back that `handled` has returned."""
    for number, by in old.items():
        signal.signal(number, by)
