"""The step: parts equal the whole, bad steps are skipped, nothing is traced twice; evaluation, experience, optimizers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from ml_collections import ConfigDict

from alignax import mesh as meshes
from alignax.config import default_config
from alignax.experience import chain, logps
from alignax.losses import Loss, dpo, finished, ipo, kl_k3, make_loss, observe, per_sequence, ppo, rpo, rpo_token_mean, sft, wpo
from alignax.models import parameters
from alignax.optim import OPTIMIZERS, SCHEDULES, decays, make_optimizer, make_schedule
from alignax.packing import Packing
from alignax.train import digest, init_state, make_evaluation, make_step, means
from alignax.types import Model, microbatch

LOSSES = {  # every term there is: rpo holds summed_sft, rpo_token_mean holds sft(over=per_sequence)
    "sft": sft(),
    "dpo": dpo(),
    "ipo": ipo(),
    "rpo": rpo(eta=0.5),
    "rpo_token_mean": rpo_token_mean(),
    "cdpo+sft": dpo(label_smoothing=0.1) + sft(),
}


def start(optimizer: optax.GradientTransformation, params=None):
    return init_state(tiny.plain_params() if params is None else params, optimizer, jax.random.key(0))


def padded(batch: dict, rows: tuple[int, ...]) -> dict:
    """The batch with padding rows at these places."""
    return batch | {k: batch[k].at[np.array(rows, int)].set(False) for k in ("mask", "completion_mask")}


def ragged(B: int = 8, seed: int = 0) -> dict:
    return tiny.with_reference(tiny.batch(B, seed=seed))


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b):
    """Checks that two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near(a, b, tolerance: float = 1e-6, floor: float = 1e-3):
    """Checks every leaf to a tolerance relative to its largest value (at least `floor`): float32 sums in another order."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(np.abs(y).max()), floor))


def assert_metrics_near(a, b):
    """Checks metrics with a floor: they are means of values of both signs, of size 1 and more, that may cancel."""
    assert_near(a, b, floor=1.0)


# --- microbatches ---


@pytest.mark.parametrize("name", runs.slow_but(["dpo", "rpo_token_mean", "sft", "ipo", "rpo", "cdpo+sft"], "dpo"))
def test_microbatches_equal_one_batch(name):
    """Gradients, parameters and metrics, with ragged rows, and padding rows spread unevenly over the parts."""
    optimizer = optax.sgd(0.1, momentum=0.0)  # its state is the gradient
    one, two, four = (jax.jit(make_step(tiny.plain_apply, LOSSES[name], optimizer, count)) for count in (1, 2, 4))
    state = start(optimizer)
    for padding in ((), (1, 6), (0, 2, 4, 6)):  # the last: a part is all padding
        batch = padded(ragged(), padding)
        whole, metrics = one(state, batch)
        assert metrics["grad_norm"] > 1e-3
        for step in (two, four):
            parts, part_metrics = step(state, batch)
            assert_near(parts.opt_state, whole.opt_state)
            assert_near(parts.params, whole.params)
            assert_metrics_near(part_metrics, metrics)


@pytest.mark.slow
def test_gradients_are_summed_in_their_dtype():
    """In bfloat16 a sum over microbatches is within its rounding, half a part in 256 for each of 4; the loop's sums are of that dtype."""
    optimizer, batch = optax.sgd(0.1, momentum=0.0), ragged()  # its state is the gradient
    made = lambda dtype: make_step(tiny.plain_apply, dpo(), optimizer, 4, gradient_dtype=dtype)
    whole, half = (jax.jit(made(dtype))(start(optimizer), batch)[0] for dtype in ("float32", "bfloat16"))
    assert_equal(copied(whole.opt_state), copied(jax.jit(made(None))(start(optimizer), batch)[0].opt_state))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half.params))
    assert_near(half.opt_state, whole.opt_state, 4 / 256)
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(half.opt_state), jax.tree.leaves(whole.opt_state), strict=True))
    assert gap > 0
    loop = lambda dtype: next(str(e) for e in jax.make_jaxpr(made(dtype))(start(optimizer), batch).eqns if e.primitive.name == "scan")
    assert "bf16[96,8]" in loop("bfloat16") and "bf16" not in loop("float32")


OTHER = {"rollouts": dpo(), "pretrain": lambda step: (0.5 + step) * sft()}  # as PPO-ptx: each loss of a batch of its own


