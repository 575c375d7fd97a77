"""Compiled programs on disk: what one start has compiled, the next one reads. And the count of both."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import jax

from alignax import paths

MOST = 8 << 30  # bytes of programs that are kept


def keep() -> None:
    """Lets jax keep compiled programs in `folder()`, by default and where that can be written.

    The variables of jax have the last word: JAX_COMPILATION_CACHE_DIR names another folder (empty: none), which may be on a bucket, and
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. The key of a program has its code and shapes, the versions of jax and XLA, their
    flags, and the kind of the device with the features of its processor.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # jax leaves out what compiles within a second
    said = jax.config.values["jax_compilation_cache_dir"]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or said:
        check_place(said or "")
        return
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write a program there can run it here
        if not os.access(place, os.W_OK | os.X_OK):
            return
        prune(place)
    except (OSError, RuntimeError):  # no home folder
        return
    # A disk that is full by now, or an entry that another process is writing, costs a compilation and nothing else.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(place))


def check_place(said: str) -> None:
    """Refuses a folder of compiled programs on a bucket that cannot be written.

    Raises:
      ValueError: with the cause and the remedy.
    """
    from alignax import output  # which imports this module

    if "://" not in said:
        return
    paths.check(said, "JAX_COMPILATION_CACHE_DIR")
    if why := output.closed(paths.of(said) / "trial"):
        raise ValueError(f"JAX_COMPILATION_CACHE_DIR {said!r} cannot be written: {why}")


def folder() -> Path:
    """The default folder of compiled programs, in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignax" / "programs"


def prune(place: Path, most: int = MOST) -> None:
    """Deletes those programs of a folder that were not read for longest, until the others have at most `most` bytes."""
    files = sorted(((s.st_atime, s.st_size, entry.path) for entry in os.scandir(place) if (s := entry.stat())), reverse=True)
    kept = 0
    for _, size, path in files:
        kept += size
        if kept > most:
            with suppress(OSError):  # another process may have deleted it
                os.unlink(path)


def compile_anew() -> None:
    """Turns the cache off in this process, whoever turned it on.

    For several CPU devices, of one or of several processes. A CPU program that is read from the cache has lost the order of its collectives
    (see `alignax.mesh.order_collectives`): its devices may enter different ones, and wait for one another for ever. Seen with jax 0.10.2.
    """
    jax.config.update("jax_enable_compilation_cache", False)


def share_only() -> None:
    """Leaves the default folder, in one of several processes; a folder that the user named stays.

    Only process 0 writes to the cache of jax. In a folder that every host has for itself, process 0 would find programs which the others
    must compile. On GPUs these would then wait for process 0, since processes that compile choose their kernels together.
    """
    with suppress(RuntimeError):  # no home folder, hence no default
        if jax.config.values["jax_compilation_cache_dir"] == str(folder()) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", None)


class Counted:
    """A count of the programs that this process has compiled or read from the cache."""

    def __init__(self):
        """Starts the count at 0. jax keeps listeners forever, so one count serves the whole process."""
        self.programs = self.read = 0  # all, and those of them that were read
        jax.monitoring.register_event_duration_secs_listener(self._made)
        jax.monitoring.register_event_listener(self._read)

    def _made(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.programs += event.endswith("/backend_compile_duration")  # also of a program that was read

    def _read(self, event: str, **kwargs: str | int) -> None:
        self.read += event.endswith("/compilation_cache/cache_hits")

    def __str__(self) -> str:
        """The count in words, with the folder of the cache."""
        place = jax.config.values["jax_compilation_cache_dir"] if jax.config.values["jax_enable_compilation_cache"] else ""
        cache = f"{self.read} read from {place}" if place else "none is kept"
        return f"programs: {self.programs - self.read} compiled, {cache}"


COUNTED = Counted()
