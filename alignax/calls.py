"""Reward functions in the process that runs them: calls come through a pipe, rewards and what went wrong go back."""

import inspect
import math
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from alignax.config import load_module
from alignax.data.files import one_line, short

METRICS = "metrics"  # the function that gives numbers by name
LONGEST = 1e9  # seconds of a timer, which takes no 1e15; a config may


class Call(NamedTuple):
    """What a worker is asked: a function of the experiment, of so many completions."""

    name: str  # "reward", "gold" or "metrics"
    defined: str  # its qualified name
    positional: bool  # whether prompts and completions go by position
    given: dict[str, list[Any]]  # argument -> a value for each completion
    config: bool  # whether the config is an argument, too
    count: int
    limit: float  # seconds
    start: int = -1  # the whole in one call; from 0 on: a call for each completion from this one on


class Answer(NamedTuple):
    """Rewards, NaN where there is none, and what went wrong first; of metrics each is numbers by name."""

    rewards: list[Any]
    problem: str = ""
    at: int = -1  # which completion it went wrong with; -1: all together
    final: bool = False  # whether it is no use to ask for each completion alone
    spoilt: bool = False  # whether the process is none that can be asked again


class HalfImported(TimeoutError):
    """Time that was up in the middle of an import, after which Python takes a half-made module for the whole."""


class Malformed(TypeError):
    """What a reward function must not return, whatever the completion."""


def share(call: Call, first: int, last: int) -> Call:
    """The part of a call from completion `first` up to `last`."""
    return call._replace(given={name: x[first:last] for name, x in call.given.items()}, count=last - first)


def serve(descriptor: int) -> None:
    """Answers calls until the run closes the connection."""
    connection = Connection(descriptor)
    file, source, config = pickle.loads(connection.recv_bytes())
    try:
        module = load_module(file, source)
    except BaseException as e:
        connection.send(told(e, file))
        return
    connection.send("")
    while True:
        try:
            call: Call = connection.recv()
        except EOFError:
            return
        function = getattr(module, call.name, None)
        if call.start < 0:
            connection.send(answered(function, call, config, file))
        for i in range(call.start, call.count) if call.start >= 0 else ():
            connection.send(answered(function, share(call, i, i + 1), config, file))


def answered(function: Any, call: Call, config: Any, file: Path) -> Answer:
    """What a function says of completions, or how it fails."""
    if function is None or qualified(function) != call.defined:
        there = "none" if function is None else qualified(function)
        return Answer(
            [], f"the run's is {call.defined}, and the file loaded anew has {there}; let the file choose by the config", final=True
        )
    own = os.getpid()
    given = dict(call.given) | ({"config": config} if call.config else {})
    first = [given.pop(name) for name in ("prompts", "completions")] if call.positional else []
    read = named_numbers if call.name == METRICS else numbers
    try:
        return within(call.limit, lambda: read(function(*first, **given), call.count), alone=call.start >= 0)
    except BaseException as e:  # sys.exit(), too, is no answer
        alone = [math.nan] if call.start >= 0 else []
        return Answer(alone, told(e, file), final=isinstance(e, Malformed), spoilt=isinstance(e, HalfImported))
    finally:
        if os.getpid() != own:  # a child that the function has forked and that has come back: its answer would be taken for another call's
            os._exit(0)


def numbers(given: Any, count: int) -> Answer:
    """What a reward function returned as numbers; None is no reward.

    Raises:
      Malformed: for anything else than so many.
    """
    if inspect.iscoroutine(given):
        given.close()
        raise Malformed("it gives a coroutine; let a plain function run it, asyncio.run(..) say")
    if isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable) or getattr(given, "shape", None) == ():
        raise Malformed(f"it gives a {type(given).__name__}; it must return a list with a number for each completion")
    found = list(islice(given, count + 1))  # it may be endless
    if len(found) != count:
        size = str(len(given)) if isinstance(given, Sized) else f"{len(found)} or more" if len(found) > count else str(len(found))
        raise Malformed(f"it gives {size} rewards for {count} completions")
    rewards, problem, at = [], "", -1
    for i, x in enumerate(found):
        try:
            if isinstance(x, (str, bytes)):
                raise TypeError
            rewards.append(math.nan if x is None else float(x.item() if hasattr(x, "item") else x))  # arrays [1], too
        except (TypeError, ValueError, OverflowError):
            rewards.append(math.nan)
            problem, at = (problem, at) if problem else (f"it gives {short(repr(x))}, which is no number", i)
    return Answer(rewards, problem, at)


def named_numbers(given: Any, count: int) -> Answer:
    """What a function of metrics returned, {name: numbers}, as numbers by name of each completion.

    Raises:
      Malformed: for anything else than so many of each name.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
        raise Malformed(f"it gives a {type(given).__name__}; it must return numbers by name, {{'words': [3, 5]}} say, one a completion")
    found: dict[str, Answer] = {}
    for name, column in given.items():
        try:
            found[name] = numbers(column, count)
        except Malformed as e:
            raise Malformed(f"of {name!r} {str(e).replace(' rewards for ', ' numbers for ')}") from None
    rows = [{name: answer.rewards[i] for name, answer in found.items()} for i in range(count)]
    wrong = next((answer for answer in found.values() if answer.problem), Answer([]))
    return wrong._replace(rewards=rows)


def within(seconds: float, function: Callable[[], Any], alone: bool = False) -> Any:
    """What a function returns, if it does within so many seconds; in the main thread, of which there is one.

    A regular expression, a loop or a wait are left where they stand. What does not look at signals is left when it returns, so a worker
    that does not answer is ended.

    Raises:
      TimeoutError: otherwise, also where the function caught it.
    """
    late: list[TimeoutError] = []

    def leave(_: int, frame: FrameType | None) -> None:
        late.append(TimeoutError(too_late(seconds, alone)))
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                late[0] = HalfImported(f"{late[0]}, in the middle of an import; do it at the top of the file")
                break
            frame = frame.f_back
        raise late[0]

    old = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST))
    try:
        result = function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    if late:
        raise late[0]
    return result


def too_late(seconds: float, alone: bool) -> str:
    """What is said of a call that was not over in its time."""
    return f"no answer within {seconds:g} s{' for one completion alone' if alone else ''} (rollout.timeout)"


def qualified(function: Any) -> str:
    """The name of a function, or of the class of an object that is called like one."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def told(error: BaseException, file: Path) -> str:
    """An error in one line, with the line of the experiment's file that it comes from."""
    if isinstance(error, TimeoutError):
        return one_line(error, 500)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return (
        f"line {lines[-1]}: " if lines else ""
    ) + f"{'TypeError' if isinstance(error, Malformed) else type(error).__name__}: {one_line(error, 500)}"
