"""What a compiled program computes, moves and sends, read from its text: FLOPs, bytes of memory, and collectives, loops counted by turns.

XLA's own counts take the body of a loop once. Here a loop whose counter goes from 0 to a constant counts so often. The turns of other loops
depend on data: `Program.unknown` has their number. Such a loop reads or writes arrays part by part, and counts for a share of the
parts, at least for one; if it follows a loop over larger parts, for a share of one of these, which it completes. `Shares` has the
share by the `jax.named_scope` of the loop. Of a choice every branch counts. Kernels are calls whose inside the text does not show.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

BYTES = {
    "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1,
}  # fmt: skip  # of other types one byte counts
ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that name values, or wait for what another began.
SILENT = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "iota", "send", "recv",
}  # fmt: skip
IN_PLACE = {"dynamic-update-slice", "scatter"}
SOME = {"dynamic-slice", "slice", "gather"}  # read only what they return


# The share of the parts for which loops count, by the innermost `jax.named_scope` around them; "" for all others.
Shares = Mapping[str, float]
NONE: Shares = MappingProxyType({})  # of one part at a time


class Instruction(NamedTuple):
    """A line of a program's text."""

    name: str
    result: str  # its type
    op: str
    operands: list[str]
    line: str


class Collective(NamedTuple):
    """A collective of a program: its largest array on a device, and the bytes that a device sends in it, over all turns of its loops."""

    kind: str
    dtype: str
    elements: int
    sent: float
    group: tuple[int, ...]  # the numbers of devices that it joins, of one group of them


class Program(NamedTuple):
    """A program's computations by name."""

    parts: Mapping[str, list[Instruction]]
    entry: str
    of: Mapping[str, Instruction]  # every instruction by its name

    @property
    def unknown(self) -> int:
        """The number of loops whose turns are not known, and which count once."""
        return sum(i.op == "while" and turns_of(self, i) is None for part in self.parts.values() for i in part)


def read(text: str) -> Program:
    """Reads the text of a compiled program, as `compiled.as_text()` gives it."""
    parts = {
        name: list(filter(None, map(_instruction, body.splitlines())))
        for name, body in re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}$", text, re.M | re.S)
    }
    entry = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)[0]
    return Program(parts, entry, {i.name: i for part in parts.values() for i in part})


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
    if found is None:
        return None
    depth, end = 1, found.end()
    while depth and end < len(line):
        depth += (line[end] == "(") - (line[end] == ")")
        end += 1
    return Instruction(found[1], found[2], found[3], re.findall(r"%([\w.\-]+)", line[found.end() : end]), line)


