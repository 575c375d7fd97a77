"""The protocol on made-up worlds, the command end to end, and bad input in one line."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from alignax import cli, config
from alignax.config import BadInput
from alignax.experience import ensembles
from alignax.overopt import figures, laboratory, report, results
from alignax.overopt.worlds import Scored

FILE = str(runs.REPO / "experiments" / "overoptimization.py")
TINY = {
    "repeats": 2, "control": False, "world.pairs": 64, "world.responses": 32, "world.prompts": 2, "world.held_out": 40,
    "proxy.members": 3, "proxy.steps": 4, "best_of_n.n": "(1,2,4,8,16,32)", "direct.repeats": 2, "direct.objectives": "('RPO',)",
    "direct.betas": "(0.1,)", "direct.pool": 50, "direct.steps": 8, "direct.every": 2, "online.repeats": 2, "online.pool": 50,
    "online.families": "('Elastic Reset', 'Optima')", "online.proxies": "('single',)", "online.rollouts": 4, "online.every": 2,
    "online.batch_size": 4, "online.reset": 2,
}  # fmt: skip
MADE = dict.fromkeys(("file", "alignax", "commit", "jax", "processor"), "x")
AGGREGATES = {"mean": ensembles.mean, "WCO": ensembles.wco}


def scored(seed: int = 0, K: int = 3, **changes) -> Scored:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(2, 20)).astype(np.float32)
    members = gold + rng.normal(size=(K, 2, 20)).astype(np.float32) + np.arange(K, dtype=np.float32)[:, None, None]
    lengths = np.broadcast_to(np.arange(20), (2, 20))
    own = Scored(gold, members, rng.normal(1.0, 1.0, (K, 50)).astype(np.float32), lengths, lambda p, i: (f"<p{p}>", f"a & {i}"))
    return own._replace(**changes)


def measure(*worlds: Scored) -> dict:
    return laboratory.score("tail", worlds, AGGREGATES, (1, 4, 20), range(len(worlds)))


def test_what_best_of_n_measures():
    own = scored()
    m = measure(own, scored(1))
    assert (m["members"], m["prompts"], m["responses"], m["seeds"], m["excluded"]) == (3, 2, 20, [0, 1], 0)
    assert m["curves"].keys() == {"single", "mean", "WCO"}
    curve = lambda name, quantity: np.array(m["curves"][name][quantity])
    assert curve("mean", "gold").shape == (2, 3)
    anchored = own.members - own.members.mean(axis=(1, 2), keepdims=True)
    picked = anchored.min(axis=0).argmax(axis=1)  # best of all 20
    at = lambda x: float(np.mean([x[p, i] for p, i in enumerate(picked)]))
    assert curve("WCO", "gold")[0, -1] == pytest.approx(at(own.gold), abs=1e-6)
    assert curve("WCO", "length")[0, -1] == pytest.approx(at(own.lengths))
    assert curve("WCO", "disagreement")[0, -1] == pytest.approx(at(anchored.std(axis=0)), abs=1e-5)
    assert curve("mean", "proxy")[0, 0] == pytest.approx(0, abs=1e-6), "members are anchored under the initial policy"
    each = [np.mean([own.gold[p, i] for p, i in enumerate(member.argmax(axis=1))]) for member in own.members]
    assert curve("single", "gold")[0, -1] == pytest.approx(np.mean(each), abs=1e-6)
    assert m["accuracy"][0] == pytest.approx((own.margins > 0).mean(axis=1).tolist())
    pairs, sure, right = np.array(m["calibration"]["single"])
    assert pairs.sum() == 300 and (0.5 * pairs <= sure).all() and (right <= pairs).all()
    assert {(row["objective"], row["n"], row["prompt"]) for row in m["samples"]} >= {("WCO", 20, "<p1>"), ("single", 4, "<p0>")}
    worst = next(row for row in m["samples"] if (row["objective"], row["n"], row["prompt"]) == ("WCO", 20, "<p0>"))
    assert worst["response"] == f"a & {picked[0]}" and worst["proxy"] == pytest.approx(min(worst["members"]))


def test_the_curve_does_not_depend_on_the_members_offsets():
    own = scored()
    moved = own._replace(members=own.members + np.array([5.0, -3.0, 0.0], np.float32)[:, None, None])
    for name, values in measure(own)["curves"].items():
        np.testing.assert_allclose(values["gold"], measure(moved)["curves"][name]["gold"], atol=1e-5)


def test_one_member_is_every_objective():
    curves = measure(scored(K=1))["curves"]
    assert curves["single"]["gold"] == curves["mean"]["gold"] == curves["WCO"]["gold"]
    assert curves["mean"]["disagreement"] == [[0.0] * 3]


def test_scores_that_are_not_finite_are_left_out_and_counted(capsys):
    members, margins = scored().members, scored().margins
    members[1, 0, 3], members[2, 1, 0], margins[0, 7] = np.nan, np.inf, np.nan
    m = laboratory.score("tail", [scored(members=members, margins=margins)], AGGREGATES, (1, 16), [0])
    assert (m["excluded"], m["excluded_pairs"]) == (2, 1)
    assert "left out because a score is not finite: 2 responses, 1 held-out pairs" in capsys.readouterr().err
    rows = laboratory.samples_of(scored(members=members), AGGREGATES, (1,))
    shown = {(row["objective"], row["prompt"]) for row in rows}
    assert ("mean", "<p0>") in shown and ("mean", "<p1>") not in shown, "of none there is no best"
    assert np.isfinite(json.loads(json.dumps(m["curves"]))["mean"]["gold"]).all() and np.sum(m["calibration"]["single"][0]) == 3 * 49


def spoilt(**changes) -> Scored:
    own = scored()
    return own._replace(**{name: change(getattr(own, name).copy()) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (spoilt(gold=lambda x: x * 0 + 2), "world 'tail', seed 0: the gold reward is 2 for every response"),
        (spoilt(gold=lambda x: x * np.nan), "the gold reward has mean nan"),
        (spoilt(members=lambda x: x[[0, 1, 0]]), "reward models 0 and 2 of 3 give the same scores; give each member a different seed"),
        (spoilt(members=lambda x: x * np.array([1, np.nan, 1])[:, None, None]), r"reward models \[1\] of 3 give no finite score"),
        (spoilt(gold=lambda x: np.where(np.arange(20) < 3, np.nan, x)), "17 responses of 20 with finite scores, too few for n = 20"),
    ],
)
def test_worlds_that_cannot_be_measured_are_refused(world, message):
    with pytest.raises(BadInput, match=message):
        measure(world)


def test_a_stage_of_any_name_is_a_file_of_the_report(tmp_path, monkeypatch):
    names, own = ["w/o tail", "a\0b/../..", "é" * 300], measure(scored())
    for i, name in enumerate(names):
        laboratory.stage(tmp_path, f"{i} best-of-n {name}", lambda name=name: own | {"arm": name}, MADE)
    assert [m["arm"] for m in results.load(tmp_path)] == names
    monkeypatch.setattr(figures, "png", lambda drawing: bytes(24))
    report.write(tmp_path)
    assert len([file for file in (tmp_path / "figures").iterdir() if file.is_file()]) == 5 * len(names)


# The command ----------------------------------------------------------------------------------------------------------------


def arguments(folder: Path, **changes) -> list[str]:
    return ["overopt", "--config", FILE, *(f"--config.{k}={v}" for k, v in (TINY | {"workdir": folder} | changes).items())]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run that was killed after its first stage, and gone on with."""
    path = tmp_path_factory.mktemp("lab") / "run"
    align, patch = laboratory.align, pytest.MonkeyPatch()

    def killed(*args):
        raise KeyboardInterrupt

    patch.setattr(laboratory, "align", killed)
    assert cli.main(arguments(path)) == 130
    times = {file.name: file.stat().st_mtime_ns for file in (path / "stages").iterdir()}
    assert times.keys() == {"00-best-of-n-tail.json"} and not (path / "report.html").exists()
    patch.setattr(laboratory, "align", align)
    assert cli.main(arguments(path)) == 0
    assert {file.name: file.stat().st_mtime_ns for file in (path / "stages").iterdir() if file.name in times} == times, "kept"
    patch.undo()
    return path


