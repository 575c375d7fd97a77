"""The experiment on several attributes, by its command, on attributes that a linear head of the trunk gives."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from alignax import rewards
from alignax.cli import main
from alignax.config import default_config
from alignax.data import load_examples
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.tokenizers import load_tokenizer

ONE = make_mesh({}, jax.devices()[:1])
NAMES = ("help", "length", "never")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model's folder, and rows whose attributes a head on that model's trunk gives; half of them missing, of the third all."""
    here, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    folder = tiny.folder(here / "model")
    word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(2, 9)))
    rows = [{"prompt": f"Is {word()}?", "response": f" {word()} {word()}"} for _ in range(192)]
    (here / "bare.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = default_config().data
    data.kind, data.columns.completion = "sft", "response"
    examples = load_examples(here / "bare.jsonl", data, load_tokenizer(folder, 96), 96)[0]
    source = hf.with_heads(hf.open_folder(folder), 3)
    params = jax.tree.map(lambda x: x[None], hf.load_params(source, ONE, jax.random.key(9)))
    model = rewards.ensemble_model(source.config, params, ONE)
    scores = rewards.score_examples(model.apply, params, examples, ONE, 64, 48)[0, :, 0]  # [n, labels]
    for i, (row, y) in enumerate(zip(rows, scores.astype(float), strict=True)):
        given = rng.random(3) < (0.5 if i < 160 else 2.0)
        given[:2] |= not given[:2].any()
        row |= {name: y[j] if given[j] and j < 2 else None for j, name in enumerate(NAMES)}
    for name, part in (("train", rows[:160]), ("eval", rows[160:])):
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return here, np.asarray(params["score"][0]), scores


@pytest.mark.slow
def test_planted_attributes_are_recovered(planted, tmp_path):
    here, head, scores = planted
    fields = {
        "model.path": here / "model", "data.train": here / "train.jsonl", "data.eval": here / "eval.jsonl", "workdir": tmp_path / "run",
        "data.columns.attributes": ",".join(NAMES), "model.num_labels": 3, "model.freeze": True, "steps": 150, "batch_size": 32,
        "microbatches": 2, "optimizer.learning_rate": 0.05, "optimizer.schedule": "linear", "eval.every": 0, "log.tensorboard": False,
        "data.max_length": 48, "mesh.data": -1, "mesh.fsdp": 1,
    }  # fmt: skip
    assert main(runs.arguments(fields, "attributes_helpsteer")) == 0
    before, after = runs.evaluations(tmp_path / "run")
    for j, name in enumerate(NAMES[:2]):
        assert before[f"eval/loss/{name}"] > 0.3 and after[f"eval/loss/{name}"] < 0.1 * scores[160:, j].var(), name
        assert after[f"eval/errors/{name}"] < 0.2
    source = hf.open_folder(tmp_path / "run" / "export")
    trained = hf.load_params(source, ONE)["score"]
    first = hf.load_params(hf.with_heads(hf.open_folder(here / "model"), 3), ONE, jax.random.key(0))["score"]
    assert source.config.num_labels == 3 and after["eval/loss/never"] == 0.0
    np.testing.assert_array_equal(trained[:, 2], first[:, 2], err_msg="an attribute that nobody gave has no gradient")
    assert jnp.abs(trained - first)[:, :2].max() > 0.3


def test_labels_and_attributes_that_differ_are_refused(planted, tmp_path, capsys):
    here, _, _ = planted
    fields = {"model.path": here / "model", "data.train": here / "train.jsonl", "workdir": tmp_path / "run"}
    assert main(runs.arguments(fields | {"data.columns.attributes": "help,length"}, "attributes_helpsteer")) == 2
    assert "names 2 attributes, but the data have 2 and the model gives 5 scores" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
