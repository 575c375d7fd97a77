"""The handling of Ctrl-C on the command line; this module imports little, so that the handler is in place before other imports."""

import os
import signal
import sys
from types import FrameType

LINE = "alignax: interrupted"
CODE = 130  # the exit code of a command that Ctrl-C has ended
DEAF = ("_xla_gc_callback", "__del__")  # functions that the garbage collector calls, where errors are lost
IMPORTS = "<frozen importlib"  # how the file names of Python's own import functions begin


def install() -> None:
    """Installs `interrupt` as the handler of Ctrl-C, if Python's default handler is in place and this is the main thread."""
    import threading

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C with KeyboardInterrupt, except where the exception would be lost.

    In functions that the garbage collector calls, such as jax's callback, the signal is repeated a moment later. While a module is
    imported, the process ends at once: there the exception is swallowed by callbacks of Python's import, or turned into another one by C
    modules; in the `exec` of a named tuple, it makes Python end by a signal, whatever exit code is asked for.
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
