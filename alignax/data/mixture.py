"""Mixtures: one stream of examples out of several sources, in exact proportions, with no state but the position."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignax.data.counts import Report
from alignax.data.examples import Examples, concatenate
from alignax.data.tokens import load_examples


class Mixture(NamedTuple):
    """The sources of a stream, in the order in which their rows lie in the examples."""

    sizes: tuple[int, ...]  # examples
    weights: tuple[float, ...]  # shares of the stream; they sum to 1
    paths: tuple[str, ...]

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each source."""
        return zip(np.cumsum([0, *self.sizes[:-1]]).tolist(), self.sizes, strict=True)

    def lines(self, draws: int) -> list[str]:
        """How often each source is gone through in so many draws, for the console."""
        return [
            f"{weight:.1%} of the examples from {path}: {size:,} rows, {draws * weight / size:.2f} times"
            for size, weight, path in zip(*self, strict=True)
        ]


class Loaded(NamedTuple):
    """The data of a split."""

    examples: Examples
    reports: dict[str, Report]  # by source
    mixture: Mixture | None  # None: the rows are drawn alike


def load(
    field: str,
    data: Any,
    tokenizer: Any,
    vocab_size: int,
    ends: Collection[int] = (),
    row: Callable[[dict], Any] | None = None,
    whole: bool = False,
) -> Loaded:
    """Read and tokenise what `config.data.train` or `.eval` (the field) names, or `.pretrain`, of kind "sft": see `sources`.

    Sources with weights are drawn from in these proportions; without, they are one set of rows. An epoch is as many draws as
    all sources together have rows, whatever the weights. Evaluation takes every row once and refuses weights. For `ends` and `whole`
    see `tokenize`; `row` is the experiment's, see `alignax.data.shapes.shaped`; only the rows of `train` have a `data.order`.
    """
    named = sources(data[field], f"data.{field}")
    weights = [weight for _, weight in named if weight is not None]
    if weights and field == "eval":
        raise ValueError(f"data.eval {data.eval!r} has weights, and evaluation takes every row once; leave them out")
    data = data.copy_and_resolve_references()
    if field == "pretrain":
        data.kind = "sft"
    if field != "train":
        data.order = ""
    loaded = {path: load_examples(path, data, tokenizer, vocab_size, ends, row, whole) for path, _ in named}
    parts = [examples for examples, _ in loaded.values()]
    mixture = None
    if weights:
        shares = tuple(weight / math.fsum(weights) for weight in weights)
        mixture = Mixture(tuple(map(len, parts)), shares, tuple(loaded))
    return Loaded(concatenate(parts), {path: report for path, (_, report) in loaded.items()}, mixture)


def sources(text: str, field: str = "data.train") -> list[tuple[str, float | None]]:
    """Paths and weights of `a.jsonl@0.7,b.jsonl@0.3`: all have weights, or none. A path that exists is itself."""
    out: list[tuple[str, float | None]] = []
    for item in [text] if Path(text).exists() else text.split(","):
        path, at, weight = item.strip().rpartition("@")
        if Path(item.strip()).exists() or not at:
            out.append((item.strip(), None))
        else:
            out.append((path, _weight(weight, item, field)))
    paths = [path for path, _ in out]
    if not all(paths) or len(set(paths)) < len(paths):
        raise ValueError(f"{field} {text!r} names no source or one twice between its commas; write FILE@0.7,OTHER@0.3")
    if len({weight is None for _, weight in out}) > 1:
        raise ValueError(f"{field} {text!r} gives some sources a weight and others none; give all a weight, as in FILE@0.7,OTHER@0.3")
    return out


def _weight(text: str, item: str, field: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{field}: the weight of {item.strip()!r} is {text!r}; write a positive number, as in FILE@0.7")
    return weight


def schedule(weights: Sequence[float], start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source each place of the stream draws from, and how often that source was drawn from before.

    Draw j of source s is due at (j + 1/2) / w_s, and the draws take their places in the order of these times (ties: by source).
    So of any n places in a row, a source of two gets its share to within one, in any mixture to within a few; and the places
    from `start` on are found without those before.

    Args:
      weights: shares of the k sources, summing to 1.
      start: the first place.
      count: the number of places.

    Returns:
      Source [count] and draw [count], int64.
    """
    # A source has drawn w * t times at time t to within 1/2, so place p is due within k/2 of p: nothing in front of `first` can
    # fall into the window, and all of it does fall before it.
    w, k = np.asarray(weights, np.float64), len(weights)
    first = np.maximum(np.floor(w * start - k - 1), 0).astype(np.int64)
    stop = np.ceil(w * (start + count) + k + 1).astype(np.int64)
    draws = [np.arange(a, b) for a, b in zip(first, stop, strict=True)]
    source = np.repeat(np.arange(k), stop - first)
    draw = np.concatenate(draws)
    order = np.argsort((draw + 0.5) / w[source], kind="stable")[start - first.sum() :][:count]
    return source[order], draw[order]
