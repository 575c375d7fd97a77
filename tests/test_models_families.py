"""Every family: transformers' logits, padding, causality, the cache, the way in and out of files, defaults, and what is refused."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
import tiny
import torch_llama
import transformers

from alignax import mesh as meshes
from alignax.models import cache as caches
from alignax.models import hf, parameters, reward
from alignax.models.families import FAMILIES
from alignax.models.families import read as read_config
from alignax.models.fields import FIELDS, OWN, noted
from alignax.models.heads import soft_cap
from alignax.models.transformer import Decoder, ModelConfig, forward, head_weight
from alignax.run.roles import leaf_dtype

T = 24
UNTIED = {"tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "max_position_embeddings": 64}
GEMMA = {"query_pre_attn_scalar": 13, "sliding_window": 5, "attention_bias": True, "initializer_range": 0.3}
MOE = UNTIED | {"num_experts_per_tok": 2, "initializer_range": 0.3}
QWEN_MOE = MOE | {"num_experts": 8, "moe_intermediate_size": 24}
HALF = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
LONGROPE = {"rope_parameters": HALF | FACTORS | {"rope_type": "longrope"}, "original_max_position_embeddings": 12}
ROWS = {
    "mistral": UNTIED | {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True, "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {
        "final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
    "gpt2": GPT2,
    "gpt2, unscaled, untied": GPT2 | UNTIED | {"scale_attn_weights": False, "activation_function": "relu"},
    "gpt_neox": UNTIED | {"rope_parameters": HALF, "hidden_act": "gelu"},
    "gpt_neox, sequential": {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    "olmo2": UNTIED | {"attention_bias": True},
    "phi3": UNTIED | {"rope_parameters": HALF, "sliding_window": 5, "pad_token_id": 0},
    "phi3, longrope": LONGROPE | {"pad_token_id": 0},
    "qwen3_moe": QWEN_MOE | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5},
    "qwen3_moe, shares as they are": QWEN_MOE,
    "mixtral": MOE | {"num_local_experts": 8},
}  # fmt: skip


class Written(NamedTuple):
    folder: Path
    model: transformers.PreTrainedModel
    source: hf.Source
    params: dict


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`row -> Written`, each written once."""

    @functools.cache
    def write(row: str) -> Written:
        folder = tmp_path_factory.mktemp("family")
        model = torch_llama.write(folder, **{"model_type": row.split(",")[0]} | ROWS[row])
        source = hf.open_folder(folder)
        return Written(folder, model, source, hf.load_params(source, meshes.make_mesh({}, jax.devices()[:1])))

    return write


@functools.cache
def logits_of(c: ModelConfig):
    """The jitted `(params, tokens [R, T], mask [R, T]) -> [R, T, V]`."""

    def logits(params, tokens, mask):
        hidden, _ = Decoder(c, remat="none").apply({"params": params}, tokens, mask)
        return soft_cap(hidden @ head_weight(c, params), c.final_logit_softcapping)

    return jax.jit(logits)


def test_every_family_has_a_row():
    assert {row.split(",")[0] for row in ROWS} | {"llama"} == set(FAMILIES)


@pytest.mark.parametrize("row", ROWS)
def test_logits_are_those_of_transformers_and_padding_changes_nothing(row, written):
    w = written(row)
    tokens, mask = torch_llama.rows([T, 13, 13, 13], T, left=(2,))
    middle = np.roll(tokens[1], 6), np.roll(mask[1], 6)
    tokens[2, -13:] = tokens[1, :13]
    tokens[3], mask[3] = middle
    ours = np.asarray(logits_of(w.source.config)(w.params, tokens, mask))
    one_by_one = [torch_llama.torch_logits(w.model, t[m][None], m[m][None])[0] for t, m in zip(tokens, mask, strict=True)]
    for i, theirs in enumerate(one_by_one):
        assert np.abs(theirs).max() > 1  # differences would show
        np.testing.assert_allclose(ours[i][mask[i]], theirs, atol=1e-4, rtol=0)
    for i in (2, 3):
        np.testing.assert_allclose(ours[i][mask[i]], ours[1][mask[1]], atol=1e-5, rtol=0)
    if "longrope" not in row:  # which transformers scales by the longest row of a batch
        theirs = torch_llama.torch_logits(w.model, tokens, mask)
        np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("row", runs.by_turn(ROWS, ("gemma3_text",), ("qwen3_moe", "gpt2", "gpt_neox", "phi3, longrope", "mixtral")))
