"""Rows of text: files to prompts and completions, with every bad row named or counted.

Nothing here touches the network, and no prompt is ever guessed: it is a column, or what stands before a separator that
the configuration names. (The longest common prefix of "Paris " and "London" is nothing, of "The sky" and "The sky is
blue" a whole answer: a prompt inferred so is silently wrong.)
"""

import difflib
import gzip
import json
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Prompted(NamedTuple):
    """One row: a prompt, its N completions (chosen first), and the row's index in its file."""

    prompt: str
    completions: tuple[str, ...]
    row: int = 0


class Bad(NamedTuple):
    """Why a row cannot be used: the reason it is counted under, and what is wrong in words."""

    reason: str
    what: str


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON array, a JSONL file (either may be gzipped) or a folder written by `Dataset.save_to_disk`.

    The content decides: gzip by its magic number, a JSON array by its opening bracket; anything else is read line by line.
    Errors: `ValueError` for a missing path, bad JSON (file and line), a row that is no object, and no rows at all.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {str(path)!r} (looked from {str(pathlib.Path.cwd())!r}); correct the path")
    rows = _read_folder(path) if path.is_dir() else _parse(path, _text(path))
    if not rows:
        raise ValueError(f"{path} holds no rows; point to a file that has some")
    return rows


def preference_rows(rows: Sequence[Mapping], data, path: str | pathlib.Path = "data") -> tuple[list[Prompted], Counter[str]]:
    """Turn raw rows into prompts with (chosen, rejected), and count the rows left out by reason.

    `data` is the `config.data` section: `columns`, `prompt_separator`, `bad_rows`, `limit`. Rows that have no prompt column
    hold whole transcripts, and each side is split after its own last `prompt_separator`. With `bad_rows="error"` the first
    bad row raises `ValueError`; with "drop" it is counted. `len(prompted) + sum(dropped.values()) == len(rows)`.
    """
    return _prompted_rows(rows, data, path, (data.columns.chosen, data.columns.rejected), ("chosen", "rejected"))


def sft_rows(rows: Sequence[Mapping], data, path: str | pathlib.Path = "data") -> tuple[list[Prompted], Counter[str]]:
    """Turn raw rows into prompts with one completion each; otherwise as `preference_rows`."""
    return _prompted_rows(rows, data, path, (data.columns.completion,), ("completion",))


def reject(bad: Bad, row: int, dropped: Counter[str], bad_rows: str, path: str | pathlib.Path) -> None:
    """Count a bad row, or raise `ValueError` where the configuration asks for that."""
    if bad_rows == "error":
        raise ValueError(
            f"{path}, row {row} (counted from 0): {bad.what}. Correct the row, or leave such rows out, counted, "
            "with --config.data.bad_rows=drop"
        )
    if bad_rows != "drop":
        raise ValueError(f"data.bad_rows is {bad_rows!r}; use 'error' or 'drop'")
    dropped[bad.reason] += 1


def _text(path: pathlib.Path) -> str:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error


def _parse(path: pathlib.Path, text: str) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows = list(enumerate(_json(path, text, 1)))
        place = "element"
    else:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _json(path, line, number)) for number, line in lines if line.strip()]
        place = "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place} {number} is {_short(row)}, not an object with columns; write one object a row")
    return [row for _, row in rows]


def _json(path: pathlib.Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line} is not JSON: {error.msg} at column {error.colno}; write one JSON array, or one object a line"
        ) from error


def _read_folder(path: pathlib.Path) -> list[dict[str, Any]]:
    splits = path / "dataset_dict.json"
    if splits.exists():
        names = json.loads(splits.read_text())["splits"]
        raise ValueError(f"{path} holds several splits ({', '.join(names)}); point to one of them, such as {path / names[0]}")
    if not (path / "state.json").exists():
        raise ValueError(f"the folder {path} was not written by Dataset.save_to_disk; point to such a folder or to a file")
    import datasets

    dataset = datasets.load_from_disk(str(path))
    return list(dataset.with_format(None))  # type: ignore[arg-type]


