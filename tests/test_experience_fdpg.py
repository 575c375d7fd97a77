"""Targets and state of f-DPG: moments, log Z, baseline, proposals; and training on samples that reaches the target."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from alignax.averages import averaged, still
from alignax.experience import (
    adopt_if_better,
    advance,
    boolean_target,
    chain,
    exponential_target,
    first_carry,
    fit_moments,
    proposal_evidence,
    reward_target,
    running_baseline,
    running_log_z,
)
from alignax.losses import fdpg, hellinger_pi_p, js_pi_p, kl_p_pi, tv_pi_p
from alignax.train import init_state, make_step
from alignax.types import Batch, Outputs, TrainState

M = 64  # sequences of one token
RNG = np.random.default_rng(0)
BASE = np.exp(BASE_LOGITS := RNG.normal(size=M)) / np.exp(BASE_LOGITS).sum()
ALLOWED = np.isin(np.arange(M), RNG.choice(M, 6, replace=False))
Z = BASE[ALLOWED].sum()
TARGET = np.where(ALLOWED, BASE / Z, 0.0)
LOG_TARGET = np.where(ALLOWED, np.log(BASE), -np.inf)  # not normalised


def column(x) -> jax.Array:
    """Log-probs of whole responses [B, N] as those of one token behind a prompt of one: [B, N, 2]."""
    return jnp.pad(jnp.asarray(x, jnp.float32)[..., None], ((0, 0), (0, 0), (1, 0)))


def rows(log_target, sampled, **fields) -> Batch:
    """Responses [B, N] of one token."""
    real = jnp.ones(np.shape(log_target), bool)
    mask = jnp.stack([~real, real], axis=-1)
    batch = {"completion_mask": mask, "log_target": jnp.asarray(log_target, jnp.float32), "sampled_logps": column(sampled)}
    return batch | {name: jnp.asarray(x) for name, x in fields.items()}


def without(batch: Batch, b: int, n: int | slice = slice(None)) -> Batch:
    return batch | {"completion_mask": batch["completion_mask"].at[b, n].set(False)}


def written(experience, batch: Batch, carry=None):
    """Carry and batch, jitted."""
    carry = first_carry(experience) if carry is None else carry
    return jax.jit(advance)(experience, carry, batch)[:2]


# --- targets ---


def test_targets_by_hand():
    """The base's log-probs, and what is asked for; a response whose reward is missing has no scored token, and counts for nothing."""
    batch = {"completion_mask": jnp.ones((1, 3, 3), bool).at[:, :, 0].set(False).at[0, 2].set(False)}
    batch |= {"ref_logps": jnp.array([[[9.0, -1.0, -2.0], [9.0, -0.5, -0.25], [9.0, -1.0, -1.0]]])}
    batch |= {"rewards": jnp.array([[1.0, 0.0, jnp.nan]]), "scores": jnp.array([[[1.0, 2.0], [0.0, -1.0], [jnp.nan, 1.0]]])}
    target = lambda experience: experience(batch)["log_target"][0].tolist()
    assert target(boolean_target()) == [-3.0, -math.inf, 0.0]
    assert target(reward_target(0.5)) == [-1.0, -0.75, 0.0]
    assert target(exponential_target([0.5, 2.0])) == [1.5, -2.75, 0.0]
    assert target(exponential_target([np.inf, 2.0])) == [1.0, -math.inf, 0.0]
    with pytest.raises(ValueError, match=r"coefficients of shape \(3,\) for 2 scores"):
        exponential_target([1.0, 2.0, 3.0])(batch)
    with pytest.raises(ValueError, match="beta is 0;"):
        reward_target(0)


PHI = np.random.default_rng(4).normal(size=(M, 3))
PHI[:, 2] = ALLOWED


@pytest.mark.parametrize("known", [True, False], ids=["base", "other"])
def test_planted_coefficients_are_recovered(known):
    """Every sequence is a sample, weighted: of the base, or of a proposal that is not it."""
    planted = np.array([0.7, -1.3, 0.4])
    p = BASE * np.exp(PHI @ planted)
    moments = (p / p.sum()) @ PHI
    phi, log_weights = (PHI, np.log(BASE)) if known else (np.repeat(PHI, 2, axis=0), np.repeat(np.log(BASE), 2))
    found = fit_moments(phi, moments, log_weights, tolerance=1e-9)
    np.testing.assert_allclose(found, planted, atol=1e-6)
    batch = rows(np.zeros((1, M)), np.zeros((1, M)), scores=PHI[None].astype(np.float32)) | {"ref_logps": column(np.log(BASE)[None])}
    log_target = np.asarray(exponential_target(found)(batch)["log_target"][0], np.float64)
    np.testing.assert_allclose(np.exp(log_target - np.logaddexp.reduce(log_target)) @ PHI, moments, atol=1e-5)