@pytest.mark.slow
def test_losses_of_batches_of_their_own_are_one_gradient():
    """Gradient and loss are the sums of separate ones, each over its own global batch; microbatches give the same."""
    optimizer = optax.sgd(0.1, momentum=0.0)  # its state is the gradient
    first, second = padded(ragged(), (1, 6)), padded(tiny.batch(8, N=1, T=16, seed=1), (0, 2, 4))
    state = start(optimizer)
    apart = [(jax.jit(make_step(tiny.plain_apply, OTHER[n], optimizer))(state, b)) for n, b in (("rollouts", first), ("pretrain", second))]
    (dpo_state, dpo_metrics), (sft_state, sft_metrics) = apart
    assert sft_metrics["grad_norm"] > 1e-3
    step = jax.jit(make_step(tiny.plain_apply, OTHER, optimizer, 4))
    together, metrics = step(state, {"rollouts": first, "pretrain": second})
    assert_near(together.opt_state, jax.tree.map(jnp.add, dpo_state.opt_state, sft_state.opt_state))
    np.testing.assert_allclose(metrics["loss"], dpo_metrics["loss"] + sft_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["pretrain/loss/sft"], sft_metrics["loss/sft"], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], dpo_metrics["rewards/margins"], rtol=1e-5)


TWO = {"dpo": dpo(), "sft": 0.5 * sft()}


def dotted(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def normalised_sum(gradients):
    """The sum of the gradients, each scaled to norm 1."""
    unit = lambda own: optax.tree.scale(1 / optax.tree.norm(own), own)
    return jax.tree.map(lambda *g: sum(g), *map(unit, gradients.values()))


def pcgrad(gradients):
    """PCGrad: removes from each gradient its part against other gradients, then sums (Yu et al. 2020, arXiv:2001.06782)."""
    out = []
    for name, own in gradients.items():
        for other in (g for n, g in gradients.items() if n != name):
            share = jnp.minimum(dotted(own, other), 0.0) / dotted(other, other)
            own = jax.tree.map(lambda x, y, share=share: x - share * y, own, other)
        out.append(own)
    return jax.tree.map(lambda *g: sum(g), *out)


@pytest.mark.parametrize("count", runs.slow_but([1, 4], 1))
@pytest.mark.parametrize("combine", runs.slow_but([normalised_sum, pcgrad], pcgrad))
def test_gradients_of_several_objectives_are_combined(combine, count):
    """Each objective has its gradient of the whole batch for any number of microbatches, on one batch or several; numpy is the oracle."""
    optimizer = optax.sgd(0.1, momentum=0.0)  # its state is the gradient
    batch, other = padded(ragged(), (1, 6)), padded(ragged(), (0, 2))
    against = -0.3 * dpo()  # so that PCGrad finds a conflict
    for objective, batches in ((TWO, dict.fromkeys(TWO, batch)), ({"dpo": dpo(), "against": against}, {"dpo": batch, "against": other})):
        state = start(optimizer)
        own = [jax.jit(make_step(tiny.plain_apply, objective[n], optimizer))(state, batches[n]) for n in objective]
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.opt_state)]).astype(np.float64) for s, _ in own]
        if combine is normalised_sum:
            wanted = sum(g / np.linalg.norm(g) for g in flat)
        else:
            (a, b), conflict = flat, min(flat[0] @ flat[1], 0.0)
            assert (conflict < 0) == ("against" in objective)
            wanted = a - conflict / (b @ b) * b + b - conflict / (a @ a) * a
        after, metrics = jax.jit(make_step(tiny.plain_apply, objective, optimizer, count, combine=combine))(state, batches)
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(after.opt_state)])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * max(1.0, *(np.abs(g).max() for g in flat)))
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(wanted), rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], sum(m["loss"] for _, m in own), rtol=1e-6)
        second = list(objective)[1]
        for name in ("loss/dpo", "loss/sft", "rewards/margins"):
            for place, prefix in enumerate(("", second + "/")):
                assert (name in own[place][1]) == (prefix + name in metrics)
                if name in own[place][1]:
                    np.testing.assert_allclose(metrics[prefix + name], own[place][1][name], rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"microbatches": 2}, {"packing": Packing(1)}], ids=str)
def test_gradients_come_in_the_order_of_the_losses(how):
    """Whatever the batch is split into: `first, second = gradients.values()` is what an experiment may write."""
    names, seen = ("later", "earlier"), []
    first = lambda gradients: seen.append(tuple(gradients)) or gradients["later"]
    step = make_step(tiny.plain_apply, {"later": dpo(), "earlier": sft()}, optax.sgd(0.1), combine=first, **how)
    jax.eval_shape(lambda state, batch: step(state, dict.fromkeys(names, batch)), start(optax.sgd(0.1)), ragged())
    assert set(seen) == {names}


def test_a_sum_of_gradients_is_the_gradient_of_the_sum():
    batch, optimizer = ragged(), optax.sgd(0.1, momentum=0.0)
    summed = lambda gradients: jax.tree.map(lambda *g: sum(g), *gradients.values())
    steps = [make_step(tiny.plain_apply, TWO, optimizer, 2, outputs=True, combine=combine) for combine in (None, summed)]
    (one, metrics, out), (two, others, again) = (jax.jit(step)(start(optimizer), dict.fromkeys(TWO, batch)) for step in steps)
    assert_near(two.opt_state, one.opt_state)
    assert_metrics_near(others, metrics)
    assert_equal(again, out)


