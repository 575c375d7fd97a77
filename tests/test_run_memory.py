"""The policy that `model.remat` "auto" chooses: by estimates, which rise with what is kept, against the memory of a device."""

from typing import Any

import pytest
import runs

from alignax.config import load_experiment
from alignax.run import memory, plan
from alignax.run.prepare import prepare
from alignax.run.summary import remat


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return runs.world(folder) | {"workdir": folder / "run", "model.remat": "auto"}


def prepared(fields: dict, experiment: str = "dpo_hh", **more: Any):
    return prepare(load_experiment(runs.REPO / f"experiments/{experiment}.py", [f"{k}={v}" for k, v in (fields | more).items()]))


def test_auto_is_full_on_a_cpu(fields):
    run = prepared(fields)
    assert run.config.model.remat == "full" and remat(run) == ["remat: full, since the memory of 'cpu' is shared"]


@pytest.mark.slow
def test_auto_takes_the_cheapest_policy_that_fits(fields, monkeypatch):
    run = prepared(fields, **{"model.remat": "dots"})
    assert remat(run) == [] and run.config.model.remat == "dots"
    shape = memory.part_shape(run.config, run.mesh, run.packing, 2, run.train.length)
    sizes = {name: memory.estimate(name, run.config, run.roles, run.mesh, run.learning.optimizer, 0, shape) for name in memory.CHEAPEST}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values()) and len(set(sizes.values())) == 4
    for name, size in sizes.items():
        monkeypatch.setattr(memory, "capacity", lambda mesh, size=size: 1.001 * size / memory.SHARE)
        found = prepared(fields)
        assert found.config.model.remat == found.experiment.config.model.remat == name
        assert found.remat.startswith(f"{name}, of ") and f"{name} {size / 1e9:.1f}" in found.remat
    monkeypatch.setattr(memory, "capacity", lambda mesh: 1.0)
    assert prepared(fields).config.model.remat == "full"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "none", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("dots", "attention"))])
def test_an_estimate_is_near_what_the_compiler_takes(kind, fields):
    """Of one device, with a model and rows that are not all too small: between 0.7 and 2 of arguments and temporaries together."""
    run = prepared(fields, **{"model.remat": kind, "model.packing": -1, "batch_size": 64, "mesh.data": 8, "model.logps_chunk": 8})
    shape = memory.part_shape(run.config, run.mesh, run.packing, 2, run.train.length)
    found = memory.estimate(kind, run.config, run.roles, run.mesh, run.learning.optimizer, 0, shape)
    compiled = plan.compile_step(run).memory_analysis()
    print(kind, found, compiled)
    assert 0.7 < found / (compiled.argument_size_in_bytes + compiled.temp_size_in_bytes) < 2
