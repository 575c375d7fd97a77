"""The report: one HTML page with embedded figures that needs no network, the figures as PNG, and the numbers as JSON and CSV."""

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignax import output
from alignax.overopt import figures, fits, results
from alignax.overopt.results import Curve
from alignax.overopt.tables import COURSE, RUNS, Own, Run, course, ends, findings, laws, maker, markdown, number, samples

TITLES = {
    "best_of_n": "Best-of-n",
    "direct": "Direct alignment",
    "training": "Evaluations of training runs",
    "steps": "Steps of training runs",
}
DRAWN = 25  # about the number of points drawn of a line with more than twice as many
PANELS = {  # quantity drawn over sqrt(KL) -> title, label of the axis
    "gold": ("True objective", "gold reward"),
    "proxy": ("Optimised objective", "proxy reward"),
    "disagreement": ("Disagreement between members", "standard deviation between members"),
    "length": ("Response length", "tokens"),
}
SIDE_BY_SIDE = ("gold", "proxy")  # quantities of online methods that share one figure
OVER_STEPS = COURSE | {"score 1": "reward model 1", "score 2": "reward model 2"}
LEAD = (
    "The gold reward is the true objective, and the proxy reward is the one that is optimised. The figures show both over the square "
    "root of the KL to the initial policy, in nats. The proxy is overoptimised where the proxy reward keeps rising while the gold reward "
    "falls."
)
COURSE_LEAD = (
    "The figures show what the training runs logged, from start to end. These runs have no gold reward. If the experiment file has a "
    "function gold(prompts, completions), this page draws the gold reward over the square root of the KL."
)
COURSE_READING = (
    "Evaluations use held-out rows, or fresh samples of the policy for the prompts of these rows. The KL is an estimate: the mean "
    "log-ratio between policy and reference over the samples, in nats. Steps are training steps; in a long run, each point is the mean "
    "over neighbouring steps.",
    "Training maximises the reward. Look at the samples if the reward rises while the entropy, the share of distinct responses or the "
    "response length collapses, or while the share of truncated responses grows.",
    "The margin of the implicit reward is β (log π/ref of chosen − log π/ref of rejected). A chosen log-ratio below 0 means that the "
    "chosen responses have become less likely.",
)
READING = (
    "Lines are means over seeds. Each seed has a different gold reward, different data and different models; with model folders, each "
    "seed has different prompts and different responses. Bands are 95 % confidence intervals of the mean (Student's t). A single seed "
    "has no band, and a line that turns back has bars instead of a band. A ring marks the end of a line. For long training runs the "
    "figures show about 25 evaluations, more from the beginning than from the end; results.json and curves.csv hold all evaluations.",
    "In the laboratory the unit of the gold reward is its standard deviation under the initial policy, and its mean under the initial "
    "policy is 0. The drop is the peak of the mean line minus its final value.",
    "The values of best-of-n are unbiased estimates over all subsets of n of the N responses, and the KL is log n − (n − 1)/n. “single” "
    "is the average over the members of an ensemble when each member is used alone. WCO is the minimum over the members; UWO is the mean "
    "over the members minus a coefficient times their variance. Disagreement is the standard deviation between members at the selected "
    "response.",
    "In direct alignment the proxy is the implicit reward, measured as its margin β (log π/ref of chosen − log π/ref of rejected) on "
    "held-out pairs. In online training the proxy is the reward that is trained on. The KL is averaged over seeds before the square root "
    "is taken.",
    "Online methods train on samples of the policy. Their gold reward, KL and proxy are exact: sums over the pool of responses. “single” "
    "is the first reward model of each seed. Optima are closed-form policies: the optimal policy for each coefficient of a penalty, from "
    "large to small.",
    "Fitted laws of the gold reward R (Gao et al. 2022): R = d (α − β d) for best-of-n and R = d (α − β log d) for trained policies, "
    "with d = √KL. They are fitted by least squares to the points with d of at least 0.3, for all coefficients of an objective together. "
    "The figures of best-of-n show them as dotted lines, those of online methods as grey dotted lines if R² is at least 0.5.",
    "Calibration is the share of held-out pairs (without label noise) that a reward model orders correctly when it prefers one response "
    "with probability p. The dotted line is p.",
)


