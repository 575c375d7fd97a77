"""Statistics: functions of the next-token distribution at completion positions, which the chunked head computes.

A statistic is a function of the logits, with its gradient if a loss differentiates it. A few lines define a new one:

    varentropy = Statistic("varentropy", lambda at: at.mean(at.logps**2) - at.mean(at.logps) ** 2)
    tsallis = Statistic(
        "tsallis",
        lambda at: 1 - at.mean(at.probs),  # 1 - sum p^2
        lambda at, value: -2 * at.probs * (at.probs - at.mean(at.probs)[..., None]),
    )

`forward(.., statistics=(tsallis,))` returns it as `Outputs.statistics["tsallis"]`, `make_loss(.., statistics=(tsallis,))` requests it
for a loss, and `token_statistic("spread", policy, tsallis)` writes it into the batch. A statistic that nothing requests is not computed.

Let z be the logits that enter the softmax, p = softmax(z), q = log p, and t the distribution of another model, the teacher:

    entropy H = -sum p q           dH / dz = -p (q + H)
    ref_kl = KL(t || p)            d / dz = p - t
    policy_kl = KL(p || t)         d / dz = p (q - log t - KL(p || t))
    the generalised Jensen-Shannon divergence of the student's and the teacher's softmax(z / T):   see `jsd` and `jsd_slope`
    min_p and top_k, for a kept target y:   onehot(y) - softmax of z over the kept tokens
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The input of a statistic, float32: the logits of a chunk of C positions in each of S batch shards, over a vocabulary of V.

    A token that is never predicted has a logit so low that its probability is 0.
    """

    z: jax.Array  # [S, C, V] logits that enter the softmax
    y: jax.Array  # [S, C] int32, the targets
    lse: jax.Array  # [S, C] logsumexp of z
    e: jax.Array | None = None  # [S, C, V] unnormalised probabilities; None in the backward pass
    total: jax.Array | None = None  # [S, C] their sum
    zt: jax.Array | None = None  # [S, C, V] logits of the teacher, for statistics that are `taught`
    lse_t: jax.Array | None = None  # [S, C] logsumexp of zt
    first: jax.Array | int = 0  # the id of the first of the V tokens: not 0 in a block of the vocabulary, see `Statistic.local`

    @functools.cached_property
    def logps(self) -> jax.Array:
        """The log-probs of all tokens: [S, C, V], in nats."""
        return self.z - self.lse[..., None]

    @functools.cached_property
    def probs(self) -> jax.Array:
        """The probabilities of all tokens: [S, C, V]."""
        return jnp.exp(self.logps)

    @functools.cached_property
    def taught_logps(self) -> jax.Array:
        """The teacher's log-probs of all tokens: [S, C, V], in nats."""
        assert self.zt is not None and self.lse_t is not None
        return self.zt - self.lse_t[..., None]

    @functools.cached_property
    def hit(self) -> jax.Array:
        """The one-hot mask of the targets: [S, C, V] bool."""
        return (self.first + jnp.arange(self.z.shape[-1]))[None, None] == self.y[..., None]

    def mean(self, x: jax.Array) -> jax.Array:
        """The expectation of x [S, C, V] under the next-token distribution: [S, C]."""
        # A product of vectors: (e * x).sum() takes 15 times as long on a CPU, because XLA computes a sum over an exp one number at a time.
        if self.e is None or self.total is None:
            return jnp.einsum("scv,scv->sc", self.probs, x)
        return jnp.einsum("scv,scv->sc", self.e, x) / self.total

    def of_target(self, x: jax.Array) -> jax.Array:
        """The values of x [S, C, V] at the targets: [S, C]."""
        return jnp.take_along_axis(x, self.y[..., None], axis=-1)[..., 0]


class Statistic(NamedTuple):
    """A statistic of the next-token distribution at a completion position, see the module's docstring.

    `slope` computes the gradient [S, C, V] with respect to z, given the statistic's value [S, C]. It may return a tuple of factors,
    which the head multiplies from left to right. A statistic with slope None cannot be differentiated: that is an error.

    A slope is `local` if its entry of a token depends on the token's own logits, `lse`, `lse_t` and the value alone, not on sums over other
    tokens such as `Chunk.mean`. On a mesh with fsdp the head then gives it a block of the vocabulary at a time, and no device holds the
    float32 gradient [D, V] of the whole output weight. If one slope is not local, the gradient is computed from the whole vocabulary.

    Two different statistics in one forward pass need different names. Equal statistics count as one, so a function that makes a
    statistic should be cached.
    """

    name: str  # its key in `Outputs.statistics`
    forward: Callable[[Chunk], jax.Array]  # -> [S, C] float32
    slope: Callable[[Chunk, jax.Array], jax.Array | tuple[jax.Array, ...]] | None = None
    taught: bool = False  # whether it also reads the teacher's logits
    local: bool = False  # whether its slope may be given a block of the vocabulary


