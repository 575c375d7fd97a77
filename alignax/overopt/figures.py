"""Figures of the report: lines with confidence bands over sqrt(KL), as in Gao et al. 2022, arXiv:2210.10760."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the palette of Okabe and Ito, safe for colour-blind readers
MARKERS = "osD^vP"
STROKES = ("-", "--", ":")
DISTANCE = r"$\sqrt{\mathrm{KL}(\mathrm{policy}\,\|\,\mathrm{reference})}$  ($\sqrt{\mathrm{nats}}$)"
LETTERS = 40  # letters in a text line as wide as a panel
LINE = 0.18  # inches between two lines of a legend
FALL = 0.5  # two neighbouring points are not joined if x falls by more than this
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE: Any = {"font.family": FONT, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "mathtext.fontset": "dejavusans"}


class Line(NamedTuple):
    """One line of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # lower and upper edge of the band, if there is one
    high: Sequence[float] | None = None
    law: tuple[Sequence[float], Sequence[float]] | None = None  # x and y of a fitted curve, drawn dotted
    gaps: Sequence[int] = ()  # points that are not joined to the one before them


class Panel(NamedTuple):
    """One set of axes."""

    lines: Sequence[Line]
    title: str
    x_label: str
    y_label: str
    limits: tuple[float, float] | None = None  # of the y axis, if several panels share them
    reach: float | None = None  # upper limit of the x axis
    diagonal: bool = False  # whether to draw y = x, dotted
    law: tuple[Sequence[float], Sequence[float]] | None = None  # x and y of a curve fitted to all lines, dotted in grey


def figure(panels: Sequence[Panel], width: float = 4.2, height: float = 3.4) -> Any:
    """A matplotlib Figure of panels, at most three in a row. Lines differ in colour and marker; a ring marks the last point of each."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        columns = len(panels) if len(panels) <= 3 else 2
        rows = -(-len(panels) // columns)
        height += LINE * max(0, max(_lines(panel, _columns(panel, len(panels))) for panel in panels) - 2)
        drawing = Figure(figsize=(width * columns, height * rows), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        for axes, panel in zip(drawing.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            for i, line in enumerate(panel.lines):
                if len(line.x):
                    # More bands are drawn lighter, so that lines stay visible where all bands overlap.
                    _draw(axes, line, i, ring=not panel.diagonal, shade=max(0.07, 0.3 / (1 + len(panel.lines))))
            axes.set(title=plain(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
            if panel.diagonal:
                axes.axline((0.5, 0.5), slope=1, color="0.5", ls=":", lw=1)
                axes.set_xlim(0.48, panel.reach)
            else:
                axes.set_xlim(0, panel.reach)
            if panel.law is not None:
                axes.plot(*panel.law, ls=":", color="0.35", lw=1.2)
            axes.margins(y=0.08)
            if panel.limits:
                axes.set_ylim(*panel.limits)
            axes.grid(color="0.9", linewidth=0.6)
        for axes in drawing.axes[len(panels) :]:
            axes.remove()
        _legends(drawing, panels)
    return drawing


def plain(text: str) -> str:
    """A name as it is: matplotlib takes what stands between dollars for formulas, and leaves names that begin with _ out of legends.

    A character that the font has not is spelt by its number, and a long name takes several lines.
    """
    from matplotlib import font_manager

    there = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    text = "".join(x if x.isprintable() and ord(x) in there else ascii(x)[1:-1] for x in text)
    text = "\n".join(text[i : i + LETTERS] for i in range(0, len(text), LETTERS))
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _columns(panel: Panel, panels: int) -> int:
    """Columns of a panel's legend: few enough that long names do not squeeze the axes."""
    longest = max((len(part) for line in panel.lines for part in plain(line.label).split("\n")), default=0)
    return max(1, min(3 if panels == 1 else 2, LETTERS // (longest + 5)))


def _lines(panel: Panel, columns: int) -> int:
    """Text lines of a panel's legend with this number of columns."""
    return -(-len(panel.lines) // columns) * max((1 + plain(line.label).count("\n") for line in panel.lines), default=1)


def _legends(drawing: Any, panels: Sequence[Panel]) -> None:
    """Draws a legend below each panel, or one below all panels if their lines have the same names."""
    if len(panels) > 1 and len({tuple(line.label for line in panel.lines) for panel in panels}) == 1:
        columns = min(6, 2 * _columns(panels[0], 1))
        drawing.legend(*drawing.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=columns)
        return
    for axes, panel in zip(drawing.axes, panels, strict=True):
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=_columns(panel, len(panels)))


def _draw(axes: Any, line: Line, i: int, ring: bool, shade: float) -> None:
    colour, marker, stroke = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], STROKES[i // len(COLOURS) % len(STROKES)]
    axes.plot(*_broken(line), marker, ls=stroke, color=colour, ms=4, lw=1.2, label=plain(line.label), clip_on=False)
    if ring:
        axes.plot(line.x[-1], line.y[-1], marker, color=colour, ms=10, mfc="none", clip_on=False)
    if line.low is not None and line.high is not None:
        if all(a < b for a, b in zip(line.x, line.x[1:], strict=False)):
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=shade, lw=0)
        else:  # x goes back and forth, so bars replace the band
            axes.vlines(line.x[::-3], line.low[::-3], line.high[::-3], color=colour, alpha=0.35, lw=1.5)
    if line.law is not None:
        axes.plot(*line.law, ls=":", color=colour, lw=0.9)


def _broken(line: Line) -> tuple[list[float], list[float]]:
    """The points of a line, with its gaps, and one where x falls far at once: a policy that was reset did not take that path."""
    xs, ys = list(line.x[:1]), list(line.y[:1])
    for i, (before, a, b) in enumerate(zip(line.x, line.x[1:], line.y[1:], strict=False), 1):
        gap = [math.nan] if before - a > FALL or i in line.gaps else []
        xs, ys = [*xs, *gap, a], [*ys, *gap, b]
    return xs, ys


def png(drawing: Any, dpi: int = 200) -> bytes:
    """The PNG file of a figure, as bytes; equal figures give equal bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawing.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
