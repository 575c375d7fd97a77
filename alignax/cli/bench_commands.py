"""The command `alignax bench`. Cases are measured in processes of their own; this one never asks for a device."""

import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignax import output, paths
from alignax.bench import growth, report
from alignax.bench.case import FIRST, Case, in_process, last_json, measured
from alignax.bench.methods import METHODS
from alignax.config import flat
from alignax.config.blame import refusing
from alignax.text import short

GROWTH, SAMPLER, AGAINST = "growth", "generate", "against"
CONFIG = "config"  # stands for all fields in a command of --against


def bench(
    words: Sequence[str], file: str, overrides: Sequence[str], steps: int, out: str, against: str = "", rounds: int = 3, force: bool = False
) -> None:
    """`alignax bench`: measures methods, or the run of an experiment file.

    Args:
      words: built-in methods, none for all; "growth" for how cost grows; beside an experiment file "generate" or nothing.
      file: the experiment file whose run is measured; empty: built-in cases.
      overrides: fields of the config, FIELD=VALUE.
      steps: timed training steps; rollouts with all their steps count as one.
      out: file for JSON, beside which a page of Markdown and, of methods, a figure are written; "-": JSON on the console and no file;
        empty: in runs/bench.
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
        if against and (len(own) != 1 or GROWTH in words):
            raise ValueError("--against compares one case; name one method, or give --config FILE.py")
        command = filled(against, flat(experiments[0].config))
        kind = AGAINST if against else GROWTH if GROWTH in words else "bench"
        places = files(out or f"runs/bench/{kind}.json", drawn=kind == "bench", force=force)
        if against:
            found, text = compared(own[0], command, rounds)
        else:
            found, text = grown(overrides, steps, folder) if GROWTH in words else every(own)
        written({"origin": report.ORIGIN, "arguments": sys.argv[1:]} | found, text, places)


def chosen(words: Sequence[str], file: str, overrides: list[str], steps: int, folder: str) -> list[Case]:
    """The cases that a command line asks for."""
    if file:
        if odd := [word for word in words if word != SAMPLER]:
            raise ValueError(f"bench of {file} measures its run; leave {short(odd[0])} out, or write {SAMPLER} for its sampler alone")
        return [Case(SAMPLER if words else paths.of(file).stem, "", file, overrides, steps, bool(words), folder)]
    if GROWTH in words:
        if len(words) > 1:
            raise ValueError(f"growth is measured alone; leave {short(next(w for w in words if w != GROWTH))} out")
        return [case for _, _, case in growth.cases(overrides, steps, folder)]
    if odd := [word for word in words if word not in METHODS]:
        raise ValueError(f"bench knows no method {short(odd[0])}; use {', '.join(METHODS)}, or growth, or --config FILE.py")
    names = dict.fromkeys(words or METHODS)
    return [Case(name, name, "", overrides, steps, name == SAMPLER, f"{folder}/{name}") for name in names]


def every(cases: Sequence[Case]) -> tuple[dict[str, Any], str]:
    """Measures cases one after another; their figures, and the page with their table."""
    found = [measured(case) for case in told(cases)]
    return {"cases": found}, report.page(sys.argv[1:], found[0]["machine"], report.bench_table(found))


def grown(overrides: Sequence[str], steps: int, folder: str) -> tuple[dict[str, Any], str]:
    """Measures how cost grows; the figures, but for first steps, since cases share compiled programs, and the page with their table."""
    axes, values, cases = zip(*growth.cases(overrides, steps, folder), strict=True)
    with tempfile.TemporaryDirectory() as cache:
        measurements = [{"name": case.name} | in_process(case, cache) for case in told(cases)]
    found: list[report.Found] = [{name: x for name, x in case.items() if name not in FIRST} for case in measurements]
    rows = list(zip(axes, values, found, strict=True))
    own = [{"axis": axis.letter, "value": value} | case for axis, value, case in rows]
    return {"growth": own}, report.page(sys.argv[1:], found[0]["machine"], growth.growth_table(rows))


def compared(case: Case, command: list[str], rounds: int) -> tuple[dict[str, Any], str]:
    """Measures a case and a command in turn; the ratio is of useful tokens per second, on a CPU per CPU second."""
    found = []
    for own in told([case] * rounds):
        with tempfile.TemporaryDirectory() as cache:
            ours = in_process(own, cache)
        theirs = last_json(command, what=f"--against {shlex.join(command)[:200]}")
        theirs = theirs.get("cases", [theirs])[0]
        rate = rate_of(theirs, ours["machine"]["platform"] == "cpu")
        found.append({"ours": ours, "theirs": theirs, "theirs_per_second": rate, "ratio": report.speed(ours, "tokens") / rate})
    result = {"command": shlex.join(command), "rounds": found, "median": statistics.median(x["ratio"] for x in found)}
    return result, report.page(sys.argv[1:], found[0]["ours"]["machine"], report.comparison(found))


def rate_of(theirs: dict[str, Any], on_cpu: bool) -> float:
    """The useful tokens per second that a command of `--against` reports, on a CPU per CPU second.

    Raises:
      ValueError: if it reports none.
    """
    name = "tokens_per_cpu_second" if on_cpu else "tokens_per_second"
    if not isinstance(found := theirs.get(name), int | float) or found <= 0:
        raise ValueError(f"the command of --against prints {short(list(theirs))}; let its last line be JSON with {name}, above 0")
    return found


def filled(command: str, config: dict[str, Any]) -> list[str]:
    """The words of a command with fields of the config in place of {FIELD}, and all of them as JSON in place of {config}.

    Raises:
      ValueError: for a field that the config has not.
    """
    fields = config | {CONFIG: json.dumps(config, default=str)}
    if odd := [name for name in re.findall(r"{([\w.]+)}", command) if name not in fields]:
        raise ValueError(f"--against has {{{odd[0]}}}, which is no field; `alignax train --config FILE.py --dry-run` lists them")
    return [re.sub(r"{([\w.]+)}", lambda found: str(fields[found[1]]), word) for word in shlex.split(command)]


def told(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases one after another; says on stderr which of them is measured now."""
    began = time.perf_counter()
    for i, case in enumerate(cases):
        print(f"measuring {case.name} ({i + 1} of {len(cases)}, {time.perf_counter() - began:.0f} s so far)", file=sys.stderr, flush=True)
        yield case


def files(out: str, drawn: bool, force: bool) -> list[Path]:
    """The files to write: JSON, Markdown, and if `drawn` a figure; none if `out` is "-".

    Raises:
      ValueError: for a place that cannot be written, that another program wrote, or with the suffix of a file beside it.
    """
    if paths.of(out).suffix in (".md", ".png"):
        raise ValueError(f"--json {out} names the file for JSON, beside which a page and a figure are written; let it end with .json")
    places = [] if out == "-" else [paths.of(out), *(paths.of(out).with_suffix(suffix) for suffix in (".md", ".png")[: 1 + drawn])]
    for place in places:
        output.claim(place, report.ORIGIN, force)
    return places


def written(result: dict[str, Any], text: str, places: Sequence[Path]) -> None:
    """Prints the page and writes all files, or prints the result as one line of JSON."""
    if not places:
        print(output.json_text(result))
        return
    print(text)
    output.write_json(result, str(places[0]))
    output.write_text(places[1], text)
    for figure in places[2:]:
        report.roofline(result["cases"], figure)
    print(f"written: {', '.join(map(str, places))}")
