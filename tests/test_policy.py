"""Losses of online RL against TRL's numbers, the formulas of PPO, and what each estimator's gradient really is."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import close, run

from alignax import losses
from alignax.experience import chain, chi2_estimate, gae, kl_reward, whiten_advantages
from alignax.losses import Loss, by_mean, by_response, by_token, response_mean, token_mean, token_sum
from alignax.losses.responses import differing, k3, responses
from alignax.types import Batch, Outputs

ORACLES = json.loads((Path(__file__).parent / "oracles" / "policy.json").read_text())


def behind_a_prompt(x) -> jax.Array:
    """Values of completions [R, T], placed after a prompt of one token: [R, 1, 1 + T]."""
    return jnp.pad(jnp.asarray(np.array(x))[:, None], ((0, 0), (0, 0), (1, 0))).astype(jnp.float32)


def sampled(fields: dict) -> tuple[jax.Array, Batch]:
    """Log-probs [R, 1, 1 + T] of the policy, and the batch, from lists of completions."""
    batch = {"completion_mask": behind_a_prompt(fields["completion_mask"]).astype(bool)}
    batch |= {name: behind_a_prompt(fields[name]) for name in ("old_logps", "ref_logps", "sampled_logps") if name in fields}
    batch["advantages"] = jnp.asarray(fields["advantages"], jnp.float32)[:, None, None] * batch["completion_mask"]
    return behind_a_prompt(fields["logps"]), batch


def tokens(log_ratio: list[float], advantages: list[float]) -> tuple[jax.Array, Batch]:
    """Responses of one token each, behind a prompt of one: [R, 1, 2]."""
    column = lambda x: behind_a_prompt(np.array(x)[:, None])
    logps = column(log_ratio)
    mask = jnp.zeros(logps.shape, bool).at[..., 1].set(True)
    return logps, {"completion_mask": mask, "old_logps": jnp.zeros(logps.shape), "advantages": column(advantages)}


def per_token(objective: Loss, logps: jax.Array, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of each response of one token, before they are averaged: [R]."""
    ((_, term),) = objective.terms
    values = term.value(Outputs(logps, logps), batch)[0][:, 0, 1]
    return np.asarray(values), len(values) * np.asarray(run(objective, logps, batch)[2])[:, 0, 1]


PROGRAM = jax.jit(lambda experience, batch: experience(batch))


# --- numbers of others ---

AGGREGATES = {
    "grpo": response_mean, "sapo": response_mean, "bnpo": token_mean, "dapo": token_mean, "cispo": token_mean, "vespo": token_mean,
    "dr_grpo": token_sum(8), "luspo": token_sum(1),
}  # fmt: skip


def of_trl(o: dict) -> Loss:
    """The loss that TRL calls so."""
    kind = o.get("loss_type", "rloo")
    if kind in ("rloo", "gmpo"):
        return losses.rloo(o["epsilon_low"], o["epsilon_high"]) if kind == "rloo" else losses.gmpo(o["epsilon"])
    aggregate = AGGREGATES[kind]
    if kind in ("cispo", "sapo", "vespo"):
        makers = {"cispo": lambda: losses.cispo(o["epsilon_high"]), "sapo": losses.sapo, "vespo": losses.vespo}
        loss = makers[kind]()
    elif "delta" in o:  # below the clip it bounds ratios above for A > 0, and leaves those for A < 0 the clip's own bound
        loss = losses.ppo(o["epsilon"], o["delta"] - 1, 1 + o["epsilon"], aggregate)
    else:
        make = losses.gspo if o["importance_sampling_level"] == "sequence" else losses.grpo
        loss = make(o["epsilon"], o["epsilon_high"], aggregate)
    if "off_policy_mask_threshold" in o:
        loss = losses.off_policy_masked(loss, o["off_policy_mask_threshold"])
    kl = losses.kl_k3_weighted if o["use_bias_correction_kl"] else losses.kl_k3
    return loss + o["beta"] * kl(aggregate) if o["beta"] else loss


def share(o: dict, batch: Batch) -> float:
    """The share of a step that TRL gives a microbatch: by number of parts, or by tokens where its average is over all tokens."""
    parts = o.get("gradient_accumulation_steps", 1)
    if o.get("loss_type") in ("dapo", "cispo", "vespo"):
        return float(batch["completion_mask"].sum()) / (o["num_items_in_batch"] * parts / o["steps_per_generation"])
    return 1 / parts


def sampler(o: dict, fields: dict) -> np.ndarray:
    """Log-probs of whoever sampled: given, or as the ratios old / sampled say, whose product runs over padding too, or the old policy's."""
    if "off_policy_mask_threshold" in o:
        return np.array(fields["sampling_logps"])
    old, ratio = np.array(fields["old_logps"]), np.log(fields["importance_ratio"])
    ratio[:, 0] += np.where(fields["completion_mask"], 0.0, ratio).sum(axis=1)
    return old - ratio if o.get("use_importance_sampling_ratio") else old