def write(workdir: Path) -> str:
    """Writes `report.html`, `figures/`, `results.json`, `curves.csv` and `tables.md` into a workdir. Returns lines for the console."""
    run = open_run(workdir, workdir.name)
    sections = [section([run], *arm) for arm in arms([run])]
    (workdir / "figures").mkdir(exist_ok=True)
    for own in sections:
        for image in own["figures"]:
            with output.file(workdir / "figures" / f"{image['file']}.png") as tmp:
                tmp.write_bytes(image["png"])
    output.write_text(workdir / "results.json", results.as_json(run.measurements))
    output.write_text(workdir / "curves.csv", results.as_csv(run.curves))
    if text := as_markdown(run):
        output.write_text(workdir / "tables.md", text)
    title = "Reward overoptimisation" if has_gold([run]) else "Training"
    output.write_text(workdir / "report.html", page(title, [run], sections))
    lines = [line for own in sections for line in (own["title"] + ":", *(f"  {finding}" for finding in own["findings"]))]
    return "\n".join([*lines, f"report: {workdir / 'report.html'}"])


def as_markdown(run: Run) -> str:
    """Markdown tables of final against peak, with the spread over seeds and the versions that measured them."""
    parts = []
    for kind, arm, family in arms([run]):
        own = [c for c in run.curves if place(c.kind, c.arm, c.family) == (kind, arm, family)]
        many = f", {own[0].seeds} seeds" if own[0].seeds > 1 else ""
        parts += [text] if (text := markdown(titled(kind, arm, family) + many, [(run, own)])) else []
    by = [f"Measured by {maker(made)}.\n" for made in results.makers(run.measurements)]
    spread = "± is half of the 95 % confidence interval of the mean over seeds (Student's t).\n"
    return "\n".join([*parts, spread, *by]) if parts else ""


def has_gold(runs: Sequence[Run]) -> bool:
    """Whether any of the runs measured a gold reward."""
    return any("gold" in c.values for run in runs for c in run.curves)


def compare(workdirs: Sequence[Path]) -> str:
    """Writes `comparison.html` into the first workdir: several runs on the same axes. Returns a line with its path."""
    names = distinct(workdirs)
    runs = [open_run(workdir, name) for workdir, name in zip(workdirs, names, strict=True)]
    path = workdirs[0] / "comparison.html"
    title = "Reward overoptimisation, compared" if has_gold(runs) else "Training, compared"
    output.write_text(path, page(title, runs, [section(runs, *own) for own in arms(runs)]))
    return f"comparison: {path}"


def open_run(workdir: Path, name: str) -> Run:
    """A run with the measurements and curves of its workdir."""
    measurements = results.load(workdir)
    return Run(name, workdir, measurements, results.curves(measurements))


def distinct(workdirs: Sequence[Path]) -> list[str]:
    """Names of workdirs: the shortest ends of their paths that differ.

    Raises:
      ValueError: for a workdir that is given twice.
    """
    parts = [workdir.resolve().parts for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(map(str, workdirs))}: a workdir is given twice; give each workdir once")