def test_a_binary_feature_that_is_always_wanted_is_a_constraint():
    """Alone, the feature makes P the base times the boolean; a second moment is fitted among the allowed responses."""
    assert fit_moments(ALLOWED[:, None], [1.0]).tolist() == [math.inf]
    p = TARGET * np.exp(PHI[:, :2] @ [0.7, -1.3])
    found = fit_moments(PHI, [*(p / p.sum()) @ PHI[:, :2], 1.0], np.log(BASE), tolerance=1e-9)
    np.testing.assert_allclose(found, [0.7, -1.3, np.inf], atol=1e-6)


def test_moments_of_few_samples_have_the_error_of_few_samples():
    """Drawn from the base, not enumerated: the moments asked for are met on the samples, and nearly by the distribution."""
    drawn = np.random.default_rng(5).choice(M, size=2000, p=BASE)
    wanted = BASE @ PHI[:, :2] + [0.3, -0.2]
    found = fit_moments(PHI[drawn, :2], wanted)
    p = BASE * np.exp(PHI[:, :2] @ found)
    np.testing.assert_allclose((p / p.sum()) @ PHI[:, :2], wanted, atol=0.1)


def test_moments_out_of_reach_and_samples_too_few_are_refused():
    with pytest.raises(ValueError, match=r"moments \[9.0\] are out of reach of 64 samples: the features lie between \["):
        fit_moments(PHI[:, :1], [9.0])
    with pytest.raises(ValueError, match=r"none of 3 samples has all of the features \[0\]; take more"):
        fit_moments(np.zeros((3, 1)), [1.0])
    with pytest.raises(ValueError, match=r"features of shape \(3,\) for moments of shape \(1,\)"):
        fit_moments(np.zeros(3), [1.0])


# --- log Z ---


def test_z_is_the_mean_of_every_ratio_so_far():
    """Z is kept for each prompt, over batches in which prompts return; padding rows and missing responses count for nothing."""
    rng = np.random.default_rng(1)
    experience, carry = running_log_z(prompts=5), None
    ratios: dict[int, list[float]] = {i: [] for i in range(5)}
    for prompts in ([0, 3, 1, 3], [3, 2, 0, 0], [1, 1, 1, 1]):
        log_target, sampled = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
        log_target[2, 1] = -np.inf
        batch = without(without(rows(log_target, sampled, prompt_id=prompts), 1), 0, 2)
        real = np.asarray(batch["completion_mask"].any(-1))
        for b, prompt in enumerate(prompts):
            ratios[prompt] += list(np.exp(log_target - sampled)[b][real[b]])
        carry, batch = written(experience, batch, carry)
        wanted = [np.log(np.mean(ratios[p])) if any(ratios[p]) else -np.inf for p in prompts]
        np.testing.assert_allclose(batch["log_z"], wanted, rtol=1e-5, atol=1e-6)
    assert carry["log_z"]["count"].tolist() == [len(r) for r in ratios.values()] and carry["log_z"]["log_z"][4] == -math.inf


def test_the_expectation_of_a_ratio_is_z_whoever_samples():
    """Every sequence in proportion to its probability under q: exactly Z. One Z that all rows share."""
    counts = np.random.default_rng(2).integers(1, 9, M)
    drawn, q = np.repeat(np.arange(M), counts)[None], counts / counts.sum()
    batch = rows(LOG_TARGET[drawn], np.log(q)[drawn])
    _, batch = written(running_log_z(), batch)
    np.testing.assert_allclose(batch["log_z"], [np.log(Z)], rtol=1e-5)


def test_log_z_of_a_thousand_nats():
    """The ratios themselves overflow or underflow float32; their logs do not."""
    experience = running_log_z(prompts=2)
    carry, first = written(experience, rows([[-1000.0, -1001.0], [1000.0, 999.0]], np.zeros((2, 2)), prompt_id=[0, 1]))
    half = math.log((1 + math.exp(-1)) / 2)
    np.testing.assert_allclose(first["log_z"], [-1000 + half, 1000 + half], rtol=1e-6)
    carry, second = written(experience, rows([[-2000.0, -2000.0], [-2000.0, 1.0]], np.zeros((2, 2)), prompt_id=[0, 1]), carry)
    np.testing.assert_allclose(second["log_z"], first["log_z"] - math.log(2), rtol=1e-6)