@pytest.mark.parametrize("o", ORACLES["trl"], ids=lambda o: f"{o['id']}-{o.get('loss_type', 'rloo')}")
def test_values_and_gradients_are_trls(o):
    fields = ORACLES["inputs"][o["inputs"]]
    logps, batch = sampled(fields)
    if o.get("on_policy"):
        del batch["old_logps"]
    if o["inputs"] == "grpo":
        batch["sampled_logps"] = behind_a_prompt(sampler(o, fields))
    loss, part = of_trl(o), share(o, batch)
    value, metrics, grads = run(loss, logps, batch)
    close(part * value, o["loss"])
    close(part * grads[:, 0, 1:], np.array(o["grads"]) * batch["completion_mask"][:, 0, 1:])
    if o.get("loss_type", "rloo") in ("bnpo", "dapo", "rloo"):  # those whose metrics are averaged as the loss is
        close(metrics["clip_ratio/low"], o["metrics"]["clip_ratio/low_mean"])
        close(metrics["clip_ratio/high"], o["metrics"]["clip_ratio/high_mean"])


def test_the_families_of_trl_are_all_there():
    kinds = {(o.get("loss_type", "rloo"), o.get("importance_sampling_level")) for o in ORACLES["trl"]}
    assert len(kinds) >= 12 and {o.get("use_bias_correction_kl") for o in ORACLES["trl"] if o.get("beta")} == {True, False}


def rollout(config: dict) -> tuple[jax.Array, Batch]:
    """Log-probs and the batch of PPO's case, with its advantages: GAE of penalised rewards, whitened."""
    fields = {name: behind_a_prompt(x) for name, x in ORACLES["inputs"]["ppo"].items() if name not in ("scores", "mask")}
    batch = {"completion_mask": behind_a_prompt(ORACLES["inputs"]["ppo"]["mask"]).astype(bool), "values": fields["old_values"]}
    batch |= {name: fields[name] for name in ("old_logps", "ref_logps")}
    batch["rewards"] = jnp.asarray(ORACLES["inputs"]["ppo"]["scores"], jnp.float32)[:, None]
    experience = chain(kl_reward(config["kl_beta"]), gae(config["gamma"], config["lam"]))
    return fields["logps"], experience(batch) | {"new_values": fields["values"]}


PPO_AGGREGATES = {"token-mean": token_mean, "seq-mean-token-sum": token_sum(1), "seq-mean-token-mean": response_mean}


@pytest.mark.parametrize("o", [o for o in ORACLES["ppo"] if "policy_loss" in o], ids=lambda o: o["id"])
def test_ppo_and_its_critic(o):
    c = o["config"]
    logps, batch = rollout(c)
    batch = whiten_advantages()(batch)
    aggregate = PPO_AGGREGATES[c["aggregation"]]
    policy = losses.ppo(c["clip_low"], c["clip_high"], c["dual_clip"], aggregate)
    value, _, grads = run(policy, logps, batch)
    close(value, o["policy_loss"])
    close(grads[:, 0, 1:], np.array(o["grads"]["policy_token_logps"]))
    critic = losses.value_loss(c["value_clip"], aggregate)
    weights = critic.normalised(batch)
    f = lambda v: critic(Outputs(logps, logps, values=v), batch, weights)[0]
    value, grads = jax.value_and_grad(f)(batch["new_values"])
    close(value, o["value_loss"])
    close(grads[:, 0, 1:], np.array(o["grads"]["values"]))


@pytest.mark.parametrize("o", [o for o in ORACLES["ppo"] if "estimator" in o["config"]], ids=lambda o: o["config"]["estimator"])
def test_kl_estimators(o):
    logps, batch = rollout({"kl_beta": 0.0, "gamma": 1.0, "lam": 1.0})
    make = {"k1": losses.kl_k1, "k3": losses.kl_k3}[o["config"]["estimator"]]
    close(run(make(token_mean), logps, batch)[0], o["token_mean"])
    close(run(make(token_sum(1)), logps, batch)[0], o["sequence_sum_mean"])
    name = f"kl/ref_{o['config']['estimator']}"
    close(run(losses.ppo(), logps, batch)[1][name], o["token_mean"])