def test_no_state_depends_on_a_later_token_nor_on_one_before_every_window(row, written):
    c, params, n = written(row).source.config, written(row).params, 16
    tokens = jnp.arange(n)[None]  # all different, so a row of the embedding is the input of one position
    projection = jax.random.normal(jax.random.key(1), (c.hidden_size,))

    def states(embed: jax.Array) -> jax.Array:  # [n]
        out, _ = Decoder(c, remat="none").apply({"params": params | {"embed": embed}}, tokens, tokens >= 0)
        return out[0] @ projection

    influence = np.abs(jax.jit(jax.jacobian(states))(params["embed"])[:, :n]).sum(-1)  # [n states, n inputs]
    distance = np.arange(n)[:, None] - np.arange(n)
    windows = c.sliding_windows or (0,)
    reach = n if 0 in windows else sum(w - 1 for w in windows)  # each layer looks a window further back
    seen = (distance >= 0) & (distance <= reach)
    assert (influence[~seen] == 0).all() and (~seen).any()
    assert (influence[seen] > 1e-7).all()


# Past its original context LongRoPE scales by length, and cached keys keep the angles that they got.
CACHED = [row for row in ROWS if "longrope" not in row]


@pytest.mark.parametrize("row", runs.slow_but(CACHED, "mistral", "gemma2", "qwen3_moe", "gpt2"))
def test_cached_steps_are_the_whole_row(row, written):
    c, params = written(row).source.config, written(row).params
    tokens, mask = torch_llama.rows([T, 20, 17, T], T)
    whole = logits_of(c)(params, tokens, mask)
    shape = (c.num_hidden_layers, len(tokens), c.num_key_value_heads, T, c.head_dim)

    def step(cache, at):
        token = jax.lax.dynamic_slice_in_dim(jnp.asarray(tokens), at, 1, axis=1)
        hidden, cache = Decoder(c, remat="none").apply({"params": params}, token, None, cache, jnp.full(len(tokens), at))
        return cache, hidden[:, 0]

    _, hidden = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(T)))(caches.empty(shape, jnp.float32))
    logits = soft_cap(jnp.swapaxes(hidden, 0, 1) @ head_weight(c, params), c.final_logit_softcapping)
    np.testing.assert_allclose(logits[mask], whole[mask], atol=2e-5, rtol=0)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("row", runs.slow_but(ROWS, "mistral", "gemma2", "qwen3_moe", "gpt2"))
def test_sharded_reading_and_export_keep_every_bit(row, written, tmp_path):
    w = written(row)
    params = hf.load_params(w.source, meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))  # shards end within heads and parts
    jax.tree.map(np.testing.assert_array_equal, params, w.params)
    hf.export(params, w.source, tmp_path / "out")
    before, after = tensors(w.folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].shape == after[name].shape and before[name].tobytes() == after[name].tobytes(), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens, mask = torch_llama.rows([T], T)
    np.testing.assert_array_equal(torch_llama.torch_logits(model, tokens, mask), torch_llama.torch_logits(w.model, tokens, mask))


def test_each_shard_of_a_fused_tensor_reads_its_own_part(written, monkeypatch):
    reads, read_slice = [], hf.read_slice

    def recorded(opened, name, index):
        part = read_slice(opened, name, index)
        reads.append(part.size)
        return part

    monkeypatch.setattr(hf, "read_slice", recorded)
    for row in ("gpt2", "gpt_neox", "phi3", "qwen3_moe"):
        source = written(row).source
        reads.clear()
        params = hf.load_params(source, meshes.make_mesh({"fsdp": 2, "tensor": 4}))
        assert sum(reads) == sum(x.size for x in jax.tree.leaves(params))


