"""Quark's pool: every response sampled so far, sorted by reward into quantiles; a token in the prompt marks the quantile."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience, Stateful
from alignax.losses.pairs import field
from alignax.types import Batch, readings, rows

Pool = dict[str, jax.Array]


def quark_pool(tokens: Sequence[int], capacity: int, length: int, seed: int = 0) -> Stateful:
    """Replaces the batch by responses drawn from a pool of all sampled ones (Lu et al. 2022, arXiv:2205.13636), for the loss `quark()`.

    Prompts of the data hold the best reward token once, so the policy tries to sample responses of the best quantile. A rollout enters
    the pool with its `rewards` [B, N]. The whole pool is sorted by reward into K quantiles. The new batch has the same shape, and is drawn
    uniformly from the pool. In each row the token of its quantile replaces the reward token of its prompt. The new fields:

        tokens, mask, completion_mask   the drawn rows
        ref_tokens, ref_mask            the same without the reward token, for the reference
        rewards, quantiles [B, N]       of the drawn rows; group_rewards [B, N] are those of the rollout

    Other fields are dropped, since log-probs of the rollout do not belong to the drawn rows. Rows are drawn without replacement until all
    have been drawn. With n responses in the pool, a quantile has floor(n / K), and the worst one also the rest. Of equal rewards the older
    one ranks first.

    A response that is not scored (padding, no reward, no reward token in its prompt) does not enter, and the drawn row in its place has
    weight 0. A full pool drops its oldest responses. The pool is a carry: it is in every checkpoint, and whole on every device, with
    capacity x length x 6 bytes.

    Args:
      tokens: ids of the K reward tokens, the best first, see `alignax.models.added.with_tokens`.
      capacity: responses that the pool holds, at least one rollout's. The paper's pool holds all: rollouts x B x N.
      length: at least the T of the rollouts, longest prompt included.
      seed: of the draws.
    """
    if len(tokens) < 2 or len(set(tokens)) < len(tokens):
        raise ValueError(f"the reward tokens are {list(tokens)}; give two or more different ids, the best first")
    empty = {"tokens": jnp.int32, "mask": jnp.bool_, "completion_mask": jnp.bool_}
    first: Pool = {name: jnp.zeros((capacity, length), dtype) for name, dtype in empty.items()}
    first |= {"rewards": jnp.zeros(capacity), "entered": jnp.zeros((), jnp.int32), "draws": jnp.zeros((), jnp.int32)}
    return Stateful("quark_pool", first, Partial(_Pool(tuple(tokens), seed)))


def unconditioned(tokens: Sequence[int], experience: Experience) -> Experience:
    """Applies an experience to prompts without their reward token, for reward models, which do not know such tokens.

    `chain(unconditioned(tokens, chain(score(ensemble), uwo(0.5))), quark_pool(tokens, ..))`

    Args:
      tokens: the reward tokens of `quark_pool`.
      experience: without a carry; its models have the policy's tokenizer.
    """
    return Partial(_Unconditioned(tuple(tokens)), experience)


@dataclasses.dataclass(frozen=True)
class _Unconditioned:
    """The static part of `unconditioned`."""

    tokens: tuple[int, ...]

    def __call__(self, experience: Experience, batch: Batch) -> Batch:
        if any(f"{role}_foreign" in batch for role in readings(batch)):
            raise ValueError(
                "unconditioned() shortens the policy's prompts, but these reward models read prompts in other tokens; use reward models "
                "with the policy's tokenizer"
            )
        bare = {}
        for role in ("", *(f"{role}_" for role in readings(batch))):
            row = {name: rows(batch[role + name]) for name in ("tokens", "mask", "completion_mask")}  # [R, T]
            cut = without(places(self.tokens, row), row["tokens"], row["mask"])
            names = (role + "tokens", role + "mask")
            bare |= {name: x.reshape(batch[name].shape) for name, x in zip(names, cut, strict=True)}
        return experience(batch | bare) | {name: batch[name] for name in bare}


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The static part of `quark_pool`."""

    tokens: tuple[int, ...]
    seed: int

    def __call__(self, pool: Pool, batch: Batch) -> tuple[Pool, Batch]:
        found = field(batch, "rewards", "score(model), mean, quark_pool(..)")  # [B, N]
        B, N, T = batch["tokens"].shape
        fresh = {name: rows(batch[name]) for name in ("tokens", "mask", "completion_mask")}  # [R, T]
        fresh["rewards"] = found.reshape(-1)
        known = fresh["completion_mask"].any(axis=1) & jnp.isfinite(fresh["rewards"]) & places(self.tokens, fresh).any(axis=1)  # [R]
        pool = enter(pool, fresh, known)
        labels = quantiles(pool["rewards"], pool["entered"], len(self.tokens))  # [P]
        key = jax.random.fold_in(jax.random.key(self.seed), pool["draws"])
        drawn = draw(key, pool["entered"], len(pool["rewards"]), B * N)  # [R]
        pool = pool | {"draws": pool["draws"] + 1}

        row = {name: pool[name][drawn, :T] for name in ("tokens", "mask", "completion_mask")}
        here, label = places(self.tokens, row), labels[drawn]
        own = jnp.asarray(self.tokens, jnp.int32)[label]
        ref_tokens, ref_mask = without(here, row["tokens"], row["mask"])
        out = row | {"tokens": jnp.where(here, own[:, None], row["tokens"]), "ref_tokens": ref_tokens, "ref_mask": ref_mask}
        out |= {"completion_mask": row["completion_mask"] & known[:, None], "rewards": pool["rewards"][drawn], "quantiles": label}
        sampled = {"group_rewards": jnp.where(known, fresh["rewards"], jnp.nan)}
        return pool, {name: x.reshape(B, N, *x.shape[1:]) for name, x in (out | sampled).items()}


