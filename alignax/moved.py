"""Former names of modules and functions: they still work, with a warning that says the present name.

For example, `import alignax.rules` imports `alignax.rewards.rules`, and `alignax.kl_k3` is `alignax.losses.kl_k3`.
"""

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOMES = ("losses", "experience", "averages")  # modules whose names were all names of `alignax` once
PLACES = {
    "blame": "config.blame", "calls": "host.calls", "checkpoint": "run.checkpoint", "checks": "run.checks", "commands": "cli.commands",
    "comparison": "cli.comparison", "defaults": "config.defaults", "ensemble": "rewards.members", "evaluate": "run.evaluation",
    "fit": "run.loop", "functions": "host.functions", "host_rewards": "run.host_rewards", "judges": "rewards.judge", "metrics": "run.log",
    "online": "run.online", "overrides": "config.overrides", "plan": "run.plan", "prepare": "run.prepare",
    "reference": "run.reference_cache", "reward_commands": "cli.reward_commands", "ridge": "rewards.ridge", "rollout": "run.rollout",
    "routed": "rewards.routed", "rules": "rewards.rules", "saved": "run.saved", "start": "run.start", "workers": "host.workers",
}  # fmt: skip
FUNCTIONS = ("fit", "prepare", "start")  # former modules with the names of functions of `alignax`


class Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import finder and loader for the former names of modules in `PLACES`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module with a former name; None for any other name."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "alignax" and name in PLACES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Imports the module from its present place, with a warning."""
        place = "alignax." + PLACES[spec.name.rpartition(".")[2]]
        warnings.warn(f"{spec.name} has moved: import {place}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(place)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restores the module's own spec, which the import has replaced. The module has run already."""
        module.__spec__ = self.own


def offered() -> dict[str, str]:
    """The public names of the modules in `HOMES`, each with its module."""
    return {name: f"alignax.{home}" for home in HOMES for name in importlib.import_module(f"alignax.{home}").__all__}


def found(name: str) -> Any:
    """A moved module, or a public name of a module in `HOMES`, looked up as an attribute of `alignax`."""
    if name in PLACES:
        return importlib.import_module(f"alignax.{name}")
    if (home := offered().get(name)) is None:
        raise AttributeError(f"module 'alignax' has no attribute {name!r}")
    warnings.warn(f"alignax.{name} is {home}.{name}: import it from there", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), name)


class Package(ModuleType):
    """The package `alignax`, whose functions stay where they are: `from alignax.fit import fit` binds no module to `alignax.fit`."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, unless a former module would replace a function."""
        if not (name in FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def install() -> None:
    """Makes imports find former names, after all other names."""
    sys.modules["alignax"].__class__ = Package
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
