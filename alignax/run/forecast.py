"""The forecast of a run on chips that need not be at hand: of each program memory, FLOPs, bytes moved and sent, its bound, and its time.

All figures are of one chip, and are read from the compiled program, see `alignax.hlo`. No rate was measured: the shortest time is that of
the slowest of chip, memory and networks at their published rates, see `alignax.chips`, and the longest is their sum, as if nothing
overlapped. A program is not faster than the first; the host, and rates that stay below the published ones, come on top of both.
"""

import functools
import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignax import chips, hlo, output
from alignax.compiled import folder, prune
from alignax.mesh import device_memory
from alignax.placement import OVER_DCN, box_of, rate, slices_of
from alignax.program import Program
from alignax.run.prepare import Run
from alignax.run.turns import batch_of, packed, shares_of, visited_pairs
from alignax.text import one_line

NAMES = 2  # the version of the scopes that a forecast reads from a program's text, which the lowered program does not show
TRAINING = ("train", "evaluate", "reference.cache")  # programs that read a batch


class Forecast(NamedTuple):
    """What a program takes on a chip."""

    memory: int  # bytes at its peak; 0: unknown, since the compiler refused it
    room: int  # bytes of a chip
    refused: str  # what the compiler said of a program that does not fit; empty: it compiled
    flops: float
    moved: float  # bytes of the main memory
    sent: dict[str, float]  # "KIND AXES" -> bytes, within and between slices
    seconds: dict[str, float]  # "compute", "HBM", "ICI" and "DCN", each alone; empty for a chip whose rates are not known
    tokens: float  # of a call, on all chips, see `real_tokens`
    loops: int  # whose turns depend on data
    compiling: float  # seconds

    @property
    def fits(self) -> bool:
        """Whether the program was compiled and takes no more than a chip has."""
        return not self.refused and self.memory <= self.room

    @property
    def bound(self) -> str:
        """What takes longest; empty if no time is known."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if any(self.seconds.values()) else ""

    @property
    def span(self) -> tuple[float, float]:
        """The shortest and the longest time of a call in seconds."""
        return max(self.seconds.values(), default=0.0), sum(self.seconds.values())


class Compiled(NamedTuple):
    """What the compiler made of a program."""

    text: str  # empty: it refused the program
    memory: int  # bytes at its peak
    refused: str  # what it said of a program that does not fit
    seconds: float  # that it took


def forecast(run: Run, name: str, program: Program) -> Forecast:
    """Compiles a program of a run for the devices of its mesh, unless an earlier plan has, and reads what it takes."""
    mesh = run.mesh
    room, tokens = device_memory(mesh), real_tokens(run, name)
    traced = program.traced()
    made = compiled(mesh, traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,)))
    if made.refused:
        return Forecast(0, room, made.refused, 0.0, 0.0, {}, {}, tokens, 0, made.seconds)
    read = hlo.read(made.text)
    decodes, own_rows = name.endswith("/decode"), packed(run)
    shares = {} if decodes else shares_of(run, own_rows)  # of decoding one token of each completion counts
    visited = None if decodes or own_rows is None else functools.partial(visited_pairs, run, own_rows, name)
    flops, moved = hlo.flops(read, shares) + kernel_flops(traced.jaxpr, visited), hlo.moved(read, shares)
    slices = slices_of(list(mesh.devices.flat))
    own = np.split(mesh.devices, len(slices), axis=mesh.axis_names.index(OVER_DCN))[0]  # all slices run the same
    within, between = hlo.collectives(read, shares), hlo.sent_between(read, len(slices), shares)
    sent = {f"{kind} {OVER_DCN} (DCN)": x for kind, x in between.items()}
    for c in within:
        key = f"{c.kind} {' x '.join(axes_of(mesh, own, c.group))}"
        sent[key] = sent.get(key, 0.0) + c.sent
    seconds = durations(own, flops, moved, within, sum(between.values()))
    return Forecast(made.memory, room, "", flops, moved, sent, seconds, tokens, read.unknown, made.seconds)


def compiled(mesh: Mesh, lowered: Any) -> Compiled:
    """Compiles a lowered program, or reads what an earlier plan has kept of the same program, devices, compiler and flags."""
    about = [(d.device_kind, d.id, getattr(d, "coords", None), getattr(d, "slice_index", None)) for d in mesh.devices.flat]
    compiler = [(name, version(name)) for name in ("jax", "jaxlib", "libtpu") if find_spec(name)]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    key = repr((NAMES, lowered.as_text(), mesh.shape, about, compiler, flags))
    known = folder().parent / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()}.json.gz"
    with suppress(OSError, EOFError, ValueError, TypeError):  # what is damaged or missing is compiled
        return Compiled(**json.loads(gzip.decompress(known.read_bytes())))
    began = time.perf_counter()
    try:
        program = lowered.compile()
        memory = program.memory_analysis().peak_memory_in_bytes
        made = Compiled(program.as_text(), memory, "", time.perf_counter() - began)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        made = Compiled("", 0, refusal(str(e)), time.perf_counter() - began)
    with suppress(OSError):  # what is not kept is compiled again
        known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with output.file(known, shared=True) as file:
            file.write_bytes(gzip.compress(json.dumps(made._asdict()).encode()))
        prune(known.parent)
    return made


def refusal(said: str) -> str:
    """What the compiler says of a program that does not fit, in short: "needs 39.62G of 15.75G"; of temporary arrays alone "or more"."""
    if used := re.search(r"Used ([\d.]+\w*) of ([\d.]+\w*)", said):
        return f"needs {used[1]} of {used[2]}"
    temporary = re.search(r"temporaries \(([\d.]+\w*)\) exceeds available HBM \(([\d.]+\w*)\)", said)
    return f"needs {temporary[1]} or more of {temporary[2]}" if temporary else one_line(ValueError(said))


def durations(own: np.ndarray, flops: float, moved: float, within: list[hlo.Collective], between: float) -> dict[str, float]:
    """The seconds that a chip, its memory and its networks take, each alone, at published rates; none for an unknown kind of device.

    Args:
      own: the devices of a slice, with a dimension for each mesh axis.
      flops: of products of matrices.
      moved: bytes of the main memory.
      within: the collectives of the slice.
      between: bytes that the chip sends to other slices.
    """
    devices = list(own.flat)
    peak, rates, box = chips.peak(devices[0].device_kind), chips.RATES.get(devices[0].device_kind), box_of(devices)
    if peak is None or rates is None or box is None:
        return {}
    sending = sum(c.sent / rate(box, c.group)[0] for c in within)
    return {"compute": flops / peak, "HBM": moved / rates.memory, "ICI": sending / rates.link, "DCN": between / rates.network}


def axes_of(mesh: Mesh, own: np.ndarray, group: tuple[int, ...]) -> list[str]:
    """The mesh axes that a group of the devices of a slice is spread over."""
    places = np.unravel_index(np.array(group), own.shape)
    return [axis for axis, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1]


def kernel_flops(jaxpr: Any, visited: Callable[[int], float] | None = None, turns: int = 1) -> float:
    """The FLOPs of the products inside of a traced program's Pallas kernels, as each device calls them.

    Every block of a kernel's grid counts, also those that a causal kernel leaves out: of long rows, up to twice as many as it computes.
    The grid of packed rows is as long as the list of pairs of blocks that see each other: `visited` tells their number in all calls of the
    loop over parts, from the blocks of a row.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        kernel = eqn.primitive.name == "pallas_call"
        times = turns * int(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else turns
        for inner in (x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)):
            if kernel:
                grid = eqn.params["grid_mapping"].grid
                calls = np.prod([n for n in grid if isinstance(n, int)], dtype=float)
                if visited is not None and len(grid) > sum(isinstance(n, int) for n in grid):
                    calls *= visited(eqn.outvars[0].aval.shape[0])
                total += times * calls * _products(inner)
            else:
                total += kernel_flops(inner, visited, times)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _products(jaxpr: Any) -> float:
    """The FLOPs of products in a kernel's body; of a choice the dearest branch, and loops inside by their length."""
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape) * np.prod([left[d] for d in contracted])
        own = [_products(x) for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        length = int(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else 1
        total += max(own, default=0.0) if eqn.primitive.name == "cond" else length * sum(own)
    return total


def real_tokens(run: Run, name: str) -> float:
    """The tokens of a call, without padding: those that an average batch of data holds, or of decoding one of each completion.

    Completions of rollouts count as long as they may be. Of programs that read no batch: 0.
    """
    config, examples, sampler = run.config, run.data.train.examples, name.rpartition("/")[0]
    if name.endswith("/decode"):
        return float(run.samplers[sampler].shape.slots)
    if name not in TRAINING:
        return 0.0
    batch = batch_of(run, name)
    if samples := config.rollout.samples:
        row, responses = float(examples.prompt_lengths.mean()) + config.rollout.max_new_tokens, samples
    else:
        row, responses = float(examples.lengths.mean()), examples.N
    return row * responses * batch * max(config.ensemble.members, 1)


def as_json(found: Mapping[str, Forecast]) -> dict[str, Any]:
    """The forecasts of programs by name, as values for JSON."""
    own = lambda f: f._asdict() | {"fits": f.fits, "bound": f.bound, "shortest": f.span[0], "longest": f.span[1]}
    return {name: own(f) for name, f in found.items()}


HEAD = ["program", "peak GB", "fits by GB", "TFLOP", "HBM GB", "ICI GB", "DCN GB", "bound", "seconds", "tokens/s", "compiled in s"]


def row(name: str, f: Forecast) -> list[str]:
    """The row of a program in a table under `HEAD`."""
    if f.refused:
        return [name, f.refused, "no", *[""] * 7, f"{f.compiling:.0f}"]
    between = sum(x for key, x in f.sent.items() if "(DCN)" in key)
    low, high = f.span
    rate = f"{f.tokens / high:,.0f} to {f.tokens / low:,.0f}" if f.tokens and low else ""
    fits = f"{(f.room - f.memory) / 1e9:.2f}" if f.fits else f"no, {(f.room - f.memory) / 1e9:.2f}"
    figures = [f"{x:.3g}" for x in (f.flops / 1e12, f.moved / 1e9, (sum(f.sent.values()) - between) / 1e9, between / 1e9)]
    return [name, f"{f.memory / 1e9:.2f}", fits, *figures, f.bound, f"{low:.3g} to {high:.3g}" if high else "", rate, f"{f.compiling:.0f}"]


def traffic(found: Mapping[str, Forecast]) -> list[list[str]]:
    """Rows of a table: the GB that a chip sends in each program, by kind of collective and mesh axes."""
    rows = [["program", "collective", "axes", "GB"]]
    for name, f in found.items():
        for key, sent in sorted(f.sent.items(), key=lambda own: -own[1]):
            if sent >= 1e6:
                rows.append([name, *key.split(" ", 1), f"{sent / 1e9:.3f}"])
    return rows
