"""Readers of data files: JSON, JSONL, CSV, Parquet, Arrow, folders of these, folders of `Dataset.save_to_disk`, and hf:// data sets.

Only a path that begins with hf:// or is another URL uses the network. Any fault in the bytes of a file is a `ValueError`.
"""

import contextlib
import csv
import io
import json
import mmap
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from alignax import paths
from alignax.data import columns, streams
from alignax.data.folders import SUFFIXES, files, matching, place, saved, suffix
from alignax.data.rows import Bad
from alignax.data.streams import Grown, lines, opened, opens_array
from alignax.paths import HUB
from alignax.text import one_line, short

__all__ = ["SUFFIXES", "Row", "one_line", "read_rows", "rows_and_faults", "short"]
HOLDERS = ("data", "rows", "examples", "train", "validation", "dev", "test")  # keys under which a single JSON object may hold the rows
Row = dict[str, Any]


def read_rows(path: str | pathlib.Path) -> list[Row]:
    """Reads the rows of one split from a path.

    A path is one of:

    - a file. Its content decides between gzip, bzip2, xz, zstd, Parquet, Arrow (each by its magic number), a JSON array (by its
      opening bracket) and JSONL. Only CSV and TSV are known by their names, and their values are text.
    - a folder that `Dataset.save_to_disk` wrote, or one with files of one split. These are read in the order of their names,
      those in subfolders too.
    - `FOLDER:train`, one split of several; `FILE.json:data`, the rows that a single JSON object holds under a key;
      `FOLDER/*.jsonl`, the files that match a pattern.
    - a URL of one of these, such as `gs://bucket/data/train.jsonl`, of any scheme that fsspec knows.
    - `hf://org/name`, `hf://org/name:split` or `hf://org/name:config:split`, a data set of the Hugging Face hub or its local cache.

    Errors: `ValueError` for a missing path, a damaged file (with its line, where it has lines), a file in a folder that cannot
    be read, a row that is no object, has a key twice or is longer than `streams.ROW` bytes, a hub that does not answer, and no rows.
    """
    rows: list[Row] = []
    for i, row in enumerate(rows_and_faults(path)):
        if isinstance(row, Bad):
            raise ValueError(f"{path}, row {i} (counted from 0): {row.what}")
        rows.append(row)
    return rows


def rows_and_faults(path: str | pathlib.Path) -> list[Row | Bad]:
    """Reads rows as `read_rows` does, with a `Bad` in the place of each row that has a key twice, is too long or is not CSV."""
    try:
        rows: list[Row | Bad] = [*_read_hub(str(path))] if str(path).startswith(HUB) else _read_path(str(path))
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into the memory of this machine; split the file and use only some of its parts") from error
    except OSError as error:
        if paths.is_url(path):
            raise ValueError(str(error)) from error  # it says all that is known
        raise ValueError(f"{path} cannot be read ({one_line(error)}); correct the path or its read permissions") from error
    if not rows:
        raise ValueError(f"{path} holds no rows; point to a file that has some")
    return rows


def _read_path(text: str) -> list[Row | Bad]:
    path, split = place(text)
    if not path.exists():
        if found := matching(text):
            return [row for file in found for row in _read_file(file)]
        hint = f"; for a data set of the Hugging Face hub write {HUB}{path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        looked = "" if paths.is_url(text) else f" (looked from {str(pathlib.Path.cwd())!r})"
        raise ValueError(f"there is no file or folder {str(path)!r}{looked}; correct the path{hint}")
    if not path.is_dir():
        return _under(path, split, [*_read_file(path, whole=bool(split))])
    if (folder := saved(path, split)) is not None:
        return [*_saved(folder)]
    return [row for file in files(path, split) for row in _read_file(file)]


def _under(path: pathlib.Path, key: str, rows: list[Row | Bad]) -> list[Row | Bad]:
    """The rows of a file; with a `key`, the rows that the file's single JSON object holds under it."""
    one = rows[0] if len(rows) == 1 and isinstance(rows[0], dict) else {}
    held = [name for name in one if isinstance(one[name], list) and one[name] and all(isinstance(x, dict) for x in one[name])]
    if key and key in held:
        return one[key]
    if key:
        remedy = f"the file has rows under {', '.join(held)}" if held else f"leave out ':{key}'"
        raise ValueError(f"{path} is not a single JSON object with a list of rows under {key!r}; {remedy}")
    for name in held:
        if name in HOLDERS and not any({"role", "from"} & x.keys() for x in one[name]):
            raise ValueError(f"{path} is one object, which holds {len(one[name]):,} rows under {name!r}; to read them write {path}:{name}")
    return rows


