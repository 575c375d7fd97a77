"""Reward models: a score in place of logits, read at the last token; folders in and out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import torch
import torch_llama
import transformers
from test_models_families import ROWS
from test_run_online import arguments, rows, trained

from alignax.cli import main
from alignax.losses import apo_zero_unpaired, bradley_terry, centring, dpo, sft
from alignax.mesh import batch_sharding, make_mesh
from alignax.models import hf, parameters, reward
from alignax.models.transformer import critic, forward
from alignax.optim import decays

ONE = make_mesh({}, jax.devices()[:1])
KINDS = {"llama": {}} | {row: fields for row, fields in ROWS.items() if "," not in row}
AUTO = transformers.AutoModelForSequenceClassification


def classifier(folder, labels: int = 1, **fields):
    """A random model of transformers' for sequence classification, in a folder."""
    return torch_llama.write(folder, auto=AUTO, **fields | {"pad_token_id": 0, "num_labels": labels})


def their_scores(model, batch) -> np.ndarray:
    """The scores by transformers: [B, N, labels]."""
    tokens, mask = (torch.tensor(np.asarray(batch[k])).flatten(0, 1) for k in ("tokens", "mask"))
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask.long()).logits.numpy().reshape(*batch["tokens"].shape[:2], -1)


def our_scores(source, params, batch) -> np.ndarray:
    return np.asarray(jax.jit(forward(source.config))(params, batch).scores)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A reward model made of a language model's folder: source and parameters."""
    folder = tiny.folder(tmp_path_factory.mktemp("lm") / "model")
    source = hf.with_heads(hf.open_folder(folder), 1)
    return source, hf.load_params(source, ONE, jax.random.key(3))


