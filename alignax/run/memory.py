"""The choice of `model.remat` "auto": the cheapest policy whose estimated memory fits a device. Shapes alone are traced."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.models import parameters, transformer
from alignax.models.lora import join, split
from alignax.models.reward import CRITIC
from alignax.packing import Packing
from alignax.rewards import members
from alignax.run.roles import POLICY, Roles, abstract_frozen, abstract_trained, attention

CHEAPEST = ("none", "dots", "attention", "full")  # the least is computed again first
# Memory of a TPU device by its kind, in GB, as published: a plan for chips that are not at hand chooses what a run on them does.
TPUS = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 96}
SHARE = 0.9  # of a device's memory that an estimate may take


def capacity(device: Any) -> float | None:
    """The memory of a device in bytes; None where it is not known, as on a CPU."""
    if device.device_kind in TPUS:
        return TPUS[device.device_kind] * 1e9
    stats = None if device.platform == "cpu" else device.memory_stats()
    return stats["bytes_limit"] if stats else None


def fitting(
    config: Any, roles: Roles, mesh: Mesh, optimizer: optax.GradientTransformation, averages: int, shape: tuple[int, int, int]
) -> tuple[str, str]:
    """The cheapest policy that fits, by `estimate`, and the choice in words; "full" if none does, or if the memory is not known."""
    device = mesh.devices.flat[0]
    limit = capacity(device)
    if limit is None:
        return "full", f"full, since the memory of {device.device_kind!r} is not known"
    found = {}
    for remat in CHEAPEST:
        found[remat] = estimate(remat, config, roles, mesh, optimizer, averages, shape)
        if found[remat] <= SHARE * limit or remat == "full":
            break
    chosen, words = list(found)[-1], ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.items())
    return chosen, f"{chosen}, of {limit / 1e9:.1f} GB; estimated GB: {words}"


def estimate(
    remat: str,
    config: Any,
    roles: Roles,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    averages: int,
    shape: tuple[int, int, int],
) -> float:
    """Bytes of a device in a training step: state, frozen models, gradients, what the forward pass keeps, one layer, a chunk of logits.

    Args:
      remat: the policy.
      config: the config of the run.
      roles: the models of the run.
      mesh: the mesh.
      optimizer: the optimizer.
      averages: the number of averages of the parameters.
      shape: [B, N, T] of a microbatch over all devices, or of as many rows as fill a packed part.
    """
    trained, policy = abstract_trained(roles, mesh), roles[POLICY]
    layout = jax.tree.map(lambda x: x.sharding, trained)
    moments = jax.eval_shape(members.over_members(optimizer.init, 0, 0) if policy.members else optimizer.init, trained)
    placed = meshes.optimizer_shardings(mesh, optimizer, moments, layout)
    own, state = on_device(trained, layout), on_device(moments, placed)
    frozen = abstract_frozen(roles, mesh)
    held = on_device(frozen, jax.tree.map(lambda x: x.sharding, frozen))
    each = math.ceil(policy.members / mesh.shape["member"]) if policy.members else 1  # members that a device computes
    layers = policy.config.num_hidden_layers
    activations = 0.0
    for role in (policy, *([roles[CRITIC]] if CRITIC in roles else [])):
        kept = {name: residuals(name, role, config, mesh, shape) for name in {remat, "none", "full"}}
        one = 0 if remat == "none" else (kept["none"] - kept["full"]) / layers
        activations += each * (kept[remat] + one)
    logits = 3 * each * config.model.logps_chunk * policy.config.vocab_size * 4 / mesh.shape["tensor"]
    gradients = own * (1 if config.microbatches == 1 else 2)
    return own * (1 + averages) + state + held + gradients + activations + logits


def residuals(remat: str, role: Any, config: Any, mesh: Mesh, shape: tuple[int, int, int]) -> float:
    """Bytes of a device that the backward pass of a model reads, weights left out."""
    options: Any = {"dtype": role.dtype, "remat": remat, "mesh": mesh, "attention": attention(config, mesh)[0]}
    apply: Any = (transformer.critic if role.name == CRITIC else transformer.forward)(role.config, **options)
    one = parameters.abstract_params(role.config)
    base, trained = (None, one) if role.lora is None else split(one)
    fields = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in (("tokens", jnp.int32), ("mask", bool), ("completion_mask", bool))
    }

    def pulled(trained: Any, base: Any, batch: Any) -> Any:
        whole = lambda params: params if base is None else join(base, params)
        return jax.vjp(lambda params: apply(whole(params), batch), trained)[1]

    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    rows = shape[0] * shape[1] * shape[2]
    kept = jax.eval_shape(pulled, trained, base, fields)
    # Activations have an axis, or two, of rows and tokens; weights, and their copies in the compute dtype, do not.
    of_rows = [x for x in jax.tree.leaves(kept) if x.size % rows == 0]
    return size(of_rows) / meshes.batch_shards(mesh)


def on_device(tree: Any, layout: Any) -> int:
    """Bytes of a device's shards of abstract arrays."""
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
    )


def part_shape(config: Any, mesh: Mesh, packing: Packing | None, N: int, T: int) -> tuple[int, int, int]:
    """The shape [B, N, T] of a microbatch over all devices, or of as many rows as fill a packed part."""
    shards = meshes.batch_shards(mesh)
    B = config.batch_size // config.microbatches
    return (B if packing is None else min(B, shards * math.ceil(packing.positions / (N * T))), N, T)
