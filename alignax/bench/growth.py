"""How the cost of a training step on one device grows with each size, the others kept: time over model FLOPs, constant for linear cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from alignax.bench.case import Case
from alignax.bench.report import Found, matrix_cell, matrix_head
from alignax.text import markdown

SMALL = {"dim": 128, "layers": 2, "heads": 4, "kv_heads": 4, "vocab": 1024, "seq": 128, "prompt": 32, "batch_size": 8}
LINEAR = 0.1  # relative change of time over FLOPs that still counts as linear


class Axis(NamedTuple):
    """A size that grows."""

    letter: str
    method: str
    field: str
    values: Sequence[int]
    fields: dict[str, Any] = {}  # that differ from SMALL


AXES = (
    Axis("L, layers", "dpo", "layers", (2, 6, 12, 24)),
    Axis("T, tokens of a row", "dpo", "seq", (256, 1024, 4096), {"batch_size": 1}),
    Axis("N, samples of a prompt", "grpo", "rollout.samples", (2, 4, 8, 16), {"members": 1}),
    Axis("K, trained reward models", "ensemble", "members", (1, 2, 4, 8)),
    Axis("K, judges of samples", "grpo", "members", (1, 8)),
    Axis("V, vocabulary", "dpo", "vocab", (1024, 8192, 65536)),
    Axis("batch", "dpo", "batch_size", (4, 16, 64)),
)


def cases(overrides: Sequence[str], turns: int, folder: str) -> list[tuple[Axis, int, Case]]:
    """The cases of all sizes, with folders of their own in `folder`."""
    out = []
    for i, axis in enumerate(AXES):
        for value in axis.values:
            fields = [f"{name}={x}" for name, x in (SMALL | axis.fields).items()] + list(overrides) + [f"{axis.field}={value}"]
            case = Case(f"{axis.field} {value}", axis.method, "", fields, turns, False, f"{folder}/{i}_{value}", single=True)
            out.append((axis, value, case))
    return out


def seconds(found: Found) -> float:
    """The seconds of a step: on a CPU those of the processors, which other processes disturb less."""
    return found["cpu_s" if found["machine"]["platform"] == "cpu" else "wall_s"]


def growth_table(found: Sequence[tuple[Axis, int, Found]]) -> str:
    """The table of growth: a row for each size; times over FLOPs are relative to the first row of the axis."""
    matrix = matrix_head(found[0][2])
    rows = [["", "", "seconds a step", "model GFLOP", matrix, "ns per MFLOP", "against the first", f"linear within {LINEAR:.0%}"]]
    first: dict[str, float] = {}
    for axis, value, case in found:
        each = seconds(case) / case["model_flops"]
        base = first.setdefault(axis.letter, each)
        new = base == each
        verdict = "" if new else "yes" if abs(each / base - 1) <= LINEAR else "cheaper" if each < base else "no"
        rows.append([
            axis.letter if new else "", f"{value:,}", f"{seconds(case):.4g}", f"{case['model_flops'] / 1e9:.4g}", matrix_cell(case),
            f"{each * 1e15:,.0f}", f"{each / base:.2f}", verdict,
        ])  # fmt: skip
    return markdown(rows)
