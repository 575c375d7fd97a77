"""Averages of the parameters: by hand, in a run, killed and resumed."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from safetensors.numpy import load_file

from alignax import losses
from alignax.averages import averaged, elastic_reset, ema, reset_to_average, swa, sync
from alignax.config import load_experiment
from alignax.overopt import vectors
from alignax.run import checkpoint
from alignax.train import init_state, make_step
from alignax.types import Outputs, TrainState

PATH = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, -1.0], [6.0, 5.0], [8.0, 0.0], [1.0, 3.0]], np.float32)  # params after steps 0 to 5


def walk(rule) -> list[np.ndarray]:
    """The average after each of steps 1 to 5."""
    update, zero = averaged({"a": rule}), jnp.zeros((), jnp.int32)
    state = TrainState(zero, None, None, None, zero, zero, {"a": {"w": jnp.asarray(PATH[0])}})
    out = []
    for step, params in enumerate(PATH[1:], 1):
        state = update(state.replace(step=jnp.int32(step), params={"w": jnp.asarray(params)}))  # type: ignore[attr-defined]
        out.append(np.asarray(state.averages["a"]["w"]))
    return out


def test_ema_by_hand():
    expected = PATH[0]
    for found, params in zip(walk(ema(0.75)), PATH[1:], strict=True):
        expected = 0.75 * expected + 0.25 * params
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(walk(ema(0.0)), PATH[1:])


def test_a_uniform_average_by_hand():
    np.testing.assert_allclose(walk(swa()), [PATH[1 : n + 1].mean(0) for n in range(1, 6)], rtol=1e-6)
    found = walk(swa(start=2, every=2))
    expected = [PATH[0], PATH[2], PATH[2], PATH[[2, 4]].mean(0), PATH[[2, 4]].mean(0)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sync_by_hand():
    half = 0.5 * PATH[2] + 0.5 * PATH[0]
    np.testing.assert_allclose(walk(sync(0.5, every=2)), [PATH[0], half, half, 0.5 * PATH[4] + 0.5 * half, 0.5 * PATH[4] + 0.5 * half])
    np.testing.assert_array_equal(walk(sync(1.0, every=3)), PATH[[0, 0, 3, 3, 3]])  # the hard update is the policy bit for bit


def drifting(rules, steps: int) -> list[tuple[float, float]]:
    """The parameter and its average after each step of a policy that moves by 1 a step from 5, with a critic that moves likewise."""
    update, zero = averaged(rules), jnp.zeros((), jnp.int32)
    start = {"w": jnp.float32(5), "value": jnp.float32(5), "critic": {"layers": {"q": jnp.float32(5)}}}
    state = TrainState(zero, start, {"moment": jnp.float32(3)}, None, zero, zero, dict.fromkeys(rules, start))
    out = []
    for step in range(1, steps + 1):
        moved = jax.tree.map(lambda x: x + 1, state.params)
        state = update(state.replace(step=jnp.int32(step), params=moved))  # type: ignore[attr-defined]
        out.append((float(state.params["w"]), float(state.averages["ema"]["w"])))
    assert state.opt_state == {"moment": 3}, "moments stay"
    assert float(state.params["value"]) == 5 + steps, "a critic's head stays"
    assert float(state.params["critic"]["layers"]["q"]) == 5 + steps, "and so does a critic of its own tree"
    assert all(float(state.averages[name]["w"]) == 5 for name in rules if name == "initial")
    return out


def test_an_elastic_reset_by_hand():
    found = drifting(elastic_reset(0.5, every=3), 6)
    expected, w, average = [], 5.0, 5.0
    for step in range(1, 7):
        w += 1
        average = 0.5 * average + 0.5 * w
        if step % 3 == 0:
            w, average = average, 5.0
        expected.append((w, average))
    assert found == expected and found[2] == (7.125, 5.0)


def test_elastic_resets_at_the_ends_of_their_range():
    assert drifting(elastic_reset(0.0, every=2), 5) == [
        (6, 6),
        (7, 5),
        (8, 8),
        (9, 5),
        (10, 10),
    ]  # the average is the policy: nothing is reset
    assert drifting(elastic_reset(1.0, every=2), 5) == [(6, 5), (5, 5), (6, 5), (5, 5), (6, 5)]  # back to where it began
    assert drifting({"ema": reset_to_average(1.0, every=2)}, 3) == [(6, 5), (5, 5), (6, 5)]
    kept = drifting({"ema": reset_to_average(0.5, every=2)}, 4)
    assert kept == [(6, 5.5), (6.25, 6.25), (7.25, 6.75), (7.5, 7.5)], "without a second half the average goes on from there"


@pytest.mark.parametrize("decay, every, share", [(0.995, 17, 0.0817), (0.995, 1040, 0.9946)])
def test_how_much_a_reset_keeps(decay, every, share):
    """The parameters jump once and stay; a reset leaves 1 - decay^every of the jump."""
    update = averaged(elastic_reset(decay, every))
    zero, start = jnp.zeros((), jnp.int32), {"w": jnp.float32(0)}
    state = TrainState(zero, {"w": jnp.float32(1)}, None, None, zero, zero, {"ema": start, "initial": start})
    state = jax.jit(lambda s: jax.lax.fori_loop(1, every + 1, lambda i, s: update(s.replace(step=i)), s))(state)
    assert float(state.params["w"]) == pytest.approx(1 - decay**every, rel=1e-3)
    assert float(state.params["w"]) == pytest.approx(share, abs=1e-4)
    assert float(state.averages["ema"]["w"]) == 0


def test_a_reset_goes_on_from_a_checkpoint(tmp_path):
    rules = elastic_reset(0.5, every=4)
    update = averaged(rules)
    start = {"w": jnp.arange(3.0)}
    blank = init_state(start, optax.adam(0.1), jax.random.key(0), dict.fromkeys(rules, start))
    step = make_step(
        lambda params, batch: Outputs(params["w"][batch["tokens"]], params["w"][batch["tokens"]]), losses.sft(), optax.adam(0.1)
    )
    batch = {"tokens": jnp.array([[[0, 1]]]), "completion_mask": jnp.ones((1, 1, 2), bool)}
    one = jax.jit(lambda state: update(step(state, batch)[0]))
    states = [blank]
    for _ in range(5):
        states.append(one(states[-1]))
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(states[3], {}, {})
    saver.close()
    restored = one(checkpoint.Checkpoints(tmp_path).restore(3, blank))
    bare = lambda state: state.replace(key=jax.random.key_data(state.key))  # type: ignore[attr-defined]
    jax.tree.map(np.testing.assert_array_equal, bare(restored), bare(states[4]))
    np.testing.assert_array_equal(restored.averages["ema"]["w"], start["w"])
    jax.tree.map(np.testing.assert_array_equal, bare(one(restored)), bare(states[5]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ema(1.0), "decay is 1.0"),
        (lambda: sync(0.0), "alpha is 0.0"),
        (lambda: sync(0.6, 0), "every is 0"),
        (lambda: swa(0, -1), "every is -1"),
        (lambda: elastic_reset(1.5), "decay is 1.5"),
        (lambda: reset_to_average(0.9, 0), "every is 0"),
        (lambda: elastic_reset(0.9, name="initial"), "choose another name"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


EXPERIMENT = """
from alignax import chain, dpo, ema, logps, sync
from experiments.dpo_hh import get_config

