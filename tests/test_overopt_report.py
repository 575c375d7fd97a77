"""Figures, numbers and names of the report."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from alignax.overopt import figures, report, results, tables, training


def curve(objective: str = "single", gold=(0.0, 1.0, 0.5), arm: str = "tail", kind: str = "best_of_n") -> results.Curve:
    gold = np.array(gold)
    values = {"gold": results.Band(gold, gold - 0.1, gold + 0.1), "proxy": results.Band(2 * gold, None, None)}
    return results.Curve(
        kind, arm, objective, 0.1 if kind == "direct" else None, np.array([1, 4, 16]), np.array([0.0, 0.8, 1.35]), values, 3,
        "β = 0.1" if kind == "direct" else "",
    )  # fmt: skip


def run(name: str, *curves: results.Curve) -> tables.Run:
    return tables.Run(name, Path(name), [], list(curves))


def test_every_line_looks_different_and_a_line_that_turns_back_has_bars():
    straight = [figures.Line(str(i), [0.0, 1.0], [0.0, i], [-1.0, i - 1.0], [1.0, i + 1.0]) for i in range(8)]
    turning = figures.Line("back", [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    axes = figures.figure([figures.Panel([*straight, turning], "t", "x", "y", limits=(-1.0, 9.0), reach=2.5)]).axes[0]
    lines = [line for line in axes.get_lines() if line.get_markersize() == 4]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 9
    assert np.isnan(lines[-1].get_xdata()).tolist() == [False, False, True, False], "what falls back at once is not joined"
    assert not np.isnan(lines[0].get_xdata()).any()
    assert axes.get_xlim() == (0.0, 2.5) and axes.get_ylim() == (-1.0, 9.0)
    assert [type(x).__name__ for x in axes.collections].count("LineCollection") == 1 and len(axes.collections) == 9
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*map(str, range(8)), "back"]
    one, again = (figures.png(figures.figure([figures.Panel(straight[:1], "t", "x", "y")])) for _ in range(2))
    assert one == again and one.startswith(b"\x89PNG")


def test_long_lines_are_drawn_more_densely_at_their_beginning():
    E = 400
    gold = results.Band(np.arange(E) / E, None, None)
    own = results.Curve("direct", "tail", "DPO", 0.1, np.arange(E), np.arange(E) / 100, {"gold": gold}, 1)
    x = np.array(report.line("β", own, "gold").x)
    assert x[0] == 0.0 and x[-1] == own.d[-1] and len(x) <= report.DRAWN + 1
    assert (x < 1.0).sum() > 2 * (x >= 2.0).sum()


def test_the_law_is_drawn_through_the_gold_of_best_of_n_alone():
    own = curve(gold=(0.2, 1.0, 0.5))._replace(d=np.array([0.0, 0.8, 1.35]))
    assert report.line("single", own, "gold").law is None, "two points beyond 0.3 are too few"
    d = np.linspace(0, 2, 9)
    gold = 0.2 + d * (1.0 - 0.3 * d)
    own = own._replace(d=d, at=np.arange(9), values={"gold": results.Band(gold, None, None), "proxy": results.Band(gold, None, None)})
    x, y = report.line("single", own, "gold").law
    np.testing.assert_allclose(y, 0.2 + np.array(x) * (1.0 - 0.3 * np.array(x)), rtol=1e-6)
    assert report.line("single", own, "proxy").law is None
    cells = tables.laws([(run("a"), [own])])["rows"][0]
    assert cells[:3] == ["single", "d (α − β d)", "1.000"] and cells[5:] == ["1.67", "0.83", 7]
    rising = own._replace(values={"gold": results.Band(d * (1.0 - 0.1 * d), None, None)})
    assert tables.laws([(run("a"), [rising])])["rows"][0][5:7] == ["not seen", "–"], "a peak beyond the data is no finding"


def test_ends_and_findings():
    own = [(run("a"), [curve(), curve("UWO", (0.0, 1.0, 1.2))])]
    table = tables.ends(own)
    assert table["rows"][0][:8] == ["single", "1.00", "4", "0.80", "0.50", "0.40 to 0.60", "0.50", "1.35"]
    assert table["head"].index("proxy at the end") == 8 and table["rows"][1][8] == "2.40"
    assert tables.findings(own) == ["gold reward at its peak → at n = 16: single: 1.00 → 0.50; UWO: 1.20 → 1.20."]
    two = [(run("a"), [curve("DPO", kind="direct")]), (run("b"), [curve("DPO", kind="direct")])]
    assert tables.ends(two)["head"][0] == "run" and [row[0] for row in tables.ends(two)["rows"]] == ["a", "b"]
    assert tables.findings(two)[1] == "b: DPO, gold reward at its peak → at the end: β = 0.1: 1.00 → 0.50."
    assert list(report.shared_axes(two)) == ["DPO, a", "DPO, b"]


def online(objective: str, setting: str = "", kind: str = "online") -> results.Curve:
    return curve(objective, kind=kind)._replace(setting=setting, family="PPO")


def test_online_methods_have_a_panel_for_each_objective_or_share_one():
    swept = [online(objective, f"β = {beta}") for objective in ("single", "UWO") for beta in (0, 1)]
    panels = report.shared_axes([(run("a"), swept)])
    assert {name: [label for label, _ in lines] for name, lines in panels.items()} == {
        name: ["β = 0", "β = 1"] for name in ("single", "UWO")
    }
    alone = [online("JS"), online("TV"), online("target", kind="optima")]
    assert [label for label, _ in report.shared_axes([(run("a"), alone)])[""]] == ["JS", "TV", "target"]
    assert report.arms([run("a", *swept, *alone)]) == [("online", "tail", "PPO")], "optima are in the section of their family"
    assert tables.findings([(run("a"), swept[:2])]) == [
        "single, gold reward at its peak → at the end: β = 0: 1.00 → 0.50; β = 1: 1.00 → 0.50."
    ]
    rows = tables.ends([(run("a"), alone)])["rows"]
    assert [row[:3] for row in rows] == [["JS", "1.00", "4"], ["TV", "1.00", "4"], ["target", "1.00", "–"]]


def test_the_law_of_a_panel_is_that_of_all_of_its_lines():
    d = np.linspace(0.0, 2.5, 11)
    gold = np.where(d > 0, d * (0.4 - 0.8 * np.log(np.maximum(d, 1e-9))), 0.0)
    swept = [
        online("single", f"β = {i}")._replace(d=d[:n], values={"gold": results.Band(gold[:n], None, None)}) for i, n in ((0, 11), (1, 6))
    ]
    x, y = report.pooled_law(swept)
    np.testing.assert_allclose(y, np.array(x) * (0.4 - 0.8 * np.log(x)), atol=1e-6)
    assert report.pooled_law([own._replace(kind="optima") for own in swept]) is None
    assert report.pooled_law([swept[0], swept[1]._replace(objective="UWO")]) is None, "of two objectives there is no one law"


def test_many_panels_are_laid_out_in_rows_with_one_legend():
    own = figures.Panel([figures.Line("β", [0.0, 1.0], [0.0, 1.0])], "t", "x", "y", law=([0.3, 1.0], [0.5, 0.2]))
    drawing = figures.figure([own] * 5)
    assert len(drawing.axes) == 5 and len(drawing.legends) == 1 and not any(axes.get_legend() for axes in drawing.axes)
    width, height = drawing.get_size_inches()
    assert (width, height) == pytest.approx((2 * 4.2, 3 * 3.4))
    assert all(len([line for line in axes.get_lines() if line.get_linestyle() == ":"]) == 1 for axes in drawing.axes)
    other = own._replace(lines=[figures.Line("γ", [0.0, 1.0], [0.0, 1.0])])
    assert all(axes.get_legend() for axes in figures.figure([own, other]).axes)


def test_names_of_any_kind_leave_the_axes_their_place():
    names = ["dpo-beta0.1-lr2e-4-seed0", "x" * 200, "run-猫", "a\tb\udcff", "$\\foo$"]
    drawing = figures.figure([figures.Panel([figures.Line(name, [0.0, 1.0], [0.0, 1.0]) for name in names], "x" * 100, "x", "y")])
    figures.png(drawing)  # a warning is an error
    (axes,) = drawing.axes
    assert axes.get_position().width > 0.6 and axes.get_position().height * drawing.get_size_inches()[1] > 2.0
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown[0] == names[0] and shown[1].replace("\n", "") == names[1]
    assert shown[2:] == [r"run-\u732b", r"a\tb\udcff", r"\$\foo\$"]


def test_numbers():
    assert [tables.number(x) for x in (1.005, -0.5, -0.001, None)] == ["1.00", "−0.50", "0.00", "–"]


def test_names_of_runs():
    assert report.distinct([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert report.distinct([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    with pytest.raises(ValueError, match="given twice"):
        report.distinct([Path("/x/a"), Path("/x/a")])


def test_bands():
    own = results.band(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]))
    half = 4.302653 * 2.0 / np.sqrt(3)  # Student's t, two degrees of freedom
    np.testing.assert_allclose(own.mean, [3.0, 2.0])
    np.testing.assert_allclose(own.high, [3.0 + half, 2.0], rtol=1e-6)
    np.testing.assert_allclose(own.low, [3.0 - half, 2.0], rtol=1e-6)
    assert results.band(np.ones((1, 2))).low is None


def test_the_course_of_an_online_run_and_what_became_of_its_samples(tmp_path):
    write = lambda file, rows: (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("metrics.jsonl", ({"step": i, "eval/kl": i / 8, "eval/gold": 1 - i / 8, "eval/reward": i / 4} for i in range(33)))
    write(
        "samples.jsonl",
        ({"step": i, "prompt": p, "completion": f"{p} at {i}", "gold": 0.5} for i in (0, 16, 32) for p in ("one", "two")),
    )
    (own,) = training.of_training(tmp_path)
    found = tables.Run("x", tmp_path, [own], results.curves([own]))
    course = tables.course([(found, found.curves)])
    assert course["head"] == ["step", "reward", "gold reward", "KL (nats)"]
    assert course["rows"][0] == ["0", "0.000", "1.000", "0.000"] and course["rows"][-1] == ["32", "8.000", "−3.000", "4.000"]
    assert [row[0] for row in course["rows"]] == [str(i) for i in range(0, 33, 4)]
    (samples,) = tables.samples([(found, own)])
    assert [row[:3] for row in samples["rows"]] == [[p, i, f"{p} at {i}"] for p in ("one", "two") for i in ("0", "32")]
    assert tables.course([(run("a"), [curve(kind="direct")])])["rows"] == []


class Boxes(HTMLParser):
    """The elements of a page, each as (its tag, its attributes, whether it stands in a box that scrolls sideways)."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        scrolls = "scroll" in dict(attrs).get("class", "").split()
        self.found.append((tag, dict(attrs), any(inside for _, inside in self.open)))
        if tag not in ("meta", "img"):
            self.open.append((tag, scrolls))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag


def test_on_a_phone_what_is_wide_scrolls_in_a_box_of_its_own(tmp_path):
    """Tables, and figures of several panels, which would be illegible if they were as narrow as a phone; long names take several lines.

    In Chromium at 390 and 320 px, this page was as wide as the window. Without the rules for `nav li` it was 610 px wide.
    """
    curves = {"gold": [[0.0, 1.0], [0.0, 0.5]], "kl": [[0.0, 1.0]] * 2, "length": [[3.0, 4.0]] * 2}
    about = {"kind": "online", "arm": "a_world_with_a_long_name" * 3, "seeds": [0, 1], "objective": "PPO", "over_steps": ["kl", "length"]}
    about |= {"family": "a family", "runs": [{"setting": "", "beta": 0.1, "step": [0, 4], "curves": curves}]}
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "0.json").write_text(json.dumps(about))
    report.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    found = Boxes(text).found
    style: dict[str, str] = {}
    for rule, body in re.findall(r"([^{}]+)\{([^{}]*)\}", text[text.index("<style>") : text.index("</style>")]):
        style[rule.strip()] = style.get(rule.strip(), "") + body
    assert "width=device-width, initial-scale=1" in text and "overflow-x: auto" in style[".scroll"]
    assert {inside for tag, _, inside in found if tag == "table"} == {True}
    images = [(attrs, inside) for tag, attrs, inside in found if tag == "img"]
    assert [inside for _, inside in images] == [int(attrs["width"]) > 420 for attrs, _ in images] and len(images) == 2
    assert [attrs.get("style") for attrs, _ in images] == [None, "--width: 840px"], "a wide figure keeps its size on a phone"
    assert "width: 100%" in style["figure img"] and "width: var(--width)" in style["figure.wide img"]
    for rule in ("nav li", "dt", "dd"):  # boxes of flex and grid layouts are else as wide as their longest word
        assert "min-width: 0" in style[rule] and "overflow-wrap: anywhere" in style[rule], rule
    assert "overflow-wrap: break-word" in style["body"]
    assert [rule for rule, body in style.items() if "nowrap" in body] == ["th, td"], "cells alone, which scroll"
    assert "sticky" in style["caption span"] and "100vw" in style["caption span"], "a caption is read without scrolling"
