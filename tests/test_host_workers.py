"""Reward functions in processes of their own: whatever one does, the others keep their rewards and the run goes on."""

import math
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from multiprocessing.connection import Pipe
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import runs

from alignax.host.calls import Answer, Call, Malformed, numbers, told, within
from alignax.host.workers import POLL, Abandoned, Lost, Worker, Workers

SOURCE = """
import asyncio, multiprocessing, os, re, sys, threading, time

calls = []

def reward(prompts, completions):
    return [judged(text) for text in completions]

def judged(text):
    if text == "raises":
        raise KeyError("no such answer")
    if text == "backtracks":
        re.fullmatch("(a+)+", "a" * 40 + "!")
    if text == "sleeps":
        time.sleep(60)
    if text == "holds the interpreter later":
        threading.Thread(target=lambda: (time.sleep(0.3), sum(range(10**12))), daemon=True).start()
    if text == "says much":
        raise ValueError("word " * 4_000_000)
    if text == "has no words":
        raise type("Silent" * 100_000, (Exception,), {"__str__": lambda self: 1 / 0})
    if text == "much":
        return "y" * 20_000_000
    if text == "a large number":
        return 10**100_000
    while text == "prints on":
        print("still at it")
    if text == "holds the interpreter":  # C code that never looks at signals
        sum(range(10**12))
    if text == "catches all":
        try:
            time.sleep(60)
        except Exception:
            pass
    if text == "dies":
        os._exit(3)
    if text == "crashes":
        os.kill(os.getpid(), 11)
    if text == "exits":
        sys.exit(4)
    if text == "no number":
        return "many"
    if text == "prints":
        print("looked at it")
        os.write(1, b"from below\\n")
    if text == "forks" and os.fork() == 0:
        return -1.0
    if text == "imports":
        import slow_module
    return None if text == "none" else float(len(text))

def pooled(prompts, completions):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(judged, completions)

def gold(prompts, completions, config, **columns):
    return [config["scale"] * len(p) + float("-".join(columns) == "answer") for p in prompts]

def group_sizes(prompts, completions):
    return [len(completions)] * len(completions)

async def awaits(prompts, completions):
    return await asyncio.gather(*map(awaited, completions))

async def awaited(text):
    await asyncio.sleep(60 if text == "waits" else 0.3)
    return judged(text)

def columns(prompts, completions):
    return {"length": reward(prompts, completions), "a": [float("a" in text) for text in completions]}

async def kept(prompts, completions):  # as a client is that was opened in the first call
    loops.append(asyncio.get_running_loop())
    return [len(set(loops))] * len(completions)

loops = []

class Scale:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, prompts, completions):
        return [self.scale * x for x in reward(prompts, completions)]

several = [reward, Scale(2.0), awaits]
"""


def call(texts, name="reward", limit=30.0, **given):
    return Call(name, name, True, {"prompts": ["p"] * len(texts), "completions": list(texts)} | given, "config" == name, len(texts), limit)


def workers_of(folder, count=1):
    file = folder / "experiment.py"
    file.write_text(SOURCE)
    return Workers(file, {"scale": 10.0}, count, 30.0)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """One process for all tests that leave it alive."""
    with closing(workers_of(tmp_path_factory.mktemp("workers"))) as own:
        yield own


def test_a_completion_that_fails_costs_its_own_reward_alone(workers):
    texts = ["a", "raises", "ccc", "none", "no number", "raises"]
    found = workers(call(texts), 1, strict=False)
    np.testing.assert_array_equal(found.rewards, [1, np.nan, 3, np.nan, np.nan, np.nan])
    line = SOURCE[: SOURCE.index("raise KeyError")].count("\n") + 1
    assert (found.problem, found.at) == (f"line {line}: KeyError: 'no such answer'", 1)
    strict = workers(call(texts), 1, strict=True)
    assert (strict.problem, strict.at, strict.rewards[:2]) == (found.problem, 1, [1.0, pytest.approx(math.nan, nan_ok=True)])
    workers(call(["a"]), 1, strict=True)
    (pid,) = {own.process.pid for own in workers.workers}
    assert workers(call(["exits", "bb"]), 1, strict=False).rewards[1] == 2
    assert [own.process.pid for own in workers.workers] == [pid]  # it is as warm as before


