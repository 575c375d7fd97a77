"""Quark: its quantiles and pool by hand, the reference behind the prompt without the reward token, and what the method promises."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from jax.tree_util import Partial

from alignax.cli import main
from alignax.config import load_experiment
from alignax.experience import Stateful, advance, first_carry, quark_pool, unconditioned
from alignax.experience.quark import draw, quantiles, without
from alignax.losses import Loss, kl_pi_ref, kl_ref_pi, quark
from alignax.models import hf, transformer
from alignax.run.checkpoint import Checkpoints
from alignax.run.prepare import prepare
from alignax.run.state import abstract_state
from alignax.train import init_state, make_step
from alignax.types import Batch, Outputs, Params, TrainState

# --- the quantiles ---


QUANTILES, DRAW = jax.jit(quantiles, static_argnums=2), jax.jit(draw, static_argnums=(2, 3))


def labels(rewards, entered: int | None = None, K: int = 5) -> np.ndarray:
    """The quantile labels of rewards that fill the pool, or only its first `entered` places."""
    return np.asarray(QUANTILES(jnp.asarray(rewards, jnp.float32), jnp.int32(len(rewards) if entered is None else entered), K))


@pytest.mark.parametrize("n, sizes", [(13, [2, 2, 2, 2, 5]), (10, [2, 2, 2, 2, 2]), (4, [1, 1, 1, 1, 0]), (5, [1, 1, 1, 1, 1])])
def test_quantiles_are_equal_and_the_worst_has_the_rest(n, sizes):
    rewards = np.random.default_rng(n).normal(size=20)
    found = labels(rewards, entered=n)[:n]
    np.testing.assert_array_equal(np.bincount(found, minlength=5), sizes)
    assert (np.diff(found[np.argsort(-rewards[:n])]) >= 0).all()  # labels rise as rewards fall
    np.testing.assert_array_equal(labels(rewards[:n]), found)  # a full pool is as one with room


def test_of_equal_rewards_the_older_ranks_first():
    np.testing.assert_array_equal(labels(np.zeros(6), K=3), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(labels([0, 1, 0, 1, 0, 1], K=3), [1, 0, 2, 0, 2, 1])
    # Eight have come to six places: the first two places hold the newest.
    np.testing.assert_array_equal(labels(np.zeros(6), entered=8, K=3), [2, 2, 0, 0, 1, 1])


def test_draws_are_uniform_and_none_comes_twice_before_all_have():
    key = jax.random.key(0)
    np.testing.assert_array_equal(np.sort(DRAW(key, jnp.int32(5), 8, 5)), np.arange(5))
    counts = np.bincount(DRAW(key, jnp.int32(5), 8, 12), minlength=8)
    assert counts.sum() == 12 and set(counts[:5]) == {2, 3} and not counts[5:].any()
    many = jax.jit(jax.vmap(lambda key: draw(key, jnp.int32(9), 8, 2)))(jax.random.split(key, 4000))
    np.testing.assert_allclose(np.bincount(np.asarray(many).ravel()) / 8000, 1 / 8, atol=0.015)  # 4 standard deviations


# --- the pool ---

TOKENS = (90, 91, 92)  # best first
POOL = quark_pool(TOKENS, capacity=8, length=7)
ADVANCE = jax.jit(lambda *given: advance(*given)[:2])


def rollout(rewards, first: int = 0) -> Batch:
    """Rows [4, 1, 6] of <s>, the best token, a prompt of one and a completion of two; the prompts count from `first`."""
    row = lambda i: [1, TOKENS[0], 10 + i, 30 + i, 50 + i, 0]
    tokens = np.array([[row(first + i)] for i in range(4)], np.int32)
    t = np.broadcast_to(np.arange(6), tokens.shape)
    return {"tokens": tokens, "mask": t < 5, "completion_mask": (t > 2) & (t < 5), "rewards": np.array(rewards, np.float32)[:, None]}


def by_prompt(batch: Batch) -> dict[int, tuple[int, float]]:
    """Prompt -> its reward token and its reward, of the rows that are trained on."""
    rows = zip(batch["tokens"][:, 0], batch["rewards"][:, 0], batch["completion_mask"][:, 0], strict=True)
    return {int(row[2]) - 10: (int(row[1]), float(reward)) for row, reward, real in rows if real.any()}


def after(*rollouts: Batch) -> tuple[dict, Batch]:
    """The pool after them, and the last batch, on the host."""
    carry, batch = first_carry(POOL), {}
    for data in rollouts:
        carry, batch = ADVANCE(POOL, carry, data)
    return jax.device_get((carry["quark_pool"], batch))


def test_a_row_is_drawn_with_the_token_of_its_quantile():
    _, batch = after(rollout([0.5, 0.0, 1.0, -0.5]))
    assert by_prompt(batch) == {0: (91, 0.5), 1: (92, 0.0), 2: (90, 1.0), 3: (92, -0.5)}
    np.testing.assert_array_equal(batch["group_rewards"][:, 0], [0.5, 0.0, 1.0, -0.5])  # what was sampled
    np.testing.assert_array_equal(batch["quantiles"][:, 0], batch["tokens"][:, 0, 1] - 90)
    for i, row in enumerate(batch["tokens"][:, 0]):  # all else is as it was sampled, and the reference does not see the token
        p = row[2] - 10
        np.testing.assert_array_equal(row, [1, row[1], 10 + p, 30 + p, 50 + p, 0])
        np.testing.assert_array_equal(batch["ref_tokens"][i, 0], [0, 1, 10 + p, 30 + p, 50 + p, 0])
        np.testing.assert_array_equal(batch["ref_mask"][i, 0], [0, 1, 1, 1, 1, 0])
    assert set(batch) == {"tokens", "mask", "completion_mask", "ref_tokens", "ref_mask", "rewards", "quantiles", "group_rewards"}


def test_the_whole_pool_is_sorted_again():
    """A second rollout is better: what was best is in the middle, and responses of both are drawn."""
    pool, batch = after(rollout([0.5, 0.0, 1.0, -0.5]), rollout([2.0, 4.0, 3.0, 5.0], first=4))
    assert pool["entered"] == 8 and pool["draws"] == 2
    np.testing.assert_array_equal(labels(pool["rewards"], K=3), [2, 2, 2, 2, 1, 0, 1, 0])
    wanted = {0: 92, 1: 92, 2: 92, 3: 92, 4: 91, 5: 90, 6: 91, 7: 90}
    drawn = by_prompt(batch)
    assert len(drawn) == 4 and {p: token for p, (token, _) in drawn.items()} == {p: wanted[p] for p in drawn}


def test_a_full_pool_forgets_its_oldest():
    pool, _ = after(*(rollout(np.full(4, -float(first)), first) for first in (0, 4, 8)))
    assert sorted(pool["tokens"][:, 2] - 10) == [4, 5, 6, 7, 8, 9, 10, 11]


def test_what_has_no_reward_no_completion_or_no_token_does_not_enter():
    data = rollout([1.0, np.nan, 3.0, 4.0])
    data["completion_mask"][2] = False  # a padding row
    data["tokens"][3, 0, [1, 4]] = 60, TOKENS[0]  # its reward token is no part of its prompt
    pool, batch = after(data)
    assert pool["entered"] == 1
    np.testing.assert_array_equal(batch["completion_mask"].any((1, 2)), [True, False, False, False])
    assert by_prompt(batch) == {0: (90, 1.0)}  # one of three: quantiles have at least one
    np.testing.assert_array_equal(np.isfinite(batch["group_rewards"][:, 0]), [True, False, False, False])


def test_draws_differ_and_a_stored_pool_draws_the_same():
    data = rollout(np.arange(4.0))
    carry, _ = ADVANCE(POOL, first_carry(POOL), data)
    stored = jax.tree.map(np.asarray, carry)
    carry, one = ADVANCE(POOL, carry, rollout(np.arange(4.0), first=4))
    _, two = ADVANCE(POOL, carry, data)
    assert set(by_prompt(one)) != set(by_prompt(two))
    _, again = ADVANCE(POOL, stored, rollout(np.arange(4.0), first=4))
    jax.tree.map(np.testing.assert_array_equal, again, one)


def test_impossible_pools_are_refused():
    for tokens in ((90,), (90, 91, 90)):
        with pytest.raises(ValueError, match="two or more different ids, the best first"):
            quark_pool(tokens, 8, 8)
    batch = {name: jnp.asarray(x) for name, x in rollout(np.arange(4.0)).items()}
    for sizes, message in (
        ({"capacity": 2, "length": 6}, "holds 2 responses but a rollout has 4"),
        ({"capacity": 8, "length": 5}, "length=6"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(quark_pool(TOKENS, **sizes), batch)
    del batch["rewards"]
    with pytest.raises(ValueError, match='no "rewards"'):
        jax.eval_shape(POOL, batch)
    for bad in ({"beta": -1.0}, {"entropy": -0.1}):
        with pytest.raises(ValueError, match="it must be a weight, in"):
            quark(**bad)


# --- the reference, behind the prompt without the token ---


def test_a_row_without_its_token_has_its_padding_in_front():
    tokens = jnp.array([[1, 7, 5, 6], [0, 1, 7, 5], [7, 4, 5, 6], [1, 4, 5, 6]])
    mask = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    found, real = without(tokens == 7, tokens, mask)
    np.testing.assert_array_equal(real, [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(jnp.where(real, found, -1), [[-1, 1, 5, 6], [-1, -1, 1, 5], [-1, 4, 5, 6], [1, 4, 5, 6]])


@pytest.mark.slow
def test_the_teacher_reads_the_shortened_prompt_exactly():
    """Both KLs in every token, against distributions of whole rows: the policy's with the token, the reference's cut out by hand.

    With a window, in which a masked token would still take a place, and six tokens that are only read: they have no probability.
    """
    model = dataclasses.replace(tiny.MODEL, num_hidden_layers=1, sliding_windows=(4,), predicted_tokens=90)
    params = tiny.params(model)
    other = jax.tree.map(lambda x: 1.5 * x, params)
    batch = tiny.batch(B=3, N=1, T=14, V=90)
    batch["tokens"] = batch["tokens"].at[:, :, 1].set(91)  # behind the first token of each prompt
    row = {name: x[:, 0] for name, x in batch.items()}
    cut, real = without(jnp.broadcast_to(jnp.arange(14) == 1, (3, 14)), row["tokens"], row["mask"])
    taught = batch | {"ref_tokens": cut[:, None], "ref_mask": real[:, None]}
    forward = jax.jit(lambda params, teacher, batch: transformer.forward(model, teacher=(model, teacher))(params, batch))
    out = forward(params, other, taught)

    @jax.jit
    def distribution(p, tokens, mask):
        hidden, _ = transformer.Decoder(model).apply({"params": p}, tokens, mask)
        return jax.nn.log_softmax((hidden[:, :-1] @ p["embed"].T)[..., :90])

    pi = np.asarray(distribution(params, row["tokens"], row["mask"]))  # [3, 13, 90]
    short = (np.delete(row[name], 1, axis=1) for name in ("tokens", "mask"))
    ref = np.pad(distribution(other, *short), ((0, 0), (1, 0), (0, 0)))  # its places are one to the left
    scored = np.asarray(row["completion_mask"])[:, 1:]
    of = lambda x: np.asarray(x)[:, 0, 1:][scored]
    for found, p, q in ((out.ref_kl, ref, pi), (out.policy_kl, pi, ref)):
        expected = (np.exp(p) * (p - q)).sum(-1)[scored]
        np.testing.assert_allclose(of(found), expected, atol=1e-5)
        assert expected.min() > 1e-3
    picked = pi[scored, np.asarray(row["tokens"])[:, 1:][scored]]
    np.testing.assert_allclose(of(out.logps), picked, atol=1e-5)
    seen = forward(params, other, taught | {"ref_tokens": batch["tokens"], "ref_mask": batch["mask"]})  # with the token it is another
    assert np.abs(of(seen.ref_kl) - of(out.ref_kl)).max() > 1e-3


def test_a_reward_model_reads_the_prompt_without_the_token():
    """The model reads its score at place 1, in the prompt; the batch keeps its tokens and its other fields."""
    batch = {name: jnp.asarray(x) for name, x in rollout(np.arange(4.0)).items()}
    first = lambda batch: batch | {"scores": jnp.take_along_axis(batch["tokens"], batch["mask"].argmax(-1)[..., None] + 1, axis=-1)}
    found = unconditioned(TOKENS, Partial(first))(batch)
    np.testing.assert_array_equal(first(batch)["scores"][:, 0, 0], [90] * 4)
    np.testing.assert_array_equal(found["scores"][:, 0, 0], [10, 11, 12, 13])
    jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in batch}, batch)


# --- the loss ---


def test_the_loss_and_both_kls_by_hand():
    """One token: pi = (.6, .3, .1), ref = (.2, .3, .5); the response is the first token."""
    pi, ref = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    batch = {"completion_mask": jnp.array([[[False, True]]])}
    place = lambda x: jnp.array([0.0, 1.0])[None, None] * x

    def outputs(z: jax.Array) -> Outputs:
        q, p = jnp.log(ref), jax.nn.log_softmax(z)
        kls = [(jnp.exp(a) * (a - b)).sum() for a, b in ((q, p), (p, q))]
        return Outputs(place(p[0]), place(-(jnp.exp(p) * p).sum()), None, *map(place, kls))

    entropy, kl, reverse = -(pi * np.log(pi)).sum(), (ref * np.log(ref / pi)).sum(), (pi * np.log(pi / ref)).sum()
    assert kl == pytest.approx(0.2 * np.log(1 / 3) + 0.5 * np.log(5)) and reverse == pytest.approx(0.6 * np.log(3) - 0.1 * np.log(5))
    slopes = {kl_ref_pi: pi - ref, kl_pi_ref: pi * (np.log(pi / ref) - reverse)}
    for make, divergence in ((kl_ref_pi, kl), (kl_pi_ref, reverse)):
        objective = quark(0.4, 0.2, make)
        f = lambda z, objective=objective: objective(outputs(z), batch, objective.normalised(batch))
        (value, metrics), slope = jax.jit(jax.value_and_grad(f, has_aux=True))(jnp.log(jnp.asarray(pi, jnp.float32)))
        np.testing.assert_allclose(value, -np.log(0.6) + 0.4 * divergence - 0.2 * entropy, rtol=1e-5)
        np.testing.assert_allclose(slope, pi - np.eye(3)[0] + 0.4 * slopes[make] + 0.2 * pi * (np.log(pi) + entropy), atol=1e-6)
        np.testing.assert_allclose(metrics["kl/ref_pi" if make is kl_ref_pi else "kl/pi_ref"], divergence, rtol=1e-5)


# --- what the method promises ---

K, V, ROUNDS, SAMPLES = 5, 60, 5, 400
# (beta of KL(ref || pi), beta of KL(pi || ref)) -> E[r | best] and KL(best || ref) at the end, of a separate program in numpy.
RUNS = {
    (0.0, 0.0): (2.07, 3.66), (0.05, 0.0): (1.97, 3.31), (0.5, 0.0): (1.35, 1.85), (2.0, 0.0): (0.55, 0.49),
    (0.0, 0.05): (2.07, 3.66), (0.0, 0.5): (1.03, 1.27), (0.0, 2.0): (0.33, 0.22),
}  # fmt: skip


def table_apply(params: Params, batch: Batch) -> Outputs:
    """A policy that sees the reward token alone, one row of logits for each; the reference is a row behind no token."""
    k, y = batch["tokens"][:, :, 0] - V, batch["tokens"][:, :, 1]
    p = jax.nn.log_softmax(params["policy"])[k]  # [B, N, V]
    q = jax.lax.stop_gradient(jax.nn.log_softmax(params["reference"]))[None, None]
    behind = lambda x: jnp.pad(x[..., None], ((0, 0), (0, 0), (1, 0)))
    kl = lambda a, b: behind((jnp.exp(a) * (a - b)).sum(-1))
    logps = jnp.take_along_axis(p, y[..., None], axis=-1)[..., 0]
    return Outputs(behind(logps), behind(-(jnp.exp(p) * p).sum(-1)), None, kl(q, p), kl(p, q))


def explored(key: jax.Array, logits: jax.Array, rewards: jax.Array) -> Batch:
    """A rollout of the policy behind the best token."""
    y = jax.random.categorical(key, logits[0], shape=(SAMPLES, 1, 1))
    tokens = jnp.concatenate([jnp.full_like(y, V), y], axis=-1)
    mask = jnp.ones(tokens.shape, bool)
    return {"tokens": tokens, "mask": mask, "completion_mask": mask.at[..., 0].set(False), "rewards": rewards[y[..., 0]]}


def world(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the reference, and rewards."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=V).astype(np.float32), rng.normal(size=V).astype(np.float32)


def weighed(forward: jax.Array, reverse: jax.Array) -> Loss:
    """Quark's loss with both KLs, each with a weight of its own, without the entropy."""
    weights = {"quark": 1.0, "kl_ref_pi": forward, "kl_pi_ref": reverse, "entropy_bonus": 0.0}
    return Loss(tuple((weights[term.name], term) for _, term in (quark() + kl_pi_ref()).terms))


