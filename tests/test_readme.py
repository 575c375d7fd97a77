"""What the README shows runs, and what it names exists."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
import runs
import tiny

from alignax import Model, chain, init_state, logps, make_step
from alignax.config import default_config, flat
from alignax.mesh import make_mesh
from alignax.models import parameters

README = (runs.REPO / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run_block(index: int) -> dict:
    names: dict = {"jnp": jnp}
    exec(compile(BLOCKS[index], "README.md", "exec"), names)
    return names


def test_the_first_example_is_rpo():
    names = run_block(0)
    loss = names["loss"](None)
    assert [(c, term.name) for c, term in loss.terms] == [(1.0, "dpo"), (0.005 * 0.1, "sft")]
    params = tiny.params()
    batch = names["experience"](None, Model(tiny.plain_apply, tiny.plain_params()))(tiny.batch())
    assert batch["ref_logps"].shape == batch["tokens"].shape and params


@pytest.mark.slow
def test_kto_scores_mismatched_responses():
    names = run_block(1)
    models = (Model(tiny.plain_apply, tiny.plain_params(seed=seed)) for seed in (0, 1))
    batch = names["experience"](None, *models)(tiny.batch(4, N=1))
    assert batch["kto_kl"].shape == (4,) and [term.name for _, term in names["loss"](None).terms][0] == "kto"


def test_the_whole_experiment_file_runs(tmp_path, capsys):
    from alignax.cli import main

    (tmp_path / "mine.py").write_text(BLOCKS[2])
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run"}
    assert main(["train", "--config", str(tmp_path / "mine.py"), *(f"--config.{k}={v}" for k, v in fields.items()), "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out


def test_a_loss_of_ones_own():
    hinge = run_block(2)["squared_hinge"]
    params = tiny.plain_params()
    batch = chain(logps("ref_logps", Model(tiny.plain_apply, params)))(tiny.batch())
    step = make_step(tiny.plain_apply, hinge(), optax.sgd(0.1), microbatches=2)
    _, metrics = step(init_state(params, optax.sgd(0.1), jax.random.key(0)), batch)
    assert float(metrics["loss"]) == pytest.approx(1.0), "policy = reference"


def test_averages():
    assert set(run_block(4)["averages"](None)) == {"ema", "reference"}


@pytest.mark.slow
def test_generation():
    mesh = make_mesh({"fsdp": -1})
    layout = jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh))
    block = BLOCKS[5].replace("256", "8")  # positions of a tiny model
    names: dict = {"config": tiny.MODEL, "mesh": mesh, "params": jax.device_put(tiny.params(), layout), "eos": 2}
    names |= {"key": jax.random.key(0), "prompts": [[5, 6, 7], [8]]}
    exec(compile(block, "README.md", "exec"), names)
    assert names["batch"]["sampled_logps"].shape == (2, 8, 11)


def test_fields_files_and_targets_exist():
    fields = flat(default_config())
    own = ("data.template.", "models.")  # whose names are the template's, and the user's
    named = {name for name in re.findall(r"--config\.([a-z_.]+)", README) if not name.startswith(own)}
    assert named and named <= fields.keys() | {"beta"}, named - fields.keys()
    for path in re.findall(r"`((?:alignax|experiments|tpu)/[\w/]*\.?\w*)`", README):
        assert (runs.REPO / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (runs.REPO / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets
