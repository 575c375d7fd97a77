"""One decoder-only transformer for every model family; the differences between families are data in `ModelConfig`.

The decoder is a Flax Linen module under `nn.scan`, used only as pure functions, by `init` and `apply`. `forward` makes the function
`(params, batch) -> Outputs` that the training step and the experience functions call.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from alignax.mesh import DECODING, constrain
from alignax.models import cache as caches
from alignax.models import kernels
from alignax.models.attention import packed_attention
from alignax.models.cache import Cache
from alignax.models.config import ModelConfig
from alignax.models.heads import Shaping, last_scores, token_logps, token_values
from alignax.models.lora import adapt
from alignax.models.moe import experts
from alignax.models.rope import rope_tables, rotate, shares_prompts
from alignax.models.rows import Laid, Sight, at_places, laid_out
from alignax.models.statistics import Statistic, check_statistics
from alignax.packing import Packed
from alignax.types import Batch, Outputs, Params, rows

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,  # the tanh approximation, under its two names
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


class Lookup(NamedTuple):
    """How a mesh has an embedding table [V, D], and the way of embeddings [R, T, D] from it to their batch shards, by logical axes."""

    stored: tuple[str | None, str]
    way: tuple[tuple[str | None, ...], ...]  # their gradients go it backwards


# With `tensor` over D nothing is summed, and only D / (tensor fsdp) columns of all tokens are exchanged.
UNTIED = Lookup((None, "table"), (("lookup", "tokens", "table"), ("batch", "tokens", "split"), ("batch", "tokens", None)))
# A table that is the head too has `tensor` over V, and what its shards find is summed.
TIED = Lookup(("vocab", "embed"), (("lookup", "tokens", "embed"), ("batch", "tokens", None)))
INPUT = "layer_input"  # name of a layer's input, for policies
HOST = "pinned_host"  # the memory that "offload" moves layers' inputs to
# What the forward pass of a layer keeps for the backward pass, beside the layer's input; all else is computed again. Memory rises from
# "offload" to "none".
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": kernels.attention_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src="device", offload_dst=HOST
    ),
}


class Block(nn.Module):
    """One layer of the decoder: attention and an MLP (or experts) on the residual stream, with norms before, after or both."""

    config: ModelConfig
    dtype: Any
    mesh: Mesh | None
    keep: Any
    states: bool
    kernel: str  # of padded rows: "xla", "splash" or "cudnn"
    weights: str  # the layout of the weights, see `alignax.mesh.DECODING`

    def pin(self, x: jax.Array, axis: str = "embed") -> jax.Array:
        """Pins the sharding of an activation x [R, T, features] beside weights that are laid out for decoding, by its last axis.

        Left alone, the partitioner would gather the weight, which is larger.
        """
        if self.weights == "train":
            return x
        return constrain(x, self.mesh, "stream", None, None if axis == "embed" else axis, rules=DECODING[self.weights])

    def dense(self, name: str, x: jax.Array, features: int, axes: tuple[str, str], bias: bool) -> jax.Array:
        """A linear map x[.., in] @ W[in, out] (+ b[out]), with its adapters; the weights are float32, the products in `dtype`."""
        x, init = self.pin(x, axes[0]), nn.with_logical_partitioning(nn.initializers.normal(self.config.initializer_range), axes)
        weight = self.param(name, init, (x.shape[-1], features), jnp.float32)
        # One axis of rows instead of R and T: the backward pass takes a third less time on CPU.
        flat, weight, lora = x.reshape(-1, x.shape[-1]), jnp.asarray(weight, self.dtype), self.config.lora
        y = flat @ weight
        if lora and lora.int8:
            ones = nn.with_logical_partitioning(nn.initializers.ones, axes[1:])
            scale = jnp.asarray(self.param(name + "_scale", ones, (features,), jnp.float32), self.dtype)[None]
            y, weight = y * scale, weight * scale  # the second for DoRA alone: a product reads int8
        if lora and name in lora.targets:
            y = adapt(lora, self.param, name, flat, weight, y, axes)
        y = self.pin(y.reshape(*x.shape[:-1], features), axes[1])
        if bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
            y = y + jnp.asarray(self.param(name + "_bias", zeros, (features,), jnp.float32), self.dtype)[None, None]
        return y

    @nn.compact
    @jax.named_scope("layer")
    def __call__(self, carry: Any, layer: jax.Array, window: jax.Array | None, rope: Any, at: Any, mask: Any):
        """Applies one layer to the carry (x [R, T, D], cache); see `Decoder` for the arguments.

        Returns the new carry, and x with `states`, or else the keys and values with `keep`.
        """
        c = self.config
        x, cache = carry
        x = checkpoint_name(x, INPUT)
        h, cache, kept = self.attend(norm(self, "attention_norm", x) if c.pre_norms else x, cache, layer, window, rope, at, mask)
        after = x + (norm(self, "attention_post_norm", h) if c.post_norms else h)
        h = x if c.parallel_residual else after
        h = self.mlp(norm(self, "mlp_norm", h) if c.pre_norms else h)
        x = after + (norm(self, "mlp_post_norm", h) if c.post_norms else h)
        x = constrain(x, self.mesh, "stream", "tokens" if isinstance(mask, Sight) else None, None, rules=DECODING[self.weights])
        return (x, cache), x if self.states else kept

    @jax.named_scope("attention")
    def attend(self, x: jax.Array, cache: Cache | None, layer: jax.Array, window: jax.Array | None, rope: Any, at: Any, mask: Any):
        """Attention with its four projections.

        Returns the output [R, T, D], the cache with the new keys and values, and with `keep` the keys and values of x (else None).
        """
        c = self.config
        R, T, _ = x.shape
        bias = c.attention_bias or c.qkv_bias
        q = self.dense("q", x, c.num_attention_heads * c.head_dim, ("embed", "heads"), bias)
        k = self.dense("k", x, c.num_key_value_heads * c.head_dim, ("embed", "heads"), bias)
        v = self.dense("v", x, c.num_key_value_heads * c.head_dim, ("embed", "heads"), bias)
        # Beside weights that are laid out for decoding, attention goes by rows, as the cache.
        by_rows = lambda a: a if self.weights == "train" else constrain(a, self.mesh, "batch", None, "heads")
        q, k, v = map(by_rows, (q, k, v))
        if c.qk_norm == "projection":
            q, k = norm(self, "q_norm", q), norm(self, "k_norm", k)
        q, k, v = (a.reshape(R, T, -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm == "head":
            q, k = norm(self, "q_norm", q), norm(self, "k_norm", k)
        if c.local_rope_theta is not None and window is not None:
            rope = jax.tree.map(lambda table: table[jnp.int32(window > 0)], rope)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        options: Any = {"window": window, "scalar": c.query_pre_attn_scalar, "cap": c.attn_logit_softcapping}
        if isinstance(mask, Sight):
            h = packed_attention(q, k, v, mask, self.mesh, kernel=self.kernel, **options)
        elif cache is None:
            h = kernels.attend(self.kernel, q, k, v, mask, self.mesh, windows=c.sliding_windows, **options)
        elif at.ndim == 0:
            cache = caches.extend(cache, layer, at, k, v)
            h = caches.attend_piece(q, cache, layer, at, **options)
        else:
            cache = caches.write(cache, layer, at, k[:, 0], v[:, 0], self.mesh)
            h = caches.attend(q[:, 0], cache, layer, at, **options)
        kept = None if self.keep is None else caches.pack(k.swapaxes(1, 2), v.swapaxes(1, 2), self.keep)
        return self.dense("o", by_rows(h.reshape(R, T, -1)), c.hidden_size, ("heads", "embed"), c.attention_bias), cache, kept

    @jax.named_scope("mlp")
    def mlp(self, x: jax.Array) -> jax.Array:
        """The MLP, [R, T, D] -> [R, T, D]: down(act(gate(x)) * up(x)), down(act(up(x))), or a mixture of experts."""
        c = self.config
        act = ACTIVATIONS[c.hidden_act]
        if c.num_experts:
            return self.experts(x, act)
        gate = self.dense("gate", x, c.intermediate_size, ("embed", "mlp"), c.mlp_bias) if c.gated_mlp else None
        up = self.dense("up", x, c.intermediate_size, ("embed", "mlp"), c.mlp_bias)
        return self.dense("down", act(up) if gate is None else act(gate) * up, c.hidden_size, ("mlp", "embed"), c.mlp_bias)

    def experts(self, x: jax.Array, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A mixture of experts, [R, T, D] -> [R, T, D]; see `alignax.models.moe.experts`."""
        c = self.config
        E, D, F = c.num_experts, c.hidden_size, c.intermediate_size

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), axes)
            return jnp.asarray(self.param(name, init, shape, jnp.float32), self.dtype)

        router = weight("router", (D, E), ("embed", None))
        gate, up = (weight(name, (E, D, F), ("expert", "embed", None)) for name in ("gate", "up"))
        down = weight("down", (E, F, D), ("expert", None, "embed"))
        k, normalise = c.num_experts_per_tok, c.norm_topk_prob
        return experts(x, router, (gate, up, down), k=k, normalise=normalise, activation=act, mesh=self.mesh, rules=DECODING[self.weights])


