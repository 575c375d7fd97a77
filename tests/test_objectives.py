"""Each objective against TRL's numbers, or against its formula by hand where TRL has none, and what sets it apart from its neighbours."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_losses import case, close, outputs, ragged, run, single

from alignax import losses
from alignax.experience import chain, matched_margins, matched_ratios, reward_shift
from alignax.losses import Loss, lengths, sequence
from alignax.losses.divergences import CAP
from alignax.losses.reference_free import log1mexp
from alignax.train import init_state, make_step
from alignax.types import Outputs

FOLDER = Path(__file__).parent / "oracles"
ORACLES = json.loads((FOLDER / "objectives.json").read_text())
INPUTS = json.loads((FOLDER / "losses.json").read_text())["inputs"] | ORACLES["inputs"]
LN2 = math.log(2)
FINITE = [o for o in ORACLES["dpo"] if "loss" in o]


def divergence(oracle: dict):
    """TRL's coefficient is 1 - alpha; at 1 it takes the limit, the reverse KL."""
    if oracle["divergence"] != "alpha_divergence":
        return {"forward_kl": losses.forward_kl, "js_divergence": losses.jensen_shannon}[oracle["divergence"]]
    return losses.reverse_kl if oracle["coefficient"] == 1 else losses.alpha_divergence(1 - oracle["coefficient"])


def of_trl(o: dict) -> Loss:
    """The loss that has this name in TRL."""
    beta, e, kind = o["beta"], o.get("label_smoothing", 0.0), o["loss_type"]
    if "divergence" in o:
        whole = losses.diverged(divergence(o))
        per_token = lambda out, batch: whole(out, batch) / lengths(batch)  # of the sum's divergence
        if kind == "sigmoid":
            return losses.f_dpo(divergence(o), beta)
        if kind in ("ipo", "sigmoid_norm"):
            return {"ipo": losses.ipo, "sigmoid_norm": losses.dpo}[kind](beta, scores=per_token)
        if kind == "robust":
            return losses.robust_dpo(beta, e, whole)
        return {"hinge": losses.hinge, "discopop": losses.discopop}[kind](beta, scores=whole)
    if kind == "sigmoid":
        return losses.ld_dpo(beta, o["ld_alpha"])
    if kind in ("robust", "exo_pair", "aot", "aot_unpaired"):
        smoothed = {"robust": losses.robust_dpo, "exo_pair": losses.exo, "aot": losses.aot, "aot_unpaired": losses.aot_unpaired}
        return smoothed[kind](beta, e)
    if kind == "discopop":
        return losses.discopop(beta, o["tau"])
    makers = {"hinge": losses.hinge, "ipo": losses.ipo_mean, "sigmoid_norm": losses.sigmoid_norm, "nca_pair": losses.nca}
    makers |= {"bco_pair": losses.bco, "sppo_hard": losses.sppo, "apo_zero": losses.apo_zero, "apo_down": losses.apo_down}
    loss = makers[kind](beta)
    return losses.wpo(loss) if "weighted" in o else loss


def pairs_of_trl(o: dict):
    """Log-probs and batch of a case; the policy that ranks are taken from is the one that is scored."""
    logps, batch = case(INPUTS[o["inputs"]])
    batch |= {"old_logps": logps, "bco_shift": jnp.zeros(logps.shape[0])}  # TRL has no shift
    return logps, chain(matched_margins(), matched_ratios())(batch)


def evaluate(o: dict, objective: Loss, logps, batch):
    """Value, metrics, gradient at scored tokens."""
    weights = objective.normalised(batch)
    squares = jnp.asarray(ORACLES["log_sum_sq"]["pref"], jnp.float32) if "weighted" in o else None
    f = lambda x: objective(outputs(x, batch)._replace(log_sum_sq=squares), batch, weights)
    (value, metrics), grads = jax.value_and_grad(f, has_aux=True)(logps)
    return value, metrics, grads


@pytest.mark.parametrize("o", [o for o in FINITE if "empty" not in o["inputs"]], ids=lambda o: f"{o['id']}-{o['loss_type']}")
def test_values_and_gradients_are_trls(o):
    logps, batch = pairs_of_trl(o)
    value, metrics, grads = evaluate(o, of_trl(o), logps, batch)
    close(value, o["loss"])
    expected = np.array(o["grads"])
    close(grads, (expected if expected.ndim == 3 else expected[..., None]) * batch["completion_mask"])
    names = set(o["metrics"])
    if {"divergence", "ld_alpha"} & o.keys() or o["loss_type"] in ("ipo", "sigmoid_norm"):
        names = {n for n in names if n.startswith("logps")} if "ld_alpha" not in o else {n for n in names if n.startswith("rewards")}
    for name in names:  # TRL's rewards are log-ratios whatever the loss compares, and its log-probs are desensitised
        close(metrics[name], o["metrics"][name])


def test_every_loss_type_of_trl_is_covered():
    assert {o["loss_type"] for o in FINITE} | {"sft"} == {
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop",
        "apo_zero", "apo_down", "sft", "sigmoid_norm",
    }  # fmt: skip


@pytest.mark.parametrize("o", [o for o in ORACLES["dpo"] if "nonfinite" in o], ids=lambda o: o["id"])
def test_finite_where_trl_is_not(o):
    value, metrics, grads = evaluate(o, of_trl(o), *pairs_of_trl(o))
    assert np.isfinite(value) and np.isfinite(grads).all() and np.isfinite(list(metrics.values())).all()
    assert np.any(grads)


