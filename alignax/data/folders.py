"""Folders and patterns: finds the files that a path means. Every file in a folder is read, known to hold no rows, or named in an error."""

import json
import re
from pathlib import Path

from alignax import paths
from alignax.text import one_line

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# Words in the names of files and folders that tell their split.
SPLITS = ("train", "training", "dev", "val", "valid", "validation", "eval", "evaluation", "test", "testing")
# SHARD: train-00000-of-00002, as the hub names the files of a split, formerly with a hash at the end.
# NUMBER: the end of train-1, but not of train_v1.
SHARD = re.compile(r"(?P<name>.+?)[-_.](?P<number>\d{3,6})[-_.]of[-_.](?P<of>\d{3,6})([-_.][0-9a-f]{8,})?")
NUMBER = re.compile(r"(?<![-_.]v)(?<!\d)[-_.]*\d+([-_.]+\d+)*$")
DEEPEST = 12  # the most folders inside one another; a link to a folder above itself would have no end
# Files beside data that hold no rows: hidden files, documents, programs, pictures, and the bookkeeping of `datasets`.
NO_ROWS = re.compile(
    r"\..*|_success"
    r"|(readme|licen[cs]e|notice|copying|citation|changelog|authors|datasheet|dataset_card)\b(?!.*\.(jsonl?|ndjson|csv|tsv|parquet|arrow)\b).*"
    r"|(dataset_infos?|dataset_dict|state)\.json|cache-[0-9a-f]+\.arrow"
    r"|.*\.(md|rst|py|ipynb|sh|ya?ml|toml|cff|bib|pdf|png|jpe?g|gif|svg|lock|sha256|md5|crc)",
    re.IGNORECASE,
)


def suffix(path: Path) -> str:
    """The suffix of a file name that tells its format, in lower case: .csv for a.CSV.gz."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def place(text: str) -> tuple[Path, str]:
    """Splits FOLDER:test into the path and the split "test"; the split is empty if the text names none, or is a path that exists."""
    before, colon, split = text.rpartition(":")
    if colon and split and not split.startswith("//") and not paths.of(text).exists() and paths.of(before).exists():
        return paths.of(before), split
    return paths.of(text), ""


def matching(pattern: str) -> list[Path]:
    """The files that match a pattern such as data/*.jsonl, in the order of their names; none if the text is no pattern."""
    if not re.search(r"[*?[]", pattern):
        return []
    found = paths.matching(pattern)
    folders = [path for path in found if path.is_dir()]
    if folders and "**" not in pattern:
        raise ValueError(
            f"{pattern} also matches the folder {folders[0]}; write a pattern that matches only files, such as {pattern}.jsonl"
        )
    found = [path for path in found if path.is_file()]
    _check_formats(pattern, found)
    return found


def saved(folder: Path, split: str) -> Path | None:
    """The folder of one split, if `Dataset.save_to_disk` wrote `folder`; None if another program did."""
    own = [file for file in ("dataset_dict.json", "state.json") if (folder / file).exists()]
    other = [file.name for file in sorted(folder.iterdir()) if own and file.is_file() and not NO_ROWS.fullmatch(file.name)]
    if other := [name for name in other if suffix(Path(name)) in SUFFIXES and suffix(Path(name)) != ".arrow"]:
        raise ValueError(
            f"{folder} was written by Dataset.save_to_disk, but it also holds other files{_also(other)}; point to one of these, or move "
            "them away"
        )
    if (folder / "dataset_dict.json").exists():
        names = _splits(folder / "dataset_dict.json")
        if split not in names:
            what = f"has no split {split!r}" if split else "holds several splits"
            raise ValueError(f"{folder} {what} ({', '.join(names)}); name one of them, such as {folder}:{names[0]}")
        return folder / split
    if (folder / "state.json").exists():
        if split:
            raise ValueError(f"{folder} is a single data set, without splits; leave out ':{split}'")
        return folder
    return None


def _splits(file: Path) -> list[str]:
    try:
        names = json.loads(file.read_bytes())["splits"]
        return [str(names[0]), *map(str, names[1:])]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); save the data set again") from error


def files(folder: Path, split: str) -> list[Path]:
    """The data files of one split in a folder and its subfolders, in the order of their names.

    The split of a file is its name without the number at the end (train_prefs-00000-of-00001.parquet, train_sft.jsonl), or a word of
    that name, else a word of its folder's name. Files of one split in several folders are several configurations: the caller has to
    name one. Errors: `ValueError` where the files of one split cannot be told, or may hold the same rows twice.
    """
    root = _snapshot(folder)
    found = list(_inside(root, DEEPEST))
    other = [str(file.relative_to(root)) for file in found if suffix(file) not in SUFFIXES]
    found = [file for file in found if suffix(file) in SUFFIXES]
    if not found:
        raise ValueError(
            f"the folder {folder} was not written by Dataset.save_to_disk and holds no {', '.join(SUFFIXES)} files, neither plain nor "
            f"packed ({', '.join(PACKED)}){_also(other)}; point to a folder with such files, or to a file"
        )
    if other:
        pattern = f"{folder}/{'**/' if any('/' in name for name in other) else ''}*{found[0].suffix}"
        raise ValueError(
            f"the folder {folder} holds files that alignax does not read{_also(other)}; name the files to read, such as '{pattern}'"
        )
    held = {file: _names(file.relative_to(root)) for file in found}
    if split:
        exact = [file for file in found if held[file][:1] == [split]]
        found = exact or [file for file in found if split in held[file]]
    splits = sorted({names[0] for file, names in held.items() if names and file in found})
    if not found or len(splits) > 1:
        known = sorted({names[0] for names in held.values() if names})
        what = "holds several splits" if not split else f"holds several splits that are {split!r}" if found else f"has no split {split!r}"
        shown = f"{', '.join(splits or known) or 'no name tells of one'}"
        raise ValueError(f"the folder {folder} {what} ({shown}); name one{f', such as {folder}:{known[0]}' if known else ' of its files'}")
    if splits and (unnamed := [str(file.relative_to(root)) for file in found if not held[file]]):
        what = f"holds {splits[0]!r} and files without a split in their names{_also(unnamed)}"
        raise ValueError(f"the folder {folder} {what}; write {folder}:{splits[0]}, or name the files to read, such as '{folder}/*.jsonl'")
    places = sorted({str(_place(file.relative_to(root))) for file in found}) if splits else []
    if len(places) > 1:
        what = f"holds {splits[0]!r} in several folders ({', '.join(places[:8])})"
        raise ValueError(
            f"the folder {folder} {what}; point to one of them, or name the files to read with a pattern, such as '{folder}/*/*'"
        )
    _check_formats(f"the folder {folder}", found)
    _check_shards(folder, found)
    return found


