"""Routed reward models: what routing gains and costs, and experts on one frozen base through the shared step, phase by phase."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import Model, Outputs, bradley_terry, forward, init_state, make_step
from alignax.losses import score_l2
from alignax.losses.reward import correct
from alignax.mesh import make_mesh
from alignax.models import hf, parameters, peft
from alignax.models.lora import Lora
from alignax.models.reward import HEAD
from alignax.overopt import vectors
from alignax.rewards.routed import (
    EXPERTS,
    adapted,
    concatenated,
    features,
    init_mixture,
    load_experts,
    mixture,
    mixture_model,
    of_prompts,
    one_hot,
    routed,
    side_by_side,
    state_of,
)  # fmt: skip

ONE = make_mesh({}, jax.devices()[:1])

# Categories of vectors, each with a gold direction of its own at an angle to what they share ------------------------------------

C, D, PAIRS, HELD_OUT = 4, 12, 300, 500


def directions(key, angle):
    """A direction for each category, [C, D]: cos(angle) times a common one, and sin(angle) times one orthogonal to it."""
    common, own = (jax.random.normal(k, (C, D)) for k in jax.random.split(key))
    common = common[:1] / jnp.linalg.norm(common[:1])
    own -= (own @ common.T) * common
    return jnp.cos(angle) * common + jnp.sin(angle) * own / jnp.linalg.norm(own, axis=1, keepdims=True)


def vector_pairs(key, gold, count: int, noise: float):
    """Pairs of vectors [C, count, 2, D], the better one first, except for a share `noise` of flips."""
    draw, flip = jax.random.split(key)
    x = jax.random.normal(draw, (C, count, 2, D))
    rewards = jnp.einsum("cnsd,cd->cns", x, gold)
    first = (rewards[..., 0] > rewards[..., 1]) ^ (jax.random.uniform(flip, (C, count)) < noise)
    return jnp.where(first[..., None, None], x, x[..., ::-1, :])


def inputs(x, told: bool):
    """Inputs of a reward model, [C, n, 2, D] -> [C, n, 2, D + C]: with the category, or without."""
    hot = jnp.broadcast_to(jnp.eye(C)[:, None, None], (*x.shape[:3], C))
    return jnp.concatenate([x, hot * told], axis=-1)


def batch_of(x):
    return {"vectors": x, "completion_mask": jnp.ones((x.shape[0], 2, 1), bool)}


def train(key, pairs):
    optimizer = optax.adam(3e-3)
    step = make_step(vectors.reward_model, bradley_terry() + 0.001 * score_l2(), optimizer)
    weights, order = jax.random.split(key)
    state = init_state(vectors.init_network(weights, D + C, 1.0), optimizer, order)
    return vectors.trained(step, state, batch_of(pairs), 150, 64).params


def accuracies(key, angle):
    """Held-out accuracy, without noise, of a model of all categories, of one that is told the category, and of one model each, routed."""
    keys = jax.random.split(key, 4)
    gold, flat = directions(keys[0], angle), lambda x: x.reshape(-1, *x.shape[2:])
    data, held_out = (vector_pairs(k, gold, n, noise) for k, n, noise in ((keys[1], PAIRS, 0.25), (keys[2], HELD_OUT, 0.0)))
    each = jnp.tile(inputs(data, False), (1, C, 1, 1))  # as many rows as all categories have, so that one program trains all
    data = jnp.concatenate([jnp.stack([flat(inputs(data, False)), flat(inputs(data, True))]), each])
    params = jax.vmap(train)(jax.random.split(keys[3], 2 + C), data)
    pooled, told, experts = (jax.tree.map(lambda x, i=i: x[i], params) for i in (0, 1, slice(2, None)))
    router = lambda _, batch: Outputs(None, None, scores=jax.nn.one_hot(batch["category"], C)[:, None])
    model = routed(Model(side_by_side(vectors.reward_model), experts), Model(router, ()))
    plain, known = (batch_of(flat(inputs(held_out, told))) for told in (False, True))
    scores = model.apply(model.params, plain | {"category": jnp.repeat(jnp.arange(C), HELD_OUT)})
    outs = vectors.reward_model(pooled, plain), vectors.reward_model(told, known), scores
    return tuple(correct(out.scores).mean() for out in outs)


@functools.cache
def measured(seeds: int, angle: float):
    return np.mean(program()(jax.random.split(jax.random.key(0), seeds), angle), axis=1)


@functools.cache
def program():
    return jax.jit(jax.vmap(accuracies, in_axes=(0, None)))


@pytest.mark.slow
def test_routing_wins_where_categories_conflict_and_loses_where_they_agree():
    pooled, told, alone = measured(4, 1.2)
    assert alone - pooled >= 0.03
    assert abs(alone - told) < 0.05, "a pooled model that is told the category comes near it"
    pooled, told, alone = measured(4, 0.0)
    assert alone - pooled < -0.03 and alone - told < -0.03, "a quarter of the data each"


# Experts on a frozen base: a prompt ends with its category, which says which of two markers a good response has -----------------------

LORA = Lora(4, 8.0, ("q", "v", "o"))
BASE = dataclasses.replace(tiny.MODEL, num_labels=1, num_hidden_layers=1)
ROUTER = dataclasses.replace(BASE, num_labels=2)
ADAPTED = dataclasses.replace(BASE, lora=LORA)
SIZE = tiny.MODEL.hidden_size


def planted(rows: int, seed: int):
    """Pairs [B, 2, 9]: <s>, a random token, the category; 4 tokens of which one is a marker, </s>; then padding."""
    rng = np.random.default_rng(seed)
    category, place = rng.integers(2, size=rows), rng.integers(3, 7, size=(rows, 2, 1))
    tokens = rng.integers(20, 90, size=(rows, 2, 9))
    tokens[..., 0], tokens[..., 2], tokens[..., 7], tokens[..., 8] = 1, 3 + category[:, None], 2, 0
    markers = 10 + np.stack([category, 1 - category], axis=1)[..., None]  # chosen, rejected
    np.put_along_axis(tokens, place, markers, axis=2)
    at = np.broadcast_to(np.arange(9), tokens.shape)
    batch = {"tokens": tokens, "mask": at < 8, "completion_mask": (at > 2) & (at < 8), "category": category}
    return {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hf.with_heads(hf.open_folder(tiny.folder(tmp_path_factory.mktemp("routed") / "base", num_hidden_layers=1)), 1)


@pytest.fixture(scope="module")
def initial(source):
    """The parameters at step 0: a router on the base's trunk, two experts with copies of its head, and the head of a mixture."""
    base = hf.load_params(source, ONE)
    heads = {name: jnp.stack([base[name]] * 2) for name in HEAD if name in base}
    adapters = jax.jit(jax.vmap(lambda key: parameters.fresh_adapters(BASE, LORA, base, key)))(jax.random.split(jax.random.key(0)))
    router = base | {"score": jnp.zeros((SIZE, 2)), "score_offset": jnp.zeros((2,))}
    head = init_mixture(jax.random.key(2), 2 * SIZE, SIZE)
    return jax.tree.map(np.asarray, {"models": {"base": base, "adapters": adapters | heads}, "router": router, "head": head})