@pytest.mark.parametrize(
    "kind", [k if k in ("llama", "gpt2", "gpt_neox", "gemma2") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_scores_are_those_of_transformers_on_the_way_in_and_out(kind, tmp_path):
    model = classifier(tmp_path / "in", **{"model_type": kind} | KINDS[kind])
    source = hf.open_folder(tmp_path / "in")
    params, batch = hf.load_params(source, ONE), tiny.batch(T=16)
    scores = our_scores(source, params, batch)
    assert source.config.num_labels == 1 and scores.shape == (4, 2) and scores.std() > 0.02
    np.testing.assert_allclose(scores, their_scores(model, batch)[..., 0], atol=1e-4, rtol=0)
    hf.export(params, source, tmp_path / "out")
    np.testing.assert_array_equal(their_scores(AUTO.from_pretrained(tmp_path / "out"), batch), their_scores(model, batch))


@pytest.mark.slow
def test_a_critic_of_its_own_tree_reads_the_score_of_what_is_there(llama):
    """The value before tokens[t] is what the reward model scores the completion up to t - 1, on one device and on eight."""
    source, params = llama
    params, batch = params | {"score_offset": jnp.array([0.75])}, tiny.batch(B=8)
    values = np.asarray(jax.jit(critic(source.config))(params, batch))
    t = jnp.arange(24)[None, None]
    score = jax.jit(
        lambda end: forward(source.config)(params, batch | {n: batch[n] & (t <= end) for n in ("mask", "completion_mask")}).scores
    )
    scored = np.asarray(batch["completion_mask"])
    assert not values[~scored].any() and values[scored].std() > 0.02
    for end in (6, 9):
        both = scored[..., end] & scored[..., end + 1]
        assert both.sum() > 3
        np.testing.assert_allclose(values[..., end + 1][both], np.asarray(score(end))[both], atol=1e-5, rtol=0)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(source.config, mesh)))
    sharded = jax.jit(critic(source.config, mesh=mesh))(placed, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(sharded, values, atol=1e-5, rtol=0)


def test_values_of_several_heads_lie_side_by_side(llama):
    source, _ = llama
    config = dataclasses.replace(source.stored, critic_heads=3)
    params, batch = parameters.init_params(config, ONE, jax.random.key(0)), tiny.batch(T=16)
    assert not params["value"].any()
    one = np.random.default_rng(0).normal(size=(32, 1))
    params |= {"value": jnp.asarray(np.concatenate([one, 2 * one, -one], axis=1), jnp.float32)}
    values = np.asarray(jax.jit(forward(config))(params, batch).values)
    assert values.shape == (*batch["tokens"].shape, 3)
    assert not values[~np.asarray(batch["completion_mask"])].any() and np.abs(values).max() > 0.1
    np.testing.assert_allclose(values[..., 1], 2 * values[..., 0], atol=1e-5)
    np.testing.assert_allclose(values[..., 2], -values[..., 0], atol=1e-5)


def test_several_labels(tmp_path):
    model = classifier(tmp_path / "in", labels=3)
    source, batch = hf.open_folder(tmp_path / "in"), tiny.batch(T=16)
    scores = our_scores(source, hf.load_params(source, ONE), batch)
    assert scores.shape == (4, 2, 3)
    np.testing.assert_allclose(scores, their_scores(model, batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("said", [{}, {"num_labels": 2}, {"num_labels": 1}, {"id2label": {"0": "a", "1": "b"}}])
def test_an_exported_config_says_the_labels_that_its_head_has(architecture, said):
    before = tiny.CONFIG | {"architectures": [architecture]} | said
    for count in (1, 2, 3):
        after = before | reward.fields(before, [0.0] * count, 0)
        theirs = transformers.LlamaConfig(**after)
        assert reward.labels(after) == theirs.num_labels == len(theirs.id2label) == count


@pytest.mark.parametrize("tied", runs.by_turn([True, False], [], [False]), ids=["tied", "untied"])
def test_a_reward_model_that_keeps_its_output_layer_gives_both(tied, tmp_path):
    """Scores of the reward model and log-probs of the language model, bit for bit; its export is that of any reward model."""
    folder = tiny.folder(tmp_path / "model", tie_word_embeddings=tied)
    language, batch = hf.open_folder(folder), tiny.batch(2, T=12)
    plain, both = hf.with_heads(language, 1), hf.with_heads(language, 1, language=True)
    params = hf.load_params(both, ONE, jax.random.key(3))
    assert ("lm_head" in params) is not tied
    out = jax.jit(forward(both.config))(params, batch)
    bare = {name: x for name, x in params.items() if name not in reward.HEAD}
    np.testing.assert_array_equal(out.logps, jax.jit(forward(language.config))(bare, batch).logps)
    rated = {name: x for name, x in params.items() if name != "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, rated, hf.load_params(plain, ONE, jax.random.key(3)))
    np.testing.assert_array_equal(out.scores, jax.jit(forward(plain.config))(rated, batch).scores)
    for source, own, name in ((both, params, "both"), (plain, rated, "plain")):
        hf.export(own, source, tmp_path / name)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "plain")]
    assert written[0] == written[1]


GRM = """
def loss(config):
    return 0.99 * bradley_terry() + 0.01 * grm_sft() + 0.01 * sft() + 0.01 * dpo()

def experience(config, reference):
    return logps("ref_logps", reference)
"""


@pytest.fixture(scope="module")
def regularised(tmp_path_factory):
    """The command line of a reward model that stays a language model, whose output layer is its own."""
    folder = tmp_path_factory.mktemp("grm")
    fields = {
        "model.path": tiny.folder(folder / "model", tie_word_embeddings=False), "model.num_labels": 1, "model.language_head": "true",
        "data.train": tiny.pairs(folder / "pairs.jsonl", 16), "data.max_length": 48, "batch_size": 8, "steps": 4, "eval.samples": 0,
        "optimizer.learning_rate": 1e-2, "log.every": 1, "log.tensorboard": False, "workdir": folder / "run",
    }  # fmt: skip
    return arguments(folder, GRM, fields), folder


@pytest.mark.slow
def test_a_regularised_reward_model_trains_and_is_exported_as_any(regularised):
    args, folder = regularised
    assert main(args) == 0
    found = [row for row in rows(folder / "run") if "loss/sft" in row]
    assert len(found) == 4 and all(row["skipped"] == 0 for row in found)
    assert found[0]["loss/dpo"] == pytest.approx(np.log(2), abs=1e-5) and found[-1]["loss/sft"] < found[0]["loss/sft"]
    ended = trained(folder / "run", args)
    first = hf.load_params(hf.with_heads(hf.open_folder(folder / "model"), 1, language=True), ONE)
    assert np.abs(ended["lm_head"] - np.asarray(first["lm_head"])).max() > 1e-3
    source = hf.open_folder(folder / "run" / "export")
    params, batch = hf.load_params(source, ONE), tiny.batch(2, T=12)
    assert "lm_head" not in params
    rated = {name: x for name, x in ended.items() if name != "lm_head"}
    np.testing.assert_array_equal(our_scores(source, params, batch), our_scores(source, rated, batch))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model.num_labels": 0}, "model.language_head keeps the output layer of a reward model, but this model is a language model"),
        (
            {"model.language_head": "false"},
            "asks for reference, but the reward model that the run starts from gives no log-probs; set model",
        ),
        (
            {"model.language_head": "false", "reference.path": "model"},
            "this loss reads log-probs, but a reward model has none; .*model.language_head to true",
        ),
        ({"model.path": "reward"}, "has no output layer; start from its language model, or set model.language_head to false"),
    ],
)
def test_an_output_layer_that_is_not_there_is_refused(regularised, changes, text, tmp_path, capsys):
    args, folder = regularised
    if "model.path" in changes:
        classifier(tmp_path / "reward", tie_word_embeddings=False)
        tiny.tokenizer().save_pretrained(tmp_path / "reward")
        changes = {"model.path": tmp_path / "reward"}
    if "reference.path" in changes:
        changes = changes | {"reference.path": folder / "model"}
    fields = {"workdir": tmp_path / "run"} | changes
    assert main([*args, *(f"--config.{name}={value}" for name, value in fields.items())]) == 2
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.slow
def test_a_language_models_folder_gets_a_head_of_the_runs_seed(llama, tmp_path):
    source, params = llama
    trunk = hf.load_params(hf.open_folder(source.path), ONE)
    assert "lm_head" not in params and params["score"].shape == (32, 1) and params["score_offset"].tolist() == [0.0]
    np.testing.assert_array_equal(params["embed"], trunk["embed"])
    again, other = (hf.load_params(source, ONE, jax.random.key(seed))["score"] for seed in (3, 4))
    np.testing.assert_array_equal(again, params["score"])
    assert np.abs(np.asarray(other) - params["score"]).max() > 0.1
    anchored = params | {"score_offset": jnp.array([0.75])}
    hf.export(anchored, source, tmp_path / "out")
    theirs, batch = AUTO.from_pretrained(tmp_path / "out"), tiny.batch(T=16)
    assert theirs.config.pad_token_id == 0
    back = hf.open_folder(tmp_path / "out")
    assert back.config.num_labels == 1 and back.config == dataclasses.replace(source.config, padding=0)
    scores = our_scores(back, hf.load_params(back, ONE), batch)
    np.testing.assert_array_equal(scores, our_scores(source, anchored, batch))
    np.testing.assert_allclose(scores, their_scores(theirs, batch)[..., 0] - 0.75, atol=1e-5)  # transformers knows no offset


