"""The log of a run: the speed of the step that it is logged with, and files that grow and go on."""

import json
import struct
import time
import types
from contextlib import closing

import pytest
import runs
from tensorboardX.record_writer import masked_crc32c

from alignax.run import log as metrics
from alignax.run.log import Log
from alignax.run.tensorboard import TensorBoard


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_speed_is_of_the_step_it_is_logged_with(tmp_path, monkeypatch):
    """The speed is right at the start, after a resume or a pause, if fetched late, and if the wall clock goes backwards."""
    clock = [100.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))  # no other clock is there
    log = Log(tmp_path, steps=40, start=30, every=1, tensorboard=False)

    def step(number, seconds, tokens):
        clock[0] += seconds
        log.step(number, {"loss": 1.0}, tokens)

    step(31, 20.0, 100.0)
    step(32, 2.0, 100.0)
    with log.paused():
        clock[0] += 1000.0
    step(33, 4.0, 100.0)
    clock[0] += 30.0
    log.step(34, {"loss": 1.0}, 100.0, ended=clock[0] - 20.0)  # two steps that are looked at together
    log.step(35, {"loss": 1.0}, 100.0, ended=clock[0])
    log.close()
    assert [row["tokens_per_second"] for row in rows(tmp_path / "metrics.jsonl")] == pytest.approx([5.0, 50.0, 25.0, 10.0, 5.0])


def test_a_run_goes_on_without_its_console(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def isatty(self):
            return False

    monkeypatch.setattr(metrics.sys, "stderr", Gone())
    log = Log(tmp_path, steps=2, start=0, every=1, tensorboard=False)
    for step in (1, 2):
        log.step(step, {"loss": 1.0}, 10.0)
        log.line("a line")
    log.close()
    metrics.sys.stderr.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rollouts_are_bounded_and_go_on_without_a_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MOST", 4000)
    file = tmp_path / "rollouts.jsonl"

    def write(start, steps):
        log = Log(tmp_path, steps=100, start=start, every=1, tensorboard=False)
        for step in steps:
            log.rollouts(step, [{"completion": f"\u2028ä{step}", "reward": float("nan")}] * 4)
            assert file.stat().st_size <= 4000
        log.close()

    write(0, range(1, 61))
    found = [row["step"] for row in rows_of(file)]
    assert found == sorted(found) and found[-4:] == [60] * 4 and len(found) > 30
    write(50, range(51, 61))  # going on from a checkpoint at step 50
    again = [row["step"] for row in rows_of(file)]
    assert again[-40:] == [step for step in range(51, 61) for _ in range(4)]
    assert max(map(again.count, again)) == 4


def rows_of(file):
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("name", ["metrics", "samples", "rollouts"])
def test_a_full_disk_is_named_with_the_log_and_the_remedy(name, tmp_path):
    (tmp_path / f"{name}.jsonl").symlink_to("/dev/full")
    log = Log(tmp_path, steps=2, start=0, every=1, tensorboard=False)
    assert_full(name, log)


def test_a_full_disk_is_named_with_the_events_of_tensorboard(tmp_path):
    """The run neither waits nor prints a traceback of a thread."""
    log = Log(tmp_path, steps=2, start=0, every=1, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    assert_full(events.stem, log, events.suffix)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1}], "it stands before the events, and is not half a row"


def assert_full(name, log, suffix=".jsonl"):
    wrong = rf"{name}\{suffix}' could not be written \(.*No space left on device.*\); make room, and run the same command again"
    with pytest.raises(OSError, match=wrong), closing(log):
        log.row({"step": 1})
        log.samples(1, [{"prompt": "a", "completion": "b"}])
        log.rollouts(1, [{"prompt": "a"}])


def test_event_files_hold_what_tensorboardx_writes(tmp_path):
    """The same events, byte for byte but for their time, and each under the checksums of its length and content."""
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.event_pb2 import Event

    own = TensorBoard(tmp_path / "own", purge=3)
    own.add(3, {"loss": 0.5, "rewards/margins": float("nan")}, {})
    own.add(4, {}, {"samples": "**ä**b"})
    with closing(SummaryWriter(str(tmp_path / "theirs"), purge_step=3)) as writer:
        writer.add_scalar("loss", 0.5, 3)
        writer.add_scalar("rewards/margins", float("nan"), 3)
        writer.add_text("samples", "**ä**b", 4)

    def events(folder):
        (file,) = folder.iterdir()
        content, at, found = file.read_bytes(), 0, []
        while at < len(content):
            size, check = struct.unpack_from("<QI", content, at)
            data = content[at + 12 : at + 12 + size]
            assert (check, *struct.unpack_from("<I", content, at + 12 + size)) == (masked_crc32c(content[at : at + 8]), masked_crc32c(data))
            event = Event.FromString(data)
            assert time.time() - 600 < event.wall_time <= time.time()
            event.wall_time = 0
            found.append(event.SerializeToString(deterministic=True))
            at += 16 + size
        return found

    assert events(tmp_path / "own") == events(tmp_path / "theirs") and len(events(tmp_path / "own")) == 6
    with runs.small_files(own.file.stat().st_size + 20), pytest.raises(OSError, match="File too large"):
        own.add(5, {"loss": 1.0}, {})
    assert len(events(tmp_path / "own")) == 6, "no half event"


def test_a_sample_of_many_megabytes_is_logged_by_its_ends(tmp_path):
    """A prompt is logged as it stands in the data, however much of it was cut for the model."""
    log = Log(tmp_path, steps=1, start=0, every=1, tensorboard=True)
    with closing(log):
        log.samples(1, [{"prompt": "a" + "b" * 5_000_000 + "c", "completion": "d" * 2**16, "gold": 1.0}])
    (row,) = rows(tmp_path / "samples.jsonl")
    assert row["prompt"] == "a" + "b" * (2**15 - 1) + " [4,934,466 characters are left out] " + "b" * (2**15 - 1) + "c"
    assert row["completion"] == "d" * 2**16 and row["gold"] == 1.0
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 500_000
