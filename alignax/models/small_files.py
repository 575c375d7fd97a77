"""The small files of a model folder beside its config.json: tokenizer, templates, generation config."""

import shutil
from pathlib import Path
from typing import Any

from alignax import output
from alignax.models.tensorfiles import read_object


def tokenizer_parts(folder: Path) -> list[Any]:
    """What tells the folder's tokenizer from another: its first file of a vocabulary (others are that one's sources), and its two ends."""
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")]
    there = [file.read_bytes() for file in files if file.is_file()]
    config = folder / "tokenizer_config.json"
    fields = read_object(config, "fetch the model folder again") if config.is_file() else {}
    ends = [fields.get(name) for name in ("bos_token", "eos_token")]
    return [*(there[:1] if files[0].is_file() else there), *(end.get("content") if isinstance(end, dict) else end for end in ends)]


def chat_template(folder: Path) -> Any:
    """The chat template that a folder's files hold; None of none."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return read_object(config, "fetch the model folder again").get("chat_template") if config.is_file() else None


def small_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template and generation config, which an export takes along.

    Raises:
      ValueError: for a link to a file elsewhere, which an export would hold: only those of the hub's cache are followed.
    """
    found = []
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]):
        small = file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
        if file.is_file() and small and file.name not in ("config.json", output.MARK) and not file.name.endswith(".index.json"):
            _check_link(file, folder)
            found.append(file)
    return found


def _check_link(file: Path, folder: Path) -> None:
    target, root = file.resolve(), folder.resolve()
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or cached):
        raise ValueError(f"{file} is a link out of its folder, to {str(target)!r}; put a copy of the file in its place, or remove the link")


def copy_small_files(folder: Path, out: Path) -> None:
    """The small files as they were."""
    for file in small_files(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
