"""Experience that reads the whole batch: mismatched responses for KTO, ranks for AOT, the shift of BCO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import losses
from alignax import mesh as meshes
from alignax.experience import (
    Stateful,
    advance,
    best_and_worst,
    chain,
    logps,
    matched_margins,
    matched_ratios,
    mismatched_kl,
    report,
    reward_shift,
)
from alignax.experience.chain import with_reported
from alignax.experience.kto import mismatched
from alignax.losses import sequence
from alignax.train import init_state, make_step
from alignax.types import Batch, Model

POLICY, REFERENCE = (Model(tiny.plain_apply, tiny.plain_params(seed=seed)) for seed in (0, 1))


def rows(*parts: tuple[list[int], list[int]], T: int = 8, left: int = 0) -> Batch:
    """Single responses from their prompts and completions, behind `left` padding tokens."""
    batch = {"tokens": np.zeros((len(parts), 1, T), np.int32), "mask": np.zeros((len(parts), 1, T), bool)}
    batch["completion_mask"] = batch["mask"].copy()
    for i, (prompt, completion) in enumerate(parts):
        n, m = len(prompt), len(completion)
        batch["tokens"][i, 0, left : left + n + m] = prompt + completion
        batch["mask"][i, 0, left : left + n + m] = True
        batch["completion_mask"][i, 0, left + n : left + n + m] = True
    return {name: jnp.asarray(x) for name, x in batch.items()}


def unpaired(B: int, seed: int = 0) -> Batch:
    batch = tiny.batch(B, N=1, seed=seed)
    batch["labels"] = jnp.asarray(np.random.default_rng(seed).random((B, 1)) < 0.5)
    return logps("ref_logps", REFERENCE)(batch)


def padding(batch: Batch, places: list[int]) -> Batch:
    index = np.array(places, int)
    return batch | {k: batch[k].at[index].set(False) for k in ("mask", "completion_mask")}


def without(batch: Batch, places: list[int]) -> Batch:
    return {k: jnp.delete(x, np.array(places, int), axis=0) for k, x in batch.items()}


def same(a: Batch, b: Batch) -> None:
    for name in ("tokens", "mask", "completion_mask"):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- KTO ---

A, B_, C = ([3], [10, 11]), ([4, 5, 6], [12]), ([7, 8], [13, 14, 15])


@pytest.mark.parametrize("left", [0, 1])
def test_a_prompt_gets_the_next_rows_completion(left):
    """An odd batch; the last row takes the first's. New rows stand at the left."""
    mixed, valid = mismatched(rows(A, B_, C, left=left))
    assert valid.all()
    same(mixed, rows(([3], [12]), ([4, 5, 6], [13, 14, 15]), ([7, 8], [10, 11])))


def test_padding_rows_are_skipped():
    batch = rows(A, ([9], [9]), B_, C, ([9], [9]))
    mixed, valid = mismatched(padding(batch, [1, 4]))
    assert valid.tolist() == [True, False, True, True, False]
    same(without(mixed, [1, 4]), rows(([3], [12]), ([4, 5, 6], [13, 14, 15]), ([7, 8], [10, 11])))
    assert not mixed["mask"][np.array([1, 4])].any()


def test_rows_that_are_no_mismatch_are_left_out():
    """Row 0 and 1 have one prompt, 2 and 3 one completion: what they would make is a row of the data."""
    _, valid = mismatched(rows(([3, 4], [10]), ([3, 4], [11, 12]), ([5], [13]), ([6], [13])))
    assert valid.tolist() == [False, True, False, True]


def test_one_row_has_no_mismatch():
    _, valid = mismatched(rows(A))
    assert not valid.any()
    batch = mismatched_kl(POLICY, REFERENCE)(rows(A))
    assert batch["kto_kl"].tolist() == [0.0]


def test_a_completion_is_cut_where_its_new_row_ends():
    mixed, valid = mismatched(rows(([3, 4, 5], [10]), ([6], [11, 12, 13, 14]), T=5))
    assert valid.all()
    same(mixed, rows(([3, 4, 5], [11, 12]), ([6], [10]), T=5))


def test_mismatched_responses_are_single():
    with pytest.raises(ValueError, match="takes single responses, but these examples have 2"):
        mismatched_kl(POLICY, REFERENCE)(tiny.batch(2))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [pytest.param(POLICY, marks=pytest.mark.slow, id="other"), pytest.param(REFERENCE, id="equal")])
