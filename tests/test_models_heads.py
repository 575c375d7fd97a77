"""Chunked log-probs, entropy and log sum of squares: values, gradients, masks, precision, TRL's numbers, memory, skipped work, sharding."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from alignax import losses, train
from alignax import mesh as meshes
from alignax.models import parameters, transformer
from alignax.models.heads import Shaping, token_logps
from alignax.models.statistics import jsd, jsd_slope
from alignax.types import Outputs

ORACLE = json.loads((Path(__file__).parent / "oracles" / "heads.json").read_text())


def naive(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    cap: float | None = None,
    teacher=None,
    mixture=(0.5, 1.0),
    **_,
) -> Outputs:
    """The oracle of the chunked head: its outputs from all logits [R, T, V] at once."""
    logits = (hidden @ weight.astype(hidden.dtype)).astype(jnp.float32)
    logps = jax.nn.log_softmax(logits if cap is None else jnp.tanh(logits / cap) * cap, axis=-1)
    picked = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(logps) * logps).sum(-1)
    squares = jnp.log(jnp.square(jnp.exp(logps)).sum(-1))
    statistics = [picked, entropy, squares]
    if teacher is not None:
        t = teacher[0] @ teacher[1]
        t = jax.nn.log_softmax(t if cap is None else jnp.tanh(t / cap) * cap, axis=-1)
        statistics += [(jnp.exp(t) * (t - logps)).sum(-1), (jnp.exp(logps) * (logps - t)).sum(-1)]
        beta, temperature = mixture
        p, q = (jax.nn.softmax(x / temperature) for x in (t, logps))  # the teacher's and the student's
        m = beta * p + (1 - beta) * q
        kl = lambda a, b: (a * jnp.log(a / b)).sum(-1)
        statistics += [kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)]
    found = [jnp.where(mask, x, 0.0) for x in statistics]
    return Outputs(*found[:5]) if teacher is None else Outputs(*found[:5], jsd=found[5])


def problem(R: int = 3, T: int = 11, D: int = 8, V: int = 13, share: float = 0.5):
    """hidden, weight, targets, mask; `share` of the positions are scored."""
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((R, T, D), (D, V)))
    return hidden, weight, jnp.asarray(rng.integers(0, V, (R, T))), jnp.asarray(rng.random((R, T)) < share)


def pull(head, hidden, weight, targets, mask, **options):
    """Outputs, and the gradients of a random combination of all their entries, unscored ones included."""
    keys = jax.random.split(jax.random.key(0), 5)
    a, b, c, d, e = (jax.random.normal(key, targets.shape) for key in keys)

    def value(hidden, weight):
        out = head(hidden, weight, targets, mask, **options)
        taught = 0.0 if out.ref_kl is None else (c * out.ref_kl + d * out.policy_kl + e * out.jsd).sum()
        return (a * out.logps + b * out.entropy).sum() + taught, out

    grads, out = jax.jit(jax.grad(value, (0, 1), has_aux=True))(hidden, weight)
    return out, grads


def close(a, b, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), a, b)


@pytest.mark.parametrize("chunk", [1, 7, 33, 40])
def test_values_and_gradients_are_the_naive_ones(chunk):
    args = problem()
    out, grads = pull(token_logps, *args, chunk=chunk)
    close((out, grads), pull(naive, *args), 1e-5)
    unscored = ~np.asarray(args[3])
    assert 0 < unscored.sum() < unscored.size
    for x in (out.logps, out.entropy, out.log_sum_sq, grads[0]):
        assert not np.asarray(x)[unscored].any()
        assert np.asarray(x)[~unscored].all()


@pytest.mark.parametrize("cap", [0.5, 3.0, 1e4])
def test_capped_logits(cap):
    args = problem()
    uncapped, _ = pull(naive, *args)
    capped = pull(token_logps, *args, chunk=7, how=Shaping(cap))
    close(capped, pull(naive, *args, cap=cap), 1e-5)
    assert (float(jnp.abs(capped[0].logps - uncapped.logps).max()) > 0.1) == (cap < 1e4)
    extreme = pull(token_logps, 1e4 * args[0], *args[1:], how=Shaping(cap))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(extreme))


def teacher(targets: jax.Array, E: int = 5, V: int = 13):
    keys = jax.random.split(jax.random.key(7))
    return jax.random.normal(keys[0], (*targets.shape, E)), jax.random.normal(keys[1], (E, V))


@pytest.mark.parametrize("chunk, cap", [(7, None), (33, None), (7, 2.0)])
def test_kl_of_a_teacher_and_its_gradient_are_the_naive_ones(chunk, cap):
    """A teacher of another width, in several chunks and in one."""
    args = problem()
    out, grads = pull(token_logps, *args, chunk=chunk, how=Shaping(cap), teacher=teacher(args[2]))
    close((out, grads), pull(naive, *args, cap=cap, teacher=teacher(args[2])), 1e-5)
    for kl in (out.ref_kl, out.policy_kl):
        assert kl is not None and (np.asarray(kl)[np.asarray(args[3])] > 0).all()
    alone = pull(token_logps, *args, chunk=chunk, how=Shaping(cap))[0]
    assert alone.ref_kl is None and alone.policy_kl is None
    close(alone[:3], out[:3], 0)


@pytest.mark.parametrize("mixture, cap", [((0.0, 1.0), None), ((1.0, 2.0), None), ((0.1, 0.7), None), ((0.9, 3.0), 2.0)])
def test_the_generalised_jsd_and_its_gradient_are_the_naive_ones(mixture, cap):
    args = problem()
    options = {"teacher": teacher(args[2]), "mixture": mixture}
    out, grads = pull(token_logps, *args, chunk=7, how=Shaping(cap), **options)
    close((out, grads), pull(naive, *args, cap=cap, **options), 1e-5)
    if mixture[1] == 1:
        close(out.jsd, out.ref_kl, 1e-5)  # beta 0


@pytest.mark.parametrize("o", ORACLE["gkd"]["cases"], ids=lambda o: f"beta {o['beta']}")
def test_the_generalised_jsd_is_trls(o):
    """An average over tokens, and its gradient at the student's logits."""
    given = ORACLE["gkd"]
    student, taught = (jnp.asarray(given[name], jnp.float32) for name in ("student_logits", "teacher_logits"))
    mask, mixture = np.array(given["labels"]) >= 0, (o["beta"], o["temperature"])
    loss = lambda z: jnp.where(mask, jsd(z, taught, *mixture), 0.0).sum() / mask.sum()
    np.testing.assert_allclose(loss(student), o["loss"], rtol=2e-5)
    np.testing.assert_allclose(jax.grad(loss)(student), o["grads"], rtol=2e-5, atol=1e-6)
    own = np.where(mask[..., None], jsd_slope(student, taught, *mixture), 0.0) / mask.sum()
    np.testing.assert_allclose(own, o["grads"], rtol=2e-5, atol=1e-6)


