"""Tables and texts of the report: final against peak, fitted laws, samples."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignax.overopt import results
from alignax.overopt.results import Curve

COLUMNS = {  # quantity -> head of the column with its final value
    "proxy": "proxy at the end", "disagreement": "disagreement at the end", "accuracy": "held-out accuracy",
    "chosen_drift": "chosen log-ratio (nats)", "unseen": "probability mass outside the pairs", "length": "tokens at the end",
    "score 1": "reward model 1 at the end", "score 2": "reward model 2 at the end",
}  # fmt: skip
COURSE = {  # quantity of a training run -> its name in the report
    "loss": "loss", "reward": "reward", "gold": "gold reward", "kl": "KL (nats)", "margin": "implicit reward, margin",
    "accuracy": "accuracy", "chosen_drift": "chosen log-ratio (nats)", "rejected_drift": "rejected log-ratio (nats)",
    "entropy": "entropy (nats per token)", "length": "tokens per response", "truncated": "truncated responses",
    "distinct": "distinct responses", "disagreement": "disagreement between members",
}  # fmt: skip
RUNS = ("training", "steps")  # kinds of measurement of a training run
EVALUATIONS = 9  # most rows of a training run in its table


class Run(NamedTuple):
    """A run: its workdir, its measurements and their curves."""

    name: str
    workdir: Path
    measurements: list[dict[str, Any]]
    curves: list[Curve]


Own = Sequence[tuple[Run, list[Curve]]]  # runs with one kind of measurement in one world, and their curves


def ends(own: Own) -> dict[str, Any]:
    """The table of final against peak gold reward."""
    shown = [q for q in COLUMNS if any(q in c.values for _, found in own for c in found)]
    kinds = {c.kind for _, found in own for c in found}
    at = "n" if "best_of_n" in kinds else "coefficient" if kinds == {"optima"} else "step"
    head = [
        "objective",
        "peak gold",
        f"at {at}",
        "at √KL",
        "final gold",
        "95 % interval",
        "drop",
        "final √KL",
        *(COLUMNS[q] for q in shown),
    ]
    rows = []
    for run, found in own:
        for c in (c for c in found if "gold" in c.values and c.kind != "steps"):
            p = results.peak(c)
            interval = f"{number(p['final_low'])} to {number(p['final_high'])}" if "final_low" in p else "–"
            there = "–" if c.kind == "optima" and at == "step" else f"{p['peak_at']:g}"
            cells = [number(p["peak"]), there, number(p["peak_d"]), number(p["final"]), interval, number(p["drop"])]
            last = [number(c.values[q].mean[-1]) if q in c.values else "–" for q in shown]
            rows.append([*named(run, own), c.name, *cells, number(p["final_d"]), *last])
    texts = [0, 1] if heads(own) else [0]
    return {"caption": "Peak and final value of the gold reward.", "head": [*heads(own), *head], "rows": rows, "texts": texts}


def markdown(title: str, own: Own) -> str:
    """The Markdown table of final against peak gold reward, with the spread over seeds. Empty if there is no gold reward."""
    curves = [c for _, found in own for c in found if "gold" in c.values and c.kind != "steps"]
    if not curves:
        return ""
    at = {"best_of_n": "n", "optima": "coefficient"}.get(curves[0].kind, "step")
    rows = [[title, "gold reward at its peak", f"at {at}", "at the end", "KL at the end (nats)"], ["---"] * 5]
    for c in curves:
        p = results.peak(c)
        half = {end: f" ± {number((p[f'{end}_high'] - p[f'{end}_low']) / 2)}" for end in ("peak", "final") if f"{end}_low" in p}
        spread = lambda end, p=p, half=half: number(p[end]) + half.get(end, "")
        where = "–" if c.kind == "optima" and at == "step" else f"{p['peak_at']:g}"
        rows.append([c.name, spread("peak"), where, spread("final"), number(c.d[-1] ** 2)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def maker(made: dict[str, str]) -> str:
    """A text of the versions and the processor that made measurements."""
    commit = f" at commit {made['commit']}" if made["commit"] else ""
    return f"{made['file']}, alignax {made['alignax']}{commit}, jax {made['jax']}, {made['processor']}"


def course(own: Own) -> dict[str, Any]:
    """The table of training runs: first and last evaluation or steps, and a few between."""
    found = [(run, c) for run, curves in own for c in curves if c.kind in RUNS]
    shown = [q for q in COURSE if any(q in c.values for _, c in found)]
    rows = []
    for run, c in found:
        for i in np.unique(np.linspace(0, len(c.at) - 1, EVALUATIONS).round().astype(int)).tolist():
            cells = [number(float(c.values[q].mean[i]), 3) if q in c.values else "–" for q in shown]
            rows.append([*named(run, own), number(float(c.at[i]), 0), *cells])
    caption = "Training steps; each row is a mean over neighbouring steps." if found and found[0][1].kind == "steps" else "Evaluations."
    return {
        "caption": caption,
        "head": [*heads(own), "step", *(COURSE[q] for q in shown)],
        "rows": rows,
        "texts": [0] if heads(own) else [],
    }


def laws(own: Own) -> dict[str, Any]:
    """The table of fitted laws: alpha, beta, R^2 and peak, fitted to all curves of an objective together."""
    rows = []
    for run, found in own:
        for (*_, objective), group in results.pooled(found).items():
            for name, fit in results.fitted(group).items():
                if fit:
                    seen = fit.peak_d is not None and fit.peak_d <= max(c.d.max() for c in group)
                    top = [number(fit.peak_d), number(fit.peak)] if seen else ["not seen", "–"]
                    cells = [number(fit.alpha, 3), number(fit.beta, 3), number(fit.r2), *top, fit.points]
                    rows.append([*named(run, own), objective, results.LAWS[name].formula, *cells])
    head = [*heads(own), "objective", "law", "α", "β", "R²", "peak at √KL", "peak above start", "points"]
    return {"caption": "Fitted laws of the gold reward.", "head": head, "rows": rows, "texts": [0, 1, 2] if heads(own) else [0, 1]}


def samples(measured: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tables of sampled responses with their scores: proxy, gold and members."""
    tables = []
    for run, m in measured:
        if m["kind"] == "best_of_n":
            head = ["objective", "n", "prompt", "response", "proxy", "gold", "members"]
            rows = [
                [
                    x["objective"],
                    x["n"],
                    x["prompt"],
                    x["response"],
                    number(x["proxy"]),
                    number(x["gold"]),
                    ", ".join(map(number, x["members"])),
                ]
                for x in m["samples"]
            ]
            texts = [2, 3]
        else:  # a training run; direct alignment and online methods have no samples
            shown = [q for q in ("reward", "gold", "log_ratio") if any(x[q] is not None for x in m.get("samples", []))]
            head, texts = ["prompt", "step", "response", *(q.replace("_", "-") for q in shown)], [0, 2]
            rows = [[x["prompt"], number(x["step"], 0), x["response"], *(number(x[q]) for q in shown)] for x in m.get("samples", [])]
        of_run = f" of {run.name}" if len(measured) > 1 else ""
        which = "of the first and the last evaluation" if m["kind"] == "training" else "of the first seed"
        tables.append({"caption": f"Samples{of_run}, {which}.", "head": head, "rows": rows, "texts": texts, "cards": True})
    return tables


