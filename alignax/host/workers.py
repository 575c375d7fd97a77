"""Processes for reward functions: a function may hang, block the interpreter or crash, and the run goes on.

A worker is a fresh Python process. It loads the experiment file as it was when the run began, and gets the run's config. Changes that
other code made to the experiment's module are not there. Workers start at the first call, serve all later calls, and end with the run,
however the run ends.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from alignax.config import changed_files, module_files
from alignax.host.calls import Answer, Call, share, too_late
from alignax.text import one_line, short

START = 120.0  # seconds that a worker may take to load the experiment file; rollout.timeout if that is longer
POLL = 0.2  # seconds between two checks whether the run should stop
GRACE = 1.0  # seconds that a timed-out call has to raise its exception before its process is killed
BAD = 10  # completions that may time out, or end the process, before the rest of a call is given up
PRINTED = 2000  # last bytes of a function's output in a call that are shown

# A worker ends with the run, even after kill -9: the pipe `leash` then closes, and the kernel sends SIGIO to the worker's process group.
CODE = """
import fcntl, os, sys
fcntl.fcntl({leash}, fcntl.F_SETOWN, -os.getpgrp())
fcntl.fcntl({leash}, fcntl.F_SETFL, os.O_ASYNC)
sys.path[:] = {path!r}
from alignax.host.calls import serve
serve({connection})
"""


class Lost(Exception):
    """Raised when a worker gives no answer in time, or has ended."""


class Abandoned(Exception):
    """Raised when a signal ends the wait for a worker."""

    def __init__(self, number: int):
        """`number` is the number of the signal."""
        super().__init__(number)
        self.number = number


class Workers:
    """The processes that call an experiment's reward functions."""

    def __init__(self, file: Path, config: Any, count: int, timeout: float):
        """Prepares the workers; no process starts yet.

        Args:
          file: the experiment file.
          config: the config of the run.
          count: number of processes.
          timeout: seconds that a worker may take to load the experiment file, if that is more than `START`.

        Raises:
          ValueError: for a config that cannot be sent to another process.
        """
        try:
            self.setup = pickle.dumps((file, file.read_bytes(), config))
        except Exception as e:
            raise ValueError(f"the config of {file} cannot be sent to the process of its reward function ({one_line(e)})") from e
        self.file, self.modules = file, module_files(file)
        self.count, self.patience = count, max(START, timeout)
        self.say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self.stop: Callable[[], int] = never
        self.workers: list[Worker] = []
        self.told: set[str] = set()

    def tell(self, name: str, what: str) -> None:
        """Prints a notice about the function `name`, once for each function."""
        if name not in self.told:
            self.say(f"notice: {what}")
        self.told.add(name)

    def start(self) -> None:
        """Starts the missing processes, without waiting for them."""
        self.workers += [self.begin() for _ in range(self.count - len(self.workers))]

    def begin(self) -> "Worker":
        """A new process; a notice names the user's modules that have changed since the run began."""
        if changed := changed_files(self.modules):
            self.tell(
                ", ".join(changed),
                f"the code of {', '.join(changed)}, which {self.file.name} imports, has changed since the run began, and a process of its "
                "functions that begins now has the code of now",
            )
        return Worker(self.setup, self.patience, self.look)

    def look(self) -> None:
        """Raises `Abandoned` if `stop` returns the number of a signal."""
        if number := self.stop():
            raise Abandoned(number)

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        workers, self.workers = self.workers, []  # cleared first: a thread that lost its process must not start another one in its place
        for worker in workers:
            worker.end()

    def __call__(self, call: Call, group: int, strict: bool) -> Answer:
        """Asks the function for every completion; a failure takes the reward of that completion only.

        The groups are divided among the workers.

        Args:
          call: the call for all completions, group after group.
          group: completions in a group; a group stays in one worker.
          strict: whether to stop at the first failure.

        Raises:
          Abandoned: if `stop` returns a signal while an answer is awaited.
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
                        self.close()  # ends the processes that the threads wait for
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
        """The answer of worker `i` to its share: one call for all completions, and if that fails, a call for each."""
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
            self.say(
                f"{call.title}(): called with all completions together: {answer.problem}; called with each completion alone, the "
                "function gives every reward. The function was therefore called twice"
            )
        return alone

    def one_by_one(self, i: int, call: Call, strict: bool) -> Answer:
        """The answers of worker `i` to a call for each completion; in all they may take the time of `BAD` timeouts.

        Calls of an async function run concurrently. If the process is lost, they run one after another to find the completion at fault.
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
            self.workers[i].end()  # it still runs the function
        return Answer(rewards, problem, at)

    def ask(self, i: int, call: Call) -> Answer:
        """The first answer of worker `i` to a call; an ended worker is replaced."""
        if self.workers[i].ended:
            self.workers[i] = self.begin()
        return self.workers[i].ask(call)


