"""Modules by the names that they once had: `import alignax.rules` imports `alignax.rewards.rules`, with a warning that says so."""

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PLACES = {
    "blame": "config.blame", "calls": "host.calls", "checkpoint": "run.checkpoint", "checks": "run.checks", "commands": "cli.commands",
    "comparison": "cli.comparison", "defaults": "config.defaults", "ensemble": "rewards.members", "evaluate": "run.evaluation",
    "fit": "run.loop", "functions": "host.functions", "host_rewards": "run.host_rewards", "judges": "rewards.judge", "metrics": "run.log",
    "online": "run.online", "overrides": "config.overrides", "plan": "run.plan", "prepare": "run.prepare",
    "reference": "run.reference_cache", "reward_commands": "cli.reward_commands", "ridge": "rewards.ridge", "rollout": "run.rollout",
    "routed": "rewards.routed", "rules": "rewards.rules", "saved": "run.saved", "start": "run.start", "workers": "host.workers",
}  # fmt: skip


class Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of `PLACES` by its former name."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for a former name, None for every other."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "alignax" and name in PLACES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module in its present place."""
        place = "alignax." + PLACES[spec.name.rpartition(".")[2]]
        warnings.warn(f"{spec.name} has moved: import {place}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(place)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module has run. Its own spec comes back, which the import has replaced."""
        module.__spec__ = self.own


def install() -> None:
    """Lets imports find former names, behind all others."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
