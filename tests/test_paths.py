"""Paths and URLs, on a file system of fsspec in memory; tests/test_gcs.py has Cloud Storage itself."""

import gzip
import json
import os
import pickle
import re
import threading
import time
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
import tiny

from alignax import compiled, locks, output, paths
from alignax.cli import parse
from alignax.config import default_config
from alignax.config.overrides import set_field
from alignax.data.files import read_rows
from alignax.data.mixture import sources
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.tensorfiles import opened
from alignax.models.tokenizers import load_tokenizer
from alignax.run.log import Log
from alignax.run.log import read_rows as logged
from alignax.run.mirror import Mirror


@pytest.fixture
def far(request):
    """A folder of its own, whose file system has no rename that we use, no links and no append."""
    return paths.of(f"memory://bucket/{request.node.name.split('[')[0]}-{time.monotonic_ns()}")


def names(folder):
    return ["/".join(p.relative_to(folder).parts) for p in folder.rglob("*")]


def test_a_url_is_kept_as_it_was_written():
    run = paths.of("gs://bucket/run")
    assert str(run) == f"{run}" == "gs://bucket/run" and str(run / "export" / "config.json") == "gs://bucket/run/export/config.json"
    assert run.parent / "run" == run and run.with_name("other") == paths.of("gs://bucket/other") and (run / "a.jsonl.gz").suffix == ".gz"
    assert pickle.loads(pickle.dumps(run)) == run == paths.of(run) and run.absolute() == run.resolve() == run and hash(run)
    assert (run / "a" / "b").relative_to(run).parts == ("a", "b") and str(run.parents[0]) == "gs://bucket"
    assert str(paths.of("gs://b/x@0.5,gs://b/y@0.5")) == "gs://b/x@0.5,gs://b/y@0.5"
    assert type(paths.of("runs/a:b")) is type(paths.of(Path("C:/a"))) is type(Path())
    for function in (open, os.stat, os.fspath):  # no function takes it for a folder gs:/bucket of this machine
        with pytest.raises(TypeError, match="gs://bucket/run is no path of this machine"):
            function(run)


def test_a_url_is_read_and_written_as_a_path_of_this_machine(far):
    (far / "a" / "x.json").write_text('{"a": 1}')
    (far / "y.txt").write_bytes("one\nzwölf\n".encode())
    assert [p.name for p in far.iterdir()] == ["a", "y.txt"] and names(far) == ["a/x.json", "y.txt"]
    assert [*far.glob("*/x.json")] == [*paths.matching(f"{far}/**/*.json")] == [far / "a" / "x.json"]
    assert (far / "a").is_dir() and not (far / "a").is_file() and (far / "y.txt").is_file() and not (far / "none").exists()
    assert (far / "y.txt").stat().st_size == 11 and (far / "y.txt").read_range(1, 3) == b"ne" and (far / "y.txt").read_range(3, 3) == b""
    with (far / "y.txt").open("rb") as f:
        assert f.peek(3)[:3] == b"one" and f.readline() == b"one\n" and f.tell() == 4 and f.seek(0) == 0 and f.read(2) == b"on"
    with (far / "y.txt").open() as f:
        assert [*f] == ["one\n", "zwölf\n"]
    with pytest.raises(FileExistsError, match="y.txt exists"):
        (far / "y.txt").write_bytes(b"", new=True)
    with pytest.raises(FileNotFoundError, match=f"^{far}/none does not exist, or its bucket does not$"):
        (far / "none").read_bytes()
    (far / "none").unlink(missing_ok=True)


