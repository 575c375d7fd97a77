"""Reward models at work: ensembles of folders, their scores, how good they are, and `alignax eval-rm`."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import torch
import transformers

from alignax import rewards
from alignax.cli import main
from alignax.config import default_config
from alignax.data import load_examples
from alignax.mesh import make_mesh
from alignax.models import hf, parameters
from alignax.models.tokenizers import load_tokenizer
from alignax.rewards.members import stacked
from alignax.run.opening import open_judges

ONE = make_mesh({}, jax.devices()[:1])
COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def reward_folder(path, seed: int, **changes):
    """A reward model's folder, made of a language model's."""
    folder = tiny.folder(path / f"lm{seed}", **changes)
    source = hf.with_heads(hf.open_folder(folder), 1)
    hf.export(hf.load_params(source, ONE, jax.random.key(seed)), source, path / f"rm{seed}")
    return path / f"rm{seed}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("members")
    return [reward_folder(here, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny.pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 21)


def examples_of(folder, pairs):
    data = default_config().data
    data.max_length = 48
    return load_examples(str(pairs), data, load_tokenizer(folder, 96), 96)[0]


def scored(folders, pairs, mesh=ONE):
    source, params = rewards.load_ensemble(folders, mesh)
    model = rewards.ensemble_model(source.config, params, mesh)
    return rewards.score_examples(model.apply, model.params, examples_of(folders[0], pairs), mesh, 8, 48)


@pytest.mark.slow
def test_an_ensemble_scores_as_its_members_alone_and_as_transformers(folders, pairs):
    scores = scored(folders, pairs)
    assert scores.shape == (3, 21, 2) and scores.std(axis=0).mean() > 0.1
    examples = examples_of(folders[0], pairs)
    for k, folder in enumerate(folders):
        np.testing.assert_allclose(scored([folder], pairs)[0], scores[k], atol=1e-6)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        for row, side in ((0, 0), (20, 1)):
            first, last = examples.offsets[2 * row + side : 2 * row + side + 2]
            with torch.no_grad():
                logit = theirs(torch.tensor(examples.tokens[None, first:last], dtype=torch.long)).logits.item()
            np.testing.assert_allclose(scores[k, row, side], logit, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_scores_are_the_same_on_a_mesh(sizes, folders, pairs):
    mesh = make_mesh(dict(zip(("member", "data", "fsdp", "tensor"), sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    np.testing.assert_allclose(scored(folders, pairs, mesh), scored(folders, pairs), atol=1e-5)
    _, params = rewards.load_ensemble(folders, mesh)
    assert params["layers"]["q"].addressable_shards[0].data.shape[0] == 3 // sizes[0]


@pytest.mark.parametrize("members", runs.slow_but([3, 6], 6))
def test_members_send_each_other_nothing(members):
    """The compiled program of a member mesh has no collective at all, be it one member a device or two."""
    mesh = make_mesh({"member": 3}, jax.devices()[:3])
    config = dataclasses.replace(tiny.MODEL, num_labels=1)
    params = stacked(parameters.abstract_params(config, mesh), members, mesh)
    apply = rewards.ensemble_model(config, params, mesh).apply
    text = lambda f: jax.jit(f).lower(params, tiny.batch(T=16)).compile().as_text()
    assert not re.findall(COLLECTIVES, text(lambda p, b: apply(p, b).scores))
    assert re.findall(COLLECTIVES, text(lambda p, b: apply(p, b).scores.mean(-1))), "what is searched for can be found"


def test_members_of_a_device_take_the_memory_of_one():
    """The activations of members never exist at once; under vmap, five members took five times the memory."""
    config = dataclasses.replace(tiny.MODEL, num_labels=1)

    def temporary(members: int) -> int:
        params = stacked(parameters.abstract_params(config, ONE), members, ONE)
        apply = rewards.ensemble_model(config, params, ONE).apply
        return jax.jit(lambda p, b: apply(p, b).scores).lower(params, tiny.batch(8)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(5) < 1.5 * temporary(1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda t, f: tiny.folder(t / "lm"), "is not a reward model: its config.json names no architecture"),
        (lambda t, f: f[0], "members 0 and 1 of the ensemble have the same weights; leave one out"),
        (lambda t, f: reward_folder(t, 5, vocab_size=104), "has another shape or vocabulary than"),
        (lambda t, f: t / "nowhere", "does not exist"),
    ],
)
def test_members_that_do_not_go_together(other, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        rewards.load_ensemble([folders[0], other(tmp_path, folders)], ONE)


def test_another_tokenizer_is_refused(folders, tmp_path):
    folder = reward_folder(tmp_path, 7)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"ä"'))
    with pytest.raises(ValueError, match="has another tokenizer than"):
        rewards.load_ensemble([folders[0], folder], ONE)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "merges.txt"])
def test_another_tokenizer_in_other_files_is_refused(name, folders, tmp_path):
    """The ends are named beside the vocabulary; older folders have it in two files."""
    both = [shutil.copytree(folders[0], tmp_path / str(i)) for i in range(2)]
    for i, folder in enumerate(both):
        config = folder / "tokenizer_config.json"
        if name == config.name:
            eos = json.loads(config.read_text())["eos_token"]
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": [{"content": eos, "special": True}, "a"][i]}))
            hf.check_alike([hf.open_folder(folders[0]), hf.open_folder(both[0])])  # as an object it is the same
        else:
            (folder / "tokenizer.json").unlink()
            (folder / "vocab.json").write_text("{}")
            (folder / name).write_text(str(i))
    with pytest.raises(ValueError, match="has another tokenizer than"):
        hf.check_alike([hf.open_folder(folder) for folder in both])


def test_a_classifier_of_two_labels_is_no_ensemble_of_two_members(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "two")
    content = json.loads((folder / "config.json").read_text())
    names = {"0": "bad", "1": "good"}
    (folder / "config.json").write_text(json.dumps(content | {"id2label": names, "label2id": {"bad": 0, "good": 1}}))
    c = default_config()
    c.reward.path = str(folder)
    with pytest.raises(ValueError, match=r"gives 2 scores per response \(\['bad', 'good'\]\), but one is needed; give a reward model"):
        open_judges(c)
    c.reward.path = str(folders[0])
    assert [s.path for s in open_judges(c)] == [folders[0]]


def test_scores_that_are_not_finite_are_named(folders, pairs):
    source, params = rewards.load_ensemble(folders[:2], ONE)
    model = rewards.ensemble_model(source.config, params | {"score": params["score"].at[1].set(jnp.inf)}, ONE)
    with pytest.raises(ValueError, match=r"42 scores are not finite, the first of member 1 for row 0 \(counted from 0\)"):
        rewards.score_examples(model.apply, model.params, examples_of(folders[0], pairs), ONE, 8, 48)


def test_judgement_by_hand():
    scores = np.array([[[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]], np.float32)
    lengths = np.array([[4, 1], [2, 3], [5, 5], [6, 1]])
    found = rewards.assess(scores, lengths)
    models = found["models"]
    assert found["pairs"] == 4 and found["longer_is_chosen"] == (1 + 0 + 0.5 + 1) / 4
    assert [models[f"member {k}"]["accuracy"] for k in range(2)] == [(1 + 0 + 0.5 + 1) / 4, 0.75]
    assert models["member 0"]["margin"] == (2 - 1 + 0 + 3) / 4 and found["split_votes"] == 0.5
    np.testing.assert_allclose(found["disagreement"], np.mean([0.5, 1.0, 1.0, 1.0]))
    assert models["mean"]["accuracy"] == (1 + 0.5 + 0 + 1) / 4  # margins 1.5, 0, -1, 2
    assert models["wco"]["margin"] == np.mean([1.0, 0.0, -1.0, 1.0])  # the minimum over members, then chosen less rejected
    correlation = np.corrcoef(scores[0].ravel(), lengths.ravel())[0, 1]
    np.testing.assert_allclose(models["member 0"]["length_correlation"], correlation, rtol=1e-6)
    one = rewards.assess(scores[:1], lengths)
    assert list(one["models"]) == ["member 0"] and one["disagreement"] == one["split_votes"] == 0.0


def test_calibration_finds_scores_that_are_twice_too_sure():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20000)
    won = rng.random(20000) < 1 / (1 + np.exp(-margin))
    sides = np.where(won, margin, -margin)
    judged = lambda scale: rewards.assess(np.stack([scale * sides, 0 * sides], -1)[None].astype(np.float32), np.ones((20000, 2)))
    honest, sure = (judged(scale)["models"]["member 0"] for scale in (1, 2))
    assert honest["calibration_error"] < 0.012 < 0.1 < sure["calibration_error"] and honest["accuracy"] == sure["accuracy"]
    assert all(abs(p - w) < 0.03 for p, w, _ in honest["calibration"]) and sum(n for *_, n in honest["calibration"]) == 40000
    low, high = sure["calibration"][0], sure["calibration"][-1]
    assert low[0] < low[1] - 0.05 and high[0] > high[1] + 0.05


@pytest.mark.slow
def test_the_command_on_folders(folders, pairs, tmp_path, capsys):
    where = ",".join(map(str, folders))
    args = ["--config", str(runs.REPO / "experiments" / "rm_hh.py"), f"--config.data.eval={pairs}", f"--config.data.ood={pairs}"]
    assert (
        main(
            [
                "eval-rm",
                where,
                *args,
                "--config.data.max_length=48",
                "--config.data.max_prompt_length=24",
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    for part in ("evaluation data: 21 pairs", "out-of-distribution data: 21 pairs", "member 2", "uwo 0.5", "calibration of mean"):
        assert part in said, part
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["eval"] == found["ood"] and len(found["eval"]["models"]) == 7
    expected = rewards.assess(scored(folders, pairs), np.ones((21, 2)))
    np.testing.assert_allclose(found["eval"]["models"]["wco"]["accuracy"], expected["models"]["wco"]["accuracy"], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "takes MODELS"), (["nowhere"], "is not the workdir of a run; for model folders also give --config FILE.py")],
)
def test_wrong_words(words, message, capsys):
    assert main(["eval-rm", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_data_that_are_no_pairs(folders, pairs, capsys):
    args = ["--config", str(runs.REPO / "experiments" / "rm_hh.py"), f"--config.data.eval={pairs}", "--config.data.kind=sft"]
    assert main(["eval-rm", str(folders[0]), *args]) == 2
    assert "eval-rm takes pairs; set data.kind to preference" in capsys.readouterr().err


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A file as `alignax generate --out` writes it, with an empty completion."""
    rng, file = np.random.default_rng(3), tmp_path_factory.mktemp("samples") / "samples.jsonl"
    word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(1, 7)))
    rows = [{"prompt": f"Is {word()}?", "sample": i % 2, "completion": f" {word()} {word()}"} for i in range(18)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "Is it?", "completion": ""}]))
    return file


