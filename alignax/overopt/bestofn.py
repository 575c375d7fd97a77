"""Exact expectations of best-of-n: the mean over every subset of n of N responses, for any number of proxies at once."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class BestOfN(NamedTuple):
    """Expected values of the responses that best-of-n picks under each proxy."""

    n: tuple[int, ...]
    values: dict[str, dict[str, np.ndarray]]  # proxy -> quantity -> [P, len(n)] expectations; "proxy" is the proxy itself
    excluded: int  # responses left out because a score or a value is not finite


def kl(n: float) -> float:
    """KL(best-of-n || policy) in nats: log n - (n - 1) / n. Exact if no two responses tie, otherwise an upper bound."""
    return math.log(n) - (n - 1) / n


@lru_cache(maxsize=256)
def weights(N: int, n: int) -> np.ndarray:
    """The probabilities that the i-th of N responses is the best of a random n: C(i-1, n-1) / C(N, n), float64 [N].

    The responses are in ascending order of the proxy. Weights are computed in log space, from the top down, by the ratio
    (i - n + 1) / i of neighbours. No binomial is formed, so N may be millions.

    Raises:
      ValueError: for n outside 1 ... N.
    """
    if not 1 <= n <= N:
        raise ValueError(f"best of n = {n} of {N} responses; n must be at least 1 and at most {N}, or sample more responses")
    i = np.arange(n, N, dtype=np.float64)  # the log-ratio of weight i to weight i + 1
    logs = math.log(n / N) + np.concatenate([np.cumsum(np.log1p((1.0 - n) / i)[::-1])[::-1], [0.0]])
    return np.concatenate([np.zeros(n - 1), np.exp(logs)])


def best_of_n(proxies: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], n: Sequence[int]) -> BestOfN:
    """Expected values of the best of n responses, under each proxy's own order.

    This is the unbiased estimator: the mean over all C(N, n) subsets (Nakano et al. 2021, arXiv:2112.09332; Gao et al. 2022,
    arXiv:2210.10760). Responses that tie under a proxy are equally likely to be picked. A response with a score or a value that is
    not finite is left out under every proxy, and counted. Prompts are processed one by one; memory is of order N * len(n).

    Args:
      proxies: name -> scores [P, N] of N responses to each of P prompts.
      values: name -> quantity [P, N] to average over the picked responses: gold reward, length, disagreement.
      n: sizes, each in 1 ... N.

    Returns:
      For each proxy, each quantity and "proxy" (the proxy's own score): expectations [P, len(n)].

    Raises:
      ValueError: for different shapes, for a proxy or a value without a finite entry, and if fewer than n finite responses are left.

    Example:
      >>> scores = np.array([[0.0, 1.0, 2.0]])
      >>> best_of_n({"score": scores}, {"gold": scores}, [1, 3]).values["score"]["gold"].tolist()
      [[1.0, 2.0]]
    """
    if not proxies or "proxy" in values:
        raise ValueError("give at least one proxy, and no value named 'proxy': that is the name of the proxy's own score")
    checked = {f"proxy {name!r}": x for name, x in proxies.items()} | {f"value {name!r}": x for name, x in values.items()}
    P, N = _shape(checked)
    picked = {proxy: {name: np.empty((P, len(n))) for name in (*values, "proxy")} for proxy in proxies}
    excluded = 0
    for prompt in range(P):
        finite = np.logical_and.reduce([np.isfinite(x[prompt]) for x in checked.values()])
        left = int(finite.sum())
        excluded += N - left
        if left < max(n):
            raise ValueError(f"prompt {prompt} has {left} responses of {N} with finite scores, too few for n = {max(n)}; sample more")
        chance = np.stack([weights(left, size) for size in n])  # [len(n), left]
        own = {name: np.asarray(x[prompt], np.float64)[finite] for name, x in values.items()}
        for proxy, scores in proxies.items():
            own["proxy"] = np.asarray(scores[prompt], np.float64)[finite]
            order = np.argsort(own["proxy"], kind="stable")
            starts = np.flatnonzero(np.diff(own["proxy"][order], prepend=-np.inf))  # first index of each run of equal scores
            of_run, size = np.add.reduceat(chance, starts, axis=1), np.diff(starts, append=left)
            for name, x in own.items():
                picked[proxy][name][prompt] = of_run @ (np.add.reduceat(x[order], starts) / size)
    return BestOfN(tuple(n), picked, excluded)


def _shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """The common shape (P, N) of the arrays. Refuses other shapes, and arrays without a finite entry."""
    first, *rest = arrays
    for name, x in arrays.items():
        if x.ndim != 2 or x.shape != arrays[first].shape:
            raise ValueError(f"{name} has shape {x.shape}, {first} {arrays[first].shape}; each must be [P, N], of the same responses")
        if not np.isfinite(x).any():
            raise ValueError(f"{name} is not finite for any response; look at the model or function that gives it")
    return arrays[first].shape[0], arrays[first].shape[1]
