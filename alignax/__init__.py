"""Align language models with JAX on TPU and GPU meshes."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from alignax import moved

if TYPE_CHECKING:
    from alignax.public import *  # noqa: F403

__version__ = "0.1.0"
moved.install()


def __getattr__(name: str) -> Any:
    """A module of the library, or one of the names of `alignax.public`.

    They are imported when they are asked for: jax takes a second, in which the command line must already know what Ctrl-C means.
    """
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'alignax' has no attribute {name!r}")
    if importlib.util.find_spec(f"alignax.{name}") is not None:
        return importlib.import_module(f"alignax.{name}")
    return getattr(importlib.import_module("alignax.public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("alignax.public").__all__})
