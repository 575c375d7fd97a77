"""The handling of signals on the command line; this module imports little, so that the handlers are in place before other imports."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}  # exit codes: 128 + the number
DEAF = ("_xla_gc_callback", "__del__")  # functions that the garbage collector calls, where errors are lost
IMPORTS = "<frozen importlib"  # how the file names of Python's own import functions begin


class Interrupted(KeyboardInterrupt):
    """Raised where one of `SIGNALS` ends a command; `number` is that of the signal."""

    def __init__(self, number: int):
        """Takes the number of the signal."""
        super().__init__(number)
        self.number = number


def number_of(error: KeyboardInterrupt) -> int:
    """The number of the signal behind an exception, which may be Python's own for Ctrl-C."""
    return error.number if isinstance(error, Interrupted) else signal.SIGINT


def told(number: int) -> str:
    """The line with which a signal ends a command."""
    return "alignax: interrupted" if number == signal.SIGINT else f"alignax: stopped by {SIGNALS[signal.Signals(number)]}"


def leave(line: str, number: int) -> int:
    """Prints the last line of a command that a signal has ended, unless the console has gone, as after SIGHUP; returns the exit code.

    One of several processes ends here: at its regular end jax waits for the others, which may wait for this one.
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (else Python fails to flush it, and ends with 120)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        _exit(line, number)
    return 128 + number


def leave_process(code: int) -> None:
    """Ends the process, if a signal has ended its command and it is the only one.

    At the regular end of Python, jax waits for a compilation that the signal has interrupted, which may take minutes.
    """
    if code - 128 not in set(SIGNALS) or ("jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the console has gone, or was being written to
            stream.flush()
    os._exit(code)


def compiling(frame: FrameType | None) -> bool:
    """Whether a frame of Python's stack, or one above it, is that of a function of jax which compiles a program."""
    while frame is not None:
        if "compile" in frame.f_code.co_name and f"{os.sep}jax{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _exit(line: str, number: int) -> None:
    """Ends the process at once; of several, the others are told the line."""
    with suppress(Exception):  # the console has gone, or was being written to
        sys.stdout.flush()
    if (own := link()) is not None:
        own.tell(line, 128 + number)
    os._exit(128 + number)


def link() -> Any:
    """The `alignax.link.Link` of this process; None for a single process, or where the processes are not connected yet."""
    return sys.modules["alignax.distributed"].link() if "alignax.distributed" in sys.modules else None


def install() -> None:
    """Installs the handler of `SIGNALS` that raises `Interrupted`, where Python's default is in place and this is the main thread."""
    import threading

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, handler(told))


def handler(line: Callable[[int], str]) -> Callable[[int, FrameType | None], Any]:
    """A handler of signals that raises `Interrupted`, except where the exception would be lost.

    In functions that the garbage collector calls, such as jax's callback, the signal is repeated a moment later. While a module is
    imported, the process ends at once, with the line for the signal's number: there the exception is swallowed by callbacks of Python's
    import, or turned into another one by C modules; in the `exec` of a named tuple, it makes Python end by a signal, whatever exit code is
    asked for.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in DEAF:
                from threading import Timer

                Timer(0.01, os.kill, (os.getpid(), number)).start()
                return
            if frame.f_code.co_filename.startswith(IMPORTS):
                with suppress(OSError):
                    print(line(number), file=sys.stderr, flush=True)
                _exit(line(number), number)
            frame = frame.f_back
        raise Interrupted(number)

    return interrupt