@pytest.fixture(scope="module")
def see():
    """All that models say of 448 pairs, in one program: the base, both experts side by side, the router, and the experts' states."""
    base, adapted_ = (forward(config, remat="none") for config in (BASE, ADAPTED))
    experts, router = side_by_side(adapted(adapted_), EXPERTS), of_prompts(forward(ROUTER, remat="none"))

    @jax.jit
    def program(models, router_params, batch):
        written = features(concatenated(state_of(ADAPTED)), models, microbatches=4)(batch)["features"]
        outs = base(models["base"], batch), experts(models, batch), router(router_params, batch)
        return dict(zip(("base", "experts", "router"), (out.scores for out in outs), strict=True)) | {"features": written}

    # As NumPy arrays, so that none brings a layout for which the program would be compiled again.
    return lambda params, batch: program(*jax.tree.map(np.asarray, (params["models"], params["router"], batch)))


@pytest.fixture(scope="module")
def phases(initial):
    """The parameters after all phases of docs/routed.md: the router, the experts on one category each, and the mixture's head over both."""
    data, base = planted(448, 0), initial["models"]["base"]
    data = jax.tree.map(np.asarray, data)
    own = [jax.tree.map(lambda x, c=c: x[data["category"] == c], data) for c in range(2)]
    rows = lambda batch, i: jax.tree.map(lambda x: x[np.arange(16 * i, 16 * i + 16) % 192], batch)
    given = {
        "router_config": ROUTER, "config": ADAPTED, "K": 2, "D": SIZE, "optimizer": optax.adam(1e-2), "key": jax.random.key(2),
        "trunk": base, "head": {name: initial["router"][name] for name in HEAD if name in base}, "experts": initial["models"],
        "batches": [rows(data, i) for i in range(60)],
        "expert_batches": [jax.tree.map(lambda *x: np.stack(x), *(rows(batch, i) for batch in own)) for i in range(24)],
    }  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (runs.REPO / "docs" / "routed.md").read_text(), flags=re.S)
    exec(compile(code, "docs/routed.md", "exec"), given)
    params = given["model"].params
    return {"models": given["experts"], "router": given["router"].params, "head": params["head"]}


