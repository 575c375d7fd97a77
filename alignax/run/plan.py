"""The plan of a run, for a dry run: shapes, the compiler's estimate of memory, the config, and the first row of data.

Programs are compiled ahead of time from shapes alone, for the devices at hand or for a TPU slice that is not at hand (this needs
`libtpu`). The plan shows whether the run fits into memory.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.compiled import COUNTED
from alignax.config import flat
from alignax.data import decode_example
from alignax.losses.algebra import by_name
from alignax.losses.responses import differing
from alignax.models import hf
from alignax.run.prepare import Run
from alignax.run.programs import programs
from alignax.run.state import abstract_batches, abstract_state
from alignax.run.summary import remat, sizes
from alignax.text import short, table

# What keeps libtpu from asking for a TPU that is not there, with errors on the console, and from locking other processes out of itself.
DESCRIBING = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def topology_mesh(topology: str, shape: Mapping[str, int]) -> Mesh:
    """A mesh over the chips of TPU slices, such as "v5e:4x4", as the pod itself makes it. No chip need be at hand.

    Args:
      topology: the chips of a slice. One of v4 is a single device, as in a pod.
      shape: as of `alignax.mesh.make_mesh`; `slices` is the number of slices, 0 for one.

    Raises:
      ValueError: if libtpu is not installed, for a slice that it does not know, and for a mesh that is not possible on it.
    """
    from jax.experimental import topologies

    for name, value in DESCRIBING.items():
        os.environ.setdefault(name, value)
    slices = int(shape.get(meshes.SLICES, 0))
    options = ({"num_slices": slices} if slices > 1 else {}) | ({"chip_config_name": "megacore"} if topology.startswith("v4:") else {})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (RuntimeError, jax.errors.JaxRuntimeError) as e:
        if "not installed" in str(e):
            raise ValueError(f"the compiler of TPU slices is not installed, to plan for {topology}: pip install 'alignax[tpu]'") from e
        raise ValueError(
            f"TPU slice {short(topology)} is unknown to libtpu ({short(str(e))}); write KIND:XxY or KIND:XxYxZ with a multiple of 2 chips "
            "along the first two sides, such as v5e:4x4, v6e:16x16, v4:2x2x4 or v5p:4x4x8"
        ) from e
    return meshes.make_mesh(shape, devices)


def compile_step(run: Run) -> Any:
    """Compiles the training program for the run's mesh from shapes alone, see `alignax.program.Program.compiled`."""
    return programs(run)["train"].compiled(run.mesh.devices.flat[0].platform)


def memory(run: Run) -> str:
    """A table of the run's programs, with the memory in GB that each takes on a device according to the compiler."""
    platform = run.mesh.devices.flat[0].platform
    rows = [["memory of each program, per device", "arguments GB", "temporary GB", "total GB"]]
    for name, program in programs(run).items():
        found = program.compiled(platform).memory_analysis()
        sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
        rows.append([name, *(f"{x / 1e9:.3f}" for x in (*sizes[:2], sum(sizes)))])
    return table(rows)


def describe(run: Run) -> str:
    """The text that `alignax train --dry-run` prints."""
    state = abstract_state(run)
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    rows = [["parameter", "shape", "sharding", "MB per device"]]
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        rows.append([hf.leaf_name(path), str(x.shape), str(x.sharding.spec), f"{size(x) / 1e6:.3f}"])
    mixture = run.data.train.mixture
    batches = [(hf.leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(abstract_batches(run))]
    return "\n".join(
        [
            f"{sizes(run)}; mesh {meshes.words(run.mesh)}",
            table(rows),
            *(f"batch {n} {x.shape} (.., examples, responses, tokens), {x.sharding.spec}" for n, x in batches if n.endswith("tokens")),
            *remat(run),
            memory(run),
            str(COUNTED),
            f"steps {run.steps}",
            *filter(None, map(differing, by_name(run.learning.objectives, jnp.zeros((), jnp.int32)).values())),
            *(f"{split} data: {line}" for split, report in run.data.reports.items() for line in report.lines()),
            *(f"mixture: {line}" for line in (mixture.lines(run.steps * run.config.batch_size) if mixture else [])),
            "config " + json.dumps(flat(run.config), indent=2),
            "the first row of the first batch, scored tokens in [ ]:",
            decode_example(run.data.train.examples, int(run.data.train.rows(0)[0]), run.words.tokenizer),
            "dry run: nothing was written",
        ]
    )