def _prompted_rows(rows, data, path, columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[list[Prompted], Counter[str]]:
    if data.limit < 0:
        raise ValueError(f"data.limit is {data.limit}; use a number of rows, or 0 for all of them")
    there = {column: None for row in rows for column in row}  # a dict keeps the order of the file
    for name, column in zip(names, columns, strict=True):
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}, named by data.columns.{name}; it has: {_nearest(column, there)}")
    prompt = data.columns.prompt
    if prompt not in there and not data.prompt_separator:
        raise ValueError(
            f"{path} has no prompt column {prompt!r} (it has: {_nearest(prompt, there)}), and a prompt is never guessed. Name "
            "the column with data.columns.prompt, or, where a text is a whole transcript, say where its last answer begins with "
            "data.prompt_separator, such as '\\n\\nAssistant:'"
        )
    split = _with_column(prompt, columns) if prompt in there else _with_separator(data.prompt_separator, columns, names)

    taken = rows[: data.limit] if data.limit else rows
    dropped: Counter[str] = Counter()
    kept = []
    for index, row in enumerate(taken):
        result = split(row)
        result = _check(result, columns) if isinstance(result, Prompted) else result
        if isinstance(result, Bad):
            reject(result, index, dropped, data.bad_rows, path)
        else:
            kept.append(result._replace(row=index))
    if len(taken) < len(rows):
        dropped["beyond data.limit"] = len(rows) - len(taken)
    return kept, dropped


def _with_column(prompt: str, columns: tuple[str, ...]) -> Callable[[Mapping], Prompted | Bad]:
    def split(row):
        return _bad_text(row, (prompt, *columns)) or Prompted(row[prompt], tuple(row[column] for column in columns))

    return split


def _with_separator(separator: str, columns: tuple[str, ...], names: tuple[str, ...]) -> Callable[[Mapping], Prompted | Bad]:
    def split(row):
        bad = _bad_text(row, columns)
        if bad:
            return bad
        sides = [row[column].rpartition(separator) for column in columns]
        for column, (_, found, _) in zip(columns, sides, strict=True):
            if not found:
                return Bad("no separator", f"{column!r} holds no separator {separator!r}: {_short(row[column])}")
        prompts = [before + found for before, found, _ in sides]
        if len(set(prompts)) > 1:
            shown = " and ".join(_tail(prompt) for prompt in prompts)
            return Bad("prompt differs", f"the prompt differs between {' and '.join(names)}: {shown}")
        return Prompted(prompts[0], tuple(after for _, _, after in sides))

    return split


def _bad_text(row: Mapping, columns: tuple[str, ...]) -> Bad | None:
    for column in columns:
        value = row.get(column)
        if not isinstance(value, str):
            return Bad("not text", f"{column!r} is {_short(value)}, not text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return Bad("invalid Unicode", f"{column!r} holds half a surrogate pair, which is no text: {_short(value)}")
    return None


def _check(row: Prompted, columns: tuple[str, ...]) -> Prompted | Bad:
    for column, completion in zip(columns, row.completions, strict=True):
        if not completion.strip():
            return Bad("empty completion", f"the completion in {column!r} is empty: {_short(completion)}")
    if len(row.completions) == 2 and row.completions[0] == row.completions[1]:
        return Bad("chosen equals rejected", f"chosen and rejected are the same text: {_short(row.completions[0])}")
    return row


def _nearest(column: str, there: Mapping[str, Any]) -> str:
    def distance(other):
        return -difflib.SequenceMatcher(None, column.lower(), other.lower()).ratio()

    return ", ".join(repr(name) for name in sorted(there, key=distance))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def _tail(text: str) -> str:
    return repr(text) if len(text) <= 60 else "..." + repr(text[-60:])