# --- packed parts ---

SHORT = tiny.batch(2, N=1, T=16, seed=1)  # a batch of no more positions than a packed part
MANY = padded(tiny.batch(12, N=1, T=16, seed=1), (0, 2, 4))
PACKED = {  # an objective, its batch or batches, and how gradients are combined
    "one": (dpo() + sft(), padded(ragged(), (1, 6)), None),
    "all padding": (dpo() + sft(), padded(ragged(), tuple(range(8))), None),
    "of one batch": (TWO, padded(ragged(), (1, 6)), None),
    "of their own": (OTHER, {"rollouts": padded(ragged(), (1, 6)), "pretrain": MANY}, None),
    "padded second": (OTHER, {"rollouts": padded(ragged(), (1, 6)), "pretrain": SHORT}, None),
    "padded first": ({"pretrain": sft(), "rollouts": dpo()}, {"pretrain": SHORT, "rollouts": padded(ragged(), (1, 6))}, None),
    "combined": (TWO, padded(ragged(), (1, 6)), pcgrad),
    "combined of their own": (OTHER, {"rollouts": padded(ragged(), (1, 6)), "pretrain": MANY}, pcgrad),
    "combined with a padded one": (OTHER, {"rollouts": padded(ragged(), (1, 6)), "pretrain": SHORT}, pcgrad),
}


@pytest.mark.parametrize("kind", runs.by_turn(PACKED, ["of one batch"], ["combined with a padded one"]))
def test_packed_parts_equal_one_batch(kind):
    """Gradients, parameters, metrics and outputs, also of several objectives; a batch of few rows among them stays padded."""
    objective, given, combine = PACKED[kind]
    optimizer = optax.sgd(0.1, momentum=0.0)  # its state is the gradient

    def stepped(packing: Packing | None):
        step = make_step(tiny.plain_apply, objective, optimizer, outputs=True, combine=combine, packing=packing)
        batches = lambda batch: dict.fromkeys(TWO, batch) if objective is TWO else batch
        return jax.jit(lambda state, batch: step(state, batches(batch)))(start(optimizer), given)

    (state, metrics, out), (parts, part_metrics, part_out) = stepped(None), stepped(Packing(1))
    share = part_metrics.pop("packed_positions")
    assert share == 0 if kind == "all padding" else 0.2 < share < 1
    assert_near(parts.opt_state, state.opt_state)
    assert_near(parts.params, state.params)
    assert_metrics_near(part_metrics, metrics)
    assert_near(part_out, out)


@pytest.mark.parametrize("combine", [lambda gradients: gradients, lambda gradients: jax.tree.map(jnp.sum, gradients["dpo"])])
def test_what_is_no_gradient_is_refused(combine):
    step = make_step(tiny.plain_apply, TWO, optax.sgd(0.1), combine=combine)
    with pytest.raises(ValueError, match=r"combine\(gradients\) gives .* return one gradient, a tree like each"):
        jax.eval_shape(step, start(optax.sgd(0.1)), dict.fromkeys(TWO, ragged()))


def test_an_evaluation_of_several_objectives_is_each_ones():
    batch, params, step = ragged(), tiny.plain_params(), jnp.zeros((), jnp.int32)
    found = means(jax.jit(make_evaluation(tiny.plain_apply, TWO))(params, step, batch))
    own = {name: means(jax.jit(make_evaluation(tiny.plain_apply, loss))(params, step, batch)) for name, loss in TWO.items()}
    assert found["loss"] == pytest.approx(own["dpo"]["loss"] + own["sft"]["loss"], rel=1e-6)
    assert found["loss/dpo"] == pytest.approx(own["dpo"]["loss/dpo"]) and found["sft/loss/sft"] == pytest.approx(own["sft"]["loss/sft"])


# --- what is only observed ---


def tokens(batch):
    return batch["completion_mask"]


@pytest.mark.parametrize("count", runs.slow_but([1, 4], 1))
def test_what_is_observed_trains_nothing(count):
    """The step equals that of the loss alone, bit for bit, whatever is observed, and with whatever factor; microbatches add up."""
    batch, optimizer = padded(ragged(), (1, 6)), optax.sgd(0.1, momentum=0.0)
    entropy = observe("entropy", lambda out, batch: out.entropy, tokens)
    infinite = observe("inf", lambda out, batch: jnp.log(0.0 * out.logps[:, 0].sum(axis=-1)))
    root = observe("root", lambda out, batch: jnp.sqrt(out.logps - out.logps), tokens)  # of an infinite slope
    plain, state = jax.jit(make_step(tiny.plain_apply, dpo(), optimizer, count))(start(optimizer), batch)
    after, metrics = jax.jit(make_step(tiny.plain_apply, dpo() + 3.0 * entropy + infinite - root, optimizer, count))(
        start(optimizer), batch
    )
    assert_equal((after.params, after.opt_state), (plain.params, plain.opt_state))
    assert metrics["skipped"] == 0 and metrics["inf"] == -math.inf and metrics["root"] == 0
    assert_equal({name: metrics[name] for name in state}, state)
    assert metrics.keys() - state.keys() == {"entropy", "inf", "root"}
    out = tiny.plain_apply(tiny.plain_params(), batch)
    np.testing.assert_allclose(metrics["entropy"], out.entropy.sum() / batch["completion_mask"].sum(), rtol=1e-6)


