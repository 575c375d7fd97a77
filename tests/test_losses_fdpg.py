"""f-DPG's divergences and loss: exact on models whose sequences can all be summed, other people's numbers, and the edges."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_enumerable import S, apply, distribution, responses, table

from alignax import losses
from alignax.experience import advance, chain, first_carry, reward_target, running_log_z
from alignax.losses import Loss, alpha_pi_p, chi2_p_pi, chi2_pi_p, fdpg, hellinger_pi_p, js_pi_p, kl_p_pi, kl_pi_p, sequence, tv_pi_p
from alignax.losses.fdpg import FDivergence, Weight, log_importance, log_ratio, pseudo_rewards, target_divergences
from alignax.train import init_state, make_step
from alignax.types import Batch, Outputs

ORACLE = json.loads((Path(__file__).parent / "oracles" / "fdpg.json").read_text())
A = 0.3
DIVERGENCES: dict[str, tuple[FDivergence, object]] = {  # with f(t), as the papers define it
    "kl_p_pi": (kl_p_pi, lambda t: -jnp.log(t)),
    "kl_pi_p": (kl_pi_p, lambda t: t * jnp.log(t)),
    "js": (js_pi_p, lambda t: t * jnp.log(2 * t / (t + 1)) + jnp.log(2 / (t + 1))),
    "tv": (tv_pi_p, lambda t: 0.5 * jnp.abs(t - 1)),
    "hellinger": (hellinger_pi_p, lambda t: (jnp.sqrt(t) - 1) ** 2),
    "chi2_p_pi": (chi2_p_pi, lambda t: (t - 1) ** 2 / t),
    "chi2_pi_p": (chi2_pi_p, lambda t: (t - 1) ** 2),
    "alpha": (alpha_pi_p(A), lambda t: (t**A - A * t - (1 - A)) / (A * (A - 1))),
}
every = pytest.mark.parametrize(
    "name", [n if n in ("js_pi_p", "kl_p_pi") else pytest.param(n, marks=pytest.mark.slow) for n in DIVERGENCES]
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
P = np.random.default_rng(0).dirichlet(np.ones(S))  # the target, normalised
Z = 3.7


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def one_token(logps, **fields) -> tuple[jax.Array, Batch]:
    """Responses of one token behind a prompt of one, from log-probs [B, N]; fields [B, N] of log-probs likewise."""
    column = lambda x: jnp.pad(jnp.asarray(x)[..., None], ((0, 0), (0, 0), (1, 0)))
    spread = lambda name, x: column(x) if name.endswith("_logps") else jnp.asarray(x)
    mask = column(jnp.ones(jnp.shape(logps), bool))
    return column(logps), {"completion_mask": mask} | {name: spread(name, x) for name, x in fields.items()}


def aiming(log_target, log_q) -> Batch:
    """Every sequence once, as responses to one prompt."""
    batch = {k: jnp.swapaxes(x, 0, 1) for k, x in responses(np.arange(S)).items()}  # [1, S, T + 1]
    spread = jnp.where(batch["completion_mask"], jnp.asarray(log_q)[None, :, None] / 3, 0.0)
    batch |= {"sampled_logps": spread, "log_target": jnp.asarray(log_target)[None], "log_z": jnp.log(jnp.asarray([Z]))}
    return batch | {"fdpg_baseline": jnp.zeros(1)}


def expected(loss: Loss, q) -> Loss:
    """The expectation over q of the loss on one response."""
    first, *rest = loss.terms
    return Loss(((first[0], first[1]._replace(over=lambda batch: jnp.asarray(q)[None])), *rest))


@functools.partial(jax.jit, static_argnums=0)
def run(divergence: FDivergence, logps: jax.Array, batch: Batch):
    """Value, metrics and gradient with respect to the token log-probs."""
    weights = (loss := fdpg(divergence)).normalised(batch)
    return jax.value_and_grad(lambda x: loss(Outputs(x, x), batch, weights), has_aux=True)(logps)


# --- the identity that f-DPG is ---


@functools.cache
def sequences() -> tuple[np.ndarray, np.ndarray]:
    """log pi of every sequence [S] of the enumerable model, and its derivative by every parameter [S, parameters], in float64."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), table(0))
    once = responses(np.arange(S))
    logps = lambda params: sequence(apply(params, once).logps, once)[:, 0]
    values, slopes = jax.jit(lambda params: (logps(params), jax.jacobian(logps)(params)))(params)
    return np.asarray(values), np.concatenate([np.reshape(x, (S, -1)) for x in slopes], axis=1)


