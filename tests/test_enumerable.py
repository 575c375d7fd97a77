"""Exact checks of what methods promise, on a model whose 27 sequences can all be summed: a table of logits for every prefix."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from alignax import losses
from alignax.experience import chain, gae, group_relative, kl_reward, leave_one_out, mismatched_kl
from alignax.losses import Loss, dpo, ipo, ipo_daa, r_dpo, robust_dpo, rpo, rpo_token_mean, sequence, sft, summed_sft
from alignax.train import init_state, make_step
from alignax.types import Batch, Model, Outputs, Params

V, T = 3, 3
SEQUENCES = np.array(list(itertools.product(range(V), repeat=T)))  # [S, T], S = 27
S = len(SEQUENCES)


def table(seed: int, scale: float = 1.0) -> Params:
    """Logits [V^t, V] of token t after each prefix of t tokens."""
    keys = jax.random.split(jax.random.key(seed), T)
    return [scale * jax.random.normal(key, (V**t, V)) for t, key in enumerate(keys)]


def apply(params: Params, batch: Batch) -> Outputs:
    """Position 0 is the prompt; the completion is the T tokens after it."""
    y = batch["tokens"][:, :, 1:]  # [B, N, T]
    prefix = jnp.zeros(y.shape[:2], jnp.int32)
    logps, entropy = [], []
    for t in range(T):
        p = jax.nn.log_softmax(params[t])
        logps.append(p[prefix, y[:, :, t]])
        entropy.append(-jnp.sum(jnp.exp(p) * p, axis=-1)[prefix])
        prefix = prefix * V + y[:, :, t]
    pad = lambda x: jnp.pad(jnp.stack(x, axis=-1), ((0, 0), (0, 0), (1, 0)))
    mask = batch["completion_mask"]
    return Outputs(jnp.where(mask, pad(logps), 0.0), jnp.where(mask, pad(entropy), 0.0))


def responses(*indices) -> Batch:
    """Rows of sequences by number: N index arrays [B] -> a batch."""
    tokens = jnp.asarray(np.pad(np.stack([SEQUENCES[np.asarray(i)] for i in indices], axis=1), ((0, 0), (0, 0), (1, 0))))
    return {"tokens": tokens, "completion_mask": jnp.ones(tokens.shape, bool).at[:, :, 0].set(False)}


def pairs(chosen, rejected, reference: Params) -> Batch:
    batch = responses(chosen, rejected)
    return batch | {"ref_logps": apply(reference, batch).logps}


def distribution(params: Params) -> np.ndarray:
    """log pi of all sequences: [S]."""
    batch = responses(np.arange(S))
    return np.asarray(sequence(apply(params, batch).logps, batch)[:, 0], np.float64)


def expected(loss: Loss) -> Loss:
    """The same loss, with each example weighted by its probability: an exact expectation, not a sample."""
    return Loss(tuple((c, term._replace(over=lambda batch: batch["probability"])) for c, term in loss.terms))


def train(loss: Loss, params: Params, batch: Batch, steps: int = 1500, rate: float = 0.05) -> Params:
    """Full-batch Adam with the shared step, its rate going to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = make_step(apply, loss, optimizer)
    losses = lambda state, _: step(state, batch)
    state, metrics = jax.jit(lambda state: jax.lax.scan(losses, state, length=steps))(init_state(params, optimizer, jax.random.key(0)))
    assert state.skipped == 0 and metrics["loss"][-1] <= metrics["loss"][0]
    return state.params


def normalised(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - np.logaddexp.reduce(logits))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def all_pairs(reference: Params, preferred) -> Batch:
    """Every ordered pair of different sequences, as probable as its order: `preferred` [S, S] is p(i over j)."""
    i, j = np.nonzero(~np.eye(S, dtype=bool))
    return pairs(i, j, reference) | {"probability": jnp.asarray(preferred[i, j], jnp.float32)}


def rewards(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=S)


