"""The loop, with everything that computes replaced: what is saved, and in what order, however it ends."""

import signal
import socket
import tempfile
import time
import types
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import pytest

from alignax.config import difference, load_experiment
from alignax.config.defaults import default_config
from alignax.host.workers import Abandoned, never
from alignax.link import Link, Peer
from alignax.run import loop, stop
from alignax.run.host_rewards import RewardFailed
from alignax.run.prepare import FREE


@pytest.fixture
def looped(monkeypatch):
    """The actions of a loop of 4 steps, and its end; evaluations and checkpoints are due after every second step."""

    def run(signal_at=0, during="train", failing_at=0, first=0):
        done = []
        config = default_config()
        config.eval.every = config.checkpoint.every = 2

        def come(what, step):
            if (what, step) == (during, signal_at):
                signals.signal = 15

        def train(state, held, batches):
            done.append(f"train {state.step + 1}")
            come("train", state.step + 1)
            return types.SimpleNamespace(step=state.step + 1), {}

        def evaluation(run, held, programs, log, look):
            def evaluate(state, step):
                come("eval", step)
                look()
                done.append(f"eval {step}")
                return {"loss": 1.0}

            return evaluate

        def observe(step, metrics, ended):
            assert ended.result() <= time.monotonic()  # when the step was over, however late it is looked at
            if step == failing_at:
                raise RewardFailed("no reward")

        monkeypatch.setattr(loop, "Evaluation", evaluation)
        feed = Mock(waits=False, side_effect=lambda state, step: (state, {}, {}))
        feed.after.side_effect = lambda state, metrics: (state, {})
        monkeypatch.setattr(loop, "Observer", lambda *_, **__: observe)
        monkeypatch.setattr(loop, "evaluated", lambda _: False)
        save = lambda state, about, scores: done.append(f"save {state.step}{' with scores' if scores else ''}")
        checkpoints = types.SimpleNamespace(save=save, check=lambda: None, close=lambda: None)
        line = lambda text: done.append("programs" if text.startswith("programs: ") else text)  # their number is that of all tests
        log = types.SimpleNamespace(paused=nullcontext, line=line, publish=lambda: None)
        experiment = types.SimpleNamespace(file=types.SimpleNamespace(name="mine.py"))
        given = {"config": config, "steps": 4, "workers": types.SimpleNamespace(stop=never), "experiment": experiment, "workdir": "run"}
        state = types.SimpleNamespace(step=jnp.int32(first))
        untraced = Mock(step=lambda *_: nullcontext())
        programs = {"train": types.SimpleNamespace(call=train)}
        about = {"policy": "", "reference": ""}
        started = loop.Started(types.SimpleNamespace(**given), state, first, {}, programs, about, checkpoints, None)  # type: ignore
        with stop.Stop() as signals:
            try:
                done.append(sorted(loop.loop(started, feed, untraced, log, signals)[1]))  # type: ignore
            except (SystemExit, RewardFailed) as e:
                done.append(e.code if isinstance(e, SystemExit) else repr(e))
        return done

    return run


GOES_ON = "saved. The same command goes on from here."


def test_an_evaluation_is_done_before_the_checkpoint_that_has_its_scores(looped):
    second, last = (
        ["train 1", "programs", "train 2", "eval 2", "save 2 with scores"],
        ["train 3", "train 4", "eval 4", "save 4 with scores"],
    )
    assert looped() == ["eval 0", *second, *last, ["after", "before"]]


def test_a_stop_does_not_wait_for_an_evaluation(looped):
    """A stop skips evaluations that are due, at the end too, and breaks off a running one; the next start makes up for it."""
    begun = ["eval 0", "train 1", "programs", "train 2"]
    assert looped(2) == [*begun, "save 2", f"stopped by SIGTERM after step 2; {GOES_ON}", 143]
    assert looped(2, "eval") == [*begun, "save 2", f"stopped by SIGTERM after step 2, in the evaluation; {GOES_ON}", 143]
    assert looped(4)[-4:] == ["train 4", "save 4", f"stopped by SIGTERM after step 4; {GOES_ON}", 143]
    assert looped(0, "eval") == ["stopped by SIGTERM before the first step; the same command begins again.", 143]
    assert looped(first=4) == ["eval 4", ["after"]]


def test_a_run_goes_on_with_other_patience_and_not_with_another_reward(tmp_path):
    """The message of a run that ends because its reward failed promises both."""

    def changed(source, *overrides):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "mine.py").write_text(source)
        return load_experiment(folder / "mine.py", overrides)

    source = """
from alignax import *

def get_config():
    return default_config()

def loss(config):
    return grpo()

def reward(prompts, completions):
    return [1.0 for _ in completions]
"""
    began = changed(source)
    assert difference(began, changed(source, "rollout.timeout=1200", "rollout.bad_rewards=drop"), FREE) == []
    assert difference(began, changed(source.replace("1.0", "2.0")), FREE) == ["the code of mine.py has changed"]


def test_what_was_learnt_is_saved_where_no_rollout_has_a_reward(looped):
    *_, saved, told, end = looped(failing_at=2)
    assert saved == "save 2" and end == "RewardFailed('no reward')"
    assert told.startswith("saved after step 2. The same command goes on from there") and "If mine.py changes, it is another run" in told


def test_a_signal_to_one_process_stops_all_at_the_same_call(monkeypatch):
    """Also a process that is ahead; the signal's number is that of all."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        hosts, end = ["a", "b"], lambda line, code: None
        main, other = Link(0, hosts, [Peer(1, ours)], 60, 60, end), Link(1, hosts, [Peer(0, theirs)], 60, 60, end)
        monkeypatch.setattr(stop, "link", lambda: other)
        assert not any(main.reached() for _ in range(3))
        with stop.Stop() as signals:
            assert not signals.requested()
            signal.raise_signal(signal.SIGTERM)
            while not main._point:
                time.sleep(0.01)
            assert not signals.requested() and not signals.requested()  # the second and the third call
            with pytest.raises(Abandoned):
                signals.look()
            assert signals.signal == main.reached() == signal.SIGTERM
        main.bye(), other.bye()
