"""The protocol of the laboratory: a gold reward labels preferences, proxies learn from them, and optimisation exploits the proxies' errors.

Gao et al. 2022 (arXiv:2210.10760), Coste et al. 2023 (arXiv:2310.02743), Rafailov et al. 2024 (arXiv:2406.02900). The protocol is a list
of stages. Each stage writes its measurements to a JSON file under `stages/` in the workdir. A stopped run continues with the first stage
that has no file.
"""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import output, paths
from alignax.config import BadInput, Experiment, check_kept, difference, effective, load_experiment, of_run
from alignax.experience.ensembles import Aggregate
from alignax.losses import Loss
from alignax.overopt import bestofn
from alignax.overopt.worlds import Method, Online, Optimum, Scored, Trajectory, World, check_varies

FREE = ("workdir",)  # config fields that may change when a run continues
SINGLE = "single"  # the proxy of one reward model; its curve is the mean of the curves of each member alone
SHOWN = 2  # number of prompts in the table of samples
BINS = np.linspace(0.5, 1.0, 11)  # edges of the bins of confidence, for calibration


def run(
    experiment: Experiment,
    worlds: Mapping[str, World],
    aggregates: Mapping[str, Aggregate],
    objectives: Mapping[str, Callable[[float], Loss]],
    methods: Sequence[Method | Optimum] = (),
) -> None:
    """Measures every stage that has no measurements yet, and writes the report.

    Args:
      experiment: its config has `workdir`, `seed`, `repeats`, the groups `best_of_n` (`n`), `direct` (`repeats`, `betas`) and, if there
        are methods, `online` (`repeats`).
      worlds: name -> world. The first world is under study, the others are controls.
      aggregates: name -> proxy, a function of the scores of all members. The proxy `single` is always included.
      objectives: name -> loss of direct alignment as a function of beta. Policies are trained in the first world that supports it.
      methods: online methods and exact optima, for the first world that supports online training.

    Raises:
      BadInput: for sizes n that are not ascending from 1 on, and for a number of repeats below 1.
    """
    from alignax.overopt import report

    config = experiment.config
    sizes = tuple(config.best_of_n.n)
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise BadInput(f"config field 'best_of_n.n' is {sizes}; give sizes from 1 on, in ascending order")
    repeats = {"repeats": config.repeats, "direct.repeats": config.direct.repeats}
    repeats |= {"online.repeats": config.online.repeats} if methods else {}
    for field, count in repeats.items():
        if count < 1:
            raise BadInput(f"config field {field!r} is {count}; it must be at least 1")
    seeds = range(config.seed, config.seed + config.repeats)
    fewer = range(config.seed, config.seed + config.direct.repeats)

    def best_of_n(name: str, world: World) -> dict[str, Any]:
        return score(name, world.score(seeds), aggregates, sizes, seeds)

    def direct(name: str, train: Any, objective: str, beta: float, loss: Loss) -> dict[str, Any]:
        return align(name, objective, beta, train(fewer, loss), fewer)

    stages = [(f"best-of-n {name}", partial(best_of_n, name, world)) for name, world in worlds.items()]
    for name, train in [(name, world.align) for name, world in worlds.items() if world.align][:1]:
        for objective, make in objectives.items():
            for beta in config.direct.betas:
                stages.append((f"{objective} {name} beta {beta:g}", partial(direct, name, train, objective, beta, make(beta))))
    for name, world in [(name, world.online) for name, world in worlds.items() if world.online][:1]:
        own = range(config.seed, config.seed + config.online.repeats)
        for method in methods:
            stages.append((titled(method, name), partial(learn, name, world, method, own)))
    (workdir, lock), made = open_workdir(experiment), made_by(experiment.file)
    with closing(lock):
        for i, (name, measure) in enumerate(stages):
            stage(workdir, f"{i:02d} {name}", measure, made)
        print(report.write(workdir))


