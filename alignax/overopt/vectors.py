"""The world of vectors, where an experiment takes seconds. Gold reward grows along a direction, and is low for vectors far from 0.

x = z * s,  z ~ N(0, I),  s = `stretch` with probability `tail`, else 1;  gold(x) = w . x, but `outside` if |x| >= `radius` sqrt(D)

Reward models learn from pairs. Few pairs lie far from 0, so reward models extrapolate there along w: bad responses get the largest proxy
scores, and the members disagree about them. With `tail` 0 no response lies there; this is the negative control.

A reward model is a function `(params, batch) -> Outputs`, and so is a policy. The library's losses and step train both. `jax.vmap` of the
step over stacked trees trains all seeds and members in one compiled program.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax.config import BadInput
from alignax.experience import chain, logps
from alignax.losses import Loss
from alignax.overopt.worlds import Scored, Trajectory, World, check_ranges, check_sizes, check_trained, check_varies
from alignax.train import init_state, make_evaluation, make_step
from alignax.types import Batch, Model, Outputs, Params, TrainState

SAMPLES = 20_000  # responses that estimate the mean and the standard deviation of gold
HIDDEN = 32  # width of a network's hidden layers
RANGES = (  # config field, lowest, highest
    ("world.tail", 0, 1), ("world.noise", 0, 0.5), ("world.dimension", 1, math.inf), ("world.pairs", 1, math.inf),
    ("world.held_out", 1, math.inf), ("world.prompts", 1, math.inf), ("proxy.members", 1, math.inf), ("proxy.steps", 1, math.inf),
    ("proxy.batch_size", 1, math.inf), ("direct.pool", 2, math.inf), ("direct.every", 1, math.inf), ("direct.batch_size", 1, math.inf),
)  # fmt: skip


class Gold(NamedTuple):
    """A gold reward, standardised by its mean and standard deviation under the initial policy."""

    direction: jax.Array  # [D], a unit vector
    mean: jax.Array
    std: jax.Array


def vectors(config: Any, proxy_loss: Loss) -> World:
    """The world of vectors: best-of-n of fresh responses, and policies over a fixed pool of responses.

    Args:
      config: groups `world`, `proxy` and `direct` of experiments/overoptimization.py.
      proxy_loss: loss of the reward models, for example `bradley_terry() + 0.001 * score_l2()`.

    Raises:
      BadInput: for fields outside their range.
    """
    check_ranges(config, RANGES)
    check_sizes(config)
    if config.direct.steps % config.direct.every:
        raise BadInput(f"direct.steps is {config.direct.steps}, not a multiple of direct.every ({config.direct.every}); choose a multiple")
    return World(partial(score, config, proxy_loss), partial(align, config))


# Responses and their gold reward -------------------------------------------------------------------------------------------


def draw(key: jax.Array, shape: tuple[int, ...], world: Any) -> jax.Array:
    """Random responses of the initial policy: [*shape, D]."""
    normal, far = jax.random.split(key)
    stretched = jax.random.uniform(far, (*shape, 1)) < world.tail
    return jax.random.normal(normal, (*shape, world.dimension)) * jnp.where(stretched, world.stretch, 1.0)


def make_gold(key: jax.Array, world: Any) -> Gold:
    """The gold reward of a seed: a random direction, with the mean and standard deviation of a sample."""
    one, other = jax.random.split(key)
    w = jax.random.normal(one, (world.dimension,))
    gold = Gold(w / jnp.linalg.norm(w), jnp.zeros(()), jnp.ones(()))
    sample = rewards(gold, draw(other, (SAMPLES,), world), world)
    return gold._replace(mean=sample.mean(), std=sample.std())


def make_golds(seeds: Sequence[int], world: Any) -> tuple[jax.Array, Gold]:
    """The random keys [S, 6] of S seeds, and their gold rewards, stacked to leaves [S, ...]."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 6))(jnp.array(seeds))
    golds = jax.jit(jax.vmap(partial(make_gold, world=world)))(keys[:, 0])
    for mean, std in zip(golds.mean.tolist(), golds.std.tolist(), strict=True):
        check_varies(mean, std)
    return keys, golds


def rewards(gold: Gold, x: jax.Array, world: Any) -> jax.Array:
    """The gold rewards of responses: [..., D] -> [...]."""
    inside = jnp.linalg.norm(x, axis=-1) < world.radius * math.sqrt(world.dimension)
    return (jnp.where(inside, x @ gold.direction, world.outside) - gold.mean) / gold.std


def flips(key: jax.Array, count: int, members: int, config: Any) -> jax.Array:
    """The mask [K, pairs] of flipped training labels. All members have the same row with `world.shared_noise`, otherwise each its own."""
    shape = (1 if config.world.shared_noise else members, count)
    return jnp.broadcast_to(jax.random.uniform(key, shape) < config.world.noise, (members, count))


