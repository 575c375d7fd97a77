"""Losses against hand-computed numbers, other people's numbers, and their own algebra."""

import doctest
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.losses import (
    Loss,
    Term,
    algebra,
    at_step,
    chosen_examples,
    chosen_tokens,
    dpo,
    examples,
    ipo,
    lengths,
    make_loss,
    per_sequence,
    rpo,
    rpo_token_mean,
    sequence,
    sft,
    summed_sft,
)
from alignax.losses.algebra import weighted_sum
from alignax.types import Outputs

ORACLES = json.loads((Path(__file__).parent / "oracles" / "losses.json").read_text())
LOSSES = {
    "sft": sft(),
    "sft_per_sequence": sft(over=per_sequence),
    "summed_sft": summed_sft(),
    "dpo": dpo(),
    "cdpo": dpo(label_smoothing=0.1),
    "robust_dpo": losses.robust_dpo(),
    "ipo": ipo(),
    "ipo_daa": losses.ipo_daa(),
    "ipo_mean": losses.ipo_mean(),
    "hinge": losses.hinge(),
    "exo": losses.exo(),
    "discopop": losses.discopop(),
    "dpop": losses.dpop(),
    "rpo": rpo(),
    "rpo_token_mean": rpo_token_mean(),
    "dpo+sft": dpo() + sft(),
    "modpo": losses.modpo([0.6, 0.4], lambda batch: 0.1 * losses.sequence(batch["ref_logps"], batch)[..., None]),
    "nca": losses.nca(),
    "bco": losses.bco(),
    "sppo": losses.sppo(),
    "apo_zero": losses.apo_zero(),
    "apo_down": losses.apo_down(),
    "sigmoid_norm": losses.sigmoid_norm(),
    "ld_dpo": losses.ld_dpo(),
    "r_dpo": losses.r_dpo(),
    "f_dpo_reverse_kl": losses.f_dpo(losses.reverse_kl),
    "f_dpo_forward_kl": losses.f_dpo(losses.forward_kl),
    "f_dpo_jensen_shannon": losses.f_dpo(losses.jensen_shannon),
    "f_dpo_alpha": losses.f_dpo(losses.alpha_divergence(0.5)),
    "f_dpo_chi_squared": losses.f_dpo(losses.chi_squared),
    "f_dpo_total_variation": losses.f_dpo(losses.total_variation),
    "ipo_forward_kl": ipo(scores=losses.diverged(losses.forward_kl)),
    "tdpo": losses.tdpo(),
    "tdpo2": losses.tdpo2(),
    "aot": losses.aot(),
    "aot_unpaired": losses.aot_unpaired(),
    "wpo": losses.wpo(dpo()),
    "simpo": losses.simpo(),
    "cpo": losses.cpo(),
    "orpo": losses.orpo(),
    "slic_hf": losses.slic_hf(),
    "kto": losses.kto(),
    "apo_zero_unpaired": losses.apo_zero_unpaired(),
    "bradley_terry": losses.bradley_terry(lambda batch: batch["margin"]),
    "centring": losses.centring(),
    "score_l2": losses.score_l2(),
    "grm_sft": losses.grm_sft(),
    "reinforce": losses.reinforce(),
    "ppo": losses.ppo(),
    "ppo_dual_clip": losses.ppo(clip_high=0.28, dual_clip=3.0),
    "ppo_critic": losses.ppo() + 0.1 * losses.value_loss() + 0.01 * losses.entropy_bonus(),
    "grpo": losses.grpo() + 0.04 * losses.kl_k3(),
    "grpo_token_sum": losses.grpo(aggregate=losses.token_sum(8)),
    "gspo": losses.gspo(0.1),
    "rloo": losses.rloo(),
    "cispo": losses.cispo(),
    "sapo": losses.sapo(),
    "sapo_by_mean": losses.sapo(level=losses.by_mean),
    "vespo": losses.vespo(),
    "gmpo": losses.gmpo(),
    "lp_reg": losses.lp_reg(),
    "finished": losses.finished(losses.grpo()),
    "importance_weighted": losses.importance_weighted(losses.ppo()),
    "importance_masked": losses.importance_masked(losses.grpo(), level=losses.by_response),
    "off_policy_masked": losses.off_policy_masked(losses.grpo()),
    "kl_k1": losses.kl_k1(),
    "kl_k2": losses.kl_k2(),
    "kl_k3": losses.kl_k3(),  # over tokens one of its gradients, in test_invariance, is 3e-8: Adam steps by its rounding
    "kl_k3_weighted": losses.kl_k3_weighted(
        losses.token_mean
    ),  # by response two of its gradients are so near 0 that Adam magnifies their rounding
    "kl_ref_pi": losses.kl_ref_pi(),
    "kl_pi_ref": losses.kl_pi_ref(losses.token_mean),
    "gkd": losses.gkd(),
    "chi2": losses.chi2(),
    "chi2_exact": losses.chi2_exact(),
    "square_root": losses.square_root(losses.chi2()),
    "entropy_bonus": losses.entropy_bonus(),
    "value_loss": losses.value_loss(),
    "fdpg": losses.fdpg(),
    "quark": losses.quark(),
    "attribute_regression": losses.attribute_regression(["reward"]),
}
TERMS = {name: {f"loss/{name}"} for name in LOSSES} | {
    "sft_per_sequence": {"loss/sft"},
    "summed_sft": {"loss/sft"},
    "cdpo": {"loss/dpo"},
    "ipo_mean": {"loss/ipo"},
    "ipo_forward_kl": {"loss/ipo"},
    "wpo": {"loss/dpo"},
    "cpo": {"loss/cpo", "loss/sft"},
    "slic_hf": {"loss/slic", "loss/sft"},
    "orpo": {"loss/orpo", "loss/sft"},
    "attribute_regression": {"loss/reward"},
    "kto": {"loss/kto", "loss/kto_chosen", "loss/kto_rejected"},
    "apo_zero_unpaired": {"loss/apo_zero_unpaired", "loss/apo_zero_unpaired_chosen", "loss/apo_zero_unpaired_rejected"},
    "ppo_dual_clip": {"loss/ppo"},
    "ppo_critic": {"loss/ppo", "loss/value_loss", "loss/entropy_bonus"},
    "grpo": {"loss/grpo", "loss/kl_k3"},
    "grpo_token_sum": {"loss/grpo"},
    "finished": {"loss/grpo"},
    "sapo_by_mean": {"loss/sapo"},
    "importance_weighted": {"loss/ppo"},
    "importance_masked": {"loss/grpo"},
    "off_policy_masked": {"loss/grpo"},
    "square_root": {"loss/chi2"},
    "fdpg": {"loss/fdpg", "loss/fdpg_skipped"},
    "quark": {"loss/quark", "loss/kl_ref_pi", "loss/entropy_bonus"},
    **dict.fromkeys(("rpo", "rpo_token_mean", "dpo+sft"), {"loss/dpo", "loss/sft"}),
    **{name: {"loss/f_dpo"} for name in LOSSES if name.startswith("f_dpo")},
}  # fmt: skip
UNPAIRED = ("kto", "apo_zero_unpaired")  # N = 1
SCORED = ("bradley_terry", "centring", "score_l2", "grm_sft", "attribute_regression")  # of reward models
SINGLE = ("sft", "sft_per_sequence", "summed_sft")
SURROGATES = (  # of sampled responses, weighted by their advantages
    "reinforce", "ppo", "ppo_dual_clip", "ppo_critic", "grpo", "grpo_token_sum", "gspo", "rloo", "cispo", "sapo", "sapo_by_mean", "vespo",
    "gmpo", "lp_reg", "finished", "importance_weighted", "importance_masked", "off_policy_masked",
)  # fmt: skip
SAMPLED = (  # of any number of responses, each by itself
    *SURROGATES, "kl_k1", "kl_k2", "kl_k3", "kl_k3_weighted", "chi2", "chi2_exact", "square_root", "entropy_bonus", "value_loss", "fdpg",
    "kl_ref_pi", "kl_pi_ref", "gkd", "quark",
)  # fmt: skip
PAIRED = [name for name in LOSSES if name not in UNPAIRED + SCORED + SINGLE + SAMPLED]
FREE = ("simpo", "cpo", "orpo", "slic_hf")  # of any reference
ANTISYMMETRIC = (  # losses of the margin of two like scores, and of nothing else
    "dpo", "cdpo", "robust_dpo", "ipo", "ipo_daa", "ipo_mean", "hinge", "exo", "discopop", "sigmoid_norm", "ld_dpo", "r_dpo", "wpo", "tdpo",
    "simpo", "ipo_forward_kl", *(name for name in LOSSES if name.startswith("f_dpo")),
)  # fmt: skip
PAIR_METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/chosen_drift", "logps/rejected_drift",
}  # fmt: skip
SURROGATE_METRICS = {"clip_ratio/low", "clip_ratio/high", "ratio", "kl/old_k3", "kl/ref_k1", "kl/ref_k3", "entropy"}
VALUE_METRICS = {"values/mean", "values/squared_error", "values/clipped", "returns/mean", "returns/mean_square"}
KL_METRICS = {"kl/ref_k1", "kl/ref_k3"}
SAMPLED_METRICS = dict.fromkeys(SURROGATES, SURROGATE_METRICS) | {
    "ppo_critic": SURROGATE_METRICS | VALUE_METRICS,
    "vespo": SURROGATE_METRICS | {"vespo/weight"},
    "lp_reg": SURROGATE_METRICS | {"lp_reg/protected"},
    **dict.fromkeys(("importance_weighted", "importance_masked"), SURROGATE_METRICS | {"importance_weight"}),
    "off_policy_masked": SURROGATE_METRICS | {"off_policy/kept"},
    **dict.fromkeys(("kl_k1", "kl_k2", "kl_k3", "kl_k3_weighted"), KL_METRICS),
    "kl_ref_pi": {"kl/ref_pi"},
    "kl_pi_ref": {"kl/pi_ref"},
    "gkd": {"jsd"},
    "quark": {"logps", "kl/ref_pi", "entropy"},
    **dict.fromkeys(("chi2", "chi2_exact", "square_root"), {"kl/sequence_k1"}),
    "entropy_bonus": {"entropy"},
    "value_loss": VALUE_METRICS,
    "fdpg": {"pseudo_rewards", "importance_weight", "satisfied", "divergence/kl_p_pi", "divergence/kl_pi_p", "divergence/tv"},
}
# Of the losses of sampled responses those that stand for a kind; the others are among the slow tests.
EVERYDAY = [name for name in LOSSES if name not in SAMPLED or name in ("grpo", "ppo_critic", "rloo", "chi2", "kl_k3", "fdpg")]
every = pytest.mark.parametrize("name", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES])


