"""Every loss, trained for a few steps: the trajectory is the same however the batch is split, laid out, padded, ordered or interrupted.

A program on one device is compared with one that has all at once, parts, padding and every axis of the mesh; the slow and long tests have
each by itself. What an experience writes (ranks, means, KTO's mismatched KL) is computed within, from the policy as it stands at each step.
Packing is one more way to split a batch, of the step and of the frozen models.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import runs
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from test_losses import LOSSES, SAMPLED, UNPAIRED

from alignax import losses
from alignax.experience import (
    chain,
    chi2_estimate,
    gae,
    group_relative,
    kl_reward,
    leave_one_out,
    logps,
    low_probability_tokens,
    matched_margins,
    matched_ratios,
    mismatched_kl,
    reward_shift,
    reward_target,
    running_baseline,
    running_log_z,
    whiten_advantages,
    whiten_rewards,
)
from alignax.losses import Loss
from alignax.mesh import batch_sharding, make_mesh
from alignax.packing import Packing, part_by_part
from alignax.train import init_state, make_step
from alignax.types import Batch, Model, Outputs, Params, TrainState

B, STEPS = 16, 3
OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)
TEACHER = tiny.plain_params(seed=1)
OLD = functools.partial(logps, "old_logps")
SAMPLER = jax.tree.map(lambda x, y: x + 0.05 * y, TEACHER, tiny.plain_params(seed=3))  # the policy that wrote the responses, and its critic


def rewarded(batch: Batch) -> Batch:
    """The margin is how much better the first response is."""
    return batch | {"rewards": jnp.stack([batch["margin"], -batch["margin"]], axis=1)}


def apply(params: Params, batch: Batch) -> Outputs:
    """The plain model with every statistic that a loss may read; a response's score is read off its last token."""
    return tiny.plain_apply(params, batch, TEACHER)


def critic(batch: Batch) -> Batch:
    """The values that the sampler's critic has, and log-probs of it as if without its noise."""
    return batch | {"values": apply(SAMPLER, batch).values, "proxy_logps": 0.9 * batch["old_logps"]}


def rollout(*advantages: Callable[[Batch], Batch]) -> Callable:
    """A rollout of an old policy: log-probs, rewards with their KL, values, and the advantages from them."""
    sampled = (logps("old_logps", Model(apply, SAMPLER)), logps("sampled_logps", Model(apply, TEACHER)), critic, kl_reward(0.1))
    return lambda policy, reference: chain(*sampled, *advantages, low_probability_tokens(0.3), chi2_estimate())


BY_TOKEN, BY_GROUP = rollout(whiten_rewards(), gae(), whiten_advantages()), rollout(group_relative())
FURTHER = {  # what a loss asks for beside `ref_logps`
    "aot": lambda policy, reference: chain(OLD(policy), matched_margins()),
    "aot_unpaired": lambda policy, reference: chain(OLD(policy), matched_ratios()),
    "bco": lambda policy, reference: chain(OLD(policy), reward_shift()),
    "kto": mismatched_kl,
    **dict.fromkeys(SAMPLED, BY_TOKEN),
    **dict.fromkeys(("grpo", "grpo_token_sum", "gspo", "gmpo", "sapo", "finished"), BY_GROUP),
    "rloo": rollout(leave_one_out()),
    "fdpg": lambda policy, reference: chain(
        OLD(policy),
        logps("sampled_logps", reference),
        Partial(rewarded),
        reward_target(1.0),
        running_log_z(),
        running_baseline(losses.js_pi_p),
    ),
}


def batches(single: bool) -> list[dict[str, np.ndarray]]:
    """One a step: pairs with a margin, and rewards as if they were a group, or single responses with a label; attributes, some missing."""
    made = []
    for seed in range(STEPS):
        batch = {k: np.asarray(x) for k, x in tiny.batch(B, 1 if single else 2, seed=seed).items()}
        rng = np.random.default_rng(seed)
        group = {"margin": rng.normal(size=B).astype(np.float32), "rewards": rng.normal(size=(B, 2)).astype(np.float32)}
        group["truncated"] = rng.random((B, 2)) < 0.2
        made.append(batch | ({"labels": rng.random((B, 1)) < 0.5} if single else group))
        attributes = rng.normal(size=(*batch["tokens"].shape[:2], 1))
        made[-1]["attributes"] = np.where(rng.random(attributes.shape) < 0.4, np.nan, attributes).astype(np.float32)
    return made


