"""Speakers: the sources of next-token logits that a sampler reads.

A speaker is a language model (`speaker`), a combination of several models (`combined`), or a speaker with a function of its logits
(`processed`). For example, proxy-tuning steers a large model by the difference between a small tuned model and its untuned version:

    large, small = speaker(large_config), speaker(small_config)
    generate = Generator(combined([large, small, small], [1.0, 1.0, -1.0]), shape, Sampling(temperature=0.0))
    completions = generate((large_params, tuned_params, untuned_params), prompts, key)
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax.mesh import DECODING, constrain, device_bytes, device_memory, sharding
from alignax.models import cache as caches
from alignax.models.cache import Cache
from alignax.models.heads import NEVER, shaped
from alignax.models.parameters import SCALE, abstract_params, decoding_params, in_int8_for_decoding, int8_config
from alignax.models.transformer import Decoder, ModelConfig, head_weight, shaping

WEIGHTS = ("auto", *DECODING)  # the layouts of weights that are sampled from
SHARE = 1 / 4  # "auto" replicates weights that take at most this share of a device's memory
PIECE = 512  # tokens of a longer prompt that are read at once


class Speaker(NamedTuple):
    """A source of next-token logits: pure functions of parameters and of a cache of the tokens read so far.

    A cache is any tree of arrays whose second axis is rows. The cache of a prompt has P positions. It is copied into a row of P + C
    positions, to the beginning of every further axis.
    """

    vocab_size: int  # tokens that it reads
    predicted: int  # V, the tokens that it gives logits for: the first V of the vocabulary
    positions: int  # the most tokens of prompt and completion
    exact: bool  # whether its distribution is that of one model, so that the model's log-probs are those of the samples
    mesh: Mesh | None  # the mesh of its parameters
    empty: Callable[[int, int], Any]  # (rows, positions) -> an empty cache
    layout: Callable[[str | None], Any]  # (logical axis of rows: "batch" or None) -> the shardings of a cache; needs a mesh
    read: Callable[[Any, jax.Array, jax.Array], Any]  # (params, tokens [R, P], real [R, P] bool) -> the cache of R prompts
    head: Callable[[Any], Any]  # (params) -> values that are the same for all tokens, computed once per call
    # (params, head, cache, tokens [S, W], at [S]) -> logits [S, V] float32 of the token after position `at`, and the cache with the token
    # at `at`. The given cache holds the tokens at 0 .. at - 1. `tokens` after `at` are meaningless.
    logits: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    names: Any = ""  # tree like its parameters, with the name of a model in the place of that model's parameters; () for no parameters
    # (parameters or their shapes) -> the shapes, dtypes and shardings in which `read`, `head` and `logits` take them
    laid: Callable[[Any], Any] = lambda params: params
    formed: Callable[[Any], Any] = lambda params: params  # (parameters) -> their tree as in `laid`, which has its dtypes and shardings


def speaker(
    config: ModelConfig,
    dtype: Any = jnp.float32,
    cache_dtype: str = "",
    mesh: Mesh | None = None,
    name: str = "",
    weights: str = "auto",
    piece: int = PIECE,
    int8: bool = False,
) -> Speaker:
    """Makes the speaker of one language model. A generator lays its parameters, those of training, out for decoding.

    Args:
      config: the model; adapters and an int8 base are supported.
      dtype: the dtype of activations, as in `alignax.models.transformer.forward`.
      cache_dtype: "float32", "bfloat16" or "int8"; empty: the dtype of activations.
      mesh: the mesh of the parameters; None for one device.
      name: the name of the model, by which a run finds its parameters.
      weights: the layout of weights that are sampled from, one of `WEIGHTS`, see `layout_of`; "train": they stay as in training.
      piece: tokens of a longer prompt that are read at once, which bounds the memory of its activations.
      int8: whether matrices of layers and output layer are laid out in int8, with a scale for each output. A step then reads half the
        bytes of bfloat16. The speaker is not exact: its distribution is that of the rounded weights.

    Raises:
      ValueError: for an unknown `cache_dtype` or `weights`.
    """
    if cache_dtype and cache_dtype not in caches.DTYPES:
        raise ValueError(f"cache dtype {cache_dtype!r} is unknown; use {', '.join(caches.DTYPES)}")
    stored, KV = jnp.dtype(cache_dtype or dtype), config.num_key_value_heads
    own = int8_config(config) if int8 else config

    def formed(params: Any) -> Any:
        if params == () or not int8:
            return params
        codes = in_int8_for_decoding(config, params)
        pin = lambda x, like: x if mesh is None else jax.lax.with_sharding_constraint(x, like.sharding)
        return jax.tree.map(pin, codes, decoding_params(own, mesh, "train", dtype, codes))  # so that int8 travels, not what it is made of

    shapes = lambda layout, params: decoding_params(own, mesh, layout, dtype, jax.eval_shape(formed, params))
    copied = int8 or weights != "train"
    held = layout_of(mesh, weights, lambda: device_bytes(shapes("replicated", abstract_params(config))))
    rules, whole = DECODING[held], dataclasses.replace(own, predicted_tokens=0)
    decoder = Decoder(own, dtype, "none", mesh, weights=held)

    def empty(rows: int, places: int, dtype: Any = stored) -> Cache:
        return caches.empty((config.num_hidden_layers, rows, KV, places, config.head_dim), dtype)

    def layout(rows: str | None) -> Cache:
        assert mesh is not None
        values: Any = sharding(mesh, (None, rows, "heads"), (0, 0, KV))
        return Cache(values, values, *([values] * 2 if stored == jnp.int8 else [None] * 2))

    def read(params: Any, tokens: jax.Array, real: jax.Array) -> Any:
        split, real = (constrain(x, mesh, "stream", None, rules=rules) for x in (tokens, real))
        if tokens.shape[1] <= piece:
            return decoder.clone(keep=stored).apply({"params": params}, split, real)[1]
        R, P = tokens.shape
        split, lengths = jnp.pad(split, ((0, 0), (0, -P % piece))), jnp.broadcast_to(real.sum(axis=1, keepdims=True), (R, piece))

        def further(i: jax.Array, cache: Any) -> Any:
            part = jax.lax.dynamic_slice_in_dim(split, i * piece, piece, axis=1)
            return decoder.apply({"params": params}, part, None, cache, i * piece, lengths=lengths)[1]

        # In the dtype of activations, so that a piece reads what it would read of a whole prompt.
        first = jax.tree.map(lambda x: constrain(x, mesh, None, "batch", "heads", None, None), empty(R, split.shape[1], jnp.dtype(dtype)))
        k, v, *_ = jax.lax.fori_loop(0, -(-lengths.max() // piece), further, first)
        return caches.pack(k[:, :, :, :P], v[:, :, :, :P], stored)

    @jax.named_scope("head")
    def head(params: Any) -> tuple[jax.Array, jax.Array | None]:
        weight = head_weight(whole, params)
        # Of weights as in training: gathered over fsdp once, instead of at every step.
        return constrain(weight if int8 else weight.astype(dtype), mesh, None, "vocab", rules=rules), params[SCALE] if int8 else None

    def logits(params: Any, head: Any, cache: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        last = constrain(jnp.take_along_axis(tokens, at[:, None], axis=1), mesh, "stream", None, rules=rules)
        hidden, cache = decoder.apply({"params": params}, last, None, cache, at)
        with jax.named_scope("head"):
            weight, scale = head
            if int8:  # a step reads int8; left alone, the compiler would convert the weight once, before the loop over steps
                weight = jax.lax.optimization_barrier((weight, at))[0]
            z = jnp.einsum("rd,dv->rv", hidden[:, 0], weight.astype(dtype), preferred_element_type=jnp.float32)
            z = z if scale is None else z * scale[None]
            if held != "train":
                z = constrain(constrain(z, mesh, "stream", "vocab", rules=rules), mesh, "batch", "vocab")
            z = constrain(z, mesh, "batch", None)
            return shaped(z[:, : config.predicted_tokens or None], shaping(config)), cache

    return Speaker(
        vocab_size=config.vocab_size,
        predicted=config.predicted_tokens or config.vocab_size,
        positions=positions(config),
        exact=not int8,
        mesh=mesh,
        empty=empty,
        layout=layout,
        read=read,
        head=head,
        logits=logits,
        names=name,
        laid=lambda params: shapes(held, params) if copied and params != () else params,
        formed=formed,
    )


def layout_of(mesh: Mesh | None, weights: str, size: Callable[[], int]) -> str:
    """The layout of a model's weights for decoding, a name in `alignax.mesh.DECODING`; on one device that of training.

    With "replicated" every batch shard has all weights, and with "tensor" the batch shards share them. "auto" replicates weights that take
    at most a quarter of a device's memory. `size` gives the bytes of a device that they take when replicated.

    Raises:
      ValueError: for a layout that is not in `WEIGHTS`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} have no layout of this name; use {', '.join(WEIGHTS)}")
    if mesh is None or mesh.size == 1:
        return "train"
    if weights != "auto":
        return weights
    return "replicated" if size() <= SHARE * device_memory(mesh) else "tensor"