def test_what_is_observed_is_read_in_the_formula_and_evaluated():
    seen = observe("entropy", lambda out, batch: out.entropy, tokens)
    objective = 2 * (dpo() + seen)
    assert repr(objective) == "2 * dpo + observe(entropy)" and repr(objective.trained()) == "2 * dpo"
    weighed = finished(wpo(dpo() + seen) + 0.1 * kl_k3())
    assert [term.name for _, term in weighed.terms if term.observed] == ["entropy"], "what changes losses leaves it as it is"
    batch, params = ragged(), tiny.plain_params()
    found = means(jax.jit(make_evaluation(tiny.plain_apply, objective))(params, jnp.zeros((), jnp.int32), batch))
    out = tiny.plain_apply(params, batch)
    assert found["entropy"] == pytest.approx(float(out.entropy.sum() / batch["completion_mask"].sum()), rel=1e-6)
    assert found["loss"] == pytest.approx(2 * found["loss/dpo"], rel=1e-6) and "loss/entropy" not in found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: observe("", lambda out, batch: out.entropy), "the name must be text"),
        (lambda: observe("x", lambda out: out.entropy), r"takes \(out\); it is called with \(out, batch\)"),
        (lambda: observe("x", lambda out, batch: (out.entropy, {})), "returns tuple; return only the values"),
        (lambda: observe("x", lambda out, batch: out.entropy), r"values of loss 'x' have shape \(8, 2, 24\), but its weights have \(8,\)"),
    ],
)
def test_what_cannot_be_observed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_step(tiny.plain_apply, dpo() + make(), optax.sgd(0.1)), start(optax.sgd(0.1)), ragged())


@pytest.mark.long
@pytest.mark.slow
def test_mixing_pretraining_in_holds_what_ppo_alone_forgets():
    """Ouyang et al. 2022, eq. 2: the loss on texts that the policy was trained on, after PPO on other samples, random ones."""
    texts = tiny.batch(8, N=1, T=16, V=8)
    samples = tiny.batch(8, N=2, T=16, V=8, seed=1)
    samples["advantages"] = jnp.array([1.0, -1.0])[None, :, None] * samples["completion_mask"]
    optimizer, policy = optax.sgd(1.0), ppo(clip=5.0)
    fit = jax.jit(make_step(tiny.plain_apply, sft(), optimizer))
    state = start(optimizer, tiny.plain_params(V=8))
    for _ in range(100):
        state, metrics = fit(state, texts)
    learnt, found = metrics["loss"], {}
    samples["old_logps"] = tiny.plain_apply(state.params, samples).logps
    for name, objective, batch in (
        ("alone", policy, samples),
        ("mixed", {"rollouts": policy, "pretrain": sft()}, {"rollouts": samples, "pretrain": texts}),
    ):
        step, own = jax.jit(make_step(tiny.plain_apply, objective, optimizer)), state
        for _ in range(30):
            own, metrics = step(own, batch)
        found[name] = fit(own, texts)[1]["loss"], metrics["loss/ppo"]
    assert found["alone"][0] > learnt + 1.0 and found["mixed"][0] < learnt + 0.2
    assert found["mixed"][1] < -0.1, "and yet the samples of advantage 1 gain"


def test_padding_rows_change_nothing():
    batch = ragged(8)
    step = jax.jit(make_step(tiny.plain_apply, dpo() + sft(), optax.sgd(1.0)))
    short, metrics = step(start(optax.sgd(1.0)), {k: x[:5] for k, x in batch.items()})
    long, more = step(start(optax.sgd(1.0)), padded(batch, (5, 6, 7)))
    assert_near(long.params, short.params)
    assert_metrics_near(more, metrics)


def test_a_microbatch_takes_every_countth_row():
    assert microbatch(jnp.arange(8), 4).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert microbatch({"x": jnp.zeros((6, 2, 5))}, 3)["x"].shape == (3, 2, 2, 5)


def test_first_dpo_step_from_the_reference():
    """Loss ln 2, accuracy 1/2, margin exactly 0."""
    batch = tiny.with_reference(tiny.batch(), params=tiny.plain_params())
    _, metrics = jax.jit(make_step(tiny.plain_apply, dpo(), optax.sgd(1.0), 2))(start(optax.sgd(1.0)), batch)
    np.testing.assert_allclose(metrics["loss"], math.log(2), atol=1e-6)
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0.0


