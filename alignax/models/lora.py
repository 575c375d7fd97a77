"""Low-rank adapters: LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024,
arXiv:2402.09353).

    LoRA    y = x W + s (x A) B,   s = alpha / rank; rsLoRA: s = alpha / sqrt(rank)
    DoRA    y = x (W + s A B) * m / |W + s A B|,   the norm taken over the inputs of each output, without gradient

An adapted model has one parameter tree: the base's leaves, and beside each adapted matrix W[in, out] the leaves `W_lora_a` [in, rank]
and `W_lora_b` [rank, out], with DoRA also `W_lora_m` [out]. `join` makes this tree from the frozen base and the adapters. Only the
adapters are trained, stored and checkpointed. Initially B is 0 and m is the norm of W, so the adapted model equals its base. The base
may be stored in int8, a quarter of the bytes (`quantise`); QLoRA does the same with 4 bits (Dettmers et al. 2023, arXiv:2305.14314).

A folder may adapt a matrix in some layers only. In the other layers A, B and m are 0 and get no gradient. An m of 0 means that the matrix
keeps its own norm.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignax.models.reward import HEAD
from alignax.types import Params

MARK = "_lora_"  # part of the name of every adapter leaf
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices of a layer
EXPERTS = ("gate", "up", "down")  # those that are stacked in a mixture of experts, which is neither adapted nor quantised


@dataclasses.dataclass(frozen=True)
class Lora:
    """The settings of low-rank adapters: which matrices of a layer are adapted, and how."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # the adapted matrices, from MATRICES
    rslora: bool = False
    dora: bool = False
    int8: bool = False  # whether the base's matrices are stored in int8, see `quantise`

    @property
    def scale(self) -> float:
        """The scale s of the product A B: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def find_targets(patterns: str, modules: dict[str, str], experts: bool) -> tuple[str, ...]:
    """The matrices that comma-separated patterns select for adaptation.

    >>> find_targets("q,*_proj", {"q": "h.{}.attn.c_attn", "o": "h.{}.attn.c_proj", "up": "h.{}.mlp.c_fc"}, experts=False)
    ('q', 'o')

    Args:
      patterns: "all-linear", or shell patterns of our names (`q`, `up`) or the family's names (`q_proj`, `c_attn`, `*_proj`).
      modules: matrix -> the family's name of its module, see `modules`.
      experts: whether the MLP is a mixture of experts, which cannot be adapted.

    Raises:
      ValueError: for a pattern that matches no matrix.
    """
    names = [n for n in MATRICES if n in modules and not (experts and n in EXPERTS)]
    if patterns == "all-linear":
        return tuple(names)
    found = set()
    for pattern in (p.strip() for p in patterns.split(",")):
        hits = {n for n in names if fnmatch(n, pattern) or fnmatch(modules[n].rpartition(".")[2], pattern)}
        if not hits:
            there = ", ".join(f"{n} ({modules[n].rpartition('.')[2]})" for n in names)
            raise ValueError(f"lora.targets {pattern!r} names no matrix of this model; use all-linear, or some of {there}")
        found |= hits
    return tuple(n for n in names if n in found)


def adapt(
    lora: Lora, param: Callable, name: str, x: jax.Array, weight: jax.Array, y: jax.Array, axes: tuple[str | None, str | None]
) -> jax.Array:
    """The output of an adapted matrix, by LoRA or DoRA; see the equations of the module.

    Args:
      lora: the settings.
      param: `param` of the Flax module that owns the matrix; creates or reads a parameter.
      name: the matrix, one of MATRICES.
      x: [rows, in] inputs.
      weight: W [in, out], in the compute dtype.
      y: [rows, out], the output x W of the base.
      axes: logical axes of W.

    Returns:
      [rows, out], in the dtype of y.
    """
    (inputs, outputs), r = weight.shape, lora.rank
    bound = 1 / math.sqrt(inputs)  # as in PEFT
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    a = param(f"{name}{MARK}a", nn.with_logical_partitioning(uniform, (axes[0], None)), (inputs, r), jnp.float32)
    b = param(f"{name}{MARK}b", nn.with_logical_partitioning(nn.initializers.zeros, (None, axes[1])), (r, outputs), jnp.float32)
    y = y + lora.scale * (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
    if lora.dora:
        m = param(f"{name}{MARK}m", nn.with_logical_partitioning(nn.initializers.ones, axes[1:]), (outputs,), jnp.float32)
        norm = jax.lax.stop_gradient(column_norms(weight, a, b, lora.scale))
        y = y * relative(m, norm).astype(y.dtype)[None]
    return y


def column_norms(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The norm |W + s A B| of each column (output): [.., out] float32.

    Args:
      weight: W [.., in, out].
      a: A [.., in, rank].
      b: B [.., rank, out].
      scale: s.
    """
    return jnp.linalg.norm(weight.astype(jnp.float32) + scale * (a @ b), axis=-2)


