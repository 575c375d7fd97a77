"""Signals that stop a run: each process notes them, and all processes agree to stop at the same step."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from alignax.distributed import link
from alignax.host.workers import Abandoned
from alignax.interrupts import SIGNALS, compiling, handler, leave, number_of


class Stop:
    """Notes SIGTERM, Ctrl-C and SIGHUP, so that the loop can save before it ends; a second Ctrl-C ends the run at once.

    Ignored signals stay ignored: under `nohup`, a run goes on without a terminal.
    """

    def __enter__(self) -> "Stop":
        self.signal = 0  # number of the signal that came; 0: none
        self._old = handled(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        restore(self._old)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if compiling(frame) and not self.signal:
            name, again = SIGNALS[signal.Signals(number)], "a second" if number == signal.SIGINT else "a"
            with suppress(OSError):  # the console has gone
                print(
                    f"{name} came while a program is compiled, which nothing can end: the run stops when that and the step with it are "
                    f"done, and saves; {again} Ctrl-C ends it at once, without saving.",
                    file=sys.stderr,
                    flush=True,
                )
        self.signal = number
        if own := link():
            own.ask(number)
        if signal.SIGINT in self._old:
            signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def look(self) -> None:
        """Raises `Abandoned` if a signal came; called between parts of a rollout or evaluation, equally often in every process."""
        if self.requested():
            raise Abandoned(self.signal)

    def requested(self) -> bool:
        """Whether to stop now; called equally often in every process, and of several true in all at the same call.

        That is the call after the one that is farthest when the signal comes. No call waits for a device.
        """
        if own := link():
            number = own.reached()
            self.signal = number or self.signal
            return bool(number)
        return bool(self.signal)


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