REFUSED = {
    "gs://bucket/a": "gs:// paths need the package gcsfs, which is not installed (pip install 'alignax[gcs]')",
    "s3://bucket/a": "s3:// paths need the package s3fs, which is not installed (pip install s3fs)",
    "here@0.5,az://b/a@0.5": "az:// paths need the package adlfs, which is not installed (pip install adlfs)",
    "nope://b/a": "nope:// paths are not known to fsspec; give a path on this machine, or one of gs://, s3:// and the like",
    "file:///tmp/a": "file:// is for paths on this machine; write the path alone",
    "gs:/bucket/a": "gs:/ has one slash; a URL has two, gs://",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_cannot_be_read_is_refused_by_its_own_name_with_the_remedy(monkeypatch, url):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    for name in ("workdir", "data.train", "model.path", "reference.cache", "reward.path"):
        with pytest.raises(ValueError, match=f"^{re.escape(f'config field {name!r} is {url!r}, and {REFUSED[url]}')}$"):
            set_field(default_config(), f"{name}={url}")
    for command in ("report X", "export X here", "export runs/a X", "generate m --out X", "generate m --prompts X", "eval-rm X"):
        with pytest.raises(ValueError, match=re.escape(f"is {url!r}, and {REFUSED[url]}")):
            parse(command.replace("X", url).split())


def test_a_url_that_fsspec_reads_is_taken_where_it_can_serve():
    config = default_config()
    for name in ("data.train", "model.path", "reference.cache"):
        set_field(config, f"{name}=memory://bucket/a")
    with pytest.raises(
        ValueError, match="config field 'workdir' is 'memory://bucket/a', but checkpoints go to this machine or to gs:// alone"
    ):
        set_field(config, "workdir=memory://bucket/a")
    with pytest.raises(ValueError, match="'model.path' is 'https://host/a', and https:// is for files of data alone"):
        set_field(config, "model.path=https://host/a")


def test_an_experiment_that_writes_files_of_its_own_needs_a_folder_of_this_machine():
    assert paths.here("runs/a", "workdir") == Path("runs/a")
    with pytest.raises(
        ValueError, match="^workdir is 'gs://bucket/a', but this experiment writes files of its own there; give a folder on"
    ):
        paths.here("gs://bucket/a", "workdir")
    for file in (Path(paths.__file__).parents[1] / "experiments").glob("*.py"):
        assert "Path(config.workdir" not in file.read_text(), file


def test_a_file_and_a_folder_appear_whole(far):
    output.write_text(far / "a.json", "{}")
    assert (far / "a.json").read_text() == "{}"
    with pytest.raises(OSError, match=rf"{far}/a.json' could not be written \(full\)"), output.file(far / "a.json") as tmp:
        tmp.write_text("half")
        raise OSError("full")
    assert (far / "a.json").read_text() == "{}"
    for text in ("one", "two"):
        with output.folder(far / "model", "run 1") as tmp:
            assert not any((far / "model").glob("*.new"))
            for name in (f"{text}.bin", "sub/config.json", "config.json"):
                (tmp / name).parent.mkdir(exist_ok=True)
                (tmp / name).write_text(text)
        assert names(far / "model") == sorted(["alignax.json", "config.json", f"{text}.bin", "sub/config.json"])
        assert not tmp.exists()
    output.claim(far / "model", "run 1")
    output.check(far / "model", ".bin")
    with pytest.raises(ValueError, match="exists, and another run wrote it"):
        output.claim(far / "model", "run 2")
    (far / "model" / "two.bin").write_text("2wo")
    with pytest.raises(ValueError, match=r"was changed since it was written \(two.bin\)"):
        output.claim(far / "model", "run 1")
    with pytest.raises(ValueError, match="two.bin is damaged"):
        output.check(far / "model", ".bin")


@pytest.mark.parametrize("at", range(5))
def test_a_folder_whose_upload_is_cut_off_is_no_model(far, monkeypatch, at):
    def write():
        with output.folder(far / "model", "run 1") as tmp:
            for name in ("a.bin", "config.json"):
                (tmp / name).write_text("x")

    write()
    left = [at]

    def counted(function):
        def call(*args, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("unlink", "upload"):  # two files are deleted and three written, beside the mark
        monkeypatch.setattr(paths.Remote, name, counted(getattr(paths.Remote, name)))
    with pytest.raises(KeyboardInterrupt):
        write()
    left[0], there = 99, {*names(far / "model")}
    assert "config.json" not in there or "a.bin" in there  # at every moment: what has a config is whole
    if at:
        with pytest.raises(ValueError, match="exists, and another run wrote it"):
            output.claim(far / "model", "run 2")
    output.claim(far / "model", "run 1")  # and the run that wrote it may write it again
    assert not output.taken(far / "model", "config.json")
    write()
    output.check(far / "model", ".bin")
    assert names(far / "model") == ["a.bin", "alignax.json", "config.json"]


def test_a_place_that_cannot_be_written_is_refused_by_name(far, monkeypatch):
    def closed(self, content, new=False):
        raise OSError("Forbidden: no access")

    monkeypatch.setattr(paths.Remote, "write_bytes", closed)
    with pytest.raises(ValueError, match=rf"^'{far}/out.json' cannot be written: Forbidden: no access; choose another place"):
        output.claim(far / "out.json")
    with pytest.raises(ValueError, match="'gs://bucket' cannot be written: it is a whole bucket"):
        output.claim(paths.of("gs://bucket"), "run 1")


def test_a_place_of_compiled_programs_on_a_bucket_is_tried_before_anything_is_compiled(far, monkeypatch):
    compiled.check_place("/no/such/folder")  # jax has its own words for it
    compiled.check_place(str(far))
    with pytest.raises(ValueError, match="JAX_COMPILATION_CACHE_DIR is 'nope://a', and nope:// paths are not known to fsspec"):
        compiled.check_place("nope://a")
    monkeypatch.setattr(paths.Remote, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("Forbidden: no access")))
    with pytest.raises(ValueError, match=f"JAX_COMPILATION_CACHE_DIR '{far}' cannot be written: Forbidden: no access"):
        compiled.check_place(str(far))


def lock_of(far, **more):
    """A lock that another process has written."""
    said = {"holder": "process 7 on other", "process": 7, "machine": "other", "token": "theirs", "beat": 0} | more
    (far / ".lock").write_text(json.dumps(said))


def test_one_process_at_a_time_works_in_a_workdir_on_a_bucket(far, monkeypatch, capsys):
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "STALE", 0.5)
    lock = output.Lock(far / ".lock")
    first = json.loads((far / ".lock").read_text())
    assert first["holder"].startswith(f"process {os.getpid()} on ") and output.Lock(far / ".lock").close() is None  # this process again
    time.sleep(0.4)
    assert json.loads((far / ".lock").read_text())["beat"] > first["beat"]  # it is renewed
    lock.close()
    assert not (far / ".lock").exists()

    lock_of(far, machine=locks._machine(), process=2**22 + 1)  # of this machine, and gone: known at once
    began = time.monotonic()
    output.Lock(far / ".lock").close()
    assert time.monotonic() - began < 0.4 and "waiting" not in capsys.readouterr().err

    lock_of(far)  # of another machine, and gone: it is not renewed
    output.Lock(far / ".lock").close()
    assert "waiting up to 0.5 s to see whether that process lives" in capsys.readouterr().err

    lock_of(far)
    beats = threading.Timer(0.2, lock_of, (far,), {"beat": 1})
    beats.start()
    with pytest.raises(ValueError, match=rf"workdir '{far}' is in use: process 7 on other works in it"):
        output.Lock(far / ".lock")
    beats.join()
    lock_of(far, machine=locks._machine(), process=os.getppid())  # of this machine, and alive
    beats = threading.Timer(0.2, lock_of, (far,), {"beat": 2})
    beats.start()
    with pytest.raises(ValueError, match="not replaced even with --force, since process 7 on other works in its folder"):
        (far / "report.html").write_text("x")
        output.claim(far / "report.html", force=True)
    beats.join()


