"""Killed at any moment, a run goes on bit for bit; on another mesh or process count, to rounding."""

import pathlib
import random
import shutil
import signal
import socket
import sys

import numpy as np
import pytest
import runs

from alignax import cli, output
from alignax.config import effective, load_experiment
from alignax.config.defaults import default_config
from alignax.optim import make_schedule
from alignax.run.prepare import check_workdir, prepare

DPO = str(runs.REPO / "experiments" / "dpo_hh.py")


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(runs.begin(runs.arguments(fields | {"workdir": workdir})))
    assert list(runs.losses(workdir)) == list(range(1, 25))
    return workdir


def same(a, b):
    assert runs.losses(a) == runs.losses(b)
    assert runs.evaluations(a) == runs.evaluations(b)
    x, y = runs.final_params(a), runs.final_params(b)
    assert all(np.array_equal(x[name], y[name]) for name in x) and x.keys() == y.keys()


@pytest.mark.slow
@pytest.mark.long
def test_killed_in_the_middle_of_saves_and_steps(fields, whole, tmp_path):
    workdir = tmp_path / "run"
    args = runs.arguments(fields | {"workdir": workdir})
    rng = random.Random(0)
    saving = lambda: any(workdir.glob("checkpoints/*tmp*"))
    rows = lambda: len(runs.losses(workdir)) if (workdir / "metrics.jsonl").exists() else 0
    killed = []
    for how in ("save", "step", "save", "step"):
        process = runs.begin(args)
        target = rows() + rng.randint(2, 5)
        killed.append(runs.stop_when(process, saving if how == "save" else lambda t=target: rows() >= t, signal.SIGKILL))
        process.communicate()
    assert sum(killed) >= 3, "the run ended before it was killed often enough"
    runs.finish(runs.begin(args))
    same(whole, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, name",
    [
        (signal.SIGTERM, "SIGTERM"),
        pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, "SIGHUP", marks=pytest.mark.long),
    ],
    ids=["term", "int", "hup"],
)
def test_sigterm_and_ctrl_c_save_and_exit(how, name, fields, whole, tmp_path):
    workdir = tmp_path / "run"
    args = runs.arguments(fields | {"workdir": workdir})
    process = runs.begin(args)
    assert runs.stop_when(process, lambda: (workdir / "metrics.jsonl").exists() and len(runs.losses(workdir)) >= 4, how)
    out = runs.finish(process, code=128 + how)
    step = int(out.split(f"stopped by {name} after step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert f"going on after step {step}" in runs.finish(runs.begin(args))
    same(whole, workdir)


@pytest.mark.slow
def test_a_complete_run_says_so_and_changes_nothing(fields, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    out = runs.finish(runs.begin(runs.arguments(fields | {"workdir": whole})))
    assert "this run is complete: step 24" in out
    assert (whole / "metrics.jsonl").read_bytes() == before


def trained(fields, capsys, **more):
    """The messages of a run in this process, which has ended well."""
    assert cli.main(runs.arguments(fields | more)) == 0
    return capsys.readouterr().err


def test_a_workdir_takes_a_run_that_grows_and_no_shorter_one(fields, tmp_path, capsys):
    """Steps or epochs may say so; 40 rows are 5 steps of 8."""
    workdir = tmp_path / "run"
    own = lambda *more: prepare(load_experiment(DPO, [*(f"{k}={v}" for k, v in fields.items()), f"workdir={workdir}", *more]))
    began = own("steps=0", "epochs=2")
    workdir.mkdir()
    output.write_text(workdir / "config.py", effective(began.experiment))
    (workdir / "metrics.jsonl").write_text('{"step": 1}')
    for same in ([], ["steps=10"], ["steps=0", "epochs=1.9"]):
        check_workdir(own("steps=0", "epochs=2", *same))
    assert "grows" not in capsys.readouterr().err
    check_workdir(own("steps=0", "epochs=3"))
    assert "the run grows from 10 to 15 steps; in the steps already taken, the learning rate and other" in capsys.readouterr().err
    longer = own("steps=12")
    check_workdir(longer)
    assert "the run grows from 10 to 12 steps" in capsys.readouterr().err
    assert longer.learning.schedule(10) == make_schedule(longer.config.optimizer, 12)(10) != began.learning.schedule(10)
    for fewer, steps in (("steps=9", 9), ("epochs=1", 5)):
        with pytest.raises(ValueError, match=rf"\(10 steps there, {steps} now\): a run may grow, but not shrink; set --config.steps=10 or"):
            check_workdir(own("steps=0", "epochs=2", fewer))
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 1 now\)"):
        check_workdir(own("steps=12", "seed=1"))


@pytest.mark.slow
def test_a_run_grows_and_never_shrinks(fields, tmp_path, capsys):
    """The steps of each start follow the schedule of its own total; what was logged of the earlier ones stays."""
    few = {"workdir": tmp_path / "run", "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "optimizer.warmup": 0.5}
    trained(fields, capsys, **few, steps=2)
    before = runs.losses(tmp_path / "run")
    said = trained(fields, capsys, **few, steps=4)
    assert "notice: the run grows from 2 to 4 steps; in the steps already taken, the learning rate and other schedules" in said
    assert "going on after step 2" in said and "step 4/4" in said
    after = runs.losses(tmp_path / "run")
    assert list(after) == [1, 2, 3, 4] and {step: after[step] for step in before} == before
    config = default_config().optimizer
    config.update(learning_rate=1e-3, warmup=0.5)
    wanted = [float(make_schedule(config, 2 if step < 2 else 4)(step)) for step in range(4)]
    assert [row["learning_rate"] for row in after.values()] == pytest.approx(wanted, rel=1e-5)
    assert cli.main(runs.arguments(fields | few | {"steps": 3})) == 2
    assert "belongs to another run (4 steps there, 3 now): a run may grow, but not shrink" in capsys.readouterr().err
    assert runs.losses(tmp_path / "run") == after


@pytest.mark.slow
@pytest.mark.long
def test_a_grown_run_of_constant_rate_is_a_run_that_was_longer_from_the_start(fields, tmp_path, capsys):
    """By its epochs too; its export replaces that of the shorter run."""
    own = {"optimizer.schedule": "constant", "export.final": True, "steps": 0, "data.eval": ""}
    trained(fields, capsys, **own, workdir=tmp_path / "grown", epochs=1)
    assert "the run grows from 5 to 10 steps" in trained(fields, capsys, **own, workdir=tmp_path / "grown", epochs=2)
    trained(fields, capsys, **own, workdir=tmp_path / "long", epochs=2)
    same(tmp_path / "long", tmp_path / "grown")
    exported = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("grown", "long")]
    assert exported[0] == exported[1]


@pytest.mark.slow
@pytest.mark.long
def test_resumes_on_another_mesh(fields, whole, tmp_path):
    workdir = tmp_path / "run"
    one = runs.arguments(fields | {"workdir": workdir})
    process = runs.begin(one)
    assert runs.stop_when(process, lambda: (workdir / "metrics.jsonl").exists() and len(runs.losses(workdir)) >= 6, signal.SIGTERM)
    runs.finish(process, code=143)
    eight = runs.arguments(fields | {"workdir": workdir, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    out = runs.finish(runs.begin(eight, runs.environment(devices=8)))
    assert "mesh data 2 x fsdp 2 x tensor 2" in out
    close(whole, workdir)


def close(a, b, tolerance=1e-5):
    x, y = runs.losses(a), runs.losses(b)
    assert x.keys() == y.keys()
    for step in x:
        assert x[step]["loss"] == pytest.approx(y[step]["loss"], rel=tolerance, abs=tolerance)
    p, q = runs.final_params(a), runs.final_params(b)
    for name in p:
        np.testing.assert_allclose(p[name], q[name], atol=1e-4)


@pytest.mark.slow
def test_two_processes_of_four_devices_train_alike_and_hand_over_to_one(fields, whole, tmp_path):
    workdir = tmp_path / "run"
    two = {"workdir": workdir, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "log.every": 1}
    group = runs.begin_two([runs.arguments(fields | two)] * 2)
    done = lambda: (workdir / "metrics.jsonl").exists() and len(runs.losses(workdir)) >= 8
    assert runs.stop_when(group[1], done, signal.SIGTERM), "both processes stop when one is told to"
    out = [runs.finish(process, code=143) for process in group]
    assert "stopped by SIGTERM" in out[0] and "step 1/24" not in out[1], "only process 0 writes"
    runs.finish(runs.begin(runs.arguments(fields | {"workdir": workdir})))
    close(whole, workdir)


@pytest.mark.slow
def test_what_one_process_lacks_ends_both_with_its_words(fields, tmp_path):
    workdir = tmp_path / "run"
    here = runs.arguments(fields | {"workdir": workdir})
    group = runs.begin_two([here, runs.arguments(fields | {"workdir": workdir, "data.train": "/nowhere"})])
    out = [runs.finish(process, code=2, timeout=60) for process in group]
    assert "error: process 1 could not go on: there is no file" in out[0] and "error: there is no file" in out[1]
    assert not workdir.exists()


@pytest.mark.slow
def test_a_workdir_that_process_0_cannot_write_ends_both(fields, tmp_path):
    (tmp_path / "run" / ".config.py.alignax-tmp").mkdir(parents=True)
    group = runs.begin_two([runs.arguments(fields | {"workdir": tmp_path / "run"})] * 2)
    out = [runs.finish(process, code=2, timeout=60) for process in group]
    assert "Is a directory" in out[0] and "process 0 could not go on" in out[1]


@pytest.mark.slow
@pytest.mark.parametrize("what", runs.long_but(("data", "config", "experiment", "model", "policy", "checkpoint"), "data"))
def test_processes_that_were_given_different_things_all_end_with_its_name(what, fields, tmp_path, monkeypatch):
    hosts = (tmp_path / "a", tmp_path / "b")
    for i, host in enumerate(hosts):
        host.mkdir()
        rows = pathlib.Path(str(fields["data.train"])).read_text()
        (host / "pairs.jsonl").write_text(rows.replace("yes", "YES", 1) if (what, i) == ("data", 1) else rows)
        shutil.copytree(str(fields["model.path"]), host / "model")
        source = (runs.REPO / "experiments" / "dpo_hh.py").read_text()
        (host / "mine.py").write_text(source + "\nother = 1\n" if (what, i) == ("experiment", 1) else source)
    if what == "policy":  # as if the bytes that differ were none of those that are compared before weights are read
        code = "import sys; from alignax import cli; from alignax.run import start; start.sketch = str; sys.exit(cli.main())"
        monkeypatch.setattr(runs, "command", lambda args: [sys.executable, "-c", code, *args])
    if what in ("model", "policy"):
        with open(hosts[1] / "model" / "model.safetensors", "r+b") as f:
            f.seek(-1, 2)
            f.write(b"\x07")
        (hosts[1] / "model" / "alignax.json").unlink(missing_ok=True)
    own = fields | {"workdir": tmp_path / "run", "data.train": "pairs.jsonl", "data.eval": "pairs.jsonl", "model.path": "model"}
    if what == "checkpoint":  # a workdir that is not shared
        own |= {"workdir": "run"}
        (hosts[0] / "run" / "checkpoints" / "3" / "about").mkdir(parents=True)
        (hosts[0] / "run" / "checkpoints" / "3" / "about" / "metadata").write_text("{}")
        begun = effective(load_experiment(hosts[0] / "mine.py", [f"{k}={v}" for k, v in own.items()]))
        (hosts[0] / "run" / "config.py").write_text(begun)
    words = [runs.arguments(own | ({"seed": 1} if (what, i) == ("config", 1) else {})) for i in range(2)]
    words = [["train", "--config", "mine.py", *own[3:]] for own in words]
    out = [runs.finish(process, code=2, timeout=120) for process in runs.begin_two(words, hosts)]
    for said in out:
        assert f"error: process 1 was given another {what} than process 0 (" in said, said
        assert said.count(f" on {socket.gethostname()}") == 2
    found = {"config": "seed = 1", "experiment": "other = 1", "data": "data.train", "model": "model.safetensors", "checkpoint": "step 3"}
    assert found.get(what, "") in out[0]
    assert not (tmp_path / "run").exists() and not (hosts[1] / "run").exists()