def test_the_model_sums_to_one_and_the_entropy_is_its_own():
    params = table(0)
    p = np.exp(distribution(params))
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-6)
    batch = responses(np.arange(S))
    entropy = np.asarray(sequence(apply(params, batch).entropy, batch)[:, 0])
    np.testing.assert_allclose(p @ entropy, -p @ np.log(p), rtol=1e-5)  # the chain rule


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_finds_the_policy_of_rlhf(beta):
    """The optimum is pi proportional to ref exp(r / beta) if labels follow Bradley-Terry (Rafailov et al. 2023, eq. 4)."""
    r, reference = rewards(), table(1)
    preferred = 1 / (1 + np.exp(-(r[:, None] - r[None, :])))
    trained = np.exp(distribution(train(expected(dpo(beta)), reference, all_pairs(reference, preferred))))
    ref = distribution(reference)
    target = normalised(ref + r / beta)
    assert total_variation(np.exp(ref), target) > 0.1
    assert total_variation(trained, target) < 1e-3
    # It has the largest E r - beta KL(pi | ref), which is beta log Z.
    value = lambda p: float(p @ r - beta * p @ (np.log(p) - ref))
    best = beta * np.logaddexp.reduce(ref + r / beta)
    np.testing.assert_allclose(value(trained / trained.sum()), best, atol=1e-4)
    assert value(np.exp(ref)) < best - 0.1


@pytest.mark.slow
def test_cdpo_undoes_the_flips_that_it_is_told_of():
    """Labels of a sure preference, flipped with probability e: cDPO's optimum is finite, at margins of log((1 - e) / e)."""
    e, beta, reference = 0.2, 0.5, table(1)
    chosen, rejected = np.array([0, 7, 15]), np.array([26, 11, 4])
    trained = train(dpo(beta, label_smoothing=e), reference, pairs(chosen, rejected, reference))
    ratio = distribution(trained) - distribution(reference)
    np.testing.assert_allclose(beta * (ratio[chosen] - ratio[rejected]), np.log((1 - e) / e), atol=1e-3)
    # The same optimum by plain DPO on both orders, weighted by the flips.
    both = pairs(np.r_[chosen, rejected], np.r_[rejected, chosen], reference) | {"probability": jnp.repeat(jnp.array([1 - e, e]), 3)}
    ratio = (p := distribution(train(expected(dpo(beta)), reference, both))) - distribution(reference)
    np.testing.assert_allclose(beta * (ratio[chosen] - ratio[rejected]), np.log((1 - e) / e), atol=1e-3)
    np.testing.assert_allclose(np.exp(p), np.exp(distribution(trained)), atol=1e-3)


@pytest.mark.slow
def test_ipo_stops_at_its_margin():
    """The log-ratios of consistent pairs differ by 1 / (2 beta) under IPO, while DPO's diverge."""
    beta, reference = 0.25, table(1)
    chosen, rejected = np.array([0, 7, 15, 20]), np.array([26, 11, 4, 9])
    batch = pairs(chosen, rejected, reference)
    margin = lambda loss: (ratio := distribution(train(loss, reference, batch)) - distribution(reference))[chosen] - ratio[rejected]
    np.testing.assert_allclose(margin(ipo(beta)), 2.0, atol=1e-3)
    np.testing.assert_allclose(margin(ipo_daa(2 * beta)), 2.0, atol=1e-3)  # 1 / beta in its own
    assert margin(dpo(beta)).min() > 8.0


def test_ipo_finds_its_policy():
    """For preferences linear in a utility a, pi is proportional to ref exp(a / (2 beta)) (Azar et al. 2023, eq. 9 and 17)."""
    beta, reference = 0.2, table(1)
    a = np.random.default_rng(5).uniform(0, 1, S)
    trained = train(expected(ipo(beta)), reference, all_pairs(reference, (1 + a[:, None] - a[None, :]) / 2))
    target = normalised(distribution(reference) + a / (2 * beta))
    assert total_variation(np.exp(distribution(reference)), target) > 0.1
    assert total_variation(np.exp(distribution(trained)), target) < 1e-3


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [(losses.forward_kl, 1.0), (losses.jensen_shannon, 1.0), (losses.alpha_divergence(0.5), 1.0), (losses.chi_squared, 4.0)],
    ids=["forward_kl", "jensen_shannon", "alpha", "chi_squared"],
)
def test_f_dpo_finds_the_policy_of_its_divergence(divergence, beta):
    """f'(pi / ref) = r / beta + const where labels follow Bradley-Terry (Wang et al. 2023, theorem 1)."""
    r, reference = rewards(), table(1)
    preferred = 1 / (1 + np.exp(-(r[:, None] - r[None, :])))
    trained = train(expected(losses.f_dpo(divergence, beta)), reference, all_pairs(reference, preferred))
    score = beta * np.asarray(divergence(jnp.asarray(distribution(trained) - distribution(reference))))
    np.testing.assert_allclose(score - score.mean(), r - r.mean(), atol=5e-3)
    # Another divergence would have another policy.
    ratio = distribution(trained) - distribution(reference)
    assert np.abs(beta * (ratio - ratio.mean()) - (r - r.mean())).max() > 0.1


