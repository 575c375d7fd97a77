"""Streams of bytes out of files, decompressed as they are read, and never beyond a bound."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignax.text import one_line

ROW = 2**24  # bytes of a row of JSONL; a longer one is no row to train on
EXPANDED = 2**35  # bytes that a compressed file may become
RATIO, HARMLESS = 200, 2**26  # bytes that a byte of a compressed file may become, once all of them are more than HARMLESS
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive"}


def _zstd(file: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


UNPACK: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed where its first bytes say that it is gzip, bzip2, xz or zstd, whatever its name.

    Errors: `ValueError`, when it is opened or read, for an archive, for damage, and for a file that grows beyond the bounds.
    """
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if archive := next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None):
            raise ValueError(f"{path} is {archive}, which is not read; unpack it")
        if found := next((way for magic, way in UNPACK.items() if head.startswith(magic)), None):
            yield io.BufferedReader(_Unpacked(path, file, *found), 2**16)
        else:
            yield file


class _Unpacked(io.RawIOBase):
    """What a compressed file holds; counts it while it is read."""

    def __init__(self, path: Path, file: Any, name: str, unpack: Callable[[Any], Any]):
        self.path, self.file, self.name, self.inner, self.size = path, file, name, unpack(file), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self.inner.read(len(buffer))
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{self.path} is a damaged {self.name} file ({one_line(error)}); copy or download it again") from error
        self.size += len(content)
        check_size(self.path, self.file.tell(), self.size)
        buffer[: len(content)] = content
        return len(content)


def check_size(path: Path, packed: int, size: int) -> None:
    """Refuses what has grown beyond the bounds: `size` bytes out of `packed`."""
    if size > EXPANDED or (size > HARMLESS and size > RATIO * packed):
        raise ValueError(
            f"{path} grows from {packed:,} to more than {size:,} bytes when it is decompressed, beyond the bound of {RATIO} times and "
            f"{EXPANDED:,} bytes; if that is right, decompress it yourself"
        )


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | int]]:
    """Numbers, from 1, and bytes of the lines that are not blank; of a line longer than `ROW` how many bytes it has.

    Lines end with \\n alone: U+2028 and its like are legal inside a JSON string. Where a JSON array begins, its first line may be a part:
    an array is no row, and whoever wants it reads on.
    """
    number, begun = 0, False
    while line := stream.readline(ROW):
        number, size, rest = number + 1, len(line), line
        if not begun and opens_array(line):
            yield number, line
            continue
        begun = begun or bool(line.strip())
        while len(rest) == ROW and rest[-1:] != b"\n":
            rest = stream.readline(ROW)
            size += len(rest)
        if size > ROW:
            yield number, size
        elif line.strip():
            yield number, line


def opens_array(line: bytes) -> bool:
    """Whether a file whose first line this is holds a JSON array."""
    return line.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
