"""The identity of an experiment: its effective config as a Python file, and digests of its fields and code."""

import ast
import importlib.util
import itertools
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignax.config.blame import blaming, theirs
from alignax.config.experiment import Experiment, load_experiment
from alignax.config.overrides import flat
from alignax.config.source import FOLDER, MARK, MODULES, imports_from, modules_were, read_source
from alignax.text import one_line, short


def source(experiment: Experiment) -> str:
    """The source of an experiment file, without the part that a run appended."""
    return read_source(experiment.file).split(MARK)[0].rstrip() + "\n"


def effective(experiment: Experiment) -> str:
    """The text of a Python file that runs the same experiment again: its source, with every field of its config pinned.

    Raises:
      ValueError: for a value that no Python literal gives.
    """
    fields = "".join(f"        {name!r}: {literal(name, value)},\n" for name, value in sorted(flat(experiment.config).items()))
    imported = module_digests(experiment.file)
    # An experiment of several stages removes the experience from stages that need no reference.
    without = "" if experiment.experience else "\nexperience = None\n"
    return f"""{source(experiment)}

{MARK}
{FOLDER}{imports_from(experiment.file, read_source(experiment.file))!r}
{MODULES}{imported!r}
_get_config = get_config


def get_config():  # noqa: D103, F811
    config = _get_config()
    pinned = {{
{fields}    }}
    for _path, _value in pinned.items():
        *_groups, _name = _path.split(".")
        _node = config
        for _group in _groups:
            if _group not in _node:
                _node[_group] = {{}}
            _node = _node[_group]
        _node[_name] = _value
    return config
{without}"""


def literal(name: str, value: Any) -> str:
    """The value of a field as a Python literal."""
    text = repr(value)
    try:
        if ast.literal_eval(text) == value:
            return text
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # every error of a text that is no literal
        pass
    raise ValueError(
        f"config field {name!r} is {short(value)} of type {type(value).__name__}, which the config of a run cannot store; use text, True, "
        "False, None, finite Python numbers, or tuples, lists and dictionaries of these"
    )


def identity(experiment: Experiment, free: Sequence[str]) -> str:
    """The digest of an experiment's fields and code; fields that start with one of `free` do not count, as in `difference`."""
    fields = [(name, value) for name, value in sorted(flat(experiment.config).items()) if not name.startswith(tuple(free))]
    return digest(repr((fields, code(experiment))))


def check_kept(experiment: Experiment) -> None:
    """Refuses an experiment that could not be resumed: its config.py is written, read back and compared."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.py"
        file.write_text(effective(experiment), encoding="utf-8")
        try:
            lines = difference(load_experiment(file), experiment, ())
        except ValueError as e:
            lines = [one_line(e, 300)]
    if lines:
        raise ValueError(f"this run could not be resumed: config.py in its workdir would not reproduce the config ({'; '.join(lines[:4])})")


def difference(old: Experiment, new: Experiment, free: Sequence[str]) -> list[str]:
    """The differences of two experiments in fields and code, one a line; fields that start with one of `free` are ignored."""
    a, b = flat(old.config), flat(new.config)
    names = sorted(n for n in a.keys() | b.keys() if not n.startswith(tuple(free)))
    lines = [f"{n}: {a.get(n)!r} there, {b.get(n)!r} now" for n in names if a.get(n) != b.get(n)]
    if bare(source(old), old.file) != bare(source(new), new.file):
        lines.append(f"the code of {new.file.name} has changed")
    return [*lines, *(f"the code of {name}, which {new.file.name} imports, has changed" for name in changed_modules(old, new))]


def changed_modules(old: Experiment, new: Experiment) -> list[str]:
    """The names of the user's modules whose code differs between two experiments, or that only one of them imports.

    The modules of `old` are those from the start of its run, if a run wrote its file. So an experiment from a workdir may be both.
    """
    there, now = kept_modules(old), module_digests(new.file)
    return [name for name in sorted(there.keys() | now.keys()) if there.get(name) != now.get(name)]


def code(experiment: Experiment) -> str:
    """The code of an experiment and of the user's modules that it imports, without comments and module docstrings."""
    own = bare(source(experiment), experiment.file)
    return "\n".join([own, *(f"# {name}\n{text}" for name, text in modules(experiment.file).items())])


def bare(text: str, file: Path) -> str:
    """The code of a Python file, without comments and module docstring."""
    with blaming(file):
        tree = ast.parse(text)
    if tree.body and isinstance(tree.body[0], ast.Expr):
        tree.body = tree.body[1:]
    return ast.unparse(tree)


def digest(text: str) -> str:
    """The CRC-32 of a text, as eight hexadecimal digits."""
    return f"{zlib.crc32(text.encode()):08x}"


def kept_modules(experiment: Experiment) -> dict[str, str]:
    """The digests of an experiment's modules by name; a run's config.py holds those from the start of the run."""
    kept = modules_were(read_source(experiment.file))
    return module_digests(experiment.file) if kept is None else kept


def module_digests(experiment: Path) -> dict[str, str]:
    """The digests of the user's modules that an experiment file imports, by name."""
    return {name: digest(text) for name, text in modules(experiment).items()}


def modules(experiment: Path) -> dict[str, str]:
    """The code of the user's modules that an experiment file imports, directly or not, by file name relative to its import folder."""
    return dict(sorted(module_files(experiment).values()))


def changed_files(files: Mapping[Path, tuple[str, str]]) -> list[str]:
    """The names of those modules, from `module_files`, whose files hold another code now, or none that can be read."""

    def now(file: Path) -> str | None:
        try:
            return bare(read_source(file), file)
        except (OSError, ValueError):
            return None

    return sorted(name for file, (name, text) in files.items() if now(file) != text)


def module_files(experiment: Path) -> dict[Path, tuple[str, str]]:
    """The files of the user's modules that an experiment file imports, directly or not, each with the name and code of `modules`."""
    found: dict[Path, tuple[str, str]] = {}
    waiting = [*imported(experiment, "")]
    while waiting:
        file, name = waiting.pop()
        if file not in found and theirs(file, experiment):
            found[file] = name, bare(read_source(file), file)
            waiting += imported(file, ".".join(Path(name).parent.parts))
    return found


def imported(file: Path, package: str) -> Iterator[tuple[Path, str]]:
    """The files that a Python file of `package` imports, each with its name relative to its import folder."""
    names: list[str] = []
    for node in ast.walk(ast.parse(read_source(file))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = [*above, *filter(None, [node.module])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    for name in names:
        parts = name.split(".")
        for folder, i in itertools.product(_homes(parts[0]), range(1, len(parts) + 1)):
            path = folder.joinpath(*parts[:i])
            there = (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())
            yield from ((file.resolve(), str(file.relative_to(folder))) for file in there)


def _homes(module: str) -> list[Path]:
    """The import folders where Python finds a module; it need not be imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.submodule_search_locations is None:
        return [Path(spec.origin).parent] if spec is not None and spec.origin and spec.has_location else []
    return [Path(place).parent for place in spec.submodule_search_locations]
