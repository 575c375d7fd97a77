"""The shape and the options of a decoder-only transformer; the differences between families are its data."""

import dataclasses
from typing import Any

from alignax.models.lora import Lora


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape and the options of a decoder-only transformer; fields have Hugging Face's names where there are any."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6  # of RMS norms and LayerNorms
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()  # (("rope_type", "llama3"), ...), hashable
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases of q, k, v and o
    mlp_bias: bool = False
    initializer_range: float = 0.02
    qkv_bias: bool = False  # biases of q, k and v only
    norm: str = "rms"  # "rms"; "rms_plus_one": times 1 + weight; "layer": LayerNorm, with a bias
    pre_norms: bool = True  # norms of the inputs of attention and MLP
    post_norms: bool = False  # norms of the outputs of attention and MLP, before the residual sum
    qk_norm: str = "none"  # norms of queries and keys: "head", of each head; "projection", of all heads as one vector
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    hidden_act: str = "silu"  # one of ACTIVATIONS
    gated_mlp: bool = True
    positions: str = "rope"  # or "learned": a position embedding, added to the token embedding
    partial_rotary_factor: float = 1.0  # the share of head_dim that rotates
    local_rope_theta: float | None = None  # theta of layers with a window, without rope scaling; None: as in the other layers
    sliding_windows: tuple[int, ...] = ()  # per layer, the number of keys that a query sees, with its own; 0: all. (): no windows
    query_pre_attn_scalar: float | None = None  # attention scores are divided by its square root; None: by sqrt(head_dim)
    attn_logit_softcapping: float | None = None  # attention scores become cap * tanh(score / cap)
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    num_labels: int = 0  # scores of a reward model; 0: a language model
    padding: int | None = None  # the folder's padding token; as in transformers, a score is read at the last token other than it
    language_head: bool = False  # whether a reward model keeps the output layer, and gives log-probs beside its scores
    critic_heads: int = 0  # heads of a critic on this trunk: values per token, beside the logits
    predicted_tokens: int = 0  # the model predicts only the first so many ids of the vocabulary, and reads all; 0: predicts all
    unused_tokens: tuple[tuple[int, int], ...] = ()  # further ranges [first, end) of ids that are never predicted
    temperature: float = 1.0  # divides the logits, after the soft cap
    num_experts: int = 0  # 0: a dense MLP; otherwise intermediate_size is the size of one expert
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False  # whether the chosen experts' probabilities are normalised to sum to 1
    lora: Lora | None = None  # low-rank adapters of the layers' matrices