class Page(HTMLParser):
    """Elements and text of a page; every element must be closed."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, file: Path):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.mark.slow
def test_the_page_is_whole_and_needs_no_network(workdir):
    page = Page(workdir / "report.html")
    images = page.all("img")
    assert len(images) == 4 + 2 + 3 + 2 and all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not page.all("script") and not page.all("link") and not [a for _, a in page.found if a.get("src", "data:")[:5] != "data:"]
    assert all(a["href"].startswith("#") for a in page.all("a"))
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert "viewport" in str(page.all("meta"))
    assert len(page.all("caption")) == len(page.all("table")) == 3 + 1 + 1 + 1, "so short a training has no law"
    text = "".join(page.words)
    for part in ("UWO", "RPO", "final gold", "R²", "How to read this", "w·x = ", "Elastic Reset, world “tail”", "single, chi-squared"):
        assert part in text, part
    figures = {file.name for file in (workdir / "figures").iterdir()}
    assert {"best-of-n-tail-gold.png", "best-of-n-tail-calibration.png", "direct-alignment-tail-proxy-rpo.png"} <= figures
    assert {"elastic-reset-tail-steps.png", "optima-tail-gold.png"} <= figures
    assert len(figures) == len(images)


@pytest.mark.slow
def test_the_numbers_agree(workdir):
    out = json.loads((workdir / "results.json").read_text())
    by = {(c["kind"], c["world"], c["objective"], c["beta"]): c for c in out["curves"]}
    assert len(out["made"]) == 1 and out["made"][0]["jax"] == jax.__version__ and out["made"][0]["file"] == "overoptimization.py"
    assert (
        out["made"][0]["processor"] not in ("", "cpu")
        and "Measured by overoptimization.py, alignax " in (workdir / "tables.md").read_text()
    )
    uwo = by["best_of_n", "tail", "UWO", None]
    stage = json.loads((workdir / "stages" / "00-best-of-n-tail.json").read_text())
    gold = np.array(stage["curves"]["UWO"]["gold"])
    np.testing.assert_allclose(uwo["values"]["gold"]["mean"], gold.mean(axis=0))
    half = 12.7062 * gold.std(axis=0, ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    np.testing.assert_allclose(uwo["values"]["gold"]["high"], gold.mean(axis=0) + half, rtol=1e-5)
    assert uwo["gold"]["drop"] == pytest.approx(gold.mean(axis=0).max() - gold.mean(axis=0)[-1])
    assert by["direct", "tail", "RPO", 0.1]["at"] == [0, 2, 4, 6, 8]
    online = by["online", "tail", "Elastic Reset", None]
    assert (online["family"], online["setting"], online["at"], online["seeds"]) == ("Elastic Reset", "", [0, 4, 8], 2)
    optima = {c["setting"]: c for c in out["curves"] if c["kind"] == "optima"}
    assert optima.keys() == {"KL", "chi-squared"} and optima["KL"]["at"][0] == 4.0 and len(optima["KL"]["d"]) == 11
    assert {(law["kind"], law["objective"]) for law in out["laws"]} >= {("best_of_n", "WCO"), ("direct", "RPO")}
    with open(workdir / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(r for r in rows if (r["world"], r["objective"], r["quantity"], r["at"]) == ("tail", "UWO", "gold", "32"))
    assert float(row["mean"]) == pytest.approx(gold.mean(axis=0)[-1], rel=1e-5) and row["seeds"] == "2"


@pytest.mark.slow
def test_a_finished_run_measures_nothing_again_and_its_config_runs_the_same(workdir, tmp_path, capsys, monkeypatch):
    for measure in ("score", "align", "learn"):
        monkeypatch.setattr(laboratory, measure, lambda *args: pytest.fail("measured again"))
    before = (workdir / "results.json").read_bytes()
    assert cli.main(["overopt", "--config", str(workdir / "config.py")]) == 0
    assert "00 best-of-n tail: already measured" in capsys.readouterr().err
    assert (workdir / "results.json").read_bytes() == before
    assert cli.main(arguments(workdir, repeats=3)) == 2
    assert "belongs to another run (repeats: 2 there, 3 now)" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(arguments(tmp_path)) == 2
    assert "holds other files" in capsys.readouterr().err


def test_a_config_that_measured_nothing_may_be_corrected(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(laboratory, "stage", lambda *args: None)
    monkeypatch.setattr(report, "write", lambda workdir: "")
    for repeats in (2, 3):
        assert cli.main(arguments(tmp_path / "run", repeats=repeats)) == 0
    assert config.load_experiment(tmp_path / "run" / "config.py").config.repeats == 3


@pytest.mark.slow
def test_report_rebuilds_and_lays_side_by_side(workdir, tmp_path, capsys):
    one, other, trained = (tmp_path / name for name in ("one", "other", "dpo"))
    for folder in (one, other):
        (folder / "stages").mkdir(parents=True)
        shutil.copy(workdir / "stages" / "00-best-of-n-tail.json", folder / "stages")
    assert cli.main(["report", str(one)]) == 0
    page = (one / "report.html").read_bytes()
    trained.mkdir()
    rows = [{"step": i, "eval/kl": i / 2, "eval/gold": 1.0 - i, "eval/rewards/margins": 0.1 * i} for i in range(4)]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (trained / "samples.jsonl").write_text(json.dumps({"step": 3, "prompt": "<b>p", "completion": "c & d", "gold": -2.0}) + "\n")
    assert cli.main(["report", str(other), str(one), str(trained)]) == 0
    assert (one / "report.html").read_bytes() == page, "the same numbers give the same page"
    assert f"comparison: {other / 'comparison.html'}" in capsys.readouterr().out
    text = (other / "comparison.html").read_text()
    assert len(Page(other / "comparison.html").all("img")) == 2 * 4 + 2 + 3, "of the training run gold, KL and margin over steps, too"
    for part in (
        '<th scope="row" data-head="run">other</th>',
        'data-head="run">one</th>',
        "Evaluations of training runs",
        "&lt;b&gt;p",
        "c &amp; d",
    ):
        assert part in text, part
    assert "<b>" not in text, "texts are escaped"


@pytest.mark.slow
def test_report_of_what_has_nothing_to_report(tmp_path, workdir, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no step and no evaluation in its metrics.jsonl" in capsys.readouterr().err
    assert cli.main(["report", str(workdir), str(workdir)]) == 2
    assert "a workdir is given twice" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "`alignax report` takes WORKDIR ..., not []" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_of_n.n": "(1,64)"}, "best of n = 64 of 32 responses"),
        ({"best_of_n.n": "(4,1)"}, "'best_of_n.n' is (4, 1); give sizes from 1 on, in ascending order"),
        ({"repeats": 0}, "'repeats' is 0; it must be at least 1"),
        ({"uwo": -1.0}, "coefficient of UWO is -1.0"),
        ({"direct.betas": "(0.1,-1.0)"}, "beta is -1.0"),
        ({"direct.objectives": "('PPO',)"}, "names PPO; use DPO, IPO, SLiC, RPO"),
        ({"online.families": "('DPO',)"}, "'online.families' names DPO; use PPO, RLOO, f-DPG"),
        ({"online.repeats": 0}, "'online.repeats' is 0; it must be at least 1"),
        ({"online.samples": 1}, "'online.samples' is 1"),
        ({"world.radius": 0.0}, "the gold reward is -1 for every response"),
        ({"workdir": ""}, "'workdir' is empty"),
    ],
)
def test_bad_input_is_one_line(changes, message, tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "run", **changes)) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].startswith("alignax: error: ")
    assert not (tmp_path / "run" / "stages" / "00-best-of-n-tail.json").exists()


def test_a_config_that_no_run_wrote_is_neither_run_nor_replaced(tmp_path, capsys):
    (tmp_path / "config.py").write_text(mine := "raise SystemExit('this was run')")
    assert cli.main(arguments(tmp_path)) == 2
    assert "holds other files" in capsys.readouterr().err and (tmp_path / "config.py").read_text() == mine


def test_overopt_needs_a_laboratory(capsys):
    assert cli.main(["overopt", "--config", str(runs.REPO / "experiments" / "dpo_hh.py")]) == 2
    assert "has no main()" in capsys.readouterr().err
    assert cli.main(["overopt"]) == 2
    assert "`alignax overopt` needs --config FILE.py, such as experiments/overoptimization.py" in capsys.readouterr().err