# --- by hand ---


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (losses.ppo(), [(-1.2, 0), (1.5, 1.5), (-0.5, -0.5), (0.8, 0), (-1, -1), (5, 5)]),
        (losses.ppo(clip_high=0.6), [(-1.5, -1.5), (1.5, 1.5), (-0.5, -0.5), (0.8, 0), (-1, -1), (5, 5)]),
        (losses.ppo(dual_clip=3.0), [(-1.2, 0), (1.5, 1.5), (-0.5, -0.5), (0.8, 0), (-1, -1), (3, 0)]),
        (losses.ppo(clip=0.6, clip_high=0.1), [(-1.1, 0), (1.5, 1.5), (-0.5, -0.5), (0.5, 0.5), (-1, -1), (5, 5)]),
        (losses.cispo(cap=1.25), [(-1.25 * math.log(1.5), -1.25), (1.25 * math.log(1.5), 1.25)]),
    ],
    ids=["ppo", "clip_high", "dual_clip", "narrow_above", "cispo"],
)  # fmt: skip
def test_surrogates_of_a_token_by_hand(objective, expected):
    """Value and gradient; the ratio's gradient to log pi is the ratio. The old log-prob is 0."""
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.0, 5.0], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    values, grads = per_token(objective, *tokens(np.log(ratios).tolist(), advantages))
    n = len(expected)
    np.testing.assert_allclose(values[:n], [v for v, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(grads[:n], [g for _, g in expected], rtol=1e-5, atol=1e-6)


def ragged(N: int = 3, T: int = 7, seed: int = 0) -> tuple[jax.Array, Batch]:
    """Groups of responses of 1 to T - 1 tokens, their advantage the same at each token."""
    rng = np.random.default_rng(seed)
    t = np.arange(T)
    mask = jnp.asarray((t >= 1) & (t < 1 + rng.integers(1, T, (4, N, 1))))
    draw = lambda: jnp.where(mask, jnp.asarray(-rng.exponential(1.0, mask.shape), jnp.float32), 0.0)
    return draw(), {"completion_mask": mask, "ref_logps": draw(), "advantages": jnp.asarray(rng.normal(size=(4, N, 1)), jnp.float32) * mask}


def test_aggregates_by_hand():
    """Responses of 1 and of 3 tokens: advantages -4 and -1, so that a token's loss is 4 and 1."""
    logps = jnp.zeros((1, 2, 4))
    mask = jnp.array([[[0, 1, 0, 0], [0, 1, 1, 1]]], bool)
    batch = {"completion_mask": mask, "advantages": jnp.array([[[-4.0], [-1.0]]]) * mask}
    for aggregate, value, first in [
        (token_mean, 7 / 4, 4 / 4),
        (response_mean, (4 + 1) / 2, 4 / 2),
        (token_sum(1), (4 + 3) / 2, 4 / 2),
        (token_sum(10), (4 + 3) / 20, 4 / 20),
    ]:
        found, metrics, grads = run(losses.ppo(aggregate=aggregate), logps, batch)
        close(found, value)
        close(grads[0, 0, 1], first)
        close(metrics["ratio"], 1.0)  # metrics are means, whatever the scale


LOG_RATIOS = [0.5, -0.1, 0.2, 0.4]  # of a response of one token, and of one of three; their mean is 1/6, their sum 0.5
LEVELS = {by_token: LOG_RATIOS, by_mean: [0.5] + 3 * [0.5 / 3], by_response: 4 * [0.5]}
CLIPPED = lambda r, a: np.maximum(-a * r, -a * np.clip(r, 0.8, 1.2))
GATED = lambda r, a: -a * 4 / np.where(a > 0, 1.0, 1.05) / (1 + np.exp(-np.where(a > 0, 1.0, 1.05) * (r - 1)))
OF_RATIOS = {  # value of a token, from its ratio, its advantage and its log-prob, which is its log-ratio here
    "ppo": (losses.ppo, lambda r, a, logp: CLIPPED(r, a)),
    "grpo": (lambda **level: losses.grpo(aggregate=token_mean, **level), lambda r, a, logp: CLIPPED(r, a)),
    "cispo": (lambda **level: losses.cispo(1.3, **level), lambda r, a, logp: -np.minimum(r, 1.3) * a * logp),
    "sapo": (lambda **level: losses.sapo(aggregate=token_mean, **level), lambda r, a, logp: GATED(r, a)),
    "kl_k3_weighted": (lambda **level: losses.kl_k3_weighted(token_mean, **level), lambda r, a, logp: r * (np.exp(-logp) - 1 + logp)),
}


def one_and_three() -> tuple[jax.Array, Batch]:
    """A response of one token and one of three, advantages -1 and 1; the old policy and the reference gave every token a log-prob of 0."""
    logps = jnp.array([[[0.0, 0.5, 0.0, 0.0], [0.0, -0.1, 0.2, 0.4]]])
    mask = jnp.array([[[0, 1, 0, 0], [0, 1, 1, 1]]], bool)
    zeros = jnp.zeros(logps.shape)
    return logps, {"completion_mask": mask, "old_logps": zeros, "ref_logps": zeros, "advantages": jnp.array([[[-1.0], [1.0]]]) * mask}


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.__name__)
@pytest.mark.parametrize("name", OF_RATIOS)
def test_every_loss_of_a_ratio_takes_its_level(name, level):
    """The ratio of a token, of a response's mean, or of the whole response: by hand, value and metric."""
    make, value = OF_RATIOS[name]
    ratio, advantages = np.exp(LEVELS[level]), np.array([-1.0, 1.0, 1.0, 1.0])
    found, metrics, _ = run(make(level=level), *one_and_three())
    close(found, value(ratio, advantages, np.array(LOG_RATIOS)).mean())
    if name != "kl_k3_weighted":
        close(metrics["ratio"], ratio.mean())


def test_levels_that_have_a_name_of_their_own():
    """GSPO is GRPO by mean, RLOO's surrogate PPO by response; sapo by mean differs from sapo by token."""
    logps, batch = one_and_three()
    for one, other in [
        (losses.gspo(0.1, 0.15), losses.grpo(0.1, 0.15, level=by_mean)),
        (losses.rloo(), losses.ppo(aggregate=response_mean, level=by_response)),
    ]:
        (value, _, grads), (expected, _, expected_grads) = run(one, logps, batch), run(other, logps, batch)
        assert value == expected and np.any(grads)
        np.testing.assert_array_equal(grads, expected_grads)
    _, _, grads = run(losses.sapo(level=by_mean), logps, batch)
    m = np.exp(0.5 / 3)
    gate = 1 / (1 + np.exp(1 - m))
    close(grads[0, 1, 1:], np.full(3, -4 * gate * (1 - gate) * m / 3 / 2))  # half of the mean over responses, a third for each token


# What the papers write, on a response of one token that has moved and one of nine that has not: d is log pi/ref, A the advantage.
D, SHORT = 1.0, np.exp(-1.0)  # k3 of d = 1 is exp(-1)
RECIPES = {
    "GRPO": (losses.grpo() + 0.04 * losses.kl_k3(), (-1 + 1 * 1) / 2 + 0.04 * SHORT / 2),  # eq. 3: the KL within 1/|o| sum_t
    "DeepSeek-V3.2": (losses.grpo() + 0.04 * losses.kl_k3_weighted(), 0.04 * SHORT / 2),
    "GRPO by tokens": (losses.grpo(aggregate=token_mean) + 0.04 * losses.kl_k3(token_mean), (-1 + 9) / 10 + 0.04 * SHORT / 10),
    "Dr. GRPO": (losses.grpo(aggregate=token_sum(9)), (-1 + 9) / 2 / 9),
    "DAPO": (losses.finished(losses.grpo(clip_high=0.28, aggregate=token_mean)), (-1 + 9) / 10),
    "PPO": (losses.ppo(), (-1 + 9) / 10),
    "REINFORCE++": (losses.ppo(), (-1 + 9) / 10),
    "RLOO": (losses.rloo(), (-1 + 1) / 2),
    "GSPO": (losses.gspo(), (-1 + 1) / 2),
    "CISPO": (losses.cispo(), (0.5 - 9 * 0.25) / 10),  # log-probs -0.5 and -0.25
    "SAPO": (losses.sapo(), (-4 / 1.0 / 2 + 4 / 1.05 / 2) / 2),
    "VESPO": (losses.vespo(), (0.5 - 9 * 0.25) / 10),
    "GMPO": (losses.gmpo(), (-1 + 1) / 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_papers_on_lengths_of_one_and_nine(name):
    """The batch is on-policy with advantages 1 and -1, so recipes differ only in how surrogate and KL average tokens."""
    objective, expected = RECIPES[name]
    mask = np.zeros((1, 2, 11), bool)
    mask[0, 0, 1], mask[0, 1, 1:10] = True, True
    logps = jnp.asarray(np.where(mask, [[[-0.5], [-0.25]]], 0.0), jnp.float32)
    batch = {"completion_mask": jnp.asarray(mask), "advantages": jnp.array([[[1.0], [-1.0]]]) * mask}
    batch |= {"ref_logps": logps.at[0, 0, 1].add(-D), "old_logps": logps, "sampled_logps": logps, "truncated": jnp.zeros((1, 2), bool)}
    close(run(objective, logps, batch)[0], expected)
    assert differing(objective) == ""


def test_a_kl_beside_a_surrogate_of_another_average_is_told_of():
    assert differing(losses.grpo() + 0.04 * losses.kl_k3(token_mean)) == (
        "the terms of the loss are averaged differently (grpo over responses, kl_k3 over tokens); if they belong to one objective, "
        "give them the same aggregate"
    )
    assert "kl_k2 over responses, as token sums divided by 8" in differing(losses.ppo() + losses.kl_k2(token_sum(8)))
    masked = losses.finished(losses.importance_weighted(losses.grpo(aggregate=token_mean)))
    assert "grpo over tokens, kl_k3 over responses" in differing(masked + losses.kl_k3())
    for meant in (losses.dpo() + losses.sft(), losses.quark(), losses.ppo() + 0.1 * losses.value_loss() + 0.01 * losses.entropy_bonus()):
        assert differing(meant) == ""
    assert differing(losses.rloo() + losses.chi2()) == ""  # a penalty of whole responses has one average


ON_POLICY = {
    "ppo": (losses.ppo(), losses.reinforce()),
    "grpo": (losses.grpo(), losses.reinforce(response_mean)),
    "dr_grpo": (losses.grpo(aggregate=token_sum(9)), losses.reinforce(token_sum(9))),
    "gspo": (losses.gspo(), losses.reinforce(response_mean)),
    "gmpo": (losses.gmpo(), losses.reinforce(response_mean)),
    "rloo": (losses.rloo(), losses.reinforce(token_sum(1))),
    "cispo": (losses.cispo(), losses.reinforce()),
    "sapo": (losses.sapo(), losses.reinforce(response_mean)),
    "vespo": (losses.vespo(), losses.reinforce()),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_first_gradient_of_a_rollout_is_reinforces(name):
    """Old log-probs are absent or the policy's own: ratios are 1 and have the gradient of log pi."""
    objective, policy_gradient = ON_POLICY[name]
    logps, batch = ragged()
    batch["sampled_logps"] = logps
    expected = run(policy_gradient, logps, batch)[2]
    assert np.any(expected)
    for fields in (batch, batch | {"old_logps": logps}):
        _, metrics, grads = run(objective, logps, fields)
        close(grads, expected)
        close(metrics["ratio"], 1.0)
        assert metrics["kl/old_k3"] == metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0.0


def test_a_second_step_on_a_rollout_is_against_the_old_policy():
    """Where the policy has moved, old log-probs make another gradient, and clip what has moved too far."""
    logps, batch = ragged()
    moved = logps + 0.3 * jnp.sign(batch["advantages"])
    stale, fresh = (run(losses.ppo(), moved, x)[2] for x in (batch | {"old_logps": logps}, batch))
    assert not np.any(stale)  # every ratio is outside the clip on the side that its advantage wants
    assert np.any(fresh)
    _, metrics, _ = run(losses.ppo(), moved, batch | {"old_logps": logps})
    close(metrics["clip_ratio/low"] + metrics["clip_ratio/high"], 1.0)
    close(metrics["ratio"], np.mean(np.exp(np.where(batch["advantages"] > 0, 0.3, -0.3))[np.array(batch["completion_mask"])]))


@pytest.mark.parametrize("objective", [losses.ppo(), losses.grpo(), losses.rloo(), losses.gmpo(), losses.kl_k3_weighted()])
def test_padding_and_neighbours_do_not_alter_a_response(objective):
    """Values outside of completions are not read: log-probs, advantages, old and reference log-probs."""
    logps, batch = ragged()
    batch["old_logps"] = logps - 0.1
    mask = batch["completion_mask"]
    value, metrics, grads = run(objective, logps, batch)
    noise = lambda x: jnp.where(mask, x, 1e3)
    other = {k: noise(x) if k in ("ref_logps", "old_logps", "advantages") else x for k, x in batch.items()}
    again, again_metrics, again_grads = run(objective, noise(logps), other)
    assert again == value
    np.testing.assert_array_equal(again_grads, grads)
    assert again_metrics.keys() == metrics.keys() and all(again_metrics[k] == metrics[k] for k in metrics if k != "entropy")


def test_what_was_cut_is_left_out_of_value_and_metrics():
    """The result is that of a batch without the response that was cut."""
    logps, batch = ragged()
    batch["truncated"] = jnp.asarray(np.arange(12).reshape(4, 3) % 3 == 1)
    others = batch | {"completion_mask": batch["completion_mask"] & ~batch["truncated"][..., None]}
    for objective in (losses.grpo(), losses.ppo(), losses.chi2()):
        expected, expected_metrics, expected_grads = run(objective, logps, others)
        value, metrics, grads = run(losses.finished(objective), logps, batch)
        close(value, expected)
        close(grads, expected_grads)
        assert run(objective, logps, batch)[0] != expected
        for name, x in metrics.items():
            close(x, expected_metrics[name])
    with pytest.raises(ValueError, match=r"finished\(\) drops responses, of shape \(4, 3\), but the loss has weights of shape \(4,\)"):
        losses.finished(losses.summed_sft()).weights(batch)


def test_importance_weights_are_cut_off_and_carry_no_gradient():
    """old/sampled of 0.5, 1, 1.5, 8 .. against a cap of 2."""
    logps, batch = tokens([0.0] * 6, [1.0] * 6)
    batch["sampled_logps"] = behind_a_prompt(-np.log([[0.5], [1.0], [1.5], [8.0], [1e9], [1e-9]]))
    weighted = losses.importance_weighted(losses.ppo(), cap=2.0)
    weights = np.array([0.5, 1, 1.5, 2, 2, 0])
    for fields in (batch, {k: x for k, x in batch.items() if k != "old_logps"}):
        values, grads = per_token(weighted, logps, fields)
        np.testing.assert_allclose(grads, -weights, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(values, -weights, rtol=1e-6, atol=1e-8)
    close(run(weighted, logps, batch)[1]["importance_weight"], weights.mean())
    metrics = run(losses.importance_weighted(losses.ppo(), cap=20.0, floor=0.75), logps, batch)[1]
    close(metrics["importance_weight"], np.mean([0.75, 1, 1.5, 8, 20, 0.75]))
    masked = losses.importance_masked(losses.ppo(), 0.5 - 1e-6, 5.0)
    np.testing.assert_allclose(per_token(masked, logps, batch)[1], -np.array([0.5, 1, 1.5, 0, 0, 0]), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"these weights are of tokens or responses, but the term 'dpo'"):
        pairs, batch = ragged(N=2)
        run(losses.importance_weighted(losses.dpo()), pairs, batch | {"sampled_logps": pairs})


def test_importance_weights_of_tokens_and_of_responses():
    """old / sampled of exp 0.5, and of exp -0.1, 0.2, 0.4, whose product is exp 0.5 too; values of responses are weighed by that."""
    logps, batch = one_and_three()
    batch |= {"old_logps": logps, "sampled_logps": jnp.zeros(logps.shape)}
    tokens = np.exp(LOG_RATIOS)
    advantages = np.array([-1.0, 1.0, 1.0, 1.0])
    whole = np.exp(0.5)
    for objective, weights in [
        (losses.importance_weighted(losses.ppo(), cap=1.3), np.minimum(tokens, 1.3)),
        (losses.importance_weighted(losses.ppo(), cap=3.0, level=by_response), np.full(4, whole)),
        (losses.importance_weighted(losses.ppo(), cap=1.5, level=by_response), np.full(4, 1.5)),
        (losses.importance_masked(losses.ppo(), 1.0, 1.6), np.where((tokens >= 1.0) & (tokens <= 1.6), tokens, 0.0)),
        (losses.importance_masked(losses.ppo(), 0.5, 1.6, by_response), np.zeros(4)),
        (losses.importance_masked(losses.ppo(), 0.0, 3.0, by_response), np.full(4, whole)),
    ]:
        value, metrics, grads = run(objective, logps, batch)
        close(value, (-advantages * weights).mean())
        close(metrics["importance_weight"], weights.mean())
        close(np.asarray(grads)[np.asarray(batch["completion_mask"])], -advantages * weights / 4)
    of_responses = losses.importance_weighted(losses.make_loss("mine", lambda out, batch: (out.logps[..., 1], {}), responses), cap=3.0)
    close(run(of_responses, logps, batch)[0], whole * (0.5 - 0.1) / 2)


def test_a_bad_response_that_the_policy_has_left_is_masked():
    """Mean of log sampled - log pi of 0.3 and of 0.1 nats a token against a threshold of 0.2; one that was good is kept."""
    logps, batch = one_and_three()
    mask = batch["completion_mask"]
    batch |= {"old_logps": logps, "sampled_logps": logps + jnp.array([[[0.3], [0.1]]])}
    for advantages, kept in [((-1.0, -1.0), (0, 1)), ((1.0, -1.0), (1, 1)), ((-1.0, 1.0), (0, 1))]:
        own = batch | {"advantages": jnp.array(advantages)[None, :, None] * mask}
        value, metrics, grads = run(losses.off_policy_masked(losses.grpo(), 0.2), logps, own)
        close(value, -np.dot(advantages, kept) / 2)
        close(metrics["off_policy/kept"], np.mean(kept))
        assert [bool(np.any(grads[0, i])) for i in range(2)] == [bool(k) for k in kept]


def test_vespos_weight_by_hand():
    """phi(w) = w^k exp(lambda (1 - w)), at w of exp 0.5 of a bad response and of a good one; no gradient goes into it."""
    logps, batch = one_and_three()
    batch["sampled_logps"] = jnp.zeros(logps.shape)
    w = np.exp(0.5)
    bad, good = w**3 * np.exp(2 * (1 - w)), w**2 * np.exp(3 * (1 - w))
    value, metrics, grads = run(losses.vespo(), logps, batch)
    close(value, (bad * 0.5 - good * 0.5) / 4)
    close(metrics["vespo/weight"], (bad + 3 * good) / 4)
    close(grads[0, :, 1:], np.array([[bad, 0, 0], [-good, -good, -good]]) / 4)
    far = batch | {"sampled_logps": jnp.asarray([[[-500.0], [500.0]]]) * batch["completion_mask"]}
    value, metrics, grads = run(losses.vespo(), logps, far)
    assert np.isfinite(value) and np.abs(grads).max() < 1e-6  # far off either way nothing is learnt


def test_importance_weights_undo_another_sampler():
    """Tokens drawn from q with weights pi_old/q: the expected gradient is that of samples of the old policy, where no weight is cut."""
    q, advantages = jax.nn.softmax(jnp.array([0.0, 0.4, -0.3, 0.2, 0.1])), jnp.array([1.0, -0.5, 0.2, -1.0, 0.0])
    weighted = losses.importance_weighted(losses.reinforce(), cap=10.0)
    off = gradient(weighted, THETA, None, q, {"sampled_logps": jnp.log(q)}, advantages)
    close(off, gradient(losses.reinforce(), THETA, None, jax.nn.softmax(THETA), {}, advantages))
    assert np.abs(gradient(losses.reinforce(), THETA, None, q, {}, advantages) - off).max() > 0.01


def test_heads_of_a_critic_are_added_up_with_their_weights():
    logps, batch = ragged()
    inside = np.array(batch["completion_mask"])
    values, old, returns = (np.random.default_rng(i).normal(size=(*logps.shape, 3)).astype(np.float32) for i in range(3))
    batch |= {"values": jnp.asarray(old), "returns": jnp.asarray(returns)}
    near = old + np.clip(values - old, -0.2, 0.2)
    each = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)[inside].mean(axis=0)  # of a head
    for weights, expected in (((), each.mean()), ((0.2, 0.5, 0.0), 0.2 * each[0] + 0.5 * each[1])):
        loss = losses.value_loss(heads=weights)
        total = lambda v, loss=loss: loss(Outputs(logps, logps, values=v), batch, loss.normalised(batch))
        value, metrics = total(jnp.asarray(values))
        close(value, expected)
        close(metrics["values/mean/head_1"], values[inside, 1].mean())
        assert "values/mean" not in metrics
        gradient = jax.grad(lambda v, total=total: total(v)[0])(jnp.asarray(values))
        assert bool(np.any(gradient[..., 2])) == (weights == ())
    one = lambda heads: losses.value_loss(heads=heads)(
        Outputs(logps, logps, values=jnp.asarray(values[..., 0])),
        batch | {name: batch[name][..., 0] for name in ("values", "returns")},
        losses.value_loss().normalised(batch),
    )[0]
    close(one(()), each[0])
    close(one((0.5,)), 0.5 * each[0])
    with pytest.raises(ValueError, match="weights for 2 heads, but the critic has 3"):
        losses.value_loss(heads=(0.2, 0.5))(Outputs(logps, logps, values=jnp.asarray(values)), batch, loss.normalised(batch))


def test_an_unclipped_value_loss_is_half_the_squared_error():
    logps, batch = ragged()
    values, returns = 3.0 * logps, logps
    batch |= {"values": jnp.zeros(logps.shape), "returns": returns}
    loss = losses.value_loss(clip=math.inf)
    value, metrics = loss(Outputs(logps, logps, values=values), batch, loss.normalised(batch))
    inside = np.array(batch["completion_mask"])
    close(value, 0.5 * np.mean(np.square(np.array(values - returns)[inside])))
    e, q, r, m = (metrics[k] for k in ("values/squared_error", "returns/mean_square", "returns/mean", "values/mean"))
    explained = 1 - (e - (r - m) ** 2) / (q - r**2)
    close(explained, 1 - np.var(np.array(returns - values)[inside]) / np.var(np.array(returns)[inside]))
    with pytest.raises(ValueError, match=r"value_loss needs Outputs.values"):
        loss(Outputs(logps, logps), batch, loss.normalised(batch))


# --- gradients in expectation: one token of a vocabulary of V, every token a response, weighted by its probability ---


def gradient(objective: Loss, theta, ref, probabilities, fields=None, advantages=None, data=None) -> np.ndarray:
    """Expected gradient with respect to logits [V], over tokens drawn with fixed probabilities; fields are of tokens [V]."""
    V = theta.shape[0]
    column = lambda x: jnp.stack([jnp.zeros(V), x], axis=-1)[None]  # [1, V, 2]
    mask = column(jnp.ones(V)).astype(bool)
    batch = {"completion_mask": mask} | {k: column(x) for k, x in (fields or {}).items()} | (data or {})
    batch |= {} if ref is None else {"ref_logps": column(ref)}
    batch |= {} if advantages is None else {"advantages": column(advantages)}
    weights = tuple(jnp.where(w > 0, column(probabilities) if w.ndim == 3 else probabilities[None], 0.0) for w in objective.weights(batch))

    def loss(theta):
        logp = jax.nn.log_softmax(theta)
        out = Outputs(column(logp), column(jnp.broadcast_to(-jnp.sum(jnp.exp(logp) * logp), (V,))))
        return objective(out, batch, weights)[0]

    return np.asarray(jax.grad(loss)(theta))


THETA = jnp.array([0.5, -1.0, 0.3, 1.2, -0.4])
REF = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.9, -0.3, 0.1]))
KL = lambda p, q: jnp.sum(jnp.exp(p) * (p - q))
CHI2 = lambda p, q: jnp.sum(jnp.exp(2 * p - q)) - 1
OF_THETA = lambda divergence: np.asarray(jax.grad(lambda theta: divergence(jax.nn.log_softmax(theta), REF))(THETA))
REVERSE, FORWARD = OF_THETA(KL), OF_THETA(lambda p, q: KL(q, p))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (losses.kl_k1(), 0 * REVERSE),
        (losses.kl_k2(), REVERSE),
        (losses.kl_k3(), FORWARD),
        (losses.kl_k3_weighted(), REVERSE),
        (losses.chi2(), OF_THETA(CHI2) / 2 + FORWARD),
        (losses.chi2_exact(), OF_THETA(CHI2)),
        (losses.entropy_bonus(), OF_THETA(lambda p, q: jnp.sum(jnp.exp(p) * p))),
    ],
    ids=["k1", "k2", "k3", "k3_weighted", "chi2", "chi2_exact", "entropy"],
)
def test_the_gradient_that_a_penalty_really_has(objective, expected):
    """Expected over samples of the policy: k1 has gradient 0, k2 the reverse KL's, k3 the forward KL's unless the ratio weights it."""
    p = jax.nn.softmax(THETA)
    found = gradient(objective, THETA, REF, p)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(REVERSE - FORWARD).max() > 0.05