def test_gradient_and_update_are_optaxs():
    """One AdamW step by hand from the loss's own gradient."""
    optimizer = optax.adamw(1e-2)
    batch, state = ragged(), start(optimizer)
    f = lambda p: dpo()(tiny.plain_apply(p, batch), batch, dpo().normalised(batch))[0]
    grads = jax.jit(jax.grad(f))(state.params)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    stepped, metrics = jax.jit(make_step(tiny.plain_apply, dpo(), optimizer))(state, batch)
    assert_near(stepped.params, optax.apply_updates(state.params, updates))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], f(state.params), rtol=1e-6)
    assert stepped.step == 1


# --- steps that are not finite ---


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_is_skipped_and_the_run_recovers(bad, count):
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    step = jax.jit(make_step(tiny.plain_apply, ipo(), optimizer, count))
    good = ragged()
    poisoned = good | {"ref_logps": good["ref_logps"].at[0, 0].set(jnp.where(good["completion_mask"][0, 0], bad, 0.0))}
    state, metrics = step(start(optimizer), good)
    assert (metrics["skipped"], metrics["skipped_total"], metrics["skipped_in_a_row"]) == (0, 0, 0)
    kept = copied((state.params, state.opt_state))
    for i in (1, 2):
        state, metrics = step(state, poisoned)
        assert not np.isfinite(metrics["loss"])  # shown, not filtered out of the log
        assert (metrics["skipped"], metrics["skipped_total"], metrics["skipped_in_a_row"]) == (1, i, i)
        assert (state.step, state.skipped, state.skipped_in_a_row) == (1 + i, i, i)
        assert_equal(copied((state.params, state.opt_state)), kept)
    state, metrics = step(state, good)
    assert (metrics["skipped"], metrics["skipped_total"], metrics["skipped_in_a_row"]) == (0, 2, 0)
    assert np.isfinite(metrics["loss"]) and metrics["finite/embed"]
    straight = start(optimizer)
    for _ in range(2):
        straight, _ = step(straight, good)
    assert_equal((state.params, state.opt_state), (straight.params, straight.opt_state))


def test_the_parameter_whose_gradient_is_not_finite_is_named():
    """The loss is finite here: sqrt(0) has an infinite slope."""
    params = {"plain": tiny.plain_params(), "root": jnp.zeros(())}
    apply = lambda p, batch: (out := tiny.plain_apply(p["plain"], batch))._replace(logps=out.logps + jnp.sqrt(p["root"]))
    state = start(optax.sgd(0.1), params)
    after, metrics = jax.jit(make_step(apply, sft(), optax.sgd(0.1)))(state, ragged())
    finite = {name: bool(x) for name, x in metrics.items() if name.startswith("finite/")}
    assert finite == {"finite/plain.bias": True, "finite/plain.embed": True, "finite/plain.head": True, "finite/root": False}
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert_equal(after.params, params)


# --- tracing ---


def test_nothing_is_traced_twice_in_100_steps():
    """This holds with a schedule in the loss, after a skipped step, and with an experience made anew with other parameters."""
    traces = []
    objective = lambda step: dpo() + (0.1 * step) * sft()
    step = make_step(tiny.plain_apply, objective, optax.adam(1e-3), 2)

    def counted(state, experience, batch):
        traces.append(1)
        return step(state, experience(batch))

    jitted = jax.jit(counted, donate_argnums=0)
    batch, state = tiny.batch(), start(optax.adam(1e-3))
    reference = Model(tiny.plain_apply, tiny.plain_params(seed=1))
    for i in range(100):
        broken = Model(tiny.plain_apply, jax.tree.map(lambda x: x * math.nan, reference.params))
        state, metrics = jitted(state, logps("ref_logps", broken if i == 50 else reference), batch)
        assert metrics["skipped"] == (i == 50)
    assert (state.step, state.skipped, len(traces)) == (100, 1, 1)


def test_a_schedule_changes_the_loss_with_the_step():
    objective = lambda step: dpo() + (0.5 * step) * sft()
    step = jax.jit(make_step(tiny.plain_apply, objective, optax.sgd(0.0), 2))
    state, batch = start(optax.sgd(0.0)), ragged()
    seen = []
    for _ in range(3):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    for i, x in enumerate(seen):
        np.testing.assert_allclose(x, metrics["loss/dpo"] + 0.5 * i * metrics["loss/sft"], rtol=1e-6)


def test_the_state_can_be_donated():
    step = jax.jit(make_step(tiny.plain_apply, dpo(), optax.adam(0.1)), donate_argnums=0)
    state = start(optax.adam(0.1))
    old = jax.tree.leaves(state.params)
    state, _ = step(state, ragged())
    step(state, ragged())
    assert all(x.is_deleted() for x in old)


# --- evaluation ---


def totals(*parts):
    return jax.tree.map(lambda *x: sum(np.float64(v) for v in x), *parts)