def combined(speakers: Sequence[Speaker], coefficients: Sequence[float]) -> Speaker:
    """Combines speakers of one vocabulary into one speaker, with logits z = sum_m c_m z_m, [S, V].

    Its distribution is the normalised product prod_m p_m^c_m. (Log-probs in place of logits would give the same distribution, because
    they differ from logits by a constant per row.) Uses in the literature:

    | method | speakers | coefficients |
    |---|---|---|
    | proxy-tuning (Liu et al. 2024, arXiv:2401.08565) | model, small tuned, small untuned | 1, a, -a |
    | DExperts (Liu et al. 2021, arXiv:2105.03023) | model, expert, anti-expert | 1, a, -a |
    | GenARM (Xu et al. 2024, arXiv:2410.08193) | model, autoregressive reward models | 1, 1 / beta of each |
    | contrastive decoding (Li et al. 2022, arXiv:2210.15097) | `processed` model, amateur | 1, -1 |

    A token that one speaker never predicts is never sampled, whatever the sign of that speaker's coefficient. So in contrastive decoding
    a processor of the first model selects the plausible tokens. Penalty and temperature of `Sampling` apply to the combined logits.

    Args:
      speakers: speakers on one mesh, each with a cache of its own. The parameters of the combination are the tuple of their parameters.
      coefficients: c_m of each speaker, finite.

    Raises:
      ValueError: for a wrong number of coefficients or infinite ones, and for vocabularies or meshes that differ.
    """
    speakers, coefficients = tuple(speakers), tuple(map(float, coefficients))
    if not speakers or len(speakers) != len(coefficients) or not all(map(math.isfinite, coefficients)):
        raise ValueError(f"{len(speakers)} speakers have coefficients {list(coefficients)}; give each speaker a finite number")
    if len({s.predicted for s in speakers}) > 1:
        raise ValueError(
            f"speakers predict {', '.join(str(s.predicted) for s in speakers)} tokens; combine models with the same vocabulary; if their "
            "heads are padded to different sizes, set predicted_tokens of each model to the smallest number"
        )
    if any(s.mesh != speakers[0].mesh for s in speakers):
        raise ValueError("speakers are on different meshes; give speaker(..) the same mesh for each")

    def logits(params: Any, heads: Any, caches: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        each = zip(speakers, params, heads, caches, strict=True)
        every, caches = zip(*(s.logits(own, head, cache, tokens, at) for s, own, head, cache in each), strict=True)
        never = functools.reduce(jnp.logical_or, [z <= NEVER for z in every])  # a processor may return -inf
        total = sum(c * jnp.where(never, 0.0, z) for c, z in zip(coefficients, every, strict=True))
        return jnp.where(never, NEVER, total), caches

    return Speaker(
        vocab_size=min(s.vocab_size for s in speakers),
        predicted=speakers[0].predicted,
        positions=min(s.positions for s in speakers),
        exact=False,
        mesh=speakers[0].mesh,
        empty=lambda rows, places: tuple(s.empty(rows, places) for s in speakers),
        layout=lambda rows: tuple(s.layout(rows) for s in speakers),
        read=lambda params, tokens, real: tuple(s.read(own, tokens, real) for s, own in zip(speakers, params, strict=True)),
        head=lambda params: tuple(s.head(own) for s, own in zip(speakers, params, strict=True)),
        logits=logits,
        names=tuple(s.names for s in speakers),
        laid=lambda params: tuple(s.laid(own) for s, own in zip(speakers, params, strict=True)),
        formed=lambda params: tuple(s.formed(own) for s, own in zip(speakers, params, strict=True)),
    )


def processed(speaker: Speaker, function: Callable[..., jax.Array]) -> Speaker:
    """Applies a function to the logits of a speaker; the result is a speaker with the same parameters.

        processed(speaker, lambda logits: logits.at[:, 7].set(-jnp.inf))  # token 7 is never sampled

    Args:
      speaker: the speaker whose logits are changed.
      function: logits [S, V] float32 -> logits [S, V]; a token with -inf is never sampled. If the function has parameters named `tokens`
        or `real`, it gets the rows so far, [S, W] int32, and which of their positions hold a token, [S, W] bool.

    Raises:
      ValueError: at compilation, for a function that returns another shape.
    """
    wanted = {"tokens", "real"} & set(inspect.signature(function).parameters)

    def logits(params: Any, head: Any, cache: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        z, cache = speaker.logits(params, head, cache, tokens, at)
        history = {"tokens": tokens, "real": jnp.arange(tokens.shape[1])[None] <= at[:, None]}
        new = function(z, **{name: history[name] for name in wanted})
        if jnp.shape(new) != z.shape:
            raise ValueError(
                f"a processor returns logits of shape {list(jnp.shape(new))} for logits of shape {list(z.shape)}; it must return the same "
                "shape"
            )
        return new.astype(jnp.float32), cache

    return speaker._replace(logits=logits, exact=False)


def positions(config: ModelConfig) -> int:
    """The most tokens of prompt and completion that a model can sample.

    This is the number of the model's positions, or the length beyond which its rotary angles depend on the length: keys in the cache keep
    their angles, while those of dynamic NTK and LongRoPE change past the original context.
    """
    scaling = dict(config.rope_scaling)
    original = scaling.get("original_max_position_embeddings") if scaling.get("rope_type") == "longrope" else None
    return original or config.max_position_embeddings
