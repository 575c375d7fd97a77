"""Training runs in the report: with a gold reward and without, online and offline, evaluated and not."""

import json
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
    run = write(tmp_path / "run", logged + steps, said)
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "first and last, reward: 0.10 → 0.90; KL (nats): 0.00 → 3.99; truncated responses: 0.50 → 0.50." in out
    assert "first and last, loss: 1.00 → 1.00; entropy (nats a token): 2.00 → 1.00." in out
    page = (run / "report.html").read_text()
    for part in ("<h1>Training</h1>", "They have no gold reward", 'data-head="response">at 8xxx', "&lt;b&gt;p"):
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