def _read_file(path: pathlib.Path, whole: bool = False) -> Iterator[Row | Bad]:
    """Yields the rows of a file; a `whole` file is a single JSON object, which may be longer than a row."""
    with opened(path) as stream:
        head = stream.read(8)
    with opened(path) as stream:
        if head[:4] == b"PAR1":
            yield from columns.parquet(path, stream.read())
        elif head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
            yield from columns.arrow(path, stream.read())
        elif suffix(path) in (".csv", ".tsv"):
            yield from _csv(path, _text(path, stream.read(), 1))
        else:
            yield from _Decoder(path).values(_text(path, stream.read(), 1), 1) if whole else _json(path, stream)


def _text(path: pathlib.Path, content: bytes, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        utf16 = "it begins as UTF-16 does; " if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}, in line {line}); {utf16}convert it to UTF-8") from error


def _csv(path: pathlib.Path, text: str) -> Iterator[Row | Bad]:
    """Yields the rows of CSV or TSV; a row whose quotes or columns do not fit is bad, and the line after its first begins the next row."""
    held, mark = list(io.StringIO(text, newline="")), "\t" if suffix(path) == ".tsv" else ","
    names: list[str] = []
    for number, found in _lines_of_tabs(held) if mark == "\t" and _are_rows(held) else _records(held, mark):
        if not names:
            names = _header(path, found, "tabs" if mark == "\t" else "commas (tabs in a .tsv file)")
        else:
            # Every value stays text, since "007" and "true" may be answers; columns of numbers are converted where they are used.
            yield Bad("not CSV", f"line {number} {found}") if isinstance(found, str) else dict(zip(names, found, strict=True))


def _header(path: pathlib.Path, names: list[str] | str, between: str) -> list[str]:
    wrong = f"line 1 {names}" if isinstance(names, str) else ""
    if len(set(names)) < len(names) and not wrong:
        wrong = "two columns have the same name"
    if len(names) == 1 and (other := next((mark for mark in ";\t|," if mark in names[0]), None)):
        wrong = f"one column, {short(names[0])}, with {other!r} in it: put {between} between columns"
    if wrong:
        raise ValueError(f"{path} is not a readable CSV file ({wrong}); its first line names the columns")
    return [*names]