def findings(own: Own) -> list[str]:
    """Sentences of a section: peak and end of gold rewards, per run or per objective of trained policies; and excluded responses."""
    lines = []
    for run, found in own:
        kind, arm = found[0].kind, found[0].arm
        of_run = f"{run.name}: " if len(own) > 1 and (kind != "training" or "gold" not in found[0].values) else ""
        if kind in RUNS and (kind == "steps" or "gold" not in found[0].values):
            lines.append(f"{of_run}{first_and_last(found[0])}.")
        elif kind in ("direct", "online", "optima"):
            for (*_, objective), group in results.pooled(found).items():
                lines.append(f"{of_run}{objective}, gold reward at its peak → at the end: {rise_and_fall(group)}.")
        else:
            last = f"n = {found[0].at[-1]}" if kind == "best_of_n" else "the end"
            lines.append(f"{of_run}gold reward at its peak → at {last}: {rise_and_fall(found)}.")
        for m in run.measurements:
            if m["kind"] == kind and m.get("missing"):
                lines.append(f"{of_run}{'; '.join(m['missing'])}. Nothing is drawn there.")
            if (m["kind"], m["arm"]) == (kind, arm) and (m.get("excluded") or m.get("excluded_pairs")):
                what = f"{m['excluded']} responses, {m['excluded_pairs']} held-out pairs"
                lines.append(f"{of_run}left out because a score is not finite: {what}.")
    return lines


def first_and_last(curve: Curve) -> str:
    """A sentence with the first and the last value of each quantity of a training run."""
    known = {q: x[np.isfinite(x)] for q in COURSE if q in curve.values and (x := curve.values[q].mean).size}
    return "first and last, " + "; ".join(f"{COURSE[q]}: {number(x[0])} → {number(x[-1])}" for q, x in known.items())


def rise_and_fall(curves: Sequence[Curve]) -> str:
    """A text with the peak and the final value of each curve's gold reward."""
    name = lambda c: c.setting or c.objective
    return "; ".join(f"{name(c)}: {number((p := results.peak(c))['peak'])} → {number(p['final'])}" for c in curves)


def number(x: float | None, digits: int = 2) -> str:
    """A table's text for a number, with a true minus sign; a dash for None or NaN."""
    return "–" if x is None or math.isnan(x) else f"{round(float(x), digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def heads(own: Own) -> list[str]:
    """The head of the column of run names; empty for a single run."""
    return ["run"] if len(own) > 1 else []


def named(run: Run, own: Own) -> list[str]:
    """The cell with the name of a run; empty for a single run."""
    return [run.name] if len(own) > 1 else []
