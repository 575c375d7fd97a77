"""Moments in fewer bits: codes by hand, rounding that is right on average, bytes, training that ends where it did, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import mesh as meshes
from alignax.config import default_config, load_experiment
from alignax.losses import sft
from alignax.moments import BLOCK, Blocks, compact, from_blocks, is_blocks, to_bfloat16, to_blocks, unpacked
from alignax.optim import make_optimizer
from alignax.rewards import members
from alignax.run.checkpoint import Checkpoints, nbytes
from alignax.run.prepare import prepare
from alignax.train import init_state, make_step

FEWER = ("bfloat16", "int8")


def optimizer_of(moments: str, name: str = "adamw", rate: float = 0.01, **fields):
    config = default_config().optimizer
    config.update({"name": name, "moments": moments, "weight_decay": 0.0} | fields)
    return make_optimizer(config, optax.constant_schedule(rate))


def test_codes_by_hand():
    """Of two blocks, the second one short: levels are s (k / 127)^3, and s (k / 255)^4 of second moments."""
    x = jnp.zeros((1, BLOCK + 3)).at[0, :3].set(jnp.array([-2.0, 2.0 * (64 / 127) ** 3, 0.0])).at[0, BLOCK].set(5.0)
    signed, squared = (to_blocks(x, jax.random.key(0), squared) for squared in (False, True))
    assert signed.codes.shape == x.shape and signed.scales.tolist() == [[2.0, 5.0]]
    assert signed.codes.dtype == jnp.int8 and squared.codes.dtype == jnp.uint8
    assert signed.codes[0, [0, 2, BLOCK, BLOCK + 1]].tolist() == [-127, 0, 127, 0] and abs(int(signed.codes[0, 1]) - 64) <= 1
    np.testing.assert_allclose(
        from_blocks(Blocks(jnp.array([[64, -1]], jnp.int8), jnp.ones((1, 1)))), [[(64 / 127) ** 3, -((1 / 127) ** 3)]], 1e-6
    )
    np.testing.assert_allclose(
        from_blocks(Blocks(jnp.array([[64, 1]], jnp.uint8), jnp.ones((1, 1)))), [[(64 / 255) ** 4, (1 / 255) ** 4]], 1e-6
    )
    assert not np.asarray(from_blocks(to_blocks(jnp.zeros((2, 5)), jax.random.key(0)))).any()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "squared"])
def test_rounding_is_right_on_average_and_to_a_neighbour(kind):
    """4,096 roundings of each of 64 values of 6 decades: a mean is within 5 standard errors, and no rounding moves by more than a level."""
    values = jnp.abs(jax.random.normal(jax.random.key(1), (64,))) * 10.0 ** -jnp.linspace(0, 6, 64)
    values = values.at[0].set(1.5).at[1].set(0.0) * (1 if kind == "squared" else jnp.where(jnp.arange(64) % 2, 1, -1))
    x = jnp.broadcast_to(values[None], (4096, 64))
    key = jax.random.key(2)
    found = np.float64(to_bfloat16(x, key) if kind == "bfloat16" else from_blocks(to_blocks(x, key, kind == "squared")))
    below, above = found.min(axis=0), found.max(axis=0)
    assert len(np.unique(found, axis=0)) > 1000 and all(len(np.unique(column)) <= 2 for column in found.T)
    spread = above - below
    close = np.abs(found.mean(axis=0) - np.float64(values)) <= 5 * spread / 2 / 64 + 1e-6 * np.abs(np.float64(values))
    least = (1.5 / 255**4) if kind == "squared" else 0  # second moments below the least level become that
    assert (close | (np.float64(values) < least)).all()
    relative = {"bfloat16": 2**-7, "int8": 3.1 / 127, "squared": 4.1 / 255}[kind]
    assert (spread[[0, 2, 3]] <= relative * 1.5).all()
    assert not found[:, 1].any()
    if kind == "squared":
        assert (found[:, 2:] > 0).all()


@pytest.mark.parametrize("moments", FEWER)
def test_second_moments_fall_without_gradients(moments):
    """As b2^n on average; rounding to the nearest value would hold them where they are, since a step changes them by a thousandth."""
    optimizer = optimizer_of(moments, "rmsprop", b2=0.999, clip=0.0)
    params = {"w": jnp.zeros((16, BLOCK))}
    largest = jnp.where(jnp.arange(BLOCK) == 0, 1.0, 0.5)  # the value that sets the scale is always exact
    state = optimizer.update({"w": jnp.broadcast_to(largest, (16, BLOCK))}, optimizer.init(params), params)[1]
    fall = jax.jit(
        lambda state: jax.lax.fori_loop(0, 300, lambda _, s: optimizer.update(jax.tree.map(jnp.zeros_like, params), s, params)[1], state)
    )
    nu = lambda state: np.asarray(unpacked(state.state)[0].nu["w"]).mean()
    np.testing.assert_allclose(nu(fall(state)) / nu(state), 0.999**300, rtol=0.03)


@pytest.mark.slow
def test_bytes_are_as_claimed():
    params = {"w": jnp.zeros((8, 4 * BLOCK)), "b": jnp.zeros(100)}
    count = 8 * 4 * BLOCK + 100
    size = {
        moments: nbytes(optimizer_of(moments).init(params)) - nbytes(optimizer_of("float32").init({})) for moments in ("float32", *FEWER)
    }
    assert size["float32"] == 8 * count
    assert size["bfloat16"] == 4 * count + 4  # and the counter
    assert size["int8"] == 2 * (count + 4 * (8 * 4 + 1)) + 4


@pytest.mark.slow
@pytest.mark.parametrize("moments", FEWER)
@pytest.mark.parametrize("name", runs.long_but(["adamw", "adam", "lion", "rmsprop", "sgd"], "adamw", "lion"))
def test_training_ends_where_it_did(name, moments):
    """60 steps on one batch: the fall of the loss is within 2 percent of the fall with float32 moments."""
    batch = tiny.batch(8)

    def losses(moments: str) -> np.ndarray:
        optimizer = optimizer_of(moments, name, 0.3 if name == "sgd" else 0.003 if name == "lion" else 0.02)
        step = make_step(tiny.plain_apply, sft(), optimizer)
        state = init_state(tiny.plain_params(), optimizer, jax.random.key(0))

        def one(state, _):
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        return np.asarray(jax.jit(lambda state: jax.lax.scan(one, state, None, 60)[1])(state))

    expected, found = losses("float32"), losses(moments)
    assert found[0] == expected[0] and expected[0] - expected[-1] > 0.3
    assert abs(found[-1] - expected[-1]) < 0.02 * (expected[0] - expected[-1])
    assert (found[1:] != expected[1:]).any()


@pytest.mark.long
@pytest.mark.slow
def test_real_preferences_end_where_they_did(data_dir, tmp_path):
    """DPO of a 260k model on 96 pairs of HH, which it learns by heart: each step's loss is within 0.01 of that with float32 moments."""
    found = {}
    for moments in ("float32", "int8"):
        fields = {
            "workdir": tmp_path / moments, "model.path": data_dir / "derived_hh_sft_260k",
            "data.train": data_dir / "hh_harmless/train.jsonl", "data.eval": data_dir / "hh_harmless/dev.jsonl",
            "data.limit": 96, "data.bad_rows": "drop", "data.max_length": 96,
            "data.max_prompt_length": 48, "batch_size": 4, "steps": 40, "optimizer.learning_rate": 1e-3, "optimizer.moments": moments,
            "eval.samples": 0, "eval.sample_prompts": 0, "export.final": False, "log.tensorboard": False,
        }  # fmt: skip
        runs.finish(runs.begin(runs.arguments(fields)), timeout=900)
        found[moments] = np.array([row["loss"] for row in runs.losses(tmp_path / moments).values()])
    full, fewer = found.values()
    assert len(full) == 40 and full[-16:].mean() < 0.1 < full[:16].mean()
    assert fewer[0] == full[0] and 0 < np.abs(fewer - full).max() < 0.01


