"""Results of measurements: curves with confidence bands over seeds, peaks, drops and fitted laws; as JSON and CSV."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from alignax.overopt import fits, training
from alignax.run.log import misfit
from alignax.text import one_line

LEVEL = 0.95  # confidence level of the bands
CURVES = {"gold": [[float]], str: [[float]]}  # quantity -> [S][E]
SAMPLES = {"objective": str, "n": int, "prompt": str, "response": str, "proxy": float, "gold": float, "members": [(float,)]}
MADE = dict.fromkeys(("file", "alignax", "commit", "jax", "processor"), str)
ANY = {"arm": str, "seeds": [int], "made": (MADE,), "excluded": (int,), "excluded_pairs": (int,)}
RUNS = ANY | {"family": str, "objective": str, "over_steps": [str]}
RUNS |= {"runs": [{"setting": str, "beta": (float,), "step": [float], "curves": CURVES}]}
STAGES = {  # kind -> format of its stage file, see `alignax.run.log.misfit`
    "best_of_n": ANY | dict.fromkeys(("members", "prompts", "responses"), int) | {"n": [int], "kl": [float], "accuracy": [[float]],
        "curves": {str: CURVES}, "calibration": {str: [[float]]}, "samples": [SAMPLES]},
    "direct": ANY | {"objective": str, "beta": float, "step": [float], "curves": CURVES},
    "online": RUNS,
    "optima": RUNS,
}  # fmt: skip
LAWS = {"bon": fits.BON, "rl": fits.RL}


class Band(NamedTuple):
    """A mean over seeds and its 95 % confidence interval (Student's t). The interval is None for a single seed."""

    mean: np.ndarray  # [E]
    low: np.ndarray | None  # [E]
    high: np.ndarray | None  # [E]


class Curve(NamedTuple):
    """A curve: quantities over sqrt(KL) under one objective, at E points."""

    kind: str  # "best_of_n", "direct", "online", "optima"; of a training run "training" (its evaluations) or "steps"
    arm: str  # the world
    objective: str
    beta: float | None  # coefficient of a trained policy; None if it has none
    at: np.ndarray  # [E] n of best-of-n, coefficient of an optimum, otherwise the step
    d: np.ndarray  # [E] sqrt of the mean KL to the initial policy, sqrt(nats); NaN if not measured
    values: dict[str, Band]  # quantity -> [E]
    seeds: int
    setting: str = ""  # text that distinguishes curves of one objective: "β = 0.1"
    family: str = ""  # family of an online method or an optimum
    holes: Sequence[tuple[int, int]] = ()  # the steps before and after what the log of a training run lacks

    @property
    def name(self) -> str:
        """The name of the curve: its objective, and its setting if it has one."""
        return ", ".join(filter(None, (self.objective, self.setting)))


def load(workdir: Path) -> list[dict[str, Any]]:
    """The measurements in a workdir of the laboratory or of a training run.

    Raises:
      ValueError: for a folder without measurements.
    """
    if files := sorted((workdir / "stages").glob("*.json")):
        return [read_stage(file) for file in files]
    return training.of_training(workdir)


def read_stage(file: Path) -> dict[str, Any]:
    """The measurements in a stage file.

    Raises:
      ValueError: for a damaged file, or one of another format.
    """
    try:
        m = json.loads(file.read_bytes())
        wrong = misfit(m, {"kind": str}) or (misfit(m, STAGES[m["kind"]]) if m["kind"] in STAGES else f"kind is {m['kind']!r}") or uneven(m)
    except (ValueError, RecursionError) as e:
        wrong = one_line(e)
    if wrong:
        raise ValueError(f"{file} is damaged ({wrong}); delete it, and `alignax overopt` measures that stage again")
    return m


def uneven(m: dict[str, Any]) -> str:
    """An error text for a table of a stage with the wrong number of seeds or points; empty if all sizes agree."""
    S, runs = len(m["seeds"]), m.get("runs", [m])
    if m["kind"] == "best_of_n":
        E, bins = len(m["n"]), [len(rows[0]) if rows else 0 for rows in m["calibration"].values()]
        tables = [("kl", [m["kl"]], 1, E), ("accuracy", m["accuracy"], S, m["members"])]
        tables += [(name, rows, 3, B) for (name, rows), B in zip(m["calibration"].items(), bins, strict=True)]
        tables += [(name, rows, S, E) for own in m["curves"].values() for name, rows in own.items()]
    else:
        tables = [(name, rows, S, len(run["step"])) for run in runs for name, rows in run["curves"].items()]
    odd = [name for name, rows, height, width in tables if not height * width or [len(row) for row in rows] != [width] * height]
    return f"{odd[0]} has a different size from the rest" if odd else "" if runs else "runs is []"


def curves(measurements: Sequence[dict[str, Any]]) -> list[Curve]:
    """The curves of all measurements."""
    out = []
    for m in measurements:
        if m["kind"] == "best_of_n":
            d = np.sqrt(np.maximum(m["kl"], 0.0))
            for objective, values in m["curves"].items():
                bands = {quantity: band(np.array(x)) for quantity, x in values.items()}
                out.append(Curve(m["kind"], m["arm"], objective, None, np.array(m["n"]), d, bands, len(m["seeds"])))
        else:
            beta = m.get("beta")
            alone = {"setting": "" if beta is None else f"β = {beta:g}", "beta": beta, "step": m.get("step"), "curves": m.get("curves")}
            for run in m.get("runs", [alone]):
                bands = {quantity: band(np.array(x)) for quantity, x in run["curves"].items()}
                at = np.array(run["step"])
                d = np.sqrt(np.maximum(bands["kl"].mean, 0.0)) if "kl" in bands else np.full(len(at), np.nan)
                family, seeds = m.get("family", ""), len(m["seeds"])
                out.append(
                    Curve(
                        m["kind"],
                        m["arm"],
                        m["objective"],
                        run.get("beta"),
                        at,
                        d,
                        bands,
                        seeds,
                        run["setting"],
                        family,
                        m.get("holes", ()),
                    )
                )
    return out


def band(samples: np.ndarray) -> Band:
    """The mean and confidence interval over seeds (ddof 1): [S, E] -> [E]."""
    S, mean = samples.shape[0], samples.mean(axis=0)
    if S == 1:
        return Band(mean, None, None)
    half = stdtrit(S - 1, 0.5 + LEVEL / 2) * samples.std(axis=0, ddof=1) / math.sqrt(S)
    return Band(mean, mean - half, mean + half)


def peak(curve: Curve) -> dict[str, float]:
    """The peak of a curve's mean gold reward, its final value, and the drop between them, with confidence limits if known."""
    gold = curve.values["gold"]
    best = int(np.nanargmax(gold.mean))
    out = {
        "peak": gold.mean[best], "peak_at": curve.at[best], "peak_d": curve.d[best], "final": gold.mean[-1], "final_at": curve.at[-1],
        "final_d": curve.d[-1], "drop": gold.mean[best] - gold.mean[-1],
    }  # fmt: skip
    if gold.low is not None and gold.high is not None:
        out |= {"peak_low": gold.low[best], "peak_high": gold.high[best], "final_low": gold.low[-1], "final_high": gold.high[-1]}
    return {name: float(x) for name, x in out.items()}


def fitted(own: Sequence[Curve]) -> dict[str, fits.Fit | None]:
    """Fits of both laws to the gold rewards of all curves together. None for curves that do not begin at the initial policy."""
    if any(curve.kind in ("optima", "steps") or "gold" not in curve.values or not curve.d[0] < fits.SMALLEST for curve in own):
        return dict.fromkeys(LAWS)
    d = np.concatenate([curve.d for curve in own])
    gained = np.concatenate([curve.values["gold"].mean - curve.values["gold"].mean[0] for curve in own])
    return {name: fits.fit(law, d, gained) for name, law in LAWS.items()}


def pooled(own: Sequence[Curve]) -> dict[tuple[str, str, str, str], list[Curve]]:
    """Groups of curves with the same kind, world, family and objective, over all coefficients. One law is fitted to each group."""
    groups: dict[tuple[str, str, str, str], list[Curve]] = {}
    for curve in own:
        groups.setdefault((curve.kind, curve.arm, curve.family, curve.objective), []).append(curve)
    return groups


def as_json(measurements: Sequence[dict[str, Any]]) -> str:
    """All numbers of the page as JSON: curves, peaks, laws, calibration, samples."""
    own = curves(measurements)
    laws = [
        {"kind": kind, "world": arm, "family": family, "objective": objective}
        | {name: fit and fit._asdict() for name, fit in fitted(group).items()}
        for (kind, arm, family, objective), group in pooled(own).items()
    ]
    kept = ("kind", "arm", "members", "prompts", "responses", "excluded", "excluded_pairs", "accuracy", "calibration", "samples")
    rest = [{name: m[name] for name in kept if name in m} for m in measurements if m["kind"] in ("best_of_n", "training")]
    out = {"made": makers(measurements), "curves": [_plain(curve) for curve in own], "laws": laws, "measurements": rest}
    return json.dumps(out, indent=1, ensure_ascii=False, allow_nan=False)


def makers(measurements: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The distinct versions and processors that made the measurements (see `alignax.overopt.laboratory.made_by`)."""
    found = [m["made"] for m in measurements if m.get("made")]
    return [made for i, made in enumerate(found) if made not in found[:i]]


def _plain(curve: Curve) -> dict[str, Any]:
    numbers = lambda x: None if x is None else [None if math.isnan(y) else y for y in x.tolist()]
    values = {name: {end: numbers(x) for end, x in own._asdict().items()} for name, own in curve.values.items()}
    about = {"kind": curve.kind, "world": curve.arm, "family": curve.family, "objective": curve.objective, "setting": curve.setting}
    about |= {"beta": curve.beta, "seeds": curve.seeds} | ({"holes": curve.holes} if curve.holes else {})
    found = {name: None if math.isnan(x) else x for name, x in peak(curve).items()} if "gold" in curve.values else None
    return about | {"at": curve.at.tolist(), "d": numbers(curve.d), "values": values, "gold": found}


def as_csv(own: Sequence[Curve]) -> str:
    """All curves as CSV: one row per curve, quantity and point."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["kind", "world", "family", "objective", "setting", "beta", "at", "d", "quantity", "mean", "low", "high", "seeds"])
    for c in own:
        for name, x in c.values.items():
            for i, (at, d) in enumerate(zip(c.at, c.d, strict=True)):
                numbers = (d, x.mean[i], None if x.low is None else x.low[i], None if x.high is None else x.high[i])
                d, *rest = ("" if number is None or math.isnan(number) else f"{number:.6g}" for number in numbers)
                write([c.kind, c.arm, c.family, c.objective, c.setting, c.beta, at, d, name, *rest, c.seeds])
    return out.getvalue()