def test_a_known_bound_of_z_and_a_prompt_that_is_not_in_the_table():
    ratio = np.full((1, 2), 5.0)
    assert written(running_log_z(max_z=1.0), rows(ratio, 0 * ratio))[1]["log_z"].tolist() == [0.0]
    carry, batch = written(running_log_z(prompts=3), rows(ratio, 0 * ratio, prompt_id=[3]))
    assert np.isnan(batch["log_z"]).all() and not np.any(carry["log_z"]["count"])
    with pytest.raises(ValueError, match="max_z is 0;"):
        running_log_z(max_z=0)
    with pytest.raises(ValueError, match='no "prompt_id"'):
        running_log_z(prompts=3)(rows(ratio, 0 * ratio))


# --- baseline ---


def test_the_baseline_is_of_earlier_batches_and_fades():
    """Pseudo-rewards of the total variation are +-1/2, so they are counted by hand."""
    experience = running_baseline(tv_pi_p, window=4)
    above, below = [[-1.0, -1.0]], [[-3.0, -3.0]]  # of a target of -2: rewards -1/2 and 1/2
    batch = lambda policy: rows([[-2.0, -2.0]], [[0.0, 0.0]], log_z=[0.0], old_logps=column(policy))
    assert experience(batch(above))["fdpg_baseline"].tolist() == [0.0]
    carry, _ = written(experience, batch(above))
    carry, second = written(experience, batch(below), carry)
    np.testing.assert_allclose(second["fdpg_baseline"], [-0.5])
    _, third = written(experience, batch(below), carry)
    kept = (1 - 1 / 4) ** 2  # of a response after two more
    np.testing.assert_allclose(third["fdpg_baseline"], [(0.5 * 2 - 0.5 * 2 * kept) / (2 + 2 * kept)], rtol=1e-6)
    unmet = batch(above) | {"log_z": jnp.full(1, -jnp.inf)}
    for skipped in (unmet, without(batch(above), 0)):
        after, _ = written(experience, skipped, carry)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), after, carry)
    with pytest.raises(ValueError, match="window is 0"):
        running_baseline(js_pi_p, 0)


# --- proposals ---


def test_the_evidence_is_the_difference_of_the_two_divergences():
    """Over every sequence in proportion to q, exactly KL(p || q) - KL(p || pi)."""
    counts = np.random.default_rng(2).integers(1, 9, M)
    drawn, q = np.repeat(np.arange(M), counts)[None], counts / counts.sum()
    pi = np.random.default_rng(3).dirichlet(np.ones(M))
    fields = {"log_z": [np.float32(np.log(Z))], "old_logps": column(np.log(pi)[drawn])}
    carry, _ = written(proposal_evidence(), rows(LOG_TARGET[drawn], np.log(q)[drawn], **fields))
    p, evidence = TARGET[ALLOWED], carry["proposal"]
    wanted = p @ np.log(p / q[ALLOWED]) - p @ np.log(p / pi[ALLOWED])
    np.testing.assert_allclose(evidence["gain"] / evidence["count"], wanted, rtol=1e-5)


@pytest.mark.parametrize(("gain", "step", "adopted"), [(1.0, 4, True), (-1.0, 4, False), (1.0, 3, False)])
def test_a_better_policy_becomes_the_proposal_when_it_is_due(gain, step, adopted):
    evidence = {"proposal": {"gain": jnp.float32(gain), "count": jnp.float32(8)}, "other": jnp.ones(2)}
    state = init_state({"w": jnp.ones(3)}, optax.sgd(1.0), jax.random.key(0), {"proposal": {"w": jnp.zeros(3)}, "ema": {"w": jnp.zeros(3)}})
    between = averaged({"proposal": adopt_if_better(every=4), "ema": still})
    state = jax.jit(between)(state.replace(step=jnp.int32(step), carry=evidence))
    assert state.averages["proposal"]["w"].tolist() == [float(adopted)] * 3 and not np.any(state.averages["ema"]["w"])
    assert state.carry["proposal"]["gain"] == (0.0 if step == 4 else gain) and state.carry["other"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="every is 0"):
        adopt_if_better(every=0)


