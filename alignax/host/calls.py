"""Reward functions in the process that runs them: calls come through a pipe, rewards and what went wrong go back."""

import asyncio
import inspect
import math
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from alignax.config import load_module
from alignax.host.functions import is_async
from alignax.text import one_line, short

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
    part: int | None = None  # which function of a list
    names: tuple[str, ...] = ()  # of the numbers that it gives a completion; (): one without a name
    gathered: bool = False  # whether calls for each completion are awaited at once

    @property
    def title(self) -> str:
        """What the function is called."""
        return self.name if self.part is None else self.defined

    @property
    def nothing(self) -> Any:
        """The numbers of a completion without any."""
        return (math.nan,) * len(self.names) if self.names else math.nan


class Answer(NamedTuple):
    """Rewards, NaN where there is none, and what went wrong first; of metrics each is numbers by name."""

    rewards: list[Any]  # of each completion a number, or where they have names a tuple of them
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
        function = found(module, call)
        if call.start < 0:
            connection.send(answered(function, call, config, file))
        elif call.gathered and is_async(function):
            finished(gathered(function, call, config, file, connection.send))
        else:
            for i in range(call.start, call.count):
                connection.send(answered(function, share(call, i, i + 1), config, file))


def found(module: Any, call: Call) -> Any:
    """The function of a module that a call is for; None, where there is none."""
    hook = getattr(module, call.name, None)
    if call.part is None:
        return hook
    return hook[call.part] if isinstance(hook, Sequence) and call.part < len(hook) else None


def answered(function: Any, call: Call, config: Any, file: Path) -> Answer:
    """What a function says of completions, or how it fails."""
    if function is None or qualified(function) != call.defined:
        there = "none" if function is None else qualified(function)
        return Answer(
            [], f"the run's is {call.defined}, and the file loaded anew has {there}; let the file choose by the config", final=True
        )
    with no_child():
        try:
            ask = lambda: read(finished(asked(function, call, config)), call, call.count)
            return within(call.limit, ask, alone=call.start >= 0)
        except BaseException as e:  # sys.exit(), too, is no answer
            return failed(e, call, file)


async def gathered(function: Any, call: Call, config: Any, file: Path, send: Callable[[Answer], None]) -> None:
    """Sends what an async function says of each completion from `call.start` on, in their order; it is asked for all of them at once.

    One that holds the interpreter, and with it all others, or that ends the process is none that this can tell apart.
    """

    async def one(i: int) -> Answer:
        part, clock = share(call, i, i + 1), asyncio.timeout(min(call.limit, LONGEST))
        with no_child():
            try:
                async with clock:
                    return read(await asked(function, part, config), call, 1)
            except asyncio.CancelledError:  # another has ended the loop, sys.exit() say
                raise
            except BaseException as e:
                return failed(TimeoutError(too_late(call.limit, True)) if clock.expired() else e, part, file)

    for task in [asyncio.ensure_future(one(i)) for i in range(call.start, call.count)]:
        send(await task)


def asked(function: Any, call: Call, config: Any) -> Any:
    """What a function returns, which of an async one is a coroutine."""
    given = dict(call.given) | ({"config": config} if call.config else {})
    first = [given.pop(name) for name in ("prompts", "completions")] if call.positional else []
    return function(*first, **given)


def failed(error: BaseException, call: Call, file: Path) -> Answer:
    """How a call has failed."""
    alone = [call.nothing] if call.start >= 0 else []
    return Answer(alone, told(error, file), final=isinstance(error, Malformed), spoilt=isinstance(error, HalfImported))


@contextmanager
def no_child() -> Iterator[None]:
    """Ends a child that the function has forked and that has come back: its answer would be taken for another call's."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(0)


@cache
def loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process: one for all calls, as a client that the experiment has opened goes on in no other."""
    return asyncio.new_event_loop()


def finished(given: Any) -> Any:
    """What a function has returned; a coroutine is awaited, and what it has begun and not awaited is ended."""
    if not inspect.isawaitable(given):
        return given

    async def whole() -> Any:
        return await given

    try:
        return loop().run_until_complete(whole())
    finally:
        left = asyncio.all_tasks(loop())
        for task in left:
            task.cancel()
        if left:
            loop().run_until_complete(asyncio.gather(*left, return_exceptions=True))


