"""Experts: the dense sum and its gradients, whoever gets how many tokens; sharded, half precision, work in proportion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import mesh as meshes
from alignax.models import moe

R, T, D, F = 8, 10, 6, 5


def dense(x, router, weights, *, k, normalise, activation, mesh=None):
    """Every expert on every token, weighted."""
    gate, up, down = weights
    probs = jax.nn.softmax(x @ router, axis=-1)
    chosen = probs >= jax.lax.top_k(probs, k)[0][..., -1:]
    share = jnp.where(chosen, probs, 0.0)
    share = share / share.sum(-1, keepdims=True) if normalise else share
    h = activation(jnp.einsum("rtd,edf->rtef", x, gate)) * jnp.einsum("rtd,edf->rtef", x, up)
    return jnp.einsum("rte,rtef,efd->rtd", share, h, down)


def problem(E: int, skew: float = 0.0):
    """x, router, weights; with a skew most tokens want the first experts, and the last ones get none."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (R, T, D)).at[..., 0].set(1.0)
    router = jax.random.normal(keys[1], (D, E)).at[0].add(-skew * jnp.arange(E))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    return x, router, tuple(jax.random.normal(key, shape) for key, shape in zip(keys[2:], shapes, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def pull(f, x, router, weights, k, normalise, mesh=None):
    """The sum and its gradients, of a random combination."""
    direction = jax.random.normal(jax.random.key(7), x.shape)

    def value(x, router, weights):
        y = f(x, router, weights, k=k, normalise=normalise, activation=jax.nn.silu, mesh=mesh)
        return (y * direction).sum(), y

    grads, y = jax.grad(value, (0, 1, 2), has_aux=True)(x, router, weights)
    return y, grads


def close(a, b) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5), a, b)


CASES = [(4, 2, True, 0.0), (8, 3, False, 0.0), (8, 2, True, 30.0), (3, 3, False, 0.0)]


@pytest.mark.parametrize(
    ("E", "k", "normalise", "skew"), [CASES[2], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case != CASES[2])]
)
def test_values_and_gradients_are_the_dense_ones(E, k, normalise, skew):
    args = problem(E, skew)
    y, grads = pull(moe.experts, *args, k, normalise)
    close((y, grads), pull(dense, *args, k, normalise))
    used = np.asarray(jnp.abs(grads[2][0]).max((1, 2)) > 0)
    assert used.sum() == (k if skew else E)  # nobody is dropped from an expert that all want


@pytest.mark.parametrize(
    ("shape", "E"),  # tensor shards divide 8 experts, and not 3
    [({"data": 2, "fsdp": 2, "tensor": 2}, 8), ({"tensor": 8}, 8), ({"data": 4, "tensor": 2}, 3)],
    ids=str,
)
def test_sharded_experts_are_the_unsharded_ones(shape, E):
    mesh, (x, router, weights) = meshes.make_mesh(shape), problem(E)
    place = lambda a, *axes: jax.device_put(a, meshes.sharding(mesh, axes, a.shape))
    split = tuple(place(w, "expert", *axes) for w, axes in zip(weights, [("embed", None)] * 2 + [(None, "embed")], strict=True))
    close(pull(moe.experts, place(x, "batch", None, None), router, split, 2, True, mesh), pull(dense, x, router, weights, 2, True))


def test_tokens_stay_where_they_are():
    mesh, (x, router, weights) = meshes.make_mesh({"data": 4, "tensor": 2}), problem(8)
    place = lambda a, *axes: jax.device_put(a, meshes.sharding(mesh, axes, a.shape))
    args = place(x, "batch", None, None), router, tuple(place(w, "expert", None, None) for w in weights)
    run = functools.partial(moe.experts, k=2, normalise=True, activation=jax.nn.silu, mesh=mesh)
    text = jax.jit(run).lower(*args).compile().as_text()
    moved = {name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if f" {name}(" in text}
    assert moved == {"all-reduce"}


@pytest.mark.slow
def test_rows_that_no_mesh_divides():
    mesh, (x, router, weights) = meshes.make_mesh({"data": 4, "tensor": 2}), problem(4)
    close(pull(moe.experts, x[:3], router, weights, 2, True, mesh), pull(dense, x[:3], router, weights, 2, True))


def test_half_precision_sums_in_float32():
    x, router, weights = problem(8)
    full, grads = pull(moe.experts, x, router, weights, 2, True)
    half, half_grads = pull(moe.experts, *jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, router, weights)), 2, True)
    assert half.dtype == half_grads[2][0].dtype == jnp.bfloat16
    gap = np.abs(np.asarray(half, np.float32) - full)
    assert np.median(gap) < 0.02 * np.abs(full).max()  # a token on the edge between two experts may choose otherwise


def test_blocks_are_as_many_as_the_assignments_need():
    chosen = jnp.asarray([[0, 1], [0, 2], [0, 1], [5, 0]])  # expert 5 is another shard's
    count, block = moe._blocks(chosen, 4)
    assert moe.block_rows(chosen.size, 4) == 16 and int(count) == 3
    found = [jax.tree.map(np.asarray, block(jnp.int32(i))) for i in range(3)]
    assert [(int(e), at[real].tolist()) for e, at, real in found] == [(0, [0, 2, 4, 7]), (1, [1, 5]), (2, [3])]
