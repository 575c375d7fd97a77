"""Low-rank adapters: LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024,
arXiv:2402.09353).

    LoRA    y = x W + s (x A) B,   s = alpha / rank; rsLoRA: s = alpha / sqrt(rank)
    DoRA    y = x (W + s A B) * m / |W + s A B|,   the norm taken over the inputs of each output, without gradient

An adapted model has one parameter tree: the base's leaves and beside each adapted matrix W[in, out] its `W_lora_a` [in, rank] and
`W_lora_b` [rank, out], for DoRA also `W_lora_m` [out]. `join` makes it of the frozen base and the adapters, which alone are trained,
stored and checkpointed. At first B is 0, and m the norm of W: the adapted model is its base. The base may be stored in a quarter of the
bytes (`quantise`), as QLoRA does (Dettmers et al. 2023, arXiv:2305.14314) with a finer code.

Where a folder adapts a matrix of some layers alone, A, B and m of the others are 0 and have no gradient; such an m stands for the norm.
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

MARK = "_lora_"  # in the name of every adapter leaf
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices of a layer are adapted, and how."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of MATRICES
    rslora: bool = False
    dora: bool = False
    int8: bool = False  # the base's matrices are stored as whole numbers, see `quantise`

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def find_targets(patterns: str, modules: dict[str, str], experts: bool) -> tuple[str, ...]:
    """The matrices that comma-separated patterns name.

    Args:
      patterns: "all-linear", or shell patterns of our names (`q`, `up`) or of the family's own (`q_proj`, `c_attn`, `*_proj`).
      modules: matrix -> the family's name of its module.
      experts: the MLP is a mixture of experts, which is not adapted.

    Raises:
      ValueError: for a pattern that names none.
    """
    names = [n for n in MATRICES if n in modules and not (experts and n in ("gate", "up", "down"))]
    if patterns == "all-linear":
        return tuple(names)
    found = set()
    for pattern in (p.strip() for p in patterns.split(",")):
        hits = {n for n in names if fnmatch(n, pattern) or fnmatch(modules[n].rpartition(".")[2], pattern)}
        if not hits:
            there = ", ".join(f"{n} ({modules[n].rpartition('.')[2]})" for n in names)
            raise ValueError(f"lora.targets {pattern!r} names no matrix of this model; use all-linear or any of {there}")
        found |= hits
    return tuple(n for n in names if n in found)


def adapt(
    lora: Lora, param: Callable, name: str, x: jax.Array, weight: jax.Array, y: jax.Array, axes: tuple[str | None, str | None]
) -> jax.Array:
    """The adapted product.

    Args:
      lora: how.
      param: a Flax module's own, which makes or finds a parameter.
      name: of the matrix.
      x: [rows, in].
      weight: W [in, out], in the compute dtype.
      y: x W [rows, out].
      axes: logical axes of W.

    Returns:
      [rows, out], in the dtype of y.
    """
    (inputs, outputs), r = weight.shape, lora.rank
    bound = 1 / math.sqrt(inputs)  # as PEFT has it
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
    """|W + s A B| of each output: [.., out] float32."""
    return jnp.linalg.norm(weight.astype(jnp.float32) + scale * (a @ b), axis=-2)


def relative(m: jax.Array, norm: jax.Array) -> jax.Array:
    """DoRA's m / norm [.., out]; 1 without a gradient where all of m is 0, as it is of a matrix that is not adapted."""
    there = jnp.any(m != 0, axis=-1, keepdims=True)
    return jnp.where(there, m / jnp.where(there, norm, 1.0), 1.0)


def is_adapter(name: str) -> bool:
    """Whether a leaf is an adapter's."""
    return MARK in name


def join(base: Params, adapters: Params) -> Params:
    """The adapted model's parameters."""
    return {**base, **adapters, "layers": base["layers"] | adapters["layers"]}


def split(params: Params) -> tuple[Params, Params]:
    """Base and adapters of an adapted model's parameters; a reward model's head is trained with the adapters."""
    layers = params["layers"]
    base = {n: x for n, x in layers.items() if not is_adapter(n)}
    trunk, head = ({n: x for n, x in params.items() if (n in HEAD) == own} for own in (False, True))
    return {**trunk, "layers": base}, {**head, "layers": {n: x for n, x in layers.items() if is_adapter(n)}}


def quantise(base: Params) -> Params:
    """The base with each matrix W [L, in, out] as int8 and `W_scale` [L, out], the largest of each output's weights over 127."""
    layers = {}
    for name, x in base["layers"].items():
        if name in MATRICES and x.ndim == 3:
            scale = jnp.abs(x).max(axis=-2, keepdims=True) / 127
            scale = jnp.where(scale > 0, scale, 1.0)
            layers |= {name: jnp.round(x / scale).astype(jnp.int8), name + "_scale": scale[:, 0]}
        else:
            layers[name] = x
    return {**base, "layers": layers}


def is_quantised(lora: Lora | None, name: str) -> bool:
    """Whether a leaf `layers.q` of the base is stored as int8."""
    return lora is not None and lora.int8 and name.removeprefix("layers.") in MATRICES


def with_norms(lora: Lora, base: Params, adapters: Params) -> Params:
    """Fresh adapters with DoRA's magnitudes set to the norms of the base's columns."""
    if not lora.dora:
        return adapters
    layers = adapters["layers"]
    weight = lambda n: base["layers"][n] * base["layers"].get(n + "_scale", jnp.ones((1, 1)))[..., None, :]
    own = lambda n: column_norms(weight(n), layers[f"{n}{MARK}a"], layers[f"{n}{MARK}b"], lora.scale)
    return {**adapters, "layers": layers | {f"{n}{MARK}m": own(n) for n in lora.targets}}


def merge(lora: Lora, base: Params, adapters: Params) -> Params:
    """The base's tree with the adapters folded into its matrices, in float32; pure, to be jitted."""
    layers = dict(base["layers"])
    for n in lora.targets:
        a, b = (adapters["layers"][f"{n}{MARK}{part}"] for part in "ab")
        whole = layers[n].astype(jnp.float32) + lora.scale * (a @ b)  # [L, in, out]
        if lora.dora:
            whole = whole * relative(adapters["layers"][f"{n}{MARK}m"], jnp.linalg.norm(whole, axis=-2))[..., None, :]
        layers[n] = whole
    return jax.tree.map(lambda x: x.astype(jnp.float32), {**base, **adapters, "layers": layers})


def check(config: Any) -> None:
    """Refuses a `config.lora` section that cannot be."""
    if config.rank < 0:
        raise ValueError(f"lora.rank is {config.rank}; use 1 or more, or 0 to train all parameters")
    if config.rank and not config.alpha > 0:
        raise ValueError(f"lora.alpha is {config.alpha}; it must be above 0 (twice the rank is usual)")


def modules(weights: dict[str, Any], leaves: Sequence[str]) -> dict[str, str]:
    """Matrix of a layer -> the module of the family that holds it: {"q": "model.layers.{}.self_attn.q_proj"}."""
    own = (leaf.removeprefix("layers.") for leaf in leaves)
    return {n: weights[f"layers.{n}"].name.removesuffix(".weight") for n in own if n in MATRICES}
