"""Model folders with added tokens: what transformers makes of them, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch_llama
import transformers

from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.added import with_tokens
from alignax.run.checks import check_token_kl

MANY = [f"<|reward_{k}|>" for k in range(40)]


def load(folder):
    return hf.load_params(hf.open_folder(folder), make_mesh({"fsdp": -1}))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_transformers_loads_a_folder_with_added_tokens(tied, tmp_path):
    """The tokenizer has 95 tokens and the embedding 96 rows: the row that was free is a token's now."""
    folder = tiny.folder(tmp_path / "model", tie_word_embeddings=tied)
    ids = with_tokens(folder, tmp_path / "out", MANY)
    assert ids == list(range(95, 135)) and sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    source = hf.open_folder(tmp_path / "out")
    assert source.config.vocab_size == 135 and source.config.predicted_tokens == 95
    old, new = load(folder), load(tmp_path / "out")
    for name, rows in [("embed", lambda x: x)] + ([] if tied else [("lm_head", np.transpose)]):
        before, after = rows(np.asarray(old[name])), rows(np.asarray(new[name]))
        np.testing.assert_array_equal(after[:95], before[:95])
        drawn = (after[95:] - before[:95].mean(0)) / before[:95].std(0)  # 1,280 standard normal numbers, within 4 standard errors
        assert abs(drawn.mean()) < 0.12 and abs(drawn.std() - 1) < 0.08
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(MANY[7] + "ab").input_ids == [1, 102, *tokenizer("ab").input_ids[1:]]
    assert tokenizer.decode([1, 102, 70, 71], skip_special_tokens=True) == tokenizer.decode([70, 71])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.suppress_tokens == ids and model.generation_config.eos_token_id == 2
    tokens, mask = torch_llama.rows([24], 24)
    tokens[0, 3] = 102
    theirs = torch_llama.torch_logits(model, tokens, mask)[..., :95]  # ours are of the tokens that are predicted
    np.testing.assert_allclose(torch_llama.our_logits(tmp_path / "out", tokens, mask), theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_tokens_are_added_to_added_ones_and_trained_folders_keep_them(tmp_path):
    """An export of the trained model has the same added tokens."""
    folder = tiny.folder(tmp_path / "model")
    with_tokens(folder, tmp_path / "one", ["<|a|>"])
    assert with_tokens(tmp_path / "one", tmp_path / "two", ["<|b|>", "<|c|>"], seed=1) == [96, 97]
    source = hf.open_folder(tmp_path / "two")
    assert source.config.predicted_tokens == 95 and hf.generation_config(source)["suppress_tokens"] == [95, 96, 97]
    hf.export(load(tmp_path / "two"), source, tmp_path / "export")
    again = hf.open_folder(tmp_path / "export")
    assert again.config == source.config and hf.generation_config(again) == hf.generation_config(source)


def test_what_cannot_be_added_is_refused(tmp_path):
    folder = tiny.folder(tmp_path / "model")
    for tokens, message in ((["<unk>"], "has a token '<unk>'"), (["<|a|>", "<|a|>"], "not all different")):
        with pytest.raises(ValueError, match=message):
            with_tokens(folder, tmp_path / "out", tokens)
    with pytest.raises(ValueError, match="exists; choose another place"):
        with_tokens(folder, shutil.copytree(folder, tmp_path / "there"), ["<|a|>"])
    assert not (tmp_path / "out").exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"predicted_tokens": 97}))
    with pytest.raises(ValueError, match="predicted_tokens is 97, but the vocabulary has 96 tokens; use at most"):
        hf.open_folder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"predicted_tokens": 95}))
    source = hf.open_folder(folder)
    with pytest.raises(ValueError, match="the policy predicts 95 tokens and the reference 96; add the same"):
        check_token_kl(source, source._replace(config=dataclasses.replace(source.config, predicted_tokens=0)))


def test_none_are_added_behind_tokens_without_a_row(tmp_path):
    folder = tiny.folder(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|a|>", "<|b|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 97 tokens, but the embedding has 96 rows; resize the embedding first"):
        with_tokens(folder, tmp_path / "out", ["<|c|>"])
