"""Measurements of a training run, as of one seed: its evaluations and its steps."""

from collections.abc import Mapping, Sequence
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
PARTS = 100  # most points of a curve over steps


def of_training(workdir: Path) -> list[dict[str, Any]]:
    """The measurements of a training run: its evaluations and its steps.

    Raises:
      ValueError: for a folder without evaluations and steps.
    """
    logged = read_rows(workdir / "metrics.jsonl")
    evaluations, steps = evaluated(logged), [row for row in logged if "loss" in row]
    out = []
    if any(name in row for row in evaluations for name in QUANTITIES):
        out.append(measurement("training", workdir, evaluations) | {"samples": ends_of(read_rows(workdir / "samples.jsonl", SAMPLE))})
    if steps:
        out.append(measurement("steps", workdir, parts_of(steps)))
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


def parts_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over neighbouring steps of a long log; each keeps the number of its last step."""
    out = []
    for part in np.array_split(np.arange(len(rows)), min(PARTS, len(rows))):
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