# --- it finds its target ---

LOGITS = np.stack([BASE_LOGITS, 0.5 * RNG.normal(size=M)])  # of two prompts
MET = np.stack([ALLOWED, np.isin(np.arange(M), RNG.choice(M, 20, replace=False))])
SCORED = np.array([False, True])


def one_token(params, batch: Batch) -> Outputs:
    """A table of logits over M tokens for each prompt, which is the token before."""
    p = jax.nn.log_softmax(params)
    scored = lambda x: jnp.pad(x[..., None], ((0, 0), (0, 0), (1, 0)))
    return Outputs(scored(p[batch["tokens"][:, :, 0], batch["tokens"][:, :, 1]]), scored(jnp.zeros(batch["tokens"].shape[:2])))


@functools.partial(jax.jit, static_argnums=0)
def trained(divergence, off_policy: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """1500 steps on 128 samples of each prompt, by the policy or by a proposal that is replaced by it when it is better."""
    experience = chain(boolean_target(), running_log_z(prompts=2), running_baseline(divergence), proposal_evidence())
    optimizer, base, prompts = optax.adam(0.02), jnp.asarray(LOGITS, jnp.float32), jnp.array([0, 1, 1, 0])
    train_step, adopt = make_step(one_token, fdpg(divergence), optimizer), averaged({"proposal": adopt_if_better(every=16)})

    def step(state: TrainState, _):
        proposal = jnp.where(off_policy, state.averages["proposal"], state.params)
        drawn = jax.random.categorical(jax.random.fold_in(state.key, state.step), proposal[prompts], shape=(64, 4)).T
        prompt = jnp.broadcast_to(prompts[:, None], drawn.shape)
        batch = {"tokens": jnp.stack([prompt, drawn], axis=-1), "prompt_id": prompts}
        batch |= {"rewards": jnp.asarray(MET, jnp.float32)[prompt, drawn]}
        batch["completion_mask"] = jnp.broadcast_to(SCORED[None, None], batch["tokens"].shape)
        fields = {"ref_logps": base, "old_logps": state.params, "sampled_logps": proposal}
        batch |= {name: one_token(params, batch).logps for name, params in fields.items()}
        carry, batch, _ = advance(experience, state.carry, batch)
        state, metrics = train_step(state.replace(carry=carry), batch)
        after = adopt(state)
        return after, metrics | {"swaps": jnp.any(after.averages["proposal"] != state.averages["proposal"])}

    start = init_state(base, optimizer, jax.random.key(0), {"proposal": base}).replace(carry=first_carry(experience))
    return jax.lax.scan(step, start, length=1500)


DIVERGENCES = {"js": js_pi_p, "kl_p_pi": kl_p_pi, "tv": tv_pi_p, "hellinger": hellinger_pi_p}


@pytest.mark.parametrize("name", runs.by_turn(DIVERGENCES, ("js",), ("kl_p_pi",)))
@pytest.mark.parametrize(
    "off_policy", [pytest.param(False, marks=(pytest.mark.slow, pytest.mark.long), id="policy"), pytest.param(True, id="proposal")]
)
def test_a_constraint_is_learnt_by_samples(name, off_policy):
    """The constraint allows a tenth of the base's mass for one prompt, a third for another; the policy learns the base within it."""
    state, metrics = trained(DIVERGENCES[name], jnp.asarray(off_policy))
    pi, a = (np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) for x in (np.asarray(state.params, np.float64), LOGITS))
    z = (a * MET).sum(axis=1)
    assert state.skipped == 0 and ((pi * MET).sum(axis=1) >= 0.97).all()
    assert (0.5 * np.abs(pi - a * MET / z[:, None]).sum(axis=1) <= 0.05).all()
    np.testing.assert_allclose(np.exp(state.carry["log_z"]["log_z"]), z, rtol=0.05)
    assert abs(z[0] - 0.1) < 0.01 and z[1] > 0.25
    assert (metrics["swaps"].sum() > 3) or not off_policy
    # What is measured on the way: total variation starts at 1 - Z, and its estimates follow the policy.
    np.testing.assert_allclose(metrics["divergence/tv"][0], 1 - z.mean(), atol=0.1)
    assert metrics["divergence/tv"][-200:].mean() < 0.08 and metrics["satisfied"][0] < 0.5
