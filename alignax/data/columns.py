"""Readers of columnar files, Parquet and Arrow: how much they hold is found out before it is unpacked.

The sizes that a file claims for itself are not trusted where its reader does not have to obey them. Obeyed are the length in front of
each compressed buffer of Arrow, and the header of each page of Parquet: whatever does not unpack to that size is refused as damaged.
(Arrow columnar format, "IPC: compression"; Parquet format, `PageHeader` in parquet.thrift.)
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignax.data.streams import Grown, check_size
from alignax.text import one_line

ROWS_AT_ONCE = 64  # the most rows of Parquet that are decoded together
AT_ONCE = 2**28  # bytes of the rows that are decoded together, where each of them repeats a value as large as its page
POINTER = 8  # bytes of a value in a list of Python, to which those of its text are added
BATCH, DICTIONARY = 3, 2  # the headers of Arrow's messages that have buffers
REMEDY = "write its rows as JSONL"
Row = dict[str, Any]


def parquet(path: Path, content: bytes) -> Iterator[Row]:
    """Yields the rows of a Parquet file. Errors: `ValueError` for damaged bytes and for a file that grows beyond the bounds."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.py_buffer(content))
        pages = [page for group in range(file.metadata.num_row_groups) for page in _pages(content, file.metadata.row_group(group))]
        check_size(path, _packed(path, content), sum(pages), REMEDY)
        count = min(max(AT_ONCE // max(pages, default=1), 1), ROWS_AT_ONCE)
        yield from _rows(path, _packed(path, content), file.schema_arrow, file.iter_batches(count))
    except (MemoryError, Grown):
        raise
    except Exception as error:  # pyarrow's errors on damaged bytes have no common class
        raise ValueError(f"{path} is not a readable Parquet file ({one_line(error)}); write or download it again") from error


def arrow(path: Path, content: bytes) -> Iterator[Row]:
    """Yields the rows of an Arrow file or stream. Errors: as those of `parquet`."""
    import pyarrow

    try:
        check_arrow(path, _packed(path, content), content)
        if content[:6] == b"ARROW1":
            file = pyarrow.ipc.open_file(content)
            yield from _rows(path, _packed(path, content), file.schema, map(file.get_batch, range(file.num_record_batches)))
        else:
            stream = pyarrow.ipc.open_stream(content)
            yield from _rows(path, _packed(path, content), stream.schema, stream)
    except (MemoryError, Grown):
        raise
    except Exception as error:  # pyarrow's errors have no common class
        raise ValueError(f"{path} is not a readable Arrow file ({one_line(error)}); write or download it again") from error


def check_arrow(path: Path, packed: int, *contents: Any) -> None:
    """Raises `Grown` if the compressed buffers of Arrow files or streams hold more than the bounds allow; nothing is unpacked."""
    size = 0
    for content in contents:
        for at, body in _blocks(content) if content[:6] == b"ARROW1" else _messages(content):
            size += sum(_unpacked(content, at, body))
            check_size(path, packed, size, REMEDY)


def check_rows(path: Path, packed: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields record batches after a check of their offsets and of the size that their rows have in Python."""
    size = 0
    for batch in batches:
        batch.validate(full=True)
        room = lambda more, size=size: check_size(path, packed, size + more, REMEDY)
        room(POINTER * len(batch))
        size += POINTER * len(batch) + sum(int(sizes(column, room).sum()) for column in batch.columns)
        check_size(path, packed, size, REMEDY)
        yield batch


def sizes(array: Any, room: Any) -> np.ndarray:
    """The least bytes of each value of an Arrow array as an object of Python: [len(array)].

    Arrow can store a value once for many rows (dictionaries, runs, views), and a million nulls in no bytes: an array's own size says
    nothing about that of its rows. `room(bytes)` raises an error for too many of them, before as many sizes are made.
    """
    from pyarrow import compute, types

    kind, count = array.type, len(array)
    room(POINTER * count)
    whole = lambda values: np.concatenate([[0], np.cumsum(sizes(values, room))])
    if hasattr(array, "storage"):
        return sizes(array.storage, room)
    if types.is_dictionary(kind):
        found = sizes(array.dictionary, room)
        return found[array.indices.fill_null(0).to_numpy(zero_copy_only=False)] if len(found) else np.full(count, POINTER)
    if types.is_run_end_encoded(kind):
        places = np.arange(array.offset, array.offset + count)
        return sizes(array.values, room)[np.searchsorted(array.run_ends.to_numpy(), places, side="right")]
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return POINTER + views[array.offset : array.offset + count, 0].astype(np.int64)
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return POINTER + compute.call_function("binary_length", [array]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if types.is_struct(kind):
        return sum((sizes(array.field(i), room) for i in range(kind.num_fields)), np.full(count, POINTER))
    if types.is_union(kind):
        return np.full(count, POINTER + max((int(sizes(array.field(i), room).max(initial=0)) for i in range(kind.num_fields)), default=0))
    if types.is_fixed_size_list(kind):
        ends = kind.list_size * np.arange(array.offset, array.offset + count + 1)
        return POINTER + np.diff(whole(array.values)[ends])
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        held, begins = whole(array.values), array.offsets.to_numpy()
        return POINTER + held[begins + array.sizes.to_numpy()] - held[begins]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return POINTER + np.diff(whole(array.values)[array.offsets.to_numpy()])
    return np.full(count, POINTER + (kind.byte_width if types.is_fixed_size_binary(kind) else 0))


def _packed(path: Path, content: bytes) -> int:
    """The size of a file, which may itself be compressed once more."""
    return min(len(content), path.stat().st_size)


def _rows(path: Path, packed: int, schema: Any, batches: Iterable[Any]) -> Iterator[Row]:
    """Yields the rows of record batches."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have the same name")
    for batch in check_rows(path, packed, batches):
        yield from (row for i in range(0, len(batch), ROWS_AT_ONCE) for row in batch[i : i + ROWS_AT_ONCE].to_pylist())


def _pages(content: bytes, group: Any) -> Iterator[int]:
    """Yields the bytes of each page of a row group once it is unpacked, at least four for each of its values."""
    for i in range(group.num_columns):
        column = group.column(i)
        at = column.data_page_offset
        if column.dictionary_page_offset:
            at = min(at, column.dictionary_page_offset)
        end = at + column.total_compressed_size
        while at < min(end, len(content)):
            page, at = _thrift(content, at)
            header = page.get(5) or page.get(8) or page.get(7) or {}
            yield max(page[2], 4 * header.get(1, 0))
            at += page[3]


def _thrift(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The numbers and structures of a structure in Thrift's compact protocol, by their field numbers, and the place after it."""

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    def read(kind: int, depth: int) -> Any:
        nonlocal at
        if depth > 16:
            raise ValueError("a page header is nested too deeply")
        if kind in (4, 5, 6):
            value = number()
            return value >> 1 ^ -(value & 1)
        if kind == 8:
            size = number()
            at += size
        elif kind in (3, 7):
            at += 1 if kind == 3 else 8
        elif kind in (9, 10):
            head, at = content[at], at + 1
            for _ in range(head >> 4 if head >> 4 < 15 else number()):
                read(head & 15 if head & 15 > 2 else 3, depth + 1)
        elif kind == 12:
            out, last = {}, 0
            while head := content[at]:
                at += 1
                last = last + (head >> 4) if head >> 4 else read(4, depth)
                out[last] = read(head & 15, depth + 1)
            at += 1
            return out
        elif kind not in (1, 2):  # both are booleans, whose value is their kind
            raise ValueError(f"a page header has a field of the unknown kind {kind}")
        return None

    return read(12, 0), at


def _messages(content: Any) -> Iterator[tuple[int, int]]:
    """Yields the places of the metadata and of the body of each message in an Arrow stream."""
    at = 0
    while at + 8 <= len(content):
        mark, size = struct.unpack_from("<Ii", content, at)
        at, size = (at + 8, size) if mark == 0xFFFFFFFF else (at + 4, mark)
        if not size:
            return
        yield at, at + size
        place = _field(content, _root(content, at), 3)
        at += size + (struct.unpack_from("<q", content, place)[0] if place else 0)


def _blocks(content: Any) -> Iterator[tuple[int, int]]:
    """Yields the same of each message that the footer of an Arrow file names."""
    (size,) = struct.unpack_from("<i", content, len(content) - 10)
    footer = _root(content, len(content) - 10 - size)
    for kind in (2, 3):  # dictionaries, record batches
        for place in _vector(content, _field(content, footer, kind), 24):
            at, length = struct.unpack_from("<qi", content, place)
            yield at + (8 if content[at : at + 4] == b"\xff\xff\xff\xff" else 4), at + length


def _unpacked(content: Any, at: int, body: int) -> Iterator[int]:
    """Yields the unpacked size of each compressed buffer of a message."""
    message = _root(content, at)
    kind, batch = _field(content, message, 1), _table(content, _field(content, message, 2))
    if not kind or not batch or content[kind] not in (BATCH, DICTIONARY):
        return
    if content[kind] == DICTIONARY:
        batch = _table(content, _field(content, batch, 1))
    if not batch or not _field(content, batch, 3):
        return
    for place in _vector(content, _field(content, batch, 2), 16):
        offset, length = struct.unpack_from("<qq", content, place)
        if length >= 8:
            (size,) = struct.unpack_from("<q", content, body + offset)
            yield length if size == -1 else size if size >= 0 else 1 << 63


def _root(content: Any, at: int) -> int:
    return at + struct.unpack_from("<I", content, at)[0]


def _table(content: Any, place: int) -> int:
    return _root(content, place) if place else 0


def _field(content: Any, table: int, number: int) -> int:
    """The place of a field in a table of a FlatBuffer; 0 if the table has none."""
    fields = table - struct.unpack_from("<i", content, table)[0]
    (size,) = struct.unpack_from("<H", content, fields)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", content, fields + 4 + 2 * number)
    return table + offset if offset else 0


def _vector(content: Any, place: int, width: int) -> range:
    """The places of the elements in a vector of a FlatBuffer."""
    if not place:
        return range(0)
    begin = _root(content, place)
    return range(begin + 4, begin + 4 + width * struct.unpack_from("<I", content, begin)[0], width)
