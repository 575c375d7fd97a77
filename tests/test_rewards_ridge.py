"""A head in closed form: numpy's least squares, a planted reward, and the command."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny

from alignax.cli import main
from alignax.config import default_config
from alignax.data import assemble, load_examples, padded_length
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.tokenizers import load_tokenizer
from alignax.models.transformer import Decoder
from alignax.rewards import ridge

ONE = make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trunk, rows of pairs, and the hidden states [n, 2, D] at their last tokens, taken from the decoder itself."""
    here, rng = tmp_path_factory.mktemp("ridge"), np.random.default_rng(0)
    folder = tiny.folder(here / "model")
    word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(2, 9)))
    rows = [{"prompt": f"Is {word()} {i}?", "chosen": f" {word()} {word()}", "rejected": f" {word()}"} for i in range(150)]
    examples = loaded(here, rows)
    batch = assemble(examples, np.arange(len(rows)), padded_length(examples))
    tokens, mask, scored = (batch[name].reshape(300, -1) for name in ("tokens", "mask", "completion_mask"))
    source = hf.with_heads(hf.open_folder(folder), 1)
    params = hf.load_params(source, ONE)
    hidden, _ = jax.jit(lambda p: Decoder(source.config).apply({"params": p}, tokens, mask))(params)
    last = scored.shape[1] - 1 - scored[:, ::-1].argmax(1)
    return here, rows, source, params, np.asarray(hidden, np.float64)[np.arange(300), last].reshape(150, 2, -1)


def loaded(here, rows, **columns):
    """Examples of the rows: pairs, or with a column of attributes single responses."""
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = default_config().data
    data.kind = "sft" if columns else "preference"
    data.columns.update(columns)
    return load_examples(here / "rows.jsonl", data, load_tokenizer(here / "model", 96), 96)[0]


def least_squares(x, y, penalty, intercept):
    """numpy's, on rows that add the penalty: sqrt(penalty) I, for which y is 0."""
    x = x - x.mean(0) * intercept
    D = x.shape[1]
    stacked = np.concatenate([x, np.sqrt(penalty) * np.eye(D)])
    return np.linalg.lstsq(stacked, np.concatenate([y - y.mean() * intercept, np.zeros(D)]), rcond=None)[0]


@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_it_is_numpys_least_squares(penalty, world):
    here, rows, source, params, h = world
    fitted = ridge.fit_ridge(source.config, params, loaded(here, rows), ONE, penalty=penalty, batch_size=64)
    expected = least_squares(h[:, 0] - h[:, 1], np.ones(150), penalty, intercept=False)
    np.testing.assert_allclose(fitted["score"][:, 0], expected, atol=2e-4 * np.abs(expected).max())
    assert fitted["score_offset"] == 0.0 and fitted["embed"] is params["embed"]


def test_a_planted_reward_is_recovered(world, tmp_path, capsys):
    """The command fits three attributes with an intercept; a third of the values of two attributes are missing."""
    here, rows, _, _, h = world
    rng = np.random.default_rng(1)
    head, intercept = rng.normal(size=(h.shape[2], 3)), np.array([2.0, -5.0, 0.5])
    y, given = h[:, 0] @ head + intercept, rng.random((150, 3)) > [0.0, 0.33, 0.33]
    rated = [
        row | {"y": [v if g else None for v, g in zip(*pair, strict=True)]} for row, *pair in zip(rows, y.tolist(), given, strict=True)
    ]
    loaded(here, rated, attributes="y")
    fields = {
        "model.path": here / "model", "data.train": here / "rows.jsonl", "data.kind": "sft", "data.columns.attributes": "y",
        "model.num_labels": 3,
    }  # fmt: skip
    args = [arg for arg in runs.arguments(fields, "rm_hh")[1:] if arg]
    assert main(["ridge", str(tmp_path / "out"), *args, "--penalty", "1e-3"]) == 0
    assert "a head of 3 scores, fitted to 150 examples" in capsys.readouterr().out
    source = hf.open_folder(tmp_path / "out")
    params = hf.load_params(source, ONE)
    np.testing.assert_allclose(params["score"], head, atol=0.02)
    np.testing.assert_allclose(-params["score_offset"], intercept, atol=0.02)
    for j in range(3):
        own = least_squares(h[given[:, j], 0], y[given[:, j], j], 1e-3, intercept=True)
        np.testing.assert_allclose(params["score"][:, j], own, atol=2e-3)


def test_pairs_that_a_planted_reward_orders_are_ordered(world):
    here, rows, source, params, h = world
    wins = (h @ np.random.default_rng(2).normal(size=h.shape[2])) @ [1, -1] > 0
    turned = [row if win else row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row, win in zip(rows, wins, strict=True)]
    fitted = ridge.fit_ridge(source.config, params, loaded(here, turned[:110]), ONE, batch_size=64)
    right = ((h[110:, 0] - h[110:, 1]) @ np.asarray(fitted["score"])[:, 0] > 0) == wins[110:]
    assert right.mean() > 0.8


def test_what_cannot_be_fitted(world, tmp_path, capsys):
    here, rows, source, params, _ = world
    fit = lambda source, examples, **how: ridge.fit_ridge(source.config, params, examples, ONE, **how)
    with pytest.raises(ValueError, match=r"the penalty is 0; it must be above 0"):
        fit(source, loaded(here, rows), penalty=0)
    with pytest.raises(ValueError, match=r"have 2 responses per prompt, and the model has 2 labels; set data\.kind"):
        fit(hf.with_heads(source, 2), loaded(here, rows))
    rated = loaded(here, [row | {"a": 1.0, "b": None} for row in rows], attributes="a,b")
    with pytest.raises(ValueError, match=r"the data have 2 attributes, but the model gives 1 scores; set model\.num_labels"):
        fit(source, rated)
    with pytest.raises(ValueError, match=r"no response has attribute 1 \(counted from 0\)"):
        fit(hf.with_heads(source, 2), rated)
    for args, message in (([], "needs --config FILE.py, such as experiments/rm_hh.py"), (["--penalty", "much"], "--penalty is 'much'")):
        assert main(["ridge", str(tmp_path / "out"), *args]) == 2
        assert message in capsys.readouterr().err


def test_what_ridge_does_not_read_is_refused(world, tmp_path, capsys):
    """The head is fitted to every row once, with the labels of the file: weights and label noise would say nothing."""
    here, rows, *_ = world
    for name in "ab":
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    given = {"model.path": here / "model", "data.train": f"{here}/a.jsonl@0.9,{here}/b.jsonl@0.1", "model.num_labels": 1}
    for more, message in (({}, "has weights, but ridge uses every row once"), ({"data.label_noise": 0.2}, "takes every label as it is")):
        assert main(["ridge", str(tmp_path / "out"), *runs.arguments(given | more, "rm_hh")[1:]]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
