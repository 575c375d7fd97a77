"""The report: one HTML page that holds its figures and needs no network, the figures as PNG, and the numbers as JSON and CSV."""

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignax.overopt import figures, fits, results
from alignax.overopt.results import Curve
from alignax.overopt.tables import Own, Run, course, ends, findings, laws, number, samples

TITLES = {"best_of_n": "Best-of-n", "direct": "Direct alignment", "training": "Training runs"}
DRAWN = 25  # points of a line, at most about
PANELS = {  # quantity -> title, label of the axis; those of which every curve over sqrt(KL) is drawn
    "gold": ("What is wanted", "gold reward"),
    "proxy": ("What is optimised", "proxy reward"),
    "disagreement": ("Disagreement of the members", "sd between members"),
    "length": ("Response length", "tokens"),
}
READING = (
    "Lines are means over seeds: each another gold reward, other data and other models, or, of model folders, other prompts and "
    "other responses; bands are 95 % confidence intervals of that "
    "mean (Student's t), which a single seed has not; lines that turn back have bars instead. A ring marks the end of a line. Of long "
    "training runs some 25 evaluations are drawn, more of the beginning than of the end; the numbers hold all.",
    "In the laboratory gold reward is in standard deviations under the initial policy, where its mean is 0. The drop is the peak of the "
    "mean line less its end.",
    "Best-of-n is not sampled: it is the unbiased estimate over all subsets of n of the N responses, and its KL is log n − (n − 1)/n. "
    "“single” is the average over the members of an ensemble, each trusted alone; WCO is their minimum, UWO their mean less a coefficient "
    "times their variance. Disagreement is the standard deviation between members at the response that was picked.",
    "Direct alignment: the proxy is the implicit reward, its margin β (log π/ref of chosen − of rejected) on held-out pairs; of online "
    "training it is the reward that is trained on. KL is averaged over seeds before its root is taken.",
    "Laws (Gao et al. 2022): R = d (α − β d) for best-of-n, R = d (α − β log d) for trained policies, d = √KL; least squares on points "
    "with d of at least 0.3, all β of an objective together. Dotted in the figures of best-of-n.",
    "Calibration: how often a reward model that prefers one response with probability p is right, on held-out pairs without noise; the "
    "dotted line is p.",
)


def write(workdir: Path) -> str:
    """Writes `report.html`, `figures/`, `results.json` and `curves.csv` into a workdir; returns a table for the console."""
    run = open_run(workdir, workdir.name)
    sections = [section([run], kind, arm) for kind, arm in arms([run])]
    (workdir / "figures").mkdir(exist_ok=True)
    for own in sections:
        for image in own["figures"]:
            (workdir / "figures" / f"{image['file']}.png").write_bytes(image["png"])
    (workdir / "results.json").write_text(results.as_json(run.measurements), encoding="utf-8")
    (workdir / "curves.csv").write_text(results.as_csv(run.curves), encoding="utf-8")
    (workdir / "report.html").write_text(page("Reward overoptimisation", [run], sections), encoding="utf-8")
    lines = [line for own in sections for line in (own["title"] + ":", *(f"  {finding}" for finding in own["findings"]))]
    return "\n".join([*lines, f"report: {workdir / 'report.html'}"])


def compare(workdirs: Sequence[Path]) -> str:
    """Writes `comparison.html` into the first workdir: several runs side by side, on the same axes; returns where it is."""
    names = distinct(workdirs)
    runs = [open_run(workdir, name) for workdir, name in zip(workdirs, names, strict=True)]
    path = workdirs[0] / "comparison.html"
    path.write_text(page("Reward overoptimisation, compared", runs, [section(runs, *own) for own in arms(runs)]), encoding="utf-8")
    return f"comparison: {path}"


def open_run(workdir: Path, name: str) -> Run:
    """The measurements of a workdir."""
    measurements = results.load(workdir)
    return Run(name, workdir, measurements, results.curves(measurements))