@pytest.mark.parametrize("name", runs.by_turn(["rpo", "rpo_token_mean", "cdpo+sft"], [], ["cdpo+sft"]))
def test_evaluation_of_ragged_batches_equals_one_big_batch(name):
    """Evaluation also gives the training step's own loss and metrics."""
    batch, params = padded(ragged(9), (3, 8)), tiny.plain_params()
    evaluate = jax.jit(make_evaluation(tiny.plain_apply, LOSSES[name]))
    cuts = [{k: x[s] for k, x in batch.items()} for s in (slice(0, 4), slice(4, 8), slice(8, 9))]
    parts = means(totals(*(evaluate(params, 0, part) for part in cuts)))
    whole = means(evaluate(params, 0, batch))
    _, metrics = jax.jit(make_step(tiny.plain_apply, LOSSES[name], optax.sgd(0.0)))(start(optax.sgd(0.0)), batch)
    assert set(parts) == set(whole) == {k for k in metrics if k[:5] not in ("grad_", "skipp", "finit")}
    for key, x in parts.items():
        np.testing.assert_allclose(x, whole[key], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x, metrics[key], rtol=1e-5, atol=1e-6)


def test_evaluation_adds_two_terms_of_the_same_name():
    batch, params = ragged(), tiny.plain_params()
    objective = dpo() + 0.5 * sft() + 2.0 * sft(over=per_sequence) + 3.0 * dpo(beta=0.5)
    value = lambda x: float(x(tiny.plain_apply(params, batch), batch, x.normalised(batch))[0])
    found = means(make_evaluation(tiny.plain_apply, objective)(params, jnp.zeros((), jnp.int32), batch))
    expected = value(dpo()) + 0.5 * value(sft()) + 2.0 * value(sft(over=per_sequence)) + 3.0 * value(dpo(beta=0.5))
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], value(objective), rtol=1e-5)
    assert not [name for name in found if name.startswith("loss:")]


def test_evaluation_follows_a_schedule():
    batch, params = ragged(), tiny.plain_params()
    evaluate = jax.jit(make_evaluation(tiny.plain_apply, lambda step: step * sft()))
    at = lambda step: means(evaluate(params, jnp.asarray(step), batch))["loss"]
    assert at(0) == 0.0
    np.testing.assert_allclose(at(6), 3 * at(2), rtol=1e-6)


def test_means_by_hand():
    sums = {"a": (6.0, 4.0), "empty": (0.0, 0.0), "loss:0": (1.0, 2.0), "loss:1": (9.0, 3.0)}
    assert means(sums) == {"loss": 3.5, "a": 1.5, "empty": 0.0}


def test_an_evaluation_batch_of_padding_weighs_nothing():
    batch, params = ragged(4), tiny.plain_params()
    evaluate = make_evaluation(tiny.plain_apply, rpo())
    alone = evaluate(params, 0, batch)
    nothing = evaluate(params, 0, padded(batch, (0, 1, 2, 3)))
    assert all(total == 0.0 and weight == 0.0 for total, weight in nothing.values())
    assert means(totals(alone, nothing)) == means(totals(alone))


# --- digest ---


@pytest.mark.slow
def test_the_digest_is_the_same_in_every_layout():
    params = tiny.params()
    alone = int(jax.jit(digest)(params))
    for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"tensor": 8}):
        mesh = meshes.make_mesh(shape)
        shardings = jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh))
        assert int(jax.jit(digest)(jax.device_put(params, shardings))) == alone, shape


def test_the_digest_sees_one_changed_value_anywhere():
    params = tiny.plain_params(V=8, D=4)
    f = jax.jit(digest)
    changed = set()
    for i, (leaf, treedef) in enumerate([jax.tree.flatten(params)] * 3):
        for j in range(leaf[i].size):
            flat = leaf[i].ravel()
            new = flat.at[j].set(jnp.nextafter(flat[j], jnp.float32(jnp.inf))).reshape(leaf[i].shape)
            changed.add(int(f(treedef.unflatten([*leaf[:i], new, *leaf[i + 1 :]]))))
    assert int(f(params)) not in changed
    assert len(changed) == 8 + 32 + 32  # and they differ from one another


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_digest_sees_two_values_swapped_anywhere(dtype):
    """All pairs of places of a matrix longer than 31 columns; bfloat16 values have 16 low bits of zero in float32."""
    x = jax.random.normal(jax.random.key(0), (4, 40)).astype(dtype).astype(jnp.float32).ravel()
    a, b = (jnp.asarray(i) for i in np.triu_indices(x.size, 1))
    swap = lambda a, b: digest(x.at[a].set(x[b]).at[b].set(x[a]).reshape(4, 40))
    different = np.asarray(x[a] != x[b])
    same = np.asarray(jax.jit(jax.vmap(swap))(a, b)) == np.asarray(digest(x.reshape(4, 40)))
    assert not np.any(same & different)


# --- schedules and optimizers ---


