"""`import alignax` imports little, asks for no device and needs no torch."""

import os
import subprocess
import sys

CODE = """
import sys
import alignax
heavy = {"torch", "transformers", "datasets", "orbax", "tensorboardX", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_light():
    # On a platform that does not exist, whoever asks for a device fails.
    subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"JAX_PLATFORMS": "nowhere"}, check=True, timeout=60)
