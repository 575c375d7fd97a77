"""Parameters that no folder holds: their shapes, types and shardings, and the values that a key gives."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.models import transformer
from alignax.models.lora import Lora, split, with_norms
from alignax.models.transformer import ModelConfig
from alignax.types import Params


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of the parameters; nothing is computed."""
    boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        return shapes
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(described, shapes, meshes.param_shardings(mesh, boxed))


def abstract_adapters(config: ModelConfig, lora: Lora, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of the adapters alone."""
    return split(abstract_params(dataclasses.replace(config, lora=lora), mesh))[1]


def init_adapters(config: ModelConfig, lora: Lora, mesh: Mesh, base: Params, key: jax.Array) -> Params:
    """Fresh adapters, with which the model is its base."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(config, lora, mesh))
    return jax.jit(functools.partial(fresh_adapters, config, lora), out_shardings=shardings)(base, key)


def fresh_adapters(config: ModelConfig, lora: Lora, base: Params, key: jax.Array) -> Params:
    """The adapters that a key gives; pure."""
    return with_norms(lora, base, split(fresh(dataclasses.replace(config, lora=lora), key))[1])


def fresh(config: ModelConfig, key: jax.Array) -> Params:
    """The parameters that a key gives; pure, and under jit only those that are used are made."""
    return nn.unbox(transformer.init(config, key))


def init_params(config: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Random parameters, made where they live: no device holds more than its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(functools.partial(fresh, config), out_shardings=shardings)(key)


def fresh_leaf(config: ModelConfig, name: str, sharding: Any, key: jax.Array | None) -> jax.Array:
    """One leaf of the parameters that the key gives, made where it lives."""
    make = jax.jit(lambda key: fresh(config, key)[name], out_shardings=sharding)
    return make(jax.random.key(0) if key is None else key)
