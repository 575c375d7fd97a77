"""Files to raw rows: JSON, JSONL, CSV, Parquet, folders of them, folders of `Dataset.save_to_disk`, and on request a hub.

Only a path that begins with hf:// touches the network. Whatever bytes a file holds, what is wrong with it is a `ValueError`.
"""

import gzip
import json
import pathlib
import re
import reprlib
import zlib
from typing import Any

HUB = "hf://"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SPLITS = ("train", "training", "dev", "valid", "validation", "eval", "test")  # words by which files name the split that they hold


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of one split.

    The content decides between gzip (by its magic number), Parquet (likewise), a JSON array (by its opening bracket) and
    JSONL; only CSV is known by its name, and its values are text. A folder is one that `Dataset.save_to_disk` wrote, or
    holds files of one split, read in the order of their names. `hf://org/name`, `hf://org/name:split` and
    `hf://org/name:config:split` are data sets of the Hugging Face hub, or of its local cache.

    Errors: `ValueError` for a missing path, a damaged file (with its line, where it has lines), a row that is no object, a
    hub that does not answer, and no rows at all.
    """
    if str(path).startswith(HUB):
        rows = _read_hub(str(path))
    else:
        path = pathlib.Path(path)
        if not path.exists():
            hint = f"; for a data set of the Hugging Face hub write {HUB}{path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
            raise ValueError(f"there is no file or folder {str(path)!r} (looked from {str(pathlib.Path.cwd())!r}); correct the path{hint}")
        rows = _read_folder(path) if path.is_dir() else _read_file(path)
    if not rows:
        raise ValueError(f"{path} holds no rows; point to a file that has some")
    return rows


def _read_file(path: pathlib.Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error
    if content[:4] == b"PAR1":
        return _parquet(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from error
    return _csv(path, text) if _suffix(path) == ".csv" else _parse(path, text)


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _parquet(path: pathlib.Path, content: bytes) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(pyarrow.py_buffer(content)).read().to_pylist()
    except Exception as error:  # pyarrow has no common class for what damaged bytes make it raise
        raise ValueError(f"{path} is no readable Parquet file ({one_line(error)}); write or download it again") from error


def _csv(path: pathlib.Path, text: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.csv as csv

    content = pyarrow.py_buffer(text.encode())
    # One block: a row may be of any length. Quoted values may hold line ends.
    whole = csv.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1), use_threads=False)
    layout = csv.ParseOptions(newlines_in_values=True)
    try:
        names = csv.open_csv(content, whole, layout).schema.names
        if len(set(names)) < len(names):
            raise ValueError("two columns have the same name")
        # Every value as text: "007" and "true" may be answers; the columns that are numbers are converted where they are used.
        types = csv.ConvertOptions(column_types=dict.fromkeys(names, "string"))
        return csv.read_csv(content, whole, layout, types).to_pylist()
    except (ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} is no readable CSV file ({one_line(error)}); its first line names the columns") from error


def _parse(path: pathlib.Path, text: str) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows = [(f"element {i} (counted from 0)", row) for i, row in enumerate(_json(path, text, 1))]
    else:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"line {number}", _json(path, line, number)) for number, line in lines if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place} is {short(row)}, not an object with columns; write one object a row")
    return [row for _, row in rows]


def _json(path: pathlib.Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line} is not JSON: {error.msg} at column {error.colno}; write one JSON array, or one object a line"
        ) from error
    except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
        raise ValueError(f"{path}, line {first_line} is not JSON that can be read ({one_line(error)}); correct it") from error


def _read_folder(path: pathlib.Path) -> list[dict[str, Any]]:
    if (path / "dataset_dict.json").exists():
        names = _splits(path / "dataset_dict.json")
        raise ValueError(f"{path} holds several splits ({', '.join(names)}); point to one of them, such as {path / names[0]}")
    if (path / "state.json").exists():
        return _saved(path)
    files = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(
            f"the folder {path} was not written by Dataset.save_to_disk and holds no {', '.join(SUFFIXES)} files; "
            "point to such a folder or to a file"
        )
    held = {word for p in files for word in re.split(r"[\W_\d]+", p.name.lower()) if word in SPLITS}
    if len(held) > 1:
        raise ValueError(f"the folder {path} holds several splits ({', '.join(p.name for p in files)}); point to one of the files")
    return [row for p in files for row in _read_file(p)]


def _splits(file: pathlib.Path) -> list[str]:
    try:
        names = json.loads(file.read_bytes())["splits"]
        return [str(names[0]), *map(str, names[1:])]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); save the data set again") from error


def _saved(path: pathlib.Path) -> list[dict[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
        return list(dataset.with_format(None))  # type: ignore[arg-type]
    except Exception as error:  # whatever datasets and pyarrow raise on damaged files
        raise ValueError(f"the data set in {path} does not load ({one_line(error)}); save it again") from error


def _read_hub(path: str) -> list[dict[str, Any]]:
    name, *rest = path.removeprefix(HUB).split(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or len(rest) > 2 or not all(rest):
        raise ValueError(f"{path!r} is no data set of the hub; write {HUB}org/name, {HUB}org/name:split or {HUB}org/name:config:split")
    import datasets

    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    try:
        dataset: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # no network, no such data set, no such split: each library below has its own classes
        raise ValueError(
            f"{path} could not be fetched ({one_line(error)}); check the name and the network, or save it to a folder"
        ) from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise ValueError(f"{path} holds several splits ({', '.join(dataset)}); name one, such as {path}:{next(iter(dataset))}")
        dataset = next(iter(dataset.values()))
    return list(dataset.with_format(None))


def check_local(text: str, what: str, hub: bool = False) -> None:
    """Refuses a URL, in a list with commas too, where only local files are read and written; with `hub` hf:// is read."""
    for part in text.split(","):
        scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/", part)  # with one slash too: what a path makes of two
        if scheme and not (hub and part.startswith(HUB)):
            also = f", or {HUB}org/name" if hub else ""
            raise ValueError(f"{what} is {text!r}, and {scheme[1]}:// is not read or written; give a path of this machine{also}")


def one_line(error: BaseException, most: int = 160) -> str:
    """What an error says, as one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


_REPR = reprlib.Repr()  # nested values to a bounded depth: what a file holds may be nested a thousand deep
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]