def case(fields: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log-probs [B, N, T] of the policy, and the batch, from nested lists."""
    batch = {"completion_mask": jnp.asarray(fields["completion_mask"], bool), "ref_logps": jnp.asarray(fields["ref_logps"])}
    return jnp.asarray(fields["logps"], jnp.float32), with_data(batch)


def with_data(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with every field that a loss reads, random ones: labels of both kinds, and statistics of a batch."""
    B, N, T = batch["completion_mask"].shape
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    data = {"kto_kl": jnp.abs(draw(B)), "bco_shift": draw(B), "aot_margins": draw(B), "aot_ratios": draw(B, 2), "margin": draw(B)}
    data |= {"labels": jnp.asarray(rng.random((B, N)) < 0.5).at[0].set(True)}
    data |= {name: draw(B, N, T) for name in ("old_logps", "sampled_logps", "proxy_logps", "advantages", "values", "returns")}
    data |= {"low_probability": (data["advantages"] < 0) & (data["old_logps"] < 0), "chi2": jnp.full(B, 0.3)}
    data |= {"log_target": draw(B, N), "log_z": draw(B), "fdpg_baseline": draw(B)}
    data |= {"attributes": draw(B, N, 1).at[0, 0].set(jnp.nan)}
    return data | {"truncated": jnp.asarray(rng.random((B, N)) < 0.3)} | batch


def single(chosen, rejected, ref_chosen, ref_rejected) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pairs whose sequence log-probs are given, each [B]; a response is one token behind a prompt of one."""
    column = lambda *x: jnp.pad(jnp.stack([jnp.asarray(v, jnp.float32) for v in x], axis=1)[..., None], ((0, 0), (0, 0), (1, 0)))
    logps = column(chosen, rejected)
    mask = jnp.ones(logps.shape, bool).at[..., 0].set(False)
    return logps, with_data({"completion_mask": mask, "ref_logps": column(ref_chosen, ref_rejected)})


def ragged(B: int = 6, T: int = 8, seed: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Random pairs, completions of 1 to T - 2 tokens."""
    rng = np.random.default_rng(seed)
    t = np.arange(T)
    mask = (t >= 2) & (t < 2 + rng.integers(1, T - 1, (B, 2, 1)))
    draw = lambda: jnp.asarray(np.where(mask, -rng.exponential(1.5, mask.shape), 0.0), jnp.float32)
    return draw(), with_data({"completion_mask": jnp.asarray(mask), "ref_logps": draw()})


def suited(name: str, logps: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The first response of each pair, for a loss on single ones."""
    if name not in (*UNPAIRED, "attribute_regression"):
        return logps, batch
    first = lambda key, x: x[:, :1] if x.ndim == 3 or key == "labels" else x
    return logps[:, :1], {key: first(key, x) for key, x in batch.items()}


def outputs(logps: jax.Array, batch: dict[str, jax.Array], entropy: jax.Array | None = None) -> Outputs:
    """Outputs of a model with these log-probs; its reward head scores a response with the log-prob."""
    entropy = jnp.zeros_like(logps) if entropy is None else entropy
    statistic = lambda x: jnp.where(batch["completion_mask"], x, 0.0)
    kl = 0.1 * jnp.square(statistic(logps - batch["ref_logps"])) if "ref_logps" in batch else None
    return Outputs(logps, entropy, statistic(-0.5), kl, kl, sequence(logps, batch), statistic(0.5 * logps), kl)


def run(objective: Loss, logps: jax.Array, batch: dict[str, jax.Array]):
    """Value, metrics and gradient with respect to the token log-probs."""
    weights = objective.normalised(batch)
    f = lambda x: objective(outputs(x, batch), batch, weights)
    (value, metrics), grads = jax.value_and_grad(f, has_aux=True)(logps)
    return value, metrics, grads


def close(actual, expected):
    """The tolerance of a float32 implementation against float64 numbers."""
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


# --- numbers by hand ---


H = 0.37  # log-ratio of chosen against rejected; the chosen response has 2 tokens and log-prob -2
BY_HAND = [
    (dpo(beta=0.1), 0.674818),  # -log sigmoid(0.037)
    (dpo(beta=0.1, label_smoothing=0.1), 0.678518),  # + 0.1 * 0.037
    (ipo(beta=0.1), 21.4369),  # (0.37 - 5)^2
    (rpo(beta=0.1, eta=0.005), 0.675818),  # + 0.005 * 0.1 * 2
    (rpo_token_mean(beta=0.1, eta=0.2), 0.874818),  # + 0.2 * 2 / 2
    (summed_sft(), 2.0),
    (sft(), 1.0),
    (sft(over=per_sequence), 1.0),
]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("objective", "expected"), BY_HAND)
def test_value_of_one_pair_by_hand(objective, expected, wrap):
    logps = jnp.array([[[0.0, -0.5, -1.5], [0.0, -3.0, 0.0]]])
    mask = jnp.array([[[False, True, True], [False, True, False]]])
    ref = jnp.array([[[0.0, -1.0, -1.2], [0.0, -2.83, 0.0]]])  # ratios 0.2 and -0.17
    f = wrap(lambda logps, batch: objective(Outputs(logps, logps), batch, objective.normalised(batch))[0])
    np.testing.assert_allclose(f(logps, {"completion_mask": mask, "ref_logps": ref}), expected, rtol=2e-6)


def test_the_three_averages_of_sft_differ_on_ragged_rows():
    """Rows of 1 and 3 tokens with log-probs -4 and -1 -1 -1, and N = 1."""
    logps = jnp.array([[[0.0, -4.0, 0.0, 0.0]], [[0.0, -1.0, -1.0, -1.0]]])
    batch = {"completion_mask": logps < 0}
    for objective, expected, gradient in [
        (sft(), 7 / 4, [-1 / 4, -1 / 4]),
        (sft(over=per_sequence), (4 + 1) / 2, [-1 / 2, -1 / 6]),
        (summed_sft(), (4 + 3) / 2, [-1 / 2, -1 / 2]),
    ]:
        value, metrics, grads = run(objective, logps, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss/sft"], expected, rtol=1e-6)
        np.testing.assert_allclose(grads[:, 0, 1], gradient, rtol=1e-6)


def test_metrics_of_a_pair_by_hand():
    logps, batch = single([-2.0, -1.0], [-3.0, -4.0], [-2.5, -1.0], [-2.0, -6.0])
    _, metrics, _ = run(dpo(beta=0.5), logps, batch)
    expected = {
        "rewards/chosen": (0.25 + 0.0) / 2, "rewards/rejected": (-0.5 + 1.0) / 2, "rewards/margins": (0.75 - 1.0) / 2,
        "rewards/accuracies": 0.5, "logps/chosen": -1.5, "logps/rejected": -3.5,
        "logps/chosen_drift": 0.25, "logps/rejected_drift": 0.5,
    }  # fmt: skip
    assert set(expected) == PAIR_METRICS
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-6, err_msg=name)


# --- numbers of others ---


def masked(grads: list, batch: dict[str, jax.Array]) -> np.ndarray:
    """TRL's gradients at scored tokens; elsewhere it masks log-probs before, so its gradient there means nothing."""
    return np.where(batch["completion_mask"], np.array(grads), 0.0)


def of_trl(oracle: dict) -> Loss:
    terms = {"sigmoid": dpo(oracle["beta"], oracle["label_smoothing"]), "sft": sft()}
    first, *rest = (terms[name] for name in oracle["terms"])
    return sum(rest, start=first)


@pytest.mark.parametrize("oracle", [o for o in ORACLES["trl"] if o["inputs"] != "pref_empty_completion"], ids=lambda o: o["id"])
def test_values_and_gradients_are_trls(oracle):
    logps, batch = case(ORACLES["inputs"][oracle["inputs"]])
    value, metrics, grads = run(of_trl(oracle), logps, batch)
    close(value, oracle["loss"])
    close(grads, masked(oracle["grads"], batch))
    if "sigmoid" in oracle["terms"]:
        ties = np.mean(np.isclose(oracle.get("per_pair_loss", [0.0]), math.log(2), atol=1e-12))  # TRL calls a tie wrong
        for name, x in oracle["metrics"].items():
            close(metrics[name], x + (ties / 2 if name == "rewards/accuracies" else 0.0))


def test_an_empty_pair_weighs_nothing_where_trl_counts_ln_2():
    (oracle,) = [o for o in ORACLES["trl"] if o["inputs"] == "pref_empty_completion"]
    logps, batch = case(ORACLES["inputs"][oracle["inputs"]])
    value, metrics, grads = run(of_trl(oracle), logps, batch)
    close(oracle["per_pair_loss"][1], math.log(2))
    close(value, oracle["per_pair_loss"][0])
    close(grads, 2 * masked(oracle["grads"], batch))  # an average over one pair, not over two
    assert not np.any(grads[1])
    assert metrics["rewards/accuracies"] == 1.0


RPO_FORMS = {
    "sequence_sum": lambda o: rpo(o["beta"], eta=o["sft_weight"] / o["beta"]),
    "sequence_mean": lambda o: rpo_token_mean(o["beta"], eta=o["sft_weight"]),
    "token_mean": lambda o: dpo(o["beta"]) + o["sft_weight"] * sft(),
}


@pytest.mark.parametrize("oracle", ORACLES["rpo"], ids=lambda o: o["id"])
def test_rpo_is_the_papers(oracle):
    r = {k: np.array(v) for k, v in ORACLES["rpo_inputs"].items()}
    mask = np.zeros((4, 2, 9), bool)
    for i, n in enumerate(r["chosen_lengths"]):
        mask[i, 0, 1 : 1 + n], mask[i, 1, 1] = True, True
    spread = lambda x: np.where(mask, np.stack(x, axis=1)[..., None] / mask.sum(-1, keepdims=True), 0.0)
    fields = {
        "completion_mask": mask,
        "logps": spread([r["policy_chosen_logps"], r["policy_rejected_logps"]]),
        "ref_logps": spread([r["ref_chosen_logps"], r["ref_rejected_logps"]]).astype(np.float32),
    }
    objective = RPO_FORMS[oracle["sft_normalisation"]](oracle)
    value, metrics, grads = run(objective, *case(fields))
    close(value, oracle["loss"])
    close(metrics["loss/sft"], oracle["nll"])
    # A sequence's log-prob is the sum of its tokens', so each token has the sequence's gradient.
    close(grads[:, 0, 1], oracle["grads"]["policy_chosen_logps"])
    close(grads[:, 1, 1], oracle["grads"]["policy_rejected_logps"])
    assert np.array_equal(np.asarray(grads) != 0, mask)


def test_ipo_is_the_papers_formula():
    """Other libraries divide by token counts; the paper does not."""
    logps, batch = ragged()
    m, p, r = (np.asarray(x, np.float64) for x in (batch["completion_mask"], logps, batch["ref_logps"]))
    ratio = ((p - r) * m).sum(-1)
    h = ratio[:, 0] - ratio[:, 1]
    value, metrics, grads = run(ipo(beta=0.2), logps, batch)
    close(value, np.mean((h - 2.5) ** 2))
    close(grads, (2 * (h - 2.5) / 6)[:, None, None] * np.array([1, -1])[None, :, None] * m)
    close(metrics["rewards/margins"], 0.2 * h.mean())


def test_cdpo_is_least_at_the_log_odds_of_a_right_label():
    e, beta = 0.2, 0.3
    best = math.log((1 - e) / e) / beta
    at = lambda h: run(dpo(beta, label_smoothing=e), *single([h], [0.0], [0.0], [0.0]))
    value, _, grads = at(best)
    close(value, -(1 - e) * math.log(1 - e) - e * math.log(e))  # the entropy of the label
    np.testing.assert_allclose(grads, 0.0, atol=1e-7)
    assert at(best - 0.5)[0] > value and at(best + 0.5)[0] > value
    assert at(best - 0.5)[2][0, 0, 1] < 0 < at(best + 0.5)[2][0, 0, 1]


# --- edges ---

LN2 = math.log(2)
AT_REFERENCE = {
    "ipo": 25.0,  # beta 0.1 in all
    "ipo_daa": 1.0,
    "ipo_mean": 25.0,
    "ipo_forward_kl": 25.0,
    "hinge": 1.0,
    "robust_dpo": LN2,
    "exo": 0.5 * (math.log(0.5 / 0.999) + math.log(0.5 / 0.001)),
    "discopop": 0.5 * LN2 + 0.5,
    "dpop": LN2,
    "nca": 2 * LN2,
    "sppo": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sigmoid_norm": LN2,
    "ld_dpo": LN2,
    "apo_zero_unpaired": 0.5,
    **dict.fromkeys(("kl_k1", "kl_k2", "kl_k3", "kl_k3_weighted", "chi2", "chi2_exact", "square_root"), 0.0),
    **{name: LN2 for name in LOSSES if name.startswith("f_dpo")},
}


@every
def test_policy_equal_to_reference(name):
    logps, batch = suited(name, *ragged())
    value, metrics, _ = run(LOSSES[name], logps, batch | {"ref_logps": logps})
    if "loss/dpo" in metrics and name != "wpo":
        np.testing.assert_allclose(metrics["loss/dpo"], math.log(2), atol=1e-6)
    if name in AT_REFERENCE:
        np.testing.assert_allclose(value, AT_REFERENCE[name], rtol=1e-6)
    if name in PAIRED:
        assert metrics["logps/chosen_drift"] == metrics["logps/rejected_drift"] == 0.0
    if name in PAIRED and name not in (*FREE, "r_dpo", "modpo"):
        assert metrics["rewards/accuracies"] == 0.5
        assert metrics["rewards/margins"] == 0.0


@pytest.mark.parametrize("name", ANTISYMMETRIC)
def test_identical_responses_are_a_tie_without_gradient(name):
    logps, batch = ragged()
    twin = lambda x: jnp.repeat(x[:, :1], 2, axis=1)
    value, metrics, grads = run(LOSSES[name], twin(logps), {k: twin(x) if x.ndim == 3 else x for k, x in batch.items()})
    if name in AT_REFERENCE:
        np.testing.assert_allclose(value, AT_REFERENCE[name], rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0.5
    assert np.any(grads) or name == "f_dpo_total_variation"
    assert not np.any(grads.sum(axis=1))  # of the shared log-probs


@every
def test_an_empty_completion_weighs_nothing(name):
    """A pair without chosen tokens or padded altogether: the loss, metrics and gradients are those of the other pairs.

    A response of a group counts by itself, so both are empty there.
    """
    logps, batch = suited(name, *ragged())
    expected = run(LOSSES[name], logps[2:], {k: x[2:] for k, x in batch.items()})
    mask = batch["completion_mask"].at[0, : 2 if name in SAMPLED else 1].set(False).at[1].set(False)
    value, metrics, grads = run(LOSSES[name], logps, batch | {"completion_mask": mask})
    close(value, expected[0])
    assert set(metrics) == set(expected[1])
    for key in metrics:
        close(metrics[key], expected[1][key])
    close(grads[2:], expected[2])
    assert not np.any(grads[:2])


@every
def test_values_that_are_not_finite_outside_the_mask_are_harmless(name):
    logps, batch = suited(name, *ragged())
    mask = batch["completion_mask"].at[0].set(False)
    expected = run(LOSSES[name], logps, batch | {"completion_mask": mask})
    value, metrics, grads = run(LOSSES[name], jnp.where(mask, logps, jnp.nan), batch | {"completion_mask": mask})
    assert value == expected[0] and np.isfinite(list(metrics.values())).all()
    np.testing.assert_array_equal(grads, expected[2])


@every
def test_no_chosen_token_in_the_batch_is_zero(name):
    """TRL's mean over no token is NaN here. What counts responses by themselves has none at all."""
    logps, batch = suited(name, *case(ORACLES["inputs"]["pref_no_chosen_token"]))
    if name in SAMPLED:
        batch["completion_mask"] = jnp.zeros_like(batch["completion_mask"])
    value, metrics, grads = run(LOSSES[name], logps, batch)
    assert value == 0.0 and not np.any(grads)
    assert all(x == 0.0 for x in metrics.values())


@every
def test_log_ratios_of_a_thousand_nats(name):
    """Policy or reference is off by a thousand nats, up or down: four batches of one pair, side by side."""
    sides = [single([a], [b], [-1.0], [-1.0]) for a, b in ((-1.0, -1001.0), (-1001.0, -1.0))]
    sides += [single([-1.0], [-1.0], [a], [b]) for a, b in ((-1001.0, -1.0), (-1.0, -1001.0))]
    logps, batch = jax.tree.map(lambda *x: jnp.stack(x), *(suited(name, *side) for side in sides))
    if name in SAMPLED:
        batch |= dict.fromkeys(("old_logps", "sampled_logps"), batch["ref_logps"])
    value, metrics, grads = jax.vmap(lambda logps, batch: run(LOSSES[name], logps, batch))(logps, batch)
    assert np.isfinite(value).all() and np.isfinite(grads).all() and np.isfinite(list(metrics.values())).all()
    up = np.array([True, False, True, False])  # the chosen response is the likelier one
    if name in ("dpo", "cdpo"):  # beta is 0.1, so z is +-100
        e = 0.1 if name == "cdpo" else 0.0
        close(value, np.where(up, 100 * e, 100 * (1 - e)))
        close(grads[:, 0, 0, 1], np.where(up, 0.1 * e, 0.1 * (e - 1)))
        assert metrics["rewards/accuracies"].tolist() == up.tolist()
    if name == "ipo":
        close(value, np.where(up, 995.0**2, 1005.0**2))


# --- algebra ---


def test_losses_add_and_scale():
    logps, batch = ragged()
    (a, _, da), (b, _, db), (c, _, dc) = (run(x, logps, batch) for x in (dpo(), ipo(), sft()))
    value, metrics, grads = run(0.5 * (dpo() + 2 * ipo()) + 3 * sft(), logps, batch)
    close(value, 0.5 * a + b + 3 * c)
    close(grads, 0.5 * da + db + 3 * dc)
    other, _, gradient = run(sum([dpo() / 2, ipo()]) - -sft() * 3, logps, batch)
    close(other, value)
    close(gradient, grads)
    assert (metrics["loss/dpo"], metrics["loss/ipo"], metrics["loss/sft"]) == (a, b, c)  # without their coefficients


@pytest.mark.parametrize("scalar", [0.25, np.float32(0.25), np.float64(0.25), jnp.asarray(0.25)], ids=lambda x: type(x).__name__)
def test_any_scalar_scales(scalar):
    logps, batch = ragged()
    assert isinstance(scalar * dpo(), Loss) and isinstance(dpo() * scalar, Loss)
    assert run(scalar * dpo(), logps, batch)[0] == run(dpo() * scalar, logps, batch)[0] == 0.25 * run(dpo(), logps, batch)[0]


def test_a_loss_reads_as_its_formula():
    assert doctest.testmod(algebra) == (0, 3)
    assert repr(dpo() - 0.2 * sft() + jnp.asarray(2) * dpo()) == "dpo - 0.2 * sft + 2 * dpo_2" and repr(-sft()) == "-sft"
    shown = []
    jax.jit(lambda step: shown.append(repr(dpo() + step * sft())))(1.0)
    assert shown == ["dpo + c(step) * sft"]


@pytest.mark.parametrize("add", [lambda x: x + 0.1, lambda x: 0.1 + x, lambda x: x - 0.1, lambda x: x + None, lambda x: 0.1 - x])
def test_what_is_no_loss_is_not_added(add):
    with pytest.raises(TypeError, match="is added to the loss -?dpo: a constant has no gradient; add a loss"):
        add(dpo())
    with pytest.raises(TypeError, match=r"the losses dpo and sft are multiplied; multiply a loss only by a number"):
        dpo() * sft()


def test_a_schedule_is_a_function_from_step_to_loss():
    logps, batch = ragged()
    objective = lambda step: dpo() + (0.1 * step) * sft()
    f = jax.jit(lambda step: run(at_step(objective, step), logps, batch)[0])
    for step in (0, 3):
        close(f(jnp.asarray(step)), run(dpo() + (0.1 * step) * sft(), logps, batch)[0])
    fixed = dpo()
    assert at_step(fixed, jnp.asarray(3)) is fixed


@pytest.mark.parametrize("objective", [rpo(eta=0.0), rpo_token_mean(beta=0.1, eta=0.0)], ids=["rpo", "rpo_token_mean"])
def test_rpo_at_eta_0_is_dpo_bit_for_bit(objective):
    logps, batch = ragged()
    value, metrics, grads = run(objective, logps, batch)
    expected, dpo_metrics, dpo_grads = run(dpo(), logps, batch)
    assert value == expected
    np.testing.assert_array_equal(grads, dpo_grads)
    for name in PAIR_METRICS:
        assert metrics[name] == dpo_metrics[name]


def test_rpos_gradient_is_dpos_and_a_push_on_chosen():
    beta, eta, B = 0.3, 0.7, 6
    logps, batch = ragged(B)
    chosen = lambda x: sequence(x, batch)[:, 0].mean()
    extra = run(rpo(beta, eta), logps, batch)[2] - run(dpo(beta), logps, batch)[2]
    close(extra, -eta * beta * jax.grad(chosen)(logps))


def test_token_mean_is_the_sum_over_the_length_where_lengths_are_equal():
    length, eta = 4, 0.3
    logps = jnp.pad(-jax.random.exponential(jax.random.key(0), (5, 2, length)), ((0, 0), (0, 0), (2, 1)))
    batch = {"completion_mask": logps < 0, "ref_logps": 0.9 * logps}
    by_token, by_sum = rpo_token_mean(beta=0.5, eta=eta), dpo(0.5) + (eta / length) * summed_sft()
    (a, _, da), (b, _, db) = run(by_token, logps, batch), run(by_sum, logps, batch)
    close(a, b)
    close(da, db)


@every
def test_parts_with_global_weights_add_up_to_the_whole(name):
    logps, batch = suited(name, *ragged())
    batch["completion_mask"] = batch["completion_mask"].at[2].set(False)
    objective = LOSSES[name]
    weights = objective.normalised(batch)
    value, metrics = objective(outputs(logps, batch, -logps), batch, weights)
    parts = []
    for s in (slice(0, 2), slice(2, 6)):
        cut = {k: x[s] for k, x in batch.items()}
        parts.append(objective(outputs(logps[s], cut, -logps[s]), cut, tuple(w[s] for w in weights)))
    close(sum(p[0] for p in parts), value)
    for key, x in metrics.items():
        close(sum(p[1][key] for p in parts), x)


@every
def test_names_of_metrics(name):
    logps, batch = suited(name, *ragged())
    entropy = {"entropy"} if name in ("sft", "sft_per_sequence", "rpo_token_mean", "dpo+sft", "orpo") else set()
    extra = PAIR_METRICS if name in PAIRED else SAMPLED_METRICS.get(name, entropy)
    if name in UNPAIRED:
        extra = {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
    elif name in SCORED:
        extra = {m for m in PAIR_METRICS if m.startswith("rewards")} if name == "bradley_terry" else set()
        extra |= {"attribute_regression": {"errors/reward"}, "grm_sft": {"logps/chosen"}}.get(name, set())
    assert set(run(LOSSES[name], logps, batch)[1]) == TERMS[name] | extra | entropy
    if name in FREE:
        del batch["ref_logps"]
        metrics = run(LOSSES[name], logps, batch)[1]
        assert set(metrics) == TERMS[name] | entropy | {m for m in PAIR_METRICS if "drift" not in m}


def test_entropy_is_averaged_over_the_scored_tokens():
    logps, batch = ragged()
    entropy = jax.random.uniform(jax.random.key(0), logps.shape)
    _, metrics = sft()(Outputs(logps, entropy), batch, sft().normalised(batch))
    close(metrics["entropy"], np.asarray(entropy[:, 0])[np.asarray(batch["completion_mask"][:, 0])].mean())


def test_metrics_carry_no_gradient():
    logps, batch = ragged()
    f = lambda x: dpo()(Outputs(x, x), batch, dpo().normalised(batch))[1]["rewards/margins"]
    assert not np.any(jax.grad(f)(logps))


def test_weights_by_hand():
    mask = jnp.array([[[0, 1, 1], [0, 1, 0]], [[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]], bool)
    batch = {"completion_mask": mask}
    assert lengths(batch).tolist() == [[2, 1], [1, 0], [0, 2], [0, 0]]
    assert examples(batch).tolist() == [1, 0, 0, 0]
    assert chosen_examples(batch).tolist() == [1, 1, 0, 0]
    assert chosen_tokens(batch).tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert per_sequence(batch).tolist() == [[0, 0.5, 0.5], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert [float(w.sum()) for w in (dpo() + sft() + sft(over=per_sequence)).normalised(batch)] == [1.0, 1.0, 1.0]


# --- errors ---


@pytest.mark.parametrize("make", [dpo, ipo, rpo, rpo_token_mean])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(make, beta):
    with pytest.raises(ValueError, match=rf"beta is {beta};"):
        make(beta=beta)


@pytest.mark.parametrize("e", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_must_be_below_one_half(e):
    with pytest.raises(ValueError, match=rf"label_smoothing is {e};"):
        dpo(label_smoothing=e)


def test_values_must_be_shaped_like_the_weights():
    logps, batch = ragged(B=6, T=7)
    wrong = make_loss("wrong", lambda out, batch: (out.logps, {}))
    with pytest.raises(ValueError, match=r"values of loss 'wrong' have shape \(6, 2, 7\), but its weights have \(6,\)"):
        run(wrong, logps, batch)
    with pytest.raises(ValueError, match=r"metric 'm' of loss 'metric' has shape \(6, 2\), but the weights have \(6,\)"):
        run(make_loss("metric", lambda out, batch: (sequence(out.logps, batch)[:, 0], {"m": sequence(out.logps, batch)})), logps, batch)


def test_a_weight_of_zero_removes_what_is_not_finite():
    f = lambda x: weighted_sum(x, jnp.array([0.5, 0.0, 0.0]))
    value, grad = jax.value_and_grad(f)(jnp.array([2.0, jnp.nan, jnp.inf]))
    assert value == 1.0 and grad.tolist() == [0.5, 0.0, 0.0]


def test_a_users_loss_with_weights_of_its_own():
    """The weights are a function of data, and are normalised over the batch."""
    logps, batch = ragged()
    (_, term), = dpo().terms  # fmt: skip
    weighted = Loss(((1.0, Term("mine", term.value, lambda batch: batch["weight"])),))
    single_pair = run(dpo(), logps[3:4], {k: x[3:4] for k, x in batch.items()})[0]
    value, metrics, _ = run(weighted, logps, batch | {"weight": 5.0 * jnp.eye(6)[3]})
    close(value, single_pair)
    close(metrics["loss/mine"], single_pair)