def test_a_jsd_of_distributions_that_share_nothing_is_finite():
    """Logits of +-1000: ln 2 at beta 1/2, and a gradient of 0."""
    z = jnp.array([[1000.0, -1000.0, 0.0], [-1000.0, 1000.0, 0.0]])
    np.testing.assert_allclose(jsd(z, z[::-1], 0.5, 1.0), math.log(2), rtol=1e-6)
    for beta in (0.0, 0.3, 0.5, 1.0):
        assert np.isfinite(jsd(z, z[::-1], beta, 0.5)).all() and np.isfinite(jsd_slope(z, z[::-1], beta, 0.5)).all()
    np.testing.assert_array_equal(jsd_slope(z, z[::-1], 0.5, 1.0), 0.0)


@pytest.mark.slow
def test_a_model_is_no_kl_from_itself():
    hidden, weight, targets, mask = problem()
    out = lambda h: token_logps(h, weight, targets, mask, teacher=(hidden, weight))
    kl = lambda h: jnp.stack([x for x in (*out(h)[3:5], out(h).jsd)])
    np.testing.assert_allclose(kl(hidden), 0.0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda h: kl(h).sum())(hidden), 0.0, atol=1e-6)


@pytest.mark.slow
def test_a_kl_that_no_loss_reads_is_not_computed():
    """The compiled program's count of operations shows it."""
    args, names = problem(R=2, D=32, V=64), ("logps", "ref_kl", "policy_kl", "jsd")

    def compiled(*read: str):
        def value(hidden, weight):
            out = token_logps(hidden, weight, *args[2:], chunk=8, teacher=teacher(args[2], V=64))
            return sum(getattr(out, name).sum() for name in read)

        return jax.jit(jax.grad(value, (0, 1))).lower(*args[:2]).compile()

    none, one, both, every = (compiled(*names[:n]).cost_analysis()["flops"] for n in (1, 2, 3, 4))
    assert none < one < both < every


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_empty_and_full_masks(share):
    args = problem(share=share)
    out, grads = pull(token_logps, *args, chunk=4)
    close((out, grads), pull(naive, *args), 1e-5)
    assert all(bool(x.any()) == bool(share) for x in jax.tree.leaves((out, grads)))