def test_lengths_count_scored_tokens_only():
    """TRL's are one more than there are where a row begins with its completion."""
    (o,) = [o for o in FINITE if o["inputs"] == "pref_empty_prompt"]
    logps, batch = pairs_of_trl(o)
    value, _, _ = run(of_trl(o), logps, batch)
    mask = np.array(batch["completion_mask"])
    mean = lambda extra: np.sum(np.array(logps - batch["ref_logps"], np.float64) * mask, -1) / (mask.sum(-1) + extra)
    loss = lambda s: np.logaddexp(0.0, -o["beta"] * (s[:, 0] - s[:, 1])).mean()
    close(loss(mean(1)), o["loss"])
    close(value, loss(mean(0)))


def test_an_empty_pair_weighs_nothing_where_trl_counts_ln_2():
    (o,) = [o for o in FINITE if o["inputs"] == "pref_empty_completion"]
    value, _, grads = run(of_trl(o), *pairs_of_trl(o))
    close((value + LN2) / 2, o["loss"])
    close(grads[0].sum(-1), 2 * np.array(o["grads"])[0] * [4, 3])
    assert not np.any(grads[1])


@pytest.mark.parametrize("o", ORACLES["kto"], ids=lambda o: f"{o['id']}-{o['loss_type']}")
def test_unpaired_values_and_gradients_are_trls(o):
    fields = INPUTS[o["inputs"]]
    logps, batch = case(fields)
    batch |= {"labels": jnp.asarray(fields["labels"]), "kto_kl": jnp.asarray(fields["kto_kl"], jnp.float32)}
    make = {"kto": losses.kto, "apo_zero_unpaired": losses.apo_zero_unpaired}[o["loss_type"]]
    value, metrics, grads = run(make(o["beta"], o["desirable_weight"], o["undesirable_weight"]), logps, batch)
    close(value, o["loss"])
    close(grads, np.array(o["grads"])[:, None, None] * batch["completion_mask"])
    for name, x in o["metrics"].items():
        if name != "kl" or o["loss_type"] == "kto":
            close(metrics[name], x)


def test_kto_of_labels_that_are_all_alike_is_finite():
    for kind in (True, False):
        logps, batch = ragged()
        batch = {k: x[:, :1] if x.ndim == 3 else x for k, x in batch.items()} | {"labels": jnp.full((6, 1), kind)}
        value, metrics, grads = run(losses.kto(), logps[:, :1], batch)
        assert 0 < value < 1 and np.isfinite(grads).all() and np.any(grads)
        assert metrics["rewards/rejected" if kind else "rewards/chosen"] == 0.0


def test_kto_weights_each_label():
    """By hand: two desirable rows and one undesirable, log-ratios 1, -1 and 2, KL 0.5, beta 0.5."""
    logps = jnp.pad(jnp.array([1.0, -1.0, 2.0])[:, None, None] - 3.0, ((0, 0), (0, 0), (1, 0)))
    mask = jnp.array([False, True])[None, None] & jnp.ones((3, 1, 1), bool)
    batch = {"completion_mask": mask, "ref_logps": jnp.where(mask, -3.0, 0.0), "kto_kl": jnp.full(3, 0.5)}
    batch["labels"] = jnp.array([[True], [True], [False]])
    value, metrics, _ = run(losses.kto(0.5, desirable_weight=2.0, undesirable_weight=3.0), logps, batch)
    v = lambda x: 1 / (1 + math.exp(-x))
    close(value, (2 * v(-0.25) + 2 * v(0.75) + 3 * v(0.75)) / 3)
    close(metrics["rewards/chosen"], 0.0)  # of the desirable rows only
    close(metrics["rewards/rejected"], 1.0)
    close(metrics["loss/kto_chosen"], v(-0.25) + v(0.75))


# --- without a reference ---


SEQUENCE_LOSSES = {
    "sigmoid": lambda o: Loss(losses.cpo(o["beta"]).terms[:1]),
    "ipo": lambda o: losses.ipo(o["beta"], scores=losses.pair_logps),
    "orpo": lambda o: Loss(losses.orpo(o["beta"]).terms[:1]),
}


@pytest.mark.parametrize("o", ORACLES["sequence_cases"], ids=lambda o: f"{o['id']}-{o['loss_type']}")
def test_contrasts_without_a_reference_are_trls(o):
    """The losses have no likelihood terms here, and given sequence log-probs."""
    sides = ORACLES["sequences"][o["inputs"]]
    logps, batch = single(sides["chosen"], sides["rejected"], *np.zeros((2, 5)))
    del batch["ref_logps"]
    value, _, grads = run(SEQUENCE_LOSSES[o["loss_type"]](o), logps, batch)
    close(value, o["loss"])
    np.testing.assert_allclose(grads[..., 1], o["grads"], rtol=5e-5 if o["loss_type"] == "orpo" else 2e-5)  # float32 there too


