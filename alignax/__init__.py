"""Align language models with JAX on TPU and GPU meshes."""

import importlib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignax import moved

if TYPE_CHECKING:
    from alignax.public import *  # noqa: F403

__version__ = "0.1.0"
moved.install()


def __getattr__(name: str) -> Any:
    """A module of the library, a name of `alignax.public`, or a former name, see `alignax.moved`; imported when it is first used.

    Importing jax takes a second, and the command line must handle Ctrl-C before.
    """
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'alignax' has no attribute {name!r}")
    if PathFinder.find_spec(f"alignax.{name}", [str(Path(__file__).parent)]) is not None:
        return importlib.import_module(f"alignax.{name}")
    public = importlib.import_module("alignax.public")
    return getattr(public, name) if name in (*public.__all__, "__all__") else moved.found(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("alignax.public").__all__})
