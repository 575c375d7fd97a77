"""The link of a run's processes: each learns within seconds that another has ended, and why, and all stop at the same moment.

jax notices a lost process after a minute or more, and ends the others by a stack trace in C++ that names no one. So process 0 listens on a
port, the others connect to it, and in each process a thread listens to the other end. A process that is killed closes its connection. One
that hangs, or whose machine is gone, is silent. The thread then ends its own process with one line, whatever the main thread waits for.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

TICK = 0.2  # seconds between two looks at signals and clocks
BEAT = 2.0  # seconds between two signs of life
GRACE = 3.0  # seconds that a process has to end with an error of its own, after another one has said why it ends
LEAVE = 2.0  # seconds that a process takes to end then
SHORT = 1000  # most characters of another process's error
GOES_ON = "start all processes again; a run goes on from its newest checkpoint"


class Peer:
    """The other end of a connection."""

    def __init__(self, index: int, connection: socket.socket, rest: bytes = b""):
        """Takes over the connection to process `index`; `rest` was read from it already."""
        self.index, self.connection, self.rest = index, connection, rest
        self.heard, self.over = time.monotonic(), False  # when it last gave a sign; whether it has said that it ends


class Link:
    """The connections of this process: of process 0 to all others, of the others to process 0."""

    def __init__(self, index: int, hosts: list[str], peers: list[Peer], lost: float, patience: float, end: Callable[[str, int], Any]):
        """Starts the thread that listens.

        Args:
          index: the number of this process.
          hosts: where each process runs, for messages.
          peers: the other ends.
          lost: seconds of silence after which a process counts as lost.
          patience: seconds that processes wait for one another in `gather`.
          end: ends the process with a line and an exit code.
        """
        self.index, self.hosts, self.lost, self.patience = index, hosts, lost, patience
        self._end, self._peers = end, {peer.index: peer for peer in peers}
        self._lock = threading.Condition()
        self._sent = threading.RLock()  # reentrant, since a signal may interrupt its holder
        self._calls, self._texts, self._since = 0, {}, {}  # of `gather`: calls, texts of each call by process, when its first text came
        self._gathered: dict[str, list[str]] = {}
        self._asked = self._told = 0  # a signal of this process, and the one that process 0 knows of
        self._count, self._frozen, self._counts = 0, False, {}  # calls of `reached`; whether they wait; of all processes
        self._point: tuple[int, int] | None = None  # the call of `reached` at which all stop, and the signal
        self._leaving = False  # whether this process ends, whatever it hears
        self._news: tuple[float, str, int] | None = None  # why this process has to end: not before which time, the line, the exit code
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        threading.Thread(target=self._watch, name="link", daemon=True).start()

    def gather(self, text: str, call: str = "") -> list[str]:
        """The texts of all processes, in their order; every process calls it, equally often.

        `call` names the call, for threads, whose calls may come in another order in each process.
        """
        with self._lock:
            if not call:
                self._calls += 1
                call = str(self._calls)
            if self.index:
                self._send({"gather": call, "text": text})
            else:
                self._add(call, 0, text)
            self._lock.wait_for(lambda: call in self._gathered)
            return self._gathered.pop(call)

    def ask(self, number: int) -> None:
        """Asks that all processes stop, because of a signal. It may be called where a signal is handled."""
        self._asked = number

    def reached(self) -> int:
        """The number of the signal after which all processes stop at this call; 0: go on. Every process calls it, equally often.

        The call is the first that no process has begun when the processes learn of the signal. Until the call is known, `reached` waits.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._frozen)
            self._count += 1
            return self._point[1] if self._point and self._count >= self._point[0] else 0

    def tell(self, line: str, code: int) -> None:
        """Tells the other processes why this one ends, so that they end too; process 0 waits until they have."""
        self._leaving = True
        self._all({"end": line[:SHORT], "code": code})
        end = time.monotonic() + GRACE + LEAVE
        while not self.index and self._peers and time.monotonic() < end:
            time.sleep(TICK / 4)

    def bye(self) -> None:
        """Tells the other processes that this one ends well."""
        self._all({"bye": 1})

    def settle(self) -> None:
        """Waits a moment whether another process was the cause of an error here; if it was, this process ends with its line."""
        end = time.monotonic() + GRACE
        while self._news or time.monotonic() < end:
            if self._news:
                self._news = 0.0, *self._news[1:]
            time.sleep(TICK / 4)

    def name(self, index: int) -> str:
        """A process in messages."""
        return f"process {index} on {self.hosts[index]}"

    def _watch(self) -> None:
        beaten = 0.0
        while self._peers or self._news:
            for key, _ in self._selector.select(TICK):
                self._read(key.data)
            now = time.monotonic()
            if now - beaten >= BEAT:
                self._all({})
                beaten = now
            if self._asked and not self._told:
                self._told = self._asked
                self._freeze(self._asked) if self.index == 0 else self._send({"stop": self._asked})
            for peer in list(self._peers.values()):
                if now - peer.heard > self.lost:
                    self._lose(f"{self.name(peer.index)} has given no sign of life for {self.lost:.0f} s: it hangs, or its machine is gone")
            self._look_for_missing(now)
            if self._news and now >= self._news[0] and not self._leaving:
                return self._finish(*self._news[1:])

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        peer.heard = time.monotonic()
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for line in lines:
            self._take(peer, json.loads(line))
        if not data:
            self._selector.unregister(peer.connection)
            del self._peers[peer.index]
            if not peer.over:
                self._lose(f"{self.name(peer.index)} was killed, or its machine is gone")

    def _take(self, peer: Peer, said: Mapping[str, Any]) -> None:
        """Acts on a message; an empty one is a sign of life."""
        if "end" in said or "lost" in said:
            peer.over = True
            line = said["lost"] if "lost" in said else f"{self.name(peer.index)} ended: {said['end']}"
            self._learn(line, said["code"], time.monotonic() + (0 if said.get("now") else GRACE))
        elif "bye" in said:
            peer.over = True
        elif "gather" in said:
            with self._lock:
                self._add(said["gather"], peer.index, said["text"])
        elif "gathered" in said:
            with self._lock:
                self._gathered[said["gathered"]] = said["texts"]
                self._lock.notify_all()
        elif "stop" in said:
            self._freeze(said["stop"])
        elif "freeze" in said:
            with self._lock:
                self._frozen = True
                self._send({"count": self._count})
        elif "count" in said:
            self._counted(peer.index, said["count"])
        elif "point" in said:
            self._thaw(said["point"], said["number"])

    def _add(self, call: str, index: int, text: str) -> None:
        """Takes a text for a call of `gather`, in process 0; when all are there, sends them to all."""
        texts = self._texts.setdefault(call, {})
        texts[index] = text
        self._since.setdefault(call, time.monotonic())
        if len(texts) == len(self.hosts):
            every = [texts[i] for i in range(len(self.hosts))]
            del self._texts[call], self._since[call]
            self._all({"gathered": call, "texts": every})
            self._gathered[call] = every
            self._lock.notify_all()

    def _freeze(self, number: int) -> None:
        """Makes the calls of `reached` wait everywhere, and asks how many there were; in process 0."""
        with self._lock:
            if self._frozen or self._point:
                return
            self._frozen, self._told = True, number
            self._counts = {0: self._count}
        self._all({"freeze": 1})

    def _counted(self, index: int, count: int) -> None:
        self._counts[index] = count
        if len(self._counts) == len(self.hosts):
            point = 1 + max(self._counts.values())
            self._all({"point": point, "number": self._told})
            self._thaw(point, self._told)

    def _thaw(self, point: int, number: int) -> None:
        with self._lock:
            self._point, self._frozen = (point, number), False
            self._lock.notify_all()

    def _look_for_missing(self, now: float) -> None:
        """Ends a wait in `gather` that takes too long; in process 0, which knows who is missing."""
        with self._lock:
            late = [call for call, since in self._since.items() if now - since > self.patience]
            if not late:
                return
            missing = [self.name(i) for i in range(len(self.hosts)) if i not in self._texts[late[0]]]
        are = "are" if len(missing) > 1 else "is"
        self._lose(
            f"{' and '.join(missing)} {are} alive, but {are} not where the others have waited for {self.patience:.0f} s "
            "(ALIGNAX_WAIT_SECONDS)"
        )

    def _lose(self, why: str) -> None:
        """Ends all processes because of a process that cannot say so itself."""
        line = f"{why}; {GOES_ON}"
        if not self._leaving and self._news is None:
            self._all({"lost": line, "code": 1, "now": 1})  # also to the one that is lost, which may wake up
        self._learn(line, 1, 0.0)

    def _learn(self, line: str, code: int, when: float) -> None:
        """Notes why this process has to end, unless it ends already; process 0 passes on what another process has said."""
        if not self._leaving and self._news is None:
            self._news = when, line, code
            if not self.index and when:
                self._all({"lost": line, "code": code})

    def _finish(self, line: str, code: int) -> None:
        """Ends this process; process 0 ends last, since jax ends all others, in its own way, as soon as process 0 is gone."""
        self._leaving = True
        end = time.monotonic() + GRACE + LEAVE
        while not self.index and self._peers and time.monotonic() < end:
            for key, _ in self._selector.select(TICK):
                self._read(key.data)
        self._end(line, code)

    def _all(self, message: Mapping[str, Any]) -> None:
        for peer in list(self._peers.values()):
            self._send(message, peer)

    def _send(self, message: Mapping[str, Any], peer: Peer | None = None) -> None:
        """Sends a message to a peer, by default to process 0. One that is gone is noticed where its messages are read."""
        peer = peer or self._peers.get(0)
        if peer is not None:
            with self._sent, suppress(OSError):
                peer.connection.sendall(json.dumps(message).encode() + b"\n")


def ended(line: str, code: int) -> None:
    """Ends this process at once, with one line; not by Python's end, at which jax waits for the other processes."""
    with suppress(OSError):
        os.write(2, f"alignax: stopped: {line}\n".encode())
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
