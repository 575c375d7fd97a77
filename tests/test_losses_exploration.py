"""Lp-Reg: what the pull on low-probability tokens is, which tokens have it, and what it keeps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import run
from test_policy import PROGRAM, behind_a_prompt, per_token, tokens

from alignax import losses
from alignax.experience import chain, group_relative, low_probability_tokens
from alignax.losses import Loss
from alignax.models.statistics import Chunk, min_p
from alignax.types import Outputs


def test_the_pull_on_low_probability_tokens():
    """1 - proxy / pi beside the surrogate's own gradient, 1; what is not low, noise, or above its proxy has PPO's alone."""
    pi, proxies = 0.01, [0.012, 0.02, 0.1, 0.02, 0.0, 0.005]
    logps, batch = tokens([math.log(pi)] * 6, [-1.0] * 6)
    batch |= {"old_logps": logps, "proxy_logps": behind_a_prompt(np.log(np.maximum(proxies, 1e-300))[:, None])}
    batch["proxy_logps"] = batch["proxy_logps"].at[4, 0, 1].set(-jnp.inf)
    batch["low_probability"] = jnp.ones(logps.shape, bool).at[3].set(False)
    pull, log_ratio = np.array([-0.2, -1.0, -9.0, 0, 0, 0]), np.log(np.array(proxies[:3]) / pi)
    for coefficient in (1.0, 5.0):
        values, grads = per_token(losses.lp_reg(coefficient), logps, batch)
        np.testing.assert_allclose(grads, 1 + coefficient * pull, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values[:3], 1 + coefficient * (np.exp(log_ratio) - 1 - log_ratio), rtol=1e-5)
    assert run(losses.lp_reg(), logps, batch)[1]["lp_reg/protected"] == 0.5
    plain = per_token(losses.ppo(1.0, 9.0), logps, batch)
    np.testing.assert_array_equal(values[3:], plain[0][3:])
    np.testing.assert_array_equal(grads[3:], plain[1][3:])


def bandit(objective: Loss, share: float, seed: jax.Array, turns: int = 250, steps: int = 4) -> tuple[jax.Array, jax.Array]:
    """64 prompts with a likely token, five unlikely ones that are as good, and noise; the entropy at the end, and what the five have."""
    P, G = 64, 8
    start = jnp.log(jnp.array([1.0] + [0.04] * 5 + [0.002] * 24))
    column = lambda x: jnp.pad(x[..., None], ((0, 0), (0, 0), (1, 0)))
    mask = jnp.zeros((P, G, 2), bool).at[..., 1].set(True)
    experience = chain(group_relative(), low_probability_tokens(share))

    def turn(theta: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        draw, luck = jax.random.split(key)
        each = jnp.repeat(theta[:, None], G, axis=1)  # [P, G, V], V 30
        drawn = jax.random.categorical(draw, each)
        logps = lambda theta: column(jnp.take_along_axis(jax.nn.log_softmax(theta), drawn, axis=-1))
        rewarded = (drawn < 6) & jax.random.bernoulli(luck, 0.5, drawn.shape)
        batch = {"completion_mask": mask, "old_logps": logps(theta), "rewards": rewarded.astype(jnp.float32)}
        proxy = min_p(0.02).forward(Chunk(each, drawn, jax.nn.logsumexp(each, axis=-1)))
        batch = experience(batch | {"proxy_logps": column(proxy)})
        loss = lambda theta: objective(Outputs(x := logps(theta), x), batch, objective.normalised(batch))[0]
        return jax.lax.fori_loop(0, steps, lambda _, theta: theta - 0.3 * P * jax.grad(loss)(theta), theta), None

    p = jax.nn.softmax(jax.lax.scan(turn, jnp.tile(start, (P, 1)), jax.random.split(jax.random.key(seed), turns))[0])
    return -jnp.sum(p * jnp.log(p), axis=-1).mean(), p[:, 1:6].sum(axis=-1).mean()


@pytest.mark.slow
def test_lp_reg_keeps_what_grpo_drives_out():
    """Four steps on each rollout, three seeds: more entropy and more of the useful unlikely tokens than PPO's surrogate alone leaves."""
    seeds = jnp.arange(3)
    ends = lambda objective, share: np.array(jax.jit(jax.vmap(lambda seed: bandit(objective, share, seed)))(seeds))
    plain, kept = ends(losses.ppo(1.0, 9.0), 0.0), ends(losses.lp_reg(), 0.1)
    assert (kept[0] - plain[0]).mean() > 0.05
    assert (kept[1] > plain[1]).all()


def test_the_least_likely_of_the_tokens_to_be_made_less_likely():
    rng = np.random.default_rng(0)
    mask, old, advantages = rng.random((3, 4, 5)) < 0.7, *rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    batch = {"completion_mask": mask, "old_logps": old, "advantages": advantages}
    worse = mask & (advantages < 0)
    count = int(0.3 * worse.sum())
    assert count > 1
    low = np.array(PROGRAM(low_probability_tokens(0.3), batch)["low_probability"])
    assert low.sum() == count and not np.any(low & ~worse)
    assert old[low].max() < old[worse & ~low].min()
    for share in (0.0, 1.9 / worse.sum()):  # a single token is none
        assert not np.any(PROGRAM(low_probability_tokens(share), batch)["low_probability"])
    with pytest.raises(ValueError, match="the share is 2"):
        low_probability_tokens(2)
