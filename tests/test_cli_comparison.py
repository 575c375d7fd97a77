"""The table, the line and the figure, from made-up metrics."""

import json
from pathlib import Path

import pytest

from alignax.cli import comparison


def run(workdir: Path, kl, gold, drift=(0.0, -1.0, -12.3), **more) -> Path:
    workdir.mkdir(parents=True)
    rows = [{"step": 5, "loss": 0.6}]
    for i in range(len(kl)):
        row = {"kl": kl[i], "gold": gold[i], "rewards/margins": 0.1 * i, "logps/chosen": -20 + drift[i], "logps/chosen_drift": drift[i]}
        row |= {"logps/rejected": -22.0, "logps/rejected_drift": -2.0 * i, "rewards/accuracies": 0.5 + 0.1 * i}
        row |= {name: values[i] for name, values in more.items()}
        rows.append({"step": 10 * i} | {f"eval/{name}": value for name, value in row.items()})
    rows.sort(key=lambda row: row["step"])
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


@pytest.fixture
def runs(tmp_path):
    return {
        "DPO": run(tmp_path / "dpo", [-0.01, 1.0, 9.0], [1.0, 3.0, -2.0]),
        "RPO": run(tmp_path / "rpo", [0.0, 0.5, 1.0], [1.0, 2.0, 2.5], drift=(0.0, 0.2, 0.4)),
    }


def test_table(runs):
    head, _, dpo, rpo = comparison.summary_table(runs).splitlines()
    assert head.split()[:3] == ["chosen", "logps", "drift"]
    assert dpo.split() == "DPO -20.00 -> -32.30 -12.30 -22.00 -> -22.00 -4.00 0.700 1.00 -> -2.00 3.00 (10) 9.00".split()
    assert rpo.split()[-3:] == ["2.50", "(20)", "1.00"]


def test_table_leaves_blank_what_a_run_has_not(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 5.0}\n{"step": 9, "eval/loss": 3.0, "eval/gold": null}\n')
    assert comparison.summary_table({"SFT": folder}).splitlines()[-1] == "SFT"


@pytest.mark.parametrize(
    ("dpo", "rpo", "line"),
    [
        (-12.3, 0.4, "DPO -12.3 nats, RPO +0.4 nats: DPO lets it fall, RPO holds it"),
        (-0.3, -4.04, "DPO -0.3 nats, RPO -4.0 nats: DPO holds it, RPO lets it fall"),
        (-1.0, 1.1, "DPO -1.0 nats, RPO +1.1 nats: DPO holds it, RPO raises it"),
    ],
)
def test_the_line_follows_from_the_numbers(tmp_path, dpo, rpo, line):
    runs = {name: run(tmp_path / name, [0.0], [0.0], drift=[drift]) for name, drift in (("DPO", dpo), ("RPO", rpo))}
    assert comparison.chosen_line(runs) == "chosen log-prob against the reference: " + line


def drawn(monkeypatch, runs, path):
    """The axes of the figure, kept from being lost."""
    import matplotlib.figure

    kept = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    comparison.figure(runs, path)
    return kept[0].axes


def test_figure(runs, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    gold, implicit = drawn(monkeypatch, runs, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (legend,) = implicit.get_figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["DPO", "RPO"]
    x, y = gold.get_lines()[0].get_data()
    assert list(x) == [0.0, 1.0, 3.0], "sqrt(KL), an estimate below 0 taken as 0"
    assert list(y) == [1.0, 3.0, -2.0]
    assert "nats" in gold.get_xlabel() and "gold" in gold.get_ylabel() and "implicit" in implicit.get_ylabel()
    assert len({line.get_color() for line in gold.get_lines()}) == 2


def test_figure_without_gold_has_one_panel(tmp_path, monkeypatch):
    runs = {"DPO": run(tmp_path / "dpo", [0.0, 1.0], [None, None])}
    assert len(drawn(monkeypatch, runs, tmp_path / "figure.png")) == 1


def test_runs_that_cannot_be_drawn_are_named(runs, tmp_path):
    with pytest.raises(ValueError, match="SFT: no evaluation has a KL; set eval.sample_prompts"):
        comparison.figure(runs | {"SFT": run(tmp_path / "sft", [None], [1.0])}, tmp_path / "figure.png")
    with pytest.raises(ValueError, match="no evaluation in its metrics.jsonl; give the workdir"):
        comparison.figure({"DPO": tmp_path}, tmp_path / "figure.png")
    with pytest.raises(ValueError, match="at most 6"):
        comparison.figure({str(i): tmp_path for i in range(7)}, tmp_path / "figure.png")
