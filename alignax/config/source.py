"""The text of an experiment file: the user's part, and the part that a run appends in its workdir."""

import ast
from pathlib import Path

from alignax.config.blame import BadInput

MARK = "# --- the effective config of this run; alignax wrote this part ---"
FOLDER = "_modules_lie_in = "  # prefix of the line that holds the folder of the experiment's modules
MODULES = "_modules_were = "  # prefix of the line that holds the imported modules: name -> digest of its code


def of_run(file: Path) -> bool:
    """Whether a run wrote this file; only its text is read, so that code of an unknown folder never runs."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace").splitlines()


def read_source(file: Path) -> str:
    """The text of a Python file in UTF-8, without its byte order mark.

    Raises:
      BadInput: for other encodings.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e


def modules_were(text: str) -> dict[str, str] | None:
    """The modules that a run's experiment imported when the run began, name -> digest; None for the text of a file that no run wrote."""
    for line in text.partition(MARK)[2].splitlines():
        if line.startswith(MODULES):
            return ast.literal_eval(line.removeprefix(MODULES))
    return None


def imports_from(file: Path, text: str) -> str:
    """The folder that an experiment imports its modules from: the file's own, or the one that a workdir's config.py names."""
    for line in text.partition(MARK)[2].splitlines():
        if line.startswith(FOLDER):
            return ast.literal_eval(line.removeprefix(FOLDER))
    return str(file.resolve().parent)
