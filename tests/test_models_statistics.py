"""Statistics of the vocabulary: the built-in ones and one of a user's, against all logits at once; what a forward pass is asked for."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_models_heads import problem, teacher

from alignax.models import statistics
from alignax.models.heads import Shaping, shaped, token_logps
from alignax.models.statistics import Chunk, Statistic, accuracy, generalised_jsd, min_p, most_likely, most_probable, top_k
from alignax.models.transformer import forward

TSALLIS = Statistic(  # as a user writes one
    "tsallis",
    lambda at: 1 - at.mean(at.probs),
    lambda at, value: -2 * at.probs * (at.probs - at.mean(at.probs)[..., None]),
)
SQUARED = Statistic(  # of two models: the squared distance of log-probs, over the tokens of the other one
    "squared",
    lambda at: jnp.sum(jnp.exp(at.taught_logps) * (at.logps - at.taught_logps) ** 2, axis=-1),
    lambda at, value: _squared_slope(at),
    taught=True,
)
HOW = Shaping(3.0, 0.7, ((4, 6),))


def _squared_slope(at: Chunk) -> jax.Array:
    pull = 2 * jnp.exp(at.taught_logps) * (at.logps - at.taught_logps)
    return pull - at.probs * pull.sum(axis=-1, keepdims=True)


def kept_logps(q: jax.Array, kept: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(kept, q, -jnp.inf), axis=-1)


WHOLE = {  # each of log-probs q [R, T, V] and those of the other model t, for targets y
    TSALLIS: lambda q, t, y: 1 - jnp.exp(2 * q).sum(-1),
    SQUARED: lambda q, t, y: (jnp.exp(t) * (q - t) ** 2).sum(-1),
    min_p(0.1): lambda q, t, y: picked(kept_logps(q, q >= q.max(-1, keepdims=True) + math.log(0.1)), y),
    top_k(3): lambda q, t, y: picked(kept_logps(q, q >= jnp.sort(q, axis=-1)[..., -3, None]), y),
    generalised_jsd(): lambda q, t, y: 0.5 * (kl(q, mixed(q, t)) + kl(t, mixed(q, t))),
    most_likely: lambda q, t, y: jnp.argmax(q, -1).astype(jnp.float32),
    accuracy: lambda q, t, y: (jnp.argmax(q, -1) == y).astype(jnp.float32),
}
PROBLEM = problem(R=4, T=12)


def picked(q: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.take_along_axis(q, y[..., None], axis=-1)[..., 0]


def kl(a: jax.Array, b: jax.Array) -> jax.Array:
    return (jnp.exp(a) * (a - b)).sum(-1)


def mixed(q: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.logaddexp(q, t) - math.log(2)


@functools.cache
def both(how: Shaping):
    """Every statistic and its gradient in hidden states and weight: of the chunked head, and of all logits at once, by autodiff."""
    hidden, weight, targets, mask = PROBLEM
    other = teacher(targets)
    sloped = [s for s in WHOLE if s.slope is not None]
    pulls = dict(zip(sloped, jax.random.normal(jax.random.key(3), (len(sloped), *targets.shape)), strict=True))

    def of_head(hidden, weight):
        out = token_logps(hidden, weight, targets, mask, chunk=5, how=how, teacher=other, statistics=tuple(WHOLE))
        return {s: out.statistics[s.name] for s in WHOLE}

    def of_logits(hidden, weight):
        q, t = (jax.nn.log_softmax(shaped(h @ w, how), axis=-1) for h, w in ((hidden, weight), other))
        return {s: jnp.where(mask, f(q, t, targets), 0.0) for s, f in WHOLE.items()}

    def slopes(values):
        finite = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
        one = lambda s: jax.grad(lambda *args: (pulls[s] * finite(values(*args)[s])).sum(), (0, 1))(hidden, weight)
        return {s.name: one(s) for s in sloped}

    # A NamedTuple of functions is no key of a pytree: names are.
    named = lambda values: {s.name: x for s, x in values(hidden, weight).items()}
    return jax.jit(lambda: (named(of_head), slopes(of_head)))(), jax.jit(lambda: (named(of_logits), slopes(of_logits)))()


@pytest.mark.parametrize("how", [Shaping(), HOW], ids=["plain", "capped, tempered, with tokens that are never predicted"])
def test_values_and_slopes_are_those_of_all_logits_at_once(how):
    (values, slopes), (wanted, wanted_slopes) = both(how)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # squared distances are up to 45
    jax.tree.map(near, (values, slopes), (wanted, wanted_slopes))
    for name, value in values.items():
        assert not np.asarray(value)[~np.asarray(PROBLEM[3])].any(), name
    assert all(np.abs(x).max() > 1e-2 for grads in slopes.values() for x in grads)


def test_a_target_that_is_left_out_has_no_log_prob_and_no_slope():
    """-inf, and nothing goes back; a target that is kept gains what the others lose."""
    (values, _), _ = both(Shaping())
    scored, logps = np.asarray(PROBLEM[3]), np.asarray(token_logps(*PROBLEM).logps)
    for name in ("min_p_0.1", "top_k_3"):
        proxy = np.asarray(values[name])
        out = np.isneginf(proxy)
        assert 0 < out.sum() < scored.sum()
        assert (proxy[scored & ~out] >= logps[scored & ~out] - 1e-6).all()

    hidden, weight, targets, mask = PROBLEM
    dropped = np.isneginf(np.asarray(values["top_k_3"]))
    value = lambda h: token_logps(h, weight, targets, mask, statistics=(top_k(3),)).statistics["top_k_3"].sum()
    grads = np.asarray(jax.jit(jax.grad(value))(hidden))
    assert not grads[dropped].any() and grads[scored & ~dropped].any(axis=-1).all()


def test_the_most_probable_of_any_rank():
    z = jnp.array([[[0.0, 3.0, 3.0, -2.0], [-5.0, -1.0, -3.0, -1e30]]])
    np.testing.assert_array_equal(most_probable(z, 1), [[[False, True, True, False], [False, True, False, False]]])
    np.testing.assert_array_equal(most_probable(z, 3), [[[True, True, True, False], [True, True, True, False]]])


def test_what_is_not_asked_for_is_not_computed():
    """The compiled program's count of operations shows it, forward and backward; a slope that nothing reads is not computed either."""
    hidden, weight, targets, mask = problem(R=2, D=32, V=64)

    def flops(statistics=(), read=()):
        def value(hidden, weight):
            out = token_logps(hidden, weight, targets, mask, chunk=8, statistics=statistics)
            return out.logps.sum() + sum(out.statistics[name].sum() for name in read)

        return jax.jit(jax.grad(value, (0, 1))).lower(hidden, weight).compile().cost_analysis()["flops"]

    plain = flops()
    assert flops((TSALLIS,)) == plain
    assert flops((TSALLIS,), ("tsallis",)) > plain


