"""The paths that a user gives: files and folders on this machine, and URLs such as gs://bucket/run.

`of` makes each of them. A path on this machine is a `pathlib.Path`. A URL is a `Remote`, which has the methods of `pathlib.Path` that
alignax uses, and reads and writes with the file system that fsspec finds for its scheme. Code that takes a path does not ask which it is,
except where a bucket is no disk: an object is written whole when it is closed, and there are no links, no rename and no append.
"""

import fnmatch
import functools
import glob
import importlib.util
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from alignax.text import one_line, short

HUB = "hf://"  # data sets of the Hugging Face hub, which `datasets` fetches
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash too, since a Path makes one of two
# Schemes of object stores, which have no folders: to make one could make a bucket.
BUCKETS = ("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss")
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs"}
LOCAL = ("file", "local")
SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # suffixes of the small files of a model folder


class Stat(NamedTuple):
    """What `stat` tells of an object: its size in bytes."""

    st_size: int


class Remote(PurePosixPath):
    """The path of a URL, as text the URL itself. Every failure is an OSError that names the URL.

    What stands here works alike on files and on prefixes, which are the folders of a bucket: a prefix exists while an object has it.
    """

    def __str__(self) -> str:
        return re.sub(r"(^|,)([A-Za-z][A-Za-z0-9+.-]+):/", r"\1\2://", super().__str__())  # also in a list of folders, `A@0.5,B@0.5`

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no path of this machine")  # so that no function of os takes it for one

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    @property
    def scheme(self) -> str:
        """The scheme of the URL, such as gs."""
        return self.parts[0].removesuffix(":")

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        with self._reaching() as fs:
            return fs.exists(str(self))

    def is_file(self) -> bool:
        """Whether there is a file."""
        with self._reaching() as fs:
            return fs.isfile(str(self))

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        with self._reaching() as fs:
            return fs.isdir(str(self))

    def is_symlink(self) -> bool:
        """False: there are no links."""
        return False

    def absolute(self) -> "Remote":
        """The path itself."""
        return self

    def resolve(self) -> "Remote":
        """The path itself."""
        return self

    def stat(self) -> Stat:
        """The size of a file."""
        with self._reaching() as fs:
            return Stat(int(fs.info(str(self))["size"] or 0))

    def version(self) -> str:
        """A text that changes whenever the file is written."""
        with self._reaching() as fs:
            found = fs.info(str(self))
            return repr([found.get(name) for name in ("size", "generation", "etag", "ETag", "updated", "mtime", "created")])

    def iterdir(self) -> Iterator["Remote"]:
        """The files and folders in a folder."""
        with self._reaching() as fs:
            try:
                found = fs.ls(str(self), detail=False)
            except FileNotFoundError:
                if self.scheme not in BUCKETS:
                    raise
                found = []  # a prefix that no object has is an empty folder
        return iter([self / name for name in sorted({self._inside(name) for name in found} - {""})])

    def rglob(self, pattern: str) -> Iterator["Remote"]:
        """The files in a folder and its subfolders whose names match."""
        with self._reaching() as fs:
            names = sorted(map(self._inside, _found(fs.find, str(self))))
        return iter([self / name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)])

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """The files and folders that match a pattern, relative to this folder."""
        with self._reaching() as fs:
            names = {*map(self._inside, _found(fs.glob, f"{self}/{pattern}"))}
        return iter([self / name for name in sorted(names - {""})])

    def open(self, mode: str = "r", encoding: str = "utf-8") -> Any:
        """Opens a file: "r" or "rb" to read, "wb" to write it whole, when it is closed."""
        with self._reaching() as fs:
            if mode == "wb":
                return fs.open(str(self), "wb")
            # Not a reader of fsspec itself, which has no peek().
            content = io.BufferedReader(_Raw(self, fs.open(str(self), "rb")), 1 << 20)
            return content if mode == "rb" else io.TextIOWrapper(content, encoding=encoding)

    def read_bytes(self) -> bytes:
        """The content of a file."""
        with self._reaching() as fs:
            return fs.cat_file(str(self))

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes start .. stop - 1 of a file."""
        with self._reaching() as fs:
            return fs.cat_file(str(self), start=start, end=stop) if stop > start else b""

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The content of a text file."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes, new: bool = False) -> None:
        """Writes a file, whole or not at all; with `new`, a file that exists is a FileExistsError, even if it came a moment ago."""
        with self._reaching() as fs:
            fs.pipe_file(str(self), content, **({"mode": "create"} if new else {}))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes a text file, whole or not at all."""
        self.write_bytes(text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Writes the content of a file of this machine, whole or not at all."""
        with self._reaching() as fs:
            fs.put_file(str(file), str(self))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes a folder, where the file system has folders."""
        if self.scheme not in BUCKETS:
            with self._reaching() as fs:
                fs.makedirs(str(self), exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes a file."""
        try:
            with self._reaching() as fs:
                fs.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _inside(self, name: str) -> str:
        """A name from a list of fsspec, with or without its scheme, relative to this folder."""
        return name.rpartition("://")[2].strip("/").removeprefix("/".join(self.parts[1:])).strip("/")

    @contextmanager
    def _reaching(self) -> Iterator[Any]:
        """The file system. What it raises becomes an OSError that names this path and the cause."""
        try:
            yield system(self.scheme)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{self} does not exist, or its bucket does not") from e
        except FileExistsError as e:
            raise FileExistsError(f"{self} exists") from e
        except MemoryError:
            raise
        except Exception as e:  # errors of the libraries, of their network and of their credentials have no common class
            raise OSError(f"{self} cannot be reached ({type(e).__name__}: {cause(e)}); {remedy(self.scheme)}") from e


def _found(search: Callable[[str], list[str]], where: str) -> list[str]:
    """What a search finds; nothing where there is no folder, as with `pathlib`."""
    try:
        return search(where)
    except FileNotFoundError:
        return []


class _Raw(io.RawIOBase):
    """The bytes of a remote file, so that a failure in the middle of reading names it."""

    def __init__(self, path: Remote, file: Any):
        self.path, self.file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        with self.path._reaching():
            content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def of(text: str | os.PathLike) -> Path:
    """The path that a user names: a URL with a scheme, or a path on this machine.

    >>> of("gs://bucket/run") / "export"
    Remote('gs://bucket/run/export')
    >>> of("runs/dpo").name
    'dpo'
    """
    if isinstance(text, Path | Remote):
        return cast(Path, text)
    return cast(Path, Remote(str(text))) if is_url(text) else Path(text)


def here(text: str, what: str) -> Path:
    """The path of a place on this machine, for code that writes files of its own with other libraries.

    Raises:
      ValueError: for a URL; `what` names it.
    """
    if is_url(text):
        raise ValueError(f"{what} is {short(text)}, but this experiment writes files of its own there; give a folder on this machine")
    return Path(text)


def is_url(text: str | os.PathLike) -> bool:
    """Whether a path is a URL that fsspec reads, and so a `Remote`; data of the hub are not, though fsspec knows their scheme."""
    if isinstance(text, str):
        return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None and not text.startswith(HUB)
    return isinstance(text, Remote)


def remote(path: Path) -> Remote | None:
    """The path as a `Remote`; None for a path on this machine."""
    return path if isinstance(path, Remote) else None


def read_range(file: Path, start: int, stop: int) -> bytes:
    """The bytes start .. stop - 1 of a file, on this machine or not."""
    if there := remote(file):
        return there.read_range(start, stop)
    with open(file, "rb") as f:
        f.seek(start)
        return f.read(stop - start)


@functools.cache
def system(scheme: str) -> Any:
    """The file system of a scheme; it keeps no lists of folders, since other processes write too."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)


def cause(error: BaseException) -> str:
    """The cause of a failure in a line, without the internal URL that some libraries put first."""
    return one_line(error)[:300]


def remedy(scheme: str) -> str:
    """What a user can do where a scheme's paths cannot be reached."""
    if scheme in ("gs", "gcs"):
        return (
            "check the bucket's name, and that you have the role roles/storage.objectUser on it, as the service account of a TPU VM or "
            "after `gcloud auth application-default login`"
        )
    return "check the path, and your credentials"


def check(text: str, what: str, hub: bool = False) -> None:
    """Refuses URLs, also in a list with commas, that no installed package can read; hf:// is for data alone, `hub`.

    A ~ or $WORK that no shell has filled in is refused too, since it would mean a folder of that very name. Nothing is asked of a network.

    Raises:
      ValueError: for such a text, with the remedy.
    """
    for part in text.split(","):
        if found := re.search(r"^~[\w.-]*(?=/|$)|(?<![^/])\$(?:[A-Za-z_]\w*|\{\w+\})(?=/|$)", part):
            raise ValueError(f"{what} is {short(text)}, and no shell has expanded its {found[0]}; write the full path")
        url = re.match(rf"\s*{SCHEME.pattern}(/?)", part)
        if not url or (hub and part.strip().startswith(HUB)):
            continue
        scheme = url[1]
        said = f"{what} is {short(text)}, and"
        if scheme == "hf":
            raise ValueError(f"{said} hf:// names data of a hub alone; give a folder, such as one that was downloaded from the hub")
        if scheme in LOCAL:
            raise ValueError(f"{said} {short(scheme)[1:-1]}:// is for paths on this machine; write the path alone")
        if scheme in ("http", "https") and not hub:
            raise ValueError(f"{said} {scheme}:// is for files of data alone; download the folder")
        if not url[2]:
            raise ValueError(f"{said} {short(scheme)[1:-1]}:/ has one slash; a URL has two, {short(scheme)[1:-1]}://")
        if why := unknown(scheme):
            raise ValueError(f"{said} {why}")


def unknown(scheme: str) -> str:
    """Why no installed package reads a scheme, with the remedy; empty if one does."""
    import fsspec

    name = short(scheme)[1:-1]
    if scheme in PACKAGES and importlib.util.find_spec(PACKAGES[scheme]) is None:
        extra = " (pip install 'alignax[gcs]')" if PACKAGES[scheme] == "gcsfs" else f" (pip install {PACKAGES[scheme]})"
        return f"{name}:// paths need the package {PACKAGES[scheme]}, which is not installed{extra}"
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as e:
        return f"{name}:// paths need a package that is not installed ({one_line(e)})"
    except ValueError:
        return f"{name}:// paths are not known to fsspec; give a path on this machine, or one of gs://, s3:// and the like"
    return ""


def matching(pattern: str) -> list[Path]:
    """The files and folders that match a pattern such as data/*.jsonl, in the order of their names; `**` matches any folders."""
    if not is_url(pattern):
        return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    root = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    return [*of(root).glob(pattern.removeprefix(root + "/"))]


@contextmanager
def small_copy(folder: Path) -> Iterator[Path]:
    """A folder on this machine with the small files of a model folder, its config and tokenizer, for libraries that read no URL."""
    if remote(folder) is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as tmp:
        copy(folder, Path(tmp), [file for file in folder.iterdir() if file.suffix in SMALL and not file.name.endswith(".index.json")])
        yield Path(tmp)


@contextmanager
def whole_copy(folder: Path) -> Iterator[Path]:
    """A folder on this machine with all that a folder holds, for libraries that read no URL."""
    if remote(folder) is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as tmp:
        copy(folder, Path(tmp), [*folder.rglob("*")])
        yield Path(tmp)


def copy(folder: Path, out: Path, files: list[Path]) -> None:
    """Copies files of a folder into another one, with the folders between."""
    for file in files:
        if file.is_file():
            there = out / "/".join(file.relative_to(folder).parts)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
