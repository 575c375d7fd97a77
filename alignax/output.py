"""Output files and folders: each appears whole or not at all, and none replaces what another program has written.

A file or a folder is written beside its place under a temporary name, and is then moved there in one step. So even after a killed
process or on a full disk, the place holds the earlier version or the new one, whole. A model folder that a command has written holds
`alignax.json`, with the name of its writer and the CRC of every file.

On a bucket a file is an object, which appears whole when it is closed. Nothing there moves a folder in one step: it is written on this
machine and uploaded file by file, its config last, and without a config it is no model (`_upload`).
"""

import ctypes
import errno
import functools
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignax import paths
from alignax.distributed import is_main, together
from alignax.locks import LOCK as LOCK
from alignax.locks import Lock as Lock
from alignax.locks import holder
from alignax.paths import remote
from alignax.text import one_line

MARK = "alignax.json"
LAST = ("config.json", "adapter_config.json", MARK)  # files without which a folder is no model, nor known as written by alignax
TMP = "alignax-tmp"  # the end of the names of unfinished files and folders
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))  # what a disk without room says, in any library
ROOM = "make room, or choose another place"
AGAIN = "make room, and run the same command again: it goes on from the newest checkpoint"  # what to do for the files of a run
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def claim(place: Path, origin: str = "", force: bool = False, remedy: str = "give --force to replace it, or choose another place") -> None:
    """Refuses a place that cannot be written, or that holds something by another writer; an empty file or folder is free.

    Args:
      place: the file or folder that is about to be written.
      origin: the writer. An untouched folder of the same origin may be replaced, and so may a file with the origin in its first 1000
        bytes. Empty: `place` is a file, and none that exists may be replaced.
      force: replace what stands there, except in a workdir where another process works.
      remedy: the end of the error message.

    Raises:
      ValueError: something would be destroyed, or the place cannot be taken: it is closed, inside a file, or a mount point.
    """
    if why := closed(place):
        raise ValueError(f"{str(place)!r} cannot be written: {why}; choose another place")
    if place.is_dir() and not origin:
        raise ValueError(f"{str(place)!r} is a folder; name a file")
    if force and place.exists() and (who := holder(place.parent / LOCK)):
        raise ValueError(f"{str(place)!r} is not replaced even with --force, since {who} works in its folder; choose another place")
    if force or not place.exists() or (place.is_file() and not place.stat().st_size) or (place.is_dir() and not any(place.iterdir())):
        return
    if place.is_dir():
        there = _mark(place)
        if origin and there is not None and there["origin"] == origin:
            if there.get("unfinished") or not (changed := _changed(place, there["files"])):
                return
            raise ValueError(f"{str(place)!r} was changed since it was written ({changed}); {remedy}")
        raise ValueError(f"{str(place)!r} exists, and {'another run' if there else 'something else'} wrote it; {remedy}")
    with place.open("rb") as f:
        if not origin or origin.encode() not in f.read(1000):
            raise ValueError(f"{str(place)!r} exists; {remedy}")


def closed(place: Path) -> str:
    """The reason why nothing can be written to a place; empty if it can. Links are followed, since their targets are written."""
    if there := remote(place):
        return _closed_bucket(there)
    try:
        if place.exists() and not (place.is_dir() or place.is_file()):
            return "it is a device or a pipe, which cannot be replaced (for the console write -, where the option takes it)"
        place = _real(place)
        if loop := next((str(p) for p in (place, *place.parents) if p.is_symlink()), ""):
            return f"the link {loop!r} leads back to itself"
        if _is_mount(place):
            return "it is a mount point, which cannot be replaced" + (" (a folder inside it can)" if place.is_dir() else "")
        above = standing(place.parent)
        if not above.is_dir():
            return f"{str(above)!r} is a file"
        if not os.access(above, os.W_OK | os.X_OK):
            return f"you have no write permission for {str(above)!r}"
        # Only a trial shows that the file system takes files, and that the names are not too long for it.
        with tempfile.TemporaryDirectory(prefix=".", suffix=f".{TMP}", dir=above) as tmp:
            for name in (*place.relative_to(above).parts[:-1], _beside(place).name):
                (Path(tmp) / name).touch()
    except OSError as e:
        return e.strerror or one_line(e)
    return ""


def _closed_bucket(place: paths.Remote) -> str:
    """The reason why nothing can be written to a place on a bucket; empty if it can. Only a trial shows it."""
    if place.scheme in paths.BUCKETS and len(place.parts) < 3:
        return "it is a whole bucket; name a folder inside it"
    trial = place.with_name(f".{place.name}.{socket.gethostname()}-{os.getpid()}.{TMP}")
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except FileNotFoundError:
        return f"there is no bucket {place.parts[1]!r}"
    except OSError as e:
        return str(e)
    return ""


