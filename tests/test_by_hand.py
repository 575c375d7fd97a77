"""docs/by_hand.md: each block runs as it stands, in 30 lines, on names of `alignax` alone, and learns."""

import ast
import contextlib
import io
import re

import numpy as np
import pytest
import runs

from alignax import load_experiment, prepare, start

BLOCKS = dict(re.findall(r"^## (\w+)$.*?^```python\n(.*?)^```", (runs.REPO / "docs" / "by_hand.md").read_text(), re.S | re.M))

EXPERIMENT = """
import optax

from alignax import chain, default_config, dpo, logps


def get_config():
    config = default_config()
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.samples = config.eval.sample_prompts = 0
    config.log.tensorboard = config.export.final = False
    return config


def loss(config):
    return dpo(beta=0.1)


def experience(config, reference):
    return chain(logps("ref_logps", reference))


def optimizer(config, schedule):
    return optax.adamw(1e-3)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the blocks read: `model` and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("world")
    runs.world(folder)
    (folder / "mine.py").write_text(EXPERIMENT)
    return folder


def printed(name: str, world, monkeypatch) -> np.ndarray:
    """The numbers that a block prints, a step a row."""
    monkeypatch.chdir(world)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(BLOCKS[name], f"{name} of docs/by_hand.md", "exec"), {})
    return np.loadtxt(said.getvalue().splitlines())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_short_and_imports_nothing_deep(name):
    assert len([line for line in BLOCKS[name].splitlines() if line.strip()]) <= 30
    imported = [node for node in ast.walk(ast.parse(BLOCKS[name])) if isinstance(node, ast.ImportFrom)]
    assert imported and all(node.module == "alignax" for node in imported)


@pytest.mark.slow
def test_dpo_is_that_of_a_run(world, monkeypatch):
    """The losses by hand are those that the run logs: the same batches, forward pass and step."""
    found = printed("DPO", world, monkeypatch)
    assert found[0, 1] == pytest.approx(np.log(2), abs=1e-6) and found[-3:, 1].mean() < 0.5
    assert found[0, 2] == 0 and found[-3:, 2].mean() > 0.5
    before, after = printed("Run", world, monkeypatch)
    assert after < 0.5 < before
    rows = runs.losses(world / "run")
    np.testing.assert_allclose(found[:, 1], [rows[i + 1]["loss"] for i in range(24)], rtol=1e-5)
    np.testing.assert_allclose(found[:, 2], [rows[i + 1]["rewards/margins"] for i in range(24)], atol=1e-5)
    with pytest.raises(ValueError, match="belongs to another run"):
        start(prepare(load_experiment("mine.py", ["workdir=run", "model.path=model", "data.train=pairs.jsonl", "steps=9"])))


@pytest.mark.slow
@pytest.mark.long
def test_grpo_learns(world, monkeypatch):
    found = printed("GRPO", world, monkeypatch)
    assert found[-3:, 1].mean() > 5 * found[:3, 1].mean() and found[-3:, 1].mean() > 0.5
