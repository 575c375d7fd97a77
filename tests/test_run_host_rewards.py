"""Numbers of an experiment's reward functions as fields of a rollout."""

import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from alignax.config import default_config
from alignax.generate import Answers, Completions, Sampling
from alignax.host.calls import Answer, Call
from alignax.host.workers import Abandoned
from alignax.run.host_rewards import RewardFailed, bad_rewards, has_signal, named, rewarded, rewards_of

NAN = float("nan")


def right(prompts, completions, **columns):
    return []


def brief(prompts, completions, logprobs, completion_ids, raw_completions):
    return []


async def slow(prompts, completions):
    return []


class Run(types.SimpleNamespace):
    """A run whose functions have been asked already: `answers` are theirs, one after another."""

    def __init__(self, reward: Any, *answers: Answer, gold: Any = None, **rollout: Any):
        config, self.asked, self.lines, given = default_config(), [], [], iter(answers)
        config.rollout.update(rollout)
        own = types.SimpleNamespace(file=Path("e.py"), config=config, reward=reward, gold=gold, experience=None)

        def workers(call: Call, group: int, strict: bool) -> Answer:
            self.asked.append((call, group, strict))
            return next(given)

        workers.tell, workers.stop = lambda name, line: self.lines.append(line), lambda: 0
        tokenizer = types.SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [f"<s>{len(x)}" for x in ids])
        super().__init__(config=config, experiment=own, workers=workers, words=types.SimpleNamespace(tokenizer=tokenizer))