@pytest.fixture(scope="module")
def trained() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over 3 seeds for each of RUNS: E[r | best] by round [6], E[r | k] at the end [5], KL(best || ref) at the end."""
    experience: Stateful = quark_pool(range(V, V + K), capacity=ROUNDS * SAMPLES, length=2)
    optimizer = optax.adam(0.05)

    def run(seed, beta, base, rewards):
        step = make_step(table_apply, weighed(*beta), optimizer)
        state = init_state({"policy": jnp.tile(base[None], (K, 1)), "reference": base}, optimizer, jax.random.key(seed))

        def turn(carry, round):
            state, pool = carry
            key = jax.random.fold_in(state.key, round)
            best = jax.nn.softmax(state.params["policy"][0]) @ rewards
            pool, batch, _ = advance(experience, pool, explored(key, state.params["policy"], rewards))

            def epoch(state, key):
                order = jax.random.permutation(key, SAMPLES).reshape(4, -1)
                parts = jax.tree.map(lambda x: x[order], batch)
                return jax.lax.scan(lambda state, part: (step(state, part)[0], None), state, parts)[0], None

            state, _ = jax.lax.scan(epoch, state, jax.random.split(key, 40))
            return (state, pool), best

        (state, _), history = jax.lax.scan(turn, (state, first_carry(experience)), jnp.arange(ROUNDS))
        p = jax.nn.softmax(state.params["policy"])
        distance = (p[0] * (jnp.log(p[0]) - jax.nn.log_softmax(base))).sum()
        return jnp.append(history, p[0] @ rewards), p @ rewards, distance

    worlds = (jnp.asarray(np.stack(x)) for x in zip(*map(world, range(3)), strict=True))
    every = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None, 0, 0)), in_axes=(None, 0, None, None)))
    best, by_token, distance = (np.asarray(x).mean(1) for x in every(jnp.arange(3), jnp.asarray(list(RUNS)), *worlds))
    return best, by_token, distance


@pytest.mark.slow
def test_the_policy_becomes_better_behind_the_best_token_and_is_ranked_behind_the_others(trained):
    best, by_token, _ = trained
    assert (np.diff(best[:, :3], axis=1) > 0).all() and (best[:, 3] > best[:, 2] - 0.01).all()
    assert (np.diff(by_token, axis=1) <= 0.05).all()
    assert (by_token[:, 0] > by_token[:, -1] + 0.5).all()  # what the token says is heeded


@pytest.mark.slow
def test_the_kl_holds_and_its_direction_matters(trained):
    best, _, distance = trained
    for side in ([0, 1, 2, 3], [0, 4, 5, 6]):  # by beta
        assert (np.diff(distance[side]) < 0.01).all() and distance[side[0]] > distance[side[-1]] + 3
    np.testing.assert_allclose(np.stack([best[:, -1], distance], axis=1), list(RUNS.values()), atol=0.1)
    assert (np.abs(distance[1:4] - distance[4:]) > 0.15).all()


# --- a run ---


def quark_run(folder: Path, model: Path, sentiment: Path) -> list[str]:
    """The command line of eight steps on two rollouts, with a pool that forgets."""
    fields = {
        "method": "quark", "workdir": folder / "run", "model.path": model, "sentiment": sentiment, "steps": 8, "batch_size": 8, "pool": 64,
        "rollout.samples": 2, "rollout.max_new_tokens": 6, "rollout.minibatches": 2, "rollout.epochs": 2, "eval.every": 4,
        "eval.sample_prompts": 4, "eval.max_new_tokens": 6, "checkpoint.every": 4, "log.tensorboard": False, "model.remat": "full",
    }  # fmt: skip
    return runs.arguments(fields, "steer_stories")


def ended(folder: Path) -> TrainState:
    """The state that a run ended with, the pool in it, on the host."""
    run = prepare(load_experiment(folder / "run" / "config.py"))
    checkpoints = Checkpoints(folder / "run")
    state = checkpoints.restore(checkpoints.latest(), abstract_state(run))
    checkpoints.close()
    return jax.tree.map(np.asarray, dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.mark.long
@pytest.mark.slow
def test_a_run_explores_behind_the_best_token_and_goes_on_bit_for_bit(tmp_path):
    model, sentiment = tiny.folder(tmp_path / "model"), tmp_path / "sentiment.jsonl"
    rows = [{"text": word, "label": i % 2} for i, word in enumerate("abcdefgh")] * 8
    sentiment.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(quark_run(one, model, sentiment)) == 0
    log = [json.loads(line) for line in (one / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in log if "loss" in row]
    assert [row["step"] for row in train] == [4, 8] and all(row["scored_rate"] == 1 and row["sampler_gap"] < 1e-5 for row in train)
    assert all(row["loss/kl_ref_pi"] > 0 and row["loss/quark"] > 0 and row["skipped"] == 0 for row in train)
    pool = ended(one).carry["quark_pool"]
    assert pool["entered"] == 64 and pool["draws"] == 2
    source = hf.open_folder(one / "run_model")
    assert source.config.predicted_tokens == 95 and pool["tokens"].shape == (64, 128)
    assert (pool["tokens"][:, 1] == 95).all() and pool["tokens"][:, 2:].max() < 95  # behind <s> and the best token, and no other is said
    process = runs.begin(quark_run(two, model, sentiment), runs.environment(8))
    assert runs.stop_when(process, lambda: (two / "run" / "checkpoints" / "4").is_dir(), runs.signal.SIGKILL)
    process.communicate()
    assert main(quark_run(two, model, sentiment)) == 0
    jax.tree.map(np.testing.assert_array_equal, ended(two), ended(one))
