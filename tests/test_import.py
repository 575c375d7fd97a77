"""`import alignax` imports little, asks for no device and needs no torch."""

import os
import pkgutil
import subprocess
import sys

import alignax
from alignax import public

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
