"""No message names what does not exist: fields of the config, commands and options, functions, files."""

import ast
import re
from pathlib import Path

import pytest
import runs

import alignax
from alignax import cli
from alignax.config import Experiment, default_config, flat, load_experiment

PACKAGE = Path(alignax.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
LABORATORIES = [load_experiment(runs.REPO / "experiments" / f"overoptimization{which}.py").config for which in ("", "_tokens")]
FIELDS = {name for config in (default_config(), *LABORATORIES) for name in flat(config)} | {"FIELD"}
GROUPS = {".".join(name.split(".")[:n]) for name in FIELDS for n in range(1, name.count(".") + 1)}
GROUPS.add("data.template")  # whose fields are those of the model's template
SUFFIXES = {"json", "safetensors", "py", "jsonl", "md"}  # of files that are called as groups are: model.safetensors
GIT = {"--always", "--dirty", "--exclude"}
TENSORS = {"model.layers", "model.embed_tokens.weight", "model.norm.weight"}
# Functions that a message may name though they are not the package's: Python's, and those of formulas.
FOREIGN = {"_get_config", "exp", "log", "sqrt", "get_config", "save_to_disk", "Dataset.save_to_disk", "len", "min", "max"}


def texts(file: Path) -> list[tuple[int, str]]:
    """Line and text of every string of a file that is no docstring; what an f-string puts in is `{}`."""
    tree = ast.parse(file.read_text())
    inner, out = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            out.append((node.lineno, "".join(parts)))
    return out + [
        (n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in inner
    ]


def functions() -> set[str]:
    """Names of all functions and classes of the package, and of those that an experiment file has."""
    trees = [ast.parse(file.read_text()) for file in SOURCES]
    named = (ast.FunctionDef, ast.ClassDef)
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, named)} | set(Experiment._fields)


MESSAGES = [(file.relative_to(PACKAGE), line, text) for file in SOURCES for line, text in texts(file)]
FUNCTIONS = functions()


def unknown(text: str) -> list[str]:
    """The names in a text that do not exist."""
    out = [name for name in re.findall(r"--config\.([A-Za-z_]+(?:\.[a-z_0-9]+)*)", text) if name not in FIELDS | GROUPS]
    heads = "|".join(sorted({name.split(".")[0] for name in GROUPS}))
    for name in re.findall(rf"(?<![\w./-])((?:{heads})(?:\.[a-z_][a-z_0-9]*)+)(?![\w(/])", text):
        out += [name] if name not in FIELDS | GROUPS | TENSORS and name.rpartition(".")[2] not in SUFFIXES else []
    out += [f"alignax {name}" for name in re.findall(r"`alignax ([a-z-]+)", text) if name not in cli.WANTED and not name.startswith("--")]
    options = set(re.findall(r"--[a-z][a-z-]*", cli.USAGE)) | {
        "--help",
        "--config",
        "--always",
        "--dirty",
        "--exclude",
    }  # the last are git's
    out += [name for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) if name not in options and "xla" not in name]
    out += [f"{name}()" for name in re.findall(r"(?<![\w.{\\])([a-z_][a-z_0-9]{2,})\((?!\?)", text) if name not in FUNCTIONS | FOREIGN]
    files = re.findall(r"(?<![\w/])((?:experiments|docs|tpu|alignax)/[\w/]+\.\w+)", text)
    return out + [name for name in files if not (runs.REPO / name).exists()]


def test_messages_name_what_exists():
    assert len(MESSAGES) > 1000
    found = [f"{file}:{line} {bad}" for file, line, text in MESSAGES for bad in unknown(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("set data.max_lenght", ["data.max_lenght"]),
        ("set --config.optimizer.lr=1", ["optimizer.lr"]),
        ("run `alignax evaluate`", ["alignax evaluate"]),
        ("leave it out with --force-it", ["--force-it"]),
        ("use gropo()", ["gropo()"]),
        ("see experiments/nowhere.py", ["experiments/nowhere.py"]),
        ("set data.max_length, model.safetensors, `alignax eval`, grpo(), docs/online.md", []),
    ],
)
def test_what_does_not_exist_is_found(text, bad):
    assert unknown(text) == bad