@every
def test_value_and_gradient_are_those_of_the_divergence(name):
    """Holds for any constant baseline, with samples of the policy or of a proposal; in float64, against autodiff of the exact sum."""
    divergence, f = DIVERGENCES[name]
    with jax.enable_x64(True):
        logps, slopes = sequences()
        exact = lambda logps: jnp.sum(P * f(jnp.exp(logps) / P))

        def estimate(logps, q, baseline):
            out, batch = one_token(logps[None], sampled_logps=jnp.log(q)[None], log_target=np.log(Z * P)[None], log_z=np.log([Z]))
            loss = expected(fdpg(divergence), q)
            return loss(Outputs(out, out), batch | {"fdpg_baseline": baseline[None]}, loss.normalised(batch))[0]

        both = jax.jit(lambda logps, *how: (jax.value_and_grad(exact)(logps), jax.value_and_grad(estimate)(logps, *how)))
        for q in (np.exp(logps), np.random.default_rng(1).dirichlet(np.ones(S))):
            for baseline in (0.0, 1.7):
                (value, grads), (found, found_grads) = both(logps, q, np.float64(baseline))
                np.testing.assert_allclose(found, value, rtol=1e-6)  # weights of averages are float32
                np.testing.assert_allclose(found_grads @ slopes, grads @ slopes, rtol=1e-6, atol=1e-7)
                assert np.abs(grads @ slopes).max() > 1e-3


@every
def test_f_is_0_at_1_and_its_slope_is_its_derivative(name):
    """f(1) = 0 and f >= 0; f' is d f / d t, up to the constant that makes f at least 0."""
    divergence, f = DIVERGENCES[name]
    assert abs(float(f(jnp.float32(1.0)))) < 1e-7
    with jax.enable_x64(True):
        unit = Weight(jnp.zeros((), jnp.float64))
        x = jnp.asarray(np.r_[0.0, 1e-3, np.linspace(-6, 6, 24)], jnp.float64)
        value = lambda x: divergence.value(x, unit) * jnp.exp(x)
        each = lambda x: (value(x), jax.grad(value)(x) * jnp.exp(-x), divergence.slope(x, unit), jax.grad(f)(jnp.exp(x)))
        values, derived, slope, wanted = jax.jit(jax.vmap(each))(x)
        assert values[0] == 0.0 and (values > -1e-15).all()
        constant = {"kl_p_pi": -1.0, "kl_pi_p": 1.0}.get(name, 0.0)
        np.testing.assert_allclose(slope[1:], derived[1:] + constant, rtol=1e-9, atol=1e-9)  # |t - 1| has no derivative at 1
        np.testing.assert_allclose(slope[1:], wanted[1:], rtol=1e-9, atol=1e-9)


def test_js_is_twice_the_jensen_shannon_divergence():
    pi, p = (np.random.default_rng(seed).dirichlet(np.ones(9)) for seed in (1, 2))
    middle = (pi + p) / 2
    jsd = 0.5 * (pi @ np.log(pi / middle)) + 0.5 * (p @ np.log(p / middle))
    found = pi @ np.asarray(js_pi_p.value(jnp.log(pi / p), Weight(jnp.zeros(9))), np.float64)
    np.testing.assert_allclose(found, 2 * jsd, rtol=1e-6)


def test_what_is_measured_are_the_divergences():
    """The estimates use importance sampling from a proposal that is neither the policy nor the target."""
    pi, p, q = (np.random.default_rng(seed).dirichlet(np.ones(9)) for seed in range(3))
    found = {name: q @ np.asarray(x, np.float64) for name, x in target_divergences(jnp.log(pi / p), jnp.log(pi / q)).items()}
    wanted = {"kl_p_pi": p @ np.log(p / pi), "kl_pi_p": pi @ np.log(pi / p), "tv": 0.5 * np.abs(pi - p).sum()}
    assert found.keys() == {f"divergence/{name}" for name in wanted}
    for name, x in wanted.items():
        np.testing.assert_allclose(found[f"divergence/{name}"], x, rtol=1e-5)


