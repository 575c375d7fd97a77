"""The text of an experiment file: its own part, and the part that a run has written behind it."""

import ast
from pathlib import Path

from alignax.config.blame import BadInput

MARK = "# --- the effective config of this run; alignax wrote this part ---"
FOLDER = "_modules_lie_in = "  # what the line begins with that names the folder from which the experiment imports
MODULES = "_modules_were = "  # likewise, of the files that it imported from there: name -> digest of their code


def of_run(file: Path) -> bool:
    """Whether a run has written this file: told by its text, as the code of a stranger's folder is not to be run."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace").splitlines()


def read_source(file: Path) -> str:
    """The text of a Python file, which may begin with a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e


def imports_from(file: Path, text: str) -> str:
    """The folder of modules that an experiment file of this text imports: its own, or the one that the config.py of a workdir names."""
    for line in text.partition(MARK)[2].splitlines():
        if line.startswith(FOLDER):
            return ast.literal_eval(line.removeprefix(FOLDER))
    return str(file.resolve().parent)
