"""Processes of a run: starts `jax.distributed` if the environment says that there are several, and keeps them in agreement.

Call `initialize` first of all: jax refuses it once an array exists or a device was asked for.
"""

import atexit
import importlib.metadata
import json
import math
import os
import platform
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.compiled import compile_anew, share_only
from alignax.link import Link, ended
from alignax.meeting import meet, open_link
from alignax.mesh import order_collectives
from alignax.text import short

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # the variables that jax reads
PACKAGES = (
    "alignax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
    "transformers", "tokenizers", "datasets", "ml-collections",
)  # fmt: skip
MESSAGE = 1000  # most characters of an error that are sent to the other processes
OFFER = 4096  # most bytes of what process 0 tells the others, for them to reach it
SECONDS = {
    "ALIGNAX_START_SECONDS": 280.0,  # in which all processes have to come; a little less than jax's own limit
    "ALIGNAX_LOST_SECONDS": 40.0,  # of silence that make a process lost
    "ALIGNAX_WAIT_SECONDS": 3600.0,  # that processes wait for one that is alive, where all have to agree
}
REMEDY = f"set {', '.join(EXPLICIT)}, or for a single host TPU_SKIP_MDS_QUERY=1"
_LINK: Link | None = None  # to the other processes


def initialize() -> None:
    """Joins the processes of this run; a single process is left alone, and its devices stay untouched.

    The first of these that applies is used: the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM
    step of several tasks (on GPUs jax gives each task one device: start a task per GPU, or set JAX_LOCAL_DEVICE_IDS); a Cloud TPU
    of several hosts.

    Raises:
        ValueError: some of the three variables are missing or not whole numbers, or a TPU VM could not tell its workers; or the processes
          have other versions of Python or of the packages that compute.
        OSError: some processes have not come in time, or cannot be reached.
    """
    global _LINK
    order_collectives()
    if not jax.distributed.is_initialized():
        arguments = next((found for detect in (_explicit, _slurm, _cloud_tpu) if (found := detect()) is not None), None)
        if arguments is None:
            return
        order_collectives(several=True)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without it, CPU processes cannot reduce together
        start, lost, patience = limits()
        address, index, count = (arguments.get(name) for name in ("coordinator_address", "process_id", "num_processes"))
        known = "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ  # else jax alone knows where process 0 is
        if known and address is not None and index is not None and count is not None and count > 1:
            _LINK = meet(index, count, address, start, lost, patience)
        _join(arguments, start, lost)
        compile_anew() if jax.default_backend() == "cpu" else share_only()
    elif _LINK is not None:
        return
    if jax.process_count() == 1:
        return
    if _LINK is None:
        _LINK = open_link(jax.process_index(), jax.process_count(), _share, *limits()[1:])
    atexit.register(_LINK.bye)
    check_alike({"installation": versions()})


def is_main() -> bool:
    """Whether this is process 0, which writes logs and reports; it asks jax for devices, so call it after `initialize`."""
    return jax.process_index() == 0


def link() -> Link | None:
    """The link of this process to the others; None for a single process."""
    return _LINK


