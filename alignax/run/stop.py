"""Signals that end a run: noted as they come, and agreed on by all processes."""

import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.host.workers import Abandoned

AGREE = 10  # steps between the processes' agreements on whether to stop
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}  # exit codes: 128 + the number


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