@pytest.mark.slow
def test_robust_dpo_finds_the_policy_without_flips():
    """Bradley-Terry labels are flipped with probability e; robust DPO, given e, finds what DPO finds without flips."""
    e, beta, r, reference = 0.3, 1.0, rewards(), table(1)
    preferred = 1 / (1 + np.exp(-(r[:, None] - r[None, :])))
    flipped = all_pairs(reference, (1 - e) * preferred + e * (1 - preferred))
    target = normalised(distribution(reference) + r / beta)
    robust, plain = (np.exp(distribution(train(expected(loss), reference, flipped))) for loss in (robust_dpo(beta, e), dpo(beta)))
    assert total_variation(robust, target) < 1e-3
    assert total_variation(plain, target) > 0.05


@pytest.mark.slow
def test_r_dpo_takes_the_price_of_length_off_the_reward():
    """Responses end at the first token 2, or at the third: pi is proportional to ref exp((r - alpha |y|) / beta)."""
    ends = (SEQUENCES == V - 1).argmax(axis=1) + 1
    length = np.where((SEQUENCES == V - 1).any(axis=1), ends, T)
    beginning = [tuple(s[:n]) for s, n in zip(SEQUENCES, length, strict=True)]
    kept = np.array([beginning.index(b) for b in dict.fromkeys(beginning)])  # one of each
    length, reference, alpha, beta = length[kept], table(1), 0.4, 0.5
    r = rewards()[kept] + alpha * length  # what labellers see: they like length

    def cut(batch: Batch, *indices: np.ndarray) -> Batch:
        alive = jnp.asarray(np.arange(T + 1) <= np.stack([length[i] for i in indices], axis=1)[..., None])
        return batch | {"completion_mask": batch["completion_mask"] & alive}

    def log_probs(params: Params) -> np.ndarray:
        batch = cut(responses(kept), np.arange(len(kept)))
        return np.asarray(sequence(apply(params, batch).logps, batch)[:, 0], np.float64)

    i, j = np.nonzero(~np.eye(len(kept), dtype=bool))
    batch = cut(responses(kept[i], kept[j]), i, j)
    preferred = 1 / (1 + np.exp(-(r[i] - r[j])))
    batch |= {"ref_logps": apply(reference, batch).logps, "probability": jnp.asarray(preferred, jnp.float32)}
    np.testing.assert_allclose(np.exp(log_probs(reference)).sum(), 1.0, rtol=1e-6)
    trained = np.exp(log_probs(train(expected(r_dpo(beta, alpha)), reference, batch)))
    assert total_variation(trained, normalised(log_probs(reference) + rewards()[kept] / beta)) < 1e-3
    assert total_variation(trained, normalised(log_probs(reference) + r / beta)) > 0.05


@pytest.mark.slow
def test_ktos_mismatched_kl_is_the_kl_where_responses_are_the_policys():
    """A uniform policy and every response once, each behind a prompt of its own, which this model does not see."""
    batch = responses(np.arange(S))
    batch["tokens"] = batch["tokens"].at[:, 0, 0].set(jnp.arange(S) + 10)
    batch["mask"] = jnp.ones(batch["tokens"].shape, bool)
    reference, uniform = table(1), jax.tree.map(jnp.zeros_like, table(1))
    exact = np.mean(-np.log(S) - distribution(reference))
    kl = mismatched_kl(Model(apply, uniform), Model(apply, reference))(batch)["kto_kl"]
    np.testing.assert_allclose(kl, np.full(S, exact), rtol=1e-5)


