"""Attention in blocks, with its own backward pass, against softmax(scale q k^T) v differentiated by machine."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from alignax.models.attention import attention

R, T, H, h = 3, 23, 4, 8


def plain(q, k, v, mask, *, window=None, scalar=None, cap=None):
    """Attention in one piece: a head at a time, every query on every key."""
    heads = []
    for i in range(H):
        own = i // (H // k.shape[2])
        scores = jnp.einsum("rth,rsh->rts", q[:, :, i], k[:, :, own]) / math.sqrt(scalar or h)
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        seen = (distance >= 0) & (distance < (window or T))
        visible = seen[None] & mask[:, None] | (distance == 0)[None]
        heads.append(jnp.einsum("rts,rsh->rth", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v[:, :, own]))
    return jnp.stack(heads, axis=2)


def pulled(f, cotangent, *x):
    """Values and gradients, in one program."""

    @jax.jit
    def program(*x):
        y, back = jax.vjp(f, *x)
        return y, back(cotangent)

    return program(*x)


@pytest.mark.parametrize("block", [0, 5])  # one, and several
@pytest.mark.parametrize("options", [{}, {"cap": 0.7}, {"window": 6}, {"scalar": 3.0, "window": 4, "cap": 2.0}], ids=str)
@pytest.mark.parametrize("KV", runs.slow_but([1, 2, 4], 2))
def test_values_and_gradients_are_those_of_the_formula(KV, options, block):
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (R, T, heads, h))
    q, k, v, cotangent = draw(0, H), draw(1, KV), draw(2, KV), draw(3, H)
    mask = jnp.arange(T)[None] >= jnp.array([0, 4, T - 1])[:, None]  # padding on the left, of a row all but one token
    own = dict(options, window=jnp.asarray(options.get("window", 0)))
    found, grads = pulled(lambda *x: attention(*x, mask, block, **own), cotangent, q, k, v)
    expected, by_machine = pulled(lambda *x: plain(*x, mask, **options), cotangent, q, k, v)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, by_machine, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_gradients_are_near():
    draw = lambda i: jax.random.normal(jax.random.key(i), (R, T, H, h))
    q, k, v = draw(0), draw(1), draw(2)
    loss = lambda q, k, v: jnp.square(attention(q, k, v, jnp.ones((R, T), bool)).astype(jnp.float32)).sum()
    exact = jax.grad(loss, (0, 1, 2))(q, k, v)
    near = jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    for a, b in zip(near, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.05 * jnp.abs(b).max()


@pytest.mark.slow
def test_no_weights_are_kept_for_the_backward_pass():
    T = 64
    q, k, v = (jax.random.normal(jax.random.key(i), (1, T, 2, 4)) for i in range(3))
    _, back = jax.vjp(lambda *x: attention(*x, jnp.ones((1, T), bool), 16), q, k, v)
    sizes = [x.size for x in jax.tree.leaves(back) if hasattr(x, "size")]
    assert sizes and max(sizes) <= T * 2 * 4
