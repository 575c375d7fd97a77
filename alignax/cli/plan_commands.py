"""The command `alignax plan`: what a run takes on TPU slices that are not at hand."""

import datetime
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax

from alignax import output, paths
from alignax.config import Experiment, load_experiment
from alignax.config.blame import refusing
from alignax.mesh import words
from alignax.run.forecast import HEAD, Forecast, as_json, forecast, row, traffic
from alignax.run.plan import topology_mesh
from alignax.run.planned import facts
from alignax.run.prepare import Run, prepare
from alignax.run.programs import programs
from alignax.run.start import check_step
from alignax.run.summary import remat, sizes
from alignax.text import table

REMATS = ("none", "dots", "attention", "full")


def plan(file: str, overrides: Sequence[str], topology: str, slices: int, search: bool = False, out: str = "", force: bool = False) -> None:
    """`alignax plan`: compiles every program of a run for TPU slices ahead of time, and prints what each takes and how long at least.

    Args:
      file: the experiment file.
      overrides: fields of the config, FIELD=VALUE.
      topology: the chips of a slice, such as "v5e:16x16".
      slices: the number of slices; 0: as the config says.
      search: then tries other meshes, remats and microbatches for the training program, and prints the best first.
      out: a file for JSON too, "-" for JSON only, or empty.
      force: replaces an existing file.

    Raises:
      BadInput: for bad input, and after the table for a run that does not fit.
    """
    with refusing():
        if out not in ("", "-"):
            output.claim(paths.of(out), force=force)
        own = [*overrides, *([f"mesh.slices={slices}"] if slices else [])]
        experiment = load_experiment(file, own)
        if experiment.main is not None and not experiment.config.model.path:
            raise ValueError(f"{file} writes its own model or runs several stages; give --config.model.path and --config.data.train")
        run = prepared(experiment, topology)
        check_step(run)
        every = programs(run)
        found = {name: forecast(run, name, program) for name, program in told(every.items(), len(every))}
        tried = searched(experiment, topology, run, found["train"]) if search else []
        if out != "-":
            print("\n".join(text(run, topology, found)))
            if tried:
                print("\nmeshes, remats and microbatches of the training program, the best first")
                print(table([["choice", *HEAD[1:]], *(row(name, f) for name, f in tried)]))
        if out:
            about = {"topology": topology, "mesh": dict(run.mesh.shape), "slices": max(run.config.mesh.slices, 1), "made": versions()}
            output.write_json(about | {"facts": facts(run), "programs": as_json(found), "search": as_json(dict(tried))}, out)
        if beyond := [name for name, f in found.items() if not f.fits]:
            raise ValueError(
                f"{', '.join(beyond)} of {file} {'does' if len(beyond) == 1 else 'do'} not fit into a chip of {topology}; take more chips, "
                "a larger mesh.fsdp, more microbatches, or shorter rows; --search tries some"
            )


def prepared(experiment: Experiment, topology: str) -> Run:
    """The run of an experiment on the chips of a topology."""
    return prepare(experiment, topology_mesh(topology, experiment.config.mesh))


def versions() -> dict[str, str]:
    """What a plan was made with, and when."""
    return {name: version(name) for name in ("alignax", "jax", "libtpu")} | {"date": datetime.date.today().isoformat()}


def text(run: Run, topology: str, found: dict[str, Forecast]) -> Iterator[str]:
    """The lines of a plan."""
    several = f"{run.config.mesh.slices} slices of " if run.config.mesh.slices > 1 else ""
    made = versions()
    yield f"{sizes(run)}; {several}{topology}, mesh {words(run.mesh)}"
    yield from remat(run)
    yield table([HEAD, *(row(name, f) for name, f in found.items())])
    if loops := {name: f.loops for name, f in found.items() if f.loops}:
        yield f"loops whose turns depend on data, counted for an average batch, of decoding for one token: {loops}"
    if len(rows := traffic(found)) > 1:
        yield "\nsent by a chip, by kind of collective and mesh axes\n" + table(rows)
    yield (
        "\nof one chip; seconds: from the slowest of chip, memory and networks at published rates, to their sum, if nothing overlaps; no "
        f"rate was measured. Compiled by libtpu {made['libtpu']}, jax {jax.__version__}, {made['date']}"
    )


def told(each: Any, count: int) -> Iterator[Any]:
    """The items one after another; says on stderr which is compiled now."""
    for i, (name, item) in enumerate(each):
        print(f"compiling {name} ({i + 1} of {count})", file=sys.stderr, flush=True)
        yield name, item


def searched(experiment: Experiment, topology: str, run: Run, own: Forecast) -> list[tuple[str, Forecast]]:
    """The training program under other meshes, then with the best mesh under other remats, then other microbatches; the best first."""
    size, least = run.mesh.size, max(run.config.mesh.slices, 1)
    fixed = run.mesh.shape["member"] * run.mesh.shape["context"]
    meshes = [
        (least * data, tensor)
        for data, tensor in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))
        if size % (fixed * least * data * tensor) == 0
    ]
    found = {named(run): (own, {})}

    def attempt(fields: dict[str, Any]) -> None:
        config = experiment.config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        try:
            other = prepared(experiment._replace(config=config), topology)
        except ValueError as e:
            print(f"left out {fields}: {e}", file=sys.stderr)
            return
        if (name := named(other)) not in found:
            print(f"compiling {name}", file=sys.stderr, flush=True)
            found[name] = (forecast(other, "train", programs(other)["train"]), fields)

    for data, tensor in meshes:
        attempt({"mesh.data": data, "mesh.fsdp": size // (fixed * data * tensor), "mesh.tensor": tensor})
    first = min(found.values(), key=lambda each: rank(each[0]))[1]
    for policy in REMATS:
        attempt(first | {"model.remat": policy})
    first = min(found.values(), key=lambda each: rank(each[0]))[1]
    for parts in (run.config.microbatches * 2, run.config.microbatches // 2):
        if parts:
            attempt(first | {"microbatches": parts})
    return sorted(((name, f) for name, (f, _) in found.items()), key=lambda each: rank(each[1]))


def named(run: Run) -> str:
    """The choices of a run that a search varies, in words."""
    return f"{words(run.mesh)}, remat {run.config.model.remat}, {run.config.microbatches} microbatches"


def rank(f: Forecast) -> tuple[bool, float, int]:
    """What is better comes first: it fits, takes less time in the longest, and less memory."""
    return not f.fits, f.span[1], f.memory
