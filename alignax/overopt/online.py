"""Online methods in the world of vectors: policies over a pool of responses, trained on their own samples against reward models.

What trains them is the library's: experience writes rewards and advantages, losses read them, and the shared step is taken on each part
of a rollout, as in `alignax.run.online`. A rollout is [B, N, 1] samples, a response being one token, its number in the pool, so that gold
reward, KL and proxy of a policy are sums over the pool: they are exact, and only training is sampled.

Reward models are those of best-of-n, each with mean 0 and standard deviation 1 over the pool: coefficients of the KL are then in
standard deviations per nat.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax.averages import averaged
from alignax.config import BadInput
from alignax.experience import advance, first_carry
from alignax.losses import Loss
from alignax.models.reward import VALUE
from alignax.overopt.vectors import draw, init_network, make_golds, network, ordered, policy, rewards, train_members
from alignax.overopt.worlds import Method, Online, Optimum, Trajectory, check_ranges, check_trained
from alignax.train import init_state, make_step
from alignax.types import Batch, Model, Outputs, Params, TrainState, microbatch

RANGES = (  # config field, lowest, highest
    ("online.pool", 2, math.inf), ("online.rollouts", 1, math.inf), ("online.every", 1, math.inf), ("online.minibatches", 1, math.inf),
    ("online.batch_size", 1, math.inf), ("online.samples", 2, math.inf),
)  # fmt: skip


class Pool(NamedTuple):
    """The responses that a policy of one seed chooses from; the initial policy is uniform over them."""

    vectors: jax.Array  # [M, D]
    gold: jax.Array  # [M], with mean 0 and standard deviation 1
    scores: jax.Array  # [K, M], of each reward model likewise


def online(config: Any, proxy_loss: Loss) -> Online:
    """Online training in the world of vectors, `vectors(config, proxy_loss)._replace(online=online(config, proxy_loss))`.

    Args:
      config: groups `world`, `proxy` and `online` of experiments/overoptimization.py.
      proxy_loss: that of the reward models.

    Raises:
      BadInput: for fields outside their range.
    """
    check_ranges(config, RANGES)
    c = config.online
    for field, part, whole in (("batch_size", "minibatches", c.batch_size), ("rollouts", "every", c.rollouts)):
        if whole % c[part]:
            raise BadInput(f"online.{field} is {whole}, no multiple of online.{part}, {c[part]}; make it one")
    pools = functools.cache(lambda seeds: make_pools(config, proxy_loss, seeds))
    return Online(lambda seeds, method: learn(config, *pools(tuple(seeds)), method), lambda seeds, own: solve(pools(tuple(seeds))[1], own))


def make_pools(config: Any, proxy_loss: Loss, seeds: Sequence[int]) -> tuple[jax.Array, Pool]:
    """Keys [S, 6], and the pool of each seed with what its reward models say of it: leaves [S, ...]."""
    world, keys, golds = config.world, *make_golds(seeds, config.world)

    def make(gold: Any, keys: jax.Array) -> tuple[TrainState, Pool]:
        pairs = ordered(gold, draw(keys[1], (world.pairs, 2), world), world)
        state = train_members(config, proxy_loss, keys[2], keys[3], pairs)
        vectors = draw(keys[4], (config.online.pool,), world)
        scores = jax.vmap(network, in_axes=(0, None))(state.params, vectors)
        return state, Pool(vectors, standardised(rewards(gold, vectors, world)), standardised(scores))

    states, pools = jax.jit(jax.vmap(make))(golds, keys)
    check_trained(states)
    return keys, pools


def standardised(x: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the last axis."""
    return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)


# Models ---------------------------------------------------------------------------------------------------------------------


def actor(vectors: jax.Array, critic: bool, params: Params, batch: Batch) -> Outputs:
    """The policy over a pool [M, D], may be with a critic: responses are all to one prompt, so its value is one number."""
    out = policy(vectors, params["policy"], batch)
    return out._replace(values=jnp.broadcast_to(params[VALUE], out.logps.shape)) if critic else out


def uniform(count: jax.Array, batch: Batch) -> Outputs:
    """The initial policy, over so many responses."""
    shape = batch["tokens"].shape
    return Outputs(jnp.broadcast_to(-jnp.log(count), shape), jnp.broadcast_to(jnp.log(count), shape))


def table(scores: jax.Array, batch: Batch) -> Outputs:
    """Reward models of which all that matters is known: scores [K, M] of the pool."""
    none = jnp.zeros(batch["tokens"].shape)
    return Outputs(none, none, scores=jnp.moveaxis(scores[:, batch["tokens"][..., 0]], 0, -1))


# Training -------------------------------------------------------------------------------------------------------------------