def test_total_variation_of_few_samples_and_a_poor_z_is_at_most_1():
    ratio = jnp.clip(50.0 * jax.random.normal(jax.random.key(0), (100,)) - 40.0, -1000.0, 1000.0)
    tv = target_divergences(ratio, jnp.zeros(100))["divergence/tv"]
    assert ((tv >= 0) & (tv <= 1)).all() and 0 < tv.mean() < 1


@pytest.mark.parametrize(
    ("alpha", "limit", "scale", "constant"),
    [
        (1 - 1e-5, kl_pi_p, 1.0, 1.0), (1 + 1e-5, kl_pi_p, 1.0, 1.0), (1e-5, kl_p_pi, 1.0, -1.0), (-1e-5, kl_p_pi, 1.0, -1.0),
        (1, kl_pi_p, 1.0, 0.0), (0, kl_p_pi, 1.0, 0.0), (0.5, hellinger_pi_p, 2.0, 0.0), (2, chi2_pi_p, 0.5, 0.0),
        (-1, chi2_p_pi, 0.5, 0.0),
    ],
)  # fmt: skip
def test_alpha_between_and_beyond_the_two_kls(alpha, limit, scale, constant):
    """The check runs in float32, also at both limits; f' may differ by the constant that makes f at least 0."""
    x, unit = jnp.linspace(-3.0, 3.0, 13), Weight(jnp.zeros(13))
    found = alpha_pi_p(alpha)
    np.testing.assert_allclose(found.slope(x, unit) + constant, scale * limit.slope(x, unit), rtol=2e-4, atol=2e-4)
    if abs(alpha) > 1e-3:  # near 0 the value is a difference divided by alpha
        np.testing.assert_allclose(found.value(x, unit), scale * limit.value(x, unit), rtol=2e-4, atol=2e-4)


# --- numbers of others ---

aimed_at = jax.jit(advance)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda c: f"{c['divergence']}-{c['beta']}")
def test_estimates_are_those_of_the_formulas(case):
    names = {"forward_kl": "kl_p_pi", "reverse_kl": "kl_pi_p", "total_variation": "tv", "jensen_shannon": "js"}
    divergence = DIVERGENCES[names.get(case["divergence"], case["divergence"])][0]
    given = {k: np.asarray(x, np.float32)[None] for k, x in ORACLE["inputs"].items()}
    logps, batch = one_token(
        given["policy_logps"], ref_logps=given["ref_logps"], sampled_logps=given["proposal_logps"], rewards=given["rewards"]
    )
    experience = chain(reward_target(case["beta"]), running_log_z())
    batch = aimed_at(experience, first_carry(experience), batch)[1] | {"fdpg_baseline": jnp.zeros(1)}
    policy = logps[..., 1]
    close = lambda found, wanted: np.testing.assert_allclose(np.squeeze(found), wanted, rtol=2e-5, atol=1e-5)
    close(batch["log_z"], case["log_z"])
    close(log_ratio(policy, batch), case["log_t"])
    close(pseudo_rewards(divergence, log_ratio(policy, batch)), case["pseudo_reward"])
    close(jnp.exp(log_importance(policy, batch)), case["importance_weight"])
    close(run(divergence, logps, batch)[1][..., 1], case["grads"])


# --- edges ---


@every
def test_log_ratios_of_a_thousand_nats_and_targets_of_0(name):
    """Policy, proposal and target take extreme values in any combination, in float32."""
    nats = [-1001.0, -1.0]
    pi, q, p = (x.reshape(-1, 1) for x in np.meshgrid(nats, nats, [-np.inf, *nats, 999.0], indexing="ij"))
    logps, batch = one_token(pi.astype(np.float32), sampled_logps=q.astype(np.float32), log_target=p.astype(np.float32))
    batch |= {"log_z": jnp.zeros(16), "fdpg_baseline": jnp.full(16, np.float32(0.3))}
    (value, metrics), grads = run(DIVERGENCES[name][0], logps, batch)
    assert np.isfinite(value) and np.isfinite(grads).all() and np.isfinite(list(metrics.values())).all()
    assert np.any(grads)
    np.testing.assert_allclose(metrics["satisfied"], 0.75)


