"""The machine that a bench runs on: processor, rate of matrix products, rate of copies, versions, commit."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from alignax.chips import peak
from alignax.overopt.laboratory import made_by

REPEATS = 10  # of which the best counts


def described(devices: list[Any], dtype: Any) -> dict[str, Any]:
    """The machine, with the rates of one device in `dtype`, measured now.

    `rate` is FLOP/s of the roof: a chip's from the table, else the measured one. On a CPU rates are per CPU second of the process, for all
    its threads together, and a CPU counts as one device however many are simulated on it.
    """
    one, cpu = devices[0], devices[0].platform == "cpu"
    measured, made = matrix_rate(dtype, cpu), made_by(Path(__file__))
    return {
        "processor": made["processor"],
        "platform": one.platform,
        "devices": len(devices),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": jnp.dtype(dtype).name,
        "rate": (None if cpu else peak(one.device_kind)) or measured,
        "rate_from": "chip table, bfloat16" if not cpu and peak(one.device_kind) else f"measured, {jnp.dtype(dtype).name}",
        "matrix_rate": measured,
        "copy_rate": copy_rate(cpu),
        "seconds": "CPU seconds" if cpu else "seconds",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "alignax": made["alignax"],
        "commit": made["commit"],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def matrix_rate(dtype: Any, cpu: bool) -> float:
    """The FLOPs of a matrix product per second, or on a CPU per CPU second."""
    size = 1024 if cpu else 8192
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / quickest(jax.jit(lambda x: x @ x * 1e-3), x, cpu)


def copy_rate(cpu: bool) -> float:
    """The bytes that are read and written per second, or on a CPU per CPU second, by an addition over an array beyond any cache."""
    x = jnp.ones(1 << (26 if cpu else 28), jnp.float32)
    return 2 * x.nbytes / quickest(jax.jit(lambda x: x + 1), x, cpu)


def quickest(program: Callable, x: jax.Array, cpu: bool) -> float:
    """The least seconds of a call, after the first; on a CPU the CPU seconds."""
    clock = time.process_time if cpu else time.perf_counter
    jax.block_until_ready(program(x))
    taken = []
    for _ in range(REPEATS):
        began = clock()
        jax.block_until_ready(program(x))
        taken.append(clock() - began)
    return min(taken)