def places(tokens: Sequence[int], row: Pool) -> jax.Array:
    """True at the first reward token of each prompt: [R, T] bool."""
    own = jnp.asarray(tokens, jnp.int32)[None, None]
    here = (row["tokens"][..., None] == own).any(axis=-1) & row["mask"] & ~row["completion_mask"]
    return here & (jnp.cumsum(here, axis=1) == 1)


def enter(pool: Pool, fresh: Pool, known: jax.Array) -> Pool:
    """The pool after the known rows [R] of `fresh` [R, T] have replaced its oldest ones."""
    (P, length), (R, T) = pool["tokens"].shape, fresh["tokens"].shape
    if length < T:
        raise ValueError(
            f"the pool holds rows of {length} tokens, but those of a rollout have {T}, prompts included; set length={T} or more"
        )
    if P < R:
        raise ValueError(
            f"the pool holds {P} responses but a rollout has {R}; raise capacity to that number, or to the responses of many rollouts"
        )
    slot = jnp.where(known, (pool["entered"] + jnp.cumsum(known) - 1) % P, P)  # [R]; P is nowhere
    wide = {name: jnp.pad(x, ((0, 0), (0, length - T))) if x.ndim == 2 else x for name, x in fresh.items()}
    put = {name: pool[name].at[slot].set(x, mode="drop") for name, x in wide.items()}
    return pool | put | {"entered": pool["entered"] + known.sum(dtype=jnp.int32)}


def quantiles(rewards: jax.Array, entered: jax.Array, K: int) -> jax.Array:
    """The quantile of each reward [P], of K quantiles, 0 the best: [P] int32.

    `entered` is the number of all entries so far; a new entry replaces the oldest. Of n rewards, each quantile has floor(n / K), at least
    1, and the worst also the rest. Equal rewards rank by age, the oldest first.
    """
    P = len(rewards)
    place = jnp.arange(P)
    age = (place - entered) % P  # 0: the oldest, or the first that is still free
    free = place >= entered
    order = jnp.lexsort((age, -rewards, free))
    rank = jnp.zeros(P, jnp.int32).at[order].set(place.astype(jnp.int32))
    return jnp.minimum(rank // jnp.maximum(jnp.minimum(entered, P) // K, 1), K - 1)


def draw(key: jax.Array, entered: jax.Array, capacity: int, count: int) -> jax.Array:
    """Draws `count` slots of the pool uniformly: [count]. No slot comes twice before all have come once."""
    there = jnp.minimum(entered, capacity)
    order = jnp.argsort(jnp.where(jnp.arange(capacity) < there, jax.random.uniform(key, (capacity,)), 2.0))
    return order[jnp.arange(count) % jnp.maximum(there, 1)]


def without(here: jax.Array, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Removes the one token that `here` [R, T] marks from tokens and mask [R, T]; the tokens before it move right.

    Padding is then at the front. A token that is only masked would still take a place in the window of sliding attention.
    """
    moved = jnp.cumsum(here[:, ::-1], axis=1)[:, ::-1] > 0  # at the token, and before it
    back = lambda x: jnp.where(moved, jnp.pad(x[:, :-1], ((0, 0), (1, 0))), x)
    return back(tokens), back(mask)
