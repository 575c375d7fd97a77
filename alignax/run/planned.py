"""A run beside its plan: what of the run is not what `alignax plan --json FILE` has planned."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignax.config import flat
from alignax.mesh import words
from alignax.placement import box_of, slices_of
from alignax.run.prepare import Run
from alignax.run.summary import sizes
from alignax.text import short

# Fields that no program depends on, and those of the mesh, which is compared as it is made.
LEFT = re.compile(r"workdir|seed|(log|export|mesh)\..*|data\.(train|eval|ood|pretrain|limit)|model\.init|.*\.path")
PACKAGES = ("alignax", "jax", "libtpu")


def facts(run: Run) -> dict[str, Any]:
    """What decides the programs of a run, as values for JSON: the devices, the mesh, the versions, the sizes and the config."""
    slices = slices_of(list(run.mesh.devices.flat))
    box = box_of(slices[0])
    found = {
        "chips": f"{len(slices)} x {len(slices[0])} {slices[0][0].device_kind}", "slice": None if box is None else box.sides,
        "mesh": words(run.mesh), "parameters": sizes(run), "rows": run.data.train.length, "config": flat(run.config),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }  # fmt: skip
    return json.loads(json.dumps(found, default=str))


def read(file: Path) -> dict[str, Any]:
    """The plan in a file of `alignax plan --json FILE`.

    Raises:
      ValueError: for a file that is no plan.
    """
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(plan["facts"]["config"], dict) and isinstance(plan["programs"], dict):
            return plan
    except OSError as e:
        raise ValueError(f"--plan {short(str(file))} cannot be read ({e.strerror or e}); give a file of `alignax plan --json FILE`") from e
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--plan {short(str(file))} is no plan; give a file of `alignax plan --json FILE`")


def differences(plan: dict[str, Any], run: Run) -> Iterator[str]:
    """What of a run is not as planned, a line each: "mesh.fsdp is 8, planned was 16"; and programs that do not fit by the plan."""
    then, now = plan["facts"], facts(run)
    for name in sorted({*then, *now} - {"config", "versions"}):
        yield from told(name, then.get(name), now.get(name))
    for what, shown in (("versions", "the version of {}"), ("config", "{}")):
        old, new = then.get(what, {}), now[what]
        for name in sorted({*old, *new}):
            if not LEFT.fullmatch(name):
                yield from told(shown.format(name), old.get(name), new.get(name))
    for name, program in plan["programs"].items():
        if not program.get("fits", True):
            yield f"the program {name} does not fit into a chip, by the plan"


def told(name: str, then: Any, now: Any) -> Iterator[str]:
    """A line, if two values differ."""
    if then != now:
        yield f"{name} is {short(now)}, planned was {short(then)}"