def test_one_without_a_slope_may_be_reported_and_not_differentiated():
    hidden, weight, targets, mask = PROBLEM
    out = lambda h: token_logps(h, weight, targets, mask, statistics=(most_likely,))
    grads, told = jax.grad(lambda h: ((o := out(h)).logps.sum(), o.statistics["most_likely"]), has_aux=True)(hidden)
    assert np.asarray(grads).any() and np.asarray(told).any()
    with pytest.raises(ValueError, match="'most_likely' is differentiated and has no slope"):
        jax.grad(lambda h: out(h).statistics["most_likely"].sum())(hidden)
    squares = jax.grad(lambda h: token_logps(h, weight, targets, mask).log_sum_sq.sum())(hidden)
    assert not np.asarray(squares).any()  # which is read as a constant


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: min_p(0.0), "kappa is 0.0"),
        (lambda: top_k(0), "k is 0"),
        (lambda: token_logps(*PROBLEM, statistics=(SQUARED,)), "'squared' compares a model with another one.*set reference.token_kl=true"),
        (lambda: token_logps(*PROBLEM, statistics=(Statistic("entropy", lambda at: at.lse),)), "two statistics are called 'entropy'"),
        (lambda: token_logps(*PROBLEM, statistics=(Statistic("wide", lambda at: at.z),)), "'wide' of .* has shape .*a number for each"),
        (lambda: forward(dataclasses.replace(tiny.MODEL, num_labels=1), statistics=(TSALLIS,)), "set model.language_head=true"),
        (lambda: forward(tiny.MODEL, hidden=(0, 2)), "layer 2 is asked for, and the model has 2; they are counted from 0"),
    ],
)
def test_what_no_forward_pass_gives_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_equal_statistics_are_one():
    assert min_p(0.02) is min_p(kappa=0.02) and min_p(0.02) != min_p(0.05) and generalised_jsd() is generalised_jsd(0.5, 1)
    assert statistics.merged((min_p(0.02), TSALLIS), (TSALLIS, min_p(0.02))) == (min_p(0.02), TSALLIS)