def on_samples(folders, file):
    """Scores of the samples by models of folders, [K, n]."""
    data = default_config().data
    data.update(kind="sft", bad_rows="drop")
    examples = load_examples(str(file), data, load_tokenizer(folders[0], 96), 96)[0]
    source, params = rewards.load_ensemble(folders, ONE)
    apply = rewards.ensemble_model(source.config, params, ONE).apply
    return rewards.score_examples(apply, params, examples, ONE, 9, 48)[..., 0], examples


@pytest.mark.parametrize(("options", "dtype"), [(["--scale"], "float32"), pytest.param([], "bfloat16", marks=pytest.mark.slow)])
def test_anchored_members_have_a_zero_of_their_own(options, dtype, folders, samples, tmp_path, capsys):
    where = ",".join(map(str, folders[:2]))
    args = ["--samples", str(samples), f"--config.export.dtype={dtype}", "--config.batch_size=16"]
    assert main(["anchor", where, str(tmp_path / "out"), *args, *options]) == 0
    said = capsys.readouterr().out
    assert "samples: rows: 18 of 19 kept" in said and "dropped, empty completion: 1" in said and "member 1: mean" in said
    written = [tmp_path / "out" / f"member_{k}" for k in range(2)]
    before, examples = on_samples(folders[:2], samples)
    after, _ = on_samples(written, samples)
    assert np.abs(before.mean(axis=1)).min() > 0.05, "the test would show nothing"
    close = 1e-5 if dtype == "float32" else 5e-3  # the scaled head is rounded once more
    np.testing.assert_allclose(after.mean(axis=1), 0, atol=close)
    np.testing.assert_allclose(after.std(axis=1), 1 if options else before.std(axis=1), rtol=close)
    if dtype == "float32":
        expected = (before - before.mean(axis=1, keepdims=True)) / (before.std(axis=1, keepdims=True) if options else 1)
        np.testing.assert_allclose(after, expected, atol=1e-5)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(written[0])
        first, last = examples.offsets[:2]
        with torch.no_grad():  # transformers takes no offset from a score, and so keeps the order alone
            logit = theirs(torch.tensor(examples.tokens[None, first:last], dtype=torch.long)).logits.item()
        offset = json.loads((written[0] / "config.json").read_text())["score_offset"][0]
        np.testing.assert_allclose(logit - offset, after[0, 0], atol=1e-4)


