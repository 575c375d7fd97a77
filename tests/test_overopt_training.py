"""Training runs in the report: with a gold reward and without, online and offline, evaluated and not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from alignax import cli
from alignax.overopt import report, results, tables, training


def write(folder: Path, metrics, samples=()) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_online_run_without_gold_has_its_course_and_its_samples(tmp_path, capsys):
    logged = [{"step": i, "eval/reward": 0.1 + i / 10, "eval/kl": i / 2 - 0.01, "eval/truncated_rate": 0.5} for i in (0, 4, 8)]
    steps = [{"step": i, "loss": 1.0, "entropy": 2.0 / i} for i in (1, 2)]
    said = [{"step": i, "prompt": "<b>p", "completion": f"at {i}" + "x" * 400, "reward": i / 8} for i in (0, 4, 8)]
    run = write(tmp_path / "run", sorted(logged + steps, key=lambda row: row["step"]), said)
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "first and last, reward: 0.10 → 0.90; KL (nats): 0.00 → 3.99; truncated responses: 0.50 → 0.50." in out
    assert "first and last, loss: 1.00 → 1.00; entropy (nats per token): 2.00 → 1.00." in out
    page = (run / "report.html").read_text()
    for part in ("<h1>Training</h1>", "These runs have no gold reward", 'data-head="response">at 8xxx', "&lt;b&gt;p"):
        assert part in page, part
    assert "at 4x" not in page and not (run / "tables.md").exists()
    drawn = {file.stem for file in (run / "figures").iterdir()}
    assert {"evaluations-of-training-runs-training-steps-reward", "steps-of-training-runs-steps-steps-entropy"} <= drawn
    curves = {c["kind"]: c for c in json.loads((run / "results.json").read_text())["curves"]}
    assert curves["training"]["values"]["reward"]["mean"] == [0.1, 0.5, 0.9] and curves["training"]["gold"] is None
    assert curves["training"]["d"][0] == 0.0 and curves["steps"]["d"] == [None, None]


def test_offline_runs_and_runs_that_never_evaluated(tmp_path):
    logged = [{"step": i, "eval/loss": 0.7 - i / 10, "eval/rewards/margins": i, "eval/rewards/accuracies": 0.5} for i in (0, 1)]
    (own,) = training.of_training(write(tmp_path / "dpo", logged))
    assert own["curves"] == {"loss": [[0.7, 0.6]], "margin": [[0.0, 1.0]], "accuracy": [[0.5, 0.5]], "proxy": [[0.0, 1.0]]}
    (curve,) = results.curves([own])
    assert np.isnan(curve.d).all() and results.fitted([curve]) == {"bon": None, "rl": None}
    found = tables.Run("x", tmp_path, [own], [curve])
    assert tables.ends([(found, [curve])])["rows"] == [] and tables.markdown("x", [(found, [curve])]) == ""
    assert tables.course([(found, [curve])])["rows"][1] == ["1", "0.600", "1.000", "0.500"]
    many = [{"step": i + 1, "loss": float(i), "kl": None if i < 3 else 1.0} for i in range(250)]
    (own,) = training.of_training(write(tmp_path / "sft", [*many, {"step": 250}]))
    assert (own["kind"], len(own["step"]), own["step"][0], own["step"][-1]) == ("steps", training.PARTS, 3, 250)
    assert own["curves"]["loss"][0][0] == 1.0, "the mean of the first three"
    assert np.isnan(own["curves"]["kl"][0][0]) and own["curves"]["kl"][0][1] == 1.0
    assert json.loads(results.as_json([own]))["curves"][0]["values"]["kl"]["mean"][0] is None
    assert results.as_csv(results.curves([own])).splitlines()[1].split(",")[7:10] == ["", "loss", "1"]
    with pytest.raises(ValueError, match="no step and no evaluation in its metrics.jsonl; give the workdir of a run"):
        training.of_training(write(tmp_path / "none", [{"step": 0}]))


CURVE = {"gold": [[0.0, 1.0]], "kl": [[0.0, 0.5]]}
ABOUT = {"arm": "tail", "seeds": [0], "objective": "DPO"}
DIRECT = ABOUT | {"kind": "direct", "beta": 0.1, "step": [0, 1], "curves": CURVE}
ONLINE = ABOUT | {"kind": "online", "family": "PPO", "over_steps": ["other", "none"]}
ONLINE |= {"runs": [{"setting": "", "beta": None, "step": [0, 1], "curves": CURVE | {"other": [[1.0, 2.0]]}}]}


def without(value, key):
    return {k: v for k, v in value.items() if k != key}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *[(value, f"is {value!r}") for value in ([], 3, None, "x")],
        ({}, "kind is None"), ({"kind": "x"}, "kind is 'x'"), ({"kind": "best_of_n"}, "arm is None"),
        *[(without(DIRECT, key), f"{key} is None") for key in DIRECT], (DIRECT | {"beta": "0.1"}, "beta is '0.1'"),
        (DIRECT | {"step": [0, float("nan")]}, "step.1 is nan"), (DIRECT | {"step": [0, 10**400]}, "step.1 is 1000"),
        (DIRECT | {"seeds": [True]}, "seeds.0 is True"), (DIRECT | {"arm": "\ud800"}, "arm is "),
        (DIRECT | {"curves": CURVE | {"x": [[0.0]]}}, "x has a different"), (DIRECT | {"curves": CURVE | {"x": []}}, "x has a different"),
        (DIRECT | {"curves": {"kl": [[0.0, 1.0]]}}, "curves.gold is None"), (DIRECT | {"curves": {"gold": [0.0]}}, "curves.gold.0 is 0.0"),
        (ONLINE | {"runs": []}, "runs is []"), (ONLINE | {"runs": [3]}, "runs.0 is 3"),
        (DIRECT | {"made": {"file": "x"}}, "made.alignax is None"),
        (b"", "Expecting value"), (json.dumps(DIRECT).encode()[:-9], "delimiter"), (b"\xff", "decode byte"), (b"[" * 10**5, "recursion"),
    ],
)  # fmt: skip
def test_a_damaged_stage_is_named_with_the_remedy(value, wrong, tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "00-x.json").write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stages/00-x.json is damaged (" in line and wrong in line
    assert line.endswith("); delete it, and `alignax overopt` measures that stage again")


@pytest.mark.parametrize(
    ("file", "row", "wrong"),
    [
        ("metrics.jsonl", {"step": 2, "loss": "x"}, "its loss is 'x'"),
        ("metrics.jsonl", {"step": 2, "loss": float("inf")}, "its loss is inf"),
        ("metrics.jsonl", {"step": 2, "eval/kl": [1]}, "its eval/kl is [1]"),
        ("metrics.jsonl", [], "b'[]'"),
        ("metrics.jsonl", {"step": 0, "eval/kl": 1.0}, "its step 0 stands after step 1"),
        ("samples.jsonl", {"step": 2, "completion": "x"}, "its prompt is None"),
        ("samples.jsonl", {"step": 2, "prompt": "x"}, "its completion is None"),
        ("samples.jsonl", {"step": 2, "prompt": "x", "completion": "y", "gold": "z"}, "its gold is 'z'"),
        ("samples.jsonl", {}, "b'{}'"),
    ],
)
def test_a_damaged_row_of_a_run_is_named_with_the_remedy(file, row, wrong, tmp_path, capsys):
    write(tmp_path, [{"step": 1, "eval/reward": 0.5}])
    with open(tmp_path / file, "a") as f:
        f.write(json.dumps(row) + "\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    number = 2 if file == "metrics.jsonl" else 1
    assert f"{file}, line {number} is not a row of a log: {wrong}" in line and line.endswith("; delete that line")


def test_what_is_drawn_over_steps_may_have_any_name(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "image", lambda panels, file, caption: drawn.extend(panels) or {"file": file})
    run = tables.Run("x", tmp_path, [ONLINE], results.curves([ONLINE]))
    report.section([run], "online", "tail", "PPO")
    assert [panel.title for panel in drawn if panel.x_label == "step"] == ["Other in training"]


def test_a_bin_of_pairs_that_are_all_wrong_stays_on_the_axes(monkeypatch):
    panels = []
    monkeypatch.setattr(report, "image", lambda own, file, caption: panels.extend(own))
    counts = [[2, 0, 1], [1.1, 0, 0.95], [0, 0, 1]]  # pairs, sum of confidences, right ones
    run = tables.Run("a", Path("a"), [], [])
    report.calibration([(run, {"calibration": {"single": counts}, "accuracy": [[1.0]]})])
    ((line,), (low, high)) = panels[0].lines, panels[0].limits
    assert line.y == [0.0, 1.0] and low < 0.0 and high > 1.0
    axes = report.figures.figure(panels).axes[0]
    assert axes.get_xlim() == (0.48, 1.02) and axes.get_ylim() == (low, high)


def test_tables_for_quotation_have_their_spread_and_what_measured_them():
    gold = results.band(np.array([[0.0, 1.0, 0.5], [0.0, 2.0, 0.7]]))
    made = {"file": "lab.py", "alignax": "1.0", "commit": "abc", "jax": "0.10", "processor": "a CPU"}
    curve = results.Curve("best_of_n", "tail", "WCO", None, np.array([1, 4, 16]), np.sqrt([0.0, 0.6, 1.8]), {"gold": gold}, 2)
    text = report.as_markdown(tables.Run("x", Path("x"), [{"made": made}, {"made": made}], [curve]))
    head, _, row, _, spread, _, by = text.rstrip("\n").split("\n")
    assert head == "| Best-of-n, world “tail”, 2 seeds | gold reward at its peak | at n | at the end | KL at the end (nats) |"
    t = 12.7062 / np.sqrt(2)  # Student's t with one degree of freedom; half an interval
    assert row == f"| WCO | 1.50 ± {t * np.sqrt(0.5):.2f} | 4 | 0.60 ± {t * np.sqrt(0.02):.2f} | 1.80 |"
    assert "95 %" in spread and by == "Measured by lab.py, alignax 1.0 at commit abc, jax 0.10, a CPU."


def drawn(folder: Path, monkeypatch) -> dict[str, list[tuple[list[float], list[float]]]]:
    """The points of each figure's first line, with NaN where it is broken, by the label of the y axis; the report is written."""
    found, figure = {}, report.figures.figure

    def seen(panels):
        drawing = figure(panels)
        for axes in drawing.axes:
            found.setdefault(axes.get_ylabel(), []).append(tuple(x.tolist() for x in axes.get_lines()[0].get_data()))
        return drawing

    monkeypatch.setattr(report.figures, "figure", seen)
    report.write(folder)
    return found


