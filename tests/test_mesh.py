"""The mesh and its table of layouts; training is the same on one device and on eight, split any way."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from alignax import mesh as meshes
from alignax import train
from alignax.losses import dpo
from alignax.mesh import make_mesh, param_shardings, put_batch, sharding
from alignax.models import parameters, transformer
from alignax.train import init_state, make_step

SLOW = [((8, 1, 1), 2), ((1, 1, 1), 2), ((1, 8, 1), 2), ((1, 1, 8), 2), ((4, 1, 2), 2), ((2, 2, 2), 1)]
CASES = [((2, 2, 2), 2), *SLOW]


def split(*sizes: int) -> jax.sharding.Mesh:
    return make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))


# --- the mesh ---


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1)),
        ({"data": 4, "fsdp": 1, "tensor": 2}, (4, 1, 2)),
    ],
)
def test_one_free_size_takes_the_rest(shape, sizes):
    mesh = make_mesh(shape)
    assert tuple(mesh.shape.items()) == (("member", 1), *zip(("data", "fsdp"), sizes, strict=False), ("context", 1), ("tensor", sizes[2]))
    assert meshes.batch_shards(mesh) == sizes[0] * sizes[1]
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    "flags, several, wanted",
    [
        ("--a=1", False, "--a=1"),
        ("--a=1", True, f"--a=1 {meshes.ORDERED}"),
        (f"{meshes.SIMULATED}=1", False, f"{meshes.SIMULATED}=1"),
        (f"{meshes.SIMULATED}=8", False, f"{meshes.SIMULATED}=8 {meshes.ORDERED}"),
        (f"{meshes.SIMULATED}=8 --xla_cpu_enable_concurrency_optimized_scheduler=true", True, None),
    ],
)
def test_several_cpu_devices_start_their_collectives_in_one_order(monkeypatch, flags, several, wanted):
    """With XLA's own schedule a run of 40 rollouts on 8 simulated devices hung on a busy machine. A user's flag stays."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    meshes.order_collectives(several)
    assert os.environ["XLA_FLAGS"] == (wanted or flags)


