"""Abstract and freshly initialised parameters of models and adapters: shapes, dtypes, shardings, and values from a PRNG key."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.models import transformer
from alignax.models.layout import leaf_name
from alignax.models.lora import Lora, in_int8, is_adapter, quantise, split, with_norms
from alignax.models.transformer import ModelConfig
from alignax.types import Params

SCALE = "lm_head_scale"  # of an output layer in int8, [V] float32


def abstract_params(config: ModelConfig, mesh: Mesh | None = None, weights: str = "train") -> Params:
    """The shapes, dtypes and (with a mesh) shardings of a model's parameters; nothing is computed.

    `weights`: their layout, a name in `alignax.mesh.DECODING`.
    """
    return jax.tree.map(lambda x: x, _abstract(config, mesh, weights))


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig, mesh: Mesh | None, weights: str) -> Params:
    boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        return shapes
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(described, shapes, meshes.param_shardings(mesh, boxed, meshes.DECODING[weights]))


def read_dtype(name: str, dtype: Any) -> Any:
    """The dtype of a leaf that is only read: that of activations, to which a forward pass casts all but norms, scales and adapters."""
    kept = name.endswith(("norm", "norm_bias", "_scale")) or is_adapter(name)
    return jnp.dtype(jnp.float32) if kept else jnp.dtype(dtype)


def decoding_params(config: ModelConfig, mesh: Mesh | None, weights: str, dtype: Any, params: Any) -> Any:
    """The shapes, dtypes and (with a mesh) shardings of a model's parameters as they are laid out for decoding.

    Args:
      config: the model.
      mesh: the mesh; None for one device.
      weights: the name of their layout in `alignax.mesh.DECODING`.
      dtype: the dtype of activations.
      params: the parameters or their shapes.
    """

    def one(path: Any, own: Any, x: Any) -> jax.ShapeDtypeStruct:
        held = x.dtype if x.dtype == jnp.int8 else read_dtype(leaf_name(path), dtype)
        return jax.ShapeDtypeStruct(x.shape, held, sharding=own.sharding)

    layout = abstract_params(config, mesh, weights)
    if SCALE in params:
        split = None if mesh is None else meshes.sharding(mesh, ("vocab",), params[SCALE].shape, meshes.DECODING[weights])
        layout[SCALE] = jax.ShapeDtypeStruct(params[SCALE].shape, jnp.float32, sharding=split)
    return jax.tree_util.tree_map_with_path(one, layout, params)


def in_int8_for_decoding(config: ModelConfig, params: Params) -> Params:
    """The parameters of `int8_config`: matrices of layers in int8, see `lora.quantise`, and so an output layer of its own.

    The output layer is `lm_head` [D, V] int8 with `lm_head_scale` [V] float32, also where `config` ties it to the embedding, which stays as
    it is. A pure function; it changes nothing of parameters that are in int8 already.
    """
    if SCALE in params:
        return params
    weight, scale = in_int8(transformer.head_weight(dataclasses.replace(config, predicted_tokens=0), params))
    return quantise(params) | {"lm_head": weight, SCALE: scale}


def int8_config(config: ModelConfig) -> ModelConfig:
    """The config of a model whose weights are in int8 for decoding."""
    return dataclasses.replace(config, tie_word_embeddings=False, lora=dataclasses.replace(config.lora or Lora(1, 1.0, ()), int8=True))


def abstract_adapters(config: ModelConfig, lora: Lora, mesh: Mesh | None = None) -> Params:
    """The shapes, dtypes and (with a mesh) shardings of a model's adapters, without its base; nothing is computed."""
    return split(abstract_params(dataclasses.replace(config, lora=lora), mesh))[1]


def init_adapters(config: ModelConfig, lora: Lora, mesh: Mesh, base: Params, key: jax.Array) -> Params:
    """Initialises adapters of a base's parameters, sharded over the mesh; at first the adapted model equals its base."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(config, lora, mesh))
    return jax.jit(functools.partial(fresh_adapters, config, lora), out_shardings=shardings)(base, key)


def fresh_adapters(config: ModelConfig, lora: Lora, base: Params, key: jax.Array) -> Params:
    """Initialised adapters as a pure function of base and PRNG key, see `init_adapters`."""
    return with_norms(lora, base, split(fresh(dataclasses.replace(config, lora=lora), key))[1])


def fresh(config: ModelConfig, key: jax.Array) -> Params:
    """Initialised parameters as a pure function of a PRNG key. Under jit only the leaves that are used are computed."""
    return nn.unbox(transformer.init(config, key))


def init_params(config: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Initialises parameters, sharded over the mesh; no device ever holds more than its own shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(functools.partial(fresh, config), out_shardings=shardings)(key)


def fresh_leaf(config: ModelConfig, name: str, sharding: Any, key: jax.Array | None) -> jax.Array:
    """Initialises one top-level leaf of the parameters, with the given sharding; without a key, from `jax.random.key(0)`."""
    make = jax.jit(lambda key: fresh(config, key)[name], out_shardings=sharding)
    return make(jax.random.key(0) if key is None else key)