def relabelled(pairs: jax.Array, flipped: jax.Array) -> jax.Array:
    """Pairs [B, 2, ..] with the two sides swapped where `flipped` [B] is True."""
    return jnp.where(flipped[:, None, None], pairs[:, ::-1], pairs)


# Models ---------------------------------------------------------------------------------------------------------------------


def init_network(key: jax.Array, dimension: int, last: float) -> Params:
    """Random parameters of a ReLU network with two hidden layers; `last` scales the weights of the output layer."""
    sizes, keys = (dimension, HIDDEN, HIDDEN, 1), jax.random.split(key, 3)
    layers = [jax.random.normal(k, (a, b)) / math.sqrt(a) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]
    return [{"weight": w * (last if w.shape[1] == 1 else 1.0), "bias": jnp.zeros((1, w.shape[1]))} for w in layers]


def network(params: Params, x: jax.Array) -> jax.Array:
    """The output of a ReLU network: [..., D] -> [...]."""
    h = x.reshape(-1, x.shape[-1])
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer["weight"] + layer["bias"])
    return (h @ params[-1]["weight"] + params[-1]["bias"]).reshape(x.shape[:-1])


def reward_model(params: Params, batch: Batch) -> Outputs:
    """Outputs of a reward model: scores [B, N] of `vectors` [B, N, D]. Vectors have no tokens, so log-probs are 0."""
    none = jnp.zeros(batch["completion_mask"].shape)
    return Outputs(none, none, scores=network(params, batch["vectors"]))


def policy(pool: jax.Array, params: Params, batch: Batch) -> Outputs:
    """Outputs of a policy: a softmax over a pool [M, D] of responses. A response is one token, its index: `tokens` [B, N, 1]."""
    log_probs = jax.nn.log_softmax(network(params, pool))  # [M]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs)
    return Outputs(log_probs[batch["tokens"]], jnp.full(batch["tokens"].shape, entropy))


def trained(step: Any, state: TrainState, data: Batch, steps: int | jax.Array, batch_size: int) -> TrainState:
    """The training state after `steps` steps on batches of random rows of `data`."""
    count = data["completion_mask"].shape[0]

    def one(_: jax.Array, state: TrainState) -> TrainState:
        rows = jax.random.randint(jax.random.fold_in(state.key, state.step), (batch_size,), 0, count)
        return step(state, jax.tree.map(lambda x: x[rows], data))[0]

    return jax.lax.fori_loop(0, steps, one, state)


# Reward models, for best-of-n -----------------------------------------------------------------------------------------------


def score(config: Any, loss: Loss, seeds: Sequence[int]) -> Iterator[Scored]:
    """Trains the reward models of all seeds at once, and scores fresh responses; yields one `Scored` per seed."""
    world = config.world
    keys, golds = make_golds(seeds, world)
    pairs = lambda gold, key, count: ordered(gold, draw(key, (count, 2), world), world)

    def train(gold: Gold, keys: jax.Array) -> TrainState:
        return train_members(config, loss, keys[2], keys[3], pairs(gold, keys[1], world.pairs))

    def fresh(gold: Gold, keys: jax.Array, params: Params) -> tuple[jax.Array, ...]:
        members = lambda x: jax.vmap(network, in_axes=(0, None))(params, x)
        responses = draw(keys[4], (world.prompts, world.responses), world)
        better, worse = members(pairs(gold, keys[5], world.held_out).swapaxes(0, 1)).swapaxes(0, 1)  # [K, H] each
        scores = jax.lax.map(members, responses)  # [P, K, N], one prompt at a time to bound memory
        return responses, rewards(gold, responses, world), scores.swapaxes(0, 1), better - worse

    states = jax.jit(jax.vmap(train))(golds, keys)  # leaves [S, K, ...]
    check_trained(states)
    measure = jax.jit(fresh)
    for i in range(len(seeds)):
        gold, params = jax.tree.map(itemgetter(i), (golds, states.params))
        responses, *measured = map(np.asarray, measure(gold, keys[i], params))
        yield Scored(*measured, lengths=None, show=partial(show, np.asarray(gold.direction), responses))