@pytest.mark.parametrize("o", ORACLES["cpo"], ids=lambda o: f"{o['id']}-{o['loss_type']}")
def test_cpo_and_simpo_from_logits_are_trls(o):
    """TRL's likelihood term is an average over the batch's tokens; gradients are compared at the logits of scored tokens."""
    logits, labels = jnp.asarray(ORACLES["logits"]["logits"]), np.asarray(ORACLES["logits"]["labels"])
    pair = lambda x: jnp.stack([x[:3], x[3:]], axis=1)
    mask = labels != -100
    targets = np.where(mask, labels, 0)[:, 1:, None]
    beta, e = o["beta"], o["label_smoothing"]
    contrast = {
        "sigmoid": lambda: losses.dpo(beta, e, losses.pair_logps),
        "hinge": lambda: losses.hinge(beta, losses.pair_logps),
        "ipo": lambda: losses.ipo(beta, losses.mean_logps),
        "simpo": lambda: losses.simpo(beta, o["gamma"], e),
    }[o["loss_type"]]()
    objective = contrast + o["cpo_alpha"] * losses.sft()
    batch = {"completion_mask": pair(jnp.asarray(mask))}

    def value(logits):
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], targets, axis=-1)[..., 0]
        logps = pair(jnp.pad(jnp.where(mask[:, 1:], logps, 0.0), ((0, 0), (1, 0))))
        return objective(Outputs(logps, logps), batch, objective.normalised(batch))

    (loss, metrics), grads = jax.value_and_grad(value, has_aux=True)(logits)
    close(loss, o["loss"])
    own = np.take_along_axis(np.array(grads)[:, :-1], targets, -1)[..., 0]
    close(own * mask[:, 1:], o["grads"])
    for name, x in o["metrics"].items():
        close(metrics[name], x)


def test_cpo_is_the_papers_with_a_summed_likelihood():
    logps, batch = ragged()
    p = np.array(sequence(logps, batch), np.float64)
    value, _, _ = run(losses.cpo(0.2, alpha=0.5), logps, batch)
    close(value, np.mean(np.logaddexp(0, -0.2 * (p[:, 0] - p[:, 1])) - 0.5 * p[:, 0]))


def test_slic_hf_by_hand():
    logps, batch = single([-2.0, -1.0], [-2.5, -4.0], [0.0, 0.0], [0.0, 0.0])
    value, _, grads = run(losses.slic_hf(delta=1.0, weight=0.1), logps, batch)
    close(value, (0.5 + 0.0) / 2 + 0.1 * 1.5)
    close(grads[..., 1], [[-0.5 - 0.05, 0.5], [-0.05, 0.0]])


def test_orpo_by_hand():
    """Probabilities 1/2 and 1/4: odds 1 and 1/3."""
    logps, batch = single([math.log(0.5)], [math.log(0.25)], [0.0], [0.0])
    value, metrics, _ = run(losses.orpo(beta=0.3), logps, batch)
    close(value, LN2 + 0.3 * math.log(1 + 1 / 3))
    close(metrics["rewards/margins"], math.log(3.0))


@pytest.mark.parametrize("p", [0.0, -1e-12, -1e-7, -1e-3, -0.5, -30.0, -1000.0])
def test_orpo_is_finite_as_p_goes_to_1(p):
    for chosen, rejected in ((p, -0.7), (-0.7, p), (p, p)):
        logps, batch = single([chosen], [rejected], [0.0], [0.0])
        value, metrics, grads = run(losses.orpo(), logps, batch)
        assert np.isfinite(value) and np.isfinite(grads).all() and np.isfinite(list(metrics.values())).all()
    x = np.float64(min(p, -1e-3))
    close(log1mexp(jnp.float32(x)), np.log(-np.expm1(np.float64(np.float32(x)))))


# --- by hand ---

LOGPS = single([-2.0, -5.0], [-3.0, -4.0], [-2.5, -4.0], [-2.6, -3.0])  # log-ratios: chosen 0.5 and -1, rejected -0.4 and -1
factor = lambda slope, side, sign: lambda w, r, z: sign * 0.5 * 1 / (1 + np.exp(z)) * slope(np.exp((w, r)[side]))
W, L = np.array([0.5, -1.0]), np.array([-0.4, -1.0])
softplus = lambda x: np.logaddexp(0.0, x)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (losses.ipo_daa(0.5), (0.5 * (W - L) - 1) ** 2),
        (losses.dpop(0.5, penalty=4.0), softplus(-0.5 * (W - L - 4 * np.maximum(0, -W)))),
        (losses.f_dpo(losses.chi_squared, 0.5), softplus(-(np.exp(W) - np.exp(L)))),
        (losses.f_dpo(losses.total_variation, 0.5), softplus(-0.25 * (np.sign(W) - np.sign(L)))),
        (losses.f_dpo(losses.alpha_divergence(0.25), 0.5), softplus(2 * (np.exp(-W / 4) - np.exp(-L / 4)))),
    ],
    ids=["ipo_daa", "dpop", "chi_squared", "total_variation", "alpha"],
)
def test_by_hand(objective, expected):
    close(run(objective, *LOGPS)[0], expected.mean())


def test_numbers_of_the_scaling_laws_paper():
    """h = 0.37 at beta 0.1, in the three forms that it compares, and IPO's own."""
    inputs = single([0.0], [-0.37], [0.0], [0.0])
    numbers = {losses.dpo: 0.674818, losses.ipo: 21.4369, losses.ipo_daa: 0.927369, losses.hinge: 0.963}
    for make, expected in numbers.items():
        np.testing.assert_allclose(run(make(0.1), *inputs)[0], expected, rtol=2e-6)


def test_ipo_daa_is_ipo_of_another_scale():
    logps, batch = ragged()
    (a, _, da), (b, _, db) = (run(x, logps, batch) for x in (losses.ipo_daa(0.4), 0.4**2 * losses.ipo(0.2)))
    close(a, b)
    close(da, db)


