"""Byte streams of files, decompressed while they are read and bounded in size."""

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

ROW = 2**24  # the most bytes of a JSONL row; a longer row is nothing to train on
EXPANDED = 2**35  # the most bytes that a compressed file may become
RATIO, HARMLESS = 200, 2**26  # the most bytes that a compressed byte may become, once there are more than HARMLESS in all
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive"}
TAR = 257, 262  # the place of the word that tells a tar archive, which may be compressed


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
    """Opens the bytes of a file, decompressed if its first bytes say that it is gzip, bzip2, xz or zstd, whatever its name.

    Errors: `ValueError`, on opening or reading, for an archive, a damaged file, and a file that grows beyond the bounds.
    """
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if archive := next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None):
            raise ValueError(f"{path} is {archive}, which alignax does not read; unpack it")
        found = next((way for magic, way in UNPACK.items() if head.startswith(magic)), None)
        content: io.BufferedReader = io.BufferedReader(_Unpacked(path, file, *found), 2**16) if found else file
        if content.peek(TAR[1])[TAR[0] : TAR[1]] == b"ustar":
            raise ValueError(f"{path} is a tar archive, which alignax does not read; unpack it")
        yield content


class _Unpacked(io.RawIOBase):
    """The content of a compressed file; its size is checked while it is read."""

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


class Grown(ValueError):
    """A compressed file holds more bytes than the bounds allow."""


def check_size(path: Path, packed: int, size: int, remedy: str = "decompress the file yourself") -> None:
    """Raises `Grown` for a file that has grown beyond the bounds, with `size` bytes out of `packed` compressed bytes."""
    if size > EXPANDED or (size > HARMLESS and size > RATIO * packed):
        raise Grown(
            f"{path} grows from {packed:,} to more than {size:,} bytes when it is decompressed, above the limits of {RATIO} times and "
            f"{EXPANDED:,} bytes; if you expect this size, {remedy}"
        )


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | int]]:
    """Yields the number (from 1) and the bytes of each line that is not blank; of a line longer than `ROW`, the number of bytes instead.

    Lines end with \\n alone, since U+2028 and its like are legal inside a JSON string. The first line of a JSON array may be cut at
    `ROW` bytes: an array is no row, and the caller reads the rest from the stream.
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
    """Whether a file holds a JSON array, by its first line."""
    return line.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