def never() -> int:
    """The default of `Workers.stop`: no signal came."""
    return 0


class Worker:
    """The run's side of one worker process."""

    def __init__(self, setup: bytes, start: float, look: Callable[[], None]):
        """Starts the process, without waiting until it has loaded the experiment; it has `start` seconds for that.

        During a call, `look` is called every `POLL` seconds, whatever the process prints or answers; an exception of `look` ends the call.
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
            pass  # the process ended at once; the first call reports it

    @property
    def ended(self) -> bool:
        """Whether the process was ended."""
        return not self._end.alive

    def end(self) -> None:
        """Ends the process and all processes that it started."""
        self._end()

    def ask(self, call: Call) -> Answer:
        """The first answer to a call.

        Raises:
          Lost: if the process cannot load the file, has ended, or gives no answer in time; see `receive`.
        """
        if not self.ready:
            self.unable = True
            late = f"the file was not loaded within {self.start:g} s"
            problem = self.receive(max(self.begun + self.start - time.monotonic(), 1.0), late)
            self.printed, self.cut = b"", False  # the run printed the same when it loaded the file itself
            if problem:
                self.end()
                raise Lost(f"it runs in a separate process, which cannot load the file: {problem}")
            self.ready, self.unable = True, False
        self.looked = time.monotonic()  # so that a call shorter than POLL is never abandoned
        self.send(call)
        return self.receive(call.limit + GRACE, too_late(call.limit, call.start >= 0))

    def send(self, call: Call) -> None:
        """Sends a call, which takes time if it is large and the process does something else; raises as `receive` does."""
        end = time.monotonic() + call.limit + GRACE
        try:
            with ThreadPoolExecutor(1) as thread:
                sending = thread.submit(self.connection.send, call)
                try:
                    while wait_for([sending], POLL).not_done:
                        self.look()
                        if time.monotonic() >= end:
                            raise Lost(too_late(call.limit, call.start >= 0))
                except BaseException:
                    with socket.socket(fileno=os.dup(self.connection.fileno())) as own:
                        own.shutdown(socket.SHUT_RDWR)  # ends the thread
                    raise
        except BaseException:
            self.end()
            raise
        try:
            sending.result()
        except OSError:
            raise Lost(self.last_words()) from None

    def receive(self, seconds: float, late: str) -> Any:
        """The next answer of the process.

        Raises:
          Lost: if the process has ended, or gives no answer within `seconds`; then it is killed, and `late` is the message.
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
        """Reads output of the process; returns False at its end."""
        new = os.read(self.output, 1 << 16)
        self.cut |= len(self.printed) + len(new) > PRINTED
        self.printed = (self.printed + new)[-PRINTED:]
        return bool(new)

    def drain(self) -> None:
        """Reads all output that the process printed before now."""
        end = time.monotonic() + GRACE  # a thread may print without end
        while wait([self.output], 0.0) and self.read() and time.monotonic() < end:
            pass

    def said(self) -> list[str]:
        """The lines that the process printed since the last call of this method."""
        lines = self.printed.decode(errors="replace").splitlines()
        lines = [f"(earlier output is not shown) {line}" if i == 0 and self.cut else line for i, line in enumerate(lines)]
        self.printed, self.cut = b"", False
        return lines

    def last_words(self) -> str:
        """The message on how the process ended, with its last printed line; ends what is left of it."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self.drain()
        self.end()
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        lines = self.said()
        return f"its process {how}" + (f" ({short(lines[-1])})" if lines else "")


def end(process: subprocess.Popen, connection: Connection, leash: int) -> None:
    """Kills a process and its children, and closes its pipes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    connection.close()
    os.close(leash)
