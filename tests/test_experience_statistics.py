"""Statistics as data, and losses that ask a forward pass for theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_models_statistics import TSALLIS

from alignax.experience import token_statistic
from alignax.losses import Loss, dpo, finished, make_loss, sft, statistics_of, token_mean
from alignax.models.statistics import entropy, min_p, top_k
from alignax.models.transformer import forward
from alignax.types import Model

APPLY = functools.partial(forward, tiny.MODEL)
MODEL = Model(APPLY(), tiny.params(), lambda statistics: APPLY(statistics=statistics))


@pytest.mark.slow
def test_a_statistic_of_any_model_is_a_field():
    """The field equals the model's statistic, without a gradient, in parts and at once; standard outputs are used where they exist."""
    batch = tiny.batch(4)
    wanted = jax.jit(APPLY(statistics=(min_p(0.5),)))(MODEL.params, batch)
    write = jax.jit(lambda experience, batch: experience(batch))
    for parts in (1, 2):
        found = write(token_statistic("proxy_logps", MODEL, min_p(0.5), parts), batch)
        assert found.keys() - batch.keys() == {"proxy_logps"}
        proxy, expected = np.asarray(found["proxy_logps"]), np.asarray(wanted.statistics["min_p_0.5"])
        np.testing.assert_array_equal(np.isneginf(proxy), np.isneginf(expected))
        np.testing.assert_allclose(proxy, expected, rtol=1e-5, atol=1e-5)
    assert 0 < np.isneginf(expected).sum() < np.asarray(batch["completion_mask"]).sum()
    np.testing.assert_allclose(write(token_statistic("spread", MODEL, entropy), batch)["spread"], wanted.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model, statistic, text",
    [
        (Model(tiny.plain_apply, {}), min_p(0.1), r"the model of token_statistic\('x', ..\) gives no statistics"),
        (MODEL, min_p, "give a Statistic, for example min_p"),
    ],
)
def test_what_gives_no_statistic(model, statistic, text):
    with pytest.raises(ValueError, match=text):
        token_statistic("x", model, statistic)


def value(out, batch):
    return -out.statistics["tsallis"], {"top_3": out.statistics["top_k_3"]}


def test_a_loss_says_what_it_reads():
    """A loss names its statistics, even inside sums, scaled or wrapped losses, and at any step of a schedule."""
    own = make_loss("bonus", value, lambda batch: batch["completion_mask"], (TSALLIS, top_k(3)))
    assert isinstance(own, Loss) and own.statistics == (TSALLIS, top_k(3)) and not dpo().statistics
    assert token_mean("bonus", value, (TSALLIS,)).statistics == (TSALLIS,)
    for made in (dpo() + 0.1 * own, finished(own) + own, -own / 2):
        assert made.statistics == own.statistics
    schedule = lambda step: sft() + (0.1 * step) * own
    assert statistics_of(schedule, own, dpo()) == own.statistics
    with pytest.raises(ValueError, match="loss 'bonus' reads .* which is not a statistic"):
        make_loss("bonus", value, None, (min_p,))


def test_the_gradient_of_a_users_statistic_reaches_the_parameters():
    """A bonus for spread distributions, against all logits of the model."""
    batch = tiny.batch(2)
    objective = make_loss("bonus", lambda out, batch: (-out.statistics["tsallis"], {}), lambda batch: batch["completion_mask"], (TSALLIS,))
    weights, apply = objective.normalised(batch), APPLY(statistics=objective.statistics, hidden=(1,))

    def whole(params):
        x = apply(params, batch).hidden[1][..., :-1, :]
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + tiny.MODEL.rms_norm_eps) * params["norm"][None, None, None]
        p = jax.nn.softmax(x @ params["embed"].T, axis=-1)
        return (weights[0][..., 1:] * (jnp.sum(p**2, axis=-1) - 1)).sum()

    found, grads = jax.jit(jax.value_and_grad(lambda p: objective(apply(p, batch), batch, weights)[0]))(MODEL.params)
    wanted, expected = jax.jit(jax.value_and_grad(whole))(MODEL.params)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), grads, expected)