def test_the_weighted_k3_is_unbiased_off_policy():
    """Samples of an old policy: the reverse KL's gradient still, which plain k3 and k2 lose."""
    old = jax.nn.softmax(jnp.array([0.1, 0.2, -0.5, 0.3, 0.0]))
    off = lambda make: gradient(make(), THETA, REF, old, {"old_logps": jnp.log(old)})
    np.testing.assert_allclose(off(losses.kl_k3_weighted), REVERSE, atol=1e-6)
    assert min(np.abs(off(make) - REVERSE).max() for make in (losses.kl_k2, losses.kl_k3)) > 0.05


def test_k3_near_the_reference_has_a_gradient_of_its_own_size():
    """exp(-d) - 1 + d at d of 1e-7 .. 1e-3 has the gradient d, where 1 - exp(-d) in float32 is 0 or twice as much; far off it is finite."""
    d = jnp.asarray([1e-7, -1e-6, 1e-5, 1e-3, 0.5, 1000.0, -1000.0])
    values, grads = jax.vmap(jax.value_and_grad(k3))(d)
    np.testing.assert_allclose(grads[:6], -np.expm1(-np.asarray(d[:6], np.float64)), rtol=1e-6)
    np.testing.assert_allclose(values[3:6], np.expm1(-np.asarray(d[3:6], np.float64)) + d[3:6], rtol=1e-3)
    assert np.isfinite(values).all() and np.isfinite(grads).all() and grads[6] < -1e12