class Decoder(nn.Module):
    """The decoder: token ids to final hidden states. The parameters of its layers are stacked on a leading axis L and scanned."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "full"
    mesh: Mesh | None = None
    keep: Any = None  # without a cache, the dtype of the cache that is returned; None: no cache is returned
    states: bool = False  # whether the hidden states after every layer are returned instead
    attention: str = "xla"  # one of `kernels.KERNELS`
    weights: str = "train"  # how the parameters are laid out over the mesh, see `alignax.mesh.DECODING`

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
        at: jax.Array | None = None,
        sight: Sight | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The final hidden states [R, T, D] of whole sequences, or of further tokens with a cache; and a cache or None.

        The returned cache is the given one with the new tokens, or with `keep` a new one of whole sequences. With `states` the hidden
        states after every layer, [L, R, T, D] before the last norm, are returned in place of the cache.

        Args:
          tokens: [R, T] int; with a cache the next token of each row, [R, 1], or the next T.
          mask: [R, T] bool, True for real tokens; None with a cache.
          cache: keys and values of the earlier tokens; None for whole sequences.
          at: with a cache the number of tokens before these: [R] int of each row's one token, or [] int of the T tokens of all rows.
          sight: which tokens of packed rows see which; None: each row is one sequence.
          lengths: [R, T] int, with `sight` or T tokens and a cache: the length of each token's own sequence.
        """
        c, kernel, back = self.config, "xla", None
        if cache is None and self.keep is None:
            block = 0 if sight is None else tokens.shape[1] // sight.blocks
            kernel, _ = kernels.chosen(self.attention, c, self.dtype, tokens.shape[1], kernels.platform(self.mesh), block)
        if kernel == "cudnn":
            assert mask is not None
            order, back = kernels.right_padded(mask)
            tokens, mask = at_places(tokens, order), at_places(mask, order)
        lookup = TIED if c.tie_word_embeddings else UNTIED
        normal = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), lookup.stored)
        embed: Any = self.param("embed", normal, (c.vocab_size, c.hidden_size), jnp.float32)
        if c.num_labels:
            normal_head = nn.initializers.normal(1 / math.sqrt(c.hidden_size))
            self.param("score", nn.with_logical_partitioning(normal_head, ("embed", None)), (c.hidden_size, c.num_labels), jnp.float32)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            self.param("score_offset", zeros, (c.num_labels,), jnp.float32)
        if c.critic_heads:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", None))
            self.param("value", zeros, (c.hidden_size, c.critic_heads), jnp.float32)
        if not c.tie_word_embeddings and (c.language_head or not c.num_labels):
            head = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("embed", "vocab"))
            self.param("lm_head", head, (c.hidden_size, c.vocab_size), jnp.float32)
        if sight is not None:
            positions = sight.positions
        elif at is None:
            assert mask is not None
            # Positions count real tokens only, so that a row's outputs do not depend on where its padding stands.
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        else:
            positions = at[:, None] if at.ndim else at + jnp.arange(tokens.shape[1])[None]
        rope = rope_tables(c, positions, lengths) if c.positions == "rope" else None
        windows = jnp.asarray(c.sliding_windows, jnp.int32) if any(c.sliding_windows) else None  # [L]
        if self.weights == "train":
            x = embedded(embed, tokens, self.dtype, self.mesh, lookup)
        else:
            x = constrain(jnp.asarray(embed, self.dtype), self.mesh, *lookup.stored, rules=DECODING[self.weights])[tokens]
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        if c.positions == "learned":
            normal = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), (None, "embed"))
            learned = self.param("position_embed", normal, (c.max_position_embeddings, c.hidden_size), jnp.float32)
            x = x + constrain(jnp.asarray(learned, self.dtype), self.mesh, None, None)[positions]
        x = constrain(x, self.mesh, "stream", None if sight is None else "tokens", None, rules=DECODING[self.weights])
        block = Block if REMAT[self.remat] is None else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        axes: Any = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)  # layer, window, rope, at, mask
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            out_axes=0,
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = jnp.arange(c.num_hidden_layers)
        # The cache is part of the carry, so that it is written in place; as input and output of the scan it takes 1.9 times as long.
        (x, cache), kept = stack(c, self.dtype, self.mesh, self.keep, self.states, kernel, self.weights, name="layers")(
            (x, cache), layers, windows, rope, at, mask if sight is None else sight
        )
        if self.states:
            assert isinstance(kept, jax.Array)
            kept = jax.vmap(at_places, (0, None))(kept, back)
        return at_places(norm(self, "norm", x), back), kept if self.states or self.keep is not None else cache