def test_a_mesh_of_given_devices():
    devices = jax.devices()[2:6]
    mesh = make_mesh({"data": 2, "tensor": -1}, devices)
    assert mesh.devices.shape == (1, 2, 1, 1, 2) and list(mesh.devices.flat) == devices
    assert make_mesh({}, devices[:1]).devices.shape == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "does not cover 8 devices; sizes must multiply to 8"),
        ({"data": 3, "fsdp": -1}, r"mesh \{'data': 3, 'fsdp': -1\} does not cover 8 devices"),
        ({"data": 16, "fsdp": -1}, "does not cover 8 devices"),
        ({}, "does not cover 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0, "fsdp": -1}, "sizes must be positive"),
        ({"data": -2}, "sizes must be positive"),
        ({"model": 8}, r"mesh axes \['model'\] are unknown; use member, data, fsdp, context, tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


# --- the table ---


def test_logical_axes_become_mesh_axes():
    mesh = split(2, 2, 2)
    assert sharding(mesh).spec == P()
    assert sharding(mesh, ("batch", None, None)).spec == P(("data", "fsdp"), None, None)
    assert sharding(mesh, ("layers", "embed", "heads")).spec == P(None, "fsdp", "tensor")
    assert sharding(mesh, ("vocab", "embed")).spec == P("tensor", "fsdp")
    assert sharding(mesh, ("mlp",), (6,)).spec == P("tensor")


def test_a_size_that_does_not_divide_is_replicated():
    mesh = split(2, 2, 2)
    assert sharding(mesh, ("vocab", "embed"), (50257, 64)).spec == P(None, "fsdp")
    assert sharding(mesh, ("vocab", "embed"), (96, 63)).spec == P("tensor", None)
    assert sharding(mesh, ("batch", None), (6, 5)).spec == P(None, None)  # 6 rows over 4 shards
    uneven = make_mesh({"fsdp": 4, "tensor": 2})
    wide = {size: sharding(uneven, ("table",), (size,)).spec for size in (16, 12, 6, 5)}
    assert wide == {16: P(("tensor", "fsdp")), 12: P("fsdp"), 6: P("tensor"), 5: P(None)}
    x = jax.device_put(jnp.zeros((7, 4)), sharding(mesh, ("vocab", "embed"), (7, 4)))
    assert x.sharding.shard_shape(x.shape) == (7, 2)


def test_parameters_lie_as_the_table_says():
    mesh = split(2, 2, 2)
    found = param_shardings(mesh, jax.eval_shape(lambda: transformer.init(tiny.MODEL, jax.random.key(0))))
    expected = {
        "embed": P("tensor", "fsdp"),
        "norm": P(None),
        "layers": {
            "q": P(None, "fsdp", "tensor"), "k": P(None, "fsdp", "tensor"), "v": P(None, "fsdp", "tensor"),
            "o": P(None, "tensor", "fsdp"), "gate": P(None, "fsdp", "tensor"), "up": P(None, "fsdp", "tensor"),
            "down": P(None, "tensor", "fsdp"), "attention_norm": P(None, None), "mlp_norm": P(None, None),
        },
    }  # fmt: skip
    assert jax.tree.map(lambda s: s.spec, found) == expected
    params = parameters.init_params(tiny.MODEL, mesh, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding.spec, params) == expected
    assert params["layers"]["gate"].addressable_shards[0].data.shape == (2, 16, 24)


def state_shardings(mesh, optimizer, params):
    """The shardings of the optimizer's state in a training run."""
    abstract = jax.eval_shape(optimizer.init, params)
    return meshes.optimizer_shardings(mesh, optimizer, abstract, jax.tree.map(lambda x: x.sharding, params))


@pytest.mark.parametrize("make", [optax.adamw, optax.lion, optax.rmsprop, functools.partial(optax.sgd, momentum=0.9)])
def test_moments_lie_as_their_parameters(make):
    mesh, optimizer = split(2, 2, 2), optax.chain(optax.clip_by_global_norm(1.0), make(optax.constant_schedule(1e-3)))
    params = parameters.init_params(tiny.MODEL, mesh, jax.random.key(0))
    state = jax.jit(optimizer.init, out_shardings=state_shardings(mesh, optimizer, params))(params)
    like_params = lambda x: jax.tree.structure(x) == jax.tree.structure(params)
    moments = [x for x in jax.tree.leaves(state, is_leaf=like_params) if like_params(x)]
    assert moments
    for moment in moments:
        assert jax.tree.map(lambda x: x.sharding, moment) == jax.tree.map(lambda x: x.sharding, params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state) if not x.ndim)


def test_adafactors_factored_moments_are_replicated():
    """Factored moments lack their parameter's shape; unfactored moments of small parameters have their parameter's sharding."""
    mesh, optimizer = split(1, 2, 4), optax.adafactor(1e-3)
    layout = {"large": ("layers", "embed", "mlp"), "small": ("embed", "mlp"), "bias": ("mlp",)}
    shapes = {"large": (2, 128, 256), "small": (4, 8), "bias": (8,)}
    params = {k: jax.device_put(jnp.ones(s), sharding(mesh, layout[k])) for k, s in shapes.items()}
    state = jax.jit(optimizer.init, out_shardings=state_shardings(mesh, optimizer, params))(params)
    (factored,) = [x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "v_row")) if hasattr(x, "v_row")]
    assert factored.v_row["large"].ndim == 2 and factored.v_row["large"].sharding.is_fully_replicated
    assert factored.v["small"].sharding.spec == P("fsdp", "tensor") and factored.v["bias"].sharding.spec == P("tensor")
    jax.jit(optimizer.update)(params, state, params)