def test_a_score_depends_on_no_padding_and_on_no_other_row(llama):
    source, params = llama
    batch = tiny.batch(4, T=16)
    shift = lambda by, x: jnp.roll(jnp.pad(x, ((0, 0), (0, 0), (0, 9))), by, axis=2)
    scores = our_scores(source, params, batch)
    for by in (0, 9, 4):
        moved = {k: shift(by, x) for k, x in batch.items()}
        pad = jnp.where(moved["mask"], moved["tokens"], 7)  # whatever id the padding has
        np.testing.assert_allclose(our_scores(source, params, moved | {"tokens": pad}), scores, atol=1e-5)
    alone = {k: x[2:3, 1:] for k, x in batch.items()}
    np.testing.assert_allclose(our_scores(source, params, alone), scores[2:3, 1:], atol=1e-6)


def test_the_score_is_read_at_the_last_token(llama):
    """The end of what is there decides, whatever of it is scored; where nothing is, there is no score."""
    source, params = llama
    inside = lambda first, end: ((jnp.arange(12) >= first) & (jnp.arange(12) < end))[None, None]
    read = lambda end, first, last: our_scores(
        source, params, {"tokens": jnp.arange(3, 15).reshape(1, 1, 12), "mask": inside(0, end), "completion_mask": inside(first, last)}
    )
    np.testing.assert_array_equal(read(12, 4, 8), read(12, 4, 12))
    np.testing.assert_array_equal(read(8, 4, 5), read(8, 4, 8))
    assert abs(read(12, 4, 8) - read(8, 4, 8)).max() > 1e-3
    assert read(12, 4, 4) == 0.0  # no completion


