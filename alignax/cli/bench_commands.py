"""The command `alignax bench`. Cases are measured in processes of their own; this one never asks for a device."""

import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignax import output
from alignax.bench import growth, report
from alignax.bench.case import Case, in_process, last_json, measured
from alignax.bench.methods import METHODS
from alignax.config import flat
from alignax.config.blame import refusing
from alignax.text import short

GROWTH, SAMPLER = "growth", "generate"
JSON = "runs/bench/bench.json"


def bench(
    words: Sequence[str], file: str, overrides: Sequence[str], steps: int, out: str, against: str = "", rounds: int = 3, force: bool = False
) -> None:
    """`alignax bench`: measures methods, or the run of an experiment file.

    Args:
      words: built-in methods, none for all; "growth" for how cost grows; beside an experiment file "generate" or nothing.
      file: the experiment file whose run is measured; empty: built-in cases.
      overrides: fields of the config, FIELD=VALUE.
      steps: timed training steps; rollouts with all their steps count as one.
      out: file for JSON, beside which a figure is drawn; "-": JSON on the console, and no figure.
      against: a command that is measured in turn with the case, A B A B.
      rounds: turns of such a comparison.
      force: replaces what another program wrote.
    """
    with refusing(), tempfile.TemporaryDirectory() as folder:
        for name, value in (("--steps", steps), ("--rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        own = chosen(words, file, list(overrides), steps, folder)
        experiments = [case.experiment() for case in own]  # refuses bad fields before anything is computed
        figure = Path(out).with_suffix(".png")
        if out != "-":
            output.claim(Path(out), report.ORIGIN, force)
            output.claim(figure, report.ORIGIN, force)
        if against and (len(own) != 1 or GROWTH in words):
            raise ValueError("--against compares one case; name one method, or give --config FILE.py")
        command = filled(against, flat(experiments[0].config))
        result: dict[str, Any] = {"origin": report.ORIGIN, "arguments": sys.argv[1:]}
        if against:
            result |= compared(own[0], command, rounds)
        elif GROWTH in words:
            result |= grown(overrides, steps, folder, out == "-")
        else:
            result |= every(own, figure if out != "-" else None)
        write(result, out)


def chosen(words: Sequence[str], file: str, overrides: list[str], steps: int, folder: str) -> list[Case]:
    """The cases that a command line asks for."""
    if file:
        if odd := [word for word in words if word != SAMPLER]:
            raise ValueError(f"bench of {file} measures its run; leave {short(odd[0])} out, or write {SAMPLER} for its sampler alone")
        return [Case(SAMPLER if words else Path(file).stem, "", file, overrides, steps, bool(words), folder)]
    if GROWTH in words:
        if len(words) > 1:
            raise ValueError(f"growth is measured alone; leave {short(next(w for w in words if w != GROWTH))} out")
        return [case for _, _, case in growth.cases(overrides, steps, folder)]
    if odd := [word for word in words if word not in METHODS]:
        raise ValueError(f"bench knows no method {short(odd[0])}; use {', '.join(METHODS)}, or growth, or --config FILE.py")
    names = dict.fromkeys(words or METHODS)
    return [Case(name, name, "", overrides, steps, name == SAMPLER, f"{folder}/{name}") for name in names]


def every(cases: Sequence[Case], figure: Path | None) -> dict[str, Any]:
    """Measures cases one after another; prints their table and draws the roofline, unless there is no place for a figure."""
    found = [measured(told(case)) for case in cases]
    if figure is not None:
        print(f"{report.machine_line(found[0]['machine'])}\n\n{report.bench_table(found)}\n")
        report.roofline(found, figure)
        print(f"figure {figure}")
    return {"cases": found}


def grown(overrides: Sequence[str], steps: int, folder: str, quiet: bool) -> dict[str, Any]:
    """Measures how cost grows, and prints the table unless `quiet`."""
    found = []
    for axis, value, case in growth.cases(overrides, steps, folder):
        with tempfile.TemporaryDirectory() as cache:
            found.append((axis, value, {"name": case.name} | in_process(told(case), cache)))
    if not quiet:
        print(f"{report.machine_line(found[0][2]['machine'])}\n\n{growth.growth_table(found)}\n")
    return {"growth": [{"axis": axis.letter, "value": value} | own for axis, value, own in found]}


def compared(case: Case, command: list[str], rounds: int) -> dict[str, Any]:
    """Measures a case and a command in turn; the ratio is of useful tokens per second, on a CPU per CPU second."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            ours = in_process(told(case), cache)
        theirs = last_json(command, what=f"--against {shlex.join(command)}")
        theirs = theirs.get("cases", [theirs])[0]
        ratio = report.speed(ours, "tokens") / rate_of(theirs, ours["machine"]["platform"] == "cpu")
        found.append({"ours": ours, "theirs": theirs, "ratio": ratio})
        print(f"ratio {ratio:.3f}", file=sys.stderr)
    ratios = [round["ratio"] for round in found]
    each, median = ", ".join(f"{x:.2f}" for x in ratios), statistics.median(ratios)
    print(f"{report.machine_line(found[0]['ours']['machine'])}\nratios {each}; median {median:.2f}", file=sys.stderr)
    return {"command": shlex.join(command), "rounds": found, "median": median}


def rate_of(theirs: dict[str, Any], on_cpu: bool) -> float:
    """The useful tokens per second that a command of `--against` reports, on a CPU per CPU second.

    Raises:
      ValueError: if it reports none.
    """
    names = ("tokens_per_cpu_second", "tokens_per_cpu_s") if on_cpu else ("tokens_per_second",)
    if found := next((theirs[name] for name in names if theirs.get(name)), None):
        return found
    if on_cpu and theirs.get("tokens_per_step") and theirs.get("cpu_s_median"):
        return theirs["tokens_per_step"] / theirs["cpu_s_median"]
    raise ValueError(f"the command of --against prints {short(list(theirs))}; let its last line be JSON with {names[0]}")


def filled(command: str, config: dict[str, Any]) -> list[str]:
    """The words of a command with fields of the config in place of {FIELD}.

    Raises:
      ValueError: for a field that the config has not.
    """
    if odd := [name for name in re.findall(r"{([\w.]+)}", command) if name not in config]:
        raise ValueError(f"--against has {{{odd[0]}}}, which is no field; `alignax train --config FILE.py --dry-run` lists them")
    return shlex.split(re.sub(r"{([\w.]+)}", lambda found: str(config[found[1]]), command))


def told(case: Case) -> Case:
    """The case; says on stderr that it is measured now."""
    print(f"measuring {case.name}", file=sys.stderr, flush=True)
    return case


def write(result: dict[str, Any], out: str) -> None:
    """Writes the JSON file, or one line of JSON onto the console."""
    if out == "-":
        print(output.json_text(result))
        return
    output.write_json(result, out)
    print(f"figures in {out}")
