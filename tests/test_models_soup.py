"""Soups: the mean of several folders' weights, wherever a model is named; SALSA's reference."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from alignax import cli
from alignax.cli import commands
from alignax.config import load_experiment
from alignax.mesh import make_mesh
from alignax.models import hf, transformer
from alignax.run.opening import open_source
from alignax.run.prepare import prepare
from alignax.run.start import fingerprint, start

ONE = make_mesh({}, jax.devices()[:1])


def noisy(folder: Path, out: Path, seed: int) -> Path:
    """Another fine-tune of the same model: every leaf moved, norms and embedding too."""
    source, rng = hf.open_folder(folder), np.random.default_rng(seed)
    move = lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32))
    hf.export(jax.tree.map(move, hf.load_params(source, ONE)), source, out)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The overrides of a run, and a second fine-tune beside its model."""
    here = tmp_path_factory.mktemp("world")
    fields = runs.world(here)
    return fields | {"other": str(noisy(here / "model", here / "other", 0))}


@pytest.fixture(scope="module")
def loaded(world):
    """The two models and their mean."""
    return [load(text) for text in (world["model.path"], world["other"], mean_of(world, 0.5))]


def mean_of(fields, share: float) -> str:
    return f"{fields['model.path']}@{share},{fields['other']}@{1 - share}"


def load(text: str, mesh=ONE):
    return hf.load_params(open_source(text, "model.path"), mesh)


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_half_and_half_is_the_elementwise_mean_on_any_mesh(world, loaded):
    a, b, soup = (jax.tree.map(np.asarray, params) for params in loaded)
    assert all(np.abs(x - y).max() > 0.1 for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    equal(soup, jax.tree.map(lambda x, y: (x + y) / 2, a, b))
    equal(load(mean_of(world, 0.5), make_mesh({"fsdp": 4, "tensor": 2})), soup)
    equal(load(mean_of(world, 0.25)), jax.tree.map(lambda x, y: np.float32(0.25) * x + np.float32(0.75) * y, a, b))


def test_the_whole_share_is_the_folder_to_the_bit(world, loaded):
    bits = lambda params: jax.tree.map(lambda x: np.asarray(x).view(np.uint32), params)
    for name, params in zip(("model.path", "other"), loaded, strict=False):
        equal(bits(load(f"{world[name]}@1")), bits(params))


def test_folders_are_read_together_layer_by_layer(world, monkeypatch):
    reads, read_part = [], hf.read_part
    monkeypatch.setattr(hf, "read_part", lambda opened, stored, *rest: (reads.append(stored), read_part(opened, stored, *rest))[1])
    load(mean_of(world, 0.5))
    first, second = reads[::2], reads[1::2]
    assert len(reads) > 20 and [s.name for s in first] == [s.name for s in second]
    assert {s.file.parent.name for s in first} == {"model"} and {s.file.parent.name for s in second} == {"other"}


def test_a_soup_of_reward_models_averages_head_and_offset(world, loaded, tmp_path):
    source = hf.with_heads(hf.open_folder(world["model.path"]), 1)
    for params, value in zip(loaded, (1.0, 2.0), strict=False):
        head = {"score": jnp.full((32, 1), value), "score_offset": jnp.full((1,), -value)}
        hf.export(params | head, source, tmp_path / f"rm{value:.0f}")
    soup = load(f"{tmp_path}/rm1@0.5,{tmp_path}/rm2@0.5")
    equal(soup, loaded[2] | {"score": np.full((32, 1), 1.5), "score_offset": np.full((1,), -1.5)})


def begun(fields, workdir: Path, **changes):
    fields = {name: x for name, x in fields.items() if name != "other"} | {"workdir": workdir} | changes
    return start(prepare(load_experiment(runs.REPO / "experiments" / "dpo_hh.py", [f"{k}={v}" for k, v in fields.items()])), write=False)


@pytest.mark.slow
def test_a_policy_is_away_from_its_soup_before_the_first_step(world, loaded, tmp_path):
    """KL(policy || soup) is above 0 at step 0, unlike that from a reference that the policy starts from."""
    started = begun(world, tmp_path / "run", **{"reference.path": mean_of(world, 0.5)})
    policy, other, soup = loaded
    assert started.about["reference"] == fingerprint(soup) != started.about["policy"] == fingerprint(policy)
    equal(started.held["reference"], soup)

    batch = tiny.batch(B=2, T=12)

    @jax.jit
    def kl(reference):  # nats a token, over the whole vocabulary
        out = transformer.forward(tiny.MODEL, remat="none", teacher=(tiny.MODEL, policy))(reference, batch)
        return out.ref_kl.sum() / batch["completion_mask"].sum()

    assert abs(kl(policy)) < 1e-6 and kl(soup) > 0.01
    assert kl(other) > kl(soup)  # the soup lies between


def test_export_generate_and_check_data_take_a_soup(world, loaded, tmp_path, capsys, monkeypatch):
    soup, out = mean_of(world, 0.5), tmp_path / "out"
    assert cli.main(["export", soup, str(out)]) == 0
    assert f"the mean {soup} is in {out}, in float32" in capsys.readouterr().out
    equal(load(str(out)), loaded[2])
    assert (out / "tokenizer.json").read_bytes() == (Path(world["model.path"]) / "tokenizer.json").read_bytes()
    (tmp_path / "prompts.txt").write_text("Is it so?\n")
    given = []
    monkeypatch.setattr(commands.console, "answer", lambda generator, params, *rest: given.append(params))
    assert cli.main(["generate", soup, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    equal(given[0], loaded[2])
    fields = {name: world[name] for name in ("data.train", "data.eval")} | {"model.path": soup}
    assert cli.main(["check-data", *runs.arguments(fields)[1:]]) == 0


def test_a_soup_needs_folders_that_are_alike(world, tmp_path):
    other = Path(shutil.copytree(world["other"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match=r"other' has another shape or vocabulary than .*model'"):
        load(f"{world['model.path']}@0.5,{other}@0.5")
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"a"', '"é"'))
    with pytest.raises(ValueError, match=r"other' has another tokenizer than .*model'"):
        load(f"{world['model.path']}@0.5,{other}@0.5")