def test_uniform_distribution():
    hidden, weight, targets, _ = problem(V=13)
    out = token_logps(0 * hidden, weight, targets, targets >= 0)
    close(out.logps, np.full(targets.shape, -math.log(13)), 1e-6)
    close(out.entropy, np.full(targets.shape, math.log(13)), 1e-6)
    close(out.log_sum_sq, np.full(targets.shape, -math.log(13)), 1e-6)


def test_log_probs_stay_finite_at_extreme_logits():
    hidden, weight, targets, mask = problem()
    out, grads = pull(token_logps, 1e4 * hidden, weight, targets, mask)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, grads)))
    assert np.asarray(out.logps).min() < -1000 and np.asarray(out.entropy).min() > -1e-2


@pytest.mark.slow
def test_sum_over_4096_tokens_is_that_of_float64():
    hidden, weight, targets, mask = problem(R=1, T=4096, D=16, V=64, share=1.0)
    hidden, weight = 0.25 * hidden.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)  # exact: the inputs are bfloat16 in both
    lse = np.log(np.exp(logits).sum(-1))
    expected = (np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0] - lse).sum()
    ours = token_logps(hidden, weight, targets, mask).logps
    assert ours.dtype == jnp.float32
    assert expected < -10_000
    assert abs(np.asarray(ours, np.float64).sum() - expected) < 1e-3
    half = jax.nn.log_softmax(hidden @ weight, axis=-1)
    half = jnp.take_along_axis(half, targets[..., None], -1)
    assert abs(np.asarray(half, np.float64).sum() - expected) > 0.1  # what bfloat16 logits would give


@pytest.mark.slow
def test_weight_gradient_accumulates_in_float32():
    hidden, weight, targets, mask = problem(R=1, T=2048, share=1.0)
    gradient = jax.grad(lambda w, dtype: -token_logps(hidden.astype(dtype), w, targets, mask, chunk=8).logps.sum())
    full, half = gradient(weight, jnp.float32), gradient(weight, jnp.bfloat16)
    assert half.dtype == jnp.float32
    # 256 chunks of bfloat16 products: rounding of each stays, that of a bfloat16 sum would grow to percents.
    assert np.abs(half - full).max() < 5e-3 * np.abs(full).max()


def test_log_probs_of_trl():
    case = ORACLE["logps"]
    logits, labels = jnp.asarray(case["logits"]), jnp.asarray(case["labels"])
    # Logits as hidden states under an identity head; position t - 1 predicts token t.
    mask = labels[:, 1:] != -100
    out = token_logps(logits[:, :-1], jnp.eye(logits.shape[-1]), jnp.asarray(case["tokens"])[:, 1:], mask, chunk=4)
    np.testing.assert_allclose(out.logps.sum(-1), case["sum_logps"], rtol=2e-5)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_temperature_and_tokens_that_are_never_predicted(cap):
    """The oracle is automatic differentiation over the logits of the other tokens, divided by the temperature."""
    hidden, weight, targets, mask = problem()
    V, T = weight.shape[1], 0.7
    unused, kept = ((0, 2), (V - 3, V)), np.arange(2, V - 3)
    targets = jnp.clip(targets, 2, V - 4)

    def value(hidden, weight):
        how = {"how": Shaping(cap, T, unused), "teacher": (0.5 * hidden, weight), "mixture": (0.3, 2.0)}
        out = token_logps(hidden, weight, targets, mask, chunk=7, **how)
        return sum(c * x.sum() for c, x in zip((1.0, 0.3, 0.0, 0.2, 0.4, 0.7), (*out[:5], out.jsd), strict=True))

    def plain(hidden, weight):
        logits = lambda h: (h @ weight if cap is None else cap * jnp.tanh(h @ weight / cap))[..., kept] / T
        z, zt = logits(hidden), jax.lax.stop_gradient(logits(0.5 * hidden))
        q, t = jax.nn.log_softmax(z), jax.nn.log_softmax(zt)
        logp = jnp.take_along_axis(q, targets[..., None] - 2, axis=-1)[..., 0]
        kls = 0.2 * (jnp.exp(t) * (t - q)).sum(-1) + 0.4 * (jnp.exp(q) * (q - t)).sum(-1)
        s, t = jax.nn.softmax(z / 2), jax.nn.softmax(zt / 2)
        m = jnp.log(0.3 * t + 0.7 * s)
        mixed = 0.3 * (t * (jnp.log(t) - m)).sum(-1) + 0.7 * (s * (jnp.log(s) - m)).sum(-1)
        return jnp.where(mask, logp - 0.3 * (jnp.exp(q) * q).sum(-1) + kls + 0.7 * mixed, 0.0).sum()

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, weight) for f in (value, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, theirs)
    assert not np.asarray(ours[1][1])[:, [0, 1, V - 3, V - 2, V - 1]].any()


@pytest.mark.parametrize("case", ORACLE["fused_logprob"]["cases"], ids=lambda c: f"T={c['temperature']}, scale={c['logit_scale']}")
def test_fused_log_probs_of_trl(case):
    given = {k: jnp.asarray(v) for k, v in ORACLE["fused_logprob"].items() if k != "cases"}

    def score(hidden, weight):  # [P, D], [V, D]
        # Temperature and scale act on the hidden state, a bias is one more column of the weight.
        x = hidden * case["logit_scale"] / case["temperature"]
        x = jnp.pad(x, ((0, 0), (0, 1)), constant_values=case["bias"] / case["temperature"])
        head = jnp.concatenate([weight, given["bias"][:, None]], axis=1).T
        targets = given["targets"][None]
        return token_logps(x[None], head, targets, targets >= 0, chunk=4)

    def value(hidden, weight):
        out = score(hidden, weight)
        return (given["grad_log_probs"] * out.logps[0]).sum(), out

    grads, out = jax.jit(jax.grad(value, (0, 1), has_aux=True))(given["hidden"], given["weight"])
    got = (out.logps[0], out.entropy[0], *grads)
    for x, name in zip(got, ("log_probs", "entropy", "grad_hidden", "grad_weight"), strict=True):
        np.testing.assert_allclose(x, case[name], rtol=2e-5, atol=1e-6)


def largest_arrays(step, *args) -> list[tuple[int, ...]]:
    """Shapes in a compiled program, the largest first."""
    text = jax.jit(step).lower(*args).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]", text)}
    return sorted(shapes, key=math.prod, reverse=True)


