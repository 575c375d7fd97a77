"""Online methods in the world of vectors: policies over a pool of responses, trained on their own samples against reward models.

Training uses the library's parts, as in `alignax.run.online`: experience writes rewards and advantages, losses read them, and the shared
step runs on each minibatch of a rollout. A rollout is [B, N, 1] samples; a response is one token, its index in the pool. Gold reward, KL
and proxy of a policy are therefore exact sums over the pool. Only training is sampled.

The reward models are trained as for best-of-n. Their scores have mean 0 and standard deviation 1 over the pool, so coefficients of the KL
are in standard deviations per nat.
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
    """The M responses that a policy of one seed chooses from. The initial policy is uniform over them."""

    vectors: jax.Array  # [M, D]
    gold: jax.Array  # [M], with mean 0 and standard deviation 1
    scores: jax.Array  # [K, M], of each reward model with mean 0 and standard deviation 1


def online(config: Any, proxy_loss: Loss) -> Online:
    """Online training in the world of vectors, for `vectors(config, proxy_loss)._replace(online=online(config, proxy_loss))`.

    Args:
      config: groups `world`, `proxy` and `online` of experiments/overoptimization.py.
      proxy_loss: loss of the reward models.

    Raises:
      BadInput: for fields outside their range.
    """
    check_ranges(config, RANGES)
    c = config.online
    for field, part, whole in (("batch_size", "minibatches", c.batch_size), ("rollouts", "every", c.rollouts)):
        if whole % c[part]:
            raise BadInput(f"online.{field} is {whole}, not a multiple of online.{part} ({c[part]}); choose a multiple")
    pools = functools.cache(lambda seeds: make_pools(config, proxy_loss, seeds))
    return Online(lambda seeds, method: learn(config, *pools(tuple(seeds)), method), lambda seeds, own: solve(pools(tuple(seeds))[1], own))


def make_pools(config: Any, proxy_loss: Loss, seeds: Sequence[int]) -> tuple[jax.Array, Pool]:
    """The keys [S, 6] of S seeds, and their pools with gold rewards and scores: leaves [S, ...]."""
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
    """Values with mean 0 and standard deviation 1 (ddof 0) over the last axis: [..., M] -> [..., M]."""
    return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)


# Models ---------------------------------------------------------------------------------------------------------------------


def actor(vectors: jax.Array, critic: bool, params: Params, batch: Batch) -> Outputs:
    """Outputs of the policy over a pool [M, D], with a critic if asked. All responses are to one prompt, so the value is one number."""
    out = policy(vectors, params["policy"], batch)
    return out._replace(values=jnp.broadcast_to(params[VALUE], out.logps.shape)) if critic else out


def uniform(count: jax.Array, batch: Batch) -> Outputs:
    """Outputs [B, N, 1] of the initial policy, uniform over `count` responses."""
    shape = batch["tokens"].shape
    return Outputs(jnp.broadcast_to(-jnp.log(count), shape), jnp.broadcast_to(jnp.log(count), shape))


def table(scores: jax.Array, batch: Batch) -> Outputs:
    """Outputs of K reward models whose scores [K, M] of the pool are known: scores [B, N, K] of tokens [B, N, 1]."""
    none = jnp.zeros(batch["tokens"].shape)
    return Outputs(none, none, scores=jnp.moveaxis(scores[:, batch["tokens"][..., 0]], 0, -1))


# Training -------------------------------------------------------------------------------------------------------------------


def learn(config: Any, keys: jax.Array, pools: Pool, method: Method) -> Iterator[list[Trajectory]]:
    """Trains a policy of each seed, coefficient by coefficient, in one compiled program; yields the trajectories of all seeds."""
    c = config.online
    run = jax.jit(lambda coefficient, inputs: jax.lax.map(lambda own: train_policy(c, method, coefficient, *own), inputs))
    steps = np.arange(c.rollouts // c.every + 1) * c.every * c.minibatches
    for coefficient in method.coefficients:
        state, values = run(jnp.float32(coefficient or 0.0), (keys, pools))
        check_trained(state)
        measured = {name: np.asarray(x) for name, x in values.items()}
        yield [Trajectory(steps, {name: x[i] for name, x in measured.items()}) for i in range(len(keys))]


def train_policy(c: Any, method: Method, coefficient: jax.Array, keys: jax.Array, pool: Pool) -> tuple[TrainState, dict[str, jax.Array]]:
    """Trains one policy, starting uniform. Returns its state and its measurements at each of E evaluations: quantity -> [E]."""
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
    rollouts = jnp.full((c.rollouts // c.every + 1,), c.every).at[0].set(0)  # the first evaluation is before training
    return jax.lax.scan(stretch, state, rollouts)


def measured(p: jax.Array, gold: jax.Array, scores: jax.Array, own: Method | Optimum) -> dict[str, jax.Array]:
    """Exact gold reward, KL, proxy and disagreement of a policy p [M] over a pool; the KL is to the uniform policy, in nats."""
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
    """The policy that maximises E r - beta KL(pi || uniform): exp(r / beta) over its sum, rewards [M] -> probabilities [M]."""
    return jax.nn.softmax(reward / beta)


def chi2_optimum(reward: jax.Array, coefficient: jax.Array | float, bisections: int = 60) -> jax.Array:
    """The policy that maximises E r - coefficient chi2(pi || uniform): rewards [M] -> probabilities [M].

    pi_i = max(0, 1 + (r_i - nu) / (2 coefficient)) / M,   nu such that pi sums to 1

    (Laidlaw et al. 2024, arXiv:2403.03185.) Unlike the optimum under the KL, pi is 0 at low rewards and grows linearly with the reward,
    not exponentially.
    """
    ratio = lambda nu: jnp.maximum(0.0, 1.0 + (reward - nu) / (2.0 * coefficient))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2.0
        heavy = ratio(middle).mean() > 1.0
        return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle)

    # The mean ratio is at least 1 for nu at the mean reward, and at most 1 for nu at the largest reward.
    low, high = jax.lax.fori_loop(0, bisections, halve, (reward.mean(), reward.max()))
    p = ratio((low + high) / 2.0)
    return p / p.sum()


def solve(pools: Pool, own: Optimum) -> list[Trajectory]:
    """The trajectories of an optimum, one per seed, with one evaluation per coefficient."""

    def seed(pool: Pool) -> dict[str, jax.Array]:
        scores = pool.scores[: own.members]
        at = lambda coefficient: measured(own.solution(own.proxy(scores), coefficient), pool.gold, scores, own)
        return jax.lax.map(at, jnp.array(own.coefficients))

    values = {name: np.asarray(x) for name, x in jax.jit(jax.vmap(seed))(pools).items()}
    return [Trajectory(np.array(own.coefficients), {name: x[i] for name, x in values.items()}) for i in range(len(values["gold"]))]
