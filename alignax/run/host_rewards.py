"""Rewards of completions from the reward functions of an experiment, which run in host processes, as fields of a rollout's batch."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax.data import Examples
from alignax.distributed import from_main
from alignax.generate import Answers
from alignax.host.calls import METRICS, Call, qualified
from alignax.host.functions import Functions, functions_of, is_async, models_asked, models_offered, parameters, title
from alignax.host.workers import POLL, Abandoned, Workers
from alignax.run.prepare import Run
from alignax.text import short

T = TypeVar("T")
Models = Mapping[str, list[Any]]
MOST = 1e15  # largest magnitude of a reward: squares of larger ones, summed over a rollout, overflow float32


class RewardFailed(RuntimeError):
    """A reward function raised, timed out or returned no valid number, and `rollout.bad_rewards` is "error"."""


class Said(NamedTuple):
    """R completions in the form that reward functions get; the `group` completions of one prompt are adjacent."""

    rows: Sequence[int] | np.ndarray  # [R] row of the data that each completion answers
    texts: list[str]
    ids: Sequence[np.ndarray]
    logps: Sequence[np.ndarray]  # the sampler's log-probs of these tokens
    group: int
    models: Models  # by name of a frozen model: its values, one for each completion


class Found(NamedTuple):
    """The numbers that the functions of `reward` or `gold` return for R completions."""

    numbers: np.ndarray  # [R, K] float32; NaN: no number
    problem: str = ""  # the first problem, with the name of the function and the line; "": none
    at: int = -1  # index of the completion with that problem; -1: all of them together
    final: bool = False  # whether every other completion would have the problem, too


def rewards_of(run: Run, hook: str, answers: Answers, models: Models) -> dict[str, np.ndarray]:
    """The batch fields of completions that `reward` or `gold` of the experiment computes.

    One number per completion: `gold` or `rewards` [B, N] float32. Several named numbers: `scores` [B, N, K], and, if they have weights,
    `rewards`, the weighted sum of the numbers that are not NaN. NaN means no number. See `alignax.host.functions.reward_fields`.

    Args:
      run: the run.
      hook: "reward" or "gold".
      answers: the completions.
      models: values of frozen models for the completions, see `alignax.run.scoring.Scored`.

    Raises:
      RewardFailed: if a function fails or a completion has no reward, and `rollout.bad_rewards` is "error".
      Abandoned: in every process, if a signal ended the wait of process 0 for the functions.
    """
    functions, B, n = functions_of(run.experiment, hook), len(answers.texts), len(answers.texts[0])
    assert functions is not None
    said = said_of(answers, models)
    found, left = Found(np.full((B * n, len(functions.names) or 1), np.nan, np.float32)), 0
    try:
        found = asked(run.workers, lambda: ask(run, functions, answers.examples, said)) or found
    except Abandoned as e:
        left = e.number
    numbers, problem = found.numbers, found.problem
    if jax.process_count() > 1:
        told = numbers, np.array([left, bool(problem)], np.int32)
        numbers, (left, failed) = map(np.asarray, multihost_utils.broadcast_one_to_all(told))
        problem = problem or "a reward function failed; see the message of process 0" * int(failed)
    if left:
        raise Abandoned(int(left))
    check_found(run, functions, found._replace(numbers=numbers, problem=problem), said.texts)
    numbers = np.where(np.abs(numbers) <= MOST, numbers, np.float32(np.nan))
    total = combined(functions, numbers)
    total = np.where(np.abs(total) <= MOST, total, np.float32(np.nan)).reshape(B, n)
    fields = {"gold" if hook == "gold" else "rewards": total} if functions.weights else {}
    return fields | ({"scores": numbers.reshape(B, n, -1)} if functions.names else {})


def metrics_of(run: Run, answers: Answers, models: Models) -> dict[str, float]:
    """The means `metrics/NAME` of the numbers that `metrics` of the experiment returns for completions, over finite numbers.

    Completions whose call fails have no metrics. The failure is reported once and stops no run, since nothing is trained on metrics.

    Raises:
      Abandoned: in every process, if a signal ended the wait of process 0 for the function.
    """
    functions = functions_of(run.experiment, METRICS)
    if functions is None:
        return {}
    said, found, answer, left = said_of(answers, models), {}, None, 0
    try:
        answer = asked(run.workers, lambda: run.workers(call_of(run, functions, 0, answers.examples, said), said.group, strict=False))
    except Abandoned as e:
        left = e.number
    if answer is not None:
        known = [row for row in answer.rewards if isinstance(row, dict)]
        columns = {name: [row.get(name, np.nan) for row in known] for row in known for name in row}
        found = {f"{METRICS}/{name}": known_mean(np.where(np.isfinite(x), x, np.nan)) for name, x in columns.items()}
        if answer.problem:
            where = f"{METRICS}() of {run.experiment.file}{behind_file(answer.problem)}"
            run.workers.tell(METRICS, f"{where}. Such completions are left out of the metrics")
    found, left = json.loads(from_main(json.dumps([found, left])))
    if left:
        raise Abandoned(left)
    return found


def said_of(answers: Answers, models: Models) -> Said:
    """The completions of `answers` in the form that reward functions get."""
    n, completions = len(answers.texts[0]), answers.completions
    ids, logps = ([own for group in x for own in group] for x in (completions.rows(), completions.drawn_rows()))
    return Said(np.repeat(answers.rows, n), [text for group in answers.texts for text in group], ids, logps, n, models)


def asked(workers: Workers, ask: Callable[[], T]) -> T | None:
    """The result of `ask()` in process 0, which alone calls it, as a function may be random or expensive; None in the other processes.

    All processes wait together and tell each other which signals came: a signal to any one of them ends the wait of all.
    """
    if jax.process_count() == 1:
        return ask()
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask) if jax.process_index() == 0 else None
        waits = True
        while waits:
            if asking is not None:
                wait([asking], POLL)
            own = np.array([workers.stop(), asking is not None and not asking.done()], np.int32)
            number, waits = multihost_utils.process_allgather(own).max(axis=0).tolist()
            if number:
                workers.stop = lambda number=number: number
        return None if asking is None else asking.result()


def ask(run: Run, functions: Functions, examples: Examples, said: Said) -> Found:
    """The numbers that the functions of an experiment return for completions; the functions are called one after another."""
    strict, count = run.config.rollout.bad_rewards == "error", len(said.texts)
    found = Found(np.full((count, len(functions.names) or 1), np.nan, np.float32))
    for k, function in enumerate(functions.each):
        answer = run.workers(call_of(run, functions, k, examples, said), said.group, strict)
        own = slice(k, k + 1) if functions.listed else slice(None)
        with np.errstate(over="ignore"):
            found.numbers[:, own] = np.reshape(answer.rewards, (count, -1))
        if answer.problem and not found.problem:
            name = title(function) if functions.listed else functions.hook
            problem = f"{name}() of {run.experiment.file}{behind_file(answer.problem)}"
            found = found._replace(problem=problem, at=answer.at, final=answer.final)
            if strict:
                break
    return found


def call_of(run: Run, functions: Functions, k: int, examples: Examples, said: Said) -> Call:
    """The call of function k on completions, with all arguments that the function asks for."""
    function, c = functions.each[k], run.config.rollout
    wanted = parameters(function, examples.columns, models_offered(run.experiment))
    names = ("prompts", "completions", *wanted.named) if wanted.positional else wanted.named
    offered: dict[str, Callable[[], list[Any]]] = {
        "prompts": lambda: [examples.prompts[row] for row in said.rows],
        "completions": lambda: said.texts,
        "completion_ids": lambda: [own.tolist() for own in said.ids],
        "raw_completions": lambda: run.words.tokenizer.batch_decode(list(said.ids), skip_special_tokens=False),
        "logprobs": lambda: [own.tolist() for own in said.logps],
    } | {name: lambda name=name: said.models[name] for name in said.models}
    column = lambda name: [examples.columns[name][row] for row in said.rows]
    given = {name: offered[name]() if name in offered else column(name) for name in names if name != "config"}
    call = Call(functions.hook, qualified(function), wanted.positional, given, "config" in names, len(said.texts), c.timeout)
    if functions.listed:
        return call._replace(part=k, gathered=is_async(function))
    return call._replace(names=functions.names, gathered=is_async(function))


def combined(functions: Functions, numbers: np.ndarray) -> np.ndarray:
    """The weighted sum of the numbers that are not NaN, NaN if all are: [R, K] -> [R]; without weights NaN if any number is NaN."""
    if not functions.weights:
        return numbers.sum(axis=-1)
    known = ~np.isnan(numbers)
    total = np.where(known, numbers * np.array(functions.weights, np.float32), 0).sum(axis=-1)
    return np.where(known.any(axis=-1), total, np.float32(np.nan))


def unusable(functions: Functions, numbers: np.ndarray) -> np.ndarray:
    """The mask of completions that have no valid reward, or a number that is too large: [R, K] -> [R] bool."""
    return ~(np.abs(combined(functions, numbers)) <= MOST) | (np.abs(numbers) > MOST).any(axis=-1)


def check_found(run: Run, functions: Functions, found: Found, texts: list[str]) -> None:
    """Raises RewardFailed if any completion has no valid reward; with `rollout.bad_rewards` "drop" reports that once instead."""
    bad = unusable(functions, found.numbers)
    if not (bad.any() or found.problem):
        return
    what = found.problem + (f", for {short(texts[found.at])}" if found.at >= 0 else "")
    if not found.problem:
        first, name = int(bad.argmax()), functions.hook + "()" * (not functions.listed)
        what = (
            f"{name} of {run.experiment.file}: {bad.sum()} of {len(bad)} rewards are not finite or beyond {MOST:g}: the first is "
            f"{told(functions, found.numbers[first])} for {short(texts[first])}"
        )
    if run.config.rollout.bad_rewards == "error":
        raise RewardFailed(f"{what}. Correct the function, or continue without such completions with rollout.bad_rewards=drop")
    if jax.process_index() == 0:
        run.workers.tell(functions.hook, f"{what}. Such completions are dropped, and counted as bad_rewards")


def check_reward(run: Run, hook: str) -> None:
    """Calls `reward` or `gold` of the experiment once, as a rollout does, with a prompt of the data and its stored completion.

    Refuses a result that would stop the run. With `rollout.bad_rewards` "drop" a missing reward is allowed, and a failure is only
    reported, since that completion alone may cause it. Log-probs and values of models are given as 0.
    """
    functions, examples, file = functions_of(run.experiment, hook), run.data.evaluated, run.experiment.file
    assert functions is not None
    said = stored_answer(run)
    found, text = ask(run, functions, examples, said), said.texts[0]
    if found.problem:
        what = f"{found.problem}, called with a prompt of the data and the completion {short(text)}"
        if found.final or run.config.rollout.bad_rewards == "error":
            raise ValueError(
                f"{what}; it must accept any completion, even an empty one, and return a list with a number or None for each completion"
            )
        run.workers.say(what)
    elif run.config.rollout.bad_rewards == "error" and unusable(functions, found.numbers).any():
        name, given = hook + "()" * (not functions.listed), told(functions, found.numbers[0])
        raise ValueError(
            f"{name} of {file} returns [{given}] for one prompt and its completion {short(text)}; it must return a finite number up to "
            f"{MOST:g} for each completion, or set rollout.bad_rewards=drop, which leaves out the other completions"
        )


def check_metrics(run: Run) -> list[str]:
    """Calls `metrics` of the experiment once, as `check_reward` does, refuses a failure, and returns the names of the metrics."""
    functions, examples = functions_of(run.experiment, METRICS), run.data.evaluated
    if functions is None:
        return []
    said = stored_answer(run)
    answer = run.workers(call_of(run, functions, 0, examples, said), 1, strict=False)
    if not answer.problem:
        return list(answer.rewards[0])
    what = f"{METRICS}() of {run.experiment.file}{behind_file(answer.problem)}, called with a prompt of the data and the completion "
    what += short(said.texts[0])
    if answer.final or run.config.rollout.bad_rewards == "error":
        raise ValueError(
            f"{what}; it must accept any completion, even an empty one, and return lists by name, with a number or None for each completion"
        )
    run.workers.say(what)
    return []


def stored_answer(run: Run) -> Said:
    """The first prompt of the data with its stored completion; log-probs and values of models are 0."""
    examples = run.data.evaluated
    answer = examples.tokens[: examples.offsets[1]][examples.scored[: examples.offsets[1]]]
    text = run.words.tokenizer.decode(answer, skip_special_tokens=True)
    models: dict[str, list[Any]] = {}
    for name in models_asked(run.experiment):
        role = run.roles[name]
        count = max(role.members, role.config.num_labels) if role.members else len(answer)
        models[name] = [0.0 if role.members and count == 1 else [0.0] * count]
    return Said([0], [text], [answer], [np.zeros(len(answer), np.float32)], 1, models)


def told(functions: Functions, numbers: np.ndarray) -> str:
    """The numbers [K] of a completion with their names, as text."""
    labels = [f"{name} " for name in functions.names] or [""]
    return ", ".join(f"{label}{x:g}" for label, x in zip(labels, numbers, strict=True))


def named(names: Sequence[str], scores: np.ndarray) -> dict[str, float | None]:
    """The numbers [K] of a completion by name, for a JSON file; None for one that is not finite."""
    return {name: x if np.isfinite(x) else None for name, x in zip(names, scores.tolist(), strict=True)}


def rewarded(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mask of completions that have a reward, or at least one of several numbers: [B, N] bool."""
    return np.asarray(np.isfinite(batch["rewards"][..., None] if "rewards" in batch else batch["scores"]).any(axis=-1))


def bad_rewards(batch: Mapping[str, np.ndarray]) -> float:
    """The number of completions without a reward; without weights, of completions that lack any of the several numbers."""
    return float(np.isnan(batch["rewards"][..., None] if "rewards" in batch else batch["scores"]).any(axis=-1).sum())


def behind_file(problem: str) -> str:
    """The text of a problem as it follows the name of a file: ", line 3: .." or ": .."."""
    return (", " if problem.startswith("line ") else ": ") + problem


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """The mask of groups that have two known rewards that differ: [B, N] -> [B] bool."""
    known = np.isfinite(rewards)
    return np.where(known, rewards, -np.inf).max(axis=1) > np.where(known, rewards, np.inf).min(axis=1)


def known_mean(x: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if no value is finite."""
    return float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")
