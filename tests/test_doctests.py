"""The examples in docstrings of losses, experience and the training step print what they say."""

import doctest
import importlib
import pkgutil

import jax.numpy as jnp
import pytest
import runs

import alignax
from alignax import experience, losses, train

FOLDERS = (losses, experience)
MODULES = sorted(f"{folder.__name__}.{m.name}" for folder in FOLDERS for m in pkgutil.iter_modules(folder.__path__)) + [train.__name__]
ASSUMED = "Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`."
PLACES = (alignax, losses, experience)
NAMES = {"jnp": jnp} | {name: getattr(place, name) for place in PLACES for name in place.__all__}  # which examples assume


def examples(module: str) -> list[doctest.DocTest]:
    """A test of each docstring that has examples."""
    found = doctest.DocTestFinder().find(importlib.import_module(module), globs=NAMES)
    return [test for test in found if test.examples]


def test_there_are_examples():
    assert sum(len(examples(module)) for module in MODULES) >= 30


QUICK = [f"alignax.{name}" for name in ("experience.chain", "losses.algebra", "losses.preference", "losses.supervised")]


@pytest.mark.parametrize("module", runs.slow_but(MODULES, *QUICK))
def test_examples_print_what_they_say(module):
    runner, said = doctest.DocTestRunner(), []
    for test in examples(module):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_with_examples_says_what_they_assume(module):
    if any(not test.examples[0].source.startswith("from ") for test in examples(module)):
        assert "Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`." in str(
            importlib.import_module(module).__doc__
        )