def test_a_process_that_lost_its_lock_ends(far, monkeypatch, capsys):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(locks.os, "_exit", lambda code: (ended.set(), time.sleep(1)))
    lock = output.Lock(far / ".lock")
    lock_of(far)
    assert ended.wait(2) and f"process 7 on other has taken over workdir '{far}'" in capsys.readouterr().err
    lock.close()
    assert json.loads((far / ".lock").read_text())["token"] == "theirs"  # it is not ours to delete


def test_a_log_on_a_bucket_holds_whole_rows_and_goes_on(far):
    log = Log(far, steps=4, start=0, every=1, tensorboard=True)
    for step in (1, 2):
        log.step(step, {"loss": 0.5}, tokens=8)
    log.publish()
    assert [row["step"] for row in logged(far / "metrics.jsonl")] == [1, 2]
    log.step(3, {"loss": 0.5}, tokens=8)  # the process is killed here: this row was not sent
    with (log.folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    log._mirror._send()  # a sending in the middle of a row
    assert [row["step"] for row in logged(far / "metrics.jsonl")] == [1, 2, 3]
    assert (far / "metrics.jsonl").read_bytes().endswith(b"}\n")
    again = Log(far, steps=4, start=2, every=1, tensorboard=True)
    again.step(3, {"loss": 0.25}, tokens=8)
    again.close()
    assert [(row["step"], row["loss"]) for row in logged(far / "metrics.jsonl")] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert any((far / "tensorboard").iterdir()) and not again.folder.exists()
    log._mirror.close()


def test_a_log_sends_what_has_changed_and_no_more(far, monkeypatch):
    (far / "metrics.jsonl").write_text('{"step": 1}\n')
    mirror, sent = Mirror(far, ["metrics.jsonl", "samples.jsonl"]), []
    write = paths.Remote.write_bytes
    monkeypatch.setattr(
        paths.Remote, "write_bytes", lambda self, content, new=False: (sent.append(self.name), write(self, content, new))[1]
    )
    assert (mirror.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    mirror.finish()
    (mirror.folder / "samples.jsonl").write_text('{"step": 1}\n')
    mirror.finish()
    mirror.send()  # one was just made
    mirror.close()
    assert sent == ["samples.jsonl"]


ROWS = [{"prompt": f"p{i}", "completion": "c" * i} for i in range(5)]


def test_data_are_read_from_a_url(far, tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (far / "own" / "train.jsonl").write_text(text)
    (far / "own" / "dev.jsonl").write_text(text.split("\n")[0] + "\n")
    (far / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (far / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        (far / "saved" / file.name).write_bytes(file.read_bytes())
    for place in ("own/train.jsonl", "packed.jsonl.gz", "a.parquet", "own:train", "own/tr*.jsonl", "saved"):
        assert read_rows(f"{far}/{place}") == ROWS, place
    assert read_rows(f"{far}/own:dev") == ROWS[:1] and sources(f"{far}/a@0.7,b.jsonl@0.3") == [(f"{far}/a", 0.7), ("b.jsonl", 0.3)]
    (far / "bad.jsonl").write_text(text + "{")
    with pytest.raises(ValueError, match=rf"^{far}/bad.jsonl, line 6 is not JSON"):
        read_rows(f"{far}/bad.jsonl")
    with pytest.raises(ValueError, match=rf"^there is no file or folder '{far}/none.jsonl'; correct the path$"):
        read_rows(f"{far}/none.jsonl")


def test_a_model_is_read_from_a_url_and_written_to_it(far, tmp_path):
    folder = tiny.folder(tmp_path / "model")
    for file in folder.iterdir():
        (far / "model" / file.name).write_bytes(file.read_bytes())
    mesh = make_mesh({"fsdp": -1})
    here, there = hf.open_folder(folder), hf.open_folder(f"{far}/model")
    own, theirs = hf.load_params(here, mesh), hf.load_params(there, mesh)
    jax.tree.map(np.testing.assert_array_equal, own, theirs)
    assert load_tokenizer(there.path, 96).get_vocab() == load_tokenizer(folder, 96).get_vocab()
    hf.export(theirs, there, far / "out", "bfloat16", shard_bytes=4000, origin="run 1")
    hf.export(own, here, tmp_path / "out", "bfloat16", shard_bytes=4000, origin="run 1")
    assert names(far / "out") == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names(far / "out"):
        assert (far / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    jax.tree.map(np.testing.assert_array_equal, *(hf.load_params(hf.open_folder(x), mesh) for x in (far / "out", tmp_path / "out")))


def test_of_a_tensor_on_a_bucket_only_the_rows_that_are_asked_for_are_read(far, monkeypatch):
    from safetensors import SafetensorError
    from safetensors.numpy import save

    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    (far / "x.safetensors").write_bytes(whole := save({"x": x, "one": np.float32([3])}, metadata={"crc": "1"}))
    sizes: list[int] = []
    read = paths.Remote.read_range
    monkeypatch.setattr(paths.Remote, "read_range", lambda self, a, b: (sizes.append(b - a), read(self, a, b))[1])
    with opened(far / "x.safetensors") as f:
        assert f.keys() == ["one", "x"] and f.metadata() == {"crc": "1"} and f.get_slice("x").get_shape() == [10, 4]
        sizes.clear()
        np.testing.assert_array_equal(f.get_slice("x")[2:5, 1:3], x[2:5, 1:3])
        np.testing.assert_array_equal(f.get_slice("x")[:, 3:], x[:, 3:])
        np.testing.assert_array_equal(f.get_slice("x")[7:7], x[7:7])
        np.testing.assert_array_equal(f.get_tensor("x"), x)
        assert sizes == [48, 160, 0, 160]
    for damaged in (whole[:-1], whole + b"x", b"\xff" * 40, whole[:9], b""):
        (far / "x.safetensors").write_bytes(damaged)
        with pytest.raises(SafetensorError), opened(far / "x.safetensors"):
            pass


LOCAL = {  # what makes a path of this machine by nature: our own files, Python's, and those that the system tells
    "paths.py", "compiled.py", "__init__.py", "config/blame.py", "config/identity.py", "overopt/laboratory.py", "output.py", "locks.py",
    "data/folders.py", "run/mirror.py", "run/start.py", "models/tensorfiles.py",
}  # fmt: skip


def test_one_place_makes_the_paths_that_a_user_gives():
    package = Path(paths.__file__).parent
    own = re.compile(r"(?<![\w.])(?:pathlib\.)?Path\((?!__file__)")
    made = {str(f.relative_to(package)) for f in package.rglob("*.py") if own.search(f.read_text()) and f.parent.name != "bench"}
    assert made <= LOCAL, f"{made - LOCAL} make a path of their own: let alignax.paths.of make it, so that it may be a URL"