def padded(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same rows among eight of padding, three positions further right in rows that are seven longer."""
    places = np.sort(np.random.default_rng(7).permutation(B + 8)[:B])
    wider = lambda x: np.pad(x, ((0, 0), (0, 0), (3, 4))) if x.shape == batch["tokens"].shape else x
    spread = lambda x: np.zeros((B + 8, *x.shape[1:]), x.dtype)
    out = {k: spread(wider(x)) for k, x in batch.items()}
    for k, x in batch.items():
        out[k][places] = wider(x)
    return out


def reordered(batch: dict[str, np.ndarray], turn: bool) -> dict[str, np.ndarray]:
    """The same rows in another order; turned round where who stands next matters, as it does for mismatched pairs."""
    order = np.roll(np.arange(B), 5) if turn else np.random.default_rng(3).permutation(B)
    return {k: x[order] for k, x in batch.items()}


class Program(NamedTuple):
    """A jitted `advance(state, reference, batch) -> (state, metrics)`, and how the state begins."""

    advance: Callable
    begin: Callable[[], TrainState]


def program(name: str, microbatches: int = 1, sizes: tuple[int, int, int] | None = None, packed: bool = False) -> Program:
    """The experience that the loss asks for, then the step; on a mesh, parameters lie over fsdp and tensor.

    Packed parts are as small as they may be: they have the positions of one padded example.
    """
    mesh = None if sizes is None else make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    packing = Packing(1, mesh, block=8) if packed else None
    step, forward = make_step(apply, LOSSES[name], OPTIMIZER, microbatches, packing=packing), part_by_part(apply, packing)

    def advance(state, reference, batch):
        teacher = Model(forward, reference)
        further = FURTHER.get(name, lambda *models: chain())(Model(forward, state.params), teacher)
        state, metrics = step(state, chain(logps("ref_logps", teacher), further)(batch))
        assert ("packed_positions" in metrics) == packed
        return state, metrics

    if mesh is None:
        return Program(jax.jit(advance), begin)
    specs = {2: P("fsdp", "tensor"), 1: P("tensor"), 0: P()}
    laid = jax.tree.map(lambda x: NamedSharding(mesh, specs[x.ndim]), begin())
    compiled = jax.jit(advance, in_shardings=(laid, laid.params, batch_sharding(mesh)), out_shardings=(laid, None))
    return Program(compiled, lambda: jax.device_put(begin(), laid))


def begin() -> TrainState:
    """The policy starts beside its reference."""
    params = jax.tree.map(lambda x, y: x + 0.1 * y, TEACHER, tiny.plain_params(seed=2))
    return init_state(params, OPTIMIZER, jax.random.key(0))


def trajectory(program: Program, data: list[dict[str, np.ndarray]], between: Callable = lambda state: state) -> tuple:
    """Losses of every step, and the parameters at the end."""
    state, seen = program.begin(), []
    for batch in data:
        state, metrics = program.advance(state, TEACHER, batch)
        state = between(state)
        seen.append({k: float(x) for k, x in metrics.items() if k.startswith(("loss", "rewards/", "grad_norm"))})
    return seen, jax.tree.map(np.asarray, state.params)


@functools.cache
def plain(name: str) -> tuple:
    """The trajectory on one device in one part, and its program."""
    one, data = program(name), batches(name in UNPAIRED)
    return one, data, trajectory(one, data)


def assert_same(found: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    (seen, params), (wanted, wanted_params) = found, expected
    for one, other in zip(seen, wanted, strict=True):
        assert one.keys() == other.keys()
        for k in one:
            np.testing.assert_allclose(one[k], other[k], rtol=tolerance, atol=tolerance, err_msg=k)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        y = functools.reduce(lambda tree, key: tree[key.key], path, wanted_params)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


EVERYDAY = (  # one of each kind
    "summed_sft", "rpo_token_mean", "kto", "ppo_critic", "fdpg",
)  # fmt: skip


SLOW = (
    "bco",
    "tdpo2",
    "bradley_terry",
    "dpo",
    "ipo_mean",
    "orpo",
    "f_dpo_alpha",
    "aot",
    "grpo",
    "gspo",
    "importance_weighted",
    "gkd",
    "quark",
    "attribute_regression",
)


def named(everyday: Sequence[str], slow: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrises a test by every loss: those of the everyday, of the slow and, all others, of the long tests."""
    return pytest.mark.parametrize("name", runs.by_turn(LOSSES, everyday, slow))


everyday_and_long = named(EVERYDAY, SLOW[:3])


def test_every_public_loss_is_here():
    functions = {name: x for name, x in vars(losses).items() if inspect.isfunction(x)}
    made = {name for name, x in functions.items() if inspect.signature(x).return_annotation is Loss}
    made -= {"make_loss", "observe", "at_step", "pairwise"}
    assert len(made) > 30
    assert not {name for name in made if not any(row == name or row.startswith(name + "_") for row in LOSSES)}


@everyday_and_long
def test_the_policy_moves(name):
    """The comparisons below mean something: three steps change the parameters by far more than the tolerance."""
    _, _, (seen, params) = plain(name)
    moved = max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(begin().params), strict=True))
    assert moved > 1e-3 and all(np.isfinite(list(metrics.values())).all() for metrics in seen)


