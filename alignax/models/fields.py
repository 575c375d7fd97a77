"""The fields of a config.json: the kind of each, and which fields are read, ignored or refused."""

from collections.abc import Callable, Mapping
from typing import Any

from alignax.models.transformer import ModelConfig
from alignax.text import short

Json = Mapping[str, Any]
KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number above 0": lambda x: type(x) is int and 0 < x < 2**24,
    "a whole number, 0 or more": lambda x: type(x) is int and 0 <= x < 2**24,
    "a number above 0": lambda x: type(x) in (int, float) and 1e-30 < x < 1e30,
    "a number, 0 or more": lambda x: type(x) in (int, float) and 0 <= x < 1e30,
    "true or false": lambda x: type(x) is bool,
    "text": lambda x: type(x) is str,
    "an object": lambda x: type(x) is dict,
    "a list of texts": lambda x: type(x) is list and all(type(y) is str for y in x),
    "a list of numbers above 0": lambda x: type(x) is list and all(map(KINDS["a number above 0"], x)),
}
# The kind of every field that is read, at the top level and in rope_parameters.
FIELDS: dict[str, str] = {
    name: kind
    for kind, names in {
        "a whole number above 0": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings n_embd n_layer n_head n_inner n_positions sliding_window_pattern num_experts num_local_experts "
        "num_experts_per_tok moe_intermediate_size original_max_position_embeddings",
        "a whole number, 0 or more": "sliding_window max_window_layers predicted_tokens",
        "a number above 0": "rope_theta rope_local_base_freq rotary_emb_base rotary_pct partial_rotary_factor query_pre_attn_scalar "
        "attn_logit_softcapping final_logit_softcapping factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor "
        "mscale mscale_all_dim rms_norm_eps layer_norm_eps layer_norm_epsilon",
        "a number, 0 or more": "initializer_range",
        "true or false": "tie_word_embeddings attention_bias mlp_bias use_sliding_window scale_attn_weights use_parallel_residual "
        "norm_topk_prob truncate",
        "text": "model_type hidden_act hidden_activation activation_function rope_type type",
        "an object": "rope_parameters rope_scaling full_attention sliding_attention",
        "a list of texts": "layer_types architectures",
        "a list of numbers above 0": "short_factor long_factor",
    }.items()
    for name in names.split()
}
# Fields whose null has a meaning of its own; null in any other field is as if the field were absent.
NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "head_dim", "num_key_value_heads")
# Fields of FIELDS that only some families support: field -> these families.
OWN = {
    "attn_logit_softcapping": ("gemma2",),  # gemma3_text has the field, and transformers does not apply it
    "final_logit_softcapping": ("gemma2", "gemma3_text"),
    "num_experts": ("mixtral", "qwen3_moe"),
    "num_local_experts": ("mixtral", "qwen3_moe"),
}
# Fields that change nothing here: notes of tools, labels, options of how a forward pass computes or returns its outputs, and the
# generation defaults of older files. Every name with "dropout" in it is ignored too, and every beginning or ending in NOTED.
NOTES = frozenset(
    "architectures auto_map finetuning_task id2label label2id num_labels score_offset problem_type task_specific_params torch_dtype dtype "
    "tokenizer_class model_max_length max_sequence_length n_ctx seq_length is_decoder is_llama_config transformers.js_config "
    "predict_special_tokens use_cache cache_implementation attn_implementation use_flash_attn flash_attn gradient_checkpointing "
    "output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward pretraining_tp "
    "reorder_and_upcast_attn router_aux_loss_coef max_length min_length max_new_tokens do_sample temperature top_k top_p typical_p "
    "early_stopping num_beams num_beam_groups diversity_penalty length_penalty repetition_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix output_past custom_pipelines value_head_prefix "
    "sliding_window_size trust_remote_code".split()
)
NOTED = ("_", "unsloth_", "summary_"), ("_token_id", "_version", "_pdrop")  # beginnings and endings of ignored names
FACTORS = (  # fields that change nothing if they are 1 or true
    "logit_scale logits_scaling attention_multiplier embedding_multiplier residual_multiplier scale_emb scale_depth rope_ratio "
    "lm_head_multiplier is_causal interpolate_factor full_attn_mod decoder_sparse_step"
).split()
ROPE_NOTES = ("finetuned",)  # ignored fields of rope_parameters


def refuse_foreign(fields: Json, kind: str) -> None:
    """Refuses fields that are neither read nor ignored (unless 0, false or empty), and rope fields that contradict each other."""
    for name, value in fields.items():
        known = kind in OWN[name] if name in OWN else name in FIELDS or noted(name)
        if value is not None and (value != 1 if name in FACTORS else value and not known):
            raise ValueError(
                f"{short(name)[1:-1]} {short(value)} is not supported for {kind}; give a model without this "
                "field (if the field is a note, with which nothing is computed, delete it)"
            )
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    if kind != "gemma3_text" and old and new and old != new:  # transformers would drop rope_theta
        raise ValueError(f"rope_scaling {short(old)} stands beside rope_parameters {short(new)}; write all values into rope_parameters")


def noted(name: str) -> bool:
    """Whether a field is ignored: known to change nothing that is computed here."""
    beginnings, endings = NOTED
    return name in NOTES or "dropout" in name or name.startswith(beginnings) or name.endswith(endings)


def checked(fields: Json, where: str) -> dict[str, Any]:
    """The fields of a config without null ones; a field of the wrong kind is refused."""
    known = {name: value for name, value in fields.items() if value is not None or name in NULL}
    for name, value in known.items():
        if name in FIELDS and value is not None and not KINDS[FIELDS[name]](value):
            raise ValueError(f"{name} in {where} is {short(value)}; it must be {FIELDS[name]}")
    inner = {name: value for name, value in known.items() if FIELDS.get(name) == "an object" and value is not None}
    return known | {name: checked(value, f"{where}, {name}") for name, value in inner.items()}


def check_shape(c: ModelConfig) -> None:
    """Refuses a model config whose sizes do not fit together."""
    if c.predicted_tokens > c.vocab_size:
        raise ValueError(f"predicted_tokens is {c.predicted_tokens}, but the vocabulary has {c.vocab_size} tokens; use at most that")
    if c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {c.num_attention_heads} is no multiple of num_key_value_heads {c.num_key_value_heads}; correct "
            "config.json"
        )
    if c.num_experts_per_tok > c.num_experts:
        raise ValueError(f"num_experts_per_tok is {c.num_experts_per_tok}, but the model has {c.num_experts} experts; use at most that")
    if c.positions == "learned":
        return
    rope, dim = dict(c.rope_scaling), int(c.head_dim * c.partial_rotary_factor)
    kind = rope["rope_type"]
    if dim % 2 or not (4 if kind == "dynamic" else 2) <= dim <= c.head_dim:
        raise ValueError(f"{dim} of the {c.head_dim} dimensions of a head rotate, but {kind!r} rope turns pairs of them; correct head_dim")
    if c.rope_theta <= 1 or rope.get("original_max_position_embeddings", c.max_position_embeddings) < 2:
        raise ValueError(f"rope_theta is {c.rope_theta}, and the (original) context has one position or more; both numbers must be above 1")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor {rope['low_freq_factor']} must be below high_freq_factor {rope['high_freq_factor']}; correct config.json"
        )
    if kind == "longrope" and {len(rope["short_factor"]), len(rope["long_factor"])} != {dim // 2}:
        raise ValueError(f"short_factor and long_factor of {kind!r} rope must have {dim // 2} numbers each")
