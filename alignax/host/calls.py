"""The worker's side of reward functions: calls arrive through a pipe, rewards and errors go back."""

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

METRICS = "metrics"  # name of the function that gives numbers by name
NAMES, LETTERS = 1000, 100  # the most names that a metrics function may give, and characters of a name: every step logs them
LONGEST = 1e9  # seconds; longest timer: setitimer refuses 1e15, which a config may hold


class Call(NamedTuple):
    """A request to a worker: call one function of the experiment with `count` completions."""

    name: str  # "reward", "gold" or "metrics"
    defined: str  # qualified name of the function in the run's process
    positional: bool  # whether prompts and completions are passed by position
    given: dict[str, list[Any]]  # argument -> a value for each completion
    config: bool  # whether the function also takes the config
    count: int  # completions
    limit: float  # seconds that a call may take
    start: int = -1  # -1: one call for all completions; 0 or more: one call for each completion, beginning with this index
    part: int | None = None  # index of the function, where the experiment has a list of them
    names: tuple[str, ...] = ()  # of the numbers of a completion; (): a single number
    gathered: bool = False  # whether the calls for single completions run concurrently (async functions)

    @property
    def title(self) -> str:
        """The name of the function in messages."""
        return self.name if self.part is None else self.defined

    @property
    def nothing(self) -> Any:
        """The value of a completion that has no reward: NaN, or a tuple of NaN."""
        return (math.nan,) * len(self.names) if self.names else math.nan


class Answer(NamedTuple):
    """The result of a call: rewards (NaN: no reward; for metrics, numbers by name) and the first problem."""

    rewards: list[Any]  # a number for each completion, or a tuple if the numbers have names
    problem: str = ""
    at: int = -1  # index of the completion with the problem; -1: the call as a whole
    final: bool = False  # whether calls for single completions would fail as well
    spoilt: bool = False  # whether the process must not be used again


class HalfImported(TimeoutError):
    """Raised for a timeout in the middle of an import, after which Python would use the half-imported module."""


class Malformed(TypeError):
    """Raised for a return value of a wrong form, whatever the completions."""


def share(call: Call, first: int, last: int) -> Call:
    """The part of a call for the completions from `first` up to, not including, `last`."""
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
    """The function of a module that a call names; None if it is missing."""
    hook = getattr(module, call.name, None)
    if call.part is None:
        return hook
    return hook[call.part] if isinstance(hook, Sequence) and call.part < len(hook) else None


def answered(function: Any, call: Call, config: Any, file: Path) -> Answer:
    """The answer of a function to a call, or of its failure."""
    if function is None or qualified(function) != call.defined:
        there = "none" if function is None else qualified(function)
        return Answer(
            [],
            f"the run has {call.defined}, but the file has {there} when it is loaded again; let the file choose the function by the "
            "config only",
            final=True,
        )
    with no_child():
        try:
            ask = lambda: read(finished(asked(function, call, config)), call, call.count)
            return within(call.limit, ask, alone=call.start >= 0)
        except BaseException as e:  # sys.exit(), too, is no answer
            return failed(e, call, file)


async def gathered(function: Any, call: Call, config: Any, file: Path, send: Callable[[Answer], None]) -> None:
    """Calls an async function for all completions from `call.start` on concurrently, and sends the answers in their order.

    It cannot tell which completion made the function block the interpreter, and with it all the others, or end the process.
    """

    async def one(i: int) -> Answer:
        part, clock = share(call, i, i + 1), asyncio.timeout(min(call.limit, LONGEST))
        with no_child():
            try:
                async with clock:
                    return read(await asked(function, part, config), call, 1)
            except asyncio.CancelledError:  # another task ended the loop, with sys.exit() for example
                raise
            except BaseException as e:
                return failed(TimeoutError(too_late(call.limit, True)) if clock.expired() else e, part, file)

    for task in [asyncio.ensure_future(one(i)) for i in range(call.start, call.count)]:
        send(await task)


def asked(function: Any, call: Call, config: Any) -> Any:
    """The return value of a function for a call; a coroutine if the function is async."""
    given = dict(call.given) | ({"config": config} if call.config else {})
    first = [given.pop(name) for name in ("prompts", "completions")] if call.positional else []
    return function(*first, **given)


def failed(error: BaseException, call: Call, file: Path) -> Answer:
    """The answer for a call that raised `error`."""
    alone = [call.nothing] if call.start >= 0 else []
    return Answer(alone, told(error, file), final=isinstance(error, Malformed), spoilt=isinstance(error, HalfImported))


@contextmanager
def no_child() -> Iterator[None]:
    """Ends a forked child that returns from the function: its answer would be taken for that of another call."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(0)


@cache
def loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, one for all calls: clients that the experiment opened are bound to their loop."""
    return asyncio.new_event_loop()