def relative(m: jax.Array, norm: jax.Array) -> jax.Array:
    """DoRA's factor m / norm, [.., out]; 1 without a gradient if all of m is 0, which marks a matrix that is not adapted.

    Args:
      m: [.., out] magnitudes.
      norm: [.., out] column norms of the adapted matrix.
    """
    there = jnp.any(m != 0, axis=-1, keepdims=True)
    return jnp.where(there, m / jnp.where(there, norm, 1.0), 1.0)


def is_adapter(name: str) -> bool:
    """Whether a leaf belongs to an adapter, by its name."""
    return MARK in name


def join(base: Params, adapters: Params) -> Params:
    """The parameters of an adapted model, from its base and its adapters; the inverse of `split`."""
    return {**base, **adapters, "layers": base["layers"] | adapters["layers"]}


def split(params: Params) -> tuple[Params, Params]:
    """The base and the adapters of an adapted model's parameters. The head of a reward model or critic counts as an adapter."""
    layers = params["layers"]
    base = {n: x for n, x in layers.items() if not is_adapter(n)}
    trunk, head = ({n: x for n, x in params.items() if (n in HEAD) == own} for own in (False, True))
    return {**trunk, "layers": base}, {**head, "layers": {n: x for n, x in layers.items() if is_adapter(n)}}


def quantise(base: Params) -> Params:
    """The base with its matrices quantised to int8: W [L, in, out] int8, and beside it `W_scale` [L, out] float32, see `in_int8`.

    What is quantised already stays as it is, and so do adapters and the experts of a mixture.
    """
    layers = dict(base["layers"])
    for name in MATRICES:
        if name in layers and layers[name].ndim == 3 and layers[name].dtype != jnp.int8:
            layers[name], layers[name + "_scale"] = in_int8(layers[name])
    return {**base, "layers": layers}


def in_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix W [.., in, out] in int8, and the scale of each output, [.., out] float32: its largest absolute weight / 127."""
    x = weight.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-2) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / scale[..., None, :]).astype(jnp.int8), scale


def is_quantised(lora: Lora | None, name: str, experts: bool) -> bool:
    """Whether a leaf of the base, such as "layers.q", is stored in int8: one that `quantise` takes; `experts`: the MLP is a mixture."""
    matrices = [n for n in MATRICES if not (experts and n in EXPERTS)]
    return lora is not None and lora.int8 and name.removeprefix("layers.") in matrices


def with_norms(lora: Lora, base: Params, adapters: Params) -> Params:
    """Adapters with their DoRA magnitudes set to the column norms of W + s A B; without DoRA, the adapters unchanged."""
    if not lora.dora:
        return adapters
    layers = adapters["layers"]
    weight = lambda n: base["layers"][n] * base["layers"].get(n + "_scale", jnp.ones((1, 1)))[..., None, :]
    own = lambda n: column_norms(weight(n), layers[f"{n}{MARK}a"], layers[f"{n}{MARK}b"], lora.scale)
    return {**adapters, "layers": layers | {f"{n}{MARK}m": own(n) for n in lora.targets}}


def merge(lora: Lora, base: Params, adapters: Params) -> Params:
    """The parameters of the plain model that equals an adapted one: adapters folded into the base's matrices, in float32.

    A pure function, to be jitted. The base must not be quantised.
    """
    layers = dict(base["layers"])
    for n in lora.targets:
        a, b = (adapters["layers"][f"{n}{MARK}{part}"] for part in "ab")
        whole = layers[n].astype(jnp.float32) + lora.scale * (a @ b)  # [L, in, out]
        if lora.dora:
            whole = whole * relative(adapters["layers"][f"{n}{MARK}m"], jnp.linalg.norm(whole, axis=-2))[..., None, :]
        layers[n] = whole
    return jax.tree.map(lambda x: x.astype(jnp.float32), {**base, **adapters, "layers": layers})


def check(config: Any) -> None:
    """Refuses a `config.lora` section with a rank below 0, or an alpha that is not above 0."""
    if config.rank < 0:
        raise ValueError(f"lora.rank is {config.rank}; use 1 or more, or 0 to train all parameters")
    if config.rank and not config.alpha > 0:
        raise ValueError(f"lora.alpha is {config.alpha}; it must be above 0 (twice the rank is usual)")


def modules(weights: dict[str, Any], leaves: Sequence[str]) -> dict[str, str]:
    """The module that holds each matrix of a layer, as the family names it: {"q": "model.layers.{}.self_attn.q_proj"}."""
    own = (leaf.removeprefix("layers.") for leaf in leaves)
    return {n: weights[f"layers.{n}"].name.removesuffix(".weight") for n in own if n in MATRICES}
