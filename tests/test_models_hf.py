"""Hugging Face folders: weights in, slice by slice; export out, whole or not at all; what damaged folders are told."""

import ast
import contextlib
import dataclasses
import json
import math
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import torch_llama
import transformers

from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.added import with_tokens
from alignax.models.small_files import small_files
from alignax.models.tokenizers import load_tokenizer
from alignax.run.opening import notices, open_model

UNTIED = {"tie_word_embeddings": False}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by its name."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in safetensors.numpy.load_file(file).items()}


def load(folder: Path, shape: dict[str, int] | None = None):
    return hf.load_params(hf.open_folder(folder), make_mesh(shape or {"fsdp": -1}))


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logits_agree(folder: Path, model: transformers.PreTrainedModel, atol: float = 1e-4) -> None:
    tokens, mask = torch_llama.rows([24], 24)
    np.testing.assert_allclose(
        torch_llama.our_logits(folder, tokens, mask), torch_llama.torch_logits(model, tokens, mask), atol=atol, rtol=0
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """An untied model with a tokenizer and a generation config; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("written")
    torch_llama.write(folder, **UNTIED, attention_bias=True)
    tiny.tokenizer().save_pretrained(folder)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 5], "max_new_tokens": 17}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


# Reading.


def test_sharded_files_hold_the_same_weights(written, tmp_path):
    torch_llama.write(tmp_path, shard="20KB", **UNTIED, attention_bias=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    equal(load(tmp_path), load(written))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_stored_type_becomes_float32(dtype, tmp_path):
    model = torch_llama.write(tmp_path, dtype, **UNTIED)
    params = load(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    state = model.state_dict()
    exact = lambda name: state[name].float().numpy()
    np.testing.assert_array_equal(params["embed"], exact("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["lm_head"], exact("lm_head.weight").T)
    np.testing.assert_array_equal(params["layers"]["down"][1], exact("model.layers.1.mlp.down_proj.weight").T)
    np.testing.assert_array_equal(params["layers"]["mlp_norm"][0], exact("model.layers.0.post_attention_layernorm.weight"))


def test_tied_head_with_and_without_its_copy_in_the_file(tmp_path):
    model = torch_llama.write(tmp_path)
    stored = weights(tmp_path)
    assert "lm_head.weight" not in stored
    params = load(tmp_path)
    assert "lm_head" not in params
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # older files hold it
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    equal(load(tmp_path), params)
    logits_agree(tmp_path, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", [{}, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}], ids=["llama", "gpt2"]
)
def test_a_tied_model_whose_files_hold_the_output_matrix_alone(family, tmp_path):
    """transformers uses the output matrix as the embedding."""
    model = torch_llama.write(tmp_path, tie_word_embeddings=True, **family)
    params, stored = load(tmp_path), weights(tmp_path)
    embed = next(name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight")))
    safetensors.numpy.save_file(
        {"lm_head.weight" if n == embed else n: x for n, x in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.get_input_embeddings().weight, model.get_input_embeddings().weight)
    equal(load(tmp_path), params)


def test_a_tied_flag_beside_another_head_ties_nothing(tmp_path):
    model = torch_llama.write(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs.lm_head.weight, model.lm_head.weight)
    source = hf.open_folder(tmp_path)
    params = hf.load_params(source, make_mesh({"fsdp": -1}))
    np.testing.assert_array_equal(params["lm_head"], model.lm_head.weight.detach().numpy().T)
    hf.export(params, source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    equal(load(tmp_path / "out"), params)


def test_a_stale_index_beside_a_whole_file(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00007.safetensors"}}')
    (copy / "model-00007-of-00007.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:100])
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    np.testing.assert_array_equal(load(copy)["embed"], model.model.embed_tokens.weight.detach().numpy())


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "model-q4.gguf", "consolidated.00.pth"]
)
def test_weights_in_files_that_are_not_read(name, copy):
    (copy / "model.safetensors").rename(copy / name)
    refuses(copy, f"has no model.safetensors but {name!r}, which alignax does not read", "save_pretrained, which writes model.safetensors")


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_each_shard_reads_its_own_part_and_no_more(shape, written, monkeypatch):
    whole, reads, read_slice = load(written, {"data": 8}), [], hf.read_slice

    def recorded(opened, name, index):
        part = read_slice(opened, name, index)
        reads.append((name, part.size))
        return part

    monkeypatch.setattr(hf, "read_slice", recorded)
    params = load(written, shape)
    assert sum(size for _, size in reads) == sum(x.size for x in jax.tree.leaves(params))
    shards = {hf.leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    largest = {name: math.prod(x.sharding.shard_shape(x.shape)[name.startswith("layers.") :]) for name, x in shards.items()}
    named = {
        target.name.format(i): largest[leaf]
        for leaf, target in hf.open_folder(written).family.weights.items()
        for i in range(2)
        if leaf in largest
    }
    assert all(size == named[name] for name, size in reads)
    assert named["model.layers.0.mlp.down_proj.weight"] == 32 * 48 / (shape.get("fsdp", 1) * shape.get("tensor", 1))
    equal(params, whole)


# Writing.


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_an_export(tied, written, tmp_path):
    source = hf.open_folder(written)
    if tied:
        torch_llama.write(tmp_path / "tied")
        source = hf.open_folder(tmp_path / "tied")
    (source.path / "pytorch_model.bin.index.json").write_text("{}")  # of other weights: must not follow
    (source.path / "chat_template.jinja").write_text("default")
    (source.path / "additional_chat_templates").mkdir(exist_ok=True)
    (source.path / "additional_chat_templates" / "tool_use.jinja").write_text("of tools")
    params = jax.tree.map(lambda x: x * 1.25, hf.load_params(source, make_mesh({"fsdp": 4, "tensor": 2})))  # as if trained
    hf.export(params, source, tmp_path / "out", eos=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32 and not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()
    logits_agree(tmp_path / "out", model)
    equal(load(tmp_path / "out"), params)
    if not tied:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.decode(tokenizer("Is it so?")["input_ids"]) == tiny.tokenizer().decode(tiny.tokenizer()("Is it so?")["input_ids"])
        assert tokenizer.chat_template == {"default": "default", "tool_use": "of tools"}
        assert model.generation_config.eos_token_id == [2, 5] and model.generation_config.max_new_tokens == 17


@pytest.mark.parametrize(
    ("file", "config", "after"),
    [
        ({"eos_token_id": 1, "do_sample": False}, {}, {"eos_token_id": [1, 2], "do_sample": False}),
        ({"eos_token_id": [1, 2]}, {}, {"eos_token_id": [1, 2]}),
        ({"do_sample": True}, {}, {"do_sample": True, "eos_token_id": 2}),
        (None, {"eos_token_id": 9}, {"bos_token_id": 1, "eos_token_id": [9, 2]}),
        (None, {"eos_token_id": 2}, None),
    ],
)
def test_an_export_stops_at_the_eos_that_was_trained(file, config, after, copy):
    folder = copy
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    generation = folder / "generation_config.json"
    generation.unlink()
    if file is not None:
        generation.write_text(json.dumps(file))
    hf.export(load(folder), hf.open_folder(folder), folder / "out", eos=2)
    out = folder / "out" / "generation_config.json"
    assert (json.loads(out.read_text()) if out.is_file() else None) == after
    stops = transformers.GenerationConfig.from_pretrained(folder / "out").eos_token_id if after else 2
    assert 2 in (stops if isinstance(stops, list) else [stops])


@pytest.mark.parametrize(
    ("file", "config", "ends"),
    [
        ({"eos_token_id": [1, 5]}, {"eos_token_id": 2}, {1, 2, 5}),  # Gemma's: <eos> and <end_of_turn>
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 2}, {2, 7}),  # Qwen's: <|im_end|> and <|endoftext|>
        ({"eos_token_id": [7, 8, 9]}, {"eos_token_id": 7}, {2, 7, 8, 9}),  # Llama's: <|end_of_text|>, <|eom_id|>, <|eot_id|>
        ({"eos_token_id": 7}, {"eos_token_id": [2, 8]}, {2, 7}),
        ({"do_sample": True}, {"eos_token_id": [2, 8]}, {2}),
        (None, {"eos_token_id": [2, 8]}, {2, 8}),  # no file: config.json's
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 8}}, {2, 8}),
        (None, {"eos_token_id": None}, {2}),
    ],
)
def test_the_ends_are_the_tokenizers_and_those_that_transformers_stops_at(file, config, ends, copy):
    fields = {name: value for name, value in (json.loads((copy / "config.json").read_text()) | config).items() if value is not None}
    (copy / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if name != "text_config"}))
    generation = copy / "generation_config.json"
    generation.unlink()
    if file is not None:
        generation.write_text(json.dumps(file))
    source = hf.open_folder(copy)
    (copy / "config.json").write_text(json.dumps(fields))
    assert hf.end_ids(source._replace(hf=fields), tiny.tokenizer()) == tuple(sorted(ends))
    name = "generation_config.json" if file is not None else "config.json"
    theirs = transformers.GenerationConfig.from_pretrained(copy, config_file_name=name, _from_model_config=file is None).eos_token_id
    assert {2, *(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs])} == ends


def test_ids_that_a_tokenizer_leaves_out(copy, tmp_path):
    tiny.tokenizer().save_pretrained(copy)
    file = copy / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"]["a"] = 95
    file.write_text(json.dumps(fields))
    assert hf.with_vocabulary(hf.open_folder(copy), load_tokenizer(copy, 96)).config.unused_tokens == ((69, 70),)
    fields["model"]["vocab"]["a"] = 96
    file.write_text(json.dumps(fields))
    assert hf.with_vocabulary(hf.open_folder(copy), load_tokenizer(copy, 96)).config.unused_tokens == ((69, 70), (95, 96))
    two = hf.open_folder(copy)
    two = two._replace(stored=dataclasses.replace(two.stored, num_labels=2), config=dataclasses.replace(two.config, num_labels=1))
    told = notices({"policy": SimpleNamespace(source=two)}, load_tokenizer(copy, 96))
    assert "has 1 tokens beyond the 96 rows of the embedding, 'a' (96); texts with these tokens are refused" in told[0] and len(told) == 2
    assert "gives 2 scores, but model.num_labels asks for 1: this head is left out, and a new one begins untrained" in told[1]
    with pytest.raises(ValueError, match=r"the EOS of the tokenizer in .* has id 2, but the embedding has 2 rows; use the tokenizer"):
        load_tokenizer(copy, 2)
    with pytest.raises(ValueError, match="the ids of the 95 tokens of the tokenizer in .* have gaps, so alignax adds no token"):
        with_tokens(copy, tmp_path / "out", ["<|new|>"])


@pytest.mark.parametrize("ids", [96, -1, True, "2", [2, None], [2, [5]], {"a": 1}])
def test_an_end_that_is_no_token_is_refused(ids, copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"eos_token_id .* in .*generation_config.json is none of the model's 96 tokens; correct the id"):
        hf.end_ids(hf.open_folder(copy), tiny.tokenizer())


def test_a_damaged_generation_config(copy):
    folder = copy
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config.json is not a JSON object"):
        hf.stop_ids(hf.open_folder(folder))


def test_what_a_generation_config_asks_for_and_nothing_does(copy):
    neutral = {"eos_token_id": 2, "do_sample": True, "temperature": 1.0, "top_p": None, "bad_words_ids": [], "transformers_version": "5.0"}
    neutral |= {"_from_model_config": True}
    (copy / "generation_config.json").write_text(json.dumps(neutral))
    assert hf.unread(hf.open_folder(copy)) == ""
    (copy / "generation_config.json").write_text(json.dumps(neutral | {"temperature": 0.6, "top_k": 20, "suppress_tokens": [7]}))
    assert hf.unread(hf.open_folder(copy)) == "suppress_tokens [7], temperature 0.6, top_k 20"
    models = {"policy": SimpleNamespace(source=hf.open_folder(copy))}, load_tokenizer(copy, 96)
    assert not notices(*models) and "asks for suppress_tokens [7], temperature" in notices(*models, online=True)[0]


def test_round_trip_is_bit_for_bit(written, tmp_path):
    hf.export(load(written), hf.open_folder(written), tmp_path / "out")
    before, after = weights(written), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes() and before[name].shape == after[name].shape


def test_export_in_files_of_limited_size(written, tmp_path):
    source, params = hf.open_folder(written), load(written)
    hf.export(params, source, tmp_path / "out", shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "out" / "model.safetensors").exists()
    assert all(f.stat().st_size < 20_000 + 2_000 for f in files)  # a header each
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights(written).values())
    logits_agree(tmp_path / "out", transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    equal(load(tmp_path / "out"), params)
    hf.export(params, hf.open_folder(tmp_path / "out"), tmp_path / "one")  # the index does not follow
    assert [f.name for f in (tmp_path / "one").iterdir() if "model" in f.name] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_half_precision(dtype, written, tmp_path):
    params = load(written)
    hf.export(params, hf.open_folder(written), tmp_path / "out", dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    equal(load(tmp_path / "out"), jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (70000.0, "float16")])
def test_values_that_are_not_finite_are_not_exported(value, dtype, written, tmp_path):
    params = load(written)
    spoilt = params | {"norm": params["norm"].at[0].set(value)}
    remedy = "" if dtype == "float32" else ", or set export.dtype=float32 if they are finite there"
    with pytest.raises(FloatingPointError, match=rf"out' holds values that are not finite in {dtype} \(norm\); .*learning_rate{remedy}$"):
        hf.export(spoilt, hf.open_folder(written), tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())


def test_unknown_type_of_export(written, tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; use float32, float16, bfloat16"):
        hf.export(load(written), hf.open_folder(written), tmp_path / "out", dtype="int8")


def test_interrupted_export_leaves_nothing_or_the_earlier_one(written, tmp_path, monkeypatch):
    source, params, out = hf.open_folder(written), load(written), tmp_path / "out"
    save_file, saved = safetensors.numpy.save_file, []

    def fails_at_the_second_file(tensors, path, **options):
        if saved:
            raise OSError("no space left on device")
        saved.append(path)
        save_file(tensors, path, **options)

    for earlier in (False, True):
        saved.clear()
        monkeypatch.setattr(safetensors.numpy, "save_file", fails_at_the_second_file)
        with pytest.raises(OSError, match="no space"):
            hf.export(jax.tree.map(lambda x: 2 * x, params), source, out, shard_bytes=20_000)
        assert len(saved) == 1 and out.exists() == earlier
        monkeypatch.undo()
        if earlier:
            equal(load(out), params)
        hf.export(params, source, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing is left over


def test_export_does_not_overwrite_other_folders(written, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a model folder; choose another place"):
        hf.export(load(written), hf.open_folder(written), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Damaged folders.


def rewrite(folder: Path, drop: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def retensor(folder: Path, change) -> None:
    tensors = weights(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def refuses(folder: Path, *words: str) -> None:
    """Opening or loading raises a ValueError that holds all of `words`."""
    with pytest.raises(ValueError) as error:
        load(folder)
    for word in words:
        assert word in str(error.value)


def test_no_folder_and_no_config(tmp_path):
    refuses(tmp_path / "absent", repr(str(tmp_path / "absent")), "does not exist", "give the path of a Hugging Face model folder")
    refuses(tmp_path, repr(str(tmp_path)), "has no config.json", "give the path of a Hugging Face model folder")
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(tmp_path, "holds adapters and no model; merge them into their base", "as model.path and the adapters as lora.path")
    refuses(tmp_path / "adapter_config.json", "is a file", f"such as {str(tmp_path)!r}")
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))  # transformers would put the adapters onto the model
    refuses(tmp_path, "holds a model and adapters", "as lora.path, or, where they are merged already, delete adapter_config.json")


@pytest.mark.parametrize("content", ['{"model_type": "lla', "", "[1, 2]", "7", b"\xff\xfe"], ids=repr)
def test_config_that_is_no_json_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(tmp_path, str(tmp_path / "config.json"), "is not a JSON object", "fetch the model folder again")


def test_unknown_family(copy):
    rewrite(copy, model_type="mamba")
    refuses(copy, "model_type 'mamba'", str(copy / "config.json"), "supported: gemma2, gemma3_text, gpt2")
    rewrite(copy, drop=("model_type",))
    refuses(copy, "model_type None", "supported: gemma2, gemma3_text, gpt2")


def test_missing_field_and_unsupported_activation(copy):
    rewrite(copy, hidden_act="quick_gelu")
    refuses(copy, "hidden_act 'quick_gelu' is not supported for llama", "only silu, gelu")
    rewrite(copy, hidden_act="silu", drop=("intermediate_size",))
    refuses(copy, str(copy / "config.json"), "lacks the field 'intermediate_size'", "complete llama config")


def test_unknown_and_incomplete_rope(copy):
    rewrite(copy, rope_parameters={"rope_type": "spiral"})
    refuses(copy, "rope_type 'spiral' is unknown", "linear, dynamic, yarn, longrope, llama3")
    rewrite(copy, rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4})
    refuses(copy, "'llama3' lack low_freq_factor, high_freq_factor", "is config.json complete?")


def test_missing_tensor(copy):
    retensor(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(copy, repr(str(copy)), "lacks 1 tensors, model.layers.1.mlp.up_proj.weight first", "fetch the folder again")


def test_untied_model_without_head(copy):
    retensor(copy, lambda tensors: tensors.pop("lm_head.weight"))
    refuses(copy, "lacks 1 tensors, lm_head.weight first")


def test_tensors_that_the_config_does_not_describe(copy):
    rewrite(copy, num_hidden_layers=1)
    refuses(
        copy,
        "13 tensors that config.json does not describe, 'model.layers.1.input_layernorm.weight' first",
        "check that config.json is this model's, and",
    )


def test_tensors_under_the_names_of_a_wrapper(copy):
    def wrap(tensors: dict) -> None:
        tensors |= {f"_orig_mod.{name}": tensors.pop(name) for name in list(tensors)}

    retensor(copy, wrap)
    refuses(copy, "lacks 29 tensors", "and has 29 tensors", "'_orig_mod.lm_head.weight' first", "the names that transformers gives them")


def test_misshapen_tensor(copy):
    rewrite(copy, vocab_size=95)
    refuses(copy, "model.embed_tokens.weight", "has shape (96, 32), but config.json says (95, 32)", "check that config.json is")


def test_values_that_are_not_finite(copy):
    retensor(copy, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))
    refuses(copy, "model.norm.weight", str(copy / "model.safetensors"), "not finite", "fetch the folder again")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file(keep, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(copy, str(file), "is damaged or cut short", "fetch it again")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refuses(copy, repr(str(copy)), "has no model.safetensors", "'random'")


@pytest.fixture
def sharded(written, tmp_path) -> tuple[Path, dict]:
    """A folder of several files, and its index."""
    hf.export(load(written), hf.open_folder(written), tmp_path / "sharded", shard_bytes=20_000)
    return tmp_path / "sharded", json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())


def test_missing_shard_and_truncated_shard(sharded):
    folder, index = sharded
    file = folder / index["weight_map"]["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-1])
    refuses(folder, str(file), "is damaged or cut short", "fetch it again")
    file.unlink()
    refuses(folder, "model.safetensors.index.json", f"names 1 files that are not there, the first is {file.name!r}", "fetch them")


def test_index_that_places_a_tensor_wrongly(sharded):
    folder, index = sharded
    wrong = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    assert wrong != index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = wrong
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, f"{folder / wrong} does not hold model.norm.weight, which its index places there", "fetch the folder again")


def test_a_tensor_in_two_files(sharded):
    folder, index = sharded
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"])
    tensors = safetensors.numpy.load_file(folder / other) | {"model.norm.weight": np.ones(32, np.float32)}
    safetensors.numpy.save_file(tensors, folder / other)
    refuses(folder, str(folder / other), f"{folder / index['weight_map']['model.norm.weight']} both hold model.norm.weight", "fetch")


def test_a_tensor_that_the_index_does_not_name(sharded):
    folder, index = sharded
    file = folder / index["weight_map"]["model.norm.weight"]
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | {"model.norm.bias": np.ones(32, np.float32)}, file)
    refuses(folder, str(file), "holds 'model.norm.bias', which its index does not name", "fetch")


def test_a_flipped_bit_in_an_export_is_refused(written, tmp_path):
    hf.export(load(written), hf.open_folder(written), tmp_path / "out", "bfloat16", origin="a test")
    file = tmp_path / "out" / "model.safetensors"
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for at in random.integers(8 + int.from_bytes(whole[:8], "little"), len(whole), 4):
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << random.integers(8)
        file.write_bytes(spoiled)
        refuses(tmp_path / "out", f"{file} is damaged", "write or fetch the folder again")
    file.write_bytes(whole)
    rewrite(tmp_path / "out", _note="edited by hand")  # nothing but the weights is checked
    load(tmp_path / "out")


def test_links_out_of_a_folder_are_not_exported(written, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(p for p in written.iterdir() if p.is_file())):  # as the hub's cache lays a model out
        shutil.copyfile(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert {f.name for f in small_files(snapshot)} >= {"tokenizer.json", "generation_config.json"}
    (tmp_path / "secret").write_text("TOKEN=abc")
    for target in (tmp_path / "secret", Path("../../../secret"), Path("../../blobs/../../secret")):
        link = snapshot / "notes.txt"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=r"notes.txt is a link out of its folder, to '.*secret'; put a copy of the file in its place"):
            open_model(str(snapshot), "pretrained", "model.path")
        link.unlink()
    (snapshot / "notes.txt").symlink_to("tokenizer.json")  # within the folder, by name of another link
    small_files(snapshot)


def test_nothing_of_a_folder_is_run(copy, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to run it, where nobody said no
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    code += "import transformers\nclass Own(transformers.PreTrainedTokenizerFast): pass\nclass Config(transformers.LlamaConfig): pass\n"
    for name in ("own", "configuration_own", "tokenization_own", "modeling_own"):
        (copy / f"{name}.py").write_text(code)
    classes = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    rewrite(copy, auto_map=classes)
    for change in ({}, {"tokenizer_class": "Own"}):
        file = copy / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": classes} | change))
        with contextlib.suppress(ValueError):  # read by a class of transformers, or refused
            load_tokenizer(copy, 96)
        load(copy)
    assert not marker.exists()
    runpy.run_path(str(copy / "own.py"))
    assert marker.exists(), "it would have been written"


def test_every_loader_of_ours_says_that_it_trusts_no_code():
    root = Path(__file__).parents[1]
    for file in sorted(root.glob("alignax/**/*.py")):
        text = file.read_text()
        pickled = () if file.name in ("workers.py", "calls.py") else ("import pickle",)  # of what the run itself has sent, no file
        assert not any(word in text for word in ("allow_pickle=True", "torch.load", "trust_remote_code=True", *pickled)), file
        for node in ast.walk(ast.parse(text)):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name == "from_pretrained":
                assert any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in node.keywords), file  # type: ignore


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float64])
def test_tensors_of_another_type(dtype, copy):
    retensor(copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, dtype)}))
    refuses(copy, f"'model.norm.weight' in {copy / 'model.safetensors'} is stored as", "alignax reads float32, float16, bfloat16")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'])
def test_index_that_is_none(content, sharded):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(content)
    what = "is not an index of tensors" if "{}" in content or "weight" in content else "is not a JSON object"
    refuses(folder, str(folder / "model.safetensors.index.json"), what, "fetch it again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size in {} is '32'; it must be a whole number above 0"),
        ({"vocab_size": -96}, "vocab_size in {} is -96; it must be a whole number above 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers in {} is 2.0; it must be a whole number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in {} is nan; it must be a number above 0"),
        ({"attention_bias": 1}, "attention_bias in {} is 1; it must be true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act in {} is ['silu']; it must be text"),
        ({"rope_parameters": [1]}, "rope_parameters in {} is [1]; it must be an object"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta in {}, rope_parameters is '1e4'; it must be a number above 0"),
        ({"num_key_value_heads": 3}, "{}: num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (
            {"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5},
            "{}: hidden_size 32 is no multiple of num_attention_heads 5",
        ),
        ({"head_dim": 7}, "{}: 7 of the 7 dimensions of a head rotate"),
        ({"intermediate_size": None}, "{} lacks the field 'intermediate_size'"),
    ],
)
def test_config_fields_of_another_kind(changes, message, copy):
    rewrite(copy, **changes)
    refuses(copy, message.format(copy / "config.json"))
