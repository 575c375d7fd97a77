"""The supported Hugging Face model families: how a config.json becomes a ModelConfig, and where the files store each weight.

A new family is a function and a table here, and a row in the test. A field that config.json leaves out has transformers' default; an
option that the decoder does not support is an error. Dropout is never applied, and the load-balancing loss of a mixture of experts is
not added: policy and reference are scored in the same way.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignax.models.fields import FIELDS, ROPE_NOTES, Json, check_shape, checked, refuse_foreign
from alignax.models.layout import Weight
from alignax.models.transformer import ACTIVATIONS, ModelConfig
from alignax.text import short

ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # rope_type -> the fields that its parameters must have
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class Family(NamedTuple):
    """A model family: how to read the configs and the weights of one Hugging Face `model_type`."""

    config: Callable[[Json], ModelConfig]
    weights: Mapping[str, Weight]  # leaf of our parameters -> where the files store it
    ignored: tuple[str, ...] = ()  # endings of the names of tensors that are no parameters


def _llama(hf: Json) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or shared(hf, "hidden_size", "num_attention_heads"),
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        initializer_range=hf.get("initializer_range", 0.02),
        hidden_act=activation(hf, "hidden_act", "silu"),
        **rope_options(hf),
    )


def _mistral(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096} | dict(hf)
    only(hf, layer_types=None)
    plain = {**hf, "attention_bias": False, "mlp_bias": False}  # fields that Mistral's classes do not have
    return dataclasses.replace(_llama(plain), sliding_windows=everywhere(hf))


def _qwen2(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28} | dict(hf)
    c = _llama({**hf, "attention_bias": False, "mlp_bias": False})
    windows = sliding_windows({**hf, "sliding_window": hf["sliding_window"] if hf.get("use_sliding_window") else None}, _late_windows(hf))
    return dataclasses.replace(c, qkv_bias=True, sliding_windows=windows)


def _qwen3(hf: Json) -> ModelConfig:
    hf = {"head_dim": 128} | dict(hf)
    return dataclasses.replace(_qwen2(hf), qkv_bias=False, attention_bias=hf.get("attention_bias", False), qk_norm="head")


def _late_windows(hf: Json) -> list[bool]:
    """Whether each layer of a Qwen model without `layer_types` has a window: the layers from `max_window_layers` on."""
    on = bool(hf.get("use_sliding_window")) and hf["sliding_window"] is not None
    return [on and i >= hf["max_window_layers"] for i in range(hf["num_hidden_layers"])]


def _gemma2(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True} | dict(hf)
    hf = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 4096, "query_pre_attn_scalar": 256} | hf
    c = _llama({**hf, "hidden_act": activation(hf, "hidden_activation", "gelu_pytorch_tanh"), "mlp_bias": False})
    return dataclasses.replace(
        c,
        norm="rms_plus_one",
        post_norms=True,
        embedding_scale=math.sqrt(c.hidden_size),
        sliding_windows=sliding_windows(hf, [i % 2 == 0 for i in range(c.num_hidden_layers)]),
        query_pre_attn_scalar=hf["query_pre_attn_scalar"],
        attn_logit_softcapping=hf["attn_logit_softcapping"],
        final_logit_softcapping=hf["final_logit_softcapping"],
    )


def _gemma3(hf: Json) -> ModelConfig:
    hf = {"max_position_embeddings": 131072, "final_logit_softcapping": None, "sliding_window_pattern": 6} | dict(hf)
    given = hf.get("rope_parameters") or {}
    if odd := sorted(set(given) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"rope_parameters of gemma3_text hold {short(odd)}; give full_attention and sliding_attention")
    whole = {"rope_theta": hf.get("rope_theta", 1e6)} | (given.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
    local = {"rope_theta": hf.get("rope_local_base_freq", 1e4)} | (given.get("sliding_attention") or {})
    only({**local, "model_type": hf["model_type"]}, rope_type="default")
    plain = {**hf, "rope_scaling": None, "rope_parameters": whole, "attn_logit_softcapping": None}
    c, pattern = _gemma2(plain), hf["sliding_window_pattern"]
    windows = sliding_windows(
        hf | {"sliding_window": hf.get("sliding_window", 4096)}, [(i + 1) % pattern != 0 for i in range(c.num_hidden_layers)]
    )
    return dataclasses.replace(c, qk_norm="head", local_rope_theta=float(local["rope_theta"]), sliding_windows=windows)


def _gpt2(hf: Json) -> ModelConfig:
    aliases = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    hf = {own: hf[alias] for alias, own in aliases.items() if alias in hf} | dict(hf)
    only(hf, **{alias: hf[own] for alias, own in aliases.items() if own in hf})
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        intermediate_size=hf.get("n_inner") or 4 * hf["n_embd"],
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        num_key_value_heads=hf["n_head"],
        head_dim=shared(hf, "n_embd", "n_head"),
        max_position_embeddings=hf.get("n_positions", 1024),
        rms_norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        initializer_range=hf.get("initializer_range", 0.02),
        attention_bias=True,
        mlp_bias=True,
        norm="layer",
        gated_mlp=False,
        hidden_act=activation(hf, "activation_function", "gelu_new"),
        positions="learned",
        query_pre_attn_scalar=None if hf.get("scale_attn_weights", True) else 1.0,
    )


def _gpt_neox(hf: Json) -> ModelConfig:
    rope = {"rope_theta": hf.get("rotary_emb_base", 1e4), "partial_rotary_factor": hf.get("rotary_pct", 0.25)}
    rope |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    share = float(rope.pop("partial_rotary_factor"))
    only(hf, partial_rotary_factor=share)  # a copy of rotary_pct, written by transformers 4 and ignored by transformers 5
    own = {"num_key_value_heads": None, "head_dim": None, "mlp_bias": True, "rms_norm_eps": hf.get("layer_norm_eps", 1e-5)}
    own |= {"partial_rotary_factor": None}
    c = _llama({"attention_bias": True, "hidden_act": "gelu"} | dict(hf) | own | {"rope_parameters": rope})
    parallel = hf.get("use_parallel_residual", True)
    return dataclasses.replace(c, norm="layer", gated_mlp=False, parallel_residual=parallel, partial_rotary_factor=share)


def _olmo2(hf: Json) -> ModelConfig:
    c = _llama({"rms_norm_eps": 1e-5} | dict(hf) | {"mlp_bias": False})
    return dataclasses.replace(c, pre_norms=False, post_norms=True, qk_norm="projection")


def _phi3(hf: Json) -> ModelConfig:
    hf = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | dict(hf)
    rope = {"rope_theta": hf.get("rope_theta", 1e4), "partial_rotary_factor": hf.pop("partial_rotary_factor", 1.0)}
    rope |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    share = float(rope.pop("partial_rotary_factor"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope["rope_type"] = "longrope" if kind in ("su", "yarn") else kind  # Phi-3's former names of LongRoPE
    only({**rope, "model_type": "phi3"}, rope_type=("default", "longrope"))
    c = _llama({**hf, "rope_parameters": rope, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(c, sliding_windows=everywhere(hf), partial_rotary_factor=share)


def _mixtral(hf: Json) -> ModelConfig:
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    hf = defaults | {"num_experts_per_tok": 2, "num_local_experts": 8} | dict(hf)
    c = _llama({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(
        c,
        sliding_windows=everywhere(hf),
        num_experts=hf["num_local_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        norm_topk_prob=True,
    )


def _qwen3_moe(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096, "num_experts_per_tok": 8} | dict(hf)
    c = _llama({**hf, "intermediate_size": hf.get("moe_intermediate_size", 768), "mlp_bias": False})
    return dataclasses.replace(
        c,
        qk_norm="head",
        sliding_windows=everywhere(hf) if hf.get("use_sliding_window") else (),
        num_experts=hf.get("num_experts") or hf.get("num_local_experts") or 128,
        num_experts_per_tok=hf["num_experts_per_tok"],
        norm_topk_prob=hf.get("norm_topk_prob", False),
    )


def shared(hf: Json, size: str, heads: str) -> int:
    """The size of an attention head: field `size` divided by field `heads`."""
    if hf[size] % hf[heads]:
        raise ValueError(f"{size} {hf[size]} is no multiple of {heads} {hf[heads]}; check that config.json is complete")
    return hf[size] // hf[heads]


def activation(hf: Json, field: str, default: str) -> str:
    """The name of the MLP's activation, from a field of the config; unsupported activations are refused."""
    if (name := hf.get(field) or default) not in ACTIVATIONS:
        raise ValueError(f"{field} {short(name)} is not supported for {hf['model_type']}; only {', '.join(ACTIVATIONS)} are")
    return name


