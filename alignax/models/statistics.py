"""Statistics: quantities of the whole vocabulary at a completion position, as data that the chunked head computes.

A statistic says what it is of the logits, and what its slope there is where it is differentiated. A few lines make another:

    varentropy = Statistic("varentropy", lambda at: at.mean(at.logps**2) - at.mean(at.logps) ** 2)
    tsallis = Statistic(
        "tsallis",
        lambda at: 1 - at.mean(at.probs),  # 1 - sum p^2
        lambda at, value: -2 * at.probs * (at.probs - at.mean(at.probs)[..., None]),
    )

`forward(.., statistics=(tsallis,))` gives `Outputs.statistics["tsallis"]`, `make_loss(.., statistics=(tsallis,))` asks for it, and
`token_statistic("spread", policy, tsallis)` writes it as data. What is not asked for is not computed.

With z the logits as their softmax takes them, p the distribution, q = log p, and t that of another model (the teacher):

    entropy H = -sum p q           dH / dz = -p (q + H)
    ref_kl = KL(t || p)            d / dz = p - t
    policy_kl = KL(p || t)         d / dz = p (q - log t - KL(p || t))
    the generalised Jensen-Shannon divergence of both, of softmax(z / T):   see `jsd` and `jsd_slope`
    min_p and top_k, of a target that is kept:   onehot(y) - softmax of z over what is kept
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
    """What a statistic reads of a chunk of positions: S batch shards, C positions of each, a vocabulary of V; float32.

    A token that is never predicted has a logit so low that its probability is 0.
    """

    z: jax.Array  # [S, C, V] logits, as their softmax takes them
    y: jax.Array  # [S, C] int32, the targets
    lse: jax.Array  # [S, C] the log of the sum of exp(z)
    e: jax.Array | None = None  # [S, C, V] probabilities up to a factor, where the head has them; and their sum
    total: jax.Array | None = None  # [S, C]
    zt: jax.Array | None = None  # [S, C, V] logits of the other model; only a statistic that is `taught` reads them
    lse_t: jax.Array | None = None  # [S, C] the log of the sum of exp(zt)

    @functools.cached_property
    def logps(self) -> jax.Array:
        """Log-probs [S, C, V] in nats."""
        return self.z - self.lse[..., None]

    @functools.cached_property
    def probs(self) -> jax.Array:
        """Probabilities [S, C, V]."""
        return jnp.exp(self.logps)

    @functools.cached_property
    def taught_logps(self) -> jax.Array:
        """Log-probs of the other model: [S, C, V] nats."""
        assert self.zt is not None and self.lse_t is not None
        return self.zt - self.lse_t[..., None]

    @functools.cached_property
    def hit(self) -> jax.Array:
        """Where the target stands in the vocabulary: [S, C, V] bool."""
        return jnp.arange(self.z.shape[-1])[None, None] == self.y[..., None]

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean of x [S, C, V] over tokens as they are predicted: [S, C]."""
        # As a product of vectors: as (e * x).sum() XLA on CPU took 15 times as long, its reduction over an exp being scalar code.
        if self.e is None or self.total is None:
            return jnp.einsum("scv,scv->sc", self.probs, x)
        return jnp.einsum("scv,scv->sc", self.e, x) / self.total

    def of_target(self, x: jax.Array) -> jax.Array:
        """What x [S, C, V] has at the targets: [S, C]."""
        return jnp.take_along_axis(x, self.y[..., None], axis=-1)[..., 0]


class Statistic(NamedTuple):
    """A quantity of the whole vocabulary at a completion position.

    The slope is the gradient at z, [S, C, V], given the value [S, C]; as a tuple its factors, which the head multiplies from the left.
    None: it has none, and differentiating it is an error. Two with one name cannot be asked for at once. Equal ones are one, so a
    function that makes them is cached.
    """

    name: str  # under which it is found
    forward: Callable[[Chunk], jax.Array]  # -> [S, C] float32
    slope: Callable[[Chunk, jax.Array], jax.Array | tuple[jax.Array, ...]] | None = None
    taught: bool = False  # whether it reads another model's logits too


def check_statistics(statistics: tuple[Statistic, ...], teacher: bool) -> None:
    """Refuses two statistics of one name, and one that reads another model's logits where there is no other model."""
    by_name: dict[str, Statistic] = {}
    for statistic in statistics:
        if by_name.setdefault(statistic.name, statistic) != statistic:
            raise ValueError(f"two statistics are called {statistic.name!r}; give one of them another name")
        if statistic.taught and not teacher:
            raise ValueError(
                f"the statistic {statistic.name!r} compares a model with another one, and this forward pass has no other; set "
                "reference.token_kl=true, or give forward(.., teacher=..)"
            )