def test_ipo_mean_is_ipo_on_averages():
    logps, batch = ragged()
    ratios = np.array(sequence(logps - batch["ref_logps"], batch) / lengths(batch), np.float64)
    close(run(losses.ipo_mean(0.5), logps, batch)[0], np.mean((ratios[:, 0] - ratios[:, 1] - 1.0) ** 2))


def test_smoothed_robust_and_plain_differ():
    """cDPO adds the flipped loss, robust DPO takes it off; both are DPO without flips."""
    logps, batch = ragged()
    flipped = {k: x[:, ::-1] if x.ndim == 3 else x for k, x in batch.items()}
    plain, other = run(losses.dpo(), logps, batch)[0], run(losses.dpo(), logps[:, ::-1], flipped)[0]
    e = 0.2
    close(run(losses.dpo(label_smoothing=e), logps, batch)[0], (1 - e) * plain + e * other)
    close(run(losses.robust_dpo(label_smoothing=e), logps, batch)[0], ((1 - e) * plain - e * other) / (1 - 2 * e))
    for make in (losses.dpo, losses.robust_dpo):
        close(run(make(label_smoothing=0.0), logps, batch)[0], plain)


def test_robust_dpo_is_unbiased_under_flips():
    """The loss's expectation over flips of probability e is DPO's loss on the right labels, gradient included."""
    logps, batch = ragged()
    e = 0.3
    turn = lambda x: x[:, ::-1]
    flipped = {k: turn(x) if x.ndim == 3 else x for k, x in batch.items()}
    right, wrong = run(losses.robust_dpo(0.5, e), logps, batch), run(losses.robust_dpo(0.5, e), turn(logps), flipped)
    value, _, grads = run(losses.dpo(0.5), logps, batch)
    close((1 - e) * right[0] + e * wrong[0], value)
    close((1 - e) * right[2] + e * turn(wrong[2]), grads)


def test_exo_is_the_kl_from_the_smoothed_label():
    logps, batch = LOGPS
    e, q = 0.2, 1 / (1 + np.exp(-0.5 * (W - L)))
    kl = q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)
    close(run(losses.exo(0.5, e), logps, batch)[0], kl.mean())
    best = single([2 * math.log((1 - e) / e)], [0.0], [0.0], [0.0])
    value, _, grads = run(losses.exo(0.5, e), *best)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(grads, 0.0, atol=1e-6)


def test_discopops_minimum_and_hump():
    slope = lambda z: run(losses.discopop(1.0), *single([z], [0.0], [0.0], [0.0]))[2][0, 0, 1]
    assert [float(np.sign(slope(z))) for z in (-0.2, 0.0, 0.2)] == [-1.0, 1.0, -1.0]
    assert abs(slope(-0.11858)) < 1e-2 and abs(slope(0.072)) < 1e-2


def test_dpops_gradient_while_the_chosen_response_is_below_its_reference():
    logps, batch = single([-2.0], [-3.0], [-1.0], [-3.0])  # log-ratio of the chosen -1
    grads = run(losses.dpop(0.1, penalty=5.0), logps, batch)[2][0, :, 1]
    close(grads[0], -6 * grads[1])


def test_nca_holds_the_chosen_response():
    value, _, grads = run(losses.nca(1.0), *single([LN2], [0.0], [0.0], [0.0]))
    np.testing.assert_allclose(grads[0, 0, 1], 0.0, atol=1e-7)
    assert grads[0, 1, 1] > 0


def test_bco_by_hand():
    logps, batch = LOGPS
    shift = float((W.mean() + L.mean()) / 2)
    batch = reward_shift()(batch | {"old_logps": logps})
    np.testing.assert_allclose(batch["bco_shift"], shift, rtol=1e-6)
    close(run(losses.bco(0.5), logps, batch)[0], (softplus(-0.5 * (W - shift)) + softplus(0.5 * (L - shift))).mean())


def test_length_of_responses_that_are_equally_long_changes_nothing():
    logps, batch = ragged()
    batch["completion_mask"] = jnp.broadcast_to(jnp.arange(8) >= 4, logps.shape)  # 4 tokens
    expected, _, grads = run(losses.dpo(0.5), logps, batch)
    for objective in (losses.sigmoid_norm(2.0), losses.r_dpo(0.5, 0.3), losses.ld_dpo(0.5, 0.2)):
        value, _, g = run(objective, logps, batch)
        close(value, expected)
        close(g, grads)


def test_r_dpo_gives_a_longer_chosen_response_less_of_a_push():
    logps, batch = ragged()
    h = np.array(sequence(logps - batch["ref_logps"], batch), np.float64)
    n = np.array(lengths(batch), np.float64)
    z = 0.5 * (h[:, 0] - h[:, 1]) + 0.2 * (n[:, 0] - n[:, 1])
    value, metrics, grads = run(losses.r_dpo(0.5, alpha=0.2), logps, batch)
    close(value, softplus(-z).mean())
    close(metrics["rewards/margins"], z.mean())
    plain = run(losses.dpo(0.5), logps, batch)[2]
    longer, shorter = n[:, 0] > n[:, 1], n[:, 0] < n[:, 1]
    assert longer.any() and shorter.any()
    norm = lambda g: np.abs(np.array(g)).max(axis=(1, 2))
    assert (norm(grads)[longer] < norm(plain)[longer]).all() and (norm(grads)[shorter] > norm(plain)[shorter]).all()


