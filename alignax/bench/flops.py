"""Model FLOPs: the work that a method asks of any implementation, counted from the models' shapes and the real tokens alone.

A product of matrices has 2 FLOPs per weight and token, and a backward pass twice those of the forward pass. So a training pass over N
weights has 6 N FLOPs per token, and a frozen model's forward pass 2 N. Attention adds 12 L H Q T per token of training to that
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B), of which half counts, because it is causal; a sliding window leaves fewer keys.
Padding and recomputation do not count. The output layer counts where it predicts a scored token, and the lookup of embeddings never.
Every response counts with its whole prompt, also where the implementation shares one copy. Sampling counts a prompt once for all
its samples.

L layers, H heads of Q numbers, D model, F hidden, V vocabulary, as everywhere in alignax.
"""

from typing import NamedTuple

import numpy as np

from alignax.models.config import ModelConfig
from alignax.models.lora import Lora


class Rows(NamedTuple):
    """The real tokens of R rows."""

    lengths: np.ndarray  # [R] prompt and completion
    scored: np.ndarray  # [R] tokens that a head predicts

    @property
    def tokens(self) -> int:
        """The tokens of all rows."""
        return int(self.lengths.sum())


class Pass(NamedTuple):
    """The FLOPs of a forward pass, by what a backward pass does to them."""

    matrices: float  # of the layers
    adapters: float  # of LoRA
    attention: float  # scores and values
    head: float

    @property
    def total(self) -> float:
        """The FLOPs of the forward pass."""
        return self.matrices + self.adapters + self.attention + self.head


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of each matrix of a layer that a token goes through; of a mixture, those of one expert."""
    D, F, Q = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * Q, config.num_key_value_heads * Q
    gate = {"gate": (D, F)} if config.gated_mlp else {}
    return {"q": (D, query), "k": (D, key), "v": (D, key), "o": (query, D)} | gate | {"up": (D, F), "down": (F, D)}


def weights(config: ModelConfig) -> int:
    """The weights of the layers' matrices that one token goes through: of a mixture, those of its own experts, and the router's."""
    experts = config.num_experts_per_tok if config.num_experts else 1
    own = sum(a * b * (experts if name in ("gate", "up", "down") else 1) for name, (a, b) in shapes(config).items())
    return config.num_hidden_layers * (own + config.hidden_size * config.num_experts)


def adapter_weights(config: ModelConfig, lora: Lora) -> int:
    """The weights of all low-rank adapters."""
    return config.num_hidden_layers * lora.rank * sum(sum(shapes(config)[name]) for name in lora.targets)


def keys(config: ModelConfig, lengths: np.ndarray) -> float:
    """The pairs of a query and a key that it sees, in all rows and layers: T^2 / 2 of a row, W T - W^2 / 2 with a window of W < T."""
    T, windows = lengths.astype(float), config.sliding_windows or (0,) * config.num_hidden_layers
    seen = lambda window: np.where(T > window, window * T - window**2 / 2, T**2 / 2) if window else T**2 / 2
    return float(sum(seen(window).sum() for window in windows))


def forward(config: ModelConfig, rows: Rows) -> Pass:
    """The FLOPs of one forward pass over rows."""
    scores, logits = config.num_labels or config.critic_heads, not config.num_labels or config.language_head
    head = 2.0 * config.hidden_size * (config.predicted_tokens or config.vocab_size) * float(rows.scored.sum()) if logits else 0.0
    head += 2.0 * config.hidden_size * scores * (len(rows.lengths) if config.num_labels else float(rows.scored.sum()))
    return Pass(
        2.0 * weights(config) * rows.tokens,
        2.0 * adapter_weights(config, config.lora) * rows.tokens if config.lora else 0.0,
        4.0 * config.num_attention_heads * config.head_dim * keys(config, rows.lengths),
        head,
    )


def training(config: ModelConfig, rows: Rows) -> float:
    """The FLOPs of a forward and a backward pass. A frozen matrix has no gradient of its weights, and a frozen trunk no backward pass."""
    own, lora = forward(config, rows), config.lora
    if lora is None:
        return 3 * own.total
    if not lora.targets:  # the head of a reward model alone is trained
        return own.matrices + own.attention + 2 * own.head
    return 2 * own.matrices + 3 * own.adapters + 3 * own.attention + (3 if config.num_labels else 2) * own.head


def sampling(config: ModelConfig, prompts: np.ndarray, completions: np.ndarray) -> float:
    """The FLOPs of sampling: prompts [B] in tokens, each read once, and completions [B, n] in tokens, made token by token."""
    whole = prompts[:, None] + completions
    samples, none = completions.shape[1], np.zeros_like(prompts)
    read, again = Rows(whole.ravel(), completions.ravel()), Rows(prompts, none)
    return forward(config, read).total - (samples - 1) * forward(config, again).total