def test_what_a_function_says_and_returns_is_told_in_few_characters(workers):
    """Messages of 20 MB, values of 20 MB, prompts of 20 MB, and errors that have no text cost one reward and a short line."""
    for text, said in {
        "says much": r"line \d+: ValueError: word word .*\.\.\.",
        "has no words": r"line \d+: SilentSilent[Silent]{68}: Silent.*\.\.\.",
        "much": "it gives .{2,3}y{20,60}[.]{3}y{20,60}.{2,3}, which is not a number",
        "a large number": "it gives '<int>', which is not a number",
    }.items():
        found = workers(call([text, "bb"], prompts=["p" * 20_000_000] * 2), 1, strict=False)
        assert re.fullmatch(said, found.problem) and len(found.problem) < 600, found.problem
        assert math.isnan(found.rewards[0]) and found.at == 0
    (own,) = workers.workers
    assert not own.ended


@pytest.mark.parametrize("stops", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_large_call_ends_in_its_time_where_nobody_reads_it(stops, tmp_path):
    """A call of many megabytes does not fit into the pipe: without a reader, sending it would wait for ever."""
    with closing(workers_of(tmp_path)) as own:
        assert own(call(["holds the interpreter later"]), 1, strict=True).rewards == [27]
        time.sleep(0.6)
        began = time.monotonic()
        own.stop = lambda: 15 if stops and time.monotonic() > began + 0.5 else 0
        try:
            found = own(call(["a"], limit=1.0, prompts=["p" * 20_000_000]), 1, strict=False)
            assert not stops and found.problem == "no answer within 1 s (rollout.timeout)"
            assert own(call(["a"]), 1, strict=True).rewards == [1], "a process of its own for the next call"
        except Abandoned as e:
            assert stops and e.number == 15 and not own.workers
        assert time.monotonic() - began < 10


def test_what_is_printed_is_told_and_bounded(workers):
    said = []
    workers.say = said.append
    workers(call(["prints", "b"]), 1, strict=True)
    assert said == ["reward(): looked at it", "reward(): from below"]
    workers(call(["prints"] * 2000), 1, strict=True)
    assert sum(map(len, said)) < 6000 and "not shown" in said[2]


def test_a_reward_function_may_use_processes_of_its_own(workers):
    assert workers(call(["a", "bb", "ccc"], "pooled"), 3, strict=True) == Answer([1.0, 2.0, 3.0])


def test_a_child_that_comes_back_answers_no_other_call(workers):
    found = [workers(call([*["forks"] * 3, text]), 1, strict=True).rewards for text in ("a", "bb", "ccc")]
    assert found == [[5.0, 5.0, 5.0, float(n)] for n in (1, 2, 3)]


@pytest.mark.slow
def test_a_process_whose_import_was_interrupted_is_replaced(tmp_path):
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(3)\n")
    with closing(workers_of(tmp_path)) as own:
        own(call(["a"]), 1, strict=True)
        (pid,) = {worker.process.pid for worker in own.workers}
        found = own(call(["imports", "bb"], limit=1.0), 1, strict=False)
        np.testing.assert_array_equal(found.rewards, [np.nan, 2])
        assert "(rollout.timeout), in the middle of an import; import the module at the top of the file" in found.problem
        assert own.workers[0].process.pid != pid and own(call(["imports"]), 1, strict=True).rewards == [7]


def test_a_stop_is_looked_for_whatever_a_function_prints_or_answers():
    """The clock checks two cases: endless printing, and an immediate answer for each completion."""
    here, there = Pipe()
    worker, began = object.__new__(Worker), time.monotonic()
    worker.connection, worker.output, worker.printed, worker.cut, worker.looked = here, os.open("/dev/zero", os.O_RDONLY), b"", False, began
    worker._end = lambda: None  # type: ignore
    stopped = Abandoned(15)
    worker.look = Mock(side_effect=stopped)
    with pytest.raises(Abandoned):
        worker.receive(0.6, "late")
    worker.looked, worker.drain = time.monotonic(), lambda: None
    with pytest.raises(Abandoned):
        for _ in range(60):
            there.send(Answer([1.0]))
            worker.receive(1.0, "late")
            time.sleep(0.01)
    assert 2 * POLL <= time.monotonic() - began < 1
    os.close(worker.output)


def test_no_process_is_started_while_those_of_a_call_are_ended(monkeypatch):
    """Ctrl-C beside a thread whose process has just been ended."""
    made = []

    class Started:
        ended = unable = False

        def __init__(self, *_):
            made.append(self)
            self.gone = threading.Event()

        def ask(self, call):
            if self is made[0]:
                raise KeyboardInterrupt
            self.gone.wait(5)
            raise Lost("it ended")

        def end(self):
            self.ended = True
            self.gone.set()
            time.sleep(0.1)

    monkeypatch.setattr("alignax.host.workers.Worker", Started)
    own = Workers(Path(__file__), {}, 3, 30.0)
    with pytest.raises(KeyboardInterrupt):
        own(call(["a"] * 6), 1, strict=False)
    assert all(one.ended for one in made) and not own.workers


@pytest.mark.slow
@pytest.mark.parametrize("text", ["sleeps", "prints on"])
def test_a_stop_ends_the_wait_for_a_worker(text, tmp_path):
    with closing(workers_of(tmp_path)) as own:
        own(call(["a"]), 1, strict=True)
        began = time.monotonic()
        own.stop = lambda: 15 if time.monotonic() > began + 0.5 else 0
        with pytest.raises(Abandoned) as found:
            own(call([text]), 1, strict=False)
        assert found.value.number == 15 and time.monotonic() - began < 10 and not own.workers
        own.stop = lambda: 0
        assert own(call(["a"]), 1, strict=True).rewards == [1]


def test_the_numbers_of_a_completion_have_names(workers):
    """A failed call, or the failure of its process, leaves one completion without any number, and no other."""
    asked = call(["a", "bb", "raises", "no number"], "columns")._replace(names=("a", "length"))
    found = workers(asked, 1, strict=False)
    np.testing.assert_array_equal(found.rewards, [(1, 1), (0, 2), (np.nan,) * 2, (0, np.nan)])
    assert found.problem.endswith("KeyError: 'no such answer'") and found.at == 2
    lost = workers(asked._replace(defined="another"), 1, strict=False)
    np.testing.assert_array_equal(lost.rewards, np.full((4, 2), np.nan))


def test_functions_of_a_list_are_called_by_their_place(workers):
    said = []
    workers.say = said.append
    texts = ["prints", "bb"]
    names = ("reward", "Scale", "awaits")
    found = [workers(call(texts, "several")._replace(part=k, defined=name), 1, strict=True).rewards for k, name in enumerate(names)]
    assert found == [[6, 2], [12, 4], [6, 2]] and [line for line in said if "looked" in line] == [
        f"{name}(): looked at it" for name in names
    ]
    for part, there in ((1, "Scale"), (7, "none")):
        other = workers(call(texts, "several")._replace(part=part, defined="reward"), 1, strict=True)
        assert other.final and f"the run has reward, but the file has {there}" in other.problem
    listed = workers(call(texts, "several"), 1, strict=True)
    assert listed.final and "has list" in listed.problem


def test_an_async_function_is_awaited_and_asked_for_each_completion_at_once(workers):
    """If one call fails, the others still run at the same time, which the clock shows."""
    asked = call(["a", "raises", *["ccc"] * 20, "no number"], "awaits", limit=20.0)._replace(gathered=True)
    assert workers(call(["a", "ccc"], "awaits"), 1, strict=True) == Answer([1.0, 3.0])
    (pid,) = {own.process.pid for own in workers.workers}
    began = time.monotonic()
    found = workers(asked, 1, strict=False)
    assert time.monotonic() - began < 4  # 23 times 0.3 s one after another
    np.testing.assert_array_equal(found.rewards, [1, np.nan, *[3] * 20, np.nan])
    line = SOURCE[: SOURCE.index("raise KeyError")].count("\n") + 1
    assert (found.problem, found.at) == (f"line {line}: KeyError: 'no such answer'", 1)
    assert [own.process.pid for own in workers.workers] == [pid]
    assert [workers(call(["a"], "kept"), 1, strict=True).rewards for _ in range(3)] == [[1.0]] * 3  # one loop for all calls


def test_an_async_completion_that_waits_ends_in_its_time(workers):
    workers(call(["a"]), 1, strict=True)
    (pid,) = {own.process.pid for own in workers.workers}
    began = time.monotonic()
    found = workers(call(["a", "waits", "ccc", "waits"], "awaits", limit=1.0)._replace(gathered=True), 1, strict=False)
    np.testing.assert_array_equal(found.rewards, [1, np.nan, 3, np.nan])
    assert (found.problem, found.at) == ("no answer within 1 s for one completion alone (rollout.timeout)", 1)
    assert time.monotonic() - began < 4 and [own.process.pid for own in workers.workers] == [pid]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["backtracks", "sleeps", "holds the interpreter", "dies", "exits"])
