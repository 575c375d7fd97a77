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
SHARE = 0.9  # of a device's memory that an estimate may take


def capacity(mesh: Mesh) -> int:
    """The bytes of memory of a device; 0 for a CPU, whose memory is shared with all else, and where it is not known."""
    return 0 if mesh.devices.flat[0].platform == "cpu" else meshes.device_memory(mesh)


def fitting(
    config: Any, roles: Roles, mesh: Mesh, optimizer: optax.GradientTransformation, averages: int, shape: tuple[int, int, int]
) -> tuple[str, str]:
    """The cheapest policy that fits, by `estimate`, and the choice in words; "full" if none does, or if the memory is not known."""
    limit = capacity(mesh)
    if not limit:
        kind = mesh.devices.flat[0].device_kind
        return "full", f"full, since the memory of {kind!r} is " + ("shared" if kind == "cpu" else "not known")
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
    policy, own = roles[POLICY], meshes.device_bytes(abstract_trained(roles, mesh))
    each = math.ceil(policy.members / mesh.shape["member"]) if policy.members else 1  # members that a device computes
    layers = policy.config.num_hidden_layers
    activations = 0.0
    for role in (policy, *([roles[CRITIC]] if CRITIC in roles else [])):
        kept = {name: residuals(name, role, config, mesh, shape) for name in {remat, "none", "full"}}
        one = 0 if remat == "none" else (kept["none"] - kept["full"]) / layers
        activations += each * (kept[remat] + one)
    logits = 3 * each * config.model.logps_chunk * policy.config.vocab_size * 4 / mesh.shape["tensor"]
    gradients = own * (1 if config.microbatches == 1 else 2)
    return held(roles, mesh, optimizer, averages) + gradients + activations + logits


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
    return size(of_rows) / meshes.batch_shards(mesh) / mesh.shape["context"]


def held(roles: Roles, mesh: Mesh, optimizer: optax.GradientTransformation, averages: int) -> int:
    """The bytes of a device that the trained parameters with their optimizer state and averages, and the frozen models take."""
    trained, policy = abstract_trained(roles, mesh), roles[POLICY]
    state = jax.eval_shape(members.over_members(optimizer.init, 0, 0) if policy.members else optimizer.init, trained)
    layout = meshes.optimizer_shardings(mesh, optimizer, state, jax.tree.map(lambda x: x.sharding, trained))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    return meshes.device_bytes((state, abstract_frozen(roles, mesh))) + (1 + averages) * meshes.device_bytes(trained)


def part_shape(config: Any, mesh: Mesh, packing: Packing | None, N: int, T: int) -> tuple[int, int, int]:
    """The shape [B, N, T] of a microbatch over all devices, or of as many rows as fill a packed part."""
    shards = meshes.batch_shards(mesh)
    B = config.batch_size // config.microbatches
    return (B if packing is None else min(B, shards * math.ceil(packing.positions / (N * T))), N, T)
