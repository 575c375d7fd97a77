"""Runs with packed rows: they are those with padded rows, and go on bit for bit; which runs pack by themselves."""

import json
import signal
from typing import Any

import jax
import numpy as np
import pytest
import runs
import test_resume
from test_run_online import GRPO, arguments

from alignax.config import load_experiment
from alignax.data import evaluation_batch
from alignax.mesh import make_mesh
from alignax.packing import Packing, sizes
from alignax.run.prepare import PAYS, prepare, real_share

SHORT = {"steps": 6, "eval.every": 3, "log.every": 1}
ONLINE = {"rollout.samples": 3, "rollout.max_new_tokens": 6, "rollout.minibatches": 2, "data.kind": "prompt", "steps": 8, "eval.every": 4}
ENSEMBLE = {"model.num_labels": 1, "ensemble.members": 2, "eval.samples": 0, "eval.sample_prompts": 0}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world")) | SHORT


def prompts(folder) -> dict[str, str]:
    """Prompts of different lengths, and a number for each."""
    rows = [{"prompt": f"the {word} of" + " the" * (i % 5), "weight": 1.0 + i % 2} for i, word in enumerate(["sun", "moon", "tree"] * 8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.train": str(folder / "prompts.jsonl"), "data.eval": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "context"),
    [("dpo", 1), ("dpo", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (("grpo", 1), ("grpo", 2), ("ensemble", 1)))],
)
def test_a_packed_run_is_the_padded_one(method, context, fields, tmp_path):
    """Losses, metrics and evaluations, on a mesh with a context axis too; a packed run logs how full its rows were."""

    def begun(name: str, positions: int):
        own = {"workdir": tmp_path / name, "model.packing": positions, "mesh.context": context if positions > 0 else 1}
        env = runs.environment(own["mesh.context"])
        if method == "grpo":
            return runs.begin(arguments(tmp_path, GRPO, fields | ONLINE | prompts(tmp_path) | own), env)
        ensemble = method == "ensemble"
        return runs.begin(runs.arguments(fields | own | (ENSEMBLE if ensemble else {}), "rm_hh" if ensemble else "dpo_hh"), env)

    for process in [begun("padded", -1), begun("packed", 128)]:
        runs.finish(process)
    padded, packed = runs.losses(tmp_path / "padded"), runs.losses(tmp_path / "packed")
    assert list(padded) == list(packed) and len(padded) >= 4
    for step, expected in padded.items():
        assert "packed_positions" not in expected and 0.2 < packed[step].pop("packed_positions") <= 1
        compared(packed[step], expected)
    for found, expected in zip(*map(runs.evaluations, (tmp_path / "packed", tmp_path / "padded")), strict=True):
        compared(found, expected)


def test_padded_rows_have_no_context_axis(fields, tmp_path):
    run = lambda **own: prepare(
        load_experiment(runs.REPO / "experiments" / "dpo_hh.py", [f"{k.replace('__', '.')}={x}" for k, x in (fields | own).items()])
    )
    with pytest.raises(
        ValueError, match=r"model.packing=-1 pads rows, and mesh.context=2 shards packed rows only; use model.packing=0, or "
    ):
        run(workdir=tmp_path / "run", mesh__context=2, model__packing=-1)
    assert run(workdir=tmp_path / "run", mesh__context=2).packing.unit == 256


def compared(found: dict, expected: dict) -> None:
    timed = ("time/", "tokens_per_second", "compilations", "memory")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if not name.startswith(timed):
            assert found[name] == pytest.approx(x, rel=1e-5, abs=1e-5), name


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("positions", [128, -1])
def test_a_stopped_run_goes_on_packed(positions, fields, tmp_path):
    """Bit for bit if its rows were packed before too, to rounding if they were padded."""
    own = fields | {"steps": 12, "checkpoint.every": 2, "eval.every": 6}
    args = lambda name, positions: runs.arguments(own | {"workdir": tmp_path / name, "model.packing": positions})
    whole, process = runs.begin(args("whole", 128)), runs.begin(args("parts", positions))
    log = tmp_path / "parts" / "metrics.jsonl"
    assert runs.stop_when(process, lambda: log.exists() and len(runs.losses(log.parent)) >= 3, signal.SIGTERM)
    runs.finish(process, code=143)
    runs.finish(whole)
    assert "going on after step" in runs.finish(runs.begin(args("parts", 128)))
    (test_resume.same if positions > 0 else test_resume.close)(tmp_path / "whole", tmp_path / "parts")


def test_runs_pack_where_it_pays(fields, tmp_path):
    """By default rows of data are packed if they leave much of their positions empty; how much of them they fill is counted on all rows."""
    one = make_mesh({}, jax.devices()[:1])

    def prepared(**own):
        given = {"workdir": tmp_path / "run", "mesh.data": 1} | {name.replace("__", "."): x for name, x in own.items()}
        return prepare(load_experiment(runs.REPO / "experiments" / "dpo_hh.py", [f"{k}={x}" for k, x in (fields | given).items()]), one)

    run = prepared()
    examples, T = run.data.train.examples, run.data.train.length
    batch: Any = evaluation_batch(examples, 0, len(examples), T)
    for shared in (True, False):
        np.testing.assert_allclose(real_share(examples, T, shared), sizes(batch, shared).sum() / batch["mask"].size, rtol=1e-6)
        assert real_share(examples, 4 * T, shared) == real_share(examples, T, shared) / 4
    assert (run.packing is not None) == (real_share(examples, T, True) < PAYS["cpu"])
    assert run.packing in (None, Packing(8 * 2 * T, one)), "the positions of the padded batch, which are below 1,024"
    assert prepared(model__packing=-1).packing is None and prepared(model__packing=100).packing == Packing(100, one)
