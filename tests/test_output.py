"""Output files and folders: written whole or not at all, and never over something of another writer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import runs
import tiny

from alignax import output
from alignax.overopt import figures
from alignax.run.log import Log, read_rows


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
    file.write_text("<head> by me")
    output.claim(file, "by me")


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("disk", "absent"):
        link = tmp_path / f"to_{name}"
        link.symlink_to(name)
        for _ in range(2):
            output.claim(link, "run a")
            assert written(link) == link and link.is_symlink() and (tmp_path / name / "config.json").is_file()
    (tmp_path / "file").symlink_to("target")
    output.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "target").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "to_disk", "absent", "to_absent", "file", "target"}


def test_a_device_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(ValueError, match="it is a device or a pipe, which cannot be replaced .*; choose another place"):
            output.claim(place, force=True)


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

    with pytest.raises(
        OSError,
        match=r"the model needs 1,100,000,000,000,000,[0-9]{3} bytes, but .* has [0-9,]+ bytes free; make room, or choose another place",
    ):
        output.require_space(tmp_path / "not" / "there", 10**18, "the model")
    with runs.small_files(4096):
        with pytest.raises(OSError, match="out' could not be written .*make room") as e, output.folder(tmp_path / "out") as tmp:
            save_file({"x": np.zeros(4096, np.float32)}, tmp / "model.safetensors")
        assert "\n" not in str(e.value)
        with pytest.raises(OSError, match="file' could not be written"):
            output.write_text(tmp_path / "file", "x" * 5000)
        # The library of tokenizers raises a plain Exception.
        with (
            pytest.raises(OSError, match=r"out' could not be written \(.*File too large.*\); make room"),
            output.folder(tmp_path / "out") as tmp,
        ):
            tiny.byte_tokenizer().save_pretrained(tmp)
    assert not list(tmp_path.iterdir())


def test_what_is_added_to_a_file_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    output.append(file, b"a\n" * 1500)
    with runs.small_files(4096), pytest.raises(OSError, match=r"rows\.jsonl' could not be written \(.*File too large.*\); call someone"):
        output.append(file, b"b\n" * 1500, "call someone")
    assert file.read_bytes() == b"a\n" * 1500
    output.append(file, b"c\n")
    assert file.read_bytes() == b"a\n" * 1500 + b"c\n"
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"full' could not be written \(.*No space left on device\); make room, or choose another place"):
        output.append(tmp_path / "full", b"a")


def test_a_flipped_bit_in_a_file_of_ours_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with output.folder(out, "run a") as tmp:
        (tmp / "model.safetensors").write_bytes(bytes(1000))
        (tmp / "config.json").write_text("{}")
    (out / "config.json").write_text('{"mine": 1}')  # descriptions may be corrected by hand
    summed, plain = [], output._crc
    monkeypatch.setattr(output, "_crc", lambda path: summed.append(path) or plain(path))
    output.check(out)
    output.check(out)
    assert len(summed) == 1  # once for each file and process, until it changes
    (out / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    os.utime(out / "model.safetensors", ns=(0, 1))  # later than a clock of few ticks tells
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* delete .*alignax\.json"):
        output.check(out)
    (out / "alignax.json").write_text('{"origin": "run a", ')
    with pytest.raises(ValueError, match=r"alignax\.json is damaged, so the files of the folder cannot be checked"):
        output.check(out)
    (out / "alignax.json").unlink()
    output.check(out)


KILLED = """
import os, pathlib, random, signal, sys, time
from alignax import output
place, rng, seen = pathlib.Path(sys.argv[1]), random.Random(0), 0

def write_for_ever(ready):
    i = 0
    while True:
        with output.folder(place / "out", "run a") as tmp:
            for k in range(3):
                (tmp / str(k)).write_text(str(i))
        output.write_text(place / "file", str(i % 10) * 10000)
        i += 1
        os.write(ready, b".")

for _ in range(20):
    ended, ready = os.pipe()
    if not (child := os.fork()):
        write_for_ever(ready)
    os.close(ready)
    os.read(ended, 1)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ended)
    output.claim(place / "out", "run a")
    assert len({(place / "out" / str(k)).read_text() for k in range(3)}) == 1
    text = (place / "file").read_text()
    assert text == text[0] * 10000
    seen += any(output.unfinished(p) for p in place.iterdir())