def optim(**fields) -> ConfigDict:
    config = default_config().optimizer
    config.learning_rate = 0.1
    config.update(fields)
    return config


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule = make_schedule(optim(schedule=name, warmup=0.1, final=0.2), 100)
    rates = np.array([schedule(i) for i in range(101)])
    np.testing.assert_allclose(rates[0], 0.01, rtol=1e-6)  # a tenth of the peak, not 0
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.01, rtol=1e-5)
    np.testing.assert_allclose(rates[10], 0.1, rtol=1e-6)
    end, middle = {"constant": (0.1, 0.1), "linear": (0.02, 0.06), "cosine": (0.02, 0.06)}[name]
    np.testing.assert_allclose(rates[[55, 100]], [middle, end], rtol=1e-5)
    assert np.all(np.diff(rates[10:]) <= 1e-9)
    if name == "cosine":
        np.testing.assert_allclose(rates[32], 0.02 + 0.08 * (1 + math.cos(math.pi * 22 / 90)) / 2, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 10), (0.1, 1), (0.1, 10), (0.9, 10), (0.99, 10)])
def test_no_step_has_rate_0_and_the_peak_is_reached(warmup, steps):
    schedule = make_schedule(optim(schedule="linear", warmup=warmup), steps)
    rates = np.array([schedule(i) for i in range(steps)])
    assert rates.min() > 0
    np.testing.assert_allclose(rates.max(), 0.1, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    config = optim(name=name, schedule="constant", warmup=0.0, learning_rate=0.01, weight_decay=0.0)
    optimizer = make_optimizer(config, make_schedule(config, 5))
    step = jax.jit(make_step(tiny.plain_apply, sft(), optimizer, 2))
    state, batch = start(optimizer), tiny.batch()
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert second["loss"] < first["loss"] - 1e-4


def test_the_table_of_optimizers_is_optaxs():
    """Each optimizer, with its fields, takes the same two steps as optax's own."""
    config = optim(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.0, clip=0.0)
    expected = {
        "adamw": optax.adamw(0.1, 0.8, 0.95, 1e-6, weight_decay=0.0), "adam": optax.adam(0.1, 0.8, 0.95, 1e-6),
        "lion": optax.lion(0.1, 0.8, 0.95, weight_decay=0.0), "rmsprop": optax.rmsprop(0.1, decay=0.95, eps=1e-6),
        "sgd": optax.sgd(0.1, momentum=0.8), "adafactor": optax.adafactor(0.1),
    }  # fmt: skip
    assert set(expected) == set(OPTIMIZERS)
    params = {"w": jnp.array([1.0, -2.0])}
    for name, theirs in expected.items():
        config.name = name
        ours = make_optimizer(config, optax.constant_schedule(0.1))
        a, b = (params, ours.init(params)), (params, theirs.init(params))
        for grad in ([0.3, 0.1], [-0.2, 0.4]):
            for run, optimizer in ((0, ours), (1, theirs)):
                p, s = (a, b)[run]
                updates, s = optimizer.update({"w": jnp.array(grad)}, s, p)
                a, b = ((optax.apply_updates(p, updates), s), b) if run == 0 else (a, (optax.apply_updates(p, updates), s))
        np.testing.assert_allclose(a[0]["w"], b[0]["w"], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", runs.slow_but(["adamw", "lion", "adafactor"], "adamw"))
def test_weight_decay_shrinks_by_rate_times_decay_and_spares_norms_and_biases(name):
    config = optim(name=name, learning_rate=0.1, weight_decay=0.3)
    optimizer = make_optimizer(config, optax.linear_schedule(0.1, 0.2, 1))
    params = {"layers": {"q": jnp.full((2, 3, 3), 2.0), "q_bias": jnp.ones((2, 3)), "mlp_norm": jnp.ones((2, 3))}, "norm": jnp.ones(3)}
    state, p = optimizer.init(params), params
    for rate in (0.1, 0.2):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, p), state, p)
        np.testing.assert_allclose(updates["layers"]["q"], -rate * 0.3 * p["layers"]["q"], rtol=1e-5)
        p = optax.apply_updates(p, updates)
    assert_equal(p["layers"] | {"q": 0}, params["layers"] | {"q": 0})
    assert_equal(p["norm"], params["norm"])


def test_what_decays_in_a_real_model():
    config = dataclasses.replace(tiny.MODEL, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    mask = decays(parameters.abstract_params(config))
    names = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(mask)}
    assert {n.removeprefix("layers.") for n, x in names.items() if x} == {
        "embed", "lm_head", "q", "k", "v", "o", "gate", "up", "down",
    }  # fmt: skip
    assert {n.removeprefix("layers.") for n, x in names.items() if not x} == {
        "norm", "attention_norm", "mlp_norm", "q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias",
    }  # fmt: skip