def test_pseudo_rewards_of_a_response_that_the_target_never_gives():
    logps, batch = one_token(np.full((1, 1), -3.0, np.float32), log_target=np.full((1, 1), -np.inf, np.float32), log_z=np.zeros(1))
    ratio = log_ratio(sequence(logps, batch), batch)
    found = {name: float(pseudo_rewards(d, ratio)[0, 0]) for name, (d, _) in DIVERGENCES.items()}
    bounded = {"kl_p_pi": 0.0, "js": -math.log(2), "tv": -0.5, "hellinger": -1.0, "chi2_p_pi": -1.0, "alpha": 1 / (A - 1)}
    for name, reward in bounded.items():
        np.testing.assert_allclose(found[name], reward, rtol=1e-6)
    assert found["kl_pi_p"] == -1001.0 and found["chi2_pi_p"] < -1e15


def test_the_forward_kls_push_does_not_depend_on_the_policy():
    """P / (Z q), also where the policy has lost the response altogether: in products of exponentials it would be 0 times infinity."""
    for pi in (-1.0, -20.0, -200.0):
        logps, batch = one_token(np.full((1, 1), pi, np.float32), sampled_logps=np.full((1, 1), -2.0), log_target=np.full((1, 1), -1.5))
        batch |= {"log_z": jnp.full(1, 0.7), "fdpg_baseline": jnp.zeros(1)}
        np.testing.assert_allclose(run(kl_p_pi, logps, batch)[1][0, 0, 1], -math.exp(-1.5 - 0.7 + 2.0), rtol=1e-5)


@every
def test_a_response_as_good_as_the_baseline_is_not_pushed(name):
    """A better one is made likelier, a worse one less likely, in proportion to its importance weight."""
    x = np.linspace(-0.8, 0.7, 16, dtype=np.float32)[:, None]  # log t, from better than the fifth to worse
    same = lambda y: np.full((16, 1), y, np.float32)
    logps, batch = one_token(same(-2.0), sampled_logps=same(-2.5), log_target=-2.0 - x, log_z=np.zeros(16, np.float32))
    rewards = pseudo_rewards(DIVERGENCES[name][0], log_ratio(logps[..., 1], batch))
    _, grads = run(DIVERGENCES[name][0], logps, batch | {"fdpg_baseline": jnp.broadcast_to(rewards[4], 16)})
    np.testing.assert_allclose(grads[..., 1], -math.exp(0.5) * (rewards - rewards[4, 0]) / 16, rtol=1e-5, atol=1e-7)
    assert grads[15, 0, 1] > 0.02 and abs(float(grads[4, 0, 1])) < 1e-6 and (grads[0, 0, 1] < -0.02 or name == "tv")


@pytest.mark.slow
def test_prompts_without_a_target_are_skipped_and_counted():
    """The loss and the gradient are those of the other prompts, in whatever parts."""
    logps, q, p = (jnp.asarray(normal(4, 3, seed=seed), jnp.float32) for seed in range(3))
    logps, batch = one_token(logps, sampled_logps=q, log_target=p.at[1].set(-jnp.inf))
    batch |= {"log_z": jnp.array([0.3, -jnp.inf, 0.1, 0.2]), "fdpg_baseline": jnp.full(4, -0.2)}
    rest = np.array([0, 2, 3])
    (value, metrics), grads = run(js_pi_p, logps, batch)
    (wanted, others), wanted_grads = run(js_pi_p, logps[rest], {k: x[rest] for k, x in batch.items()})
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(grads[rest], wanted_grads, rtol=1e-6)
    assert not np.any(grads[1])
    assert metrics.pop("loss/fdpg_skipped") == 0.25 and others.pop("loss/fdpg_skipped") == 0.0
    for name, x in metrics.items():
        np.testing.assert_allclose(x, others[name], rtol=1e-5)
    assert metrics["satisfied"] == 1.0
    (value, _), _ = run(js_pi_p, logps, batch | {"log_z": batch["log_z"].at[0].set(jnp.nan)})
    assert np.isnan(value), "a Z that is no number stops the step"


def test_what_is_missing_or_mistaken_is_named():
    with pytest.raises(ValueError, match="takes an FDivergence, not .*jensen_shannon"):
        fdpg(losses.jensen_shannon)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha is nan; it must be finite"):
        alpha_pi_p(math.nan)
    logps, batch = one_token(np.zeros((1, 1), np.float32), log_z=np.zeros(1))
    weights = fdpg().normalised(batch)
    for name in ("log_target", "sampled_logps", "fdpg_baseline"):
        with pytest.raises(ValueError, match=f'no "{name}"'):
            fdpg()(Outputs(logps, logps), batch, weights)
        batch[name] = jnp.zeros(1) if name == "fdpg_baseline" else logps if name == "sampled_logps" else logps[..., 1]
    del batch["log_z"]
    with pytest.raises(ValueError, match=r'no "log_z".*running_log_z\(\)'):
        fdpg().normalised(batch)