def _is_mount(path: Path) -> bool:
    """Whether a path is a mount point, which cannot be replaced."""
    about = Path("/proc/self/mountinfo")
    lines = about.read_bytes().splitlines() if about.is_file() else []
    mounted = re.sub(rb"[\s\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(path))  # escaped as in mountinfo
    return os.path.ismount(path) if path.is_dir() else any(line.split()[4] == mounted for line in lines)


def claim_on_all(place: Path, origin: str = "", force: bool = False) -> None:
    """Claims a place with `claim` on process 0; an error is raised on all processes."""
    with together():
        if is_main():
            claim(place, origin, force)


def check(folder: Path, suffix: str = ".safetensors") -> None:
    """Refuses a folder by alignax in which a file with the suffix was changed; files that a person deleted or added are allowed.

    Raises:
      ValueError: such a file, or the folder's `alignax.json`, is damaged.
    """
    there = _mark(folder)
    if there is None:
        if (folder / MARK).exists():
            raise ValueError(f"{folder / MARK} is damaged, so the files of the folder cannot be checked; write or fetch the folder again")
        return
    for name, crc in there["files"].items():
        if name.endswith(suffix) and (folder / name).is_file() and _remembered_crc(folder / name) != crc:
            raise ValueError(
                f"{folder / name} is damaged: its content is not what alignax wrote; write or fetch the folder again (if it was changed "
                f"on purpose, delete {folder / MARK})"
            )


def taken(out: Path, by: str) -> bool:
    """Whether a folder holds things but not the file `by`, which every folder of its kind has, unless its writer was killed on a bucket."""
    return out.exists() and not (out / by).is_file() and any(out.iterdir()) and not (_mark(out) or {}).get("unfinished")


def staged(out: Path) -> Path:
    """Where a folder is written first: beside its place, or for a bucket in this machine's folder of temporary files."""
    return Path(tempfile.gettempdir()) if remote(out) else out


def standing(path: Path) -> Path:
    """The path if it exists, else its nearest parent folder that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def require_space(path: Path, need: int, what: str, remedy: str = ROOM) -> None:
    """Raises an OSError, before anything is written, if the disk has no room for 1.1 times `need` bytes; a bucket has room."""
    if remote(path):
        return
    free, room = shutil.disk_usage(standing(path)).free, math.ceil(1.1 * need)
    if free < room:
        raise OSError(f"{what} needs {room:,} bytes, but {str(path)!r} has {free:,} bytes free; {remedy}")


@contextmanager
def file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A context with a temporary path to write, which takes the place of `path` at the end; after an error nothing of it remains.

    `shared`: several processes may write the same file at the same time; `sweep` removes what killed processes left.
    """
    if there := remote(path):
        with tempfile.TemporaryDirectory() as folder, _writing(path, Path(folder) / path.name):
            yield Path(folder) / path.name
            there.upload(Path(folder) / path.name)
        return
    path = _real(path)  # the target of a link is replaced, and the link stays
    tmp = _beside(path, f"{socket.gethostname()}-{os.getpid()}" if shared else "")
    with _writing(path, tmp):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        _sync(tmp)
        os.replace(tmp, path)
        _sync(path.parent)


def named(title: str) -> str:
    """A title as a file name without suffix: a single name of at most 200 bytes, whatever the title holds."""
    name = re.sub(r"[ /\0]", "-", title).encode(errors="replace")
    return (name if len(name) <= 200 else name[:100] + name[-100:]).decode(errors="ignore")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, which appears whole or not at all."""
    with file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def append(path: Path, content: bytes, remedy: str = ROOM) -> None:
    """Adds to the end of a file on this machine, or makes the file and its folder; after an error the file is as it was.

    Raises:
      OSError: if it cannot be written, with the remedy at the end.
    """
    size = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as f:
            size = f.tell()
            while content:
                content = content[f.write(content) :]
    except OSError as e:
        if size is not None:
            with suppress(OSError):  # a device
                os.truncate(path, size)
        raise unwritten(path, e, remedy) from e


def unwritten(path: Path, error: Exception, remedy: str = ROOM) -> OSError:
    """The error of a place that could not be written."""
    return OSError(f"{str(path)!r} could not be written ({reason(error)}); {remedy}")


def reason(error: BaseException) -> str:
    """An error in one line, of a long one both ends: a path comes first, and what happened last."""
    line = one_line(error, 1000)
    return line if len(line) <= 300 else f"{line[:140]} .. {line[-140:]}"


def write_json(value: Any, out: str) -> None:
    """Writes a value as JSON into the file `out`, or onto the console if `out` is "-"."""
    if out == "-":
        print(json_text(value, indent=2))
    else:
        write_text(paths.of(out), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, in characters that the console can show."""
    return json.dumps(value, indent=indent, ensure_ascii="utf" not in sys.stdout.encoding.lower())


def sweep(folder: Path) -> None:
    """Removes the unfinished shared files in a folder whose processes, of this machine, are gone. On a bucket there are none."""
    for left in () if remote(folder) else folder.glob(f".*.{socket.gethostname()}-*.{TMP}"):
        try:
            os.kill(int(left.name.removesuffix(f".{TMP}").rpartition("-")[2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OSError):  # not such a name, or a process of another user
            pass


@contextmanager
def folder(out: Path, origin: str = "") -> Iterator[Path]:
    """A context with a temporary folder to write, which takes the place of `out` at the end; after an error nothing of it remains.

    Every process enters the context, and process 0 writes. With an `origin`, the folder gets an `alignax.json` with it and the CRCs.
    """
    there = remote(out)
    out = out if there else _real(out)
    tmp = Path(tempfile.gettempdir()) / f"{out.name}.{os.getpid()}.{TMP}" if there else _beside(out)
    with _writing(out, tmp):
        with together():
            if is_main():
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir(parents=True)
        yield tmp
        with together():
            if is_main():
                if origin:
                    crcs = {str(p.relative_to(tmp)): _crc(p) for p in sorted(tmp.rglob("*")) if p.is_file()}
                    (tmp / MARK).write_text(json.dumps({"origin": origin, "files": crcs}, indent=2) + "\n", encoding="utf-8")
                if there:
                    _upload(tmp, there)
                else:
                    for path in (*tmp.rglob("*"), tmp):
                        _sync(path)
                    _replace(out, tmp)
                    _sync(out.parent)


def _upload(folder: Path, out: paths.Remote) -> None:
    """Puts a finished folder of this machine in the place of a folder on a bucket, and removes the former.

    A kill in between leaves a folder without the files of `LAST`: they are deleted before anything else, and written after it. An
    `alignax.json` that says who is writing stands there meanwhile, so that the same run may write the folder again.
    """
    if there := _mark(folder):
        (out / MARK).write_text(json.dumps({"origin": there["origin"], "files": {}, "unfinished": True}) + "\n")
    rank = lambda name: LAST.index(name.rpartition("/")[2]) if name.rpartition("/")[2] in LAST else -1
    new = sorted((str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()), key=rank)
    old = sorted(("/".join(p.relative_to(out).parts) for p in out.rglob("*")), key=rank, reverse=True)
    for name in old:
        if name != MARK or not there:
            (out / name).unlink(missing_ok=True)
    for name in new:
        (out / name).upload(folder / name)
    shutil.rmtree(folder)


@contextmanager
def _writing(path: Path, tmp: Path) -> Iterator[None]:
    """Removes the half-written `tmp` after an error, and turns a failure to write into one line with the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except BaseException as e:
        if is_main() or tmp.is_file():
            shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)
        if not isinstance(e, (OSError, SafetensorError)) and not (isinstance(e, Exception) and any(sign in str(e) for sign in FULL)):
            raise  # tokenizers, too, has no error class of its own for a full disk
        if remote(path):
            raise OSError(f"{str(path)!r} could not be written ({reason(e)})") from e
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise OSError(f"{str(path)!r} could not be written ({reason(e)}){kept}; {ROOM}") from e


def _real(path: Path) -> Path:
    """The path with its links resolved, except a link that leads back to itself."""
    return Path(os.path.realpath(path))


def _beside(path: Path, tag: str = "") -> Path:
    return path.with_name(f".{path.name}.{tag + '.' if tag else ''}{TMP}")


def unfinished(path: Path) -> bool:
    """Whether a path is an unfinished file or folder, which a killed process left."""
    return path.name.endswith(TMP)


def _replace(out: Path, new: Path) -> None:
    """Puts a finished folder in the place of an earlier one, and removes the earlier one."""
    if not out.exists():
        new.rename(out)
        return
    try:
        exchanged = ctypes.CDLL(None).renameat2(HERE, os.fsencode(new), HERE, os.fsencode(out), EXCHANGE) == 0
    except AttributeError:  # a system without renameat2
        exchanged = False
    if not exchanged:  # nor can the file system: for a moment the place is empty, and both folders stand beside it
        old = new.with_name(new.name + "-old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        new.rename(out)
        new = old
    shutil.rmtree(new)


def _sync(path: Path) -> None:
    """Forces a written file or folder onto the disk, before anything refers to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mark(folder: Path) -> dict | None:
    """The content of a folder's `alignax.json`; None if there is none or it is damaged."""
    try:
        found = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    fine = isinstance(found, dict) and isinstance(found.get("origin"), str) and isinstance(found.get("files"), dict)
    return found if fine else None


def _changed(folder: Path, files: dict[str, str]) -> str:
    """The first file that was changed, added or removed since a folder was written; empty if there is none."""
    there = {"/".join(p.relative_to(folder).parts) for p in folder.rglob("*") if p.is_file()} - {MARK}
    return next((name for name in sorted(there | files.keys()) if name not in there or files.get(name) != _crc(folder / name)), "")


def _remembered_crc(path: Path) -> str:
    """The CRC of a file, which this process remembers until the file changes."""
    if far := remote(path):
        return _crc_of(path, far.version())
    there = path.stat()
    return _crc_of(path, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _crc_of(path: Path, *_: int | str) -> str:
    return _crc(path)


def _crc(path: Path) -> str:
    crc = 0
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