def test_what_a_log_lacks_is_said_once_and_nothing_is_drawn_across_it(tmp_path, monkeypatch):
    """Steps 5 to 8 and 11 have no row, the loss of step 2 and the reward of the evaluation at step 6 were not finite."""
    steps = [{"step": i, "loss": None if i == 2 else float(i), "entropy": 1.0} for i in range(1, 13) if not (4 < i < 9 or i == 11)]
    evaluations = [{"step": i, "eval/reward": None if i == 6 else i / 10, "eval/kl": float(i)} for i in (0, 2, 4, 6, 10, 12)]
    run = write(tmp_path / "run", sorted(steps + evaluations, key=lambda row: row["step"]))
    found = drawn(run, monkeypatch)
    (x, y), nan = found["loss"][0], math.nan
    assert x == pytest.approx([1, 2, 3, 4, nan, 9, 10, nan, 12], nan_ok=True)
    assert y == pytest.approx([1, nan, 3, 4, nan, 9, 10, nan, 12], nan_ok=True)
    x, y = found["reward"][0]
    assert x == pytest.approx([0, 2, 4, 6, nan, 10, 12], nan_ok=True) and y == pytest.approx([0, 0.2, 0.4, nan, nan, 1, 1.2], nan_ok=True)
    x, y = found["proxy reward"][0]
    assert x == pytest.approx(np.sqrt([0, 2, 4, 6, nan, 10, 12]).tolist(), nan_ok=True)
    page = (run / "report.html").read_text()
    for said in (
        "metrics.jsonl has no row of steps 5 to 8 and 11; loss is not finite at step 2, and left out. Nothing is drawn there.",
        "no evaluation between steps 6 and 10, where others lie 2 apart; reward is not finite at step 6, and left out. Nothing is",
    ):
        assert page.count(said) == 1, said
    curves = {c["kind"]: c for c in json.loads((run / "results.json").read_text())["curves"]}
    assert curves["steps"]["holes"] == [[4, 9], [10, 12]] and curves["training"]["holes"] == [[6, 10]]