# --- where it leads ---


def descend(divergence: FDivergence, params, apply, batch: Batch, steps: int = 1500, rate: float = 0.05):
    """Adam on the exact divergence: every sequence once, under a uniform proposal, through the shared step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = make_step(apply, fdpg(divergence), optimizer)
    start = init_state(params, optimizer, jax.random.key(0))
    state, metrics = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, batch), state, length=steps))(start)
    assert state.skipped == 0
    return state.params, metrics


@pytest.mark.slow
def test_the_reverse_kl_to_a_rewards_target_is_rlhf():
    """grad (E r - beta KL(pi || a)) is -beta grad KL(pi || p); the optimum is a exp(r / beta) / Z, of value beta log Z."""
    beta, r, a = 0.5, normal(S, seed=3), distribution(table(1))
    log_target = a + r / beta
    log_z = np.logaddexp.reduce(log_target)

    # Z need not be known: in the reverse KL's gradient it is a baseline.
    with jax.enable_x64(True):
        logps, slopes = sequences()
        out, batch = one_token(logps[None], sampled_logps=logps[None], log_target=log_target[None], log_z=[0.0], fdpg_baseline=[0.0])
        loss = expected(fdpg(kl_pi_p), np.exp(logps))
        estimate = lambda out: loss(Outputs(out, out), batch, loss.normalised(batch))[0]
        value = lambda logps: jnp.exp(logps) @ (r - beta * (logps - a))
        grads, wanted = jax.jit(lambda out, logps: (jax.grad(estimate)(out), jax.grad(value)(logps)))(out, logps)
        np.testing.assert_allclose(beta * grads[0, :, 1] @ slopes, -wanted @ slopes, atol=1e-6)

    params, _ = descend(kl_pi_p, table(1), apply, aiming(log_target, np.full(S, -np.log(S))))
    found, target = distribution(params), np.exp(log_target - log_z)
    assert 0.5 * np.abs(np.exp(a) - target).sum() > 0.1
    assert 0.5 * np.abs(np.exp(found) - target).sum() < 1e-3
    np.testing.assert_allclose(np.exp(found) @ (r - beta * (found - a)), beta * log_z, atol=1e-4)


def two_coins(params, batch: Batch) -> Outputs:
    """Tokens that know nothing of each other: no product of two coins is the target below."""
    y = batch["tokens"][:, :, 1:]
    ones, zeros = jax.nn.log_sigmoid(params), jax.nn.log_sigmoid(-params)
    logps = jnp.where(y == 1, ones[None, None], zeros[None, None])
    logps = jnp.pad(logps, ((0, 0), (0, 0), (1, 0)))
    return Outputs(logps, jnp.zeros_like(logps))


@pytest.mark.parametrize(
    ("name", "coins", "on_support"),
    [
        ("kl_p_pi", [0.5, 0.5], 0.5), ("kl_pi_p", [0.003, 0.003], 0.994), slow("js", [0.5, 0.5], 0.5),
        slow("hellinger", [0.5, 0.5], 0.5), slow("tv", [0.293, 0.293], 0.586),
    ],
)  # fmt: skip
def test_modes_are_covered_or_sought(name, coins, on_support):
    """The target is 00 or 11: the best product of two coins covers both, or settles on one."""
    eps = 1e-3
    batch = {"tokens": jnp.array([[[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]])}
    batch["completion_mask"] = jnp.ones((1, 4, 3), bool).at[:, :, 0].set(False)
    batch["sampled_logps"] = jnp.where(batch["completion_mask"], -math.log(2.0), 0.0)
    batch |= {"log_target": jnp.log(jnp.array([[0.5 - eps, eps, eps, 0.5 - eps]])), "log_z": jnp.zeros(1), "fdpg_baseline": jnp.zeros(1)}
    params, _ = descend(DIVERGENCES[name][0], jnp.array([-0.9, -0.7]), two_coins, batch, rate=0.05)
    a, b = found = np.asarray(jax.nn.sigmoid(params))
    np.testing.assert_allclose(found, coins, atol=0.005)
    np.testing.assert_allclose(a * b + (1 - a) * (1 - b), on_support, atol=0.005)
