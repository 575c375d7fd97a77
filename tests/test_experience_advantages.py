"""Advantages and rewards made ready: TRL's numbers and PPO's, and what missing rewards, padding and groups of one do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import close
from test_policy import ORACLES, behind_a_prompt, rollout

from alignax.experience import (
    adaptive_kl_reward,
    advance,
    batch_scaled,
    chain,
    clip_rewards,
    first_carry,
    gae,
    gdpo,
    group_relative,
    kl_reward,
    leave_one_out,
    missing_eos_penalty,
    overlong_penalty,
    reinforce_plus_plus,
    rewards_to_go,
    shaping,
    top_entropy,
    whiten_advantages,
    whiten_responses,
    whiten_rewards,
)
from alignax.experience.advantages import last_scored
from alignax.experience.shaping import adaptive_kl_update
from alignax.types import Batch

ESTIMATORS = {
    "group_relative": group_relative(),
    "group_centred": group_relative(std=False),
    "leave_one_out": leave_one_out(),
    "gae": gae(),
    "rewards_to_go": rewards_to_go(),
    "reinforce_plus_plus": reinforce_plus_plus(),
    "whitened": chain(gae(), whiten_advantages()),
    "batch_scaled": batch_scaled(),
    "whitened_responses": chain(leave_one_out(), whiten_responses()),
    "penalised": chain(kl_reward(0.1), whiten_rewards(), gae(), whiten_advantages()),
}
every = pytest.mark.parametrize("name", ESTIMATORS)


def groups(rewards, T: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Responses of 1 to T - 1 tokens behind a prompt of one, with these rewards [B, N], and the fields of a rollout."""
    rng = np.random.default_rng(seed)
    rewards = np.array(rewards, np.float32)
    t = np.arange(T)
    mask = (t >= 1) & (t < 1 + rng.integers(1, T, (*rewards.shape, 1)))
    draw = lambda: np.where(mask, rng.normal(size=mask.shape), 0.0).astype(np.float32)
    return {"completion_mask": mask, "rewards": rewards, "values": draw(), "old_logps": draw(), "ref_logps": draw()}


PROGRAM = jax.jit(lambda experience, batch: experience(batch))


def run(experience, batch: dict) -> dict[str, np.ndarray]:
    """The experience in one program, on arrays that are edited outside of jax."""
    return jax.tree.map(np.array, PROGRAM(experience, batch))