@pytest.fixture(scope="module")
def held_out():
    return planted(448, 1)


@pytest.fixture(scope="module")
def judged(initial, phases, see, held_out):
    """The outputs for held-out pairs before and after training: those of `see`, the router's choice, routed and mixture scores."""

    def judge(params):
        found = see(params, held_out)
        says = lambda name: Model(lambda _, batch: Outputs(None, None, scores=found[name]), ())
        model, whole = routed(says("experts"), says("router")), params["models"] | {"head": params["head"]}
        mixed = mixture_model(lambda experts, batch: found["features"])(whole, held_out)
        found |= {"mask": one_hot(found["router"][:, 0]), "mixture": mixed.scores}
        return jax.tree.map(np.asarray, found | {"routed": model.apply(model.params, held_out).scores})

    return judge(initial), judge(phases)


def accuracy(scores) -> float:
    return float(np.mean(scores[:, 0] > scores[:, 1]))


@pytest.mark.slow
@pytest.mark.long
def test_experts_without_training_give_the_bases_scores(judged):
    before, _ = judged
    assert before["base"].std() > 0.1 and before["experts"].shape == (448, 2, 2)
    for k in range(2):
        np.testing.assert_allclose(before["experts"][..., k], before["base"], atol=1e-6)


@pytest.mark.slow
def test_a_router_an_expert_each_and_a_mixture_over_them_learn_what_the_base_cannot_say(judged, held_out):
    before, after = judged
    assert abs(accuracy(before["routed"]) - 0.5) < 0.15 and abs(accuracy(before["mixture"]) - 0.5) < 0.15
    assert accuracy(after["routed"]) > 0.9 and accuracy(after["mixture"]) > 0.9
    for c in range(2):
        of = np.asarray(held_out["category"]) == c
        own, other = (accuracy(after["experts"][of, :, k]) for k in (c, 1 - c))
        assert own > 0.9 and other < 0.2, "categories conflict, so an expert alone is wrong about the other's"


@pytest.mark.slow
def test_the_routing_mask_is_one_hot_and_picks_the_experts_scores(judged, held_out):
    for found in judged:
        assert set(np.unique(found["mask"])) <= {0.0, 1.0} and (found["mask"].sum(axis=1) == 1).all()
        picked = np.take_along_axis(found["experts"], np.argmax(found["mask"], axis=1)[:, None, None], axis=2)[..., 0]
        np.testing.assert_allclose(found["routed"], picked, atol=1e-6)
    assert np.mean(np.argmax(judged[1]["mask"], axis=1) == held_out["category"]) > 0.95
    np.testing.assert_array_equal(one_hot(jnp.array([[1.0, 1.0, 0.0]])), [[1.0, 0.0, 0.0]])