def merged(*several: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    """All of these statistics, each once."""
    return tuple(dict.fromkeys(statistic for statistics in several for statistic in statistics))


# --- of one model ---


def _log_sum_sq(at: Chunk) -> jax.Array:
    assert at.e is not None and at.total is not None
    return jnp.log(jnp.einsum("scv,scv->sc", at.e, at.e)) - 2 * jnp.log(at.total)


entropy = Statistic(
    "entropy",
    lambda at: at.lse - at.mean(at.z),
    lambda at, value: -at.probs * (at.logps + value[..., None]),
)
"""The entropy of the next-token distribution, nats."""

log_sum_sq = Statistic("log_sum_sq", _log_sum_sq)
"""log sum_v p(v)^2, which carries no gradient."""

most_likely = Statistic("most_likely", lambda at: jnp.argmax(at.z, axis=-1).astype(jnp.float32))
"""The id of the most likely token, of equal ones the first; float32 as all statistics are, exact up to 2^24."""

accuracy = Statistic("accuracy", lambda at: (jnp.argmax(at.z, axis=-1) == at.y).astype(jnp.float32))
"""1 where the target is the most likely token, else 0."""


def min_p(kappa: float) -> Statistic:
    """The target's log-prob without noise: tokens below kappa times the likeliest one are left out, and their probability shared out.

    log p(y) - log sum of p over what is kept; -inf of a target that is left out. What is kept is a constant, so the gradient is
    onehot(y) - p over the kept tokens, and 0 of a target that is left out. 0 outside of completions.

    Args:
      kappa: share of the likeliest token's probability that a token must have to be kept, in (0, 1].
    """
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa is {kappa}; it must be above 0 and at most 1 (0.02 is Lp-Reg's)")
    return _min_p(float(kappa))


def top_k(k: int) -> Statistic:
    """The target's log-prob among the k most likely tokens and those as likely as the last of them; see `min_p` of what is left out.

    Args:
      k: at least 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it is a number of tokens, at least 1")
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
    """The k largest along the last axis [.., V], with those equal to the last of them: [.., V] bool."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # whole numbers in the order of the floats

    def going(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, _, count = carry
        return (i < 32) & (count > k).any()

    def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, t, count = carry
        higher = t + jnp.left_shift(jnp.int32(1), 31 - i)  # the first one wraps from the smallest number to 0
        above = (order >= higher[..., None]).sum(axis=-1, dtype=jnp.int32)
        return i + 1, jnp.where(above >= k, higher, t), jnp.where(above >= k, above, count)

    rows, V = logits.shape[:-1], logits.shape[-1]
    _, t, _ = jax.lax.while_loop(going, body, (jnp.int32(0), jnp.full(rows, jnp.iinfo(jnp.int32).min), jnp.full(rows, V, jnp.int32)))
    return order >= t[..., None]


# --- of a model and another one, the teacher ---


def _ref_kl(at: Chunk) -> jax.Array:
    assert at.zt is not None and at.lse_t is not None
    # From the difference of logits, so that the KL of equal models is 0 and not a difference of large numbers.
    return jnp.einsum("scv,scv->sc", jnp.exp(at.taught_logps), at.zt - at.z) + at.lse - at.lse_t


def _policy_kl(at: Chunk) -> jax.Array:
    assert at.zt is not None and at.lse_t is not None
    return at.mean(at.z - at.zt) - at.lse + at.lse_t


ref_kl = Statistic("ref_kl", _ref_kl, lambda at, value: at.probs - jnp.exp(at.taught_logps), taught=True)
"""KL(t || p) of the next-token distributions, nats."""

policy_kl = Statistic("policy_kl", _policy_kl, lambda at, value: (at.probs, at.logps - at.taught_logps - value[..., None]), taught=True)
"""KL(p || t) of the next-token distributions, nats."""


def generalised_jsd(beta: float = 0.5, temperature: float = 1.0) -> Statistic:
    """The generalised Jensen-Shannon divergence from the teacher, see `jsd`; beta 1/2 is the Jensen-Shannon divergence.

    `Outputs.jsd` is the one of `reference.jsd_beta` and `.jsd_temperature`; another is asked for by its name, `jsd_0.3_1`.
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
    """The generalised Jensen-Shannon divergence of s = softmax(z / T) and t = softmax(zt / T): [.., V] -> [..] nats.

    beta KL(t || m) + (1 - beta) KL(s || m),   m = beta t + (1 - beta) s

    Agarwal et al. 2023, arXiv:2306.13649, eq. 1, t the teacher. 0 and 1, where that is 0, stand for its limits over beta and over
    1 - beta: KL(t || s), the forward KL, and KL(s || t), the reverse one.
    """
    s, t, m = _mixed(z, zt, beta, temperature)
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def jsd_slope(z: jax.Array, zt: jax.Array, beta: float, temperature: float) -> jax.Array:
    """The gradient of `jsd` at z: (1 - beta) s (log s - log m - KL(s || m)) / T; at beta 0 (s - t) / T, at 1 with t for m. [.., V]."""
    s, t, m = _mixed(z, zt, beta, temperature)
    if beta == 0:
        return (jnp.exp(s) - jnp.exp(t)) / temperature
    p, d = jnp.exp(s), s - m
    return (1.0 if beta == 1 else 1 - beta) / temperature * p * (d - jnp.sum(p * d, axis=-1, keepdims=True))


def _mixed(z: jax.Array, zt: jax.Array, beta: float, temperature: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log s, log t, log m."""
    s, t = jax.nn.log_softmax(z / temperature), jax.nn.log_softmax(zt / temperature)
    return s, t, t if beta in (0, 1) else jnp.logaddexp(s + math.log1p(-beta), t + math.log(beta))


__all__ = ["Statistic", "generalised_jsd", "min_p", "top_k"]