def test_files_of_a_bare_model(written, tmp_path):
    w = written("gpt2")
    stored = {name.removeprefix("transformer."): x for name, x in tensors(w.folder).items()}
    stored["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)  # a mask that older files hold
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((w.folder / "config.json").read_text())
    params = hf.load_params(hf.open_folder(tmp_path), meshes.make_mesh({"fsdp": -1}))
    jax.tree.map(np.testing.assert_array_equal, params, w.params)


@pytest.mark.slow
@pytest.mark.parametrize("row", runs.long_but(["qwen3_moe", "gemma3_text", "gpt_neox"], "gemma3_text"))
def test_sharded_model_is_the_unsharded_one(row, written):
    c, params = written(row).source.config, written(row).params
    batch, mesh = tiny.batch(), meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layout = jax.tree.map(lambda x: x.sharding, parameters.abstract_params(c, mesh))

    def value(params, batch, mesh=None):
        out = forward(c, mesh=mesh)(params, batch)
        return (out.logps + 0.1 * out.entropy).mean(), out

    gradient = jax.jit(jax.grad(value, has_aux=True), static_argnums=2)
    expected = gradient(jax.tree.map(np.asarray, params), batch, None)
    sharded = {name: jax.device_put(x, meshes.batch_sharding(mesh)) for name, x in batch.items()}
    grads = gradient(jax.device_put(params, layout), sharded, mesh)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[0]))
    assert scale > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(scale, 1), rtol=0), grads, expected)


@pytest.mark.parametrize("row", runs.by_turn(["gemma3_text", "gpt_neox", "qwen3_moe"], [], ["gemma3_text"]))
def test_a_frozen_model_in_bfloat16_scores_as_the_trained_one(row, written):
    c, params = written(row).source.config, written(row).params
    role: Any = SimpleNamespace(dtype=jnp.dtype("bfloat16"), lora=None, config=c)
    apply = jax.jit(forward(c, dtype=role.dtype, remat="none"))
    frozen = jax.tree_util.tree_map_with_path(lambda path, x: x.astype(leaf_dtype(role, path)), params)
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"float32", "bfloat16"}
    np.testing.assert_array_equal(apply(frozen, tiny.batch()).logps, apply(params, tiny.batch()).logps)


# Configs.

DEFAULT_NAMES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
    "n_head",
}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_field_that_is_left_out_means_what_transformers_makes_of_it(kind):
    full = transformers.AutoConfig.for_model(kind).to_dict() | {"model_type": kind}
    config = FAMILIES[kind].config
    assert config({k: v for k, v in full.items() if k in DEFAULT_NAMES | {"model_type"}}) == config(full)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_dropout_is_never_applied(kind):
    full = transformers.AutoConfig.for_model(kind).to_dict() | {"model_type": kind}
    rates = {name: 0.5 for name in full if "drop" in name} | {"attention_dropout": 0.5, "resid_pdrop": 0.5}
    assert read_config(full | rates, "config.json")[1] == read_config(full, "config.json")[1] == FAMILIES[kind].config(full)


def refuses(row: str, *words: str, **changes) -> None:
    kind = row.split(",")[0]
    base = {k: v for k, v in (tiny.CONFIG | ROWS.get(row, {})).items() if k != "architectures"}
    with pytest.raises(ValueError) as error:
        read_config(json.loads(json.dumps(base | {"model_type": kind} | changes)), "config.json")
    for word in words:
        assert word in str(error.value)


def test_what_the_decoder_has_not_is_refused():
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "olmo2", "phi3", "mixtral", "qwen3_moe"):
        refuses(kind, "hidden_act 'quick_gelu'", kind, "only silu, gelu", hidden_act="quick_gelu")
    for kind in ("gemma2", "gemma3_text"):
        refuses(kind, "hidden_activation 'quick_gelu'", "only silu, gelu", hidden_activation="quick_gelu")
        refuses(kind, "use_bidirectional_attention True", use_bidirectional_attention=True)
    refuses("gemma3_text", "attn_logit_softcapping 50.0", attn_logit_softcapping=50.0)
    refuses("gemma3_text", "rope_type 'linear'", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}})
    refuses("gemma3_text", "rope_parameters", "['rope_theta']", rope_parameters={"rope_theta": 1e4})
    refuses("gpt2", "activation_function 'tanh'", activation_function="tanh")
    refuses("gpt2", "scale_attn_by_inverse_layer_idx True", scale_attn_by_inverse_layer_idx=True)
    refuses("gpt2", "add_cross_attention True", add_cross_attention=True)
    refuses("mistral", "layer_types", layer_types=["full_attention", "sliding_attention"])
    refuses("qwen2", "layer_types hold ['chunked_attention']", layer_types=["chunked_attention", "full_attention"])
    refuses("qwen2", "layer_types name 1 layers, num_hidden_layers is 2", layer_types=["full_attention"])
    refuses("qwen3", "no sliding_window in use", layer_types=["sliding_attention"] * 2, use_sliding_window=False)
    refuses("llama", "partial_rotary_factor 0.5", "only 1.0 is", partial_rotary_factor=0.5)
    refuses("phi3", "rope_type 'linear'", "'default' or 'longrope'", rope_parameters={"rope_type": "linear", "factor": 2.0})
    refuses("qwen3_moe", "decoder_sparse_step 2", decoder_sparse_step=2)
    refuses("qwen3_moe", "mlp_only_layers [1]", mlp_only_layers=[1])
    refuses("mixtral", "router_jitter_noise 0.1", router_jitter_noise=0.1)
    refuses("mixtral", "output_router_logits True", output_router_logits=True)