def test_ld_dpo_from_dpo_to_the_shared_length():
    logps, batch = ragged()
    close(run(losses.ld_dpo(0.1, 1.0), logps, batch)[2], run(losses.dpo(0.1), logps, batch)[2])
    short = lengths(batch).min(axis=1)[:, None, None]
    cut = batch | {"completion_mask": batch["completion_mask"] & (jnp.cumsum(batch["completion_mask"], -1) <= short)}
    close(run(losses.ld_dpo(0.1, 0.0), logps, batch)[2], run(losses.dpo(0.1), logps, cut)[2])


def test_wpo_weighs_the_gradient_and_is_not_differentiated():
    logps, batch = ragged()
    weight = lambda x: jnp.exp((sequence(x + 0.5 * batch["completion_mask"], batch) / lengths(batch)).sum(axis=1))
    value, metrics, grads = run(losses.wpo(losses.dpo()), logps, batch)
    w = weight(logps)
    h = sequence(logps - batch["ref_logps"], batch)
    close(value, (w * softplus(-0.1 * np.array(h[:, 0] - h[:, 1]))).mean())
    plain, expected, g = run(losses.dpo(), logps, batch)
    close(grads, w[:, None, None] * g)
    close(metrics["rewards/margins"], expected["rewards/margins"])


def test_wpo_needs_the_statistic_and_pairs():
    logps, batch = ragged()
    objective = losses.wpo(losses.dpo())
    with pytest.raises(ValueError, match="Outputs.log_sum_sq"):
        objective(Outputs(logps, logps), batch, objective.normalised(batch))
    with pytest.raises(ValueError, match=r"the term 'sft' has values of shape \(6, 8\)"):
        run(losses.wpo(losses.dpo() + losses.sft()), logps, batch)


s = lambda x: 1 / (1 + np.exp(-x))
ds = lambda x: s(x) * s(-x)
FACTORS = {  # of docs/losses.md, on the gradients of l_w and l_l, beta 0.5; the log-probs of a response are 1 token long
    "dpo": (losses.dpo(0.5, 0.1), lambda w, r, z: -0.5 * (0.9 - s(z)), lambda w, r, z: 0.5 * (0.9 - s(z))),
    "robust_dpo": (losses.robust_dpo(0.5, 0.1), lambda w, r, z: -0.5 * (0.9 * s(-z) + 0.1 * s(z)) / 0.8, None),
    "ipo": (losses.ipo(0.5), lambda w, r, z: 2 * (w - r - 1), None),
    "ipo_mean": (losses.ipo_mean(0.5), lambda w, r, z: 2 * (w - r - 1), None),
    "ipo_daa": (losses.ipo_daa(0.5), lambda w, r, z: z - 1, None),
    "hinge": (losses.hinge(0.5), lambda w, r, z: -0.5 * (z < 1), None),
    "exo": (losses.exo(0.5, 0.1), lambda w, r, z: 0.5 * ds(z) * (z - np.log(9)), None),
    "discopop": (
        losses.discopop(0.5, 0.5),
        lambda w, r, z: 0.5 * (2 * ds(2 * z) * (np.exp(-z) + np.log(s(z))) - s(-2 * z) * s(-z) - s(2 * z) * np.exp(-z)),
        None,
    ),
    "dpop": (
        losses.dpop(0.5, 2.0),
        lambda w, r, z: -0.5 * s(-(z - np.maximum(0, -w))) * (1 + 2 * (w < 0)),
        lambda w, r, z: 0.5 * s(-(z - np.maximum(0, -w))),
    ),
    "nca": (losses.nca(0.5), lambda w, r, z: 0.5 * (s(w / 2) / 2 - s(-w / 2)), lambda w, r, z: 0.25 * s(r / 2)),
    "bco": (losses.bco(0.5), lambda w, r, z: -0.5 * s(-w / 2), lambda w, r, z: 0.5 * s(r / 2)),
    "sppo": (losses.sppo(0.5), lambda w, r, z: 2 * (w - 1), lambda w, r, z: 2 * (r + 1)),
    "apo_zero": (losses.apo_zero(0.5), lambda w, r, z: -0.5 * ds(w / 2), lambda w, r, z: 0.5 * ds(r / 2)),
    "apo_down": (losses.apo_down(0.5), lambda w, r, z: 0.5 * (ds(w / 2) - ds(z)), lambda w, r, z: 0.5 * ds(z)),
    "sigmoid_norm": (losses.sigmoid_norm(0.5), lambda w, r, z: -0.5 * s(-z), None),
    "simpo": (losses.simpo(0.5, 0.2), lambda w, r, z: -0.5 * s(0.2 - z), None),
    "cpo": (losses.cpo(0.5, 0.3), lambda w, r, z: -0.5 * s(-z) - 0.3, lambda w, r, z: 0.5 * s(-z)),
    "slic_hf": (losses.slic_hf(1.0, 0.3), lambda w, r, z: -1.0 * (w - r < 1) - 0.3, lambda w, r, z: 1.0 * (w - r < 1)),
    "aot": (losses.aot(0.5), lambda w, r, z: -0.5 * s(-z), None),
    "rpo": (losses.rpo(0.5, 0.4), lambda w, r, z: -0.5 * s(-z) - 0.2, lambda w, r, z: 0.5 * s(-z)),
    **{
        name: (losses.f_dpo(f, 0.5), factor(slope, 0, -1), factor(slope, 1, 1))
        for name, f, slope in [
            ("reverse_kl", losses.reverse_kl, lambda u: 1 + 0 * u),
            ("forward_kl", losses.forward_kl, lambda u: 1 / u),
            ("jensen_shannon", losses.jensen_shannon, lambda u: 1 / (1 + u)),
            ("alpha", losses.alpha_divergence(0.3), lambda u: u**-0.3),
            ("chi_squared", losses.chi_squared, lambda u: 2 * u),
            ("total_variation", losses.total_variation, lambda u: 0 * u),
        ]
    },
}