@pytest.mark.slow
def test_each_phase_trains_its_own_part_alone(initial, phases):
    moved = lambda a, b: {hf.leaf_name(p): bool((x != y).any()) for (p, x), y in zip(leaves(a), jax.tree.leaves(b), strict=True)}
    leaves = jax.tree_util.tree_leaves_with_path
    assert moved(initial["head"], phases["head"]) == dict.fromkeys(["W1", "W2", "b1", "b2", "slope"], True)
    assert not any(moved(initial["models"]["base"], phases["models"]["base"]).values())
    adapters = moved(initial["models"]["adapters"], phases["models"]["adapters"])
    assert adapters.pop("score_offset") is False and adapters.pop("score")
    assert adapters == {f"layers.{n}_lora_{part}": True for n in LORA.targets for part in "ab"}


@pytest.mark.slow
def test_a_router_does_not_read_responses(initial, see, held_out):
    other = held_out | {"tokens": jnp.where(held_out["completion_mask"], held_out["tokens"] + 1, held_out["tokens"])}
    a, b = (see(initial, batch) for batch in (held_out, other))
    assert a["router"].shape == (448, 1, 2) and (a["base"] != b["base"]).any()
    np.testing.assert_array_equal(a["router"], b["router"])


@pytest.mark.slow
def test_experts_of_peft_folders(initial, source, tmp_path):
    models = initial["models"]
    for k in range(2):
        one = jax.tree.map(lambda x, k=k: jnp.asarray(x[k]) + 0.5, models["adapters"])
        peft.write_adapter(one, LORA, source, str(source.path), tmp_path / f"expert{k}")
    folders = [tmp_path / f"expert{k}" for k in range(2)]
    config, found = load_experts(folders, source, ONE)
    assert config == dataclasses.replace(source.config, lora=LORA)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y + 0.5, atol=1e-6), found["adapters"], models["adapters"])
    jax.tree.map(np.testing.assert_array_equal, found["base"], models["base"])
    fields = json.loads((folders[1] / "adapter_config.json").read_text()) | {"lora_alpha": 3.0}
    (folders[1] / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"expert1' has the adapters .*alpha=3\.0.*experts must have adapters of the same kind"):
        load_experts(folders, source, ONE)


@pytest.mark.slow
def test_mixtures_side_by_side_are_one_model_to_route(initial, held_out):
    """The whole of DMoERM: two categories, a mixture of two experts each."""
    whole = jax.tree.map(lambda x: np.stack([x] * 2), initial["models"] | {"head": initial["head"]})
    mixtures = Model(side_by_side(mixture_model(concatenated(state_of(ADAPTED)))), whole)
    model = routed(mixtures, Model(of_prompts(forward(ROUTER, remat="none")), initial["router"]))
    assert jax.eval_shape(mixtures.apply, mixtures.params, held_out).scores.shape == (448, 2, 2)
    assert jax.eval_shape(model.apply, model.params, held_out).scores.shape == (448, 2)


def test_wrong_shapes_are_refused():
    scores = lambda *shape: Model(lambda _, batch: Outputs(None, None, scores=jnp.zeros(shape)), ())
    for models, router, message in (
        (scores(4, 2, 3), scores(4, 2, 3), r"a score for each category, \[B, 1, C\], but this model gives \(4, 2, 3\); use of_prompts"),
        (scores(4, 2, 3), scores(4, 1, 2), r"has 2 categories, but the scores of the models have shape \(4, 2, 3\)"),
        (scores(4, 2), scores(4, 1, 2), r"the scores of the models have shape \(4, 2\)"),
    ):
        model = routed(models, router)
        with pytest.raises(ValueError, match=message):
            model.apply(model.params, {})
    with pytest.raises(ValueError, match=r'the batch has no "features"'):
        mixture({}, {})


def test_a_mixture_by_hand():
    params = {"W1": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "b1": jnp.array([0.0, 1.0]), "slope": jnp.array(0.5)}
    params |= {"W2": jnp.array([[1.0], [10.0]]), "b2": jnp.array([3.0])}
    scores = mixture(params, {"features": jnp.array([[[2.0, 1.0], [-2.0, -1.0]]])}).scores  # hidden (2, 3) and (-2, -1)
    np.testing.assert_allclose(scores, [[2 + 30 + 3, -1 - 5 + 3]])