REFUSED = {"is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx", "output_router_logits", "router_jitter_noise",
           "mlp_only_layers", "use_bidirectional_attention"}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_field_of_transformers_is_read_harmless_or_refused(kind):
    beyond = set(transformers.AutoConfig.for_model(kind).to_dict()) - {*FIELDS, *OWN, "decoder_sparse_step"}
    assert {name for name in beyond if not noted(name)} <= REFUSED


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_fields_of_other_models_are_refused_by_name(kind):
    full = json.loads(json.dumps(transformers.AutoConfig.for_model(kind).to_dict())) | {"model_type": kind}
    for name, value in {
        "quantization_config": {"quant_method": "gptq", "bits": 4}, "quantization": {"bits": 4}, "attention_multiplier": 0.0078125,
        "logit_scale": 0.0625, "residual_multiplier": 0.22, "clip_qkv": 8.0, "alibi": True, "parallel_attn": True, "is_causal": False,
        "no_rope_layers": [1, 0], "kv_lora_rank": 512, "text_config": {"model_type": "x"}, "transformers_weights": "other.safetensors",
        "per_layer_config": {"0": {"num_attention_heads": 2}}, "num_nextn_predict_layers": 1, "is_encoder_decoder": True,
        "an_unknown_field": "x", "drop_first_norm": True,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"config.json: {name} .* is not supported for {kind}; give a model without this field"):
            read_config(full | {name: value}, "config.json")
    neutral = {"clip_qkv": None, "alibi": False, "logit_scale": 1.0, "is_causal": True, "quantization_config": None, "no_rope_layers": [],
               "pruned_heads": {}, "an_unknown_field": 0}  # fmt: skip
    assert read_config(full | neutral, "config.json") == read_config(full, "config.json")
    if kind not in ("gemma2", "gemma3_text"):
        with pytest.raises(ValueError, match="final_logit_softcapping 30.0 is not supported"):
            read_config(full | {"final_logit_softcapping": 30.0}, "config.json")


# Of models that are much used, as their folders have them.
CONFIGS = json.loads((Path(__file__).parent / "oracles" / "configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS["read"])
def test_much_used_models_are_read_as_transformers_has_them(name, tmp_path):
    fields = CONFIGS["read"][name]
    family, config = read_config(fields, "config.json")
    own = transformers.AutoConfig.for_model(**fields)
    assert config == read_config(own.to_dict() | {"model_type": fields["model_type"]}, "config.json")[1]
    assert (config.vocab_size, config.num_hidden_layers) == (own.vocab_size, own.num_hidden_layers)
    assert reward.labels(fields) == (own.num_labels if "Reward" in name or "RM" in name else 0)


@pytest.mark.parametrize("name", CONFIGS["refused"])
def test_much_used_models_that_are_not_read_are_refused_by_name(name):
    fields, word = CONFIGS["refused"][name]
    with pytest.raises(ValueError, match=word):
        read_config(fields, "config.json")
        reward.labels(fields)


def test_a_head_that_is_not_known_is_refused():
    for name in ("LlamaForTokenClassification", "LlamaForCausalLMEagle", "LlamaForRewardModelWithGating"):
        with pytest.raises(ValueError, match=f"architectures in config.json name '{name}', a head that alignax does not know"):
            reward.labels({"architectures": [name]})
    assert [reward.labels({"architectures": x}) for x in (None, [], ["GPT2LMHeadModel"], ["LlamaModel"], ["PeftModelForCausalLM"])] == [
        0
    ] * 5
    with pytest.raises(ValueError, match="architectures in config.json is 'LlamaForCausalLM'; it must be a list of texts"):
        read_config(tiny.CONFIG | {"architectures": "LlamaForCausalLM"}, "config.json")


def test_other_fields_of_the_angles_are_refused():
    refuses("llama", "rope_parameters hold ['mrope_section']", rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]})
    refuses("llama", "rope_parameters hold ['full_attention']", rope_parameters={"full_attention": {"rope_theta": 1e6}})
    refuses("qwen2", "rope_parameters hold ['alpha']", rope_parameters={"type": "dynamic", "factor": 1.0, "alpha": 1000.0})
    refuses(
        "phi3",
        "rope_parameters hold ['long_mscale']",
        **(LONGROPE | {"rope_parameters": LONGROPE["rope_parameters"] | {"long_mscale": 1.2}}),
    )