def test_an_async_completion_that_holds_all_others_costs_its_own_reward_alone(text, tmp_path):
    with closing(workers_of(tmp_path)) as own:
        own(call(["a"]), 1, strict=True)
        found = own(call(["a", "bb", text, "dddd"], "awaits", limit=1.0)._replace(gathered=True), 1, strict=False)
        np.testing.assert_array_equal(found.rewards, [1, 2, np.nan, 4])
        assert found.at == 2


def test_columns_and_the_config_are_given_by_name(workers):
    asked = call(["a", "bb"], "gold", answer=[1, 2])._replace(config=True)
    assert workers(asked, 1, strict=True).rewards == [11.0, 11.0]
    other = workers(asked._replace(defined="another"), 1, strict=False)
    assert other.final and "the run has another" in other.problem and np.isnan(other.rewards).all()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["backtracks", "sleeps", "catches all", "holds the interpreter"])
def test_a_completion_that_hangs_ends_in_its_time(text, tmp_path):
    with closing(workers_of(tmp_path)) as own:
        own(call(["a"]), 1, strict=True)
        (pid,) = {worker.process.pid for worker in own.workers}
        began = time.monotonic()
        found = own(call(["a", text, "ccc"], limit=1.0), 1, strict=False)
        np.testing.assert_array_equal(found.rewards, [1, np.nan, 3])
        assert (found.problem, found.at) == ("no answer within 1 s for one completion alone (rollout.timeout)", 1)
        assert time.monotonic() - began < 20
        assert (own.workers[0].process.pid == pid) == (text != "holds the interpreter")  # kept warm where that can be


