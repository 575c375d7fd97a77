"""Comparison of runs: a table, a line on the chosen responses, and the figure of reward overoptimisation.

Everything is read from the metrics.jsonl of the runs, so finished runs can be compared at any time.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignax import output, paths
from alignax.run.log import read_rows
from alignax.text import table

HELD = 1.0  # nats: a chosen log-prob that changes by at most this counts as held
PANELS = (  # metric, title, label of the y axis
    ("gold", "True objective", "gold reward of samples"),
    ("rewards/margins", "Training objective", "implicit reward, held-out margin"),
)


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The evaluation rows of a run in order of steps, with metric names without `eval/`.

    Raises:
      ValueError: for a workdir without evaluations.
    """
    found = evaluated(read_rows(paths.of(workdir) / "metrics.jsonl"))
    if not found:
        raise ValueError(f"{str(workdir)!r} has no evaluation in its metrics.jsonl; give the workdir of a run that evaluated")
    return found


def evaluated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluation rows of a log, with metric names without `eval/`, and without null values."""
    found = [row for row in rows if any(name.startswith("eval/") for name in row)]
    return [{name.removeprefix("eval/"): value for name, value in row.items() if value is not None} for row in found]


def summary_table(runs: Mapping[str, Path]) -> str:
    """A table of runs (name -> workdir): held-out log-probs and gold reward at the first and last evaluation, last accuracy and KL."""
    head = ["", "chosen logps", "drift", "rejected logps", "drift", "accuracy", "gold reward", "best (at step)", "KL"]
    return table([head, *(_cells(name, evaluations(workdir)) for name, workdir in runs.items())])


def _cells(name: str, rows: list[dict[str, Any]]) -> list[str]:
    first, last = rows[0], rows[-1]
    change = lambda metric: f"{first[metric]:.2f} -> {last[metric]:.2f}" if metric in first and metric in last else ""
    at_end = lambda metric, form: format(last[metric], form) if metric in last else ""
    error = f" +- {last['gold_se']:.2f} ({last['prompts']:.0f} prompts)" if "gold_se" in last else ""
    best = max((row for row in rows if "gold" in row), key=lambda row: row["gold"], default=None)
    return [
        name, change("logps/chosen"), at_end("logps/chosen_drift", "+.2f"), change("logps/rejected"),
        at_end("logps/rejected_drift", "+.2f"), at_end("rewards/accuracies", ".3f"), f"{change('gold')}{error}",
        f"{best['gold']:.2f} ({best['step']})" if best else "", at_end("kl", ".2f"),
    ]  # fmt: skip


def chosen_line(runs: Mapping[str, Path]) -> str:
    """A line on how far the log-prob of held-out chosen responses has moved in each run, in nats."""
    drifts = {name: evaluations(workdir)[-1]["logps/chosen_drift"] for name, workdir in runs.items()}
    figures = ", ".join(f"{name} {drift:+.1f} nats" for name, drift in drifts.items())
    return f"chosen log-prob against the reference: {figures}: " + ", ".join(f"{name} {_fate(d)}" for name, d in drifts.items())


def _fate(drift: float) -> str:
    if drift < -HELD:
        return "lets it fall"
    return "raises it" if drift > HELD else "holds it"


def figure(runs: Mapping[str, Path], path: Path) -> None:
    """Draws gold reward and implicit reward over sqrt(KL): a line for each run, a marker for each evaluation, a ring for the last.

    The axes are those of Gao et al. 2022, arXiv:2210.10760. Where the right panel rises while the left one falls, the reward is
    overoptimised. A panel is left out if no run has its metric.

    Args:
      runs: name -> workdir.
      path: file of the figure; its suffix gives the format.

    Raises:
      ValueError: for runs without a KL, and for more runs than colours.
    """
    from alignax.overopt import figures

    most = len(figures.COLOURS)
    if len(runs) > most:
        raise ValueError(f"a figure of {len(runs)} runs is unreadable; give at most {most}")
    rows = {name: [row for row in evaluations(workdir) if "kl" in row] for name, workdir in runs.items()}
    if bare := [name for name, own in rows.items() if not own]:
        raise ValueError(f"{', '.join(bare)}: no evaluation has a KL; set eval.sample_prompts, and eval.temperature to 1")
    panels = []
    for metric, title, label in PANELS:
        points = {name: [(_distance(row["kl"]), row[metric]) for row in own if metric in row] for name, own in rows.items()}
        lines = [figures.Line(name, [x for x, _ in own], [y for _, y in own]) for name, own in points.items()]
        panels += [figures.Panel(lines, title, figures.DISTANCE, label)] if any(points.values()) else []
    with output.file(paths.of(path)) as tmp:
        figures.figure(panels).savefig(tmp, dpi=200, format=paths.of(path).suffix.removeprefix(".") or "png")


def _distance(kl: float) -> float:
    """The distance sqrt(KL); the noise of an estimate may make a small KL negative, which counts as 0."""
    return math.sqrt(max(kl, 0.0))