def random_groups(B: int = 4, N: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    return groups(np.random.default_rng(seed).normal(size=(B, N)), seed=seed)


def of_responses(batch: Batch) -> np.ndarray:
    """The advantage of each response [B, N], which all of its tokens have, and nothing else."""
    advantages, mask = np.array(batch["advantages"]), np.array(batch["completion_mask"])
    assert not np.any(advantages[~mask])
    first = np.take_along_axis(advantages, mask.argmax(-1)[..., None], -1)
    np.testing.assert_array_equal(advantages, np.where(mask, first, 0.0))
    return first[..., 0]


# --- numbers of others ---


@pytest.mark.parametrize("o", ORACLES["advantages"], ids=lambda o: o["id"])
def test_group_advantages_are_trls(o):
    """Groups of four, one of equal rewards, one with a response that no reward function could score."""
    c, fields = o["config"], ORACLES["inputs"]["adv"]
    per_function = np.array([[np.nan if x is None else x for x in row] for row in fields["rewards_per_func"]])
    unscored = np.isnan(per_function).all(1)
    rewards = np.where(unscored, np.nan, np.nansum(per_function * c["reward_weights"], 1))
    shape = lambda x: np.reshape(x, (-1, c["num_generations"], *x.shape[2:]))
    batch = {k: shape(np.array(behind_a_prompt(fields[k]))) for k in ("old_logps", "ref_logps", "completion_mask")}
    batch["completion_mask"] = batch["completion_mask"].astype(bool)
    batch["rewards"] = rewards.reshape(-1, c["num_generations"]).astype(np.float32)
    if "scale_rewards" in c:
        experience = group_relative(std=c["scale_rewards"] == "group")
    else:
        whitened = [whiten_responses()] if c.get("normalize_advantages") else []
        experience = chain(kl_reward(c["beta"]), leave_one_out(), *whitened)
    assert unscored.any()
    np.testing.assert_allclose(of_responses(run(experience, batch)).ravel(), o["advantages"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("o", [o for o in ORACLES["ppo"] if "whitened" in o], ids=lambda o: o["id"])
def test_gae_and_whitening(o):
    _, batch = rollout(o["config"])
    for name in ("token_rewards", "advantages", "returns"):
        close(batch[name][:, 0, 1:], o[name])
    close(run(whiten_advantages(), batch)["advantages"][:, 0, 1:], o["whitened"])


# --- by hand ---


def test_leave_one_out_is_each_against_the_mean_of_the_others():
    batch = random_groups(N=5)
    r = np.array(batch["rewards"], np.float64)
    others = np.stack([np.delete(r, i, axis=1).mean(axis=1) for i in range(5)], axis=1)
    close(of_responses(run(leave_one_out(), batch)), r - others)
    close(r - others, 5 / 4 * (r - r.mean(axis=1, keepdims=True)))


def test_group_advantages_have_mean_0_and_deviation_1():
    batch = random_groups(N=5)
    r = np.array(batch["rewards"], np.float64)
    found = of_responses(run(group_relative(), batch))
    close(found, (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4))
    close(of_responses(run(group_relative(std=False), batch)), r - r.mean(1, keepdims=True))


def test_a_groups_mean_over_the_batchs_deviation():
    """Groups of large and small spread keep their spread; the deviation is that of the rewards, not of the centred rewards."""
    batch = groups([[5.0, 1.0, 3.0], [7.1, 6.9, 7.0]])
    r = np.array(batch["rewards"], np.float64)
    close(of_responses(run(batch_scaled(), batch)), (r - r.mean(1, keepdims=True)) / (r.std(ddof=1) + 1e-4))


def test_whitened_responses_count_once_whatever_their_length():
    batch = run(leave_one_out(), random_groups(N=5))
    a = of_responses(batch)
    close(of_responses(run(whiten_responses(), batch)), (a - a.mean()) / (a.std(ddof=1) + 1e-4))
    batch["advantages"] = np.where(batch["completion_mask"], np.random.default_rng(2).normal(size=batch["completion_mask"].shape), 0.0)
    m = batch["advantages"].sum(-1) / batch["completion_mask"].sum(-1)
    by_token = (batch["advantages"] - m.mean()) / (m.std(ddof=1) + 1e-4) * batch["completion_mask"]
    close(run(whiten_responses(), batch)["advantages"], by_token)


TWO_REWARDS = [[(1, 0), (0, 1), (1, 1)], [(0, 2), (0, 2), (1, 5)]]


def test_gdpo_keeps_what_a_sum_of_rewards_loses():
    """Numbers by hand: each reward is normalised in its group, then their sum over the batch."""
    batch = groups(np.zeros((2, 3))) | {"scores": np.array(TWO_REWARDS, np.float32)}
    np.testing.assert_allclose(
        of_responses(run(gdpo((1.0, 0.5)), batch)), [[0, -0.79047, 0.79047], [-0.79050, -0.79050, 1.58101]], atol=2e-5
    )
    one = {"completion_mask": np.ones((1, 4, 2), bool), "scores": np.zeros((1, 4, 2), np.float32)}
    for last, expected in (((1, 0), 1.4997), ((1, 1), 2.9994)):  # before the batch is made even: two rewards are twice one
        one["scores"][0, 3] = last
        z = (np.array([0, 0, 0, 1]) - 0.25) / (0.5 + 1e-4) * sum(last)
        np.testing.assert_allclose(z[3], expected, atol=1e-4)
        close(run(gdpo(), one)["advantages"][0, :, 0], z / (z.std(ddof=1) + 1e-4))


def test_gdpo_of_rewards_that_are_missing():
    """One of two leaves the other; a response without any, or without a completion, takes no part; a reward alike in a group is nothing."""
    batch = groups(np.zeros((2, 4)), seed=1)
    scores = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    scores[1, :, 1] = 0.1
    scores[0, 0, 0], scores[0, 1] = np.nan, np.nan
    batch["completion_mask"][1, 2] = False
    total = np.zeros((2, 4))
    for i, j, known in ((0, 0, [2, 3]), (0, 1, [0, 2, 3]), (1, 0, [0, 1, 3])):
        x = scores[i, known, j].astype(np.float64)
        total[i, known] += (x - x.mean()) / (x.std(ddof=1) + 1e-4)
    valid = np.array([[1, 0, 1, 1], [1, 1, 0, 1]], bool)
    expected = np.where(valid, (total - total[valid].mean()) / (total[valid].std(ddof=1) + 1e-4), 0.0)
    advantages = run(gdpo(), batch | {"scores": scores})["advantages"]
    close(advantages, expected[..., None] * batch["completion_mask"])
    for given, count, text in [((), 1, r"scores have 1; use chain\(mean"), ((1.0,) * 3, 2, "3 weights, but scores have 2 rewards")]:
        with pytest.raises(ValueError, match=text):
            run(gdpo(given), batch | {"scores": scores[..., :count]})


def test_the_tokens_of_highest_entropy_alone():
    """Only completion tokens are ranked, whatever the entropy of padding; a quarter of twelve tokens is three."""
    batch = run(group_relative(), groups([[1.0, 0.0], [0.0, 2.0]]))
    mask = np.broadcast_to(np.arange(7) < 4, (2, 2, 7)) & (np.arange(7) > 0)
    entropy = np.where(mask, np.random.default_rng(0).permutation(28).reshape(2, 2, 7), 99.0).astype(np.float32)
    batch |= {"completion_mask": mask, "advantages": np.where(mask, 1.0, 0.0), "old_entropy": entropy}
    kept = run(top_entropy(0.25), batch)["advantages"] > 0
    assert sorted(entropy[kept]) == sorted(entropy[mask])[-3:]
    np.testing.assert_array_equal(run(top_entropy(1.0), batch)["advantages"], batch["advantages"])
    half = np.quantile(entropy[mask].astype(np.float64), 0.5)
    np.testing.assert_array_equal(run(top_entropy(0.5), batch)["advantages"] > 0, mask & (entropy >= half))
    assert not np.any(run(top_entropy(), batch | {"completion_mask": np.zeros_like(mask)})["advantages"])
    with pytest.raises(ValueError, match="the share is 0; it must be a share of tokens"):
        top_entropy(0)


def test_the_deviation_is_of_two_passes():
    """Rewards of 1e4 and a little: in one pass, E[r^2] - E[r]^2, nothing would be left in float32."""
    batch = groups([[1e4 + 0.25, 1e4 - 0.25, 1e4 + 0.5, 1e4 - 0.5]])
    close(of_responses(run(group_relative(), batch)), np.array([[1, -1, 2, -2]]) * 0.25 / (np.sqrt(0.625 / 3) + 1e-4))


def test_gae_by_hand():
    """lam 0.5, gamma 0.8, values 1, 2, 3 and a reward of 4 at the end."""
    mask = np.array([[[False, True, True, True, False]]])
    batch = {"completion_mask": mask, "rewards": np.array([[4.0]]), "values": np.array([[[9.0, 1.0, 2.0, 3.0, 9.0]]])}
    d = [0.8 * 2 - 1, 0.8 * 3 - 2, 4 - 3]
    a3 = d[2]
    a2 = d[1] + 0.4 * a3
    a1 = d[0] + 0.4 * a2
    found = run(gae(0.8, 0.5), batch)
    close(found["advantages"][0, 0], [0, a1, a2, a3, 0])
    close(found["returns"][0, 0], [0, a1 + 1, a2 + 2, a3 + 3, 0])


def test_a_critic_of_several_heads_is_refused():
    mask = np.array([[[False, True, True]]])
    with pytest.raises(ValueError, match=r"gae\(\) takes one value per token, but this critic gives 2; set model.critic_heads to 1"):
        gae()({"completion_mask": mask, "rewards": np.array([[4.0]]), "values": np.zeros((1, 1, 3, 2))})


def test_tokens_between_two_turns_are_no_steps():
    """A completion in two parts: what lies between, a tool's answer, is passed over; the reward stands on the last scored token."""
    close_up = lambda x: np.concatenate([x[..., :3], x[..., 5:]], axis=-1)
    batch = groups([[1.5, -0.5]], T=8)
    batch["completion_mask"] = np.isin(np.arange(8), (1, 2, 5, 6, 7)) & np.ones((1, 2, 8), bool)
    for name in ("values", "old_logps", "ref_logps"):
        batch[name] = np.random.default_rng(1).normal(size=(1, 2, 8)).astype(np.float32)
    short = {k: close_up(x) if x.ndim == 3 else x for k, x in batch.items()}
    experience = chain(kl_reward(0.1), shaping(lambda batch: batch["values"], 0.9), gae(0.9, 0.8))
    found, expected = run(experience, batch), run(experience, short)
    for name in ("token_rewards", "advantages", "returns"):
        close(close_up(found[name]), expected[name])
        assert not np.any(found[name][..., 3:5])
    assert np.array(last_scored(jax.tree.map(jnp.asarray, batch))).argmax(-1).tolist() == [[7, 7]]


def test_rewards_to_go_and_reinforce_plus_plus():
    batch = run(kl_reward(0.2), random_groups())
    mask, r = np.array(batch["completion_mask"]), np.array(batch["token_rewards"], np.float64)
    to_go = np.flip(np.cumsum(np.flip(r, -1), -1), -1) * mask
    close(run(rewards_to_go(), batch)["advantages"], to_go)
    x = to_go[mask]
    close(run(reinforce_plus_plus(), batch)["advantages"][mask], (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8))
    discounted = sum(0.9**k * np.pad(r, ((0, 0), (0, 0), (0, k)))[..., k:] for k in range(r.shape[-1])) * mask
    close(run(rewards_to_go(0.9), batch)["advantages"], discounted)


def test_the_kl_penalty_of_tokens_and_of_responses():
    """k1 on completion tokens, the response's reward on the last; a response less likely than under the reference is rewarded."""
    batch = random_groups()
    found = run(kl_reward(0.3), batch)
    mask = np.array(batch["completion_mask"])
    k1 = np.where(mask, np.array(batch["old_logps"], np.float64) - np.array(batch["ref_logps"]), 0.0)
    close(found["rewards"], np.array(batch["rewards"]) - 0.3 * k1.sum(-1))
    close(found["token_rewards"], -0.3 * k1 + np.array(last_scored(jax.tree.map(jnp.asarray, batch))) * batch["rewards"][..., None])
    assert (np.array(found["rewards"] > batch["rewards"]) == (k1.sum(-1) < 0)).all()


def test_a_coefficient_that_changes_does_not_compile_anew():
    traced = []

    @jax.jit
    def run(experience, batch):
        traced.append(1)
        return experience(batch)["advantages"]

    batch = random_groups()
    weak, strong = (run(chain(kl_reward(beta), gae(lam=lam)), batch) for beta, lam in ((0.1, 0.9), (0.4, 0.8)))
    assert len(traced) == 1 and np.any(weak != strong)


def test_the_adaptive_coefficient():
    """Target 6, horizon 10,000, 32 responses a batch, from 0.1: KLs of 12, 3 and 6.6 one after another (Ziegler et al. 2019)."""
    mask = np.arange(5) < 4
    batch = {"completion_mask": np.broadcast_to(mask, (8, 4, 5)), "rewards": jnp.ones((8, 4)), "ref_logps": jnp.zeros((8, 4, 5))}
    experience = chain(adaptive_kl_reward(0.1, target=6.0))
    carry = first_carry(experience)
    for measured, before, after in ((12.0, 0.1, 0.100064), (3.0, 0.100064, 0.099999959), (6.6, 0.099999959, 0.100031959)):
        carry, out, seen = jax.jit(advance)(experience, carry, batch | {"old_logps": jnp.where(mask[None, None], measured / 4, 0.0)})
        np.testing.assert_allclose(carry["adaptive_kl_reward"], after, rtol=2e-7)
        np.testing.assert_allclose(seen["kl_coefficient"], before, rtol=2e-7)
        assert seen.keys() == {"kl_coefficient"} and not {name for name in out if "coefficient" in name}
        np.testing.assert_allclose(out["rewards"], 1 - before * measured, rtol=1e-5)
    assert adaptive_kl_update(jnp.asarray(0.1), jnp.asarray(600.0), n=100) == pytest.approx(0.1 * 1.002)  # a fifth of a step at most


def test_penalties_and_limits():
    mask = np.arange(11) < np.array([1, 5, 8, 9, 11])[:, None]
    batch = {"completion_mask": mask[None], "rewards": np.array([[0.5, -3.0, 7.0, 0.0, np.nan]])}
    np.testing.assert_allclose(run(clip_rewards(2), batch)["rewards"][0], [0.5, -2, 2, 0, np.nan])
    batch["truncated"] = np.array([[False, True, False, False, True]])
    np.testing.assert_allclose(run(missing_eos_penalty(1.5), batch)["rewards"][0], [0.5, -4.5, 7.0, 0.0, np.nan])
    # The longest is 10; a line from 6 tokens to 10.
    np.testing.assert_allclose(run(overlong_penalty(10, 4), batch)["rewards"][0], [0.5, -3.0, 6.5, -0.75, np.nan])
    long = batch | {"rewards": np.zeros((1, 5))}
    assert run(overlong_penalty(10, 4), long)["rewards"][0, 4] == -1.0
    for make, text in [
        (lambda: clip_rewards(0), "limit is 0"),
        (lambda: overlong_penalty(10, 11), "the margin is 11 tokens and max_length is 10"),
        (lambda: group_relative(eps=0.0), r"eps is 0\.0; it must be above 0"),  # equal rewards would be 0 / 0
        (lambda: whiten_advantages(-1.0), r"eps is -1\.0"),
        (lambda: gae(lam=1.5), r"lam is 1\.5; it must be a discount, in \[0, 1\]"),
        (lambda: kl_reward(-0.1), r"the coefficient of the KL is -0\.1; it must be a number of at least 0"),
        (lambda: gdpo((1.0, np.nan)), "the weights of gdpo"),
    ]:
        with pytest.raises(ValueError, match=text):
            make()


def test_whitened_rewards_keep_their_mean_unless_told():
    batch = run(kl_reward(0.2), random_groups())
    mask = np.array(batch["completion_mask"])
    raw = np.array(batch["token_rewards"], np.float64)[mask]
    for shift, mean in ((False, raw.mean()), (True, 0.0)):
        found = run(whiten_rewards(shift), batch)["token_rewards"]
        close(found[mask], (raw - raw.mean()) / raw.std(ddof=1) + mean)
        assert not np.any(found[~mask])


def test_shaping_moves_rewards_and_not_what_a_response_earns():
    """The shaped sum is the sum less the potential at the start: alike for all responses to a prompt, whose advantages stay."""
    batch = run(kl_reward(0.1), random_groups())
    potential = lambda batch: jnp.where(last_scored(batch), 3.0, jnp.cumsum(batch["old_logps"], axis=-1)).at[..., 1].set(5.0)
    shaped = run(shaping(potential), batch)
    close(shaped["token_rewards"].sum(-1), batch["token_rewards"].sum(-1) - 5.0)
    # lam 1: rewards to go of the shaped are those of the plain less the potential, a baseline.
    to_go, plain = (run(rewards_to_go(), x)["advantages"] for x in (shaped, batch))
    close(to_go, plain - np.where(batch["completion_mask"], potential(jax.tree.map(jnp.asarray, batch)), 0.0))
    weighted = jax.tree_util.Partial(lambda scale, batch: scale * potential(batch), 2.0)  # a potential with parameters
    close(run(shaping(weighted), batch)["token_rewards"].sum(-1), batch["token_rewards"].sum(-1) - 10.0)


# --- what is missing ---


@every
def test_a_missing_reward_is_no_advantage_and_none_of_its_groups_business(name):
    """NaN or infinite: advantage 0, and the others' as if that response had not been sampled."""
    batch = random_groups()
    batch["rewards"][[0, 2, 3, 3, 3], [1, 0, 0, 1, 2]] = [np.nan, np.inf, np.nan, np.nan, -np.inf]
    found = run(ESTIMATORS[name], batch)
    without = run(ESTIMATORS[name], batch | {"completion_mask": batch["completion_mask"] & np.isfinite(batch["rewards"])[..., None]})
    close(found["advantages"], without["advantages"])
    assert np.isfinite(found["advantages"]).all() and np.any(found["advantages"])
    for i, j in ((0, 1), (2, 0), (3, 0), (3, 2)):
        assert not np.any(found["advantages"][i, j])
    if "returns" in found:
        assert np.isfinite(found["returns"]).all()
        close(found["returns"][3], batch["values"][3])


@every
def test_padding_takes_no_part(name):
    """Rows without a completion among the others, their fields what they may be, in longer rows that begin further right."""
    batch, places = random_groups(), np.array([0, 2, 3, 5])
    among = {k: np.full((6, *x.shape[1:]), False if x.dtype == bool else np.nan, x.dtype) for k, x in batch.items()}
    for k, x in batch.items():
        among[k][places] = x
    wider = {k: np.pad(x, ((0, 0), (0, 0), (2, 3))) if x.ndim == 3 else x for k, x in among.items()}
    wider["rewards"][1] = 1e6
    found = run(ESTIMATORS[name], wider)["advantages"][..., 2:-3]
    assert not np.any(found[[1, 4]])
    close(found[places], run(ESTIMATORS[name], batch)["advantages"])


@pytest.mark.parametrize("name", ["group_relative", "group_centred", "leave_one_out"])
def test_a_group_of_one_or_of_equal_rewards_has_no_advantage(name):
    """The float32 mean of equal rewards may differ slightly from them: here seven times a third of a million."""
    value = 1e6 / 3
    for rewards in ([[value] * 7, [0.1] * 7, [0.0] * 7, [0.1] + [np.nan] * 6], [[0.1], [value]]):
        assert not np.any(run(ESTIMATORS[name], groups(rewards))["advantages"])


def test_what_is_not_there_is_named():
    batch = random_groups()
    without = lambda *names: {k: x for k, x in batch.items() if k not in names}
    for experience, fields, name in [
        (group_relative(), without("rewards"), "rewards"),
        (gae(), without("values"), "values"),
        (kl_reward(0.1), without("ref_logps"), "ref_logps"),
        (kl_reward(0.1), without("old_logps"), "old_logps"),
    ]:
        with pytest.raises(ValueError, match=f'the batch has no "{name}"; let experience'):
            run(experience, fields)
    for experience, name in ((missing_eos_penalty(1.0), "truncated"), (top_entropy(), "old_entropy")):
        with pytest.raises(ValueError, match=f'the batch has no "{name}", which only rollouts have; set rollout.samples above 0'):
            run(experience, batch)