def test_a_whole_log_lacks_nothing(tmp_path):
    """Turns of several steps log the last of them; the last evaluation stands where the run ends."""
    steps = [{"step": i, "loss": 1.0} for i in range(4, 256, 4)]
    evaluations = [{"step": i, "eval/reward": 0.1, "eval/kl": 1.0} for i in (0, 100, 200, 256)]
    run = write(tmp_path / "run", sorted(steps + evaluations, key=lambda row: row["step"]))
    lacks = lambda: [(m["missing"], m["holes"]) for m in training.of_training(run)]
    assert lacks() == [([], []), (["metrics.jsonl has no row of step 256"], [])], "an evaluation after the last row shows it"
    run = write(run, sorted([*steps, {"step": 256, "loss": 1.0}, *evaluations], key=lambda row: row["step"]))
    assert lacks() == [([], [])] * 2


def test_the_means_of_a_long_log_do_not_reach_across_a_hole(tmp_path):
    logged = [{"step": i, "loss": float(i > 600)} for i in range(1, 1001) if not 300 < i <= 600]
    (own,) = training.of_training(write(tmp_path / "run", logged))
    (curve,) = results.curves([own])
    assert set(own["curves"]["loss"][0]) == {0.0, 1.0} and {300, 1000} <= set(own["step"]) and 98 <= len(own["step"]) <= 102
    (gap,) = report.gaps(curve, np.arange(len(curve.at)))
    assert curve.at[gap - 1] == 300 and curve.at[gap] > 600
    assert own["missing"] == ["metrics.jsonl has no row of steps 301 to 600"]
    assert training.ranges([*range(1, 40, 3)], 1) == "steps 1, 4, 7, 10, 13, 16, 19, 22 and 5 further steps"
    assert training.ranges([1000], 1) == "step 1,000"