def test_the_kl_is_the_mean_log_ratio_of_mismatches_and_never_below_0(policy):
    for seed in range(3):
        batch = unpaired(5, seed)
        mixed, _ = mismatched(batch)
        ratios = [policy.apply(policy.params, mixed).logps - REFERENCE.apply(REFERENCE.params, mixed).logps]
        mean = np.mean(np.array(sequence(ratios[0], mixed), np.float64))
        found = mismatched_kl(policy, REFERENCE)(batch)["kto_kl"]
        np.testing.assert_allclose(found, np.full(5, max(0.0, mean)), rtol=1e-5, atol=1e-6)
    reverse = mismatched_kl(REFERENCE, policy)(batch)["kto_kl"]
    assert float(reverse[0]) * float(found[0]) == 0.0  # of the two signs one is clamped


@pytest.mark.slow
def test_the_kl_is_that_of_the_global_batch():
    """The KL is equal on 8 devices, in 2 parts and under jit; models are arguments, so one program serves every policy."""
    batch = padding(unpaired(16), [2, 3, 11])
    mesh = meshes.make_mesh({"data": 8})
    sharded = {k: jax.device_put(x, meshes.batch_sharding(mesh)) for k, x in batch.items()}
    traced = []
    write = jax.jit(lambda make, batch: traced.append(1) or make(batch)["kto_kl"])
    expected = mismatched_kl(POLICY, REFERENCE)(without(batch, [2, 3, 11]))["kto_kl"][0]
    found = write(mismatched_kl(POLICY, REFERENCE, microbatches=2), sharded)
    np.testing.assert_allclose(found, np.full(16, expected), rtol=1e-5)
    other = write(mismatched_kl(REFERENCE._replace(params=POLICY.params), REFERENCE, microbatches=2), sharded)
    assert len(traced) == 1 and other[0] == found[0]


# --- ranks ---


def ranked(B: int, seed: int = 0) -> Batch:
    """Pairs of two models, with all that AOT and BCO read."""
    scored = chain(logps("ref_logps", REFERENCE), logps("old_logps", POLICY))
    return chain(matched_margins(), matched_ratios(), reward_shift())(scored(padding(tiny.batch(B, seed=seed), [1])))


def sorted_loss(name: str, params, batch: Batch) -> jax.Array:
    """AOT as its paper writes it, on a batch without padding: sorts, differentiated by machine."""
    policy = sequence(tiny.plain_apply(params, batch).logps, batch)
    ref = sequence(batch["ref_logps"], batch)
    x, y = ((p[:, 0] - p[:, 1]) for p in (policy, ref)) if name == "aot" else (policy - ref).T
    return -jax.nn.log_sigmoid(0.3 * (jnp.sort(x) - jnp.sort(y))).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.long_but(["aot", "aot_unpaired"], "aot_unpaired"))
def test_ranks_give_the_sorted_loss_and_its_gradient(name):
    """Loss and gradient are those of sorting, in 1 part and in 4, with a padding row in the batch."""
    batch = ranked(8)
    real = without(batch, [1])
    expected, grads = jax.value_and_grad(sorted_loss, argnums=1)(name, POLICY.params, real)
    optimizer = optax.sgd(1.0)
    for parts in (1, 4):
        step = jax.jit(make_step(tiny.plain_apply, getattr(losses, name)(0.3), optimizer, parts))
        state, metrics = step(init_state(POLICY.params, optimizer, jax.random.key(0)), batch)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert metrics["grad_norm"] > 1e-3
        step_taken = jax.tree.map(lambda a, b: a - b, POLICY.params, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), step_taken, grads)


def test_ranks_by_hand():
    """Policy margins 3, 1, 2 and a padding row; reference margins 10, 30, 20."""
    pad = lambda x: jnp.pad(jnp.asarray(x, jnp.float32)[..., None], ((0, 0), (0, 0), (1, 0)))
    mask = jnp.ones((4, 2, 2), bool).at[:, :, 0].set(False).at[3].set(False)
    old, ref = pad([[3, 0], [1, 0], [2, 0], [9, 0]]), pad([[10, 0], [30, 0], [20, 0], [-5, 0]])
    batch = {"completion_mask": mask, "old_logps": old, "ref_logps": ref}
    assert matched_margins()(batch)["aot_margins"][:3].tolist() == [30, 10, 20]
    swapped = batch | {"ref_logps": jnp.zeros_like(ref), "old_logps": pad([[3, -7], [1, -5], [2, -6], [9, 9]])}
    assert matched_ratios()(swapped)["aot_ratios"][:3].tolist() == [[-5, 1], [-7, 3], [-6, 2]]
    assert reward_shift()(swapped)["bco_shift"].tolist() == [-2.0] * 4


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match='no "old_logps".*logps\\("old_logps", policy\\)'):
        matched_margins()(tiny.with_reference(tiny.batch(2)))
    with pytest.raises(ValueError, match="these examples have 1 responses"):
        reward_shift()({"old_logps": jnp.zeros((2, 1, 3))} | unpaired(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("kto", marks=pytest.mark.slow), "apo_zero_unpaired"])
