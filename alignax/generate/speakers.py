"""Speakers: what the sampler takes its next logits from. A language model is one, several models combined are one, and so is any of
them with a function behind it.

Proxy-tuning, a large model steered by the difference between a small one that was tuned and the same that was not, is a combination:

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
    """Logits of the next token given those before, as five pure functions of parameters and of a cache of what was read.

    A cache is any tree of arrays whose second axis is rows. That of a prompt, of P places, is copied into a row of P + C places, where
    it is the beginning of each further axis.
    """

    vocab_size: int  # tokens that it reads
    predicted: int  # V, the first so many of them, which it gives logits of
    positions: int  # the most tokens of prompt and completion
    exact: bool  # whether its distribution is that of one model, whose log-probs are then those of its samples
    mesh: Mesh | None  # of its parameters
    empty: Callable[[int, int], Any]  # (rows, places) -> the cache of rows that hold nothing
    layout: Callable[[str | None], Any]  # (the logical axis of rows, "batch" or None) -> shardings of a cache; there is a mesh
    read: Callable[[Any, jax.Array, jax.Array], Any]  # (params, tokens [R, P], real ones [R, P] bool) -> the cache of these prompts
    head: Callable[[Any], Any]  # (params) -> what does not change from token to token, made once for all of them
    # (params, head, cache, tokens [S, W], at [S]) -> logits [S, V] float32 of the token behind `at`, and the cache with the one at `at`.
    # Those at 0 .. at - 1 are in the cache; what stands behind `at` is of no row.
    logits: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def speaker(config: ModelConfig, dtype: Any = jnp.float32, cache_dtype: str = "", mesh: Mesh | None = None) -> Speaker:
    """A language model as it is trained; its parameters are those of training, as they are laid out.

    Args:
      config: the model, adapters or int8 base included.
      dtype: of activations, as in `alignax.models.transformer.forward`.
      cache_dtype: "float32", "bfloat16" or "int8"; empty: that of activations.
      mesh: of the parameters; None for one device.

    Raises:
      ValueError: for another dtype of the cache.
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

    def head(params: Any) -> jax.Array:
        # Gathered over fsdp once, rather than at every step.
        return constrain(head_weight(config, params).astype(dtype), mesh, None, "vocab")

    def logits(params: Any, head: jax.Array, cache: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        decoder = Decoder(config, dtype, "none", mesh)
        last = jnp.take_along_axis(tokens, at[:, None], axis=1)
        hidden, cache = decoder.apply({"params": params}, last, None, cache, at)
        z = jnp.einsum("rd,dv->rv", hidden[:, 0], head, preferred_element_type=jnp.float32)
        return constrain(shaped(z, shaping(config)), mesh, "batch", None), cache

    predicted = config.predicted_tokens or config.vocab_size
    return Speaker(config.vocab_size, predicted, positions(config), True, mesh, empty, layout, read, head, logits)


def combined(speakers: Sequence[Speaker], coefficients: Sequence[float]) -> Speaker:
    """Several speakers of one vocabulary as one: z = sum_m c_m z_m of their logits z_m, each [S, V].

    The distribution is the product prod_m p_m^c_m, normalised, as for log-probs in the place of logits, which differ from them by a number
    of each row. What the literature does with it:

    | method | speakers | coefficients |
    |---|---|---|
    | proxy-tuning (Liu et al. 2024, arXiv:2401.08565) | model, small tuned, small untuned | 1, a, -a |
    | DExperts (Liu et al. 2021, arXiv:2105.03023) | model, expert, anti-expert | 1, a, -a |
    | GenARM (Xu et al. 2024, arXiv:2410.08193) | model, autoregressive reward models | 1, 1 / beta of each |
    | contrastive decoding (Li et al. 2022, arXiv:2210.15097) | `processed` model, amateur | 1, -1 |

    A token that one of them never predicts the combination never predicts, whatever the sign of its coefficient. So the plausible tokens of
    contrastive decoding are the logits that a processor of the first model leaves. Penalty and temperature of `Sampling` come after.

    Args:
      speakers: on one mesh; each keeps a cache of its own. Parameters of the combination are a tuple of theirs, in this order.
      coefficients: c_m of each.

    Raises:
      ValueError: for other numbers of coefficients, for vocabularies or meshes that differ.
    """
    speakers, coefficients = tuple(speakers), tuple(map(float, coefficients))
    if not speakers or len(speakers) != len(coefficients) or not all(map(math.isfinite, coefficients)):
        raise ValueError(f"{len(speakers)} speakers have coefficients {list(coefficients)}; give each speaker a finite number")
    if len({s.predicted for s in speakers}) > 1:
        raise ValueError(
            f"speakers predict {', '.join(str(s.predicted) for s in speakers)} tokens; combine models of one vocabulary, and where "
            "their heads are padded to different sizes set predicted_tokens of each to the smallest"
        )
    if any(s.mesh != speakers[0].mesh for s in speakers):
        raise ValueError("speakers are on different meshes; give speaker(..) the same mesh for each")

    def logits(params: Any, heads: Any, caches: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        each = zip(speakers, params, heads, caches, strict=True)
        every, caches = zip(*(s.logits(own, head, cache, tokens, at) for s, own, head, cache in each), strict=True)
        never = functools.reduce(jnp.logical_or, [z <= NEVER for z in every])  # -inf of a processor's too
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
    )


def processed(speaker: Speaker, function: Callable[..., jax.Array]) -> Speaker:
    """A speaker whose logits are `function(logits)` of another's, [S, V] float32 each; its parameters are the other's.

    A function with parameters `tokens` or `real` gets them by name: the rows so far [S, W] int32, and which of them there are [S, W] bool.
    A token is never sampled where it returns -inf.

    Raises:
      ValueError: when it is compiled, for a function that returns another shape.
    """
    wanted = {"tokens", "real"} & set(inspect.signature(function).parameters)

    def logits(params: Any, head: Any, cache: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
        z, cache = speaker.logits(params, head, cache, tokens, at)
        history = {"tokens": tokens, "real": jnp.arange(tokens.shape[1])[None] <= at[:, None]}
        new = function(z, **{name: history[name] for name in wanted})
        if jnp.shape(new) != z.shape:
            raise ValueError(f"a processor makes {list(jnp.shape(new))} of logits {list(z.shape)}; let it return as many")
        return new.astype(jnp.float32), cache

    return speaker._replace(logits=logits, exact=False)


def positions(config: ModelConfig) -> int:
    """The most tokens that a model samples up to: its positions, or the length from which its angles change with every token.

    Keys in the cache keep the angles that they got, and those of dynamic NTK and LongRoPE depend on the length past their original context.
    """
    scaling = dict(config.rope_scaling)
    original = scaling.get("original_max_position_embeddings") if scaling.get("rope_type") == "longrope" else None
    return original or config.max_position_embeddings