def test_angles_under_both_names():
    rope = {"rope_type": "yarn", "factor": 4.0}
    base = tiny.CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match="rope_scaling .* stands beside rope_parameters .*; write all values into rope_parameters"):
        read_config(base | {"rope_scaling": rope}, "config.json")
    assert read_config(base | {"rope_scaling": base["rope_parameters"]}, "config.json") == read_config(base, "config.json")


def test_gpt2_by_the_common_names_of_its_fields():
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    rest = {"model_type": "gpt2", "vocab_size": 96, "n_inner": 48}
    own = transformers.GPT2Config(**rest | common)
    assert FAMILIES["gpt2"].config(rest | common) == FAMILIES["gpt2"].config(own.to_dict() | {"model_type": "gpt2"})
    refuses("gpt2", "num_attention_heads 8 is not supported for gpt2; only 4 is", num_attention_heads=8)


def test_a_model_of_several_inputs_is_refused_with_its_text_model():
    with pytest.raises(ValueError, match="model_type 'gemma3' .* supported: gemma2, .*; its text model, 'gemma3_text', is saved alone"):
        read_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "config.json")


@pytest.mark.parametrize("kind", ["qwen2_vl", "llama4", "gemma3n", "granite", "cohere2", "stablelm", "deepseek_v3", "falcon", "smollm3",
                                  "olmo", "olmo3", "glm4", "starcoder2", "gpt_oss", "qwen3_next", "bloom", "mpt", "opt"])  # fmt: skip
def test_other_families_are_refused_before_any_weight_is_read(kind):
    full = json.loads(json.dumps(transformers.AutoConfig.for_model(kind).to_dict(), default=str)) | {"model_type": kind}
    with pytest.raises(ValueError, match=f"model_type '{kind}' in config.json is unknown; supported: gemma2"):
        read_config(full, "config.json")


def test_earlier_names_of_fields_mean_the_same():
    read = lambda kind, drop=(), **new: FAMILIES[kind].config(
        {k: v for k, v in (tiny.CONFIG | {"model_type": kind, "head_dim": 8} | ROWS[kind] | new).items() if k not in drop}
    )
    old = {"rotary_pct": 0.5, "rotary_emb_base": 100}
    assert read("gpt_neox", drop=("rope_parameters",), **old) == read("gpt_neox")
    assert read("gpt_neox", drop=("rope_parameters",), partial_rotary_factor=0.5, rope_theta=100, **old) == read("gpt_neox")
    refuses("gpt_neox", "partial_rotary_factor 0.25 is not supported", "only 0.5 is", partial_rotary_factor=0.25)
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 100.0, "rope_local_base_freq": 10.0}
    assert read("gemma3_text", drop=("rope_parameters",), **scaling) == read("gemma3_text")
    by_pattern = read("gemma3_text", drop=("layer_types",), sliding_window_pattern=2)
    assert by_pattern == read("gemma3_text")
    old = {"rope_scaling": {"type": "su"} | FACTORS, "partial_rotary_factor": 0.5, "rope_theta": 100.0}
    new = {"rope_parameters": HALF | FACTORS | {"rope_type": "longrope"}}
    assert read("phi3", drop=("rope_parameters",), **old) == read("phi3", **new)