def test_unpaired_parts_equal_the_whole(name):
    batch = mismatched_kl(POLICY, REFERENCE)(padding(unpaired(8), [0, 5]))
    optimizer = optax.sgd(1.0)
    start = init_state(POLICY.params, optimizer, jax.random.key(0))
    steps = [jax.jit(make_step(tiny.plain_apply, getattr(losses, name)(), optimizer, parts)) for parts in (1, 4)]
    (one, metrics), (four, more) = (step(start, batch) for step in steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, four.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, more)
    ratio = sequence(tiny.plain_apply(POLICY.params, batch).logps - batch["ref_logps"], batch)[:, 0]
    kept = np.array(batch["labels"][:, 0] & batch["completion_mask"].any((1, 2)))
    assert 0 < kept.sum() < 6
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.1 * np.array(ratio)[kept].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "axes", "text"),
    [
        ("rewards", lambda x: x.sum(axis=(1, 2)), r"'rewards' of shape \(4,\); the shape must be \[B, N\], here \(4, 2\)"),
        ("rewards", lambda x: x.sum(axis=(1, 2))[:, None], r"'rewards' of shape \(4, 1\)"),  # jax would give it to the whole group
        ("advantages", lambda x: x.sum(axis=2), r"'advantages' of shape \(4, 2\); the shape must be \[B, N, T\], here \(4, 2, 24\)"),
    ],
)
def test_a_field_of_another_shape_is_named(name, axes, text):
    write = lambda batch: batch | {name: axes(batch["completion_mask"].astype(jnp.float32))}
    with pytest.raises(ValueError, match=text):
        advance(chain(write), {}, tiny.batch())


# --- reports ---


def counting(batch):
    return report(batch | {"old_logps": jnp.zeros(batch["mask"].shape)}, tokens_seen=batch["mask"].sum(), **{"share/x": 0.25})


def test_what_is_reported_is_no_field():
    """Reports pass nested chains, stateful functions, and functions that split and select all fields, jitted or not."""
    stateful = Stateful("mean", jnp.zeros(()), lambda carry, batch: (carry + 1, report(batch, before=carry)))
    experience = chain(chain(counting, logps("ref_logps", POLICY, 2)), best_and_worst(), stateful)
    batch = tiny.batch() | {"rewards": jnp.arange(8.0).reshape(4, 2)}
    carry, after, metrics = jax.jit(lambda carry, batch: advance(experience, carry, batch))({"mean": jnp.float32(3.0)}, batch)
    assert {name: float(x) for name, x in metrics.items()} == {"tokens_seen": float(batch["mask"].sum()), "share/x": 0.25, "before": 3.0}
    assert carry["mean"] == 4 and all(x.shape == () for x in metrics.values())
    assert after.keys() == batch.keys() | {"old_logps", "ref_logps", "group_rewards"}
    inside = lambda batch: chain(counting, logps("ref_logps", POLICY, 2))(batch) | {"x": jnp.zeros(4)}  # a function that calls another
    _, after, metrics = advance(chain(inside), {}, batch)
    assert metrics.keys() == {"tokens_seen", "share/x"} and "x" in after and not [name for name in after if name.startswith("reported")]


def test_members_report_each_their_own():
    every = jax.vmap(lambda k: advance(chain(lambda batch: report(batch, seed=k)), {}, tiny.batch())[2])(jnp.arange(3.0))
    assert every["seed"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("experience", "text"),
    [
        (
            lambda batch: report(batch, x=batch["mask"].sum(axis=-1)),
            r"report\(..\) is given 'x' of shape \(4, 2\); a metric must be a scalar",
        ),
        (chain(counting, counting), "two experience functions report 'share/x'"),
        (chain(counting, chain(counting)), "two experience functions report 'share/x'"),
    ],
)
def test_a_report_that_is_none_is_refused(experience, text):
    with pytest.raises(ValueError, match=text):
        advance(chain(experience), {}, tiny.batch())


def test_a_metric_that_the_run_has_itself_is_refused():
    assert with_reported({"loss": 1}, {"x": 2}) == {"loss": 1, "x": 2}
    with pytest.raises(ValueError, match="the experience reports 'loss', but the run itself has a metric of that name"):
        with_reported({"loss": 1}, {"loss": 2})
