"""Processes of a run: starts `jax.distributed` if the environment says that there are several, and keeps them in agreement.

Call `initialize` first of all: jax refuses it once an array exists or a device was asked for.
"""

import os
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
from alignax.mesh import order_collectives
from alignax.text import short

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # the variables that jax reads
MESSAGE = 1000  # bytes of an error that are sent to the other processes
REMEDY = f"set {', '.join(EXPLICIT)}, or for a single host TPU_SKIP_MDS_QUERY=1"


def initialize() -> None:
    """Joins the processes of this run; a single process is left alone, and its devices stay untouched.

    The first of these that applies is used: the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM
    step of several tasks (on GPUs jax gives each task one device: start a task per GPU, or set JAX_LOCAL_DEVICE_IDS); a Cloud TPU
    of several hosts.

    Raises:
        ValueError: some of the three variables are missing or not whole numbers, or a TPU VM could not tell its workers.
    """
    order_collectives()
    if jax.distributed.is_initialized():
        return
    for detect in (_explicit, _slurm, _cloud_tpu):
        if (arguments := detect()) is not None:
            order_collectives(several=True)
            jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without it, CPU processes cannot reduce together
            jax.distributed.initialize(**arguments)
            compile_anew() if jax.default_backend() == "cpu" else share_only()
            return


def is_main() -> bool:
    """Whether this is process 0, which writes logs and reports; it asks jax for devices, so call it after `initialize`."""
    return jax.process_index() == 0


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
    if jax.process_count() > 1:
        texts = _gathered("" if error is None else str(error) or type(error).__name__, MESSAGE)
        failed = [i for i, text in enumerate(texts) if text]
        if failed and error is None:
            raise ValueError(f"process {failed[0]} could not go on: {texts[failed[0]]}")
    if error is not None:
        raise error


def check_alike(given: Mapping[str, str]) -> None:
    """Refuses a run whose processes were given different things, such as another command or file. Every process calls it.

    Args:
      given: name -> what this process was given, as text whose lines tell what differs; every process gives the same names.

    Raises:
      ValueError: on every process, with the first process that differs from process 0, and the first line in which it does.
    """
    if jax.process_count() == 1:
        return
    own = np.array([[zlib.crc32(text.encode()), len(text.encode())] for text in given.values()], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(own))
    differ = np.argwhere((every != every[0]).any(-1))
    if not len(differ):
        return
    process, place = differ[0].tolist()
    name = list(given)[place]
    texts = _gathered(given[name], int(every[:, place, 1].max()))
    here, there = (texts[i].split("\n") for i in (0, process))
    first = lambda own, other: short(next((line for line in own if line not in other), ""))
    raise ValueError(
        f"process {process} was given another {name} than process 0 ({first(there, here)} and {first(here, there)}); start all processes "
        "with the same command, files and code"
    )


def from_main(text: str) -> str:
    """The text of process 0, on every process; every process has to call it."""
    if jax.process_count() == 1:
        return text
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    own = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own))).decode()


def _gathered(text: str, most: int) -> list[str]:
    """The texts of all processes, each cut to `most` bytes."""
    own = np.frombuffer(text.encode()[:most].ljust(most, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(own)]


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