ALL = {"microbatches": 2, "sizes": (2, 2, 2)}
ALONE = {"parts": {"microbatches": 4}, "data": {"sizes": (8, 1, 1)}, "fsdp": {"sizes": (1, 8, 1)}, "tensor": {"sizes": (1, 1, 8)}}


@everyday_and_long
def test_parts_padding_and_mesh_change_nothing(name):
    """Two microbatches on all axes of the mesh, padding rows among the others, and longer rows that begin further right."""
    _, data, expected = plain(name)
    assert_same(trajectory(program(name, **ALL), [padded(batch) for batch in data]), expected)


@named(("rpo_token_mean", "kto", "ppo_critic"), (*EVERYDAY, *SLOW))
def test_packing_padding_and_mesh_change_nothing(name):
    """Packed parts on all axes of the mesh, of padded and longer rows as above; there are several of each shard, and no padding in them."""
    _, data, expected = plain(name)
    assert_same(trajectory(program(name, sizes=(2, 2, 2), packed=True), [padded(batch) for batch in data]), expected)


@pytest.mark.slow
@named(("rpo_token_mean", "ppo_critic"))
@pytest.mark.parametrize("how", ALONE)
def test_each_alone_changes_nothing(name, how):
    _, data, expected = plain(name)
    assert_same(trajectory(program(name, **ALONE[how]), data), expected)


@everyday_and_long
def test_the_order_of_rows_changes_nothing(name):
    """KTO's KL is that of each prompt with the next row's response: it is the same when rows are turned round, not when shuffled."""
    one, data, expected = plain(name)
    assert_same(trajectory(one, [reordered(batch, name == "kto") for batch in data]), expected)


@everyday_and_long
def test_an_interruption_changes_nothing_at_all(name):
    """The state leaves the device after each step and comes back: bit for bit."""
    one, data, (seen, params) = plain(name)
    stored = lambda state: jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.array(np.array(x)), state)
    again, params_again = trajectory(one, data, stored)
    assert again == seen
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_a_checkpoint_between_steps_changes_nothing_at_all(tmp_path):
    one, data, (seen, params) = plain("rpo")
    count = iter(range(STEPS))

    def stored(state):
        tree = {"params": state.params, "opt_state": state.opt_state}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(place := tmp_path / str(next(count)), tree)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(place, jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        return state.replace(**back)

    again, params_again = trajectory(one, data, stored)
    assert again == seen
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
