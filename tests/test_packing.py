"""Packing: examples are dealt into parts and laid out behind one another; outputs and gradients are those of padded rows."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_statistics import SQUARED, TSALLIS
from test_models_transformer import config, init
from test_train import assert_metrics_near, assert_near

from alignax import mesh as meshes
from alignax.losses import bradley_terry, dpo, sft
from alignax.models import parameters, transformer
from alignax.models.lora import Lora
from alignax.models.rows import laid_out
from alignax.models.statistics import min_p
from alignax.packing import SLOTS, Form, Packed, Packing, PartByPart, Parts, deal, part_by_part, sizes
from alignax.reading import Noting
from alignax.rewards.ensembles import ensemble_apply
from alignax.rewards.members import AXES, over_members, stacked
from alignax.train import init_state, make_step
from alignax.types import Outputs, TrainState, rows

B, T, BLOCK = 8, 24, 16
LAYER = dataclasses.replace(tiny.MODEL, num_hidden_layers=1)
ONE = meshes.make_mesh({}, jax.devices()[:1])


def responses(N: int = 2, B: int = B, seed: int = 0) -> dict[str, jax.Array]:
    """Ragged rows whose responses share their prompt, with everything that stands in the way of packing.

    The first example and the last but one are padding, the second has responses of one token. In the third a response has another prompt.
    In the fourth they go on after a turn that is not scored. The fifth begins three positions further right, and of the sixth one row does.
    Some rows have a token behind their completion, as chat templates write them.
    """
    rng, t = np.random.default_rng(seed), np.arange(T)
    prompt, response, after = rng.integers(3, 8, (B, 1, 1)), rng.integers(1, 14, (B, N, 1)), rng.integers(0, 2, (B, N, 1))
    response[1], response[3] = 1, 9
    mask = np.broadcast_to(t < prompt + response + after, (B, N, T)).copy()
    tokens = np.where(t < prompt, rng.integers(3, 96, (B, 1, T)), rng.integers(3, 96, (B, N, T)))
    scored = mask & (t >= prompt) & (t < prompt + response)
    tokens[2, -1, 1] = 3 + tokens[2, -1, 1] % 90
    scored[3] &= (t < prompt[3] + 3) | (t >= prompt[3] + 6)
    mask[[0, -2]] = scored[[0, -2]] = False
    fields = {"tokens": np.where(mask, tokens, 0).astype(np.int32), "mask": mask, "completion_mask": scored}
    for x in fields.values():
        x[4], x[5, -1] = np.roll(x[4], 3, axis=-1), np.roll(x[5, -1], 3, axis=-1)
    return {name: jnp.asarray(x) for name, x in fields.items()}


measured = jax.jit(sizes, static_argnums=1)


def packed(batch: dict, shared: bool = True, shards: int = 2, block: int = BLOCK, context: int = 1) -> Packed:
    """The whole batch as one part: a packed row in each shard, the fullest of them with no unit of blocks too much."""
    fullest = int(np.asarray(measured(batch, shared)).reshape(shards, -1).sum(axis=1).max())
    unit = block * (2 * context if context > 1 else 1)
    return Packed(batch, Form(-(-fullest // unit) * unit, shards, shared, block, context=context))


# --- dealing ---


def first_fit(size: np.ndarray, P: int, most: int) -> list[list[int]]:
    """The parts of a shard, in plain Python."""
    parts: list[list[int]] = []
    for i in sorted(np.flatnonzero(size), key=lambda i: -size[i]):
        fitting = [part for part in parts if size[part].sum() + size[i] <= P and len(part) < most]
        (fitting[0] if fitting else parts.append([]) or parts[-1]).append(int(i))
    return parts


def parts_of(dealt: list[Parts]) -> list[list[list[int]]]:
    """The examples of each part that is computed and has any, of each shard."""
    used = [np.asarray(parts.index)[:, : int(parts.count)] for parts in dealt]
    of_shard = lambda s: [part for index in used for part in index[s] if part.min() < dealt[0].examples]
    return [[[int(i) for i in part if i < dealt[0].examples] for part in of_shard(s)] for s in range(dealt[0].form.shards)]


@functools.cache
def dealing(packing: Packing, microbatches: int) -> Callable:
    return jax.jit(lambda batch: [(parts.index, parts.count) for parts in deal(batch, packing, microbatches)])


def checked_deal(batch: dict, packing: Packing, microbatches: int = 1) -> list[Parts]:
    """The batch dealt, as first fit deals it: each real example is in one part of its own shard, and no part has more than P positions.

    The last part is cut into fewer than four quarters, if its examples fit into these on every shard.
    """
    P, S = packing.size(batch, microbatches), packing.shards(batch)
    form = lambda P: Form(P, S, packing.shared, packing.block, context=packing.context)
    found = dealing(packing, microbatches)(batch)
    quarter = P // 4 // packing.block * packing.block
    dealt = [Parts(index, count, len(batch["mask"]) // S, form(P), None) for (index, count), P in zip(found, (P, quarter), strict=False)]
    size, parts, most = np.asarray(measured(batch, packing.shared)).reshape(S, -1), parts_of(dealt), dealt[0].index.shape[2]
    expected = [first_fit(own, P, most) for own in size]
    count = max(map(len, expected))
    rests: list[list[list[int]]] = [[] for _ in expected]
    if len(dealt) == 2 and count:
        for s, shard in enumerate(expected):
            last = shard[-1] if len(shard) == count else []
            assert not last or size[s][last].sum() <= P
            rests[s] = first_fit(np.where(np.isin(np.arange(len(size[s])), last), size[s], 0), quarter, dealt[1].index.shape[2])
        largest = [max(size[s][shard[-1]]) if len(shard) == count else 0 for s, shard in enumerate(expected)]
        if max(map(len, rests)) < 4 and max(largest) <= quarter:
            expected = [shard[: count - 1] + rest for shard, rest in zip(expected, rests, strict=True)]
            assert dealt[0].count == count - 1 and dealt[1].count == max(map(len, rests))
        else:
            assert dealt[0].count == count and dealt[1].count == 0
    assert parts == expected
    assert sum(int(parts.computed) for parts in dealt) == sum(int(parts.count) * parts.form.positions * S for parts in dealt)
    for own, shard in zip(size, parts, strict=True):
        assert sorted(sum(shard, [])) == np.flatnonzero(own).tolist()
        assert all(own[part].sum() <= P for part in shard)
    return dealt


@functools.cache
def two_shards() -> meshes.Mesh:
    return meshes.make_mesh({"data": 2}, jax.devices()[:2])


@pytest.mark.parametrize("shared", runs.slow_but([True, False], True))
@pytest.mark.parametrize("N", runs.slow_but([1, 2, 4], 2))
def test_every_example_is_in_one_part_of_its_own_shard(N, shared):
    batch = responses(N)
    for positions, microbatches in ((1, 1), (100, 1), (10**6, 4)):
        for mesh in (None, two_shards()):
            packing = Packing(positions, mesh, shared, BLOCK)
            for one, other in zip(*(checked_deal(batch, packing, microbatches) for _ in range(2)), strict=True):
                np.testing.assert_array_equal(one.index, other.index)
    assert checked_deal(batch, Packing(1, None, shared, BLOCK))[0].count > 1
    assert sum(parts.count > 0 for parts in checked_deal(batch, Packing(10**6, None, shared, BLOCK))) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), *[st.integers(0, 17)] * 2), min_size=B, max_size=B), st.sampled_from([1, 64, 96]))
def test_examples_of_any_lengths_are_dealt_by_first_fit(lengths, positions):
    """Prompts and two responses of any lengths, none too: prompts are counted once."""
    t = np.arange(T)
    prompt, *ends = np.array(lengths).T
    mask = np.stack([t < (prompt * (end > 0) + end)[:, None] for end in ends], axis=1)
    batch: Any = {"tokens": np.ones_like(mask, np.int32), "mask": mask, "completion_mask": mask & (t >= prompt[:, None, None])}
    both = (np.array(ends) > 0).all(axis=0)
    np.testing.assert_array_equal(measured(batch, True), mask.sum((1, 2)) - prompt * both)
    np.testing.assert_array_equal(measured(batch, False), mask.sum((1, 2)))
    for shared in (True, False):
        checked_deal(batch, Packing(positions, None, shared, BLOCK))


def test_a_part_has_no_more_examples_than_slots():
    """Rows of one token in rows of 64 take many parts, since each has a place for 32 examples."""
    mask = jnp.zeros((100, 1, 64), bool).at[:, :, 0].set(True)
    batch = {"tokens": mask.astype(jnp.int32), "mask": mask, "completion_mask": mask}
    dealt = checked_deal(batch, Packing(1))
    assert dealt[0].form.positions == 64 and [len(part) for part in parts_of(dealt)[0]] == [SLOTS, SLOTS, SLOTS, 4]


def test_the_size_of_a_part_and_when_it_pays_by_hand():
    """A part holds whole blocks, one padded example, and no more than a padded microbatch."""
    shape = lambda B, N=2, T=24: {"mask": jnp.zeros((B, N, T), bool)}
    assert Packing(1).size(shape(8)) == 64 and Packing(1, block=16).size(shape(8)) == 48
    assert Packing(100).size(shape(8)) == 128 and Packing(1000).size(shape(8)) == 384
    assert [Packing(1000).size(shape(8), count) for count in (2, 4, 8)] == [192, 128, 64]
    assert Packing(1000, two_shards()).size(shape(8)) == 192 and Packing(1000, two_shards()).size(shape(8), 4) == 64
    assert Packing(1000, two_shards()).shards(shape(8)) == 2
    assert Packing(1000, two_shards()).shards(shape(7)) == 1, "shards that do not divide a batch have all of it"
    pays = lambda *given, **form: Packing(*given, **form).pays(shape(8))
    assert pays(1) and pays(128) and not pays(384) and not pays(1000)
    assert Packing(1000).pays(shape(8), 2) and not Packing(1).pays(shape(1)) and not Packing(1, two_shards()).pays(shape(2))


@pytest.mark.parametrize("mesh", [None, two_shards], ids=["one", "two"])
def test_what_is_taken_into_parts_is_put_back(mesh):
    """All types, NaN too, [B, ...] of any rank; where a part has no example it has 0 and False; padding examples come into none."""
    rng, batch = np.random.default_rng(0), responses()
    whole = batch | {"margin": jnp.asarray(rng.normal(size=B)), "labels": jnp.ones((B, 2), bool), "nan": jnp.full((B, 2, 3), jnp.nan)}
    beside = {"weights": jnp.asarray(rng.random((B, 2)))}
    packing = Packing(1, mesh and mesh(), True, BLOCK)
    back = None
    for dealt in deal(whole, packing):
        taken, put = jax.jit(lambda i, dealt=dealt: dealt.part(i, whole, beside)), jax.jit(dealt.put)
        fields = lambda i, taken=taken: (dict(taken(i)[0]), taken(i)[1])
        back = dealt.zeros(jax.eval_shape(fields, jnp.zeros((), jnp.int32))) if back is None else back
        for i in range(int(dealt.count)):
            part, more = taken(i)
            used = np.asarray(dealt.index)[:, i].ravel() < dealt.examples
            assert (
                type(part) is Packed and part.form == dealt.form._replace(examples=len(used)) and part.form.shards == packing.shards(batch)
            )
            for x in jax.tree.leaves((dict(part), more)):
                assert len(x) == len(used) and not np.asarray(x)[~used].any()
            back = put(back, (dict(part), more), i)
    assert back is not None
    real = np.asarray(batch["mask"].any(axis=(1, 2)))
    clean = lambda x: np.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, np.zeros((), x.dtype))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, clean(y)), back, (whole, beside))


# --- layout ---


@pytest.mark.slow
def test_context_shards_share_the_work_of_a_long_row():
    """Of one row of 32 blocks, whose later tokens see more, each of four shards has the queries of a quarter of the pairs."""
    real = jnp.ones((1, 1, 32 * BLOCK), bool)
    batch = {"tokens": jnp.ones(real.shape, jnp.int32), "mask": real, "completion_mask": real}
    sight = laid_out(packed(batch, shards=1, context=4)).sight
    assert np.asarray(sight.count).tolist() == [[32 * 33 // 8] * 4]


@pytest.mark.parametrize("block", runs.slow_but([8, 64], 8))
@pytest.mark.parametrize("shared", runs.slow_but([True, False], True))
@pytest.mark.parametrize("N_and_context", runs.slow_but([(1, 1), (2, 1), (4, 1), (2, 3)], (2, 1), (2, 3)), ids=str)
def test_every_token_has_its_place(N_and_context, shared, block):
    """A place holds the token, its position and the length of its row; what is seen from it are its own row's tokens before, and itself."""
    N, context = N_and_context
    batch = packed(responses(N), shared, block=block, context=context)
    laid = jax.tree.map(np.asarray, jax.jit(laid_out)(batch))
    P, tokens, mask = batch.form.positions, np.asarray(rows(batch["tokens"])), np.asarray(rows(batch["mask"]))
    branch, root, positions, _, _, *lists, count = laid.sight
    lists = [np.concatenate([x[:, c] + [c * P // block // context, 0] for c in range(context)], axis=1) for x in lists]  # blocks of the row
    real = np.concatenate([np.arange(lists[0].shape[1] // context)[None] < count[:, c, None] for c in range(context)], axis=1)
    assert laid.tokens.shape == laid.mask.shape == (2, P) and laid.sight.blocks == P // block
    np.testing.assert_array_equal(laid.mask, branch >= 0)
    assert laid.mask.sum() == measured(batch, shared).sum()
    for row in np.flatnonzero(mask.any(axis=1)):
        s, own = row // (len(mask) // 2), laid.places[row][mask[row]]
        np.testing.assert_array_equal(laid.tokens[s, own], tokens[row][mask[row]])
        np.testing.assert_array_equal(positions[s, own], np.arange(len(own)))
        if not shared:
            np.testing.assert_array_equal(laid.lengths[s, own], len(own))
        visited, by_key = ([tuple(pair) for pair in x[s, real[s]].tolist()] for x in lists)
        assert len(set(visited)) == len(visited) and sorted(by_key) == sorted(visited)
        for pairs, side in (visited, 0), (by_key, 1):  # of each shard
            runs_of = [pair[side] for at, pair in enumerate(pairs) if not at or pairs[at - 1][side] != pair[side]]
            assert len(runs_of) <= len(set(runs_of)) * (context if side else 1)
        for i, at in enumerate(own):
            before = positions[s] <= positions[s, at]
            seen = np.flatnonzero(before & ((branch[s] == branch[s, at]) | (branch[s] == root[s, at])))
            np.testing.assert_array_equal(seen, np.sort(own[: i + 1]))
            assert {(at // block, j) for j in seen // block} <= set(visited)


def test_prompts_are_shared_where_they_are_the_same():
    batch = responses()
    tokens = np.asarray(batch["mask"].sum(axis=(1, 2)))
    saved = tokens - np.asarray(measured(batch, True))
    prompt = np.asarray((batch["mask"] & ~batch["completion_mask"]).argmin(axis=-1))[:, 0]
    assert saved[0] == saved[6] == 0, "padding"
    assert saved[1] == prompt[1] and saved[3] == prompt[3] and saved[7] == prompt[7] and prompt[1] > 2
    assert saved[2] == 1, "the second token differs"
    assert saved[4] >= 3 and saved[5] == 0, "rows that begin at different places share nothing"
    np.testing.assert_array_equal(measured(batch, False), tokens)
    alone = {name: x[:, :1] for name, x in batch.items()}
    np.testing.assert_array_equal(measured(alone, True), alone["mask"].sum(axis=(1, 2)))
    longer = batch | {"ref_tokens": batch["tokens"], "ref_mask": batch["mask"].at[1].set(True)}
    (more, same), own = np.asarray(measured(longer, True))[1:3], np.asarray(measured(batch, True))[1:3]
    assert more > own[0] and same == own[1]


# --- models ---


class Case(NamedTuple):
    """A model with something that touches positions, attention or what reads hidden states."""

    changes: dict[str, Any] = {}  # of the config
    rope: str = ""  # a variant of tests/test_models_transformer.py
    N: int = 2
    shared: bool = True
    options: dict[str, Any] = {}  # of the forward pass
    teacher: bool = False  # whether there is another model
    elsewhere: bool = False  # whether that reads tokens of its own, some shorter than the policy's and some longer
    critic: bool = False  # whether the model is a critic of its own


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
WINDOWS = {"sliding_windows": (4, 0), "local_rope_theta": 50.0}
SHORT = {"max_position_embeddings": 12}  # some rows are longer than the original context, others are not
LONGROPE = {"rope_scaling": tuple((k, 12 if k.startswith("original") else x) for k, x in config("longrope").rope_scaling)}
CASES = {
    **{f"{N} responses": Case(N=N) for N in (1, 2, 4)},
    **{f"{N} responses, not shared": Case(N=N, shared=False) for N in (1, 2, 4)},
    "multi-head": Case({"num_key_value_heads": 4}),
    "one key head": Case({"num_key_value_heads": 1}),
    "recomputed": Case(options={"remat": "full"}),
    "recomputed but for attention": Case(options={"remat": "attention"}),
    "recomputed from the host's memory": Case(options={"remat": "offload"}),
    "small chunks": Case(options={"chunk": 5}),
    "windows": Case(WINDOWS),
    "windows, not shared": Case(WINDOWS, shared=False),
    "windows of one theta": Case({"sliding_windows": (3, 6)}, N=4),
    "soft caps": Case({"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "a scalar": Case({"query_pre_attn_scalar": 3.0}),
    "temperature and unused tokens": Case({"temperature": 0.7, "unused_tokens": ((0, 3), (90, 96)), "predicted_tokens": 95}),
    "learned positions": Case({"positions": "learned", "norm": "layer"}),
    "learned positions, not shared": Case({"positions": "learned"}, shared=False),
    **{kind: Case(rope=kind) for kind in ("linear", "llama3", "yarn")},
    "dynamic": Case(SHORT, "dynamic", shared=False),
    "longrope": Case(SHORT | LONGROPE, "longrope", shared=False),
    "dynamic with a critic": Case(SHORT | {"num_labels": 1}, "dynamic", shared=False, critic=True),
    "dynamic with a teacher": Case(SHORT, "dynamic", shared=False, teacher=True, elsewhere=True),
    "local theta beside dynamic": Case(SHORT | WINDOWS, "dynamic", shared=False),
    "partly rotary": Case({"partial_rotary_factor": 0.5}),
    "parallel residual": Case({"parallel_residual": True}),
    "norms of heads": Case({"qk_norm": "head", "post_norms": True}),
    "norms of projections": Case({"qk_norm": "projection"}),
    "experts": Case(EXPERTS),
    "adapters": Case({"lora": Lora(2, 4.0, ("q", "v", "down"))}),
    "scores": Case({"num_labels": 1}),
    "scores before padding tokens": Case({"num_labels": 1, "padding": 7}),
    "three labels": Case({"num_labels": 3}, N=4),
    "scores and log-probs": Case({"num_labels": 1, "language_head": True}),
    "heads of a critic": Case({"critic_heads": 2}),
    "own critic": Case({"num_labels": 1}, critic=True),
    "own critic of two heads": Case({"num_labels": 2}, critic=True),
    "teacher": Case(teacher=True),
    "teacher, not shared": Case(teacher=True, shared=False),
    "teacher of other tokens": Case(teacher=True, elsewhere=True),
    "teacher of other tokens, not shared": Case(teacher=True, elsewhere=True, shared=False),
    "statistics": Case(options={"statistics": (TSALLIS, SQUARED, min_p(0.1))}, teacher=True),
    "hidden layers": Case(options={"hidden": (0, 1)}),
}  # fmt: skip


def with_reference_tokens(batch: dict) -> dict:
    """What a reference reads in the place of the tokens: the first token of each prompt is not there; one example's rows are longer."""
    first = batch["mask"] & (jnp.cumsum(batch["mask"], axis=-1) == 1)
    mask = (batch["mask"] & ~first).at[7].set(True)
    tokens = jnp.where(batch["completion_mask"], batch["tokens"], (batch["tokens"] + 5) % 96)
    return batch | {"ref_tokens": tokens.at[7].set(jnp.where(mask[7], tokens[7], 4)), "ref_mask": mask}


def made(case: Case, dtype: Any = jnp.float32) -> tuple[Callable, Any, dict]:
    """The forward pass of a case, its parameters, all of which matter, and a batch."""
    c, batch = config(case.rope, **case.changes), responses(case.N)
    params = init(c)
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    params = jax.tree.map(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape), params, noise)
    if case.critic:
        values = transformer.critic(c, dtype=dtype, remat="none")
        return lambda params, batch: Outputs(None, None, values=values(params, batch)), params, batch  # pyright: ignore[reportArgumentType]
    options: Any = {"remat": "none"} | ({"teacher": (c, init(c, seed=1))} if case.teacher else {}) | case.options
    apply = transformer.forward(c, dtype=dtype, **options)
    return apply, params, with_reference_tokens(batch) if case.elsewhere else batch


def pulled(apply: Callable, params: Any, batch: dict) -> tuple[Outputs, Any]:
    """The outputs, and the gradient of a random sum of them; hidden states of padding are left out."""

    def value(params: Any, batch: dict) -> tuple[jax.Array, Outputs]:
        out = apply(params, batch)
        out = out._replace(hidden={i: jnp.where(batch["mask"][..., None], x, 0.0) for i, x in out.hidden.items()})
        leaves = jax.tree.leaves(out)
        return sum(jnp.vdot(jax.random.normal(jax.random.key(i), x.shape), x) for i, x in enumerate(leaves)), out  # pyright: ignore[reportReturnType]

    grads, out = jax.jit(jax.grad(value, has_aux=True))(params, batch)
    return out, grads


EVERYDAY = ("windows",)  # scores are those of the ensemble below


VARIATIONS = (  # of cases that stay among the slow tests
    "learned positions, not shared", "dynamic with a critic", "dynamic with a teacher", "local theta beside dynamic", "parallel residual",
    "norms of projections", "scores before padding tokens", "own critic of two heads", "teacher", "teacher, not shared",
    "teacher of other tokens, not shared", "scores and log-probs", "1 responses", "1 responses, not shared", "4 responses, not shared",
    "multi-head", "one key head", "windows of one theta", "a scalar", "linear", "yarn", "three labels", "heads of a critic", "recomputed",
    "recomputed from the host's memory", "hidden layers", "partly rotary", "4 responses", "2 responses, not shared", "small chunks",
    "llama3", "longrope", "windows, not shared", "own critic", "2 responses", "soft caps", "temperature and unused tokens",
    "learned positions", "norms of heads", "statistics",
)  # fmt: skip


def marked(name: str) -> Any:
    """A case of the everyday, the slow or the long tests."""
    marks = () if name in EVERYDAY else (pytest.mark.slow, pytest.mark.long) if name in VARIATIONS else pytest.mark.slow
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_packed_rows_give_the_outputs_and_gradients_of_padded_ones(name):
    case = CASES[name]
    apply, params, batch = made(case)
    out, grads = pulled(apply, params, packed(batch, case.shared))
    expected, expected_grads = pulled(apply, params, batch)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), out, expected)
    assert_near(grads, expected_grads, tolerance=1e-5)
    still = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(expected_grads) if np.abs(x).max() < 1e-3}
    assert all("offset" in leaf or "lm_head" in leaf for leaf in still), still


BY_LENGTH = {kind: config(kind, num_labels=1) for kind in ("dynamic", "longrope")}


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("dynamic", transformer.forward),
        ("longrope", transformer.forward),
        ("dynamic", transformer.critic),
        ("longrope", lambda c: transformer.forward(tiny.MODEL, teacher=(c, init(c)))),
    ],
    ids=["dynamic", "longrope", "critic", "teacher"],
)
def test_prompts_are_not_shared_where_angles_depend_on_the_length(kind, reader):
    """A critic and a teacher say so too, whose angles may be other ones than the policy's."""
    c = BY_LENGTH[kind]
    with pytest.raises(ValueError, match=rf"rotary angles of type '{kind}' depend on a row's length; use shared=False"):
        jax.eval_shape(lambda batch: reader(c)(init(tiny.MODEL) | {"score": None, "score_offset": None}, batch), packed(responses()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["2 responses", *(pytest.param(name, marks=pytest.mark.long) for name in ("windows, not shared", "soft caps", "scores", "experts"))],
)
def test_bfloat16_is_as_near_to_float32_as_that_of_padded_rows(name):
    apply, params, batch = made(CASES[name])
    half, _, _ = made(CASES[name], jnp.bfloat16)
    exact = pulled(apply, params, batch)
    near, padded = pulled(half, params, packed(batch, CASES[name].shared)), pulled(half, params, batch)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(near))
    apart = lambda x, y: float(np.linalg.norm(x - y) / np.maximum(np.linalg.norm(y), 1e-6))
    ours, theirs = (np.array([apart(x, y) for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True)]) for found in (near, padded))
    # A leaf of few numbers is by chance nearer in one than in the other; all together are not.
    assert 1e-3 < ours.mean() < 1.25 * theirs.mean() < 0.2 and (ours < np.maximum(3 * theirs, 1e-3)).all()


def test_a_changed_batch_is_a_plain_one_and_is_padded():
    """What makes a new batch does not know whether its rows still fit; a map over the arrays leaves the batch packed."""
    batch = packed(responses())
    for changed in (batch | {"margin": jnp.zeros(B)}, {"margin": jnp.zeros(B)} | batch, dict(batch), {**batch}, batch.copy()):
        assert type(changed) is dict and laid_out(changed).places is None
    through = jax.jit(lambda batch: jax.tree.map(lambda x: x, batch))(batch)
    assert type(through) is Packed and through.form == batch.form and through.keys() == batch.keys()
    assert jax.tree_util.tree_flatten_with_path(batch)[0][0][0] == (jax.tree_util.DictKey("completion_mask"),)


# --- part by part ---

SCORES = dataclasses.replace(LAYER, num_labels=1)


@pytest.mark.parametrize("kind", runs.by_turn(["log-probs", "ensemble", "ensemble of other tokens"], [], ["ensemble of other tokens"]))
def test_a_frozen_model_gives_part_by_part_what_it_gives_at_once(kind):
    """Members of an ensemble may read other tokens than the policy, of another length."""
    batch, seen = responses(), []
    if kind == "log-probs":
        whole, params = transformer.forward(LAYER, remat="none"), init(LAYER)
    else:
        whole, params = ensemble_apply(SCORES, ONE), jax.tree.map(lambda *x: jnp.stack(x), init(SCORES), init(SCORES, seed=1))
    if kind == "ensemble of other tokens":
        batch |= {f"ensemble_{name}": jnp.pad(x, ((0, 0), (0, 0), (0, 8))) for name, x in responses(seed=1).items()}
    apply = lambda params, batch: seen.append(type(batch)) or whole(params, batch)
    found = jax.jit(PartByPart(apply, Packing(1, block=BLOCK), "ensemble"))(params, batch)
    assert seen and set(seen) == {Packed}
    expected = jax.jit(whole)(params, batch)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 0.1


def test_what_does_not_pay_is_computed_at_once():
    batch, seen = responses(), []
    apply = lambda params, batch: seen.append(type(batch)) or tiny.plain_apply(params, batch)
    for packing, what, how in ((Packing(10**6), batch, dict), (Packing(1), packed(batch), Packed), (Packing(1), batch, Packed)):
        seen.clear()
        jax.eval_shape(PartByPart(apply, packing), tiny.plain_params(), what)
        assert set(seen) == {how}
    assert part_by_part(apply, None) is apply and part_by_part(apply, Packing(1)) == PartByPart(apply, Packing(1))
    assert hash(PartByPart(apply, Packing(1, two_shards()))) == hash(PartByPart(apply, Packing(1, two_shards())))


# --- steps of a real model on a mesh ---

MESHES = {
    "data 2, fsdp 2, tensor 2": (LAYER, (1, 2, 2, 2), 16),
    "data 8": (LAYER, (1, 8, 1, 1), 16),
    "fsdp 8": (LAYER, (1, 1, 8, 1), 16),
    "tensor 4": (LAYER, (1, 2, 1, 4), 16),  # more than there are key-value heads
    "experts": (dataclasses.replace(LAYER, **EXPERTS), (1, 2, 2, 2), 16),
    "scores": (SCORES, (1, 2, 2, 2), 16),
    "context 2, data 2, tensor 2": (LAYER, (1, 2, 1, 2, 2), 16),
    "context 4, fsdp 2": (LAYER, (1, 1, 2, 1, 4), 16),
    "context 2, experts": (dataclasses.replace(LAYER, **EXPERTS), (1, 1, 2, 2, 2), 16),
    "context 2, scores": (SCORES, (1, 1, 2, 2, 2), 16),
    "context 2, shards that do not divide the batch": (LAYER, (1, 2, 2, 1, 2), 7),
    "shards that do not divide the batch": (LAYER, (1, 2, 2, 2), 7),
}
OPTIMIZER = optax.sgd(0.1, momentum=0.0)  # its state is the gradient


def preferences(B: int, seed: int = 0) -> dict:
    """Pairs with log-probs of some reference."""
    batch = responses(B=B, seed=seed)
    return batch | {"ref_logps": jnp.where(batch["completion_mask"], -4 * jax.random.uniform(jax.random.key(1), batch["mask"].shape), 0.0)}


def mesh_of(sizes: tuple[int, ...]) -> meshes.Mesh:
    """The mesh of the sizes of member, data, fsdp, tensor and perhaps context."""
    axes = ("member", "data", "fsdp", "tensor", "context")
    return meshes.make_mesh(dict(zip(axes, sizes, strict=False)), jax.devices()[: math.prod(sizes)])


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.long_but(MESHES, "data 2, fsdp 2, tensor 2", "experts", "context 4, fsdp 2"))
def test_packed_steps_on_a_mesh_are_padded_ones_on_one_device(name):
    c, sizes, B = MESHES[name]
    mesh, batch, loss = mesh_of(sizes), preferences(B), bradley_terry() if c.num_labels else dpo() + sft()
    step = lambda mesh, packing: jax.jit(make_step(transformer.forward(c, mesh=mesh), loss, OPTIMIZER, outputs=True, packing=packing))
    start = lambda params: init_state(params, OPTIMIZER, jax.random.key(0))
    state, metrics, out = step(None, None)(start(init(c)), batch)
    layout = jax.tree.map(lambda x: x.sharding, parameters.abstract_params(c, mesh))
    laid = batch if B == 7 else jax.device_put(batch, meshes.batch_sharding(mesh))
    packed_state, packed_metrics, packed_out = step(mesh, Packing(1, mesh, block=BLOCK))(start(jax.device_put(init(c), layout)), laid)
    assert 0.3 < packed_metrics.pop("packed_positions") < 1
    assert_near((packed_state.params, packed_state.opt_state), (state.params, state.opt_state), tolerance=1e-5)
    assert_metrics_near(packed_metrics, metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), packed_out, out)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", runs.long_but([(1, 1, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2), (2, 1, 2, 1, 2)], (2, 1, 2, 2)), ids=str)
def test_a_packed_ensemble_trains_as_a_padded_one(sizes):
    """Members have batches of their own, of another number of parts each."""
    K, batches = 2, [preferences(B=16, seed=seed) for seed in (0, 1)]
    batches[1] |= {name: batches[1][name].at[::2].set(False) for name in ("mask", "completion_mask")}
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params, zero = stack(init(SCORES), init(SCORES, seed=1)), jnp.zeros((), jnp.int32)

    def stepped(mesh: meshes.Mesh | None, packing: Packing | None, params: Any, batch: dict) -> tuple[Any, dict]:
        step = make_step(transformer.forward(SCORES, mesh=mesh), bradley_terry(), OPTIMIZER, packing=packing)
        state = TrainState(zero, params, OPTIMIZER.init(params), jax.random.key(0), jnp.zeros(K, jnp.int32), jnp.zeros(K, jnp.int32))
        return jax.jit(over_members(step, (AXES, 0), (AXES, 0)))(state, batch)

    state, metrics = stepped(None, None, params, stack(*batches))
    mesh = mesh_of(sizes)
    layout = jax.tree.map(lambda x: x.sharding, stacked(parameters.abstract_params(SCORES, mesh), K, mesh))
    laid = jax.device_put(stack(*batches), meshes.batch_sharding(mesh, members=True))
    packed_state, packed_metrics = stepped(mesh, Packing(1, mesh, block=BLOCK), jax.device_put(params, layout), laid)
    assert packed_metrics.pop("packed_positions").shape == (K,)
    assert_near((packed_state.params, packed_state.opt_state), (state.params, state.opt_state), tolerance=1e-5)
    assert_metrics_near(packed_metrics, metrics)


# --- what must not be lost ---


@pytest.mark.slow
def test_a_hole_before_a_scored_token_has_no_state_of_another_response():
    """Padding within a row stands where the row's last token before it stands, in the prompt and behind it."""
    batch = responses()
    mask = np.array(batch["mask"])
    holes = []
    for b, n in np.argwhere(batch["completion_mask"].any(axis=-1)).tolist():
        first = int(np.asarray(batch["completion_mask"])[b, n].argmax())
        if mask[b, n, : first - 1].any():
            mask[b, n, first - 1] = False
            holes.append((b, n, first - 1, np.flatnonzero(mask[b, n, : first - 1])[-1]))
    places = np.asarray(laid_out(packed(batch | {"mask": jnp.asarray(mask)}, shards=1)).places).reshape(mask.shape)
    assert len(holes) > 4 and all(places[b, n, hole] == places[b, n, before] for b, n, hole, before in holes)


@pytest.mark.parametrize("field", ["ref_tokens", "ref_mask"])
def test_examples_have_room_for_what_a_teacher_reads(field):
    """A teacher reads either field alone too, beside the batch's own tokens or mask."""
    batch = responses()
    other = {"ref_tokens": batch["tokens"].at[:, 1].add(1), "ref_mask": batch["mask"].at[:, 1, 0].set(False)}[field]
    found = measured(batch | {field: other}, True)
    own = measured(batch, True)
    reads = batch | {"tokens": other} if field == "ref_tokens" else batch | {"mask": other}
    np.testing.assert_array_equal(found, np.maximum(own, measured(reads, True)))
    assert (np.asarray(found) > np.asarray(own)).any()


def test_a_frozen_model_reads_its_own_fields_and_no_others():
    """A model of a role without tokens of its own reads those of the batch, and fields that it does not read are not touched."""
    read: set[str] = set()
    fields = ("rewards", "sampled_logps")
    batch = Noting(
        responses() | {name: jnp.zeros((B, 2)) for name in fields} | {"weak_mask": responses()["mask"]}, frozenset(fields), read.add
    )
    model = part_by_part(lambda params, batch: batch["tokens"].sum(axis=-1), Packing(1, block=BLOCK), "weak")
    np.testing.assert_array_equal(model({}, batch), jnp.where(responses()["mask"], responses()["tokens"], 0).sum(axis=-1))
    assert not read


@pytest.mark.slow
def test_a_batch_of_another_number_of_examples_is_padded():
    part, _ = deal(responses(), Packing(1, block=BLOCK))[0].part(jnp.zeros((), jnp.int32), responses())
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), part)
    assert isinstance(twice, Packed) and laid_out(part).sight is not None and laid_out(twice).sight is None