@jax.named_scope("embed")
def embedded(embed: jax.Array, tokens: jax.Array, dtype: Any, mesh: Mesh | None, lookup: Lookup) -> jax.Array:
    """The embeddings [R, T, D], in `dtype`, of tokens [R, T] from a table [V, D]; the table's gradient is summed in its own dtype.

    On a mesh every device looks up the tokens of all fsdp shards in its own part of the table. An exchange of activations then gives each
    batch shard the whole D of its own tokens. So neither the table nor its gradient [V, D] is ever gathered over fsdp.
    """
    as_stored = lambda table: constrain(table, mesh, *lookup.stored)
    through = lambda x, way: functools.reduce(lambda x, axes: constrain(x, mesh, *axes), way, x)

    @jax.custom_vjp
    def look_up(embed: jax.Array, tokens: jax.Array) -> jax.Array:
        return through(as_stored(embed.astype(dtype))[constrain(tokens, mesh, "lookup", "tokens")], lookup.way)

    def back(tokens: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
        dx = through(dx, lookup.way[::-1]).astype(embed.dtype)
        zeros = as_stored(jnp.zeros(embed.shape, embed.dtype))
        return as_stored(zeros.at[constrain(tokens, mesh, "lookup", "tokens")].add(dx)), None

    look_up.defvjp(lambda embed, tokens: (look_up(embed, tokens), tokens), back)
    return look_up(embed, tokens)


def norm(module: Block | Decoder, name: str, x: jax.Array) -> jax.Array:
    """RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467) or LayerNorm of x [.., D], computed in float32: [.., D] in the dtype of x.

    `name`: the parameter of the module that holds the weight [D].
    """
    c, shape = module.config, (x.shape[-1],)
    # Axes of size 1 are left out: a CPU takes six times as long for the gradients of packed rows [1, P, D] as for those of [P, D].
    y = x.reshape(*(n for n in x.shape[:-1] if n > 1), *shape).astype(jnp.float32)
    # "rms_plus_one" adds 1 to the weight, so the weight starts from 0.
    first = nn.initializers.zeros if c.norm == "rms_plus_one" else nn.initializers.ones
    whole = lambda a: a.reshape((1,) * (y.ndim - 1) + shape)
    weight = whole(jnp.asarray(module.param(name, nn.with_logical_partitioning(first, (None,)), shape, jnp.float32), jnp.float32))
    if c.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + c.rms_norm_eps)
    y = y * (1 + weight if c.norm == "rms_plus_one" else weight)
    if c.norm == "layer":
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        y = y + whole(jnp.asarray(module.param(name + "_bias", zeros, shape, jnp.float32), jnp.float32))
    return y.astype(x.dtype).reshape(x.shape)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """The weight [D, V] of the output layer, or the transposed embedding if they are tied; V counts predicted tokens only."""
    weight = params["embed"].T if config.tie_word_embeddings else params["lm_head"]
    return weight[:, : config.predicted_tokens] if config.predicted_tokens else weight


