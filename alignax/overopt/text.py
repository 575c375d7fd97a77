"""The laboratory on transformers: a policy trained on demonstrations, and reward models trained on pairs of its answers.

The world is `alignax.overopt.words`. Every model is the library's transformer, trained with the library's losses, data streams and step.
The K reward models of a seed are trained by `jax.vmap` of that step. Answers are sampled by `alignax.generate` and scored by
`alignax.rewards`. All seeds share one policy; each seed has its own gold reward, pairs, reward models and answers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import rewards
from alignax.config import BadInput
from alignax.data import Batches, Examples, evaluation_batch, padded_length
from alignax.generate import Generator, sampled_batch, sampler, speaker
from alignax.losses import Loss, sft
from alignax.mesh import make_mesh
from alignax.models import parameters
from alignax.models.transformer import ModelConfig, forward
from alignax.overopt import words
from alignax.overopt.words import Gold
from alignax.overopt.worlds import Scored, Trajectory, World, check_ranges, check_sizes, check_trained, margins
from alignax.rewards.members import AXES, keys, member_batch, member_batches, over_members
from alignax.run.steps import compare
from alignax.train import init_state, make_evaluation, make_step, means
from alignax.types import Model, Params, TrainState

NEW = words.LONGEST + 1  # most tokens of an answer, including the EOS
SLOTS = 1024  # answers sampled side by side
HEADS = 4
TAUGHT = 0.1  # share of loops in the first third of the demonstrations
RANGES = (  # config field, lowest, highest
    ("world.tail", 0, 1), ("world.noise", 0, 0.5), ("world.pairs", 1, math.inf), ("world.held_out", 1, math.inf),
    ("world.prompts", 1, len(words.TOPICS)), ("world.responses", 2, math.inf), ("sft.answers", 1, math.inf), ("sft.steps", 1, math.inf),
    ("proxy.members", 1, math.inf), ("proxy.steps", 1, math.inf), ("direct.every", 1, math.inf), ("direct.samples", 1, math.inf),
)  # fmt: skip


class Policy(NamedTuple):
    """The initial policy: config, parameters and sampler."""

    config: ModelConfig
    params: Params
    generate: Generator


class Data(NamedTuple):
    """The data of a seed: its gold reward, and pairs of the policy's answers with the one that gold prefers first."""

    gold: Gold
    train: Examples
    held_out: Examples


def text(config: Any, proxy_loss: Loss) -> World:
    """The world of words, on transformers trained here.

    Args:
      config: groups `world`, `sft`, `proxy` and `direct` of experiments/overoptimization_tokens.py.
      proxy_loss: loss of the reward models, for example `bradley_terry() + 0.001 * score_l2()`.

    Raises:
      BadInput: for fields outside their range.
    """
    check_ranges(config, RANGES)
    check_sizes(config)
    for group in ("sft", "proxy"):
        if config[group].width % HEADS:
            raise BadInput(f"config field '{group}.width' is {config[group].width}, not a multiple of the {HEADS} heads; choose a multiple")
    if config.direct.steps % config.direct.every:
        raise BadInput(f"direct.steps is {config.direct.steps}, not a multiple of direct.every ({config.direct.every}); choose a multiple")
    policy = functools.cache(partial(train_policy, config))
    data = functools.cache(lambda seed: make_data(config, policy(), seed))
    return World(partial(score, config, proxy_loss, policy, data), partial(align, config, policy, data))


# Models and their training --------------------------------------------------------------------------------------------------


