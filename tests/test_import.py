"""`import alignax` imports little, asks for no device and needs no torch."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

import alignax
from alignax import moved, public

CODE = """
import sys
import alignax
assert not {"jax", "numpy"} & set(sys.modules), "a module is imported when it is asked for"
assert alignax.dpo is alignax.losses.dpo and alignax.train.make_step is alignax.make_step and not hasattr(alignax, "absent")
assert "train" not in alignax.__all__ and {"dpo", "__version__"} <= set(dir(alignax))
from alignax import *
assert sft is alignax.sft
heavy = {"torch", "transformers", "datasets", "orbax", "tensorboardX", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_light():
    # On a platform that does not exist, whoever asks for a device fails.
    subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"JAX_PLATFORMS": "nowhere"}, check=True, timeout=60)


def test_no_exported_name_is_that_of_a_module():
    """`alignax.NAME` would be the module."""
    modules = {module.name for module in pkgutil.iter_modules(alignax.__path__)}
    assert not modules & set(alignax.__all__)
    assert set(alignax.__all__) == {name for name in vars(public) if not name.startswith("_")}, "what is imported there is exported"


def test_modules_are_found_by_their_former_names():
    """As experiment files of before import them; a module is the same one, by either name."""
    for name, place in moved.PLACES.items():
        with pytest.warns(DeprecationWarning, match=rf"alignax\.{name} has moved: import alignax\.{place}"):
            sys.modules.pop(f"alignax.{name}", None)
            assert importlib.import_module(f"alignax.{name}") is importlib.import_module(f"alignax.{place}")
        vars(alignax).pop(name)
    with pytest.raises(ModuleNotFoundError, match="alignax.absent"):
        importlib.import_module("alignax.absent")
