"""The families of Hugging Face models: how a config.json becomes a ModelConfig, and where each weight lives.

Adding a family is a function and a table here, and a row in its test.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignax.models.transformer import ModelConfig

ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # rope_type -> what its parameters must give
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class Family(NamedTuple):
    """A Hugging Face `model_type`."""

    config: Callable[[Mapping[str, Any]], ModelConfig]
    weights: Mapping[str, str]  # our leaf -> name in the files; "{}" is the layer. Matrices are stored transposed, [out, in].
    ignored: tuple[str, ...] = ()  # endings of names that hold no parameter


def _llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not supported for llama; only 'silu' is")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        initializer_range=hf.get("initializer_range", 0.02),
        **rope_options(hf),
    )


def rope_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 5 moved into `rope_parameters`."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] not in ROPE_FIELDS:
        raise ValueError(f"rope_type {rope['rope_type']!r} is unknown; one of {', '.join(ROPE_FIELDS)} is supported")
    if missing := [field for field in ROPE_FIELDS[rope["rope_type"]] if rope.get(field) is None]:
        raise ValueError(f"rope_parameters of type {rope['rope_type']!r} lack {', '.join(missing)}; is config.json complete?")
    if hf.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    hashable = lambda x: tuple(x) if isinstance(x, list) else x
    return {"rope_theta": float(theta), "rope_scaling": tuple(sorted((k, hashable(v)) for k, v in rope.items()))}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        config=_llama_config,
        weights={
            "embed": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "lm_head": "lm_head.weight",
            "layers.attention_norm": "model.layers.{}.input_layernorm.weight",
            "layers.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
            "layers.q": "model.layers.{}.self_attn.q_proj.weight",
            "layers.k": "model.layers.{}.self_attn.k_proj.weight",
            "layers.v": "model.layers.{}.self_attn.v_proj.weight",
            "layers.o": "model.layers.{}.self_attn.o_proj.weight",
            "layers.q_bias": "model.layers.{}.self_attn.q_proj.bias",
            "layers.k_bias": "model.layers.{}.self_attn.k_proj.bias",
            "layers.v_bias": "model.layers.{}.self_attn.v_proj.bias",
            "layers.o_bias": "model.layers.{}.self_attn.o_proj.bias",
            "layers.gate": "model.layers.{}.mlp.gate_proj.weight",
            "layers.up": "model.layers.{}.mlp.up_proj.weight",
            "layers.down": "model.layers.{}.mlp.down_proj.weight",
            "layers.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
            "layers.up_bias": "model.layers.{}.mlp.up_proj.bias",
            "layers.down_bias": "model.layers.{}.mlp.down_proj.bias",
        },
        ignored=("rotary_emb.inv_freq",),
    ),
}


def family(hf: Mapping[str, Any], where: str) -> Family:
    """The family of a parsed config.json; `where` is named in the error for an unknown one."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} in {where} is unknown; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]
