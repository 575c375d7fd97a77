"""Runs on Cloud Storage: gcsfs, google-cloud-storage and tensorstore, against the server of tests/bucket.py on loopback."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import runs
from bucket import serving

from alignax import paths
from alignax.cli import main

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: pip install 'alignax[gcs]'")
BUCKET = "my-bucket"
# So that no client looks for credentials.
NOBODY = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}


@pytest.fixture(scope="module")
def store():
    """A server that this process and its children take for Cloud Storage; gcsfs reads its address when it is imported."""
    with pytest.MonkeyPatch.context() as patch, serving(BUCKET, "other-bucket") as store:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        for name, value in NOBODY.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="module")
def world(store, tmp_path_factory):
    """Data and model on the bucket; the overrides that point at them."""
    folder = tmp_path_factory.mktemp("world")
    fields = runs.world(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            store.write(BUCKET, f"in/{file.relative_to(folder)}", file.read_bytes(), {})
    return {name: x.replace(str(folder), f"gs://{BUCKET}/in") if isinstance(x, str) else x for name, x in fields.items()}


@pytest.fixture(autouse=True)
def opened(store):
    yield
    store.closed.clear()
    store.undescribed.clear()
    store.before = lambda method, name: None


RUN = {"steps": 12, "eval.every": 0, "eval.sample_prompts": 0, "data.eval": "", "export.final": True}
MOMENTS = {  # what a killed process was about to do
    "write its first checkpoint": lambda method, name: method != "GET" and "/run/checkpoints/3/params/" in name,
    "remove a checkpoint": lambda method, name: method == "DELETE" and "/run/checkpoints/3/train" in name,
    "mark a checkpoint as complete": lambda method, name: method != "GET" and name.endswith("/run/checkpoints/9/commit_success.txt"),
    "write its model": lambda method, name: method != "GET" and name.endswith("/run/export/model.safetensors"),
}


FEW = ("mark a checkpoint as complete", "write its model")


@pytest.mark.slow
@pytest.mark.parametrize("moments", runs.long_but([FEW, tuple(MOMENTS)], FEW))
def test_a_run_on_a_bucket_that_is_killed_again_and_again_ends_as_one_that_is_not(store, world, tmp_path, moments):
    """Data, model, workdir, checkpoints, log, export and compiled programs are on the bucket."""
    store.buckets[BUCKET] = {name: x for name, x in store.buckets[BUCKET].items() if name.startswith("in/")}
    here = runs.world(tmp_path) | RUN | {"workdir": tmp_path / "run"}
    runs.finish(runs.begin(runs.arguments(here)))

    programs = sorted(Path(os.environ["PYTEST_COMPILE_CACHE"]).iterdir(), key=lambda file: file.stat().st_size)
    for file in programs[len(programs) // 2 :]:  # the dear ones of that run; the first run on the bucket compiles and writes the others
        store.write(BUCKET, f"cache/{file.name}", file.read_bytes(), {})
    env = runs.environment(1, JAX_COMPILATION_CACHE_DIR=f"gs://{BUCKET}/cache", JAX_ENABLE_COMPILATION_CACHE="true")
    args = runs.arguments(world | RUN | {"workdir": f"gs://{BUCKET}/run"})
    for what in moments:
        process = runs.begin(args, env)

        def kill(method, name, process=process, moment=MOMENTS[what]):
            if process.returncode is None and moment(method, name):
                process.send_signal(signal.SIGKILL)
                process.wait()
            if process.returncode is not None:
                raise ConnectionError  # nothing that a killed process was sending arrives

        store.before = kill
        runs.finish(process, -signal.SIGKILL)
        store.before = lambda method, name: None
        for name in store.names(BUCKET, "run/metrics.jsonl"):
            content = store.read(BUCKET, name)
            assert content.endswith(b"\n") and [json.loads(line)["step"] for line in content.splitlines()], what
    out = runs.finish(runs.begin(args, env))
    assert "programs: 0 compiled, " in out and f"read from gs://{BUCKET}/cache" in out, out

    assert runs.losses(paths.of(f"gs://{BUCKET}/run")) == runs.losses(tmp_path / "run")
    from safetensors.numpy import load, load_file

    own, theirs = load_file(tmp_path / "run" / "export" / "model.safetensors"), load(store.read(BUCKET, "run/export/model.safetensors"))
    assert own.keys() == theirs.keys() and all(np.array_equal(own[name], theirs[name]) for name in own)
    assert store.names(BUCKET, "run/.lock") == []
    kept = {name.split("/")[2] for name in store.names(BUCKET, "run/checkpoints/")}
    assert kept == {"9", "12"} and all(store.names(BUCKET, f"run/checkpoints/{step}/commit_success.txt") for step in kept)


def refused(capsys, *args: str) -> str:
    """The one line in which the command refuses its input."""
    capsys.readouterr()
    assert main([*args]) == 2
    out, err = capsys.readouterr()
    assert not out
    return [line for line in err.splitlines() if line.startswith("alignax: error: ")][-1]


def test_a_place_on_a_bucket_that_cannot_be_read_or_written_is_refused_by_its_name(store, world, capsys, monkeypatch):
    monkeypatch.setattr("alignax.models.hf.load_params", lambda *_: pytest.fail("weights were read"))
    train = lambda **fields: refused(capsys, *runs.arguments(world | {name.replace("_", ".", 1): x for name, x in fields.items()}))
    said = train(workdir="gs://no-bucket/run")
    assert "workdir 'gs://no-bucket/run' cannot be written: there is no bucket 'no-bucket'" in said
    store.closed.add("other-bucket")
    said = train(workdir="gs://other-bucket/run")
    assert "gs://other-bucket/run" in said and "storage.objects.create access" in said and "roles/storage.objectUser" in said
    said = train(workdir="gs://my-bucket/never", data_train="gs://other-bucket/pairs.jsonl")
    assert "error: gs://other-bucket/pairs.jsonl cannot be reached" in said and "roles/storage.objectUser" in said
    said = train(workdir="gs://my-bucket/never", data_train="gs://my-bucket/none.jsonl")
    assert "there is no file or folder 'gs://my-bucket/none.jsonl'; correct the path" in said
    said = train(workdir="gs://my-bucket/never", model_path="gs://my-bucket/none")
    assert "model folder 'gs://my-bucket/none' does not exist" in said
    store.undescribed.add("my-bucket")
    said = train(workdir="gs://my-bucket/never")
    assert "workdir 'gs://my-bucket/never' cannot be written: its bucket cannot be described" in said and "legacyBucketReader" in said
    said = refused(capsys, "generate", "gs://my-bucket/in/model", "--prompts", f"gs://{BUCKET}/in/pairs.jsonl", "--out", "gs://no-bucket/a")
    assert "'gs://no-bucket/a' cannot be written: there is no bucket 'no-bucket'" in said
    assert store.names(BUCKET, "never") == []


@pytest.mark.slow
def test_the_commands_take_workdirs_data_and_places_on_a_bucket(store, world, capsys, monkeypatch):
    at = f"gs://{BUCKET}"
    own = world | {"workdir": f"{at}/own", "steps": 4, "eval.every": 4, "checkpoint.every": 4, "log.tensorboard": True}
    own["eval.sample_prompts"] = 0  # `generate` samples
    prompts = ["--prompts", f"{at}/in/pairs.jsonl", "--max-new-tokens", "4"]
    for args in (
        runs.arguments(own | {"reference.cache": f"{at}/cached"}),
        ["report", f"{at}/own"],
        ["eval", f"{at}/own", "--json", f"{at}/out/eval.json"],
        ["export", f"{at}/own", f"{at}/out/model"],
        ["generate", f"{at}/out/model", *prompts, "--out", f"{at}/out/gen.jsonl"],
    ):
        assert main(args) == 0, args
    names = store.names(BUCKET)
    written = ("report.html", "config.py", "metrics.jsonl", "results.json")
    assert {*(f"own/{name}" for name in written), "out/eval.json", "out/model/alignax.json"} <= {*names}
    assert any(name.startswith("own/tensorboard/") for name in names) and any(name.startswith("cached/") for name in names)
    assert json.loads(store.read(BUCKET, "out/eval.json"))["step"] == 4
    assert len(store.read(BUCKET, "out/gen.jsonl").splitlines()) == len(store.read(BUCKET, "in/pairs.jsonl").splitlines())
    assert not [name for name in names if "alignax-tmp" in name]
    capsys.readouterr()
    assert main(["train", "--config", f"{at}/own/config.py"]) == 0 and "this run is complete: step 4" in capsys.readouterr().err
    assert main(["train", "--config", f"{at}/own/config.py", "--config.steps=3"]) == 2
    assert f"workdir '{at}/own' belongs to another run (4 steps there, 3 now)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_on_a_bucket_that_are_killed_go_on(store, world, tmp_path):
    store.buckets[BUCKET] = {name: x for name, x in store.buckets[BUCKET].items() if name.startswith("in/")}
    fields = {"steps": 6, "eval.every": 0, "eval.sample_prompts": 0, "checkpoint.every": 2, "export.final": True}
    runs.finish(runs.begin(runs.arguments(runs.world(tmp_path) | fields | {"workdir": tmp_path / "run"})))

    args = runs.arguments(world | fields | {"workdir": f"gs://{BUCKET}/run", "mesh.fsdp": 2})
    two = runs.begin_two([args, args])

    def kill(method, name):
        if method != "GET" and name.endswith("/run/checkpoints/4/commit_success.txt") and two[1].returncode is None:
            for process in two:
                process.send_signal(signal.SIGKILL)
                process.wait()
        if two[1].returncode is not None:
            raise ConnectionError

    store.before = kill
    for process in two:
        runs.finish(process, -signal.SIGKILL)
    store.before = lambda method, name: None
    for process in runs.begin_two([args, args]):
        runs.finish(process)
    losses, alone = runs.losses(paths.of(f"gs://{BUCKET}/run")), runs.losses(tmp_path / "run")
    assert losses.keys() == alone.keys() == {*range(1, 7)}
    for step, row in alone.items():
        assert losses[step]["loss"] == pytest.approx(row["loss"], abs=1e-5), step
    assert store.names(BUCKET, "run/export/config.json")