def train_members(config: Any, loss: Loss, key: jax.Array, noise: jax.Array, pairs: jax.Array) -> TrainState:
    """Trains K reward models on pairs [pairs, 2, D], better side first, each with its own initial weights and order: leaves [K, ...]."""
    c, count = config.proxy, pairs.shape[0]
    optimizer = optax.adam(c.learning_rate)
    step = make_step(reward_model, loss, optimizer)

    def member(key: jax.Array, flipped: jax.Array) -> TrainState:
        init, order = jax.random.split(key)
        data = {"vectors": relabelled(pairs, flipped), "completion_mask": jnp.ones((count, 2, 1), bool)}
        state = init_state(init_network(init, pairs.shape[2], 1.0), optimizer, order)
        return trained(step, state, data, c.steps, c.batch_size)

    return jax.vmap(member)(jax.random.split(key, c.members), flips(noise, count, c.members, config))


def ordered(gold: Gold, x: jax.Array, world: Any) -> jax.Array:
    """Pairs [.., 2, D] with the response that gold prefers first."""
    better = jnp.argmax(rewards(gold, x, world), axis=-1)
    return jnp.where((better == 0)[..., None, None], x, x[..., ::-1, :])


def show(direction: np.ndarray, responses: np.ndarray, p: int, i: int) -> tuple[str, str]:
    """Texts of a prompt and a response [D]: its component along gold's direction, and its norm."""
    x = responses[p, i]
    return f"prompt {p}", f"w·x = {x @ direction:+.2f}, |x| = {np.linalg.norm(x):.2f}"


# Policies, for direct alignment ---------------------------------------------------------------------------------------------


def align(config: Any, seeds: Sequence[int], loss: Loss) -> Iterator[Trajectory]:
    """Trains a policy of each seed over a pool of responses, starting uniform, and measures it exactly; yields one trajectory per seed."""
    c = config.direct
    keys, golds = make_golds(seeds, config.world)
    run = jax.jit(lambda inputs: jax.lax.map(lambda own: train_policy(config, loss, *own), inputs))
    state, values = run((golds, keys))
    check_trained(state)
    steps = np.arange(c.steps // c.every + 1) * c.every
    for i in range(len(seeds)):
        yield Trajectory(steps, {name: np.asarray(x[i]) for name, x in values.items()})


def train_policy(config: Any, loss: Loss, own: Gold, keys: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """Trains one policy over a pool of responses. Returns its state and its measurements at E evaluations: quantity -> [E]."""
    c, world, count = config.direct, config.world, config.direct.pool
    pool = draw(keys[1], (count,), world)  # [M, D]
    gold = rewards(own, pool, world)
    gold = (gold - gold.mean()) / gold.std()  # [M]; the initial policy is uniform over the pool
    apply, optimizer = partial(policy, pool), optax.adam(c.learning_rate)
    initial = init_network(keys[2], pool.shape[1], 0.0)  # all scores 0: the uniform policy
    experience = chain(logps("ref_logps", Model(apply, initial)))

    def pairs(key: jax.Array, flipped: jax.Array) -> Batch:
        tokens = random_pairs(key, gold, flipped)
        return experience({"tokens": tokens, "completion_mask": jnp.ones(tokens.shape, bool)})

    trained_on, other = jax.random.split(keys[3])
    data = pairs(trained_on, flips(keys[4], world.pairs, 1, config)[0])
    held_out = pairs(other, jnp.zeros((world.held_out,), bool))
    seen = jnp.zeros((count,)).at[data["tokens"].reshape(-1)].set(1.0)
    evaluate = make_evaluation(apply, loss)

    def measured(state: TrainState) -> dict[str, jax.Array]:
        log_probs = jax.nn.log_softmax(network(state.params, pool))
        p = jnp.exp(log_probs)
        on, off = (evaluate(state.params, state.step, batch) for batch in (data, held_out))
        mean = lambda sums, name: sums[name][0] / sums[name][1]
        return {
            "gold": p @ gold, "kl": p @ (log_probs + math.log(count)), "proxy": mean(off, "rewards/margins"),
            "accuracy": mean(off, "rewards/accuracies"), "chosen_drift": mean(on, "logps/chosen_drift"), "unseen": p @ (1.0 - seen),
        }  # fmt: skip

    def stretch(state: TrainState, steps: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        state = trained(step, state, data, steps, c.batch_size)
        return state, measured(state)

    step = make_step(apply, loss, optimizer)
    steps = jnp.full((c.steps // c.every + 1,), c.every).at[0].set(0)  # the first evaluation is before training
    return jax.lax.scan(stretch, init_state(initial, optimizer, keys[5]), steps)


def random_pairs(key: jax.Array, gold: jax.Array, flipped: jax.Array) -> jax.Array:
    """Random pairs of indices [B, 2, 1] into a pool with gold rewards [M]: the better one first, unless `flipped` [B]."""
    pairs = jax.random.randint(key, (flipped.shape[0], 2, 1), 0, gold.shape[0])
    return relabelled(relabelled(pairs, gold[pairs[:, 0, 0]] < gold[pairs[:, 1, 0]]), flipped)
