"""Online methods in the world of vectors: what is measured is exact, and what the papers say of them holds over seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from alignax import config, losses
from alignax.config import BadInput
from alignax.experience import ensembles
from alignax.overopt import laboratory, online, results, vectors
from alignax.overopt.worlds import Method, Optimum
from alignax.train import init_state, make_step
from alignax.types import Model

FILE = runs.REPO / "experiments" / "overoptimization.py"
SMALL = ("online.pool=2000", "proxy.members=1", "online.rollouts=60")
WIDE = ("online.rollouts=200",)


@functools.cache
def experiment(*overrides: str):
    return config.load_experiment(FILE, overrides)


@functools.cache
def methods(*overrides: str) -> list[Method | Optimum]:
    """The methods of the experiment file."""
    names = experiment(*overrides).loss.__globals__
    own = experiment(*overrides).config
    return [method for part in ("policy_gradients", "towards_targets", "optima") for method in names[part](own)]


@functools.cache
def laboratory_of(*overrides: str):
    own = experiment(*overrides)
    return online.online(own.config, own.loss(own.config))


@functools.cache
def trained(seeds: int, family: str, objective: str, coefficients: tuple, *overrides: str) -> list[dict[str, np.ndarray]]:
    """The results for each coefficient: quantity -> [seeds, E]."""
    (method,) = (own for own in methods(*overrides) if isinstance(own, Method) and (own.family, own.objective) == (family, objective))
    method = method._replace(coefficients=coefficients)
    found = laboratory_of(*overrides).learn(range(seeds), method)
    return [{name: np.stack([own.values[name] for own in each]) for name in each[0].values} for each in found]


@functools.cache
def solved(seeds: int, objective: str, setting: str, *overrides: str) -> dict[str, np.ndarray]:
    """Quantity -> [seeds, coefficients]."""
    keep = lambda own: isinstance(own, Optimum) and (own.family, own.objective, own.setting) == ("Optima", objective, setting)
    (own,) = filter(keep, methods(*overrides))
    found = laboratory_of(*overrides).solve(range(seeds), own)
    return {name: np.stack([x.values[name] for x in found]) for name in found[0].values}


def gold_at(run: dict[str, np.ndarray], kl: float) -> float:
    """Gold reward where a policy first comes so far, mean over seeds; interpolated."""
    return float(np.mean([np.interp(kl, np.maximum.accumulate(d), gold) for d, gold in zip(run["kl"], run["gold"], strict=True)]))


def mean(run: dict[str, np.ndarray], quantity: str) -> np.ndarray:
    return run[quantity].mean(axis=0)


# What is exact --------------------------------------------------------------------------------------------------------------


def test_what_a_policy_is_worth_by_hand():
    p, gold = jnp.array([0.5, 0.5, 0.0, 0.0]), jnp.array([1.0, -2.0, 3.0, 4.0])
    scores = jnp.array([[1.0, 2.0, 0.0, 9.0], [3.0, 2.0, 0.0, 9.0]])
    method = Method("f", "o", ensembles.wco, lambda _: losses.rloo(), lambda _, r, e: lambda batch: batch, over_steps=("score 2",))
    found = {name: float(x) for name, x in online.measured(p, gold, scores, method).items()}
    assert found == pytest.approx({"gold": -0.5, "kl": np.log(2), "proxy": 1.5, "disagreement": 0.5, "score 2": 2.5})
    batch = {"tokens": jnp.array([[[1], [3]]]), "completion_mask": jnp.ones((1, 2, 1), bool)}
    assert online.table(scores, batch).scores.tolist() == [[[2.0, 2.0], [9.0, 9.0]]]
    assert online.uniform(jnp.float32(4), batch).logps.ravel().tolist() == pytest.approx([-np.log(4)] * 2)


REWARD = jnp.array([-1.0, 0.3, 0.9, 2.0])


@pytest.mark.parametrize("coefficient", [0.05, 0.5, 3.0])
def test_optima_are_optima(coefficient):
    """No other distribution does better: the optimum against many others, near it and far."""
    rng = np.random.default_rng(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        penalties = {
            online.kl_optimum: lambda p: np.where(p > 0, p * np.log(4 * p), 0.0).sum(axis=-1),
            online.chi2_optimum: lambda p: 4 * np.square(p).sum(axis=-1) - 1,
        }
        for optimum, penalty in penalties.items():
            worth = lambda p, penalty=penalty: p @ np.asarray(REWARD, np.float64) - coefficient * penalty(p)
            best = np.asarray(optimum(REWARD, coefficient), np.float64)
            assert best.min() >= 0 and best.sum() == pytest.approx(1.0, abs=1e-6)
            others = rng.dirichlet(np.ones(4), 2000)
            near = best + 0.05 * (others - best)
            assert worth(best) >= max(worth(others).max(), worth(near).max()) - 1e-6
    value = coefficient * np.log(np.mean(np.exp(np.asarray(REWARD, np.float64) / coefficient)))
    p = np.asarray(online.kl_optimum(REWARD, coefficient), np.float64)
    assert p @ np.asarray(REWARD) - coefficient * (p * np.log(4 * np.maximum(p, 1e-30))).sum() == pytest.approx(value, abs=1e-5)


def test_chi_squared_leaves_out_what_the_kl_makes_rare():
    assert (np.asarray(online.chi2_optimum(REWARD, 0.2)) > 0).tolist() == [False, False, True, True]
    assert (np.asarray(online.kl_optimum(REWARD, 0.2)) > 0).all()
    np.testing.assert_allclose(online.chi2_optimum(REWARD, 1e4), 0.25, atol=1e-4)
    np.testing.assert_allclose(online.chi2_optimum(REWARD, 1e-4), [0, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("online.samples=1", "'online.samples' is 1; it must be in 2 ..."),
        ("online.batch_size=63", r"online.batch_size is 63, not a multiple of online.minibatches \(2\)"),
        ("online.rollouts=201", r"online.rollouts is 201, not a multiple of online.every \(5\)"),
        ("online.pool=1", "'online.pool' is 1"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(override, message):
    with pytest.raises(BadInput, match=message):
        laboratory_of(override)


def test_every_method_is_made_of_the_librarys_parts():
    """Names of families, objectives and members; each loss has terms and each experience writes what that loss reads."""
    own = experiment().config
    assert {method.family for method in methods()} == set(own.online.families)
    batch = {"tokens": jnp.zeros((2, 4, 1), jnp.int32), "completion_mask": jnp.ones((2, 4, 1), bool)}
    batch |= {name: jnp.zeros((2, 4, 1)) for name in ("old_logps", "sampled_logps")}

    def written(method: Method, coefficient: jax.Array):
        ensemble = Model(online.table, jnp.ones((method.members or 5, 9)))
        values = {"values": jnp.zeros((2, 4, 1))} if method.critic else {}
        return method.experience(coefficient, Model(online.uniform, jnp.float32(9)), ensemble)(batch | values)

    for method in methods():
        if isinstance(method, Method):
            fields = jax.eval_shape(functools.partial(written, method), 0.5)
            assert "advantages" in fields or "log_target" in fields, method.family
            assert method.loss(0.5).terms


# What the papers say --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_single_proxy_is_overoptimised_and_a_kl_penalty_stops_early():
    """Gao et al. 2022, section 3.6: the penalty does not change where gold is at a KL, only how far the policy goes."""
    free, held = trained(3, "PPO", "single", (0.0, 1.0), *SMALL)
    gold, proxy, kl = (mean(free, name) for name in ("gold", "proxy", "kl"))
    assert abs(gold[0]) < 1e-4 and abs(kl[0]) < 1e-4, "starts from the initial policy"
    assert gold.max() > 0.2 and gold[-1] < gold.max() - 0.5, "rises, and falls far below"
    assert proxy[-1] > proxy[gold.argmax()] + 0.5, "what is trained rises all the while"
    assert mean(held, "kl")[-1] < 1.5 < kl[-1] and mean(held, "gold")[-1] > gold[-1] + 0.5
    assert abs(gold_at(free, 0.25) - gold_at(held, 0.25)) < 0.1


@pytest.mark.slow
def test_chi_squared_reaches_more_gold_than_the_kl():
    """Laidlaw et al. 2024, of exact optima; against one reward model, the best of their coefficients, mean over seeds."""
    best = {setting: mean(solved(3, "single", setting, *SMALL), "gold").max() for setting in ("KL", "chi-squared")}
    assert best["chi-squared"] - best["KL"] > 0.2


@functools.cache
def ascent(seeds: int, beta: float) -> dict[str, np.ndarray]:
    """Exact ascent of E r - beta KL on a single reward model, without samples: quantity -> [seeds, steps]."""
    own = experiment("proxy.members=1")
    keys, pools = online.make_pools(own.config, own.loss(own.config), range(seeds))

    def climb(key, pool):
        count = pool.gold.size
        batch = {"tokens": jnp.arange(count)[:, None, None], "completion_mask": jnp.ones((count, 1, 1), bool), "reward": pool.scores[0]}

        def value(out, batch):
            log_p = out.logps[:, 0, 0]
            return -count * jnp.exp(log_p) * (batch["reward"] - beta * (log_p + np.log(count))), {}

        step = make_step(functools.partial(vectors.policy, pool.vectors), losses.make_loss("ascent", value), optax.adam(1e-3))

        def one(state, _):
            p = jax.nn.softmax(vectors.network(state.params, pool.vectors))
            at = Optimum("", "", "", ensembles.mean, online.kl_optimum, ())
            return step(state, batch)[0], online.measured(p, pool.gold, pool.scores, at)

        initial = vectors.init_network(key[5], pool.vectors.shape[1], 0.0)
        return jax.lax.scan(one, init_state(initial, optax.adam(1e-3), key[5]), length=200)[1]

    return {name: np.asarray(x) for name, x in jax.jit(jax.vmap(climb))(keys, pools).items()}


@pytest.mark.slow
def test_a_kl_penalty_is_early_stopping():
    """The curves of gold against KL with and without the penalty are equal without sampling, and nearly equal with it."""
    exact, sampled = [ascent(4, beta) for beta in (0.0, 0.1)], trained(4, "PPO", "single", (0.0, 0.1), *WIDE)
    for kl in (0.25, 0.5, 1.0):
        assert abs(gold_at(exact[0], kl) - gold_at(exact[1], kl)) < 0.02
        assert abs(gold_at(sampled[0], kl) - gold_at(sampled[1], kl)) < 0.05
        assert abs(gold_at(exact[0], kl) - gold_at(sampled[0], kl)) < 0.1, "sampling hardly changes it"
    assert mean(exact[0], "gold")[-1] < -0.9 and mean(sampled[0], "gold")[-1] < -0.9


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("family", ["PPO", "RLOO"])
def test_conservative_ensembles_and_a_small_kl_are_not_overoptimised(family):
    """Coste et al. 2023, section 5: they hold near their peak, where a single reward model needs a larger KL and then gains less."""
    swept = {name: trained(8, family, name, (0.0, 0.3, 1.0), *WIDE) for name in ("single", "WCO", "UWO")}
    gold = {name: [mean(run, "gold") for run in own] for name, own in swept.items()}
    single = gold["single"]
    assert single[0].max() - single[0][-1] > 1.0, "without a KL a single reward model loses everything"
    assert single[1].max() - single[1][-1] > 0.4, "a small one does not hold it"
    assert single[2].max() - single[2][-1] < 0.1, "a large one does"
    for name in ("WCO", "UWO"):
        free, small, _ = gold[name]
        assert small.max() - small[-1] < 0.25, name
        assert small[-1] > free[-1] + 0.2 and small[-1] > free.max() - 0.25, "near the best without a KL, which does not last"
        assert small[-1] > single[2].max() + 0.2, "and more than what a single model gains with the KL that it needs"


@pytest.mark.slow
def test_laws_fit_what_ppo_does():
    """R(d) = d (alpha - beta log d) of the runs whose gold rises and falls, all coefficients together."""
    (method,) = (own for own in methods(*WIDE) if (own.family, own.objective) == ("PPO", "single"))
    m = laboratory.learn("tail", laboratory_of(*WIDE), method, range(8))
    fit = results.fitted(results.curves([m]))["rl"]
    assert fit.r2 > 0.6 and fit.beta > 0 and 0.3 < fit.peak_d < 2.0


@pytest.mark.long
@pytest.mark.slow
def test_training_on_chi_squared_reaches_more_gold_than_on_the_kl():
    """The best of four coefficients each, at the end of training, mean over 8 seeds; a single reward model."""
    kl = trained(8, "RLOO", "single", (0.1, 0.3, 0.5, 1.0), *WIDE)
    chi2 = trained(8, "Chi-squared", "single", (0.02, 0.05, 0.1, 0.3), *WIDE)
    best = [max(mean(run, "gold")[-1] for run in own) for own in (kl, chi2)]
    assert best[1] - best[0] > 0.4


@pytest.mark.slow
def test_f_dpg_goes_to_its_target_by_every_divergence():
    """JS, the paper's default, is there after 400 steps; others are near. The target lies beyond the peak of the way to it."""
    own = next(x for x in methods(*WIDE) if (x.family, x.objective) == ("f-DPG", "target"))
    target = {name: np.mean([x.values[name][0] for x in laboratory_of(*WIDE).solve(range(8), own)]) for name in ("gold", "kl", "proxy")}
    assert target["kl"] > 3 and target["proxy"] > 2.5
    for divergence in ("JS", "forward KL", "reverse KL", "TV"):
        (run,) = trained(8, "f-DPG", divergence, (None,), *WIDE)
        far = {name: abs(mean(run, name)[-1] - target[name]) for name in target}
        near = {"gold": 0.15, "kl": 0.5, "proxy": 0.4} if divergence == "JS" else {"gold": 0.2, "kl": 1.0, "proxy": 0.9}
        assert all(far[name] < near[name] for name in far), (divergence, far)
        assert divergence == "forward KL" or mean(run, "gold").max() > target["gold"] + 0.1, divergence