@pytest.mark.parametrize("name", FACTORS)
def test_gradients_are_the_stated_factors(name):
    objective, of_chosen, of_rejected = FACTORS[name]
    w, r = np.array([0.5, -1.0, 3.0, -0.2]), np.array([-0.4, 0.6, -2.0, -0.3])
    zero = np.zeros(4)
    logps, batch = single(w, r, zero, zero)
    batch |= {"bco_shift": jnp.zeros(4), "aot_margins": jnp.zeros(4)}
    score = DIVERGENCES[name][0] if name in DIVERGENCES else losses.reverse_kl
    z = 0.5 * np.array(score(jnp.asarray(w)) - score(jnp.asarray(r)))
    chosen = of_chosen(w, r, z)
    rejected = -chosen if of_rejected is None else of_rejected(w, r, z)
    close(run(objective, logps, batch)[2][..., 1], np.stack([chosen, rejected], axis=1) / 4)


def three_tokens():
    """A pair of three tokens over a vocabulary of three: logits of policy and reference, and the batch."""
    pi = jnp.array([[[1, 0, -1], [0.5, 0.5, 0], [0, 2, 0]], [[0, 1, 0], [-1, 0, 1], [0.3, 0.2, 0.1]]])[None]  # [1, 2, 3, V]
    ref = jnp.array([[[0.5, 0, -0.5], [0, 0.5, 0], [0, 1, 0.5]], [[0, 0.5, 0.2], [0, 0, 0.5], [0.1, 0.2, 0.3]]])[None]
    y = jnp.array([[[0, 1, 1], [1, 2, 0]]])
    pick = lambda z: jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1)[..., 0]
    batch = {"completion_mask": y >= 0, "ref_logps": pick(ref)}
    t = jax.nn.log_softmax(ref)
    model = lambda z: Outputs(p := pick(z), p, ref_kl=(jnp.exp(t) * (t - jax.nn.log_softmax(z))).sum(-1))
    return pi, batch, model


def test_tdpo_of_a_pair_of_three_tokens():
    pi, batch, model = three_tokens()
    kl = [[0.067258, 0.026609, 0.206393], [0.048271, 0.161366, 0.013311]]
    np.testing.assert_allclose(model(pi).ref_kl[0], kl, atol=1e-6)
    value = lambda loss: loss(model(pi), batch, loss.normalised(batch))[0]
    np.testing.assert_allclose(value(losses.tdpo(0.8)), 0.8032329, rtol=1e-6)
    np.testing.assert_allclose(value(losses.tdpo2(0.8, alpha=1.0)), 0.8032329, rtol=1e-6)
    close(value(losses.tdpo2(0.8, alpha=0.0)), value(losses.dpo(0.8)))


def test_tdpo2_does_not_differentiate_the_chosen_divergence():
    pi, batch, model = three_tokens()
    gradient = lambda loss: jax.grad(lambda z: loss(model(z), batch, loss.normalised(batch))[0])(pi)[0]
    one, two, plain = (gradient(x) for x in (losses.tdpo(0.8), losses.tdpo2(0.8, alpha=1.0), losses.dpo(0.8)))
    close(one[1], two[1])
    ratio = two[0] / plain[0]  # the chosen response's is DPO's direction
    np.testing.assert_allclose(ratio, np.full((3, 3), float(ratio[0, 0])), rtol=1e-4)
    assert np.abs(one[0] - two[0]).max() > 1e-2


# --- divergences ---

DIVERGENCES = {
    "reverse_kl": (losses.reverse_kl, lambda u: u * np.log(u)),
    "forward_kl": (losses.forward_kl, lambda u: -np.log(u)),
    "jensen_shannon": (losses.jensen_shannon, lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2)),
    "alpha": (losses.alpha_divergence(0.3), lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7)),
    "chi_squared": (losses.chi_squared, lambda u: (u - 1) ** 2),
    "total_variation": (losses.total_variation, lambda u: np.abs(u - 1) / 2),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_scores_are_the_derivatives_of_f(name):
    """f'(u) - f'(1), by central differences in float64; for the total variation the value at the step is between its sides."""
    score, f = DIVERGENCES[name]
    slope = lambda u: (f(u + 1e-5) - f(u - 1e-5)) / 2e-5
    u = np.array([0.05, 0.4, 0.9, 1.0, 1.2, 3.0, 8.0])
    np.testing.assert_allclose(score(jnp.log(u)), slope(u) - slope(1.0), rtol=1e-4, atol=1e-5)


def test_alpha_goes_from_reverse_to_forward_kl():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(losses.alpha_divergence(1e-3)(x), losses.reverse_kl(x), rtol=2e-3)
    np.testing.assert_allclose(losses.alpha_divergence(1.0)(x), losses.forward_kl(x), rtol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "chi_squared", "alpha"])
