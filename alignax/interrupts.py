"""Ctrl-C on the command line. This module imports next to nothing, so that it stands before all others are imported."""

import os
import signal
import sys
from types import FrameType

LINE = "alignax: interrupted"
CODE = 130  # the exit code of a command that Ctrl-C has ended
DEAF = ("_xla_gc_callback", "__del__")  # functions that the garbage collector calls, where errors are lost
IMPORTS = "<frozen importlib"  # how the file names of Python's own import functions begin


def install() -> None:
    """Makes `interrupt` the handler of Ctrl-C where Python's own one is it, in the main thread, which alone may."""
    import threading

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C as Python takes it, but where an error would be lost.

    In what the garbage collector calls, jax's callback say, it comes a moment later. While a module is imported, the process ends at
    once: an error there is swallowed by callbacks of Python's import, becomes another one in modules of C, and, in what `exec` runs for
    a named tuple, has Python end by a signal whatever code is asked for.
    """
    while frame is not None:
        if frame.f_code.co_name in DEAF:
            from threading import Timer

            Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        if frame.f_code.co_filename.startswith(IMPORTS):
            print(LINE, file=sys.stderr, flush=True)
            os._exit(CODE)
        frame = frame.f_back
    raise KeyboardInterrupt
