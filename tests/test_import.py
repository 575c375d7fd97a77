"""`import alignax` imports little, asks for no device and needs no torch."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

import alignax
from alignax import experience, losses, moved, public
from alignax.config import BadInput, load_experiment

CODE = """
import sys
import alignax
assert not {"jax", "numpy"} & set(sys.modules), "a module is imported when it is asked for"
assert alignax.dpo is alignax.losses.dpo and alignax.train.make_step is alignax.make_step and not hasattr(alignax, "absent")
assert "train" not in alignax.__all__ and {"dpo", "losses", "__version__"} <= set(dir(alignax))
from alignax import *
assert sft is alignax.sft and losses.kl_k3 and fit is alignax.fit
heavy = {"torch", "transformers", "datasets", "orbax", "tensorboardX", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_light():
    # On a platform that does not exist, whoever asks for a device fails.
    subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"JAX_PLATFORMS": "nowhere"}, check=True, timeout=60)


NAMESPACES = ("losses", "experience", "generate", "rewards", "data")


def test_no_exported_name_is_that_of_a_module():
    """If both had one name, `alignax.NAME` would be the module, as it is for namespaces."""
    modules = {module.name for module in pkgutil.iter_modules(alignax.__path__)}
    assert modules & set(alignax.__all__) == set(NAMESPACES) and len(alignax.__all__) < 60
    assert set(alignax.__all__) == {name for name in vars(public) if not name.startswith("_")}, "what is imported there is exported"


def test_no_two_public_things_have_one_name():
    places = {"alignax": public} | {name: vars(public)[name] for name in NAMESPACES}
    every = {}
    for place, module in places.items():
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert every.setdefault(name, getattr(module, name)) is getattr(module, name), (place, name)
    for module in (losses, experience):
        assert set(module.__all__) == {name for name, x in vars(module).items() if not (name.startswith("_") or inspect.ismodule(x))}


def test_names_that_alignax_had_are_found_in_their_places():
    """Older experiment files use the former names."""
    former = {name: place for name, place in moved.offered().items() if name not in alignax.__all__}
    assert former["kl_k3"] == "alignax.losses" and former["swa"] == "alignax.averages" and former["median"] == "alignax.experience"
    for name, place in former.items():
        with pytest.warns(DeprecationWarning, match=rf"alignax\.{name} is {place}\.{name}: import it from there") as told:
            assert getattr(alignax, name) is getattr(importlib.import_module(place), name)
        assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="alignax.kl_k3 is"):
        exec("from alignax import kl_k3", names := {})
    assert names["kl_k3"] is losses.kl_k3


STAR = "from alignax import *\n\ndef get_config():\n    return default_config()\n\ndef loss(config):\n    return sft()\n"


def test_a_file_that_imports_everything_has_only_the_functions_that_it_defines(tmp_path):
    """A namespace counts as no experience; a name that `import *` no longer brings is reported with its place."""
    file = tmp_path / "mine.py"
    file.write_text(STAR)
    assert load_experiment(file).experience is None
    file.write_text(STAR + "\nPENALTY = kl_k3()\n")
    with pytest.raises(BadInput, match=r"line 9: NameError: .*; it is alignax\.losses\.kl_k3: import it from there"):
        load_experiment(file)


def test_modules_are_found_by_their_former_names():
    """Older experiment files import the former names; both names give the same module."""
    for name, place in moved.PLACES.items():
        with pytest.warns(DeprecationWarning, match=rf"alignax\.{name} has moved: import alignax\.{place}"):
            sys.modules.pop(f"alignax.{name}", None)
            assert importlib.import_module(f"alignax.{name}") is importlib.import_module(f"alignax.{place}")
        vars(alignax).pop(name, None)
    with pytest.raises(ModuleNotFoundError, match="alignax.absent"):
        importlib.import_module("alignax.absent")


def test_a_former_module_does_not_take_the_place_of_a_function():
    for name in moved.FUNCTIONS:
        place = importlib.import_module(f"alignax.{moved.PLACES[name]}")
        with pytest.warns(DeprecationWarning, match=rf"alignax\.{name} has moved"):
            sys.modules.pop(f"alignax.{name}", None)
            exec(f"from alignax.{name} import {name}", names := {})
        assert names[name] is getattr(alignax, name) is getattr(place, name)