def check_statistics(statistics: tuple[Statistic, ...], teacher: bool) -> None:
    """Refuses two different statistics with the same name, and statistics that need a teacher if there is none."""
    by_name: dict[str, Statistic] = {}
    for statistic in statistics:
        if by_name.setdefault(statistic.name, statistic) != statistic:
            raise ValueError(f"two statistics are called {statistic.name!r}; give one of them another name")
        if statistic.taught and not teacher:
            raise ValueError(
                f"the statistic {statistic.name!r} compares a model with another one, and this forward pass has no other model; set "
                "reference.token_kl=true, or give forward(.., teacher=..)"
            )


def merged(*several: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    """The statistics of several tuples in one tuple, without duplicates."""
    return tuple(dict.fromkeys(statistic for statistics in several for statistic in statistics))


# --- of one model ---


def _log_sum_sq(at: Chunk) -> jax.Array:
    assert at.e is not None and at.total is not None
    return jnp.log(jnp.einsum("scv,scv->sc", at.e, at.e)) - 2 * jnp.log(at.total)


entropy = Statistic(
    "entropy",
    lambda at: at.lse - at.mean(at.z),
    lambda at, value: -at.probs * (at.logps + value[..., None]),
    local=True,
)
"""The entropy of the next-token distribution, nats."""

log_sum_sq = Statistic("log_sum_sq", _log_sum_sq)
"""The log of the sum of squared probabilities, log sum_v p(v)^2; it carries no gradient."""

most_likely = Statistic("most_likely", lambda at: jnp.argmax(at.z, axis=-1).astype(jnp.float32))
"""The id of the most likely token, or the first one of a tie; float32 like all statistics, so ids are exact up to 2^24."""

accuracy = Statistic("accuracy", lambda at: (jnp.argmax(at.z, axis=-1) == at.y).astype(jnp.float32))
"""The accuracy of the model's most likely token: 1 if the target is that token, else 0."""


def min_p(kappa: float) -> Statistic:
    """The statistic min-p: the target's log-prob if unlikely tokens are removed and the other probabilities are renormalised.

        log p(y) - log sum of p over the kept tokens

    A token is kept if its probability is at least kappa times that of the most likely token. If the target itself is removed, the
    statistic is -inf and its gradient 0. The kept set counts as a constant, so the gradient of a kept target is onehot(y) - p, with p
    over the kept tokens.
    Outside of completions the statistic is 0.

    Args:
      kappa: in (0, 1].
    """
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa is {kappa}; it must be above 0 and at most 1 (Lp-Reg uses 0.02)")
    return _min_p(float(kappa))


def top_k(k: int) -> Statistic:
    """The statistic top-k: the target's log-prob if only the k most likely tokens are kept, and ties of the k-th; else as `min_p`.

    Args:
      k: at least 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be a number of tokens, 1 or more")
    return _top_k(int(k))


@functools.cache
def _min_p(kappa: float) -> Statistic:
    return _truncated(f"min_p_{kappa:g}", lambda z: z >= z.max(axis=-1, keepdims=True) + math.log(kappa))


@functools.cache
def _top_k(k: int) -> Statistic:
    return _truncated(f"top_k_{k}", lambda z: most_probable(z, k))


def _truncated(name: str, keep: Callable[[jax.Array], jax.Array]) -> Statistic:
    def forward(at: Chunk) -> jax.Array:
        kept = jnp.where(keep(at.z), at.z, -jnp.inf)
        return at.of_target(kept) - jax.nn.logsumexp(kept, axis=-1)

    def slope(at: Chunk, value: jax.Array) -> jax.Array:
        proxy = jax.nn.softmax(jnp.where(keep(at.z), at.z, -jnp.inf), axis=-1)
        return jnp.where(jnp.isfinite(value)[..., None], at.hit - proxy, 0.0)

    return Statistic(name, forward, slope)


def most_probable(logits: jax.Array, k: int) -> jax.Array:
    """The mask of the k largest logits along the last axis of [.., V], with ties of the k-th: [.., V] bool.

    >>> most_probable(jnp.array([3.0, 1.0, 2.0, 2.0]), 2).tolist()
    [True, False, True, True]
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers that order as the floats do

    def going(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, _, count = carry
        return (i < 32) & (count > k).any()

    def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, t, count = carry
        higher = t + jnp.left_shift(jnp.int32(1), 31 - i)  # the first addition wraps from the smallest integer to 0
        above = (order >= higher[..., None]).sum(axis=-1, dtype=jnp.int32)
        return i + 1, jnp.where(above >= k, higher, t), jnp.where(above >= k, above, count)

    rows, V = logits.shape[:-1], logits.shape[-1]
    _, t, _ = jax.lax.while_loop(going, body, (jnp.int32(0), jnp.full(rows, jnp.iinfo(jnp.int32).min), jnp.full(rows, V, jnp.int32)))
    return order >= t[..., None]


# --- of a model and its teacher ---


def _ref_kl(at: Chunk) -> jax.Array:
    assert at.zt is not None and at.lse_t is not None
    # From the difference of the logits, so that the KL of equal models is exactly 0, without rounding errors of large numbers.
    return jnp.einsum("scv,scv->sc", jnp.exp(at.taught_logps), at.zt - at.z) + at.lse - at.lse_t


def _policy_kl(at: Chunk) -> jax.Array:
    assert at.zt is not None and at.lse_t is not None
    return at.mean(at.z - at.zt) - at.lse + at.lse_t


ref_kl = Statistic("ref_kl", _ref_kl, lambda at, value: at.probs - jnp.exp(at.taught_logps), taught=True, local=True)
"""The KL from the teacher, KL(t || p) of the next-token distributions, nats."""

policy_kl = Statistic(
    "policy_kl",
    _policy_kl,
    lambda at, value: (at.probs, at.logps - at.taught_logps - value[..., None]),
    taught=True,
    local=True,
)
"""The KL to the teacher, KL(p || t) of the next-token distributions, nats."""


def generalised_jsd(beta: float = 0.5, temperature: float = 1.0) -> Statistic:
    """The statistic of the generalised Jensen-Shannon divergence from the teacher, see `jsd`; beta 1/2 is the plain one.

    `Outputs.jsd` has beta and temperature of the config (`reference.jsd_beta`, `reference.jsd_temperature`). Another one is found in
    `Outputs.statistics` by its name: "jsd_0.3_1" for beta 0.3 and temperature 1.
    """
    return _generalised_jsd(float(beta), float(temperature))


@functools.cache
def _generalised_jsd(beta: float, temperature: float) -> Statistic:
    return Statistic(
        f"jsd_{beta:g}_{temperature:g}",
        lambda at: jsd(at.z, at.zt, beta, temperature),  # pyright: ignore[reportArgumentType]
        lambda at, value: jsd_slope(at.z, at.zt, beta, temperature),  # pyright: ignore[reportArgumentType]
        taught=True,
    )


def jsd(z: jax.Array, zt: jax.Array, beta: float, temperature: float) -> jax.Array:
    """The generalised Jensen-Shannon divergence of s = softmax(z / T) and t = softmax(zt / T): [.., V] -> [..], in nats.

    beta KL(t || m) + (1 - beta) KL(s || m),   m = beta t + (1 - beta) s

    Agarwal et al. 2023, arXiv:2306.13649, eq. 1; t is the teacher. At beta 0 and 1 the formula is 0. There the function returns
    the limit of formula / beta, which is the forward KL(t || s), and of formula / (1 - beta), which is the reverse KL(s || t).
    """
    s, t, m = _mixed(z, zt, beta, temperature)
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def jsd_slope(z: jax.Array, zt: jax.Array, beta: float, temperature: float) -> jax.Array:
    """The gradient of `jsd` with respect to the logits z: [.., V].

    (1 - beta) s (log s - log m - KL(s || m)) / T;   at beta 0: (s - t) / T;   at beta 1: s (log s - log t - KL(s || t)) / T
    """
    s, t, m = _mixed(z, zt, beta, temperature)
    if beta == 0:
        return (jnp.exp(s) - jnp.exp(t)) / temperature
    p, d = jnp.exp(s), s - m
    return (1.0 if beta == 1 else 1 - beta) / temperature * p * (d - jnp.sum(p * d, axis=-1, keepdims=True))


def _mixed(z: jax.Array, zt: jax.Array, beta: float, temperature: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The log-probs log s, log t and log m of `jsd`, each [.., V]; m is t at beta 0 and 1."""
    s, t = jax.nn.log_softmax(z / temperature), jax.nn.log_softmax(zt / temperature)
    return s, t, t if beta in (0, 1) else jnp.logaddexp(s + math.log1p(-beta), t + math.log(beta))


__all__ = ["Statistic", "generalised_jsd", "min_p", "top_k"]