def test_clipping_is_by_the_global_norm():
    config = optim(name="sgd", b1=0.0, clip=1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    update = lambda config: (o := make_optimizer(config, optax.constant_schedule(0.1))).update(grads, o.init(grads), grads)[0]
    np.testing.assert_allclose([update(config)["a"][0], update(config)["b"][0]], [-0.06, -0.08], rtol=1e-6)
    np.testing.assert_allclose(update(optim(name="sgd", b1=0.0, clip=0.0))["b"], [-0.4], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, "optimizer.schedule 'cosin' is unknown; use constant, linear, cosine"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate is 0.0; it must be above 0"),
        ({"warmup": 1.0}, "optimizer.warmup is 1.0; it must be a share"),
        ({"warmup": -0.1}, "optimizer.warmup is -0.1; it must be a share"),
        ({"name": "Adam"}, "optimizer.name 'Adam' is unknown; use adamw, adam, lion"),
    ],
)
def test_errors_name_the_field_and_its_value(fields, message):
    config = optim(**fields)
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, make_schedule(config, 10))


# --- experience ---


def test_experience_writes_the_models_log_probs_in_any_number_of_microbatches():
    batch, model = tiny.batch(8), Model(tiny.plain_apply, tiny.plain_params(seed=1))
    live = tiny.plain_apply(model.params, batch).logps
    for count in (1, 2, 4):
        written = jax.jit(lambda e, b: e(b))(logps("ref_logps", model, count), batch)
        np.testing.assert_allclose(written["ref_logps"], live, atol=1e-6)
        assert set(written) == set(batch) | {"ref_logps"}
        assert written["ref_logps"].shape == batch["tokens"].shape and written["ref_logps"].dtype == jnp.float32


def test_experience_is_an_argument_not_a_constant():
    model, batch = Model(tiny.plain_apply, tiny.plain_params(seed=1)), tiny.batch()
    call = lambda experience, batch: experience(batch)["ref_logps"]
    traced = jax.make_jaxpr(call)(chain(logps("ref_logps", model)), batch)
    sizes = {x.shape for x in jax.tree.leaves(model.params)}
    assert not [c for c in traced.consts if np.shape(c) in sizes]
    assert len(traced.jaxpr.invars) == len(jax.tree.leaves((model.params, batch)))
    # Other parameters give other numbers from the same program.
    f = jax.jit(call)
    other = Model(tiny.plain_apply, tiny.plain_params(seed=2))
    a, b = (f(chain(logps("ref_logps", m)), batch) for m in (model, other))
    np.testing.assert_allclose(b, tiny.plain_apply(other.params, batch).logps, atol=1e-6)
    assert not np.allclose(a, b)


def test_a_chain_runs_first_to_last():
    add = jax.tree_util.Partial(lambda n, batch: batch | {"x": batch["x"] + n}, jnp.asarray(3))
    double = jax.tree_util.Partial(lambda batch: batch | {"x": batch["x"] * 2})
    f = jax.jit(lambda experience, batch: experience(batch)["x"])
    batch = {"x": jnp.asarray(1)}
    assert (f(chain(add, double), batch), f(chain(double, add), batch)) == (8, 5)
    assert (f(chain(), batch), f(chain(chain(add), chain(double, add)), batch)) == (1, 11)


def test_a_later_experience_reads_what_an_earlier_one_wrote():
    model = Model(tiny.plain_apply, tiny.plain_params(seed=1))
    halve = jax.tree_util.Partial(lambda batch: batch | {"ref_logps": 0.5 * batch["ref_logps"]})
    batch = tiny.batch()
    np.testing.assert_allclose(
        chain(logps("ref_logps", model), halve)(batch)["ref_logps"], 0.5 * tiny.plain_apply(model.params, batch).logps, rtol=1e-5
    )


def test_precomputed_reference_equals_the_live_one():
    """Value, parameters and metrics are equal after a step; no gradient goes into the reference."""
    batch, experience = tiny.batch(8), logps("ref_logps", Model(tiny.plain_apply, tiny.plain_params(seed=1)), 2)
    step = make_step(tiny.plain_apply, rpo(), optax.sgd(1.0), 2)
    live = jax.jit(lambda state, experience, batch: step(state, experience(batch)))
    stored = jax.device_get(jax.jit(lambda e, b: e(b))(experience, batch)["ref_logps"])
    state = start(optax.sgd(1.0))
    (a, m), (b, n) = live(state, experience, batch), jax.jit(step)(state, batch | {"ref_logps": jnp.asarray(stored)})
    assert_near(a.params, b.params)
    assert_metrics_near(m, n)


# --- what a user writes ---


def test_a_users_loss_in_one_line_trains():
    """A loss is a name, a value and (by default) the examples as weights."""
    hinge = make_loss("hinge", lambda out, batch: (jax.nn.relu(1 + out.logps[:, 1].sum(-1) - out.logps[:, 0].sum(-1)), {}))
    assert isinstance(hinge, Loss)
    step = jax.jit(make_step(tiny.plain_apply, hinge, optax.adam(0.05), 2))
    state, batch = start(optax.adam(0.05)), tiny.batch()
    history = []
    for _ in range(20):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss/hinge"]))
    assert history[-1] < 0.5 * history[0]