@pytest.mark.slow
def test_a_process_that_dies_is_replaced_and_said_in_one_line(tmp_path, monkeypatch):
    with closing(workers_of(tmp_path)) as own:
        own(call(["a"]), 1, strict=True)
        own.workers[0].process.kill()  # as where memory runs out
        (tmp_path / "experiment.py").write_text("raise SystemExit")  # what the run began with counts
        found = own(call(["a", "dies", "ccc", "crashes", "e"]), 1, strict=False)
        np.testing.assert_array_equal(found.rewards, [1, np.nan, 3, np.nan, 1])
        assert found.problem == "its process ended with exit code 3" and found.at == 1
        assert "SIGSEGV" in own(call(["crashes"]), 1, strict=True).problem
        monkeypatch.setattr("alignax.host.workers.BAD", 2)
        lost = own(call(["dies"] * 40 + ["a"]), 1, strict=False)
        assert np.isnan(lost.rewards).all()  # given up before so many processes are spent


@pytest.mark.slow
def test_rewards_are_the_same_whatever_the_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["x" * int(k) if k else "raises" for k in rng.integers(0, 9, 42)]
    found = []
    for count in (1, 2, 3):
        with closing(workers_of(tmp_path, count)) as own:
            found.append(own(call(texts), 6, strict=False))
            sizes = own(call(texts, "group_sizes"), 6, strict=True).rewards
            assert len(own.workers) == count and all(size % 6 == 0 for size in sizes) and len(set(sizes)) <= count
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].rewards, other.rewards)
        assert found[0].problem == other.problem and found[0].at == other.at == texts.index("raises")