def only(hf: Json, **supported: Any) -> None:
    """Refuses fields whose value is not the supported one, or in the tuple of supported ones; absent and null fields pass."""
    for field, values in supported.items():
        values = values if isinstance(values, tuple) else (values,)
        if hf.get(field) is not None and hf[field] not in values:
            choice = " or ".join(map(repr, values))
            raise ValueError(f"{field} {short(hf[field])} is not supported for {hf['model_type']}; only {choice} is")


def everywhere(hf: Json) -> tuple[int, ...]:
    """The sliding window of each layer, where all layers have the same one; () without a window."""
    return (hf["sliding_window"],) * hf["num_hidden_layers"] if hf.get("sliding_window") else ()


def sliding_windows(hf: Json, default: list[bool]) -> tuple[int, ...]:
    """The sliding window of each layer: 0 for a layer without one, () if no layer has one.

    `default`: whether each layer has a window, for a config without `layer_types`.
    """
    types = hf.get("layer_types") or ["sliding_attention" if x else "full_attention" for x in default]
    if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"layer_types hold {short(odd)}, which are not supported for {hf['model_type']}; only full_ and sliding_attention are"
        )
    if len(types) != hf["num_hidden_layers"]:
        raise ValueError(f"layer_types name {len(types)} layers, num_hidden_layers is {hf['num_hidden_layers']}; is config.json complete?")
    if "sliding_attention" in types and not hf.get("sliding_window"):
        raise ValueError(f"layer_types hold sliding_attention, and {hf['model_type']}'s config has no sliding_window in use; set one")
    return tuple(hf["sliding_window"] if t == "sliding_attention" else 0 for t in types) if "sliding_attention" in types else ()


