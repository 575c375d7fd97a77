"""The lock of a workdir: one process at a time works there.

On this machine it is a lock of the file system, which ends with the process. On a bucket it is an object that only one process can create,
and that its holder renews every `BEAT` seconds: an object that nobody has renewed for `STALE` seconds is of a process that is gone.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path, PurePath

from alignax.paths import Remote, remote

LOCK = ".lock"  # the file in a workdir that says who works there
HELD: set[tuple[int, int] | str] = set()  # what this process holds: device and inode of a file, or the token in an object
BEAT, STALE = 10.0, 40.0  # seconds


class Lock:
    """A lock on a workdir, held until `close` or the end of the process, however it ends; with `path` None nothing is locked.

    Raises:
      ValueError: another process holds the lock.
    """

    def __init__(self, path: Path | None):
        """Takes the lock, or prints that the file system has no locks."""
        self._release: weakref.finalize | None = None
        if path is None:
            return
        if there := remote(path):
            self._hold(there)
            return
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        place = os.fstat(file).st_dev, os.fstat(file).st_ino
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.read(file, 300).decode(errors="replace").strip()
            os.close(file)
            # The text of the holder cannot tell whether it is this process: in containers, two may share host name and process number.
            if place not in HELD:
                raise ValueError(in_use(path, holder)) from e
            return
        except OSError as e:
            print(
                f"{path.parent} is on a file system without locks ({e.strerror}): make sure that no other process works in this folder",
                file=sys.stderr,
            )
        HELD.add(place)
        self._release = weakref.finalize(self, _let_go, file, place)  # also if a run is refused after it took the lock
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _hold(self, lock: Remote) -> None:
        """Takes the lock of a workdir on a bucket, and renews it in a thread."""
        token = uuid.uuid4().hex
        for _ in range(3):  # others may take it, or give it back, at the same moment
            try:
                lock.write_bytes(_said(token, 0), new=True)
                break
            except FileExistsError:
                if _read(lock).get("token") in HELD:  # the same process may begin again
                    return
                if who := _holder_of_object(lock):
                    raise ValueError(in_use(lock, who)) from None
                lock.unlink(missing_ok=True)
        else:
            raise ValueError(in_use(lock, ""))
        HELD.add(token)
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(lock, token, over), daemon=True)
        renewing.start()
        self._release = weakref.finalize(self, _give_back, lock, token, over, renewing)

    def close(self) -> None:
        """Releases the lock."""
        if self._release is not None:
            self._release()


def in_use(lock: PurePath, who: str) -> str:
    """The error text for a workdir in which another process works."""
    return (
        f"workdir {str(lock.parent)!r} is in use: {who or 'another process'} works in it; wait until that process ends, "
        "stop it, or choose another workdir"
    )


def holder(lock: Path) -> str:
    """The other process that holds the lock of a workdir, in words; empty if there is none.

    On a bucket a process of another machine shows only by its next renewal whether it lives, which this function waits for.
    """
    if there := remote(lock):
        return _holder_of_object(there)
    try:
        with open(lock, "rb") as file:
            about = os.fstat(file.fileno())
            if (about.st_dev, about.st_ino) not in HELD:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:  # no such file, or a file system without locks
        pass
    return ""


def _holder_of_object(lock: Remote) -> str:
    first = _read(lock)
    if not first or first.get("token") in HELD:
        return ""
    who, machine = str(first.get("holder", "another process")), first.get("machine")
    if machine == _machine() and type(first.get("process")) is int and not Path(f"/proc/{first['process']}").exists():
        return ""  # only a machine itself knows at once that its process is gone
    print(f"{lock} is of {who}; waiting up to {STALE:g} s to see whether that process lives", file=sys.stderr, flush=True)
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(min(BEAT / 5, 2.0))
        now = _read(lock)
        if not now:
            return ""
        if now != first:
            return str(now.get("holder", "another process"))
    return ""


def _machine() -> str:
    """What tells this machine, and in it this container, from all others: process numbers mean the same within it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return uuid.uuid4().hex


def _said(token: str, beat: int) -> bytes:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    return json.dumps({"holder": who, "process": os.getpid(), "machine": _machine(), "token": token, "beat": beat}).encode()


def _read(lock: Remote) -> dict:
    """What the object says; empty if there is none."""
    try:
        found = json.loads(lock.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    return found if isinstance(found, dict) and found else {"holder": "another program"}


def _renew(lock: Remote, token: str, over: threading.Event) -> None:
    """Renews a lock until it is given back. A process that has lost it, since it stood still for long, must not write any more."""
    beat = 0
    while not over.wait(BEAT):
        try:
            found = _read(lock)
            if found.get("token") not in (token, None):
                sys.stderr.write(
                    f"alignax: error: {found.get('holder')} has taken over workdir {str(lock.parent)!r}, since this process did not renew "
                    f"its lock for {STALE:g} s; this process ends without another checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(2)
            if not over.is_set():
                beat += 1
                lock.write_bytes(_said(token, beat))
        except OSError:  # the network may come back before the next time
            pass


def _give_back(lock: Remote, token: str, over: threading.Event, renewing: threading.Thread) -> None:
    over.set()
    renewing.join(BEAT)  # else it could write the object again after it was deleted
    HELD.discard(token)
    try:
        if _read(lock).get("token") == token:
            lock.unlink(missing_ok=True)
    except OSError:  # it is stale soon
        pass


def _let_go(file: int, place: tuple[int, int]) -> None:
    HELD.discard(place)
    os.close(file)