def finished(given: Any) -> Any:
    """The return value of a function, awaited if it is a coroutine; tasks that the coroutine left running are cancelled."""
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
    """The return value of a reward function as an answer; None stands for no reward.

    Args:
      given: a number for each completion; with `names`, a tuple of numbers or a mapping for each, or a mapping of lists of numbers.
      count: completions.
      names: names of the numbers of a completion; empty for a single number.

    Raises:
      Malformed: for a value of another form, or another number of rewards.
    """
    if names and isinstance(given, Mapping):
        return of_columns(given, count, names)
    if isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable) or getattr(given, "shape", None) == ():
        many = (
            f"; to return several numbers for each completion, set rollout.reward_names={(*given,)}" if isinstance(given, Mapping) else ""
        )
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
    """The answer from a mapping of each name to a list of numbers, one for each completion."""
    if {*given} != {*names}:
        raise Malformed(f"it gives {', '.join(map(repr, given)) or 'nothing'}, and rollout.reward_names are {', '.join(map(repr, names))}")
    columns = []
    for name in names:
        try:
            columns.append(numbers(given[name], count))
        except Malformed as e:
            raise Malformed(f"{e}, for the name {name!r}") from None
    first = next((column for column in columns if column.problem), columns[0])
    return first._replace(rewards=list(zip(*(column.rewards for column in columns), strict=True)))


def of_row(given: Any, names: Sequence[str]) -> tuple[tuple[float, ...], str]:
    """The numbers of one completion, given as a mapping or in the order of `names`, and the first problem; empty if there is none."""
    if isinstance(given, Mapping) and (unknown := [name for name in given if name not in names]):
        raise Malformed(f"it gives a completion the number {unknown[0]!r}, but rollout.reward_names are {', '.join(map(repr, names))}")
    row = [None] * len(names) if given is None else [given.get(name) for name in names] if isinstance(given, Mapping) else given
    found = [] if isinstance(row, (str, bytes, Set)) or not isinstance(row, Iterable) or getattr(row, "shape", None) == () else [*row]
    if len(found) != len(names):
        raise Malformed(f"it gives {short(short(given))} for a completion, and rollout.reward_names are {', '.join(map(repr, names))}")
    each = [number(x) for x in found]
    return tuple(x for x, _ in each), next((wrong for _, wrong in each if wrong), "")


def number(given: Any) -> tuple[float, str]:
    """A reward as a float (NaN for None and for values that are no number), and the problem; empty if there is none."""
    if isinstance(given, (Mapping, tuple, list)):
        raise Malformed(
            f"it gives {short(short(given))} for a completion; to return several numbers for each completion, name them in "
            "rollout.reward_names"
        )
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError
        return math.nan if given is None else float(given.item() if hasattr(given, "item") else given), ""  # item() also takes arrays [1]
    except (TypeError, ValueError, OverflowError):
        return math.nan, f"it gives {short(short(given))}, which is not a number"


def read(given: Any, call: Call, count: int) -> Answer:
    """The return value of the function of a call, for `count` completions, as an answer."""
    return named_numbers(given, count) if call.name == METRICS else numbers(given, count, call.names)


def named_numbers(given: Any, count: int) -> Answer:
    """The return value of a metrics function, {name: numbers}, as an answer with numbers by name for each completion.

    Raises:
      Malformed: for a value of another form, or another count of numbers under a name.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
        raise Malformed(
            f"it gives a {type(given).__name__}; it must return lists by name, with one number for each completion, for example "
            "{'words': [3, 5]}"
        )
    if len(given) > NAMES or (odd := [name for name in given if len(name) > LETTERS or not name.isprintable()]):
        what = f"it gives {len(given):,} names" if len(given) > NAMES else f"it gives the name {short(odd[0])}"
        raise Malformed(f"{what}; it must give at most {NAMES:,} names of at most {LETTERS} printable characters")
    found: dict[str, Answer] = {}
    for name, column in given.items():
        try:
            found[name] = numbers(column, count)
        except Malformed as e:
            raise Malformed(f"for the name {name!r} {str(e).replace(' rewards for ', ' numbers for ')}") from None
    rows = [{name: answer.rewards[i] for name, answer in found.items()} for i in range(count)]
    wrong = next((answer for answer in found.values() if answer.problem), Answer([]))
    return wrong._replace(rewards=rows)


def within(seconds: float, function: Callable[[], Any], alone: bool = False) -> Any:
    """Calls `function` with a time limit and returns its result; for the main thread, where Python handles signals.

    The timeout interrupts loops, waits and regular expressions. C code that ignores signals is interrupted only when it returns, so the
    run ends a worker that does not answer.

    Raises:
      TimeoutError: if the time was up, even if the function caught the exception.
    """
    late: list[TimeoutError] = []

    def leave(_: int, frame: FrameType | None) -> None:
        late.append(TimeoutError(too_late(seconds, alone)))
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                late[0] = HalfImported(f"{late[0]}, in the middle of an import; import the module at the top of the file")
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
    """The message for a call that took too long; `alone`: it was for a single completion."""
    return f"no answer within {seconds:g} s{' for one completion alone' if alone else ''} (rollout.timeout)"


def qualified(function: Any) -> str:
    """The qualified name of a function, or of the class of a callable object."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def told(error: BaseException, file: Path) -> str:
    """The message of an error in one line, with the line number in the experiment file where it arose."""
    if isinstance(error, TimeoutError):
        return one_line(error, 500)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    name, place = "TypeError" if isinstance(error, Malformed) else type(error).__name__[:80], f"line {lines[-1]}: " if lines else ""
    # Functions written for TRL index messages: `completions[0][0]["content"]`.
    what = one_line(error, 500)
    text = isinstance(error, (TypeError, IndexError)) and what.startswith("string ind")
    return f"{place}{name}: {what}" + ("; completions are texts, even if prompts are conversations" if text else "")