def rope_options(hf: Json) -> dict[str, Any]:
    """The ModelConfig fields `rope_theta` and `rope_scaling`, from the fields of transformers 4 or 5 (`rope_parameters`)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    share = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise ValueError(f"partial_rotary_factor {share!r} is not supported for {hf.get('model_type')}; only 1.0 is")
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] not in ROPE_FIELDS:
        raise ValueError(f"rope_type {short(rope['rope_type'])} is unknown; one of {', '.join(ROPE_FIELDS)} is supported")
    if missing := [field for field in ROPE_FIELDS[rope["rope_type"]] if rope.get(field) is None]:
        raise ValueError(f"rope_parameters of type {rope['rope_type']!r} lack {', '.join(missing)}; is config.json complete?")
    inner = lambda name: FIELDS.get(name) == "an object"  # parameters for one kind of layer; _gemma3 has already split them
    if odd := sorted(name for name, value in rope.items() if inner(name) or (value and name not in (*FIELDS, *ROPE_NOTES))):
        raise ValueError(f"rope_parameters hold {short(odd)}, which are not supported for {hf.get('model_type')}")
    if hf.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    hashable = lambda x: tuple(x) if isinstance(x, list) else float(x) if type(x) is int else x  # JAX refuses a large int
    return {"rope_theta": float(theta), "rope_scaling": tuple(sorted((k, hashable(v)) for k, v in rope.items() if k in FIELDS))}


def _layer(names: Mapping[str, str], prefix: str = "model.layers.{}.", kept: bool = False) -> dict[str, Weight]:
    """The weight and the bias of each leaf of a layer, from a table leaf -> name of its module."""
    weights = {f"layers.{leaf}": Weight(f"{prefix}{name}.weight", kept) for leaf, name in names.items()}
    return weights | {f"layers.{leaf}_bias": Weight(f"{prefix}{name}.bias") for leaf, name in names.items()}


_ENDS = {
    "embed": Weight("model.embed_tokens.weight", kept=True),
    "norm": Weight("model.norm.weight"),
    "lm_head": Weight("lm_head.weight"),
    "score": Weight("score.weight"),
}
_QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_LLAMA = _ENDS | _layer(_NORMS | _QKV | {"o": "self_attn.o_proj"} | _MLP)
_QWEN3 = _LLAMA | _layer(_QK_NORMS)
_POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_GEMMA = _LLAMA | _layer({"mlp_norm": "pre_feedforward_layernorm"} | _POST_NORMS)
_OLMO2 = {n: w for n, w in _QWEN3.items() if n not in ("layers.attention_norm", "layers.mlp_norm")} | _layer(_POST_NORMS)
_PHI3 = _LLAMA | _layer({n: "self_attn.qkv_proj" for n in "qkv"} | {n: "mlp.gate_up_proj" for n in ("gate", "up")})
_GPT2 = {
    "embed": Weight("transformer.wte.weight", kept=True),
    "position_embed": Weight("transformer.wpe.weight", kept=True),
    "norm": Weight("transformer.ln_f.weight"),
    "norm_bias": Weight("transformer.ln_f.bias"),
    "lm_head": Weight("lm_head.weight"),
    "score": Weight("score.weight"),
} | _layer(
    {"attention_norm": "ln_1", "mlp_norm": "ln_2", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    | {n: "attn.c_attn" for n in "qkv"},
    prefix="transformer.h.{}.",
    kept=True,
)  # fmt: skip
_GPT_NEOX = {
    "embed": Weight("gpt_neox.embed_in.weight", kept=True),
    "norm": Weight("gpt_neox.final_layer_norm.weight"),
    "norm_bias": Weight("gpt_neox.final_layer_norm.bias"),
    "lm_head": Weight("embed_out.weight"),
    "score": Weight("score.weight"),
} | _layer(
    _NORMS | {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}, prefix="gpt_neox.layers.{}."
)  # fmt: skip
_GPT_NEOX |= {
    f"layers.{leaf}{ours}": Weight(f"gpt_neox.layers.{{}}.attention.query_key_value.{theirs}", by_head=True)
    for ours, theirs in (("", "weight"), ("_bias", "bias"))
    for leaf in "qkv"
}
_QWEN3_MOE = _QWEN3 | _layer({"router": "mlp.gate"} | {leaf: f"mlp.experts.{{}}.{leaf}_proj" for leaf in ("gate", "up", "down")})
_MIXTRAL = _LLAMA | _layer(
    {"router": "gate", "gate": "experts.{}.w1", "up": "experts.{}.w3", "down": "experts.{}.w2"},
    prefix="model.layers.{}.block_sparse_moe.",
)
_ROTARY = ("rotary_emb.inv_freq",)  # a table in older files

FAMILIES: dict[str, Family] = {
    "gemma2": Family(_gemma2, _GEMMA, _ROTARY),
    "gemma3_text": Family(_gemma3, _GEMMA | _layer(_QK_NORMS), _ROTARY),
    "gpt2": Family(_gpt2, _GPT2, (".attn.bias", ".attn.masked_bias")),
    "gpt_neox": Family(_gpt_neox, _GPT_NEOX, (".attention.bias", ".attention.masked_bias", *_ROTARY)),
    "llama": Family(_llama, _LLAMA, _ROTARY),
    "mistral": Family(_mistral, _LLAMA, _ROTARY),
    "mixtral": Family(_mixtral, _MIXTRAL, _ROTARY),
    "olmo2": Family(_olmo2, _OLMO2, _ROTARY),
    "phi3": Family(_phi3, _PHI3, _ROTARY),
    "qwen2": Family(_qwen2, _LLAMA, _ROTARY),
    "qwen3": Family(_qwen3, _QWEN3, _ROTARY),
    "qwen3_moe": Family(_qwen3_moe, _QWEN3_MOE, _ROTARY),
}


def read(hf: Any, where: str) -> tuple[Family, ModelConfig]:
    """The family and the ModelConfig of a parsed config.json.

    Raises:
      ValueError: for an unknown family, and for a field that is missing, of the wrong kind or not supported; it names `where`.
    """
    fields = checked(hf, where)
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        inner = fields.get("text_config")
        told = f"; its text model, {short(inner.get('model_type'))}, is saved alone by transformers" if isinstance(inner, dict) else ""
        raise ValueError(f"model_type {short(kind)} in {where} is unknown; supported: {', '.join(sorted(FAMILIES))}{told}")
    try:
        refuse_foreign(fields, kind)
        config = dataclasses.replace(FAMILIES[kind].config(fields), predicted_tokens=fields.get("predicted_tokens", 0))
        check_shape(config)
    except KeyError as e:
        raise ValueError(f"{where} lacks the field {e.args[0]!r}; is it a complete {kind} config?") from e
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    return FAMILIES[kind], config
