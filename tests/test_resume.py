"""Killed at any moment, a run goes on bit for bit; on another mesh or process count, to rounding."""

import pathlib
import random
import shutil
import signal

import numpy as np
import pytest
import runs


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


@pytest.mark.slow
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
@pytest.mark.parametrize("what", ["data", *(pytest.param(x, marks=pytest.mark.long) for x in ("config", "experiment", "model"))])
def test_processes_that_were_given_different_things_all_end_with_its_name(what, fields, tmp_path):
    hosts = (tmp_path / "a", tmp_path / "b")
    for i, host in enumerate(hosts):
        host.mkdir()
        rows = pathlib.Path(str(fields["data.train"])).read_text()
        (host / "pairs.jsonl").write_text(rows.replace("yes", "YES", 1) if (what, i) == ("data", 1) else rows)
        shutil.copytree(str(fields["model.path"]), host / "model")
        source = (runs.REPO / "experiments" / "dpo_hh.py").read_text()
        (host / "mine.py").write_text(source + "\nother = 1\n" if (what, i) == ("experiment", 1) else source)
    if what == "model":
        with open(hosts[1] / "model" / "model.safetensors", "r+b") as f:
            f.seek(-1, 2)
            f.write(b"\x07")
        (hosts[1] / "model" / "alignax.json").unlink()
    own = fields | {"workdir": tmp_path / "run", "data.train": "pairs.jsonl", "data.eval": "pairs.jsonl", "model.path": "model"}
    words = [runs.arguments(own | ({"seed": 1} if (what, i) == ("config", 1) else {})) for i in range(2)]
    words = [["train", "--config", "mine.py", *own[3:]] for own in words]
    out = [runs.finish(process, code=2, timeout=120) for process in runs.begin_two(words, hosts)]
    for said in out:
        assert f"error: process 1 was given another {what} than process 0 (" in said, said
    assert {"config": "seed = 1", "experiment": "other = 1", "data": "data.train", "model": "model.safetensors"}[what] in out[0]
    assert not (tmp_path / "run").exists()
