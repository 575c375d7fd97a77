"""What runs say together: a table, a line on the chosen responses, and the figure of reward overoptimisation.

All of it is read from the runs' metrics.jsonl, so a finished run can be reported on at any time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignax.metrics import read_rows, table

HELD = 1.0  # nats: a chosen log-prob that falls by less is held


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The evaluation rows of a run, in order of steps; `eval/` is taken off the names."""
    rows = read_rows(Path(workdir) / "metrics.jsonl")
    found = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not found:
        raise ValueError(f"{str(workdir)!r} has no evaluation in its metrics.jsonl; is it the workdir of a run?")
    return [{name.removeprefix("eval/"): value for name, value in row.items()} for row in found]


def summary_table(runs: Mapping[str, Path]) -> str:
    """Runs by name: held-out log-probs, accuracy, gold reward and KL, before and after."""
    out = [[
        "", "chosen logps", "drift", "rejected logps", "drift", "accuracy", "gold reward", "best gold", "KL",
    ]]  # fmt: skip
    for name, workdir in runs.items():
        rows = evaluations(workdir)
        first, last = rows[0], rows[-1]
        change = lambda metric, a=first, b=last: f"{a[metric]:.2f} -> {b[metric]:.2f}" if metric in b else ""
        value = lambda metric, form, b=last: format(b[metric], form) if metric in b else ""
        best = max((row for row in rows if "gold" in row), key=lambda row: row["gold"], default=None)
        out.append([
            name, change("logps/chosen"), value("logps/chosen_drift", "+.2f"), change("logps/rejected"),
            value("logps/rejected_drift", "+.2f"), value("rewards/accuracies", ".3f"), change("gold"),
            f"{best['gold']:.2f} @ {best['step']}" if best else "", value("kl", ".2f"),
        ])  # fmt: skip
    return table(out)


def chosen_line(runs: Mapping[str, Path]) -> str:
    """What became of the log-prob of the held-out chosen responses, in one line."""
    drifts = {name: evaluations(workdir)[-1]["logps/chosen_drift"] for name, workdir in runs.items()}
    figures = ", ".join(f"{name} {drift:+.1f} nats" for name, drift in drifts.items())
    verb = lambda drift: "lets it fall" if drift < -HELD else "raises it" if drift > HELD else "holds it"
    return f"chosen log-prob against the reference: {figures}: " + ", ".join(f"{n} {verb(d)}" for n, d in drifts.items())
