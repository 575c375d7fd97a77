"""The small files of a model folder beside its config.json: tokenizer, templates, generation config."""

from pathlib import Path
from typing import Any

from alignax import output
from alignax.models.tensorfiles import read_object
from alignax.paths import SMALL


def tokenizer_parts(folder: Path) -> list[Any]:
    """The parts that identify a folder's tokenizer: the content of its vocabulary files, and its BOS and EOS.

    If there is a tokenizer.json it alone counts, because the other vocabulary files are its sources.
    """
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")]
    there = [file.read_bytes() for file in files if file.is_file()]
    config = folder / "tokenizer_config.json"
    fields = read_object(config, "fetch the model folder again") if config.is_file() else {}
    ends = [fields.get(name) for name in ("bos_token", "eos_token")]
    return [*(there[:1] if files[0].is_file() else there), *(end.get("content") if isinstance(end, dict) else end for end in ends)]


def chat_template(folder: Path) -> Any:
    """The chat template in a model folder's files, or None."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return read_object(config, "fetch the model folder again").get("chat_template") if config.is_file() else None


def small_files(folder: Path) -> list[Path]:
    """The small files of a folder that an export copies: tokenizer, chat templates and generation config.

    Raises:
      ValueError: for a link to a file outside the folder, because an export would copy that file. Links of the hub's cache are allowed.
    """
    found = []
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]):
        small = file.suffix in SMALL
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
    """Copies a folder's small files, unchanged, into another folder."""
    for file in small_files(folder):
        copy = out / "/".join(file.relative_to(folder).parts)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
