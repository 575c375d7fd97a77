"""Best-of-n without sampling it: the expectation over every n of N responses, for any number of proxies at once."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class BestOfN(NamedTuple):
    """What best-of-n picks under each proxy."""

    n: tuple[int, ...]
    values: dict[str, dict[str, np.ndarray]]  # proxy -> quantity -> [P, len(n)] expectations; "proxy" is the proxy itself
    excluded: int  # responses left out, since a score or a value of theirs is not finite


def kl(n: float) -> float:
    """KL(best-of-n || policy) in nats, log n - (n - 1) / n: exact where no two responses tie, an upper bound where some do."""
    return math.log(n) - (n - 1) / n


@lru_cache(maxsize=256)
def weights(N: int, n: int) -> np.ndarray:
    """The probability C(i-1, n-1) / C(N, n) that of N responses in ascending order the i-th is the best of n of them: float64 [N].

    In log space, from the top down by the ratio (i - n + 1) / i of neighbours: no binomial is ever formed, so N may be millions.
    """
    if not 1 <= n <= N:
        raise ValueError(f"best of n = {n} of {N} responses; n must be at least 1 and at most {N}, or sample more responses")
    i = np.arange(n, N, dtype=np.float64)  # the log-ratio of weight i to weight i + 1
    logs = math.log(n / N) + np.concatenate([np.cumsum(np.log1p((1.0 - n) / i)[::-1])[::-1], [0.0]])
    return np.concatenate([np.zeros(n - 1), np.exp(logs)])


def best_of_n(proxies: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], n: Sequence[int]) -> BestOfN:
    """Expected values of the best of n responses, the best by each proxy's own order.

    The unbiased estimator: the mean over all C(N, n) subsets (Nakano et al. 2021, arXiv:2112.09332; Gao et al. 2022,
    arXiv:2210.10760). Where responses tie under a proxy, each of them is as likely to be picked. A response with a score or a value
    that is not finite is left out, under every proxy, and counted. The work is done prompt by prompt, in memory of order N * len(n).

    Args:
      proxies: name -> scores [P, N] of N responses to each of P prompts.
      values: name -> what to average over the responses picked, [P, N]: gold reward, length, disagreement.
      n: sizes, each in 1 ... N.

    Raises:
      ValueError: for shapes that differ, for a proxy or a value without one finite entry, for n beyond the responses left.
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
            starts = np.flatnonzero(np.diff(own["proxy"][order], prepend=-np.inf))  # of runs of equal scores
            of_run, size = np.add.reduceat(chance, starts, axis=1), np.diff(starts, append=left)
            for name, x in own.items():
                picked[proxy][name][prompt] = of_run @ (np.add.reduceat(x[order], starts) / size)
    return BestOfN(tuple(n), picked, excluded)


def _shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """The one shape [P, N] of all; refuses others, and what has no finite entry at all."""
    first, *rest = arrays
    for name, x in arrays.items():
        if x.ndim != 2 or x.shape != arrays[first].shape:
            raise ValueError(f"{name} has shape {x.shape}, {first} {arrays[first].shape}; each must be [P, N], of the same responses")
        if not np.isfinite(x).any():
            raise ValueError(f"{name} is not finite for any response; look at the model or function that gives it")
    return arrays[first].shape[0], arrays[first].shape[1]