def learn(config: Any, keys: jax.Array, pools: Pool, method: Method) -> Iterator[list[Trajectory]]:
    """Trains a policy of each seed for each coefficient of a method: one compiled program."""
    c = config.online
    run = jax.jit(lambda coefficient, inputs: jax.lax.map(lambda own: train_policy(c, method, coefficient, *own), inputs))
    steps = np.arange(c.rollouts // c.every + 1) * c.every * c.minibatches
    for coefficient in method.coefficients:
        state, values = run(jnp.float32(coefficient or 0.0), (keys, pools))
        check_trained(state)
        measured = {name: np.asarray(x) for name, x in values.items()}
        yield [Trajectory(steps, {name: x[i] for name, x in measured.items()}) for i in range(len(keys))]


def train_policy(c: Any, method: Method, coefficient: jax.Array, keys: jax.Array, pool: Pool) -> tuple[TrainState, dict[str, jax.Array]]:
    """One policy, from the uniform one, and what is measured of it at each of the evaluations: [E]."""
    count = pool.vectors.shape[0]
    scores = pool.scores[: method.members]  # [K, M]
    initial = {"policy": init_network(keys[5], pool.vectors.shape[1], 0.0), VALUE: jnp.zeros(())}
    experience = method.experience(coefficient, Model(uniform, jnp.float32(count)), Model(table, scores))
    apply, optimizer, after = partial(actor, pool.vectors, method.critic), optax.adam(c.learning_rate), averaged(method.averages)
    step = make_step(apply, method.loss(coefficient), optimizer)

    def rollout(_: jax.Array, state: TrainState) -> TrainState:
        p = jax.nn.softmax(network(state.params["policy"], pool.vectors))
        tokens = jax.random.choice(jax.random.fold_in(state.key, state.step), count, (c.batch_size, c.samples, 1), p=p)
        batch: Any = {"tokens": tokens, "completion_mask": jnp.ones(tokens.shape, bool)}
        out = apply(state.params, batch)
        batch |= {"old_logps": out.logps, "sampled_logps": out.logps} | ({"values": out.values} if method.critic else {})
        carry, batch = advance(experience, state.carry, batch)[:2]
        update = lambda state, part: (after(step(state, part)[0]), None)
        return jax.lax.scan(update, dataclasses.replace(state, carry=carry), microbatch(batch, c.minibatches))[0]

    def stretch(state: TrainState, rollouts: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        state = jax.lax.fori_loop(0, rollouts, rollout, state)
        p = jax.nn.softmax(network(state.params["policy"], pool.vectors))
        return state, measured(p, pool.gold, scores, method)

    state = init_state(initial, optimizer, jax.random.fold_in(keys[5], 1), dict.fromkeys(method.averages, initial))
    state = dataclasses.replace(state, carry=first_carry(experience))
    rollouts = jnp.full((c.rollouts // c.every + 1,), c.every).at[0].set(0)  # measured before the first one too
    return jax.lax.scan(stretch, state, rollouts)


def measured(p: jax.Array, gold: jax.Array, scores: jax.Array, own: Method | Optimum) -> dict[str, jax.Array]:
    """What a policy p [M] over a pool is worth, exactly; its KL is from the uniform policy."""
    count = p.shape[0]
    out = {
        "gold": p @ gold,
        "kl": jnp.sum(jax.scipy.special.xlogy(p, count * p)),
        "proxy": p @ own.proxy(scores),
        "disagreement": p @ scores.std(axis=0),
    }
    each = {f"score {k + 1}": p @ scores[k] for k in range(scores.shape[0])}
    return out | {name: x for name, x in each.items() if isinstance(own, Method) and name in own.over_steps}


# Optima ---------------------------------------------------------------------------------------------------------------------


def kl_optimum(reward: jax.Array, beta: jax.Array | float) -> jax.Array:
    """The policy that maximises E r - beta KL(pi || uniform), exp(r / beta) over its sum: [M] -> [M]."""
    return jax.nn.softmax(reward / beta)


def chi2_optimum(reward: jax.Array, coefficient: jax.Array | float, bisections: int = 60) -> jax.Array:
    """The policy that maximises E r - coefficient chi2(pi || uniform): [M] -> [M] (Laidlaw et al. 2024, arXiv:2403.03185).

    pi_i = max(0, 1 + (r_i - nu) / (2 coefficient)) / M,   nu such that it sums to 1

    Unlike the KL's, it has no probability where rewards are low, and grows with the reward by a line, not exponentially.
    """
    ratio = lambda nu: jnp.maximum(0.0, 1.0 + (reward - nu) / (2.0 * coefficient))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2.0
        heavy = ratio(middle).mean() > 1.0
        return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle)

    # With nu at the mean reward the ratios average to 1 at least, at the largest reward to 1 at most.
    low, high = jax.lax.fori_loop(0, bisections, halve, (reward.mean(), reward.max()))
    p = ratio((low + high) / 2.0)
    return p / p.sum()


def solve(pools: Pool, own: Optimum) -> list[Trajectory]:
    """The optima of every seed, one evaluation for each coefficient."""

    def seed(pool: Pool) -> dict[str, jax.Array]:
        scores = pool.scores[: own.members]
        at = lambda coefficient: measured(own.solution(own.proxy(scores), coefficient), pool.gold, scores, own)
        return jax.lax.map(at, jnp.array(own.coefficients))

    values = {name: np.asarray(x) for name, x in jax.jit(jax.vmap(seed))(pools).items()}
    return [Trajectory(np.array(own.coefficients), {name: x[i] for name, x in values.items()}) for i in range(len(values["gold"]))]
