"""The arguments of reward functions, also as TRL passes them, and the names of their numbers."""

import functools
import types
from pathlib import Path
from typing import Any

import pytest

from alignax.config import default_config
from alignax.host.functions import ELSEWHERE, check, check_columns, functions_of, is_async, names_of, parameters, reward_fields, title

NAMED: Any = types.SimpleNamespace(file=Path("e.py"), config=default_config())


class Judge:
    """A reward that is an object."""

    def __call__(self, prompts, completions, answer):
        return []


class Waiting:
    """A reward that is an object with an async call."""

    async def __call__(self, prompts, completions):
        return []


async def awaited(prompts, completions):
    return []


def correct(prompts, completions, answer):
    return []


def short(completions, **kwargs):
    return []


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda prompts, completions, answer: 0, (True, ("answer",), ())),
        (lambda a, b: 0, (True, (), ())),
        (lambda prompts, completions, answer, bonus=2.0: 0, (True, ("answer",), ())),
        (lambda prompts, completions, level=1: 0, (True, ("level",), ())),
        (lambda prompts, completions, **columns: 0, (True, ("prompt", "answer", "level"), ())),
        (lambda prompt, completions, **columns: 0, (True, ("answer", "level"), ())),
        (lambda prompts, completions, answer, **columns: 0, (True, ("answer", "prompt", "level"), ())),
        (lambda prompts, completions, completion_ids, config: 0, (True, ("completion_ids", "config"), ())),
        (lambda prompts, completions, logprobs: 0, (True, ("logprobs",), ())),
        (lambda prompts, completions, *, raw_completions: 0, (True, ("raw_completions",), ())),
        (lambda completions, answer, **columns: 0, (False, ("completions", "answer", "prompts", "prompt", "level"), ())),
        (lambda answer, completions: 0, (False, ("answer", "completions"), ())),
        (lambda completions, prompts: 0, (False, ("completions", "prompts"), ())),
        (lambda **given: 0, (False, ("prompts", "completions", "prompt", "answer", "level"), ())),
        (lambda *given: 0, (True, (), ())),
        (lambda prompts, completions, solution, other: 0, (True, (), ("solution", "other"))),
        (lambda completion_ids, answer: 0, (False, ("completion_ids", "answer"), ())),
        (lambda prompts, logprobs: 0, (False, ("prompts", "logprobs"), ())),
        (lambda raw_completions, **_: 0, (False, ("raw_completions", "prompts", "completions", "prompt", "answer", "level"), ())),
        (Judge(), (True, ("answer",), ())),
        (functools.partial(correct, answer=3), (True, ("answer",), ())),
        (awaited, (True, (), ())),
        (max, (True, (), ())),
    ],
)  # fmt: skip
def test_what_a_reward_function_is_given(function, wanted):
    assert parameters(function, ["prompt", "answer", "level"]) == wanted


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions, completion_ids, answer, **kwargs: list(zip(prompts, completions, completion_ids, answer, strict=True)),
        lambda completions, prompts, completion_ids, answer: list(zip(prompts, completions, completion_ids, answer, strict=True)),
        lambda *, prompts, completions, completion_ids, answer, **_: list(zip(prompts, completions, completion_ids, answer, strict=True)),
        lambda completion_ids, completions, answer, trainer_state=None, log_metric=None, **kwargs: list(
            zip(kwargs["prompts"], completions, completion_ids, answer, strict=True)
        ),
        lambda prompts, completions, completion_ids, **kwargs: list(
            zip(prompts, completions, completion_ids, kwargs["answer"], strict=True)
        ),
    ],
    ids=["in order", "out of order", "by keyword", "with defaults", "in the rest"],
)
def test_what_trl_can_call_gets_the_same_here(function):
    """TRL 1.16 calls `f(prompts=.., completions=.., completion_ids=.., **columns, trainer_state=.., log_extra=.., log_metric=..)`."""
    offered = {"prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[1], [2]], "answer": [3, 4]}
    wanted = parameters(function, ["answer"])
    first = [offered[name] for name in ("prompts", "completions")] if wanted.positional else []
    ours = function(*first, **{name: offered[name] for name in wanted.named})
    try:
        theirs = function(**offered, trainer_state=None, log_extra=print, log_metric=print)
    except TypeError:  # one that takes no more than it names
        theirs = function(**offered)
    assert ours == theirs == [("p", "a", [1], 3), ("q", "b", [2], 4)]


def test_a_column_of_what_every_reward_is_offered_is_no_argument():
    columns = {"train": types.SimpleNamespace(columns={"config": [1], "logprobs": [1], "answer": [1]})}
    for function in (lambda prompts, completions, config: 0, lambda completions, config=None: 0):
        with pytest.raises(ValueError, match=r"asks for 'config', .* and data.train has a column of that name; rename the column"):
            check_columns("reward", function, NAMED, columns)  # type: ignore
    with pytest.raises(ValueError, match="asks for 'logprobs'"):
        check_columns("reward", lambda prompts, completions, logprobs: 0, NAMED, columns)  # type: ignore
    check_columns("reward", lambda prompts, completions, answer, **rest: 0, NAMED, columns)  # type: ignore


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_only_trl_gives_is_refused_with_what_to_do(name):
    columns = {"train": types.SimpleNamespace(columns={})}
    function = eval(f"lambda prompts, completions, {name}, **kwargs: 0")
    with pytest.raises(ValueError) as error:
        check_columns("correct", function, NAMED, columns)  # type: ignore
    assert f"correct() of e.py asks for {name!r}, which alignax does not have: {ELSEWHERE[name]}" == str(error.value)
    check_columns("correct", eval(f"lambda prompts, completions, {name}=None, **kwargs: 0"), NAMED, columns)  # type: ignore


def test_a_misspelt_argument_is_told_its_nearest():
    columns = {"train": types.SimpleNamespace(columns={"answer": [1]})}
    for name, near in (("completions_ids", "completion_ids"), ("logprob", "logprobs"), ("answers", "answer")):
        with pytest.raises(
            ValueError, match=f"asks for column '{name}', which data.train does not have; the nearest is '{near}'; it has: answer"
        ):
            check_columns("reward", eval(f"lambda prompts, completions, {name}: 0"), NAMED, columns)  # type: ignore


def test_what_a_function_is_called_and_whether_it_is_async():
    assert [title(f) for f in (correct, Judge(), functools.partial(functools.partial(correct, answer=1)))] == [
        "correct",
        "Judge",
        "correct",
    ]
    functions = (awaited, Waiting(), Waiting().__call__, functools.partial(awaited), correct, Judge(), max, lambda p, c: awaited(p, c))
    assert [is_async(f) for f in functions] == [True, True, True, True, False, False, False, False]


def experiment(reward: Any, gold: Any = None, experience: Any = None, **rollout: Any) -> Any:
    config = default_config()
    config.rollout.update(rollout)
    return types.SimpleNamespace(file=Path("e.py"), config=config, reward=reward, gold=gold, experience=experience, metrics=None)


def test_the_fields_and_names_of_what_rewards_give():
    one, listed = experiment(correct, gold=correct), experiment([correct, Judge()])
    assert (names_of(one), reward_fields(one)) == ((), {"rewards": (), "gold": ()})
    assert (names_of(listed), reward_fields(listed)) == (("correct", "Judge"), {"rewards": (), "scores": (2,)})
    functions = functions_of(listed)
    assert functions is not None and functions.weights == (1.0, 1.0)  # as TRL's
    several = {"reward_names": ("a", "b", "c")}
    assert reward_fields(experiment(correct, **several)) == {"scores": (3,)}
    weighted = experiment((correct,), reward_names=("right",), reward_weights=(0.5,))
    assert (names_of(weighted), reward_fields(weighted)) == (("right",), {"rewards": (), "scores": (1,)})
    assert reward_fields(experiment(correct, **several, reward_weights=(1.0, 0.0, 0.2))) == {"rewards": (), "scores": (3,)}
    assert (names_of(experiment(None)), reward_fields(experiment(None, gold=correct))) == ((), {"gold": ()})
    for own in (one, listed, weighted):
        check(own, {"train": types.SimpleNamespace(columns={"answer": [1]})})  # type: ignore


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (experiment([]), "reward of e.py is an empty list; write one function"),
        (experiment(correct, gold=[correct]), r"gold of e.py is a list, but gold must be a single number; write one function `def gold\("),
        (experiment([correct, 3]), "reward of e.py is a list with a int, '?3'?, which is not a function"),
        (experiment([correct, correct]), "the list reward of e.py gives the name 'correct' twice; set rollout.reward_names to"),
        (experiment([short, lambda prompts, completions: 0]), "gives the name '<lambda>'; set rollout.reward_names"),
        (experiment([short, correct], reward_names=("a",)), "reward_names has 1 names, but reward of e.py is a list of 2"),
        (experiment([short, correct], reward_weights=(1.0,)), "reward_weights has 1 weights for 2 rewards: short, correct"),
        (experiment([short, correct], reward_weights=(1.0, float("nan"))), r"reward_weights are \(1.0, nan\); give a finite number"),
        (experiment(short, reward_names=("a", "a")), "rollout.reward_names gives the name 'a' twice"),
        (experiment(short, reward_names=("a b", "c")), "gives the name 'a b'; .* letters, digits"),
        (experiment(short, reward_weights=(1.0,)), r"reward_weights is \(1.0,\), and reward\(\) of e.py gives one number without a name"),
        (experiment(None, reward_names=("a",)), r"reward_names is \('a',\), and there is no reward\(..\) in e.py"),
        (experiment([short, correct], experience=lambda config, ensemble: 0), "asks for the reward models of reward.path; both"),
    ],
)  # fmt: skip
def test_names_and_weights_that_fit_no_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        check(given, {"train": types.SimpleNamespace(columns={"answer": [1]})})  # type: ignore