def model(width: int, layers: int, num_labels: int = 0) -> ModelConfig:
    """The config of a decoder for the words: a language model, or with `num_labels` a reward model."""
    return ModelConfig(
        vocab_size=len(words.VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=width // HEADS, max_position_embeddings=1 + NEW,
        tie_word_embeddings=True, initializer_range=0.05 if num_labels else 0.15, num_labels=num_labels,
    )  # fmt: skip


def trained(step: Any, state: TrainState, batch: Callable[[int], Mapping[str, np.ndarray]], steps: range) -> TrainState:
    """The training state after a range of steps; step i trains on `batch(i)`. Stops if a step was not finite."""
    for i in steps:
        state = step(state, batch(i))[0]
    check_trained(state)
    return state


def train_policy(config: Any) -> Policy:
    """The initial policy, trained by SFT on demonstrations."""
    c, own = config.sft, model(config.sft.width, config.sft.layers)
    optimizer = optax.adam(optax.cosine_decay_schedule(c.learning_rate, c.steps))
    step = jax.jit(make_step(forward(own, remat="none"), sft(), optimizer), donate_argnums=0)
    state = init_state(parameters.fresh(own, jax.random.key(config.seed)), optimizer, jax.random.key(config.seed))
    # First many loops, so that the policy learns to continue one; then the true share, so that it learns how rarely one begins.
    third, tail = c.steps // 3, config.world.tail
    for part, steps in enumerate((range(third), range(third, c.steps))):
        rng = np.random.default_rng([config.seed, 0, part])
        shown = examples(*words.demonstrations(rng, max(tail, TAUGHT) if tail and not part else tail, c.answers))
        state = trained(step, state, Batches(shown, c.batch_size, config.seed, padded_length(shown)).batch, steps)
    return Policy(own, state.params, sampler(speaker(own), SLOTS, 1, NEW, ends=[words.EOS], slots=SLOTS))


def examples(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Any]]) -> Examples:
    """Examples of P prompts in tokens with N answers each."""
    sides = [np.concatenate([prompt, answer]) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    scored = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    offsets = np.cumsum([0, *map(len, sides)])
    texts = [words.text(prompt) for prompt in prompts]
    return Examples(np.concatenate(sides).astype(np.int32), np.concatenate(scored), offsets, len(answers[0]), texts)


def make_data(config: Any, policy: Policy, seed: int) -> Data:
    """The data of a seed: pairs of the policy's answers, labelled by gold. Ties are left out."""
    c, wanted = config.world, config.world.pairs + config.world.held_out
    asked = words.prompts(np.random.default_rng([seed, 2]), wanted + wanted // 4)
    answers = policy.generate(policy.params, asked, jax.random.key(2 * seed), n=2)
    gold = words.make_gold(seed, c.outside, answers.tokens)
    rows, values = answers.rows(), gold(answers.tokens)  # [B, 2]
    pairs = [(p, r if a > b else r[::-1]) for p, r, (a, b) in zip(asked, rows, values, strict=True) if a != b][:wanted]
    if len(pairs) < wanted:
        raise BadInput(f"the policy made {len(pairs)} pairs without a tie, but {wanted} are needed; raise sft.steps")
    both = [examples(*zip(*part, strict=True)) for part in (pairs[: c.pairs], pairs[c.pairs :])]
    return Data(gold, *both)


# Best-of-n ------------------------------------------------------------------------------------------------------------------


def score(config: Any, loss: Loss, policy: Callable[[], Policy], data: Callable[[int], Data], seeds: Sequence[int]) -> Iterator[Scored]:
    """Trains the reward models of each seed and scores fresh answers of the policy; yields one `Scored` per seed."""
    c, world = config.proxy, config.world
    own, mesh = model(c.width, c.layers, num_labels=1), make_mesh({}, jax.devices()[:1])
    optimizer = optax.adam(c.learning_rate)
    step = over_members(make_step(forward(own, remat="none"), loss, optimizer), (AXES, 0), (AXES, 0))
    step, start = jax.jit(step, donate_argnums=0), jax.jit(partial(new_members, own, optimizer, c.members))
    asked = [[1 + topic] for topic in range(world.prompts)]
    for seed in seeds:
        gold, pairs, _ = data(seed)
        stream = partial(member_batch, members=slice(None), rows=slice(None))
        state = trained(step, start(seed), partial(stream, member_streams(config, pairs, seed)), range(c.steps))
        answers = policy().generate(policy().params, asked, jax.random.key(2 * seed + 1), n=world.responses)
        shown = examples(asked, answers.rows())
        rated = rewards.ensemble_model(own, state.params, mesh)
        scores = rewards.score_examples(rated.apply, rated.params, shown, mesh, 1, padded_length(shown))  # one prompt at a time
        values = gold(answers.tokens)
        yield Scored(values, scores, margins(values, scores), answers.mask.sum(axis=-1), partial(show, answers.tokens))


def new_members(own: ModelConfig, optimizer: optax.GradientTransformation, members: int, seed: int) -> TrainState:
    """The training state of K reward models at step 0. Initial weights differ between members and between seeds."""
    start = lambda key: init_state(parameters.fresh(own, key), optimizer, jax.random.key(0))
    return over_members(start, 0, AXES)(keys(seed * members, members))


def member_streams(config: Any, pairs: Examples, seed: int) -> list[Batches]:
    """The batches of each member, in its own order. With `shared_noise` all members have the same flipped labels, otherwise their own."""
    c, world, first = config.proxy, config.world, seed * config.proxy.members
    stream = Batches(pairs, c.batch_size, first, padded_length(pairs), noise=world.noise, noise_seed=first)
    return member_batches(stream, c.members, not world.shared_noise)


def show(tokens: np.ndarray, p: int, i: int) -> tuple[str, str]:
    """The texts of prompt p and of its i-th answer."""
    return words.text([1 + p]), words.text(tokens[p, i])


# Direct alignment -----------------------------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """The jitted programs of direct alignment."""

    optimizer: optax.GradientTransformation
    step: Callable[[TrainState, Any], Any]
    evaluate: Callable[..., Any]  # params, step, batch -> sums of the loss's metrics
    logps: Callable[..., jax.Array]  # params, batch -> [B, N, T]
    ratios: Callable[..., jax.Array]  # params, initial params, sampled batch -> log pi - log pi_0 of each answer in nats, [B, 1]


def align(config: Any, policy: Callable[[], Policy], data: Callable[[int], Data], seeds: Sequence[int], loss: Loss) -> Iterator[Trajectory]:
    """Trains the policy on each seed's pairs and measures its samples; yields one trajectory per seed."""
    apply, optimizer = forward(policy().config, remat="none"), optax.adam(config.direct.learning_rate)
    programs = Programs(
        optimizer,
        jax.jit(make_step(apply, loss, optimizer), donate_argnums=0),
        jax.jit(make_evaluation(apply, loss)),
        jax.jit(lambda params, batch: apply(params, batch).logps),
        jax.jit(lambda params, initial, batch: compare(Model(apply, params), Model(apply, initial), batch)[0]),
    )
    for seed in seeds:
        yield train_one(config, policy(), data(seed), programs, seed)


def train_one(config: Any, initial: Policy, data: Data, programs: Programs, seed: int) -> Trajectory:
    """Trains and measures one policy. KL(policy || initial) is the mean log-ratio of its samples, gold is their mean gold reward."""
    c, first = config.direct, seed * config.proxy.members
    pairs, held_out = (with_reference(programs, initial.params, own) for own in (data.train, data.held_out))
    stream = Batches(pairs, c.batch_size, first, padded_length(pairs), noise=config.world.noise, noise_seed=first)
    on, off = (evaluation_batch(own, 0, config.world.held_out, padded_length(own)) for own in (pairs, held_out))
    asked = words.prompts(np.random.default_rng([seed, 3]), c.samples)

    def measured(state: TrainState) -> dict[str, float]:
        answers = initial.generate(state.params, asked, jax.random.fold_in(jax.random.key(2 * seed), int(state.step)))
        ratios = programs.ratios(state.params, initial.params, sampled_batch(asked, answers, 1 + NEW))
        drift, proxy = (means(programs.evaluate(state.params, state.step, batch)) for batch in (on, off))
        return {
            "gold": float(data.gold(answers.tokens).mean()), "kl": max(float(ratios.mean()), 0.0), "proxy": proxy["rewards/margins"],
            "accuracy": proxy["rewards/accuracies"], "chosen_drift": drift["logps/chosen_drift"],
            "length": float(answers.mask.sum(axis=-1).mean()),
        }  # fmt: skip

    state = init_state(jax.tree.map(jnp.copy, initial.params), programs.optimizer, jax.random.key(seed))
    values = [measured(state)]
    for at in range(0, c.steps, c.every):
        state = trained(programs.step, state, stream.batch, range(at, at + c.every))
        values.append(measured(state))
    return Trajectory(np.arange(len(values)) * c.every, {name: np.array([v[name] for v in values]) for name in values[0]})


def with_reference(programs: Programs, params: Params, pairs: Examples) -> Examples:
    """The pairs with the initial policy's log-probs as `ref_logps`, which every step reads."""
    whole = evaluation_batch(pairs, 0, len(pairs), padded_length(pairs))
    return dataclasses.replace(pairs, token_fields={"ref_logps": np.asarray(programs.logps(params, whole))[whole["mask"]]})