def shaping(config: ModelConfig) -> Shaping:
    """The changes to a model's logits before their softmax: soft cap, temperature and unused tokens of its config."""
    return Shaping(config.final_logit_softcapping, config.temperature, config.unused_tokens)


def init(config: ModelConfig, key: jax.Array) -> Any:
    """Initialises a model's parameters, boxed with their logical axes (see `alignax.mesh.param_shardings`)."""
    one = jnp.ones((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one.astype(bool))["params"]


def forward(
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "full",
    chunk: int = 256,
    mesh: Mesh | None = None,
    teacher: tuple[ModelConfig, Params] | None = None,
    mixture: tuple[float, float] = (0.5, 1.0),
    statistics: tuple[Statistic, ...] = (),
    hidden: tuple[int, ...] = (),
    attention: str = "xla",
) -> Callable[[Params, Batch], Outputs]:
    """Makes the forward pass of a model, a pure function `(params, batch) -> Outputs`.

    A language model gives per-token log-probs and statistics at completion positions, [B, N, T]. A reward model gives scores, [B, N], or
    [B, N, labels] of several labels. A reward model with a `language_head` gives both.

        apply = forward(config, dtype=jnp.bfloat16)
        logps = apply(params, batch).logps  # [B, N, T]

    Args:
      config: the model.
      dtype: the dtype of activations and matrix products; parameters stay in float32.
      remat: what the backward pass computes again, one of `REMAT`: "full" (each layer, from its input), "attention" (each layer, but for
        its attention), "dots" (all but matrix products), "none", or "offload" (as "full", with the inputs of layers in the memory of
        the host).
      chunk: positions scored at a time, see `alignax.models.heads.token_logps`.
      mesh: the mesh that activations are sharded over; None for one device.
      teacher: a frozen model of the same vocabulary. The outputs then have `ref_kl`, `policy_kl` and `jsd` at every scored position, for
        the price of the teacher's forward pass. The teacher reads `ref_tokens` if the batch has them. Under jit its parameters must be
        arguments of the program, not constants.
      mixture: beta and temperature of `jsd`, see `alignax.models.statistics.jsd`.
      statistics: further statistics of the next-token distributions, which `Outputs.statistics` has by name.
      hidden: indices of layers, from 0, whose hidden states `Outputs.hidden` has by index: [B, N, T, D], before the last norm; those of
        padding mean nothing. It keeps the hidden states of all layers in memory.
      attention: what computes attention: "xla", "splash" (TPU), "cudnn" (GPU, padded rows), or "auto", the platform's own where its
        conditions hold, see `alignax.models.kernels`.

    Raises:
      ValueError: for an unknown `remat` or `attention`, for one that the devices cannot do, and for layers and statistics that this
        model does not have.
    """
    check_remat(remat, mesh)
    if attention not in kernels.KERNELS:
        raise ValueError(f"model.attention {attention!r} is unknown; use {', '.join(kernels.KERNELS)}")
    if beyond := [layer for layer in hidden if layer not in range(config.num_hidden_layers)]:
        raise ValueError(f"layer {beyond[0]} is asked for, and the model has {config.num_hidden_layers}; they are counted from 0")
    speaks = config.language_head or not config.num_labels
    if statistics and not speaks:
        raise ValueError(f"the statistic {statistics[0].name!r} is of log-probs, and a reward model has none; set model.language_head=true")
    check_statistics(statistics, teacher is not None)
    decoder = Decoder(config, dtype, remat, mesh, states=bool(hidden), attention=attention)

    def spoken(params: Params, batch: Batch, states: jax.Array, laid: Laid) -> Outputs:
        tokens, scored = rows(batch["tokens"]), rows(batch["completion_mask"])  # [R, T]
        # Position t - 1 predicts token t; the last position predicts nothing.
        before = lambda states, laid: (states[:, :-1], None) if laid.places is None else (states, laid.places[:, :-1])
        taught = None
        if teacher is not None:
            own = ("ref_tokens" if "ref_tokens" in batch else "tokens", "ref_mask" if "ref_mask" in batch else "mask")
            theirs = read(teacher[0], batch, *own)
            hidden, places = before(decoded(Decoder(teacher[0], dtype, remat, mesh, attention=attention), teacher[1], theirs)[0], theirs)
            taught = hidden, head_weight(*teacher), places
        weight, (hidden, places) = head_weight(config, params), before(states, laid)
        options: Any = {"how": shaping(config), "teacher": taught, "mixture": mixture, "statistics": statistics, "places": places}
        out = token_logps(hidden, weight, tokens[:, 1:], scored[:, 1:], chunk=chunk, mesh=mesh, **options)
        back = lambda x: jnp.pad(x, ((0, 0), (1, 0))).reshape(batch["tokens"].shape)  # [B, N, T]
        return jax.tree.map(back, out)

    def apply(params: Params, batch: Batch) -> Outputs:
        laid = read(config, batch)
        states, layers = decoded(decoder, params, laid)  # [R, T, D], and [L, R, T, D] with `hidden`
        out = spoken(params, batch, states, laid) if speaks else Outputs(None, None)  # pyright: ignore[reportArgumentType]
        if config.num_labels:
            real = rows(batch["mask"]) & rows(batch["completion_mask"]).any(axis=1, keepdims=True)  # a row without completion scores 0
            real = real if config.padding is None else real & (rows(batch["tokens"]) != config.padding)
            scores = last_scores(states, real, params["score"], params["score_offset"], laid.places)
            scores = scores.reshape(*batch["tokens"].shape[:2], -1)
            out = out._replace(scores=scores[..., 0] if config.num_labels == 1 else scores)
        if config.critic_heads:
            out = out._replace(values=token_values(states, batch["completion_mask"], params["value"], places=laid.places))
        whole = lambda x: at_places(x, laid.places).reshape(*batch["tokens"].shape, -1)
        if laid.places is not None:  # a padding token has no state there
            whole = lambda x, whole=whole: jnp.where(batch["mask"][..., None], whole(x), 0)
        return out._replace(hidden={i: whole(layers[i]) for i in hidden}) if hidden else out

    return apply


def check_remat(remat: str, mesh: Mesh | None) -> None:
    """Refuses an unknown `remat`, and "offload" on devices that do not reach the pinned memory of their host."""
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is unknown; use {', '.join(REMAT)}")
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if remat == "offload" and HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise ValueError(
            f"model.remat is 'offload', and {device.device_kind} reaches no {HOST} memory, only {', '.join(kinds)}; use model.remat=full"
        )


def read(config: ModelConfig, batch: Batch, *fields: str) -> Laid:
    """The rows of a batch as a model reads them, see `laid_out`; refuses shared prompts of a model whose angles depend on the length."""
    if isinstance(batch, Packed) and batch.form.shared and not shares_prompts(config):
        raise ValueError(f"rotary angles of type {dict(config.rope_scaling)['rope_type']!r} depend on a row's length; use shared=False")
    return laid_out(batch, *fields)


def decoded(decoder: Decoder, params: Params, laid: Laid) -> Any:
    """What the decoder gives for rows that are laid out: the final hidden states, and those of all layers if it keeps them."""
    return decoder.apply({"params": params}, laid.tokens, laid.mask, sight=laid.sight, lengths=laid.lengths)


def critic(
    config: ModelConfig, *, dtype: Any = jnp.float32, remat: str = "full", mesh: Mesh | None = None, attention: str = "xla"
) -> Callable[[Params, Batch], jax.Array]:
    """Makes the forward pass of a critic with parameters of its own, a pure function `(params, batch) -> values`.

    The critic is a reward model whose score before every token is the value: [B, N, T], or [B, N, T, H] with H labels.

    Args:
      config: the config of the reward model.
      dtype: as in `forward`.
      remat: as in `forward`.
      mesh: as in `forward`.
      attention: as in `forward`.
    """
    decoder = Decoder(config, dtype, remat, mesh, attention=attention)

    def apply(params: Params, batch: Batch) -> jax.Array:
        laid = read(config, batch)
        hidden, _ = decoded(decoder, params, laid)  # [R, T, D]
        return token_values(hidden, batch["completion_mask"], params["score"], params["score_offset"], laid.places)

    return apply
