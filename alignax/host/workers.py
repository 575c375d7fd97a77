"""Reward functions in processes of their own: a function may hang, hold the interpreter or die, and the run goes on.

A worker is a fresh Python process that loads the experiment's file anew, as it was when the run began, with the run's config. What other
code has changed in that module is not there. Workers start at the first call, are used again, and end with the run, however it ends.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from alignax.host.calls import Answer, Call, share, too_late
from alignax.text import one_line, short

START = 120.0  # seconds that a worker may take to load the experiment's file, where rollout.timeout is shorter
POLL = 0.2  # seconds between two looks at whether the run is to stop
GRACE = 1.0  # seconds between the exception that ends a call and the end of its process
BAD = 10  # completions that may cost their whole time, or their process, before the rest of a call is given up
PRINTED = 2000  # bytes of what a function prints in a call that are shown: the last ones

# A worker goes with the run however that ends, kill -9 included: the kernel then sends SIGIO to the worker and to what it has started.
CODE = """
import fcntl, os, sys
fcntl.fcntl({leash}, fcntl.F_SETOWN, -os.getpgrp())
fcntl.fcntl({leash}, fcntl.F_SETFL, os.O_ASYNC)
sys.path[:] = {path!r}
from alignax.host.calls import serve
serve({connection})
"""


class Lost(Exception):
    """A worker that gave no answer in its time, or ended."""


class Abandoned(Exception):
    """A wait for a worker that a signal has ended."""

    def __init__(self, number: int):
        """`number`: of the signal."""
        super().__init__(number)
        self.number = number


class Workers:
    """The processes that call an experiment's reward functions."""

    def __init__(self, file: Path, config: Any, count: int, timeout: float):
        """Starts nothing yet.

        Args:
          file: the experiment.
          config: the run's.
          count: processes.
          timeout: seconds that a worker may take to load the experiment's file, where they are more than `START`.

        Raises:
          ValueError: for a config that cannot be sent to another process.
        """
        try:
            self.setup = pickle.dumps((file, file.read_bytes(), config))
        except Exception as e:
            raise ValueError(f"the config of {file} cannot be sent to the process of its reward function ({one_line(e)})") from e
        self.count, self.patience = count, max(START, timeout)
        self.say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self.stop: Callable[[], int] = never
        self.workers: list[Worker] = []
        self.told: set[str] = set()

    def tell(self, name: str, what: str) -> None:
        """Says what happens to the answers of a function, the first time."""
        if name not in self.told:
            self.say(f"notice: {what}")
        self.told.add(name)

    def start(self) -> None:
        """Starts the processes that are missing, without waiting for them."""
        self.workers += [Worker(self.setup, self.patience, self.look) for _ in range(self.count - len(self.workers))]

    def look(self) -> None:
        """Leaves what is waited for, once `stop` gives a signal's number."""
        if number := self.stop():
            raise Abandoned(number)

    def close(self) -> None:
        """Ends the processes; a later call starts others."""
        workers, self.workers = self.workers, []  # first, so that a thread that has lost its process finds no place for another
        for worker in workers:
            worker.end()

    def __call__(self, call: Call, group: int, strict: bool) -> Answer:
        """What the function gives for each completion; its own failure costs a completion its reward, and no other.

        Several workers have a share of the groups each.

        Args:
          call: of all completions, the groups one after another.
          group: completions of a group, which stay together.
          strict: whether to stop at the first failure.

        Raises:
          Abandoned: where `stop` says so while there is no answer.
        """
        self.start()
        groups = call.count // group
        parts = min(self.count, groups)
        bounds = [groups * i // parts * group for i in range(parts + 1)]
        ask = lambda i: self.judge(i, share(call, bounds[i], bounds[i + 1]), strict)
        try:
            if parts == 1:
                answers = [ask(0)]
            else:
                with ThreadPoolExecutor(parts) as threads:
                    try:
                        answers = list(threads.map(ask, range(parts)))
                    except BaseException:
                        self.close()  # ends what the threads wait for
                        raise
        except BaseException:
            self.close()
            raise
        for worker in self.workers:
            for line in worker.said():
                self.say(f"{call.title}(): {line}")
        first = next((i for i, answer in enumerate(answers) if answer.problem), 0)
        at = answers[first].at
        return answers[first]._replace(rewards=[x for a in answers for x in a.rewards], at=at if at < 0 else at + bounds[first])

    def judge(self, i: int, call: Call, strict: bool) -> Answer:
        """One worker's share: all in one call, and where that fails, one by one."""
        try:
            answer = self.ask(i, call)
        except Lost as e:
            answer = Answer([], str(e), final=self.workers[i].unable)
        if answer.spoilt:
            self.workers[i].end()
        if answer.rewards:
            return answer
        if answer.final or call.count == 1:
            return answer._replace(rewards=[call.nothing] * call.count, at=0 if call.count == 1 else -1)
        alone = self.one_by_one(i, call, strict)
        if not alone.problem:
            self.say(f"{call.title}(): all completions together: {answer.problem}; each alone has its reward. It was asked twice")
        return alone

    def one_by_one(self, i: int, call: Call, strict: bool) -> Answer:
        """A call for each completion; bounded in all by what `BAD` of them may take.

        Those of an async function are awaited at once; where the process is lost meanwhile, one after another, to see with which.
        """
        limit = max(call.limit / BAD, min(call.limit, 1.0))
        rewards, problem, at = [call.nothing] * call.count, "", -1
        here, lost, end = 0, 0, time.monotonic() + BAD * limit
        while here < call.count and not (strict and problem):
            try:
                found = self.ask(i, call._replace(start=here, limit=limit))
                while True:
                    if found.spoilt:
                        raise Lost(found.problem)
                    rewards[here] = found.rewards[0]
                    if found.problem and not problem:
                        problem, at = found.problem, here
                    here += 1
                    if here == call.count or (strict and problem):
                        break
                    if time.monotonic() > end:
                        raise Lost(f"no time is left for {call.count - here} of {call.count} completions (rollout.timeout)")
                    found = self.workers[i].receive(limit + GRACE, too_late(limit, True))
            except Lost as e:
                self.workers[i].end()
                if call.gathered:
                    call, end = call._replace(gathered=False), time.monotonic() + BAD * limit
                    continue
                problem, at = (problem, at) if problem else (str(e), here)
                here, lost = here + 1, lost + 1
                if lost == BAD or time.monotonic() > end:
                    break
        if here < call.count:
            self.workers[i].end()  # it is still at it
        return Answer(rewards, problem, at)

    def ask(self, i: int, call: Call) -> Answer:
        """The first answer of worker i, or of the one in its place."""
        if self.workers[i].ended:
            self.workers[i] = Worker(self.setup, self.patience, self.look)
        return self.workers[i].ask(call)


def never() -> int:
    """No signal."""
    return 0


class Worker:
    """A process that calls reward functions, seen from the run."""

    def __init__(self, setup: bytes, start: float, look: Callable[[], None]):
        """Starts it, and does not wait until it has loaded the experiment, for which it has `start` seconds.

        `look` is called every `POLL` seconds of a call, whatever it prints or answers meanwhile; an exception that it raises ends the call.
        """
        self.connection, theirs = Pipe()
        leash, own = os.pipe()
        code = CODE.format(leash=leash, path=sys.path, connection=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=(leash, theirs.fileno()), process_group=0, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        theirs.close()
        os.close(leash)
        self._end = weakref.finalize(self, end, self.process, self.connection, own)
        self.begun, self.start, self.look = time.monotonic(), start, look
        self.looked = self.begun
        self.ready = self.unable = False
        self.printed, self.cut = b"", False
        try:
            self.connection.send_bytes(setup)
        except OSError:
            pass  # it ended at once: so says the first call

    @property
    def ended(self) -> bool:
        """Whether the process was ended."""
        return not self._end.alive

    def end(self) -> None:
        """Ends the process and all that it has started."""
        self._end()

    def ask(self, call: Call) -> Answer:
        """The first answer to a call.

        Raises:
          Lost: see `receive`.
        """
        if not self.ready:
            self.unable = True
            late = f"the process that it is to run in has not loaded the file within {self.start:g} s"
            problem = self.receive(max(self.begun + self.start - time.monotonic(), 1.0), late)
            self.printed, self.cut = b"", False  # the run has seen it when it loaded the file itself
            if problem:
                self.end()
                raise Lost(f"it runs in a process of its own, which cannot load the file: {problem}")
            self.ready, self.unable = True, False
        self.looked = time.monotonic()  # a call that is over in less goes on
        try:
            self.connection.send(call)
        except OSError:
            raise Lost(self.last_words()) from None
        return self.receive(call.limit + GRACE, too_late(call.limit, call.start >= 0))

    def receive(self, seconds: float, late: str) -> Any:
        """The next answer.

        Raises:
          Lost: where there is none in so many seconds, with the words `late`; the process is ended.
        """
        end, sources = time.monotonic() + seconds, [self.connection, self.output]
        while True:
            ready = wait(sources, min(max(end - time.monotonic(), 0.0), POLL))
            if time.monotonic() >= self.looked + POLL:
                self.looked = time.monotonic()
                self.look()
            if self.output in ready and not self.read():
                sources.remove(self.output)
            if self.connection in ready:
                try:
                    answer = self.connection.recv()
                except (EOFError, OSError):
                    raise Lost(self.last_words()) from None
                self.drain()
                return answer
            if time.monotonic() >= end:
                self.end()
                raise Lost(late)

    def read(self) -> bool:
        """Takes up what was printed; False at its end."""
        new = os.read(self.output, 1 << 16)
        self.cut |= len(self.printed) + len(new) > PRINTED
        self.printed = (self.printed + new)[-PRINTED:]
        return bool(new)

    def drain(self) -> None:
        """Takes up what was printed before now."""
        end = time.monotonic() + GRACE  # a thread may print without end
        while wait([self.output], 0.0) and self.read() and time.monotonic() < end:
            pass

    def said(self) -> list[str]:
        """The lines that were printed since this was asked last."""
        lines = self.printed.decode(errors="replace").splitlines()
        lines = [f"(what was printed before is not shown) {line}" if i == 0 and self.cut else line for i, line in enumerate(lines)]
        self.printed, self.cut = b"", False
        return lines

    def last_words(self) -> str:
        """How the process ended."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self.drain()
        self.end()
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        lines = self.said()
        return f"the process that it ran in {how}" + (f" ({short(lines[-1])})" if lines else "")


def end(process: subprocess.Popen, connection: Connection, leash: int) -> None:
    """Ends a process and its children, and leaves nothing of it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    connection.close()
    os.close(leash)