def test_divergences_stay_monotone_and_finite(name):
    """TRL cuts the exponent: such a pair has no gradient and never comes back."""
    x = jnp.array([-1000.0, -150.0, -2 * CAP, -1.0, 0.0, 1.0, 2 * CAP, 150.0, 1000.0])
    score = DIVERGENCES[name][0]
    y, slope = score(x), jax.vmap(jax.grad(score))(x)
    assert np.isfinite(y).all() and np.isfinite(slope).all() and (np.diff(y) >= 0).all()
    steep = x > CAP if name == "chi_squared" else x < -CAP / 0.3
    assert np.any(steep) and (np.array(slope)[np.array(steep)] > 1e5).all()


def test_rewards_follow_the_divergence():
    metrics = run(losses.f_dpo(losses.forward_kl, 0.5), *LOGPS)[1]
    close(metrics["rewards/chosen"], 0.5 * (1 - np.exp(-W)).mean())
    close(metrics["logps/chosen_drift"], W.mean())


# --- reward models ---


def scored(scores: np.ndarray, batch: dict | None = None):
    """Outputs of a reward model, and a batch of one token each."""
    mask = jnp.ones((*scores.shape, 1), bool)
    return (lambda s: Outputs(jnp.zeros(mask.shape), jnp.zeros(mask.shape), scores=s)), {"completion_mask": mask} | (batch or {})


@pytest.mark.parametrize("o", ORACLES["reward"], ids=lambda o: o["id"])
def test_bradley_terry_is_trls(o):
    s = jnp.asarray(o["scores"], jnp.float32)
    out, batch = scored(s, {"margin": jnp.asarray(o["margin"], jnp.float32)} if "margin" in o else None)
    objective = losses.bradley_terry((lambda batch: batch["margin"]) if "margin" in o else None)
    f = lambda s: objective(out(s), batch, objective.normalised(batch))
    (value, metrics), grads = jax.value_and_grad(f, has_aux=True)(s)
    close(value, o["loss"])
    close(grads, o["grads"])
    ties = np.mean([a == b for a, b in o["scores"]])  # TRL calls a tie wrong
    close(metrics["rewards/accuracies"], o["accuracy"] + ties / 2)
    close(metrics["rewards/margins"], o["margin_metric"])


def test_centring_and_l2_by_hand():
    s = jnp.array([[2.0, 1.0], [-1.0, 0.5]])
    out, batch = scored(s)
    for objective, expected in ((losses.centring(), (9 + 0.25) / 2), (losses.score_l2(), (2.5 + 0.625) / 2)):
        close(objective(out(s), batch, objective.normalised(batch))[0], expected)


def test_a_language_models_likelihood_beside_the_scores_by_hand():
    """GRM: log-probs of -20 and -25, beta 0.1, beside Bradley and Terry's of three pairs."""
    s = jnp.array([[1.2, 0.4], [-0.3, 0.5], [2.0, -1.0]])
    logps = jnp.broadcast_to(jnp.array([-20.0, -25.0])[None, :, None] / 2, (3, 2, 2))  # of two tokens
    batch = {"completion_mask": jnp.ones((3, 2, 2), bool)}
    own = losses.grm_sft(0.1)
    value, grads = jax.value_and_grad(lambda x: own(Outputs(x, x, scores=s), batch, own.normalised(batch))[0])(logps)
    close(value, 2.12693)
    close(grads, np.broadcast_to(np.array([-0.08808, 0.0])[None, :, None] / 3, (3, 2, 2)))
    both = 0.99 * losses.bradley_terry() + 0.01 * own
    close(both(Outputs(logps, logps, scores=s), batch, both.normalised(batch))[0], 0.54623)


Y = jnp.array([[[1.0, 5.0]], [[3.0, jnp.nan]], [[2.0, jnp.nan]], [[jnp.nan, jnp.nan]]])  # [B, N = 1, labels]


def test_attributes_are_averaged_over_what_is_given_by_hand():
    s = jnp.array([[[2.0, 1.0]], [[3.0, 9.0]], [[0.0, 9.0]], [[9.0, 9.0]]])
    objective, batch = losses.attribute_regression(["help", "length"]), {"completion_mask": jnp.ones((4, 1, 3), bool), "attributes": Y}
    f = lambda s: objective(Outputs(None, None, scores=s), batch, objective.normalised(batch))
    (value, metrics), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(s)
    close(metrics["loss/help"], (1 + 0 + 4) / 3)
    close(metrics["loss/length"], 16.0)  # one response has it
    close(value, (5 / 3 + 16) / 2)
    close([metrics["errors/help"], metrics["errors/length"]], [(1 + 0 + 2) / 3, 4.0])
    close(grads[:, 0], [[1 / 3, -4.0], [0, 0], [-2 / 3, 0], [0, 0]])  # nothing where nothing is given
    padded = batch | {"completion_mask": batch["completion_mask"].at[2].set(False)}
    close([w.sum() for w in objective.weights(padded)], [2, 1])


def test_attributes_that_do_not_fit():
    batch = {"completion_mask": jnp.ones((4, 1, 3), bool), "attributes": Y}
    objective = losses.attribute_regression(["a", "b", "c"])
    message = (
        "names 3 attributes, but the data have 2 and the model gives 1 scores; set data.columns.attributes and model.num_labels to match"
    )
    with pytest.raises(ValueError, match=message):
        objective(Outputs(None, None, scores=jnp.zeros((4, 1))), batch, (jnp.ones((4, 1)),) * 3)
    with pytest.raises(ValueError, match='no "attributes"; name the columns of the attributes with data.columns.attributes'):
        objective.normalised({"completion_mask": batch["completion_mask"]})
    for names in ("help", [], ["a", "a"]):
        with pytest.raises(ValueError, match="give a list of different names"):
            losses.attribute_regression(names)