def arms(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The sections of the page as (kind of measurement, world, family of online methods), in order of appearance."""
    return list(dict.fromkeys(place(curve.kind, curve.arm, curve.family) for run in runs for curve in run.curves))


def place(kind: str, arm: str, family: str) -> tuple[str, str, str]:
    """The section of a curve; optima belong to the section of the online methods of their family."""
    return "online" if kind == "optima" else kind, arm, family


def titled(kind: str, arm: str, family: str) -> str:
    """The title of a section of the page."""
    name = family or TITLES[kind]
    return name if kind in RUNS else f"{name}, world “{arm}”"


# Sections -------------------------------------------------------------------------------------------------------------------


def section(runs: Sequence[Run], kind: str, arm: str, family: str) -> dict[str, Any]:
    """A section of the page: figures and tables of one kind of measurement in one world, for all runs that have it."""
    here = (kind, arm, family)
    own = [(run, found) for run in runs if (found := [c for c in run.curves if place(c.kind, c.arm, c.family) == here])]
    measured = [(run, m) for run, _ in own for m in run.measurements if place(m["kind"], m["arm"], m.get("family", "")) == here]
    name, title = family or TITLES[kind], titled(*here)
    panels = shared_axes(own)
    if kind == "online":
        images = [image for quantity in SIDE_BY_SIDE for image in over_distance(quantity, panels, together=True)]
        stepped = dict.fromkeys(quantity for _, m in measured for quantity in m["over_steps"])
        lines = [(c.name, c) for _, found in own for c in found if c.kind == "online"]
        images += over_steps([q for q in stepped if any(q in c.values for _, c in lines)], lines)
    elif kind in RUNS:
        images = [image for quantity in PANELS for image in over_distance(quantity, panels)] if kind == "training" else []
        lines = [(run.name, c) for run, found in own for c in found]
        images += [image for q in COURSE if any(q in c.values for _, c in lines) for image in over_steps([q], lines)]
    else:
        images = [image for quantity in PANELS for image in over_distance(quantity, panels)] + calibration(measured)
    for image in images:
        image["file"] = output.named(" ".join(f"{name} {arm} {image['file']}".lower().split()))
    tables = [course(own), ends(own), laws(own), *samples(measured)]
    tables = [{"cards": False} | table for table in tables if table["rows"]]
    return {"title": title, "findings": findings(own), "figures": images, "tables": tables}


def shared_axes(own: Own) -> dict[str, list[tuple[str, Curve]]]:
    """Labelled curves of each panel, by the panel's name.

    One panel holds all objectives of a run's best-of-n, or all settings of one objective, or all training runs. Objectives with a single
    setting each share a panel too.
    """
    panels: dict[str, list[tuple[str, Curve]]] = {}
    for run, found in own:
        of_run = run.name if len(own) > 1 else ""
        alone = len({c.objective for c in found}) == len(found)
        for c in found:
            if c.kind in RUNS:
                panels.setdefault("", []).append((run.name, c))
            elif c.kind == "best_of_n" or (c.family and alone):
                panels.setdefault(of_run, []).append((c.name, c))
            else:
                panels.setdefault(", ".join(filter(None, (c.objective, of_run))), []).append((c.setting, c))
    order = list(dict.fromkeys(lines[0][1].objective for lines in panels.values()))  # panels of one objective are neighbours
    return dict(sorted(panels.items(), key=lambda item: order.index(item[1][0][1].objective)))


def over_distance(quantity: str, panels: dict[str, list[tuple[str, Curve]]], together: bool = False) -> list[dict[str, Any]]:
    """Figures of a quantity over sqrt(KL): one per panel, or a single figure if `together`. Panels share their axes."""
    measured = lambda c: quantity in c.values and np.isfinite(c.d + c.values[quantity].mean).any()
    having = {name: [(label, c) for label, c in lines if measured(c)] for name, lines in panels.items()}
    having = {name: lines for name, lines in having.items() if lines}
    title, y_label = PANELS[quantity]
    every = [c for lines in having.values() for _, c in lines]
    # Implicit rewards of different objectives have different scales, so their panels do not share a y axis.
    apart = quantity == "proxy" and any(c.kind == "direct" for c in every)
    limits = extent(every, quantity) if len(having) > 1 and not apart else None
    reach = 1.04 * max((float(np.nanmax(c.d)) for c in every), default=1.0) or 1.0
    drawn, captions = [], []
    for name, lines in having.items():
        head = ": ".join(filter(None, (name, title.lower() if name else title)))
        law = pooled_law([c for _, c in lines]) if quantity == "gold" and together else None
        own = [line(label, c, quantity) for label, c in lines]
        drawn.append(figures.Panel(own, head, figures.DISTANCE, y_label, limits, reach, law=law))
        at_end = "; ".join(f"{label}: {number(c.values[quantity].mean[-1])}" for label, c in lines)
        captions.append(f"{head}: {y_label} over √KL. At the end: {at_end}.")
    if together and drawn:
        return [image(drawn, quantity, " ".join(captions))]
    files = (f"{quantity} {name}".replace(",", "") for name in having)
    return [image([panel], file, caption) for panel, file, caption in zip(drawn, files, captions, strict=True)]


def over_steps(quantities: Sequence[str], own: Sequence[tuple[str, Curve]]) -> list[dict[str, Any]]:
    """A figure of quantities over training steps, with one panel per quantity."""
    panels = []
    for quantity in quantities:
        having = [(name, c) for name, c in own if quantity in c.values]
        every = lambda c: np.arange(len(c.at))
        drawn = [figures.Line(name, c.at.tolist(), *plain(c.values[quantity], every(c)), gaps=gaps(c, every(c))) for name, c in having]
        label, reach = OVER_STEPS.get(quantity, quantity), max(float(c.at[-1]) for _, c in having) or 1.0
        panels.append(figures.Panel(drawn, f"{label[0].upper()}{label[1:]} in training", "step", label, reach=reach))
    words = ", ".join(OVER_STEPS.get(quantity, quantity) for quantity in quantities)
    file = "steps" if len(panels) > 1 else f"steps {' '.join(quantities)}"
    return [image(panels, file, f"Over training steps: {words}.")] if panels else []


def pooled_law(own: Sequence[Curve]) -> tuple[list[float], list[float]] | None:
    """The RL law, fitted to the gold rewards of curves of one objective: its x and y. None for several objectives or an R^2 below 0.5."""
    fit = results.fitted(own)["rl"] if len({c.objective for c in own}) == 1 else None
    if fit is None or fit.r2 < 0.5:
        return None
    d = np.linspace(fits.SMALLEST, max(c.d.max() for c in own), 60)
    return d.tolist(), fits.value(fits.RL, fit.alpha, fit.beta, d).tolist()


def line(label: str, curve: Curve, quantity: str) -> figures.Line:
    """A curve in the form drawn: a long one is thinned, less at its beginning; gold reward of best-of-n has its fitted law."""
    E = len(curve.d)
    drawn = np.arange(E) if E <= 2 * DRAWN else np.unique([0, *np.geomspace(1, E - 1, DRAWN).round().astype(int)])
    law = None
    if quantity == "gold" and curve.kind == "best_of_n" and (fit := results.fitted([curve])["bon"]):
        d = np.linspace(fits.SMALLEST, curve.d[-1], 60)
        law = (d.tolist(), (curve.values["gold"].mean[0] + fits.value(fits.BON, fit.alpha, fit.beta, d)).tolist())
    return figures.Line(label, curve.d[drawn].tolist(), *plain(curve.values[quantity], drawn), law, gaps(curve, drawn))


def gaps(curve: Curve, drawn: np.ndarray) -> list[int]:
    """The points drawn, by their places among them, that lie behind a hole of the log."""
    return [i for i in range(1, len(drawn)) if any(curve.at[drawn[i - 1]] <= a and b <= curve.at[drawn[i]] for a, b in curve.holes)]


def plain(own: results.Band, drawn: np.ndarray) -> tuple[list[float], list[float] | None, list[float] | None]:
    """The mean, low and high of a band at the points drawn, as lists."""
    low, high = (None if x is None else x[drawn].tolist() for x in (own.low, own.high))
    return own.mean[drawn].tolist(), low, high


def extent(own: Sequence[Curve], quantity: str) -> tuple[float, float]:
    """Limits of the y axis that contain the mean line of every curve; bands may go beyond."""
    low = min(float(np.nanmin(c.values[quantity].mean)) for c in own)
    high = max(float(np.nanmax(c.values[quantity].mean)) for c in own)
    return low - (margin := 0.12 * (high - low) or 1.0), high + margin


def calibration(measured: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Reliability figures of the reward models: the share of correctly ordered pairs over confidence."""
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
        lowest = min([0.4, *(y - 0.03 for own in lines for y in own.y)])  # all pairs of a small bin may be wrong
        limits = (lowest, 1.02)
        panel = figures.Panel(
            lines, title, "confidence in the preferred response", "share of pairs in the right order", limits, 1.02, diagonal=True
        )
        accuracy = np.array(m["accuracy"])
        words = f"{title}. Held-out accuracy {accuracy.mean():.3f} ({accuracy.min():.3f} to {accuracy.max():.3f}); "
        images.append(image([panel], f"calibration {of_run}", words + f"expected calibration error: {', '.join(errors)}."))
    return images


def image(panels: Sequence[figures.Panel], file: str, caption: str) -> dict[str, Any]:
    """A figure in the form that the page template reads. A figure of several panels is as wide as the page."""
    data = figures.png(figures.figure(panels))
    width, height = struct.unpack(">II", data[16:24])  # width and height in the PNG header
    size = {"width": width // 2, "height": height // 2, "wide": len(panels) > 1}
    return {"png": data, "data": base64.b64encode(data).decode(), "file": file, "caption": caption, "alt": caption} | size


# The page -------------------------------------------------------------------------------------------------------------------


def page(title: str, runs: Sequence[Run], sections: Sequence[dict[str, Any]]) -> str:
    """The HTML page, as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("alignax.overopt", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    about = [{"facts": facts(run)} for run in runs]
    lead, reading = (LEAD, READING) if has_gold(runs) else (COURSE_LEAD, COURSE_READING)
    return environment.get_template("page.html").render(title=title, lead=lead, runs=about, sections=sections, reading=reading)


def facts(run: Run) -> list[tuple[str, str]]:
    """The facts about a run at the head of the page: pairs of a name and a text."""
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
    if trained := [m for m in run.measurements if m["kind"] == "online"]:
        families = ", ".join(dict.fromkeys(m["family"] for m in trained))
        out.append(("online", f"{len(trained[0]['seeds'])} seeds, {families}; {trained[0]['runs'][0]['step'][-1]} steps"))
    return [*out, *(("measured by", maker(made)) for made in results.makers(run.measurements))]