def executed(program: Program, shares: Shares = NONE) -> Iterator[tuple[Instruction, int, bool]]:
    """Every instruction of a program as often as it is called, with its turns, and whether it is a part of a fusion."""

    def within(name: str, turns: int, fused: bool) -> Iterator[tuple[Instruction, int, bool]]:
        before: list[int] = []  # parts of the loops so far whose turns are not known
        for i in program.parts[name]:
            yield i, turns, fused
            times = turns_of(program, i) if i.op == "while" else 1
            if times is None:
                parts = parts_of(program, i)
                larger = [n for n in before if 1 < n < parts and parts % n == 0]
                scope = re.search(r'op_name="(?:[^"]*[/(])?(\w+)\)*/while"', i.line)
                share = shares.get(scope[1] if scope else "", shares.get("", 0.0))
                times = max(1, math.ceil(share * (parts // max(larger) if larger else parts)))
                before.append(parts)
            called = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", i.line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", i.line):
                called += re.findall(r"[\w.\-]+", branches)
            for part in called:
                yield from within(part, turns * times, fused or i.op == "fusion")

    yield from within(program.entry, 1, False)


def turns_of(program: Program, loop: Instruction) -> int | None:
    """How often a loop turns whose counter goes from 0 to a constant, by 1 or by a constant; None for another loop."""
    condition, body = (re.findall(rf"{word}=%?([\w.\-]+)", loop.line)[0] for word in ("condition", "body"))
    compared = [i for i in program.parts[condition] if i.op == "compare" and "direction=LT" in i.line]
    if len(compared) != 1:
        return None
    counter, end = (program.of[name] for name in compared[0].operands)
    if counter.op != "get-tuple-element":
        return None
    if end.op == "get-tuple-element":  # a constant that the loop carries
        start = program.of[loop.operands[0]]
        end = program.of[start.operands[_index(end)]] if start.op == "tuple" else end
    most, step = _number(end), 1
    results = [i for i in program.parts[body] if i.op == "tuple"][-1:]
    added = program.of[results[0].operands[_index(counter)]] if results else None
    if added is not None and added.op == "add":
        step = _number(program.of[added.operands[1]]) or 1
    return None if most is None else -(-most // step)


def parts_of(program: Program, loop: Instruction) -> int:
    """The most parts of an array that a loop reads or writes part by part: a bound of its turns."""
    found, names = 1, re.findall(r"body=%?([\w.\-]+)", loop.line)
    for i in program.parts[names[0]]:
        names += re.findall(r"calls=%?([\w.\-]+)", i.line) if i.op == "fusion" else []
    for i in (i for name in names for i in program.parts[name] if i.op in ("dynamic-slice", "dynamic-update-slice")):
        changed = i.op == "dynamic-update-slice"
        whole, part = _shape(program.of[i.operands[0]].result), _shape(program.of[i.operands[1]].result if changed else i.result)
        starts = [program.of[name].op for name in i.operands[1 + changed :]]
        found = max(found, *(n // p for n, p, start in zip(whole, part, starts, strict=True) if start != "constant"), 1)
    return found


def _index(element: Instruction) -> int:
    return int(re.findall(r"index=(\d+)", element.line)[0])


def _number(constant: Instruction) -> int | None:
    found = re.search(r" constant\((\d+)\)", constant.line)
    return int(found[1]) if found else None


# FLOPs ----------------------------------------------------------------------------------------------------------------------


def flops(program: Program, shares: Shares = NONE) -> float:
    """The FLOPs of a program's products of matrices on a device, without those inside of kernels."""
    return float(sum(turns * _product(program, i) for i, turns, _ in executed(program, shares) if i.op in ("dot", "convolution")))


def _product(program: Program, i: Instruction) -> int:
    left, right = (_shape(program.of[name].result) for name in i.operands[:2])
    result = math.prod(_shape(i.result))
    if i.op == "dot":
        return 2 * result * math.prod(left[d] for d in _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", i.line))
    inputs, kernel, outputs = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", i.line)[0]
    features = right[kernel.index("i")]
    out, taps = _shape(i.result), 1.0
    for dim in (d for d in inputs if d.isdigit()):
        window = functools.partial(_window, i.line, int(dim), len([d for d in inputs if d.isdigit()]))
        places = left[inputs.index(dim)], right[kernel.index(dim)], out[outputs.index(dim)]
        taps *= _taps(*places, window) / places[2]
    return int(2 * result * features * taps)


def _window(line: str, dim: int, dims: int, field: str, default: str) -> str:
    found = re.search(rf"window=\{{[^}}]*\b{field}=([\dx_\-]+)", line)
    return found[1].split("x")[dim] if found else default


def _taps(size: int, kernel: int, out: int, window: Callable[[str, str], str]) -> int:
    """How many elements of the input, padding left out, meet the kernel along a dimension of a convolution, over all of its output."""
    stride, low = int(window("stride", "1")), int(window("pad", "0_0").split("_")[0])
    spread, apart = int(window("lhs_dilate", "1")), int(window("rhs_dilate", "1"))
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * apart - low
    return int(((places >= 0) & (places <= (size - 1) * spread) & (places % spread == 0)).sum())


def _shape(result: str) -> list[int]:
    found = ARRAY.search(result)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _numbers(pattern: str, line: str) -> list[int]:
    found = re.search(pattern, line)
    return [int(n) for n in found[1].split(",") if n] if found else []


# Memory ---------------------------------------------------------------------------------------------------------------------


def size(dims: str) -> int:
    """The elements of an array whose dimensions are written as "2,16"."""
    return math.prod(int(n) for n in dims.split(",") if n)


def bytes_of(result: str, everywhere: bool = False) -> int:
    """The bytes of a type's arrays in the main memory, or with `everywhere` also of those in faster memories."""
    found = ARRAY.findall(result)
    return sum(BYTES.get(dtype, 1) * size(dims) for dtype, dims, layout in found if everywhere or not re.search(r"S\([1-9]", layout))


def moved(program: Program, shares: Shares = NONE) -> float:
    """The bytes that a program reads from a device's main memory and writes to it.

    Arrays that XLA holds in faster memory count when they are copied there. Of a slice, and of an array that is changed in place, the part
    counts. What a kernel reads more than once counts once, and what a collective in a fusion writes does not count.
    """
    return float(sum(turns * _bytes(program, i) for i, turns, fused in executed(program, shares) if not fused))


def _bytes(program: Program, i: Instruction) -> int:
    operand = lambda n: bytes_of(program.of[i.operands[n]].result)
    if (
        i.op in SILENT
        or i.op.endswith(("-done", "-update"))
        or 'custom_call_target="AllocateBuffer"' in i.line
        or "AsyncCollective" in i.line
    ):
        return 0
    if i.op in ("copy-start", "slice-start"):
        arrays = [found[0] for found in ARRAY.finditer(i.result)][:2]
        least = min(bytes_of(a, everywhere=True) for a in arrays)
        return sum(least for a in arrays if bytes_of(a))
    if i.op == "fusion":
        return _fusion(program, i)
    if i.op in SOME:
        return 2 * bytes_of(i.result)
    if i.op in IN_PLACE:
        return 2 * operand(1 if i.op == "dynamic-update-slice" else 2)
    result = (
        max(map(bytes_of, (found[0] for found in ARRAY.finditer(i.result))), default=0) if i.op.endswith("-start") else bytes_of(i.result)
    )
    return result + sum(operand(n) for n in range(len(i.operands)))


def _fusion(program: Program, i: Instruction) -> int:
    part = _called(i)

    def written(name: str, result: str) -> int:
        inner = program.of[name]
        if inner.op == "bitcast":
            return written(inner.operands[0], result)
        if inner.op == "tuple":
            arrays = [found[0] for found in ARRAY.finditer(result)]
            return sum(written(own, array) for own, array in zip(inner.operands, arrays, strict=False))
        if inner.op == "get-tuple-element":
            return written(inner.operands[0], result)
        if inner.op == "parameter" or "AsyncCollective" in inner.line:  # what a collective that goes on in several fusions carries along
            return 0
        if inner.op in IN_PLACE and bytes_of(result):
            return bytes_of(program.of[inner.operands[1 if inner.op == "dynamic-update-slice" else 2]].result, everywhere=True)
        return bytes_of(result)

    total = written(next(inner for inner in program.parts[part] if "ROOT" in inner.line.split("=")[0]).name, i.result)
    for n, name in enumerate(i.operands):
        whole, taken = bytes_of(program.of[name].result), _taken(program, part, n)
        total += whole if taken is None else min(whole, taken)
    return total


def _called(fusion: Instruction) -> str:
    return re.findall(r"calls=%?([\w.\-]+)", fusion.line)[0]


def _taken(program: Program, part: str, argument: int) -> int | None:
    """The bytes that a fusion reads of an argument of which it takes slices alone; None if it takes the whole."""

    def of(name: str) -> int | None:
        total = 0
        for user in (user for user in program.parts[part] if name in user.operands):
            first = user.operands[0] == name and name not in user.operands[1:]
            if user.op == "bitcast":
                own = of(user.name)
            elif user.op == "fusion":
                each = [_taken(program, _called(user), n) for n, operand in enumerate(user.operands) if operand == name]
                own = None if None in each else sum(x for x in each if x is not None)
            elif user.op in SOME and first:
                own = bytes_of(user.result, everywhere=True)
            elif user.op in IN_PLACE and first:
                own = 0
            else:  # carried along alone, in a tuple or by a collective
                own = 0 if user.op == "tuple" or "AsyncCollective" in user.line else None
            if own is None:
                return None
            total += own
        return total

    parameter = next(i for i in program.parts[part] if i.op == "parameter" and re.findall(r"parameter\((\d+)\)", i.line) == [str(argument)])
    return of(parameter.name)


# Collectives ----------------------------------------------------------------------------------------------------------------


def collectives(program: Program, shares: Shares = NONE) -> list[Collective]:
    """The collectives of a program. Several slices run one program each, so these are the collectives of a slice.

    Bytes are those of rings: of n devices each sends (n - 1) / n of the larger of a collective's input and output, and twice that in an
    all-reduce. A permutation sends its array.
    """
    found: list[Collective] = []
    chained: set[str] = set()  # an asynchronous collective is in each of the fusions that hide it, with one channel and a place in a chain
    inside = {i.name: name for name, part in program.parts.items() for i in part}
    for i, turns, _ in executed(program, shares):
        if i.op.removesuffix("-start") not in KINDS:
            continue
        if "chain_id=" in i.line:
            channel = re.findall(r"channel_id=\d+", i.line)[0]
            if channel in chained:
                continue
            chained.add(channel)
        found.append(_collective(i, turns, inside[i.name].startswith("all-reduce-scatter")))
    return found


def sent_between(program: Program, slices: int, shares: Shares = NONE) -> dict[str, float]:
    """The bytes that a device of a TPU slice sends to other slices, by kind of collective; its own slice has reduced that before."""
    found: dict[str, float] = {}
    for i, turns, _ in executed(program, shares):
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.line)
        if i.op == "send" and kind:
            part = max(BYTES.get(dtype, 1) * size(dims) for dtype, dims, _ in ARRAY.findall(i.result))
            name = kind[1].lower().replace("_", "-")
            found[name] = found.get(name, 0.0) + part * (2 if name == "all-reduce" else 1) * (slices - 1) / slices * turns
    return found


def _collective(i: Instruction, turns: int, scatter: bool) -> Collective:
    arrays = [(BYTES.get(dtype, 1) * size(dims), dtype, size(dims)) for dtype, dims, _ in ARRAY.findall(i.result)]
    bytes_, dtype, elements = max(arrays)
    kind, own = i.op.removesuffix("-start"), group(i.line)
    if kind == i.op:  # the result of a start has the input too
        bytes_ = sum(array[0] for array in arrays)
    if kind == "collective-permute":
        return Collective(kind, dtype, elements, bytes_ * turns, own)
    n = len(own)
    if kind == "reduce-scatter":
        bytes_, elements = bytes_ * n, elements * n
    # An all-reduce of which each device keeps its slice is TPU's other form of a reduce-scatter.
    return Collective(kind, dtype, elements, bytes_ * (2 if kind == "all-reduce" and not scatter else 1) * (n - 1) / n * turns, own)


def group(line: str) -> tuple[int, ...]:
    """The devices of the first group that a collective joins: groups are listed, or axes of an array of all devices are."""
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if listed := pair or re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(int(n) for n in ",".join(listed.groups()).split(","))
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(_numbered(shape[3], shape[4]).reshape(int(shape[1]), int(shape[2]))[0].tolist())
    sizes, order, axes = re.findall(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", line)[0]
    dims = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
    joined = [list(dims).index(axis) for axis in re.findall(r"'(\w+)'", axes)]
    ids = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    numbers = _numbered(ids[1], ids[2]) if ids else np.arange(math.prod(dims.values()))
    moved = np.moveaxis(numbers.reshape(list(dims.values())), joined, range(-len(joined), 0))
    return tuple(moved.reshape(-1, math.prod(dims[name] for i, name in enumerate(dims) if i in joined))[0].tolist())


def _numbered(dims: str, order: str | None) -> np.ndarray:
    numbers = np.arange(size(dims)).reshape([int(n) for n in dims.split(",")])
    return (numbers.transpose([int(n) for n in order.split(",")]) if order else numbers).ravel()