@contextmanager
def together() -> Iterator[None]:
    """A context that fails on all processes if it fails on one, so that none waits forever for a process that is gone.

    All processes leave the context at the same time. Nothing inside may wait for other processes: no collective, and no sharded
    program whose result is read.

    Raises:
      ValueError: on the processes that did not fail, with the number and the message of the first process that did.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    if own := link():
        texts = own.gather("" if error is None else (str(error) or type(error).__name__)[:MESSAGE])
        failed = [i for i, text in enumerate(texts) if text]
        if failed and error is None:
            raise ValueError(f"process {failed[0]} could not go on: {texts[failed[0]]} (on {own.hosts[failed[0]]})")
    if error is not None:
        raise error


def check_alike(given: Mapping[str, str]) -> None:
    """Refuses a run whose processes were given different things, such as another command or file. Every process calls it.

    Args:
      given: name -> what this process was given, as text whose lines tell what differs; every process gives the same names.

    Raises:
      ValueError: on every process, with the processes that differ from process 0, the first line in which the first one does, and hosts.
    """
    own = link()
    if own is None:
        return
    every = [json.loads(text) for text in own.gather(json.dumps({name: digest(text) for name, text in given.items()}))]
    differ = [(name, [i for i, said in enumerate(every) if said[name] != every[0][name]]) for name in given]
    name, others = next((found for found in differ if found[1]), ("", []))
    if not others:
        return
    texts = own.gather(given[name])
    here, there = (texts[i].split("\n") for i in (0, others[0]))
    first = lambda lines, other: short(next((line for line in lines if line not in other), "nothing"))
    are = f"process {others[0]} was" if len(others) == 1 else f"processes {', '.join(map(str, others))} were"
    raise ValueError(
        f"{are} given another {name} than process 0 ({first(there, here)} on {own.hosts[others[0]]}, and {first(here, there)} on "
        f"{own.hosts[0]}); start all processes with the same command, files and code"
    )


def digest(text: str) -> str:
    """The CRC-32 and the length of a text."""
    return f"{zlib.crc32(text.encode()):08x} {len(text)}"


def versions() -> str:
    """The versions of Python and of the packages that compute, one a line."""
    found = {name: version for name in PACKAGES if (version := _version(name))}
    return "\n".join([f"python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())])


def from_main(text: str) -> str:
    """The text of process 0, on every process; every process has to call it."""
    own = link()
    return text if own is None else own.gather(text if own.index == 0 else "")[0]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def limits() -> list[float]:
    """The values of the environment variables `SECONDS`.

    Raises:
      ValueError: a value is no number above 0.
    """
    found = []
    for name, default in SECONDS.items():
        try:
            found.append(float(os.environ.get(name) or default))
        except ValueError:
            found.append(0.0)
        if not 0 < found[-1] < math.inf:
            raise ValueError(f"{name}={os.environ[name]!r} must be a number of seconds above 0")
    return found


def _join(arguments: dict[str, Any], start: float, lost: float) -> None:
    """Starts `jax.distributed`, in a thread, so that signals are heard while it waits for the other processes."""
    # jax's own preemption service takes SIGTERM for itself, from under the handlers of `alignax.interrupts`.
    jax.config.update("jax_enable_preemption_service", False)
    more: dict[str, Any] = {}  # where jax's own limits would come before ours: it ends a process with a stack trace in C++
    if start > SECONDS["ALIGNAX_START_SECONDS"]:
        more["initialization_timeout"] = math.ceil(start) + 20
    if 2 * lost > 100:
        more["heartbeat_timeout_seconds"] = math.ceil(2 * lost)
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**arguments, **more)
        except Exception as e:
            errors.append(e)

    thread, end = threading.Thread(target=join, daemon=True), time.monotonic() + start
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if time.monotonic() > end:
            ended(f"some processes of this run have not come within {start:.0f} s (ALIGNAX_START_SECONDS); start all of them", 1)
    if errors:
        raise errors[0]


def _share(text: str) -> str:
    """The text of process 0, of at most `OFFER` bytes, by way of the devices."""
    own = np.frombuffer(text.encode().ljust(OFFER, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own))).rstrip(b"\0").decode()


def _explicit() -> dict[str, Any] | None:
    values = {name: os.environ[name] for name in EXPLICIT if os.environ.get(name)}
    if not values:
        return None
    if missing := [name for name in EXPLICIT if name not in values]:
        raise ValueError(f"{', '.join(missing)} not set, but {', '.join(values)} set; set all of {', '.join(EXPLICIT)}, or none")
    address, *numbers = (values[name] for name in EXPLICIT)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"JAX_NUM_PROCESSES={numbers[0]!r} and JAX_PROCESS_ID={numbers[1]!r} must be whole numbers")
    count, index = map(int, numbers)
    if index >= count or not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}, and JAX_COORDINATOR_ADDRESS={address!r} HOST:PORT"
        )
    # With detection off, every local device belongs to this process.
    return dict(coordinator_address=address, num_processes=count, process_id=index, cluster_detection_method="deactivate")


def _slurm() -> dict[str, Any] | None:
    several = all(name in os.environ for name in SLURM) and int(os.environ["SLURM_NTASKS"]) > 1
    return dict(cluster_detection_method="slurm") if several else None


def _cloud_tpu() -> dict[str, Any] | None:
    # On import jax puts "tpu" into this option if it finds TPU chips and libtpu, and sets TPU_SKIP_MDS_QUERY if there are no
    # chips. So a machine without TPUs never waits for a metadata server that it does not have.
    if "tpu" not in (jax.config.values["jax_platforms"] or "").split(","):
        return None
    if hosts := os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES"):  # Kubernetes
        several = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    elif "TPU_SKIP_MDS_QUERY" in os.environ:
        several = False
    else:  # hosts of this slice, or several slices
        several = "," in _metadata("worker-network-endpoints") or "MEGASCALE_COORDINATOR_ADDRESS" in _metadata("tpu-env")
    return {} if several else None


def _metadata(key: str) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:  # a machine with TPUs that is not part of a Cloud TPU
            return ""
        raise ValueError(f"{url} answered {error.code}, so the TPU's workers are unknown; {REMEDY}") from error
    except OSError as error:
        raise ValueError(f"{url} did not answer ({error}), so the TPU's workers are unknown; {REMEDY}") from error