def test_a_batch_is_split_over_data_and_fsdp_and_each_part_is_made_once():
    mesh, made = split(2, 2, 2), []

    def make(rows: slice) -> dict[str, np.ndarray]:
        made.append((rows.start, rows.stop))
        return {"tokens": np.arange(8 * 6).reshape(8, 2, 3)[rows], "weight": np.arange(8.0)[rows]}

    batch = put_batch(mesh, make, 8)
    assert sorted(made) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert batch["tokens"].sharding == meshes.batch_sharding(mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2, 3)
    np.testing.assert_array_equal(batch["tokens"], np.arange(48).reshape(8, 2, 3))
    np.testing.assert_array_equal(meshes.gathered(batch["weight"]), np.arange(8.0))


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((8, 4))
    assert meshes.constrain(x, None, "batch", None) is x
    assert meshes.constrain(x, split(2, 2, 2), "batch", None).sharding.spec[0] == ("data", "fsdp")


# --- training ---


@functools.cache
def initial() -> dict:
    return jax.device_get(tiny.params())


@functools.cache
def trajectory(sizes: tuple[int, int, int], microbatches: int) -> tuple[list[dict], dict]:
    """Metrics of four DPO steps, and the parameters after them."""
    mesh = split(*sizes) if sizes != (1, 1, 1) else make_mesh({}, jax.devices()[:1])
    optimizer = optax.adamw(3e-3, eps=1e-4)  # an eps that does not blow up rounding where gradients are nearly 0
    params = jax.device_put(initial(), param_shardings(mesh, jax.eval_shape(lambda: transformer.init(tiny.MODEL, jax.random.key(0)))))
    state = jax.jit(lambda p: init_state(p, optimizer, jax.random.key(0)))(params)
    apply = transformer.forward(tiny.MODEL, mesh=mesh, remat="none", chunk=64)
    step = jax.jit(make_step(apply, dpo(beta=0.5), optimizer, microbatches))
    batch = tiny.batch(B=16, T=16)
    for name in ("mask", "completion_mask"):
        batch[name] = batch[name].at[3].set(False)  # a padding row
    batch["ref_logps"] = jnp.where(batch["completion_mask"], -4.0, 0.0)
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    compiled = step.lower(state, batch).compile()
    metrics = []
    for _ in range(4):
        state, out = compiled(jax.device_put(state, compiled.input_shardings[0][0]), batch)
        metrics.append(jax.device_get(out))
    return metrics, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "microbatches"), [*CASES[:2], *(pytest.param(*case, marks=pytest.mark.long) for case in CASES[2:])], ids=str
)
def test_four_steps_are_those_of_one_device(sizes, microbatches):
    expected, expected_params = trajectory((1, 1, 1), 1)
    metrics, params = trajectory(sizes, microbatches)
    assert expected[3]["loss"] < expected[0]["loss"] - 0.1 and expected[3]["skipped_total"] == 0
    for ours, theirs in zip(metrics, expected, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, initial())
    assert min(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, expected_params)


def flops(microbatches: int) -> float:
    """FLOPs per device of all microbatches together, for a model that pins no layout. XLA counts the body of a loop once."""
    mesh = split(2, 2, 2)
    state = jax.device_put(init_state(tiny.plain_params(D=32), optax.sgd(0.1), jax.random.key(0)), sharding(mesh))
    batch = jax.device_put(tiny.with_reference(tiny.batch(B=16)), meshes.batch_sharding(mesh))
    step = make_step(tiny.plain_apply, dpo(), optax.sgd(0.1), microbatches)
    compiled = jax.jit(step).lower(state, batch).compile()
    return microbatches * compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_microbatches_of_a_sharded_batch_repeat_no_work(monkeypatch):
    whole = flops(1)
    assert flops(2) < 1.3 * whole
    assert flops(4) < 1.3 * whole
    blocks = lambda tree, count: jax.tree.map(lambda x: x.reshape((count, -1) + x.shape[1:]), tree)
    monkeypatch.setattr(train, "microbatch", blocks)  # what the step must not do, to show that the count sees it
    assert flops(2) > 1.8 * whole