def _records(held: list[str], mark: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields the number of each row's first line, and the row's values or what is wrong with it."""
    csv.field_size_limit(2**31 - 1)  # a row may be of any length
    at, width = 0, 0
    while at < len(held):
        begun, reader = at, csv.reader(map(held.__getitem__, range(at, len(held))), delimiter=mark, strict=True)
        try:
            for values in reader:
                width = width or len(values)
                if values and len(values) != width:
                    raise csv.Error(f"has {len(values)} columns, but the first line has {width}")
                if values:
                    yield begun + 1, values
                begun = at + reader.line_num
            return
        except csv.Error as error:
            what = str(error)
            if not what.startswith("has "):
                what = (
                    "has a quote that opens a value and "
                    f"{'never ends it' if 'end of data' in what else 'text after the quote that ends it'}"
                )
            yield (
                begun + 1,
                f"{what}; enclose a value that contains quotes, line ends or {mark!r} in quotes, and double the quotes inside the value",
            )
            at = begun + 1


def _are_rows(held: list[str]) -> bool:
    """Whether every line has as many tabs as the first, so that no quoted value holds a tab, and quotes inside a value are text."""
    counts = {line.count("\t") for line in held if line.strip("\r\n")}
    return len(counts) == 1 and 0 not in counts


def _lines_of_tabs(held: list[str]) -> Iterator[tuple[int, list[str] | str]]:
    for number, line in enumerate(held, 1):
        if values := line.strip("\r\n"):
            yield number, [x[1:-1].replace('""', '"') if QUOTED.fullmatch(x) else x for x in values.split("\t")]


def _too_long(place: str, size: int) -> Bad:
    return Bad(
        "too long",
        f"{place} has {size:,} bytes, but a row can have at most {streams.ROW:,}; shorten the row, or split it into several rows",
    )


def _json(path: pathlib.Path, stream: io.BufferedReader) -> Iterator[Row | Bad]:
    """Yields the rows of a JSON array, or of JSON objects one after another: one a line, or each over several lines."""
    decoder = _Decoder(path)
    for number, line in lines(stream):
        if isinstance(line, int):
            yield _too_long(f"line {number}", line)
        elif not decoder.begun and (opens_array(line) or line.strip(b"\xef\xbb\xbf \t\r\n") == b"{"):
            yield from decoder.values(_text(path, line + stream.read(), number), number)
        else:
            yield decoder.row(_text(path, line, number), number)


class _Decoder:
    """Decodes JSON into rows; a row with an object that has the same key twice is a bad row."""

    def __init__(self, path: pathlib.Path):
        self.path, self.begun, self.twice = path, False, ""
        self.json = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        out = dict(pairs)
        if len(out) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return out

    def row(self, line: str, number: int) -> Row | Bad:
        value, end = self._value(line, _blank(line, 0), number)
        if (end := _blank(line, end)) < len(line):
            raise self._error(json.JSONDecodeError("Extra data", line, end), number)
        return self._checked(value, f"line {number}")

    def values(self, text: str, number: int) -> Iterator[Row | Bad]:
        at = _blank(text, 0)
        if text[at : at + 1] != "[":  # objects one after another, each over several lines
            while at < len(text):
                line = number + text.count("\n", 0, at)
                value, end = self._value(text, at, number)
                yield self._checked(value, f"line {line}")
                at = _blank(text, end)
            return
        at, element, after = _blank(text, at + 1), 0, ","
        while element or text[at : at + 1] != "]":
            value, end = self._value(text, at, number)
            size = len(text[at:end].encode()) if end - at > streams.ROW // 4 else 0
            place = f"element {element} (counted from 0)"
            yield _too_long(place, size) if size > streams.ROW else self._checked(value, place)
            element, end = element + 1, _blank(text, end)
            after = text[end : end + 1]
            if after == "]":
                at = end
                break
            if after != ",":
                raise self._error(json.JSONDecodeError("Expecting ',' delimiter", text, end), number)
            at = _blank(text, end + 1)
        if (end := _blank(text, at + 1)) < len(text):
            raise self._error(json.JSONDecodeError("Extra data", text, end), number)

    def _value(self, text: str, at: int, number: int) -> tuple[Any, int]:
        self.begun, self.twice = True, ""
        try:
            return self.json.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise self._error(error, number) from error
        except (RecursionError, ValueError) as error:  # too deeply nested; a number of thousands of digits
            raise ValueError(f"{self.path}, line {number} cannot be read as JSON ({one_line(error)}); correct the line") from error

    def _checked(self, value: Any, place: str) -> Row | Bad:
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}, {place} is {short(value)}, not an object with columns; write one object a row")
        return (
            Bad("repeated key", f"{place} has the key {short(self.twice)} twice in one object; keep one of them") if self.twice else value
        )

    def _error(self, error: json.JSONDecodeError, first_line: int) -> ValueError:
        line = first_line + error.lineno - 1
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if error.doc[: error.pos].rstrip()[-1:] == "," and error.doc[error.pos : error.pos + 1] in ("]", "}"):
            what = f"a comma stands before the closing bracket at column {error.colno}"
        return ValueError(f"{self.path}, line {line} is not JSON: {what}; write one JSON array, or one object a line")


QUOTED = re.compile(r'"([^"]|"")*"')
BLANK = re.compile(r"[ \t\r\n]*")


def _blank(text: str, at: int) -> int:
    """The place of the first character at or after `at` that is not JSON white space."""
    return BLANK.match(text, at).end()  # type: ignore[union-attr]


def _saved(path: pathlib.Path) -> list[Row]:
    import datasets

    try:
        with paths.whole_copy(path) as folder:
            names = [data["filename"] for data in json.loads((folder / "state.json").read_bytes())["_data_files"]]
            packed = sum((folder / name).stat().st_size for name in {*names})
            with contextlib.ExitStack() as held:
                columns.check_arrow(path, packed, *(held.enter_context(_mapped(folder / name)) for name in names))
            dataset: Any = datasets.load_from_disk(str(folder))
            for _ in columns.check_rows(path, packed, dataset.data.to_batches()):
                pass
            return list(dataset.with_format(None))
    except (MemoryError, Grown):
        raise
    except Exception as error:  # errors of datasets and pyarrow on damaged files have no common class
        raise ValueError(f"the data set in {path} cannot be loaded ({one_line(error)}); save it again") from error


@contextlib.contextmanager
def _mapped(file: pathlib.Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as held, mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _read_hub(path: str) -> list[Row]:
    name, *rest = path.removeprefix(HUB).split(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or len(rest) > 2 or not all(rest):
        raise ValueError(f"{path!r} is not a data set of the hub; write {HUB}org/name, {HUB}org/name:split or {HUB}org/name:config:split")
    import datasets

    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    try:
        dataset: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # no network, no such data set, no such split: each library has its own error classes
        raise ValueError(
            f"{path} could not be fetched ({one_line(error)}); check the name and the network, or save it to a folder"
        ) from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise ValueError(f"{path} holds several splits ({', '.join(dataset)}); name one, such as {path}:{next(iter(dataset))}")
        dataset = next(iter(dataset.values()))
    return list(dataset.with_format(None))
