"""Speakers: the sources of next-token logits that a sampler reads.

A speaker is a language model (`speaker`), a combination of several models (`combined`), or a speaker with a function of its logits
(`processed`). For example, proxy-tuning steers a large model by the difference between a small tuned model and its untuned version:

    large, small = speaker(large_config), speaker(small_config)
    generate = Generator(combined([large, small, small], [1.0, 1.0, -1.0]), shape, Sampling(temperature=0.0))
    completions = generate((large_params, tuned_params, untuned_params), prompts, key)
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax.mesh import constrain, sharding
from alignax.models import cache as caches
from alignax.models.cache import Cache
from alignax.models.heads import NEVER, shaped
from alignax.models.transformer import Decoder, ModelConfig, head_weight, shaping


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


def speaker(config: ModelConfig, dtype: Any = jnp.float32, cache_dtype: str = "", mesh: Mesh | None = None, name: str = "") -> Speaker:
    """Makes the speaker of one language model. Its parameters are those of training, with the shardings of training.

    Args:
      config: the model; adapters and an int8 base are supported.
      dtype: the dtype of activations, as in `alignax.models.transformer.forward`.
      cache_dtype: "float32", "bfloat16" or "int8"; empty: the dtype of activations.
      mesh: the mesh of the parameters; None for one device.
      name: the name of the model, by which a run finds its parameters.

    Raises:
      ValueError: for an unknown `cache_dtype`.
    """
    if cache_dtype and cache_dtype not in caches.DTYPES:
        raise ValueError(f"cache dtype {cache_dtype!r} is unknown; use {', '.join(caches.DTYPES)}")
    stored, KV = jnp.dtype(cache_dtype or dtype), config.num_key_value_heads

    def empty(rows: int, places: int) -> Cache:
        return caches.empty((config.num_hidden_layers, rows, KV, places, config.head_dim), stored)

    def layout(rows: str | None) -> Cache:
        assert mesh is not None
        values: Any = sharding(mesh, (None, rows, "heads"), (0, 0, KV))
        return Cache(values, values, *([values] * 2 if stored == jnp.int8 else [None] * 2))

    def read(params: Any, tokens: jax.Array, real: jax.Array) -> Any:
        decoder = Decoder(config, dtype, "none", mesh, stored)
        split = constrain(tokens, mesh, "batch", None)
        return decoder.apply({"params": params}, split, constrain(real, mesh, "batch", None))[1]

    @jax.named_scope("head")
    def head(params: Any) -> jax.Array:
        # Gathered over fsdp once, instead of at every step.
        return constrain(head_weight(config, params).astype(dtype), mesh, None, "vocab")

    def logits(params: Any, head: jax.Array, cache: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        decoder = Decoder(config, dtype, "none", mesh)
        last = jnp.take_along_axis(tokens, at[:, None], axis=1)
        hidden, cache = decoder.apply({"params": params}, last, None, cache, at)
        with jax.named_scope("head"):
            z = jnp.einsum("rd,dv->rv", hidden[:, 0], head, preferred_element_type=jnp.float32)
            return constrain(shaped(z, shaping(config)), mesh, "batch", None), cache

    predicted = config.predicted_tokens or config.vocab_size
    return Speaker(config.vocab_size, predicted, positions(config), True, mesh, empty, layout, read, head, logits, name)


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