def loss(config):
    return dpo(0.1)

def experience(config, reference):
    return chain(logps("ref_logps", reference))

def averages(config):
    return {"ema": ema(0.5), "reference": sync(1.0, every=4)}
"""


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "tr_dpo.py").write_text(EXPERIMENT)
    fields = runs.world(folder) | {"export.params": "ema", "export.final": True, "steps": 9}

    def make(workdir, **more):
        given = fields | more | {"workdir": workdir}
        return ["train", "--config", str(folder / "tr_dpo.py"), *(f"--config.{k}={v}" for k, v in given.items())]

    return make


@pytest.fixture(scope="module")
def whole(args, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(runs.begin(args(workdir)))
    return workdir


@pytest.mark.slow
def test_a_moving_reference_and_an_exported_average(whole):
    drift = {step: row["logps/chosen_drift"] for step, row in runs.losses(whole).items()}
    # The reference is the policy after steps 4 and 8, so the steps after those start from no drift at all.
    assert all(abs(drift[step]) < 1e-5 for step in (1, 5, 9)) and all(abs(drift[step]) > 1e-4 for step in (3, 4, 7, 8))
    exported, policy = load_file(whole / "export" / "model.safetensors"), runs.final_params(whole, "--config.export.params=policy")
    assert any(not np.array_equal(exported[name], policy[name]) for name in policy), "the export is the average, not the policy"


@pytest.mark.long
@pytest.mark.slow
def test_averages_of_a_run_that_is_killed(args, whole, tmp_path):
    killed = tmp_path / "killed"
    process = runs.begin(args(killed))
    done = lambda: (killed / "metrics.jsonl").exists() and len(runs.losses(killed)) >= 5
    assert runs.stop_when(process, done, signal.SIGKILL)
    process.communicate()
    runs.finish(runs.begin(args(killed)))
    assert runs.losses(whole) == runs.losses(killed)
    a, b = (load_file(workdir / "export" / "model.safetensors") for workdir in (whole, killed))
    average = runs.final_params(killed)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_array_equal(a[name], average[name])
    # Evaluating the average scores other numbers than the policy's own.
    out = runs.finish(runs.begin(["eval", str(whole), "--config.eval.params=ema"]))
    own = runs.finish(runs.begin(["eval", str(whole)]))
    assert out.split("loss")[1] != own.split("loss")[1]


@pytest.mark.slow
def test_an_average_that_is_not_there(args, tmp_path):
    out = runs.finish(runs.begin(args(tmp_path / "run", **{"export.params": "swa"})), code=2)
    assert "config field 'export.params' is 'swa'; this experiment has policy, ema" in out


@functools.cache
def ascent(every: int = 67, steps: int = 134) -> list[np.ndarray]:
    """A policy that climbs a proxy exactly, with elastic resets: proxy, KL and gold [seeds, steps, 3], before and after resets."""
    own = load_experiment(runs.REPO / "experiments" / "overoptimization.py", ("proxy.members=1", "proxy.steps=300"))
    config, world, count, optimizer = own.config, own.config.world, 1000, optax.adam(3e-3)
    keys, golds = vectors.make_golds(range(3), world)
    update = averaged(rules := elastic_reset(0.99, every))

    def climb(gold, keys):
        pairs = vectors.ordered(gold, vectors.draw(keys[1], (world.pairs, 2), world), world)
        member = jax.tree.map(lambda x: x[0], vectors.train_members(config, own.loss(config), keys[2], keys[3], pairs).params)
        pool = vectors.draw(keys[4], (count,), world)
        proxy, true = ((x - x.mean()) / x.std() for x in (vectors.network(member, pool), vectors.rewards(gold, pool, world)))
        batch = {"tokens": jnp.arange(count)[:, None, None], "completion_mask": jnp.ones((count, 1, 1), bool), "proxy": proxy}
        expected = losses.make_loss("ascent", lambda out, batch: (-count * jnp.exp(out.logps[:, 0, 0]) * batch["proxy"], {}))
        step = make_step(functools.partial(vectors.policy, pool), expected, optimizer)

        def measured(params):
            log_probs = jax.nn.log_softmax(vectors.network(params, pool))
            return jnp.exp(log_probs) @ jnp.stack([proxy, log_probs + np.log(count), true], axis=1)

        def one(state, _):
            before, _ = step(state, batch)
            after = update(before)
            return after, (measured(before.params), measured(after.params))

        initial = vectors.init_network(keys[5], pool.shape[1], 0.0)
        state = init_state(initial, optimizer, keys[5], dict.fromkeys(rules, initial))
        return jax.lax.scan(one, state, length=steps)[1]

    return [np.asarray(x) for x in jax.jit(jax.vmap(climb))(golds, keys)]


@pytest.mark.slow
def test_resets_reach_the_same_proxy_at_less_kl():
    """The first stretch is plain ascent, which ends with all of the policy on what its proxy overrates."""
    before, after = ascent()
    resets = [66, 133]
    proxy, kl, gold = (before[:, resets, i] - after[:, resets, i] for i in range(3))
    assert (proxy > 0.5).all() and (kl > 5).all()
    assert gold.mean(axis=0).max() < -0.1, "gold after a reset is above gold before it"
    assert (after[:, 133, 0] - after[:, 66, 0] > 0.1).all(), "what is left after a reset grows from one to the next"
    plain, elastic = before[:, :67], np.concatenate([after[:, 66:67], before[:, 67:]], axis=1)
    needed = lambda path: np.array([np.interp(1.0, own[:, 0], own[:, 1]) for own in path])
    assert (needed(elastic) < needed(plain) - 0.02).all(), "KL at a proxy of 1"