assert {p.name for p in place.iterdir() if not output.unfinished(p)} == {"out", "file"}
assert seen, "no write was ever cut short"
"""


@pytest.mark.slow
def test_killed_at_any_moment_what_stands_is_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=runs.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


HOLDER = """
import fcntl, os, socket, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, f"process {sys.argv[2]} on {socket.gethostname()}".encode())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["another", "our own"])  # in another container, the holder may have our number
def test_a_workdir_is_held_by_one_process_and_freed_by_its_death(pid, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), str(pid)], env=os.environ, **pipes)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"is in use: process {pid} on .* works in it; wait until that process ends"):
        output.Lock(tmp_path / ".lock")
    (tmp_path / "metrics.jsonl").write_text("{}")
    output.claim(tmp_path / "scores.json", force=True)
    with pytest.raises(ValueError, match=rf"metrics.jsonl' is not replaced even with --force, since process {pid} on .* works in its"):
        output.claim(tmp_path / "metrics.jsonl", force=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lock = output.Lock(tmp_path / ".lock")
    output.Lock(tmp_path / ".lock").close()  # the same process may begin again
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    output.claim(tmp_path / "metrics.jsonl", force=True)  # by the process that works there
    lock.close()
    lock.close()
    output.Lock(tmp_path / ".lock").close()


LOGGED = [json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(1, 8)]
LOST = "has no row of step {}, after which this run goes on: what they logged is lost"
DAMAGED = "is damaged in line {}: 1 damaged lines removed, the rest is kept"


@pytest.mark.parametrize(
    ("rows", "left", "said"),
    [
        (LOGGED, LOGGED[:6], []),
        (None, [], [LOST.format("1 and of 5 further steps up to step 6")]),
        (LOGGED[:3], LOGGED[:3], [LOST.format("4 and of 2 further steps up to step 6")]),
        ([*LOGGED[:2], *LOGGED[4:]], [*LOGGED[:2], *LOGGED[4:6]], [LOST.format("3 and of 1 further steps up to step 4")]),
        ([*LOGGED[:2], "\0{broken\n", *LOGGED[3:]], None, [DAMAGED.format("3 (b'\\x00{broken')"), LOST.format("3")]),
        ([*LOGGED[:2], '{"step": 3, "loss": "x"}\n', *LOGGED[3:]], None, [DAMAGED.format("3 (its loss is 'x')"), LOST.format("3")]),
        ([*LOGGED[:2], '{"step": 3, "loss": NaN}\n', *LOGGED[3:]], None, [DAMAGED.format("3 (its loss is nan)"), LOST.format("3")]),
        ([*LOGGED[:2], '{"step": -3}\n', *LOGGED[3:]], None, [DAMAGED.format("3 (its step -3 stands after step 2)"), LOST.format("3")]),
        ([*LOGGED[:2], '{"step": 33, "loss": 1}\n', *LOGGED[3:]], None, [LOST.format("3")]),
        ([*LOGGED[:4], *LOGGED[2:3], *LOGGED[4:]], LOGGED[:6], [DAMAGED.format("5 (its step 3 stands after step 4)")]),
    ],
)  # fmt: skip
def test_what_a_log_has_lost_is_said_when_a_run_goes_on(rows, left, said, tmp_path, capsys):
    """What a report would refuse is removed when the run goes on, and a hole is told wherever it lies."""
    file = tmp_path / "metrics.jsonl"
    if rows is not None:
        file.write_text("".join(rows))
    Log(tmp_path, steps=9, start=6, every=1, tensorboard=False).close()
    assert capsys.readouterr().err == "".join(f"notice: {file} {line}\n" for line in said)
    kept = [*LOGGED[:2], *LOGGED[3:6]] if left is None else left
    assert (file.read_text() if kept else "") == "".join(kept) and len(read_rows(file)) == len(kept)


def test_a_log_of_turns_has_a_row_for_each_turn(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(LOGGED[3::4]))
    Log(tmp_path, steps=8, start=4, every=1, tensorboard=False, turn=4).close()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", [r"$\foo$", "a_$x^2$", "$", "_run", "100 $"])
def test_a_name_in_a_figure_is_no_formula(name):
    drawing = figures.figure([figures.Panel([figures.Line(name, [0.0, 1.0], [0.0, 1.0])], name, "x", "y")])
    assert figures.png(drawing)
    (text,) = drawing.axes[0].get_legend().get_texts()
    for shown in (text, drawing.axes[0].title):
        assert not matplotlib.cbook.is_math_text(shown.get_text())
        assert shown.get_text().replace(r"\$", "$").strip() == name


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"file/out' cannot be written: .*file' is a file; choose another place"):
        output.claim(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="empty' is a folder; name a file"):
        output.claim(tmp_path / "empty")
    links = {"gone": "/proc/not/there", "loop": "loop", "under": "file/out"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    for place, why in {
        "gone": "No such file", "loop": "the link .*loop' leads back to itself", "loop/out": "leads back", "under": "file' is a file",
        "x" * 250: "File name too long", "a/" + "x" * 300 + "/b": "File name too long",
        "/": "it is a mount point, .*a folder inside it can",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot be written: .*{why}.*; choose another place"):
            output.claim(tmp_path / place, "run a", force=True)
    before = sorted(tmp_path.iterdir())
    output.claim(tmp_path / "not" / "there" / "out")
    assert sorted(tmp_path.iterdir()) == before
    output.write_text(tmp_path / "not" / "there" / "out", "1")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # of root no folder is closed
    with pytest.raises(ValueError, match="out' cannot be written: you have no write permission for .*; choose another place"):
        output.claim(tmp_path / "out", "run a", force=True)


def test_what_dead_writers_of_a_shared_file_left_is_swept(tmp_path):
    done = subprocess.Popen(["true"])
    done.wait()
    dead = str(done.pid)
    with output.file(tmp_path / "0.part", shared=True) as own:
        own.write_text("new")
        mine = own.name
        names = [mine, mine.replace(str(os.getpid()), dead), ".0.part.elsewhere-1.alignax-tmp", mine.replace(str(os.getpid()), "x")]
        for name in names[1:]:
            (tmp_path / name).write_text("half")
        output.sweep(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {names[0], *names[2:]}
    assert (tmp_path / "0.part").read_text() == "new"
