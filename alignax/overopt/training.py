"""Measurements of a training run, as of one seed: its evaluations and its steps."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alignax.cli.comparison import evaluated
from alignax.run.log import SAMPLE, read_rows

QUANTITIES = {  # name in the log of a training run -> name in the laboratory
    "loss": "loss", "reward": "reward", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "gold": "gold", "kl": "kl",
    "entropy": "entropy", "completion_length": "length", "truncated_rate": "truncated", "distinct": "distinct",
    "logps/chosen_drift": "chosen_drift", "logps/rejected_drift": "rejected_drift", "disagreement": "disagreement",
}  # fmt: skip
PROXIES = ("reward", "margin")  # the first one found is the proxy: the reward online, the implicit reward offline
PARTS = 100  # about the most points of a curve over steps
MOST = 8  # ranges of steps that a sentence names


def of_training(workdir: Path) -> list[dict[str, Any]]:
    """The measurements of a training run: its evaluations and its steps.

    Raises:
      ValueError: for a folder without evaluations and steps.
    """
    logged = read_rows(workdir / "metrics.jsonl")
    evaluations, steps = evaluated(logged), [row for row in logged if "loss" in row]
    out = []
    if any(name in row for row in evaluations for name in QUANTITIES):
        own = measurement("training", workdir, evaluations)
        seen = [{name.removeprefix("eval/"): x for name, x in row.items() if name == "step" or name.startswith("eval/")} for row in logged]
        lost, apart = skipped([row["step"] for row in evaluations])
        words = [f"no evaluation between steps {a:,} and {b:,}, where others lie {apart:,} apart" for a, b in lost] + infinite(seen)
        dropped = [(a, b) for a, b in pairwise(own["step"]) if any(a < row["step"] < b for row in evaluations)]
        out.append(own | {"holes": lost + dropped, "missing": words, "samples": ends_of(read_rows(workdir / "samples.jsonl", SAMPLE))})
    if steps:
        lost, every = missing([row["step"] for row in steps], logged[-1]["step"])
        holes = [(a, b) for a, b in pairwise([row["step"] for row in steps]) if b - a > every]
        words = [f"metrics.jsonl has no row of {ranges(lost, every)}"] if lost else []
        parts = [part for own in split(steps, holes) for part in parts_of(own, len(own) / len(steps))]
        out.append(measurement("steps", workdir, parts) | {"holes": holes, "missing": words + infinite(steps)})
    if not out:
        raise ValueError(f"{str(workdir)!r} has no step and no evaluation in its metrics.jsonl; give the workdir of a run")
    return out


def measurement(kind: str, workdir: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Logged rows as curves, NaN if a quantity is missing. If some rows have both gold reward and KL, only those rows are used."""
    rows = [row for row in rows if row.get("kl") is not None and row.get("gold") is not None] or rows
    column = lambda name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)
    curves = {quantity: column(name) for name, quantity in QUANTITIES.items() if np.isfinite(column(name)).any()}
    if "kl" in curves:
        curves["kl"] = np.maximum(curves["kl"], 0.0)  # noise may make an estimate negative
    if proxies := [curves[name] for name in PROXIES if name in curves]:
        curves["proxy"] = proxies[0]
    return {
        "kind": kind, "arm": kind, "objective": workdir.name or workdir.resolve().name, "beta": None, "seeds": [0],
        "step": [row["step"] for row in rows], "curves": {name: [x.tolist()] for name, x in curves.items()},
    }  # fmt: skip


def missing(steps: Sequence[int], last: int) -> tuple[list[int], int]:
    """The steps up to `last` of which a log has no row, and the distance between rows: that of the steps of a turn.

    >>> missing([4, 8, 20], 24)
    ([12, 16, 24], 4)
    """
    every = math.gcd(*steps)
    return sorted({*range(every, last + 1, every)} - {*steps}), every


def skipped(steps: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """The pairs of neighbouring evaluations that lie farther apart than usual, and the usual distance; the last may be at any step.

    >>> skipped([0, 50, 100, 200, 250, 260])
    ([(100, 200)], 50)
    """
    apart = [b - a for a, b in pairwise(steps)]
    usual = int(np.median(apart[:-1])) if len(apart) > 2 else 0
    return [(a, b) for a, b in pairwise(steps) if usual and b - a > 1.5 * usual], usual


def infinite(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A text for each quantity that was not finite in some rows of a log, which have null in its place."""
    found = {quantity: [row["step"] for row in rows if name in row and row[name] is None] for name, quantity in QUANTITIES.items()}
    return [f"{quantity.replace('_', ' ')} is not finite at {ranges(steps, 1)}, and left out" for quantity, steps in found.items() if steps]


def ranges(steps: Sequence[int], every: int) -> str:
    """Steps in words, neighbours as a range.

    >>> ranges([4, 8, 12, 20], 4)
    'steps 4 to 12 and 20'
    """
    parts: list[list[int]] = []
    for step in steps:
        if parts and step - parts[-1][-1] == every:
            parts[-1].append(step)
        else:
            parts.append([step])
    words = [f"{own[0]:,} to {own[-1]:,}" if own[1:] else f"{own[0]:,}" for own in parts[:MOST]]
    words += [f"{len(steps) - sum(map(len, parts[:MOST])):,} further steps"] if parts[MOST:] else []
    return f"step{'s' * (len(steps) > 1)} {', '.join(words[:-1])}{' and ' * bool(words[1:])}{words[-1]}"


def split(rows: Sequence[Mapping[str, Any]], holes: Sequence[tuple[int, int]]) -> list[Sequence[Mapping[str, Any]]]:
    """The rows of a log in parts without a hole."""
    begins = [i for i, row in enumerate(rows) if row["step"] in {b for _, b in holes}]
    return [rows[i:j] for i, j in pairwise([0, *begins, len(rows)])]


def parts_of(rows: Sequence[Mapping[str, Any]], share: float = 1.0) -> list[dict[str, Any]]:
    """Means over neighbouring steps of a long log, or of a share of it; each keeps the number of its last step."""
    out = []
    for part in np.array_split(np.arange(len(rows)), min(max(1, round(share * PARTS)), len(rows))):
        own = [rows[i] for i in part]
        known = {name: [row[name] for row in own if row.get(name) is not None] for name in QUANTITIES}
        out.append({"step": own[-1]["step"]} | {name: float(np.mean(x)) for name, x in known.items() if x})
    return out


def ends_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of the first and of the last evaluation, grouped by prompt; empty if none were logged."""
    ends = [row for row in samples if row["step"] in (samples[0]["step"], samples[-1]["step"])]
    prompts = list(dict.fromkeys(row["prompt"] for row in ends))
    ends.sort(key=lambda row: prompts.index(row["prompt"]))
    scores = ("reward", "gold", "log_ratio")
    return [{"step": x["step"], "prompt": x["prompt"], "response": x["completion"]} | {s: x.get(s) for s in scores} for x in ends]