def test_a_kl_in_the_reward_has_the_gradient_of_the_reverse_kl():
    """k1 as a reward: its policy gradient is that of -KL(pi || ref)."""
    p = jax.nn.softmax(THETA)
    column = lambda x: jnp.stack([jnp.zeros(5), x], axis=-1)[None]
    batch = {"completion_mask": column(jnp.ones(5)).astype(bool), "old_logps": column(jnp.log(p)), "ref_logps": column(REF)}
    rewards = kl_reward(1.0)(batch | {"rewards": jnp.zeros((1, 5))})["token_rewards"][0, :, 1]
    np.testing.assert_allclose(gradient(losses.reinforce(), THETA, None, p, {}, rewards), REVERSE, atol=1e-6)


def test_the_root_of_chi_squared():
    """Its gradient by the chain rule, where the estimate is chi-squared itself; near the reference it is bounded."""
    p = jax.nn.softmax(THETA)
    exact = CHI2(jnp.log(p), REF)
    root = losses.square_root(losses.chi2_exact())
    by_chain_rule = gradient(root, THETA, REF, p, data={"chi2": exact[None]})
    np.testing.assert_allclose(by_chain_rule, OF_THETA(lambda p, q: jnp.sqrt(CHI2(p, q))), atol=1e-6)
    np.testing.assert_allclose(gradient(root, THETA, REF, p, data={"chi2": jnp.zeros(1)}), OF_THETA(CHI2) / (2 * 1e-2), rtol=1e-4)