def distinct(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
      ValueError: for a workdir that is given twice.
    """
    parts = [workdir.resolve().parts for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(map(str, workdirs))}: a workdir is given twice; give each once")


def arms(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Kinds of measurement and their worlds, in order of appearance."""
    return list(dict.fromkeys((curve.kind, curve.arm) for run in runs for curve in run.curves))


# Sections -------------------------------------------------------------------------------------------------------------------


def section(runs: Sequence[Run], kind: str, arm: str) -> dict[str, Any]:
    """Figures and tables of one kind of measurement in one world, of every run that has it."""
    own = [(run, found) for run in runs if (found := [c for c in run.curves if (c.kind, c.arm) == (kind, arm)])]
    measured = [(run, m) for run, _ in own for m in run.measurements if (m["kind"], m["arm"]) == (kind, arm)]
    title = TITLES[kind] if kind == "training" else f"{TITLES[kind]}, world “{arm}”"
    images = [image for quantity in PANELS for image in over_distance(quantity, shared_axes(own))] + calibration(measured)
    for image in images:
        image["file"] = "-".join(f"{TITLES[kind]} {arm} {image['file']}".lower().split())
    tables = [course(own), ends(own), laws(own), *samples(measured)]
    return {"title": title, "findings": findings(own), "figures": images, "tables": [table for table in tables if table["rows"]]}


def shared_axes(own: Own) -> dict[str, list[tuple[str, Curve]]]:
    """What is drawn in one panel, by its name: the objectives of a run's best-of-n, the betas of its objective, all training runs."""
    panels: dict[str, list[tuple[str, Curve]]] = {}
    for run, found in own:
        of_run = run.name if len(own) > 1 else ""
        for c in found:
            if c.kind == "training":
                panels.setdefault("", []).append((run.name, c))
            elif c.kind == "best_of_n":
                panels.setdefault(of_run, []).append((c.objective, c))
            else:
                panels.setdefault(", ".join(filter(None, (c.objective, of_run))), []).append((f"β = {c.beta:g}", c))
    order = list(dict.fromkeys(lines[0][1].objective for lines in panels.values()))  # panels of an objective lie side by side
    return dict(sorted(panels.items(), key=lambda item: order.index(item[1][0][1].objective)))


def over_distance(quantity: str, panels: dict[str, list[tuple[str, Curve]]]) -> list[dict[str, Any]]:
    """A figure for each panel in which the quantity was measured, all on the same axes."""
    having = {name: [(label, c) for label, c in lines if quantity in c.values] for name, lines in panels.items()}
    having = {name: lines for name, lines in having.items() if lines}
    title, y_label = PANELS[quantity]
    every = [c for lines in having.values() for _, c in lines]
    # Implicit rewards of different objectives are of different sizes, so theirs do not share the axis of y.
    apart = quantity == "proxy" and any(c.kind == "direct" for c in every)
    limits = extent(every, quantity) if len(having) > 1 and not apart else None
    reach = 1.04 * max((float(c.d.max()) for c in every), default=1.0)
    images = []
    for name, lines in having.items():
        drawn = [line(label, c, quantity) for label, c in lines]
        head = ": ".join(filter(None, (name, title.lower() if name else title)))
        panel = figures.Panel(drawn, head, figures.DISTANCE, y_label, limits, reach)
        at_end = "; ".join(f"{label}: {number(c.values[quantity].mean[-1])}" for label, c in lines)
        images.append(image(panel, f"{quantity} {name}".replace(",", ""), f"{head}: {y_label} over √KL. At the end: {at_end}."))
    return images


def line(label: str, curve: Curve, quantity: str) -> figures.Line:
    """A curve as it is drawn: of a long one its beginning more densely than its end; the gold reward of best-of-n with its law."""
    E = len(curve.d)
    drawn = np.arange(E) if E <= DRAWN else np.unique([0, *np.geomspace(1, E - 1, DRAWN).round().astype(int)])
    mean, low, high = (None if x is None else x[drawn].tolist() for x in curve.values[quantity])
    law = None
    if quantity == "gold" and curve.kind == "best_of_n" and (fit := results.fitted([curve])["bon"]):
        d = np.linspace(fits.SMALLEST, curve.d[-1], 60)
        law = (d.tolist(), (curve.values["gold"].mean[0] + fits.value(fits.BON, fit.alpha, fit.beta, d)).tolist())
    return figures.Line(label, curve.d[drawn].tolist(), mean or [], low, high, law)


def extent(own: Sequence[Curve], quantity: str) -> tuple[float, float]:
    """Limits that hold every line of these; bands may go beyond."""
    low = min(float(c.values[quantity].mean.min()) for c in own)
    high = max(float(c.values[quantity].mean.max()) for c in own)
    return low - (margin := 0.12 * (high - low) or 1.0), high + margin


def calibration(measured: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Reliability of the reward models: how often they are right, over how sure they are."""
    images = []
    for run, m in measured:
        if "calibration" not in m:
            continue
        lines, errors = [], []
        for name, (count, sure, right) in ((name, np.array(table)) for name, table in m["calibration"].items()):
            some = count > 0
            lines.append(figures.Line(name, (sure[some] / count[some]).tolist(), (right[some] / count[some]).tolist()))
            errors.append(f"{name} {float(np.abs(right - sure).sum() / count.sum()):.3f}")
        of_run = run.name if len(measured) > 1 else ""
        title = ": ".join(filter(None, (of_run, "Calibration of the reward models")))
        panel = figures.Panel(lines, title, "confidence in the preferred response", "share in the right order", (0.4, 1.02), diagonal=True)
        accuracy = np.array(m["accuracy"])
        words = f"{title}. Held-out accuracy {accuracy.mean():.3f} ({accuracy.min():.3f} to {accuracy.max():.3f}); "
        images.append(image(panel, f"calibration {of_run}", words + f"expected calibration error: {', '.join(errors)}."))
    return images


def image(panel: figures.Panel, file: str, caption: str) -> dict[str, Any]:
    """A figure of one panel, as the page holds it."""
    data = figures.png(figures.figure([panel]))
    width, height = struct.unpack(">II", data[16:24])  # of the PNG's header
    encoded = base64.b64encode(data).decode()
    return {"png": data, "data": encoded, "file": file, "caption": caption, "alt": caption, "width": width // 2, "height": height // 2}


# The page -------------------------------------------------------------------------------------------------------------------


def page(title: str, runs: Sequence[Run], sections: Sequence[dict[str, Any]]) -> str:
    """The HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("alignax.overopt", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    about = [{"facts": facts(run)} for run in runs]
    return environment.get_template("page.html").render(title=title, runs=about, sections=sections, reading=READING)


def facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of a run at its head."""
    out = [("run", str(run.workdir))]
    for m in run.measurements:
        if m["kind"] == "best_of_n":
            seeds, size = len(m["seeds"]), f"{m['prompts']} prompts of {m['responses']} responses"
            out.append((f"best-of-n, {m['arm']}", f"{seeds} seeds, {m['members']} reward models each, {size}"))
    direct = [m for m in run.measurements if m["kind"] == "direct"]
    if direct:
        objectives, betas = (dict.fromkeys(m[key] for m in direct) for key in ("objective", "beta"))
        what = f"{', '.join(objectives)} at β = {', '.join(f'{beta:g}' for beta in betas)}"
        out.append(("direct alignment", f"{len(direct[0]['seeds'])} seeds, {what}, {direct[0]['step'][-1]} steps"))
    return out