def open_workdir(experiment: Experiment) -> tuple[Path, output.Lock]:
    """Opens and locks the workdir, with the effective config in it. Refuses the workdir of another run, or a folder of other files."""
    if not experiment.config.workdir:
        raise BadInput("config field 'workdir' is empty; set --config.workdir=FOLDER")
    workdir = paths.of(experiment.config.workdir)
    saved = workdir / "config.py"
    if workdir.exists() and not workdir.is_dir():
        raise BadInput(f"workdir {str(workdir)!r} is a file; choose a new or empty folder")
    check_kept(experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    there = {file.name for file in workdir.iterdir() if not output.unfinished(file)}
    if there - {output.LOCK} and not of_run(saved):
        raise BadInput(f"workdir {str(workdir)!r} holds other files; choose a new or empty folder")
    lock = output.Lock(workdir / output.LOCK)
    if there <= {"config.py", output.LOCK}:  # no stage has been measured
        output.write_text(saved, effective(experiment))
    elif lines := difference(load_experiment(saved), experiment, FREE):
        raise BadInput(f"workdir {str(workdir)!r} belongs to another run ({'; '.join(lines[:4])}); choose another workdir")
    return workdir, lock


def made_by(file: Path) -> dict[str, str]:
    """The versions that measurements depend on: experiment file, alignax and its commit (if known), jax, and processor."""
    root, processor, commit = Path(__file__).parents[2], jax.devices()[0].device_kind, ""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if processor == "cpu":
        about = Path("/proc/cpuinfo")
        lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor() or platform.machine()
    return {"file": file.name, "alignax": version("alignax"), "commit": commit, "jax": jax.__version__, "processor": processor}


def stage(workdir: Path, name: str, measure: Callable[[], dict[str, Any]], made: dict[str, str]) -> None:
    """Measures a stage and writes its JSON file, unless the file exists."""
    file = workdir / "stages" / f"{output.named(name)}.json"
    if file.is_file():
        print(f"{name}: already measured", file=sys.stderr)
        return
    print(name, file=sys.stderr)
    text = json.dumps(measure() | {"made": made}, allow_nan=False)
    file.parent.mkdir(exist_ok=True)
    output.write_text(file, text)


# Best-of-n ------------------------------------------------------------------------------------------------------------------


def score(
    arm: str, scored: Iterable[Scored], aggregates: Mapping[str, Aggregate], n: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """The measurements of best-of-n: curves [S][len(n)] under each proxy, the reward models' calibration, and samples of the first seed."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    accuracy, calibration, samples, excluded, pairs, own = [], {}, [], 0, 0, None
    for i, raw in enumerate(scored):
        try:
            own = anchored(raw)
            one, left_out = curves_of(own, aggregates, n)
        except ValueError as e:
            raise BadInput(f"world {arm!r}, seed {seeds[i]}: {e}") from e
        excluded += left_out
        pairs += raw.margins.shape[1] - own.margins.shape[1]
        for objective, values in one.items():
            for quantity, curve in values.items():
                curves.setdefault(objective, {}).setdefault(quantity, []).append(curve.tolist())
        accuracy.append((own.margins > 0).mean(axis=1).tolist())
        for name, margins in ((SINGLE, own.margins), ("mean", own.margins.mean(axis=0))):
            calibration[name] = calibration.get(name, 0) + reliability(margins)
        samples = samples or samples_of(own, aggregates, n)
        finals = ", ".join(f"{name} {x['gold'][-1]:+.2f}" for name, x in one.items())
        print(f"  seed {seeds[i]}, gold reward of the best of {n[-1]}: {finals}", file=sys.stderr)
    assert own is not None
    if excluded or pairs:
        print(f"  left out because a score is not finite: {excluded} responses, {pairs} held-out pairs", file=sys.stderr)
    K, P, N = own.members.shape
    return {
        "kind": "best_of_n", "arm": arm, "seeds": list(seeds), "members": K, "prompts": P, "responses": N, "excluded": excluded,
        "excluded_pairs": pairs, "n": list(n), "kl": [bestofn.kl(size) for size in n], "curves": curves, "accuracy": accuracy,
        "calibration": {name: table.tolist() for name, table in calibration.items()}, "samples": samples,
    }  # fmt: skip


def anchored(scored: Scored) -> Scored:
    """Scores whose mean over the initial policy's responses is 0 for each member; with free offsets a minimum over members means nothing.

    Held-out pairs with a margin that is not finite are left out.

    Raises:
      ValueError: for gold rewards that do not vary, for a member without a finite score or margin, and for two members with equal scores.
    """
    K = scored.members.shape[0]
    gold = scored.gold[np.isfinite(scored.gold)]
    check_varies(float(gold.mean()) if gold.size else np.nan, float(gold.std()) if gold.size else np.nan)
    finite = np.isfinite(scored.members)
    paired = np.isfinite(scored.margins)
    if dead := [k for k in range(K) if not (finite[k].any() and paired[k].any())]:
        raise ValueError(f"reward models {dead} of {K} give no finite score; their training failed; lower the learning rate")
    if twins := [(j, k) for k in range(K) for j in range(k) if np.array_equal(scored.members[j], scored.members[k], equal_nan=True)]:
        raise ValueError(f"reward models {twins[0][0]} and {twins[0][1]} of {K} give the same scores; give each member a different seed")
    means = np.asarray(np.mean(scored.members, axis=(1, 2), where=finite, dtype=np.float64))
    members = scored.members - means[:, None, None].astype(scored.members.dtype)
    return scored._replace(members=members, margins=scored.margins[:, paired.all(axis=0)])


def curves_of(scored: Scored, aggregates: Mapping[str, Aggregate], n: Sequence[int]) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Curves, objective -> quantity -> mean over prompts [len(n)], and the number of excluded responses. Prompts one by one save memory."""
    parts, excluded = [], 0
    for p in range(scored.gold.shape[0]):
        members = scored.members[:, p : p + 1]  # [K, 1, N]
        proxies = {f"member {k}": members[k] for k in range(len(members))}
        proxies |= {name: np.asarray(aggregate(jnp.asarray(members))) for name, aggregate in aggregates.items()}
        with np.errstate(invalid="ignore"):  # infinite scores give NaN here; `best_of_n` leaves them out
            values = {"gold": scored.gold[p : p + 1], "disagreement": members.std(axis=0)}
        if scored.lengths is not None:
            values["length"] = scored.lengths[p : p + 1]
        best = bestofn.best_of_n(proxies, values, n)
        excluded += best.excluded
        alone = [best.values[f"member {k}"] for k in range(len(members))]
        one = {SINGLE: {quantity: np.stack([x[quantity] for x in alone]).mean(axis=0) for quantity in alone[0]}}
        parts.append(one | {name: best.values[name] for name in aggregates})  # [1, len(n)]
    quantities = parts[0][SINGLE]
    return {name: {q: np.concatenate([part[name][q] for part in parts]).mean(axis=0) for q in quantities} for name in parts[0]}, excluded


def reliability(margins: np.ndarray) -> np.ndarray:
    """The calibration table [3, bins] over confidence sigmoid(|margin|): pairs, sum of confidences, pairs in the right order."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins.ravel().astype(np.float64))))
    count = lambda weights: np.histogram(confidence, BINS, weights=weights)[0]
    return np.stack([count(np.ones_like(confidence)), count(confidence), count((margins.ravel() > 0).astype(np.float64))])


def samples_of(scored: Scored, aggregates: Mapping[str, Aggregate], n: Sequence[int]) -> list[dict[str, Any]]:
    """Sample rows: under each proxy, the best of a middle n and of the largest n responses to each of the first prompts."""
    rows = []
    for p in range(min(SHOWN, scored.gold.shape[0])):
        members = scored.members[:, p]  # [K, N]
        for name, aggregate in {SINGLE: lambda x: x[0], **aggregates}.items():
            proxy = np.asarray(aggregate(jnp.asarray(members)))
            for size in dict.fromkeys((n[len(n) // 2], n[-1])):
                finite = np.isfinite(proxy[:size]) & np.isfinite(scored.gold[p, :size])
                if not finite.any():
                    continue
                i = int(np.argmax(np.where(finite, proxy[:size], -np.inf)))
                prompt, response = scored.show(p, i)
                own = [float(x) if np.isfinite(x) else None for x in members[:, i]]
                scores = {"proxy": float(proxy[i]), "gold": float(scored.gold[p, i]), "members": own}
                rows.append({"objective": name, "n": size, "prompt": prompt, "response": response} | scores)
    return rows


# Direct alignment -----------------------------------------------------------------------------------------------------------


def align(arm: str, objective: str, beta: float, trajectories: Iterable[Trajectory], seeds: Sequence[int]) -> dict[str, Any]:
    """The measurements of direct alignment: curves of each seed's policy in training, quantity -> [S][E]."""
    steps, curves = of_seeds(trajectories, f"{objective} at beta {beta:g}")
    return {"kind": "direct", "arm": arm, "objective": objective, "beta": beta, "seeds": list(seeds), "step": steps, "curves": curves}


def of_seeds(trajectories: Iterable[Trajectory], what: str) -> tuple[list[float], dict[str, list[list[float]]]]:
    """The steps of the E evaluations, and curves of S seeds: quantity -> [S][E]. Stops at a value that is not finite."""
    curves: dict[str, list[list[float]]] = {}
    steps: list[float] = []
    for own in trajectories:
        steps = own.steps.tolist()
        for quantity, values in own.values.items():
            if not np.isfinite(values).all():
                raise FloatingPointError(f"{what}: {quantity} is not finite; lower the learning rate")
            curves.setdefault(quantity, []).append(values.tolist())
    return steps, curves


# Online ---------------------------------------------------------------------------------------------------------------------


def titled(method: Method | Optimum, arm: str) -> str:
    """The stage name of an online method or an optimum."""
    of = f" {method.setting}" if isinstance(method, Optimum) else ""
    return f"{method.family} {method.objective}{of} {arm}"


def learn(arm: str, world: Online, method: Method | Optimum, seeds: Sequence[int]) -> dict[str, Any]:
    """The measurements of an online method, one run per coefficient, or of an optimum, one run over all coefficients."""
    runs = []
    out = {"arm": arm, "family": method.family, "objective": method.objective, "seeds": list(seeds), "runs": runs}
    if isinstance(method, Optimum):
        steps, curves = of_seeds(world.solve(seeds, method), titled(method, arm))
        runs.append({"setting": method.setting, "beta": None, "step": steps, "curves": curves})
        return out | {"kind": "optima", "over_steps": []}
    for coefficient, trajectories in zip(method.coefficients, world.learn(seeds, method), strict=True):
        setting = "" if coefficient is None else f"{method.symbol} = {coefficient:g}"
        steps, curves = of_seeds(trajectories, f"{titled(method, arm)} {setting}")
        runs.append({"setting": setting, "beta": coefficient, "step": steps, "curves": curves})
        gold = np.mean(curves["gold"], axis=0)
        print(f"  {setting or method.objective}: gold reward {gold.max():+.2f} at its peak, {gold[-1]:+.2f} at the end", file=sys.stderr)
    return out | {"kind": "online", "over_steps": list(method.over_steps)}