@pytest.mark.slow
def test_a_checkpoint_holds_codes_and_scales(tmp_path):
    optimizer, batch = optimizer_of("int8"), tiny.batch(8)
    step = jax.jit(make_step(tiny.plain_apply, sft(), optimizer))
    state = step(init_state(tiny.plain_params(), optimizer, jax.random.key(0)), batch)[0]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, {})
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(1, state)
    assert any(x.dtype == jnp.uint8 and x.any() for x in jax.tree.leaves(restored.opt_state))
    jax.tree.map(np.testing.assert_array_equal, step(restored, batch)[0].opt_state, step(state, batch)[0].opt_state)


@pytest.mark.slow
def test_a_step_on_a_mesh_and_of_members_is_that_of_one_device():
    """Codes and scales are sharded as their parameters, where their axes divide; of members each has its own."""
    optimizer, batch, mesh = optimizer_of("int8"), tiny.batch(8), meshes.make_mesh({"fsdp": 4, "tensor": 2})
    step = make_step(tiny.plain_apply, sft(), optimizer)
    begin = lambda params: init_state(params, optimizer, jax.random.key(0))
    layout = {
        "embed": meshes.sharding(mesh, ("vocab", "embed")),
        "head": meshes.sharding(mesh, ("embed", "vocab")),
        "bias": meshes.sharding(mesh, ("vocab",)),
    }
    params = tiny.plain_params(V=96 * BLOCK // 24), tiny.plain_params(V=96 * BLOCK // 24, seed=1)  # a head of 4 blocks a row
    alone = [jax.jit(step)(begin(p), batch)[0] for p in params]
    shardings = meshes.optimizer_shardings(mesh, optimizer, jax.eval_shape(lambda: begin(params[0]).opt_state), layout)
    state = begin(params[0]).replace(
        params=jax.device_put(params[0], layout), opt_state=jax.device_put(begin(params[0]).opt_state, shardings)
    )
    moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_blocks) if is_blocks(x)]
    specs = {(x.codes.shape, x.codes.sharding.spec, x.scales.sharding.spec) for x in moments}
    assert len(moments) == 6 and ((8, 1024), layout["head"].spec, layout["head"].spec) in specs
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    after = jax.jit(step)(state, batch)[0]
    jax.tree.map(close, after.params, alone[0].params)
    made = members.over_members(begin, 0, members.AXES)(jax.tree.map(lambda *x: jnp.stack(x), *params))
    every = jax.jit(members.over_members(step, (members.AXES, None), (members.AXES, 0)))(made, batch)[0]
    for k in (0, 1):
        jax.tree.map(lambda x, own, k=k: close(x[k], own), every.params, alone[k].params)


def test_what_cannot_be_in_fewer_bits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optimizer.moments 'int4' is unknown; use float32, bfloat16, int8"):
        compact(optax.adam(1e-3), "int4")
    with pytest.raises(ValueError, match="optimizer.moments is 'int8', but adafactor's second moments .* use float32"):
        optimizer_of("int8", "adafactor")
    file = tmp_path / "own.py"
    code = (runs.REPO / "experiments/dpo_hh.py").read_text()
    file.write_text(code + "\n\nimport optax\n\n\ndef optimizer(config, schedule):\n    return optax.adam(schedule)\n")
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "optimizer.moments": "int8"}
    with pytest.raises(ValueError, match=r"makes its own; let it return alignax.moments.compact\(optimizer, 'int8'\)"):
        prepare(load_experiment(file, [f"{k}={v}" for k, v in fields.items()]))