def _check_shards(folder: Path, found: list[Path]) -> None:
    """Refuses a folder that lacks some of the files that train-00000-of-00003 and the like speak of."""
    held: dict[tuple[Path, str, int], set[int]] = {}
    for file in found:
        if shard := SHARD.fullmatch(file.name[: len(file.name) - len(_format(file))]):
            held.setdefault((file.parent, shard["name"], int(shard["of"])), set()).add(int(shard["number"]))
    for (_, name, of), numbers in held.items():
        if len(numbers) < of:
            raise ValueError(
                f"the folder {folder} holds {len(numbers)} of the {of} files of {name!r}; fetch the others, or, to train without them, "
                f"name the files to read, such as '{folder}/{'**/' if found[0].parent != folder else ''}*{found[0].suffix}'"
            )


def _check_formats(where: str, found: list[Path]) -> None:
    """Refuses files of one name in two formats, which usually hold the same rows; shards with different numbers are read together."""
    first: dict[tuple[str, str], Path] = {}
    for file in sorted(found, key=lambda file: _shard(file)[1] != ""):  # whole files first
        name, number = _shard(file)
        for other in (first.get((name, "")), first.get((name, number))):
            if other is not None and _format(other) != _format(file):
                raise ValueError(
                    f"{where} holds {name!r} in two formats, {other} and {file}, and rows that are in both would be read twice; "
                    f"name the files to read, such as {other} or '{file.parent}/*{_format(file)}', or move the others away"
                )
        first.setdefault((name, number), file)


def _shard(file: Path) -> tuple[str, str]:
    """The name of what a file holds and the number of its shard, both from the file's name; an empty number means the whole."""
    stem = file.name[: len(file.name) - len(_format(file))]
    name = _names(Path(file.name))[:1]
    if not name:  # the name tells no split
        return stem, ""
    shard = SHARD.fullmatch(stem)
    numbers = re.findall(r"\d+", stem[len(name[0]) :])
    return name[0], "-".join(str(int(number)) for number in numbers[: 1 if shard else None])


def _format(file: Path) -> str:
    """The suffixes of a file name that tell how the file is written, in lower case: .csv.gz for train.CSV.gz."""
    return "".join(file.suffixes[-2:] if file.suffix.lower() in PACKED else file.suffixes[-1:]).lower()


def _also(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:8])}{f', and {len(names) - 8} more' if len(names) > 8 else ''})"


def _names(file: Path) -> list[str]:
    """The names of the split that a file may hold, by its path inside the folder; the main one comes first."""
    stem = Path(file.stem if file.suffix.lower() in PACKED else file.name).stem
    shard, inside = SHARD.fullmatch(stem), _words(stem)
    name = [shard["name"]] if shard else [NUMBER.sub("", stem)] if inside else []
    return list(dict.fromkeys([*name, *inside, *(word for part in reversed(file.parent.parts) for word in _words(part))]))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_\d]+", name.lower()) if word in SPLITS]


def _place(file: Path) -> Path:
    """The subfolder in which the files of a split lie; if a folder has the name of the split, the parent of that folder."""
    named = [i for i, part in enumerate(file.parent.parts) if _words(part)]
    return Path(*file.parent.parts[: named[-1]]) if named and not _words(file.name) else file.parent


def _snapshot(folder: Path) -> Path:
    """The version inside a folder of the hub's cache; any other folder itself."""
    versions = folder / "snapshots"
    if not versions.is_dir() or not (folder / "blobs").is_dir():
        return folder
    held = sorted(path for path in versions.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    current = versions / main.read_text().strip() if main.is_file() else None
    if current in held or len(held) == 1:
        return current if current in held else held[0]
    raise ValueError(f"{folder} is the hub's cache of {len(held)} versions of a data set; point to one of the folders in {versions}")


def _inside(folder: Path, depth: int) -> list[Path]:
    """The files of a folder and its subfolders, without files that are known to hold no rows."""
    if not depth:
        raise ValueError(
            f"{folder} is nested in more than {DEEPEST} folders, or in a loop of links; point to the folder that holds the files"
        )
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            found += [] if NO_ROWS.fullmatch(path.name) else [path]
        elif path.name.startswith("."):
            continue
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            raise ValueError(
                f"{path} was written by Dataset.save_to_disk, but the folder above it holds other files too; point to this folder alone"
            )
        else:
            found += _inside(path, depth - 1)
    return found