@pytest.mark.slow
def test_a_single_model_is_anchored_twice_as_once(folders, samples, tmp_path):
    out = tmp_path / "out"
    for source in (folders[0], out):
        assert main(["anchor", str(source), str(out), "--samples", str(samples), "--config.batch_size=16", "--force"]) == 0
    (after,) = on_samples([out], samples)[0]
    (before,) = on_samples(folders[:1], samples)[0]
    np.testing.assert_allclose(after, before - before.mean(), atol=1e-5)


def test_each_label_is_anchored_by_itself():
    scores = np.random.default_rng(0).normal([1.0, -2.0, 5.0], [1.0, 2.0, 3.0], (2, 40, 1, 3)).astype(np.float32)
    params = {"score": jnp.ones((2, 4, 3)), "score_offset": jnp.arange(6.0).reshape(2, 3), "embed": jnp.ones(1)}
    found = rewards.anchored(params, scores, scale=True)
    mean, std = scores[:, :, 0].astype(float).mean(1), scores[:, :, 0].astype(float).std(1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.params["score"], np.broadcast_to(1 / std[:, None], (2, 4, 3)), rtol=1e-6)
    raw = scores[:, :, 0] + np.arange(6.0).reshape(2, 1, 3)  # x W
    now = raw / std[:, None] - np.asarray(found.params["score_offset"])[:, None]
    np.testing.assert_allclose(now.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(now.std(1), 1, rtol=1e-5)
    assert found.params["embed"] is params["embed"]


@pytest.mark.parametrize("scale", [True, False])
def test_a_member_of_one_score_is_refused(scale):
    scores = np.stack([np.arange(4.0), np.full(4, 0.25)])[..., None].astype(np.float32)
    params = {"score": jnp.ones((2, 4, 1)), "score_offset": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match=r"member 1 gives all 4 samples the score 0\.25; give more samples, or leave this member out"):
        rewards.anchored(params, scores, scale)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "needs --samples FILE"),
        (["--samples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--samples", "{samples}", "--scale=2"], "option '--scale=2' is unknown"),
    ],
)
def test_what_anchor_refuses(args, message, folders, samples, tmp_path, capsys):
    given = [arg.format(samples=samples) for arg in args]
    assert main(["anchor", str(folders[0]), str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_language_model_is_not_anchored(samples, tmp_path, capsys):
    assert main(["anchor", str(tiny.folder(tmp_path / "lm")), str(tmp_path / "out"), "--samples", str(samples)]) == 2
    assert "is not a reward model" in capsys.readouterr().err