def test_a_folder_that_pads_with_the_end_is_read_in_front_of_it(tmp_path):
    """transformers reads the score before the end token, too, also from our export."""
    model = torch_llama.write(tmp_path / "in", auto=AUTO, model_type="llama", pad_token_id=2, num_labels=1)
    source, batch = hf.open_folder(tmp_path / "in"), tiny.batch(T=16)
    inside = np.arange(16) < np.asarray(batch["mask"]).sum(axis=-1, keepdims=True) - 1
    ended = batch | {"tokens": jnp.where(inside, batch["tokens"], 2)}
    params = hf.load_params(source, ONE)
    scores = our_scores(source, params, ended)
    np.testing.assert_allclose(scores, their_scores(model, ended)[..., 0], atol=1e-4, rtol=0)
    assert np.abs(our_scores(source._replace(config=dataclasses.replace(source.config, padding=None)), params, ended) - scores).min() > 1e-4
    hf.export(params, source, tmp_path / "out")
    np.testing.assert_array_equal(their_scores(AUTO.from_pretrained(tmp_path / "out"), ended), their_scores(model, ended))


def test_the_offset_is_neither_trained_nor_decayed(llama):
    source, params = llama
    batch, loss = tiny.batch(T=16), bradley_terry() + 0.1 * centring()
    apply = forward(source.config)
    grads = jax.jit(jax.grad(lambda p: loss(apply(p, batch), batch, loss.normalised(batch))[0]))(
        params | {"score_offset": jnp.array([0.5])}
    )
    assert grads["score_offset"] == 0 and np.abs(grads["score"]).max() > 1e-3 and np.abs(grads["layers"]["q"]).max() > 1e-6
    assert not decays(params)["score_offset"] and decays(params)["score"]


def test_losses_on_log_probs_refuse_a_reward_model_and_reward_losses_a_policy(llama):
    source, params = llama
    batch = tiny.with_reference(tiny.batch(T=16))
    single = {k: x[:, :1] for k, x in batch.items()} | {"labels": jnp.ones((4, 1), bool)}
    for loss, data in ((dpo(), batch), (sft(), batch), (apo_zero_unpaired(), single)):
        with pytest.raises(ValueError, match=r"this loss reads log-probs, but a reward model has none; use bradley_terry\(\)"):
            jax.eval_shape(lambda p, loss=loss, data=data: loss(forward(source.config)(p, data), data, loss.normalised(data)), params)
    with pytest.raises(ValueError, match=r"give a model with a reward head"):
        bradley_terry()(tiny.plain_apply(tiny.plain_params(), batch)._replace(scores=None), batch, bradley_terry().normalised(batch))
    three = hf.with_heads(source, 3)
    with pytest.raises(ValueError, match="takes one score per response, but the model gives 3; set model.num_labels to 1"):
        jax.eval_shape(
            lambda p: bradley_terry()(forward(three.config)(p, batch), batch, bradley_terry().normalised(batch)),
            parameters.abstract_params(three.config),
        )


@pytest.mark.slow
def test_an_export_never_pads_with_the_eos(llama, tmp_path):
    """transformers would read the score in front of the EOS rather than at it."""
    source, params = llama
    folder = tiny.folder(tmp_path / "in")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    hf.export(params, hf.with_heads(hf.open_folder(folder), 1), tmp_path / "out")
    theirs, tokenizer = AUTO.from_pretrained(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.pad_token_id == tokenizer.pad_token_id == tokenizer.unk_token_id != tokenizer.eos_token_id
    tokens = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in ("yes", "no, never")]
    padded = tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
    mask = np.asarray(padded["attention_mask"], bool)[None]
    batch = {"tokens": jnp.asarray(padded["input_ids"].numpy())[None], "mask": jnp.asarray(mask)}
    scores = our_scores(source, params, batch | {"completion_mask": batch["mask"] & (jnp.arange(mask.shape[-1]) > 0)[None, None]})
    with torch.no_grad():
        np.testing.assert_allclose(scores[0], theirs(**{k: padded[k] for k in ("input_ids", "attention_mask")}).logits[:, 0], atol=1e-4)