@pytest.mark.parametrize("shape", [pytest.param(None, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_no_array_of_the_training_step_spans_tokens_and_vocabulary(shape, monkeypatch):
    T, D, V = 41, 24, 1018
    config = transformer.ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    mesh = None if shape is None else meshes.make_mesh(shape)
    batch = tiny.batch(T=T, V=V)  # 8 rows
    batch |= {"ref_logps": jnp.zeros(batch["tokens"].shape)}
    params = parameters.abstract_params(config, mesh)
    if mesh:
        batch = {name: jax.device_put(x, meshes.batch_sharding(mesh)) for name, x in batch.items()}
    optimizer = optax.sgd(1e-3)

    def arrays():
        step = train.make_step(transformer.forward(config, chunk=16, mesh=mesh), losses.dpo(), optimizer)
        return largest_arrays(step, train.init_state(params, optimizer, jax.random.key(0)), batch)

    # Sizes are such that the output weight is the largest array, before a chunk's logits, and a row's logits would be larger.
    assert math.prod(arrays()[0]) == (V * D if mesh is None else V * D // 2)
    if mesh is None:
        monkeypatch.setattr(transformer, "token_logps", lambda *args, **_: naive(*args))
        assert math.prod(arrays()[0]) >= 8 * (T - 1) * V


def test_the_sum_of_squares_costs_nothing_where_no_loss_reads_it():
    args = problem()
    value = lambda hidden, weight, share: (out := token_logps(hidden, weight, *args[2:], chunk=4)).logps.sum() + share(out)
    step = jax.jit(jax.value_and_grad(value, (0, 1)), static_argnums=2)
    cost = lambda share: step.lower(*args[:2], share).compile().cost_analysis()["flops"]
    read = lambda out: jax.lax.stop_gradient(out.log_sum_sq).sum()
    unread = lambda out: 0.0
    assert cost(unread) + 4 * 13 <= cost(read)  # the squares of a chunk's probabilities


def test_chunks_without_scored_positions_are_skipped():
    hidden, weight, targets, mask = problem(R=2, T=32)
    mask = jnp.zeros(mask.shape, bool).at[0, 20:26].set(True).at[1, 3:5].set(True)  # 8 of 64 positions
    poisoned = jnp.where(mask[..., None], hidden, jnp.nan)
    # A logit of a NaN state makes the weight's gradient NaN, though its cotangent is 0: NaN shows where work is done.
    clean, clean_grads = pull(naive, hidden, weight, targets, mask)
    out, grads = pull(token_logps, poisoned, weight, targets, mask, chunk=4)
    close((out, grads), (clean, clean_grads), 1e-5)
    _, grads = pull(token_logps, poisoned, weight, targets, mask, chunk=9)
    assert np.isnan(grads[1]).all()


@pytest.mark.parametrize(
    ("shape", "V"),  # tensor shards divide a vocabulary of 16, and not one of 13
    [({"data": 4, "tensor": 2}, 13), ({"fsdp": 8}, 16), ({"data": 2, "fsdp": 2, "tensor": 2}, 16)],
    ids=str,
)
def test_sharded_head_is_the_unsharded_one(shape, V):
    hidden, weight, targets, mask = problem(R=8, V=V)
    mask = mask.at[:3].set(False)  # shards with much and without work
    mesh = meshes.make_mesh(shape)
    batch = functools.partial(jax.device_put, device=meshes.batch_sharding(mesh))
    split = jax.device_put(weight, meshes.sharding(mesh, ("embed", "vocab"), weight.shape))
    states, head = teacher(targets, V=V)
    taught = (batch(states), jax.device_put(head, meshes.sharding(mesh, ("embed", "vocab"), head.shape)))
    sharded = pull(token_logps, batch(hidden), split, batch(targets), batch(mask), chunk=3, mesh=mesh, teacher=taught)
    close(sharded, pull(naive, hidden, weight, targets, mask, teacher=(states, head)), 1e-5)


def test_rows_that_no_mesh_divides():
    args = problem(R=3)
    close(pull(token_logps, *args, chunk=4, mesh=meshes.make_mesh({"data": 8})), pull(naive, *args), 1e-5)


def test_scored_states_stay_in_their_batch_shard():
    mesh = meshes.make_mesh({"data": 8})
    hidden, weight, targets, mask = problem(R=8)
    batch = functools.partial(jax.device_put, device=meshes.batch_sharding(mesh))
    head = jax.jit(lambda *args: token_logps(*args, chunk=4, mesh=mesh))
    text = head.lower(batch(hidden), weight, batch(targets), batch(mask)).compile().as_text()
    moved = set(re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce)\(", text))
    # All that devices tell each other is how many chunks the fullest of them has.
    assert {(re.sub(r"\{.*", "", kind), name) for kind, name in moved} == {("s32[]", "all-reduce")}
