"""What `alignax bench` shows of its measurements: tables in Markdown, each under its command and machine, and the roofline."""

import functools
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignax import output
from alignax.overopt import figures
from alignax.text import markdown

ORIGIN = "alignax bench"
Found = dict[str, Any]  # measurements of a case, see `alignax.bench.measure`


def page(arguments: Sequence[str], about: Found, text: str) -> str:
    """A page of Markdown: a table under the command that made it and the machine that it was made on."""
    return f"`{shlex.join(['alignax', *arguments])}`: {machine_line(about)}.\n\n{text}\n"


def unit(about: Found) -> str:
    """The second that rates of a machine are told in."""
    return "CPU second" if about["platform"] == "cpu" else "second"


def machine_line(about: Found) -> str:
    """The machine in words, with the rates that figures are compared with."""
    devices = f"{about['devices']} {about['platform']} device{'s' * (about['devices'] > 1)}"
    product = f"a product of {about['dtype']} matrices {about['matrix_rate'] / 1e9:.4g} GFLOP per {unit(about)}"
    roofs = f"{product}, a copy {about['copy_rate'] / 1e9:.3g} GB; MFU against {about['rate'] / 1e9:.4g} ({about['rate_from']})"
    load = "" if about["load"] is None else f"load {about['load']:.1f}; "
    made = f"alignax {about['commit'] or about['alignax']}, jax {about['jax']}"
    cores = f"{about['cores']} core{'s' if about['cores'] != 1 else ''}"
    return f"{about['processor']}, {cores}; {devices}; {roofs}; {load}{made}"


def bench_table(found: Sequence[Found]) -> str:
    """The table of all cases; each row has the rate of a matrix product in its own process."""
    head = [
        "", "useful tokens/s", "per CPU s", "model GFLOP/s", "per CPU s", matrix_head(found[0]), "MFU", "real positions", "program MB",
        "device peak MB", "process peak MB", "first step s (CPU)", "from the cache",
    ]  # fmt: skip
    return markdown([head, *map(_cells, found)])


def matrix_head(case: Found) -> str:
    """The head of a column of `matrix_cell`."""
    return f"a matrix product, GFLOP per {unit(case['machine'])}"


def matrix_cell(case: Found) -> str:
    """The rate of a matrix product, measured in the process of the case."""
    return f"{case['machine']['matrix_rate'] / 1e9:.3g}"


def megabytes(found: Found, name: str) -> str:
    """A number of bytes in MB; empty where it is not known."""
    return f"{found[name] / 1e6:,.0f}" if found.get(name) is not None else ""


def _cells(case: Found) -> list[str]:
    mega = lambda name: megabytes(case, name)
    first = lambda name: "" if case[f"{name}_s"] is None else f"{case[f'{name}_s']:.1f} ({case[f'{name}_cpu_s']:.1f})"
    return [
        case["name"], f"{case['tokens_per_second']:,.0f}", f"{case['tokens_per_cpu_second']:,.0f}",
        f"{case['model_flops_per_second'] / 1e9:,.3g}", f"{case['model_flops_per_cpu_second'] / 1e9:,.3g}", matrix_cell(case),
        f"{case['mfu']:.1%}", f"{case['real_positions']:.0%}", mega("program_bytes"), mega("device_peak_bytes"), mega("process_peak_bytes"),
        first("first_step"), first("cached_first_step"),
    ]  # fmt: skip


def speed(case: Found, name: str) -> float:
    """A quantity of a case per second; on a CPU per CPU second."""
    return case[f"{name}_per_cpu_second" if case["machine"]["platform"] == "cpu" else f"{name}_per_second"]


def comparison(rounds: Sequence[Found]) -> str:
    """The table of rounds of a comparison, and a line with the median of their ratios."""
    ours = rounds[0]["ours"]
    each = f"useful tokens per {unit(ours['machine'])}"
    rows = [["round", each, "of the other", "ratio", matrix_head(ours), "process peak MB", "of the other"]]
    for i, found in enumerate(rounds):
        own, other = found["ours"], found["theirs"]
        rates = [f"{speed(own, 'tokens'):,.0f}", f"{found['theirs_per_second']:,.0f}", f"{found['ratio']:.2f}"]
        rows.append([str(i + 1), *rates, matrix_cell(own), megabytes(own, "process_peak_bytes"), megabytes(other, "process_peak_bytes")])
    ratios = [found["ratio"] for found in rounds]
    return f"{markdown(rows)}\n\nOn this machine {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}."


def roofline(found: Sequence[Found], file: Path) -> None:
    """Draws each case under the roofs of the machine: FLOP/s over FLOPs per byte (Williams et al. 2009, "Roofline").

    A point's height is its model FLOPs per second of a device. Its place on the x axis is what the compiler says of the program that is
    named in the case: the FLOPs and bytes of each instruction once, those of a loop's body too.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    about, points = found[0]["machine"], [case for case in found if case["xla_flops"] and case["xla_bytes"]]
    devices = 1 if about["platform"] == "cpu" else about["devices"]
    x = [case["xla_flops"] / case["xla_bytes"] for case in points]
    y = [speed(case, "model_flops") / devices for case in points]
    rate, copied = about["rate"], about["copy_rate"]
    ridge = rate / copied
    low, high = min([*x, ridge]) / 3, max([*x, ridge]) * 3
    second = unit(about)
    with matplotlib.rc_context(figures.STYLE):
        drawing = Figure(figsize=(7, 4.6), layout="constrained")
        axes = drawing.subplots()
        axes.loglog([low, ridge, high], [low * copied, rate, rate], color="0.35", lw=1.4)
        for i, (case, a, b) in enumerate(zip(points, x, y, strict=True)):
            colour, marker = figures.COLOURS[i % len(figures.COLOURS)], figures.MARKERS[i // len(figures.COLOURS) % len(figures.MARKERS)]
            axes.loglog([a], [b], marker, color=colour, ms=7, label=f"{figures.plain(case['name'])}  {case['mfu']:.0%}", ls="")
        note: Any = functools.partial(axes.annotate, textcoords="offset points", fontsize=8)
        note(f"{rate / 1e9:,.4g} GFLOP per {second}, {about['rate_from']}", (high, rate), (-4, 4), ha="right")
        note(f"{copied / 1e9:,.3g} GB per {second}, measured copy", (low, low * copied), (34, 6))
        axes.set(xlim=(low, high), ylim=(min([*y, low * copied]) / 2, rate * 1.6))
        axes.set(xlabel="FLOPs per byte, by the compiler (a loop's body once)", ylabel=f"model GFLOP per {second}")
        axes.set_title(f"{figures.plain(about['processor'])}, {about['dtype']}", fontsize=10)
        for line in (axes.xaxis, axes.yaxis):
            line.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e9:,g}")
        axes.grid(color="0.9", linewidth=0.6)
        axes.legend(title="share of the roof", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        with output.file(file) as tmp:
            drawing.savefig(tmp, dpi=160, format="png", metadata={"Software": ORIGIN})