def test_a_plain_function_is_a_reward_model():
    """A table of token scores, fitted by the shared step: the chosen tokens end above the rejected ones, centred."""

    def apply(table, batch):
        zero = jnp.zeros(batch["tokens"].shape)
        return Outputs(zero, zero, scores=sequence(table[batch["tokens"]], batch))

    tokens = jnp.array([[[1, 2], [1, 3]], [[1, 4], [1, 2]], [[1, 5], [1, 3]], [[1, 5], [1, 4]]])
    batch = {"tokens": tokens, "completion_mask": jnp.broadcast_to(jnp.array([False, True]), tokens.shape)}
    optimizer = optax.adam(0.1)
    step = jax.jit(make_step(apply, losses.bradley_terry() + 0.1 * losses.centring(), optimizer, microbatches=2))
    state = init_state(jnp.full(6, 5.0), optimizer, jax.random.key(0))
    for _ in range(150):
        state, metrics = step(state, batch)
    assert metrics["rewards/accuracies"] == 1.0 and metrics["loss/bradley_terry"] < 0.4
    assert state.params[5] > state.params[4] > state.params[2] > state.params[3]
    assert abs(state.params[2:].mean()) < 0.5  # it began at 5


# --- errors ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.robust_dpo(label_smoothing=0.5), r"label_smoothing is 0.5; it must be a flip probability, in \[0, 0.5\)"),
        (lambda: losses.exo(label_smoothing=0.0), "label_smoothing is 0.0; it must be above 0"),
        (lambda: losses.discopop(tau=0.0), "tau is 0.0; it must be above 0"),
        (lambda: losses.discopop(tau=2.0), "tau is 2.0; it must be at most 1"),
        (lambda: losses.dpop(penalty=-1.0), "penalty is -1.0"),
        (lambda: losses.ld_dpo(ld_alpha=1.5), "ld_alpha is 1.5"),
        (lambda: losses.r_dpo(alpha=-0.1), "alpha is -0.1"),
        (lambda: losses.alpha_divergence(0.0), "use reverse_kl"),
        (lambda: losses.simpo(gamma=-1.0), "gamma is -1.0"),
        (lambda: losses.slic_hf(delta=0.0), "delta is 0.0"),
        (lambda: losses.kto(desirable_weight=-1.0), "desirable_weight is -1.0"),
        (lambda: losses.aot(label_smoothing=0.7), "label_smoothing is 0.7"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["robust_dpo", "ipo_daa", "ipo_mean", "hinge", "exo", "discopop", "dpop", "nca", "bco", "sppo", "apo_zero",
    "apo_down", "sigmoid_norm", "ld_dpo", "r_dpo", "aot", "aot_unpaired", "simpo", "cpo", "orpo", "kto", "apo_zero_unpaired"])  # fmt: skip
def test_beta_must_be_positive(name):
    with pytest.raises(ValueError, match="beta is 0.0; it must be above 0"):
        getattr(losses, name)(beta=0.0)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("dpo", "ref_logps", 'no "ref_logps".*logps\\("ref_logps", reference\\)'),
        ("kto", "kto_kl", 'no "kto_kl".*mismatched_kl'),
        ("kto", "labels", 'no "labels"'),
        ("bco", "bco_shift", 'no "bco_shift".*reward_shift'),
        ("aot", "aot_margins", 'no "aot_margins".*matched_margins'),
        ("aot_unpaired", "aot_ratios", 'no "aot_ratios".*matched_ratios'),
    ],
)
def test_missing_fields_are_named(name, missing, message):
    logps, batch = ragged()
    if name == "kto":
        logps, batch = logps[:, :1], {k: x[:, :1] if x.ndim == 3 or k == "labels" else x for k, x in batch.items()}
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        run(getattr(losses, name)(), logps, batch)


def test_bradley_terry_with_smoothed_labels_stops_at_their_log_odds():
    """-(0.9 log s(1) + 0.1 log s(-1)) by hand; the gradient vanishes where the difference is log(0.9 / 0.1)."""
    logps, batch = single([2.0], [1.0], [0.0], [0.0])  # scores are the log-probs here
    value, _, grads = run(losses.bradley_terry(label_smoothing=0.1), logps, batch)
    close(value, 0.9 * 0.31326169 + 0.1 * 1.31326169)
    close(grads[0, :, 1], [-(0.26894142 - 0.1), 0.26894142 - 0.1])
    logps, batch = single([math.log(9.0)], [0.0], [0.0], [0.0])
    np.testing.assert_allclose(run(losses.bradley_terry(label_smoothing=0.1), logps, batch)[2], 0.0, atol=1e-7)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.6"):
        losses.bradley_terry(label_smoothing=0.6)


def test_pairs_and_single_responses_are_told_apart():
    logps, batch = ragged()
    with pytest.raises(ValueError, match="takes single responses, but these examples have 2"):
        run(losses.kto(), logps, batch)
    one = {k: x[:, :1] if x.ndim == 3 else x for k, x in batch.items()}
    for objective in (losses.simpo(), losses.aot(), losses.bradley_terry()):
        with pytest.raises(ValueError, match="takes pairs, but these examples have 1"):
            run(objective, logps[:, :1], one)
    for objective, name in ((losses.tdpo(), "Outputs.ref_kl"), (losses.bradley_terry(), "Outputs.scores")):
        with pytest.raises(ValueError, match=name):
            objective(Outputs(logps, logps), batch, objective.normalised(batch))