@pytest.mark.slow
def test_twenty_thousand_that_raise_are_one_line(workers):
    began = time.monotonic()
    found = workers(call(["raises"] * 20_000), 1, strict=False)
    assert np.isnan(found.rewards).all() and len(found.rewards) == 20_000 and found.problem.count("KeyError") == 1
    assert time.monotonic() - began < 25 and len(workers.workers) == 1 and not workers.workers[0].ended


@pytest.mark.slow
def test_nothing_is_left_when_the_run_is_killed(tmp_path):
    """The worker ends even if its function hangs in C code, where no Python thread could notice the end of the run."""
    code = """
    import sys; from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_host_workers import call, workers_of
    own = workers_of(Path({folder!r}))
    own(call(["a"]), 1, strict=True)
    print(own.workers[0].process.pid, flush=True)
    own(call([{text!r}], limit=600.0), 1, strict=True)
    """
    for text in ("backtracks", "holds the interpreter"):
        script = textwrap.dedent(code).format(tests=str(runs.REPO / "tests"), folder=str(tmp_path), text=text)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=runs.environment())
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.3)
        os.kill(pid, 0)
        process.kill()
        process.communicate()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{text}: the worker outlives the run")


def test_within_ends_what_looks_at_signals():
    import re

    with pytest.raises(TimeoutError, match="no answer within 0.2 s"):
        within(0.2, lambda: re.fullmatch("(a+)+", "a" * 40 + "!"))

    def stubborn():
        try:
            time.sleep(5)
        except TimeoutError:
            return 1

    with pytest.raises(TimeoutError):
        within(0.1, stubborn)
    assert within(5, lambda: 3) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gives 1 rewards for 2"), ([1.0] * 3, "gives 3 rewards"), (iter(range(9)), "gives 3 or more"), ("01", "gives a str"),
        ({0: 1, 1: 2}, "gives a dict"), ({0.5, 1.5}, "gives a set"), (1.0, "gives a float"), (np.float32(1), "gives a float32"),
        (np.ones(()), "gives a ndarray"), (None, "gives a NoneType"),
        ({"a": [1, 2], "b": [3, 4]}, r"gives a dict; .* set rollout.reward_names=\('a', 'b'\)"),
        ([(1, 2), (3, 4)], r"gives '\(1, 2\)' for a completion; .* name them in rollout.reward_names"),
        ([{"a": 1}, {"a": 2}], "name them in rollout.reward_names"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_rewards(given, message):
    with pytest.raises(Malformed, match=message):
        numbers(given, 2)


def test_what_counts_as_numbers():
    for given in ((1, True), np.array([[1.0], [1.0]]), (x for x in (1, 1)), [np.int64(1), 1.0]):
        assert numbers(given, 2).rewards == [1.0, 1.0]
    found = numbers([None, "7", float("inf")], 3)
    np.testing.assert_array_equal(found.rewards, [np.nan, np.nan, np.inf])
    assert (found.problem, found.at) == ("it gives \"'7'\", which is not a number", 1)


@pytest.mark.parametrize(
    "given",
    [
        {"a": [1, 2], "b": np.array([3.0, np.nan])}, [{"a": 1, "b": 3}, {"a": 2}], [(1, 3), [2, None]], np.array([[1, 3], [2, np.nan]]),
        ({"b": x, "a": y} for x, y in ((3, 1), (None, 2))),
    ],
    ids=["columns", "mappings", "tuples", "an array", "a generator"],
)  # fmt: skip
def test_what_counts_as_several_numbers(given):
    found = numbers(given, 2, ("a", "b"))
    np.testing.assert_array_equal(found.rewards, [(1, 3), (2, np.nan)])
    assert found.problem == ""


def test_several_numbers_of_which_one_is_none():
    for given in ({"a": [1, 2], "b": ["x", 3]}, [(1, "x"), (2, 3)], [{"a": 1, "b": "x"}, (2, 3)]):
        found = numbers(given, 2, ("a", "b"))
        np.testing.assert_array_equal(found.rewards, [(1, np.nan), (2, 3)])
        assert (found.problem, found.at) == ("it gives \"'x'\", which is not a number", 0)
    np.testing.assert_array_equal(numbers([None, (1, 2)], 2, ("a", "b")).rewards, [(np.nan, np.nan), (1, 2)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": [1, 2]}, "gives 'a', and rollout.reward_names are 'a', 'b'"),
        ({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "gives 'a', 'b', 'c', and"),
        ({"a": [1, 2], "b": [1]}, "gives 1 rewards for 2 completions, for the name 'b'"),
        ([{"a": 1, "c": 2}] * 2, "gives a completion the number 'c', but rollout.reward_names are 'a', 'b'"),
        ([(1, 2, 3)] * 2, r"gives '\(1, 2, 3\)' for a completion, and rollout.reward_names are"),
        ([1.0, 2.0], "gives '1.0' for a completion"), (["ab", "cd"], "for a completion"), ([{1, 2}] * 2, "for a completion"),
        ([(1, 2)], "gives 1 rewards for 2"), (np.ones(2), "for a completion"), ([((1, 2), 3)] * 2, "for a completion"),
    ],
)  # fmt: skip
def test_what_are_no_numbers_of_these_names(given, message):
    with pytest.raises(Malformed, match=message):
        numbers(given, 2, ("a", "b"))


def test_what_reads_a_text_as_messages_is_told_what_it_is():
    """TRL passes completions of conversations as messages, alignax passes text."""
    for text in ("", "abc"):
        try:
            text[0]["content"]  # type: ignore
        except Exception as e:
            assert told(e, Path("e.py")).endswith("; completions are texts, even if prompts are conversations")
    assert told(IndexError("list index out of range"), Path("e.py")) == "IndexError: list index out of range"


def test_a_worker_that_cannot_load_the_experiment(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text("import os\nassert 'JAX_PLATFORMS' not in os.environ, 'this needs an accelerator'\n")
    with closing(Workers(file, {}, 1, 30.0)) as own:
        found = own(call(["a", "b"]), 1, strict=False)
    assert found.final and np.isnan(found.rewards).all()
    assert "which cannot load the file: line 2: AssertionError: this needs an accelerator" in found.problem
    with pytest.raises(ValueError, match="the config of .* cannot be sent"):
        Workers(file, {"f": lambda: 0}, 1, 30.0)


def test_a_process_that_begins_with_another_code_of_a_module_says_so(tmp_path, monkeypatch):
    """What the experiment file imports is read when a process begins, and one begins again after a crash."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    file, helper, said = tmp_path / "experiment.py", tmp_path / "helper_of_workers.py", []
    file.write_text(
        "import os\nimport helper_of_workers\ndef reward(prompts, completions):\n    return [helper_of_workers.f(x) for x in completions]\n"
    )
    source = "import os\ndef f(text):\n    return os._exit(3) if text == 'dies' else 1.0\n"
    helper.write_text(source)
    with closing(Workers(file, {}, 1, 30.0)) as own:
        own.say = said.append
        assert own(call(["a"]), 1, strict=False).rewards == [1.0]
        file.write_text("import json\n")  # its own code is that of the run's beginning
        helper.write_text("# words\n" + source)
        assert np.isnan(own(call(["dies"]), 1, strict=False).rewards).all() and own(call(["a"]), 1, strict=False).rewards == [1.0]
        assert not any("has changed" in text for text in said)
        helper.write_text(source.replace("1.0", "2.0"))
        assert np.isnan(own(call(["dies"]), 1, strict=False).rewards).all() and own(call(["a"]), 1, strict=False).rewards == [2.0]
        helper.write_text("def (")
        assert np.isnan(own(call(["dies"]), 1, strict=False).rewards).all()
        assert "cannot load the file" in own(call(["a"]), 1, strict=False).problem
    told = [text for text in said if "has changed" in text]
    assert len(told) == 1 and told[0].startswith("notice: the code of helper_of_workers.py, which experiment.py imports, has changed since")