def numbers(given: Any, count: int, names: Sequence[str] = ()) -> Answer:
    """What a reward function returned as numbers; None is no reward.

    Args:
      given: a number for each completion; with names a tuple of numbers or a mapping for each, or a mapping of lists of numbers.
      count: completions.
      names: of the numbers of a completion.

    Raises:
      Malformed: for anything else than so many.
    """
    if names and isinstance(given, Mapping):
        return of_columns(given, count, names)
    if isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable) or getattr(given, "shape", None) == ():
        many = f"; several numbers of it are named by rollout.reward_names={(*given,)}" if isinstance(given, Mapping) else ""
        raise Malformed(f"it gives a {type(given).__name__}; it must return a list with a number for each completion{many}")
    found = list(islice(given, count + 1))  # it may be endless
    if len(found) != count:
        size = str(len(given)) if isinstance(given, Sized) else f"{len(found)} or more" if len(found) > count else str(len(found))
        raise Malformed(f"it gives {size} rewards for {count} completions")
    rewards, problem, at = [], "", -1
    for i, x in enumerate(found):
        reward, wrong = of_row(x, names) if names else number(x)
        rewards.append(reward)
        problem, at = (problem, at) if problem or not wrong else (wrong, i)
    return Answer(rewards, problem, at)


def of_columns(given: Mapping[str, Any], count: int, names: Sequence[str]) -> Answer:
    """Several numbers of each completion, given as a list of each name's."""
    if {*given} != {*names}:
        raise Malformed(f"it gives {', '.join(map(repr, given)) or 'nothing'}, and rollout.reward_names are {', '.join(map(repr, names))}")
    columns = []
    for name in names:
        try:
            columns.append(numbers(given[name], count))
        except Malformed as e:
            raise Malformed(f"{e}, as {name!r}") from None
    first = next((column for column in columns if column.problem), columns[0])
    return first._replace(rewards=list(zip(*(column.rewards for column in columns), strict=True)))


def of_row(given: Any, names: Sequence[str]) -> tuple[tuple[float, ...], str]:
    """The numbers of a completion, given as a mapping or in the order of their names, and what is wrong with one of them."""
    if isinstance(given, Mapping) and (unknown := [name for name in given if name not in names]):
        raise Malformed(f"it gives a completion {unknown[0]!r}, and rollout.reward_names are {', '.join(map(repr, names))}")
    row = [None] * len(names) if given is None else [given.get(name) for name in names] if isinstance(given, Mapping) else given
    found = [] if isinstance(row, (str, bytes, Set)) or not isinstance(row, Iterable) or getattr(row, "shape", None) == () else [*row]
    if len(found) != len(names):
        raise Malformed(f"it gives {short(repr(given))} for a completion, and rollout.reward_names are {', '.join(map(repr, names))}")
    each = [number(x) for x in found]
    return tuple(x for x, _ in each), next((wrong for _, wrong in each if wrong), "")


def number(given: Any) -> tuple[float, str]:
    """A number, NaN for None and for what is none, and what is wrong with it."""
    if isinstance(given, (Mapping, tuple, list)):
        raise Malformed(f"it gives {short(repr(given))} for a completion; several numbers of it are named in rollout.reward_names")
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError
        return math.nan if given is None else float(given.item() if hasattr(given, "item") else given), ""  # arrays [1], too
    except (TypeError, ValueError, OverflowError):
        return math.nan, f"it gives {short(repr(given))}, which is no number"


def read(given: Any, call: Call, count: int) -> Answer:
    """What a function returned for so many completions, as numbers of each."""
    return named_numbers(given, count) if call.name == METRICS else numbers(given, count, call.names)


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
    name, place = "TypeError" if isinstance(error, Malformed) else type(error).__name__, f"line {lines[-1]}: " if lines else ""
    # `completions[0][0]["content"]`, as TRL has them of conversations
    text = isinstance(error, (TypeError, IndexError)) and str(error).startswith("string ind")
    return f"{place}{name}: {one_line(error, 500)}" + ("; completions are texts, also of conversations" if text else "")
