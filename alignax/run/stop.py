"""Signals that stop a run: each process notes them, and all processes agree to stop at the same step."""

import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.host.workers import Abandoned

AGREE = 10  # steps between two agreements of the processes on whether to stop
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}  # exit codes: 128 + the number


class Stop:
    """Notes SIGTERM, Ctrl-C and SIGHUP, so that the loop can save before it ends; a second Ctrl-C ends the run at once.

    Ignored signals stay ignored: under `nohup`, a run goes on without a terminal.
    """

    def __enter__(self) -> "Stop":
        self.signal = self._looks = 0  # number of the signal that came; 0: none
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