@pytest.mark.slow
@pytest.mark.parametrize("method", ["xi-PPO", "mu-PPO"])
def test_thresholds_that_both_reward_models_reach_are_held(method):
    """Moskovitz et al. 2023: mean scores over the last quarter of 640 steps, each seed near the threshold, their mean nearer."""
    (run,) = trained(4, "Constraints", method, (0.5,), "online.rollouts=320")
    scores = np.stack([run["score 1"], run["score 2"]])[..., -16:].mean(axis=-1)  # [2, seeds]
    assert np.abs(scores.mean(axis=1) - 0.5).max() < 0.05
    assert np.abs(scores - 0.5).max() < 0.1
    assert run["kl"][:, -16:].mean() < 0.5 and mean(run, "gold")[-16:].mean() > 0.3


@pytest.mark.slow
def test_elastic_resets_undo_drift():
    """Noukhovitch et al. 2023, without a KL penalty; evaluations are 2 steps apart, resets 100."""
    often = (*WIDE, "online.every=1")
    (plain,), (elastic,) = (trained(8, "Elastic Reset", objective, (None,), *often) for objective in ("PPO", "Elastic Reset"))
    resets = np.array([50, 100, 150, 200])
    gold, kl, proxy = (mean(elastic, name) for name in ("gold", "kl", "proxy"))
    assert (gold[resets] > gold[resets - 1]).all() and (kl[resets] < kl[resets - 1] - 2.0).all()
    assert (np.diff(proxy[resets]) > 0).all(), "what is left after a reset grows from one to the next"
    # The KL at which a proxy of 1 is reached, on the way up: from the initial policy, and from what the third reset has left.
    level = lambda run, span: np.mean([np.interp(1.0, p[span], d[span]) for p, d in zip(run["proxy"], run["kl"], strict=True)])
    assert level(elastic, slice(150, 199)) < level(plain, slice(0, 49)) - 0.05