@pytest.mark.parametrize("make", [sft, summed_sft])
def test_sft_finds_the_distribution_of_its_data(make):
    p = normalised(rewards())
    batch = responses(np.arange(S)) | {"probability": jnp.asarray(p, jnp.float32)}
    loss = expected(make()) if make is summed_sft else Loss(
        tuple((c, t._replace(over=lambda b: b["completion_mask"][:, 0] * b["probability"][:, None])) for c, t in sft().terms)
    )  # fmt: skip
    assert total_variation(np.exp(distribution(train(loss, table(0), batch))), p) < 1e-3


# --- RPO against DPO (Liu et al. 2024) ---

CHOSEN, REJECTED = np.array([0, 1, 3, 9, 13]), np.array([2, 4, 5, 10, 12])  # many prefixes shared, so pushing down hits the chosen too


def noisy_labels(reference: Params) -> Batch:
    """A few pairs, one of them in both orders."""
    return pairs(np.r_[CHOSEN, REJECTED[:1]], np.r_[REJECTED, CHOSEN[:1]], reference)


def chosen_ratio(loss: Loss, seed: int, steps: int) -> np.ndarray:
    reference = table(seed)
    ratio = distribution(train(loss, reference, noisy_labels(reference), steps)) - distribution(reference)
    return ratio[np.r_[CHOSEN, REJECTED[:1]]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("regularised", [rpo(beta=0.1, eta=0.5), rpo_token_mean(beta=0.1, eta=0.2)], ids=["rpo", "rpo_token_mean"])
def test_rpo_keeps_the_chosen_more_likely_than_dpo(regularised, seed):
    """The mean log-ratio of chosen responses, which DPO lets fall: mass goes to sequences that no pair holds."""
    plain, kept = chosen_ratio(dpo(beta=0.1), seed, 600), chosen_ratio(regularised, seed, 600)
    assert kept.mean() > plain.mean() + 0.3


@pytest.mark.slow
def test_dpo_lets_the_chosen_fall_and_mass_leave_the_data():
    reference = table(1)
    inside = np.unique(np.r_[CHOSEN, REJECTED])
    mass = lambda params: np.delete(np.exp(distribution(params)), inside).sum()
    batch = noisy_labels(reference)
    plain, kept = (train(loss, reference, batch, 600) for loss in (dpo(beta=0.1), rpo(beta=0.1, eta=0.5)))
    assert mass(kept) < mass(plain) - 0.1
    assert mass(kept) < mass(reference)


# --- gradients ---


@pytest.mark.parametrize(
    "loss", [sft(), summed_sft(), dpo(), dpo(0.7, 0.2), ipo(), rpo(eta=2.0), rpo_token_mean()],
    ids=["sft", "summed_sft", "dpo", "cdpo", "ipo", "rpo", "rpo_token_mean"],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(loss):
    """The check runs in float64, with ragged completions and an empty one."""
    with jax.enable_x64(True):
        double = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
        batch = responses(np.arange(6), np.arange(10, 16))
        mask = np.array(batch["completion_mask"])
        mask[0, 0, 3], mask[1, 1, 2:], mask[2] = False, False, False
        batch["completion_mask"] = jnp.asarray(mask)
        batch["ref_logps"] = apply(double(table(1)), batch).logps
        value = lambda params: loss(apply(params, batch), batch, loss.normalised(batch))[0]
        params = double(table(0))
        assert value(params).dtype == jnp.float64
        check_grads(jax.jit(value), (params,), order=1, modes=["rev"], atol=1e-7, rtol=1e-6, eps=1e-5)


# --- online: all 27 responses to one prompt, weighted by how likely the policy that samples finds them ---


def online(params: Params, reference: Params, r: np.ndarray) -> Batch:
    """Every response as one of a group, with its reward, what sampler and reference give it, and its probability at each token."""
    batch = responses(*np.arange(S)[:, None]) | {"rewards": jnp.asarray(r, jnp.float32)[None]}
    batch |= {"old_logps": apply(params, batch).logps, "ref_logps": apply(reference, batch).logps}
    probability = jnp.exp(sequence(batch["old_logps"], batch))[..., None]  # [1, S, 1]
    return batch | {"probability": jnp.where(batch["completion_mask"], probability, 0.0)}


def exact_values(batch: Batch) -> Batch:
    """The values of a perfect critic: the expected sum of later rewards after each prefix."""
    p = batch["probability"][0, :, 1]
    to_go = jnp.flip(jnp.cumsum(jnp.flip(batch["token_rewards"][0], 1), axis=1), 1)  # [S, 1 + T]
    prefixes = [(p * to_go[:, 1 + t]).reshape(V**t, -1).sum(1) / p.reshape(V**t, -1).sum(1) for t in range(T)]
    values = jnp.stack([jnp.repeat(x, S // len(x)) for x in prefixes], axis=1)  # [S, T]
    return batch | {"values": jnp.pad(values, ((0, 0), (1, 0)))[None]}


ONLINE = {  # beta 0.5
    "ppo": (losses.ppo(), chain(kl_reward(0.5), jax.tree_util.Partial(exact_values), gae())),
    "rloo": (losses.rloo(), chain(kl_reward(0.5), leave_one_out())),
    "grpo": (losses.grpo(), chain(kl_reward(0.5), group_relative(std=False))),
}


def iterate(loss: Loss, experience, reference: Params, r: np.ndarray, rollouts: int = 250, steps: int = 2) -> Params:
    """Rollouts of the policy as it stands, several steps on each with its old log-probs; exact expectations, Adam, its rate going to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, rollouts * steps))
    step = make_step(apply, expected(loss), optimizer)

    def turn(state, _):
        batch = experience(online(state.params, reference, r))
        return jax.lax.scan(lambda state, _: step(state, batch), state, length=steps)

    state, metrics = jax.jit(lambda state: jax.lax.scan(turn, state, length=rollouts))(init_state(reference, optimizer, jax.random.key(0)))
    assert state.skipped == 0
    assert np.ptp(metrics["ratio"][0]) > 0  # a rollout's second step is off its policy
    return state.params


@pytest.mark.parametrize("name", [name if name == "rloo" else pytest.param(name, marks=pytest.mark.slow) for name in ONLINE])
def test_online_methods_find_the_policy_of_rlhf(name):
    """pi proportional to ref exp(r / beta), the same that DPO finds, by each method's own advantages and surrogate."""
    r, reference = rewards(), table(1)
    target = normalised(distribution(reference) + r / 0.5)
    assert total_variation(np.exp(distribution(reference)), target) > 0.3
    assert total_variation(np.exp(distribution(iterate(*ONLINE[name], reference, r))), target) < 1e-3


@pytest.mark.parametrize("make", [losses.kl_k2, losses.kl_k3])
def test_a_kl_of_tokens_leaves_out_that_prefixes_are_the_policys_too(make):
    """The gradient is that of the KL at each prefix (k2: reverse, k3: forward), with the probabilities of prefixes held constant."""
    params, reference = table(0), table(1)
    batch = jax.jit(online)(params, reference, rewards())
    loss = expected(make())
    found = jax.jit(jax.grad(lambda params: loss(apply(params, batch), batch, (batch["probability"],))[0]))(params)
    p = batch["probability"][0, :, 1]

    def at_prefixes(params: Params) -> jax.Array:
        total = jnp.zeros(())
        for t in range(T):
            pi, ref = jax.nn.log_softmax(params[t]), jax.nn.log_softmax(reference[t])
            pair = (pi, ref) if make is losses.kl_k2 else (ref, pi)
            total += p.reshape(V**t, -1).sum(1) @ jnp.sum(jnp.exp(pair[0]) * (pair[0] - pair[1]), axis=-1)
        return total

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, jax.jit(jax.grad(at_prefixes))(params))
    log_ratio = lambda logps: sequence(logps - batch["ref_logps"], batch)
    kl = lambda params: jnp.sum(jnp.exp(sequence(q := apply(params, batch).logps, batch)) * log_ratio(q))  # of whole responses
    assert max(np.abs(x - y).max() for x, y in zip(found, jax.jit(jax.grad(kl))(params), strict=True)) > 0.01