def ask(run: Any, hook: str = "reward", texts: str = "abcd", drawn: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The reward fields of one prompt's completions, which have two tokens each, except the first."""
    shape = (1, len(texts), 2)
    mask = np.ones(shape, bool)
    mask[0, 0, 1] = False
    tokens, logps = np.arange(2 * len(texts), dtype=np.int32).reshape(shape), -np.ones(shape, np.float32)
    completions = Completions(tokens, mask, logps, np.full(shape[:2], "length", object), Sampling(), 0, 0, drawn)
    examples: Any = types.SimpleNamespace(prompts=["p", "q"], columns={"answer": [3, 4]})
    return rewards_of(run, hook, Answers(examples, np.array([1]), [[1]], completions, [list(texts)]), {})


def test_rewards_that_float32_cannot_compare_are_none():
    """Squares of 1e20 are infinite: a group's deviation would be, and every advantage 0."""
    answer = Answer([1.0, -1e15, -1e20, np.inf, 2e300])
    with pytest.raises(
        RewardFailed, match=r"^reward\(\) of e.py: 3 of 5 rewards are not finite or beyond 1e\+15: the first is -1e\+20 for 'c'"
    ):
        ask(Run(right, answer), texts="abcde")
    run = Run(right, answer, bad_rewards="drop")
    found = ask(run, texts="abcde")
    assert found.keys() == {"rewards"} and found["rewards"].dtype == np.float32
    np.testing.assert_array_equal(found["rewards"], [[1, np.float32(-1e15), NAN, NAN, NAN]])
    assert len(run.lines) == 1 and bad_rewards(found) == 3 and rewarded(found).tolist() == [[True, True, False, False, False]]


def test_rewards_of_a_list_are_added_by_their_weights_as_trl_does():
    """`(rewards_per_func * weights).nansum()`, NaN where no function has given one, whatever rollout.bad_rewards says."""
    first, second = [1.0, NAN, 2.0, 3.0], [10.0, 20.0, NAN, 30.0]
    for weights in ((), (1.0, 0.2), (0.5, 0.0)):
        run = Run([right, slow], Answer(first), Answer(second), reward_weights=weights)
        found = ask(run)
        numbers = np.array([first, second], np.float32).T
        np.testing.assert_array_equal(found["scores"], numbers[None])
        np.testing.assert_allclose(found["rewards"], np.nansum(numbers * (weights or (1, 1)), axis=-1)[None], rtol=1e-6)
        assert found["rewards"].dtype == found["scores"].dtype == np.float32 and bad_rewards(found) == 0 and not run.lines
    calls = [call for call, group, strict in run.asked if group == 4 and strict]
    assert [(call.name, call.part, call.title, call.gathered, call.names) for call in calls] == [
        ("reward", 0, "right", False, ()), ("reward", 1, "slow", True, ()),
    ]  # fmt: skip
    none = [NAN, 1.0, 1.0, 1.0]
    with pytest.raises(RewardFailed, match=r"^reward of e.py: 1 of 4 rewards are not finite .*: the first is right nan, slow nan for 'a'"):
        ask(Run([right, slow], Answer(none), Answer(none)))
    found = ask(Run([right, slow], Answer(none), Answer(none), bad_rewards="drop"))
    np.testing.assert_array_equal(found["rewards"], [[NAN, 2, 2, 2]])
    assert bad_rewards(found) == 1 and rewarded(found).tolist() == [[False, True, True, True]]


def test_a_function_of_a_list_that_fails_is_named_and_costs_its_own_numbers():
    answers = Answer([1.0, 2.0, 3.0, 4.0]), Answer([1.0, NAN, 1e20, 1.0], "line 3: KeyError: 'x'", 1)
    with pytest.raises(RewardFailed, match=r"^brief\(\) of e.py, line 3: KeyError: 'x', for 'b'\. Correct the function"):
        ask(Run([right, brief], *answers))
    run = Run([right, brief], *answers, bad_rewards="drop")
    found = ask(run)
    np.testing.assert_array_equal(found["scores"][0], [[1, 1], [2, NAN], [3, NAN], [4, 1]])
    np.testing.assert_array_equal(found["rewards"], [[2, 2, 3, 5]])
    assert run.lines == ["brief() of e.py, line 3: KeyError: 'x', for 'b'. Such completions are dropped, and counted as bad_rewards"]
    stopped = Run([right, brief], Answer([NAN] * 4, "no answer", 0))
    with pytest.raises(RewardFailed):
        ask(stopped)
    assert len(stopped.asked) == 1  # the other is not asked in vain


def test_named_numbers_without_weights_are_scores_alone():
    """A response that lacks any number counts as a bad reward, since an aggregate such as wco then has no value for it."""
    answer = Answer([(1.0, 2.0), (3.0, NAN), (NAN, NAN), (5.0, 6.0)])
    with pytest.raises(RewardFailed, match=r"^reward\(\) of e.py: 2 of 4 rewards are not finite .*: the first is a 3, b nan for 'b'"):
        ask(Run(right, answer, reward_names=("a", "b")))
    run = Run(right, answer, reward_names=("a", "b"), bad_rewards="drop")
    found = ask(run)
    assert found.keys() == {"scores"} and run.asked[0][0].names == ("a", "b") and run.asked[0][0].part is None
    np.testing.assert_array_equal(found["scores"], [answer.rewards])
    assert bad_rewards(found) == 2 and rewarded(found).tolist() == [[True, True, False, True]]
    weighted = ask(Run(right, answer, reward_names=("a", "b"), reward_weights=(1.0, -1.0), bad_rewards="drop"))
    np.testing.assert_array_equal(weighted["rewards"], [[-1, 3, NAN, -1]])
    assert named(("a", "b"), found["scores"][0, 1]) == {"a": 3.0, "b": None}


def test_gold_is_one_number_whatever_rewards_are():
    run = Run([right, brief], Answer([1.0, 2.0, 3.0, 4.0]), gold=right, reward_weights=(0.5, 0.5))
    found = ask(run, "gold")
    assert found.keys() == {"gold"} and run.asked[0][0].names == () and run.asked[0][0].part is None
    np.testing.assert_array_equal(found["gold"], [[1, 2, 3, 4]])


@pytest.mark.parametrize("exact", [True, False], ids=["of the model", "of what was drawn from"])
def test_a_function_is_given_what_it_asks_for(exact):
    drawn = None if exact else np.full((1, 4, 2), -2.0, np.float32)
    run = Run(brief, Answer([1.0] * 4))
    ask(run, drawn=drawn)
    ((call, *_),) = run.asked
    x = -1.0 if exact else -2.0
    assert call.positional and call.given == {
        "prompts": ["q"] * 4, "completions": list("abcd"), "logprobs": [[x], [x, x], [x, x], [x, x]],
        "completion_ids": [[0], [2, 3], [4, 5], [6, 7]], "raw_completions": ["<s>1", "<s>2", "<s>2", "<s>2"],
    }  # fmt: skip
    other = Run(right, Answer([1.0] * 4))
    ask(other)
    assert other.asked[0][0].given == {"prompts": ["q"] * 4, "completions": list("abcd"), "answer": [4] * 4}


def test_groups_with_a_signal():
    rewards = np.array([[1, 1, 1], [0, 0, 1], [NAN, 2, 2], [NAN, NAN, 5], [NAN, NAN, NAN], [NAN, 1, 2]])
    np.testing.assert_array_equal(has_signal(rewards), [False, True, False, False, False, True])


def test_all_processes_do_what_the_one_that_asks_has_found(monkeypatch):
    """A failure stops all processes, even if every completion has a reward; so does a signal."""
    numbers = np.array([[1, 1], [2, NAN], [3, 1], [4, 1]], np.float32)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("alignax.run.host_rewards.multihost_utils.process_allgather", lambda own: np.array([own, [0, 0]]))
    for left, failed, error, message in (
        (0, 1, RewardFailed, "a reward function failed; see the message of process 0"),
        (15, 0, Abandoned, "15"),
    ):
        said = []
        monkeypatch.setattr("alignax.run.host_rewards.multihost_utils.broadcast_one_to_all", lambda x, said=said: said.append(x) or said[0])
        monkeypatch.setattr("jax.process_index", lambda: 0)
        answers = Answer(numbers[:, 0].tolist()), Answer(numbers[:, 1].tolist(), "it gives 'x', which is not a number" * failed, 1)
        here = Run([right, brief], *answers)
        if left:
            here.workers = Mock(side_effect=Abandoned(left), stop=lambda: 0)
        with pytest.raises(error):
            ask(here)
        monkeypatch.setattr("jax.process_index", lambda: 1)
        with pytest.raises(error, match=message):
            ask(Run([right, brief]))
