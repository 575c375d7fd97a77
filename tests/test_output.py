"""What is written appears whole or not at all, and destroys nothing of another's."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from alignax import output


def written(place, origin="run a", **files):
    with output.folder(place, origin) as tmp:
        for name, text in (files or {"config": "{}"}).items():
            (tmp / f"{name}.json").write_text(text)
    return place


def test_a_folder_is_replaced_by_its_own_writer_alone(tmp_path):
    out = written(tmp_path / "out")
    output.claim(out, "run a")
    with pytest.raises(ValueError, match="out' exists, and another run wrote it; give --force to replace it, or choose another place"):
        output.claim(out, "run b")
    with pytest.raises(ValueError, match="move it away"):
        output.claim(out, "run b", remedy="move it away")
    output.claim(out, "run b", force=True)
    (out / "alignax.json").unlink()
    with pytest.raises(ValueError, match="out' exists, and something else wrote it"):
        output.claim(out, "run a")


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_what_a_person_did_to_a_folder_is_not_lost(tmp_path, change):
    out = written(tmp_path / "out", config="{}", tokenizer="{}")
    (out / "config.json").write_text('{"mine": 1}') if change == "changed" else None
    (out / "notes.txt").write_text("mine") if change == "added" else None
    (out / "tokenizer.json").unlink() if change == "removed" else None
    name = {"changed": "config.json", "added": "notes.txt", "removed": "tokenizer.json"}[change]
    with pytest.raises(ValueError, match=rf"was changed since it was written \({name}\); give --force"):
        output.claim(out, "run a")


def test_a_file_is_replaced_with_force_alone_and_what_is_empty_is_free(tmp_path):
    file, folder = tmp_path / "a", tmp_path / "b"
    output.claim(file)
    file.write_text("")
    folder.mkdir()
    output.claim(file)
    output.claim(folder, "run a")
    file.write_text("mine")
    with pytest.raises(ValueError, match="a' exists; give --force"):
        output.claim(file)
    output.claim(file, force=True)


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    out, file = written(tmp_path / "out"), tmp_path / "file"
    output.write_text(file, "old")
    for error in (OSError("no space"), ValueError("else"), KeyboardInterrupt()):
        with pytest.raises(type(error)), output.folder(out, "run a") as tmp:
            (tmp / "half").write_text("new")
            raise error
        with pytest.raises(type(error)), output.file(file) as tmp:
            tmp.write_text("new")
            raise error
    assert file.read_text() == "old" and {p.name for p in out.iterdir()} == {"config.json", "alignax.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "file"}
    output.claim(out, "run a")
    assert {p.name for p in written(out, other="1").iterdir()} == {"other.json", "alignax.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "file"}


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(OSError, match="the model takes .* GB and .* has .* GB free; make room, or choose another place"):
        output.require_space(tmp_path / "not" / "there", 10**18, "the model")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # a larger file fails in its middle, as on a full disk
        with pytest.raises(OSError, match="out' could not be written .*make room") as e, output.folder(tmp_path / "out") as tmp:
            save_file({"x": np.zeros(4096, np.float32)}, tmp / "model.safetensors")
        assert "\n" not in str(e.value)
        with pytest.raises(OSError, match="file' could not be written"):
            output.write_text(tmp_path / "file", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_in_a_file_of_ours_is_refused(tmp_path):
    out = tmp_path / "out"
    with output.folder(out) as tmp:
        (tmp / "model.safetensors").write_bytes(bytes(1000))
        (tmp / "config.json").write_text("{}")
    (out / "config.json").write_text('{"mine": 1}')  # descriptions may be corrected by hand
    output.check(out)
    (out / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* delete .*alignax\.json"):
        output.check(out)


KILLED = """
import sys, pathlib
from alignax import output
place = pathlib.Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    with output.folder(place / "out", "run a") as tmp:
        for k in range(3):
            (tmp / str(k)).write_text(str(i))
    output.write_text(place / "file", str(i) * 1000)
"""


@pytest.mark.slow
def test_killed_at_any_moment_what_stands_is_whole(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            process.wait(rng.uniform(0.02, 0.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if (tmp_path / "out").exists():
            output.claim(tmp_path / "out", "run a")
            assert len({(tmp_path / "out" / str(k)).read_text() for k in range(3)}) == 1
        if (tmp_path / "file").exists():
            text = (tmp_path / "file").read_text()
            assert len(text) % 1000 == 0 and text == text[: len(text) // 1000] * 1000
    assert {p.name for p in tmp_path.iterdir() if not output.unfinished(p)} <= {"out", "file"}