def test_the_estimate_of_chi_squared_is_of_responses_and_of_the_whole_batch():
    """T9: on samples its mean is chi2(pi || ref); a response without a completion takes no part; far ones go on along the tangent."""
    logp, ref = (np.asarray(x, np.float64) for x in (jax.nn.log_softmax(THETA), REF))
    draws = np.repeat(np.arange(5), np.round(1000 * np.exp(logp)).astype(int))
    column = lambda x: np.pad(np.asarray(x, np.float32)[draws][:, None, None], ((0, 7), (0, 0), (1, 0)))  # seven of them are empty
    batch = {"completion_mask": column(np.ones(5)).astype(bool), "old_logps": column(logp), "ref_logps": column(ref)}
    found = PROGRAM(chi2_estimate(), batch)["chi2"]
    assert found.shape == (len(draws) + 7,) and len(np.unique(found)) == 1
    np.testing.assert_allclose(found[0], np.sum(np.exp(2 * logp - ref)) - 1, rtol=0.01)
    assert np.isfinite(PROGRAM(chi2_estimate(), batch | {"old_logps": batch["old_logps"] + np.float32(1000)})["chi2"]).all()


# --- errors ---


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: losses.ppo(clip=-0.1), "clip is -0.1; it must be a distance from 1"),
        (lambda: losses.grpo(clip_high=math.nan), "clip_high is nan"),
        (lambda: losses.ppo(dual_clip=1.0), "dual_clip is 1.0; it must be above 1"),
        (lambda: token_sum(0), "max_length is 0; it must be above 0"),
        (lambda: losses.sapo(tau_negative=0), "tau_negative is 0"),
        (lambda: losses.cispo(cap=0), "cap is 0"),
        (lambda: losses.vespo(k_negative=-1), "k_negative is -1; it must be an exponent"),
        (lambda: losses.importance_weighted(losses.ppo(), cap=1.0, floor=2.0), "floor is 2.0 and cap 1.0; floor must be at least 0"),
        (lambda: losses.importance_masked(losses.ppo(), -1.0), "low is -1.0 and high 5.0"),
        (lambda: losses.off_policy_masked(losses.ppo(), -0.1), "threshold is -0.1"),
        (lambda: losses.value_loss(clip=0), "clip is 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("objective", "name"),
    [(losses.ppo(), "advantages"), (losses.kl_k2(), "ref_logps"), (losses.square_root(losses.chi2()), "chi2")],
)
def test_a_field_that_is_missing_is_named(objective, name):
    logps, batch = ragged()
    del batch[name if name in batch else "advantages"]
    with pytest.raises(ValueError, match=f'the batch has no "{name}"; let experience'):
        run(objective, logps, batch)


@pytest.mark.parametrize(
    "objective", [losses.grpo(), losses.ppo(), losses.rloo(), losses.gspo(), losses.kl_k3()], ids=lambda x: x.terms[0][1].name
)
def test_a_batch_without_a_whole_response_teaches_nothing(objective):
    """All truncated, or all empty: 0, and no NaN."""
    logps, batch = ragged()
    batch |= {"old_logps": logps, "sampled_logps": logps, "rewards": jnp.ones((4, 3))}
    truncated = batch | {"truncated": jnp.ones((4, 3), bool)}
    empty = batch | {"completion_mask": jnp.zeros_like(batch["completion_mask"])}
    for loss, fields in ((losses.finished(objective), truncated), (objective, empty), (losses.importance_weighted(objective), empty)):
        value, metrics, grads = run(loss, logps, fields)
        assert value == 0 and not np.any(grads) and all(np.isfinite(x).all() for x in metrics.values())
