"""Mixtures of data sources: one stream of examples in exact proportions, whose only state is the position."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax import paths
from alignax.data.counts import Report
from alignax.data.examples import Examples, concatenate
from alignax.data.tokens import load_examples


class Mixture(NamedTuple):
    """The sources of a mixture, in the order in which their rows lie in the examples."""

    sizes: tuple[int, ...]  # examples of each source
    weights: tuple[float, ...]  # shares of the stream; they sum to 1
    paths: tuple[str, ...]

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of each source."""
        return zip(np.cumsum([0, *self.sizes[:-1]]).tolist(), self.sizes, strict=True)

    def lines(self, draws: int) -> list[str]:
        """Tells how many times `draws` draws go through each source, as lines for the console."""
        return [
            f"{weight:.1%} of the examples from {path}: {size:,} rows, each used {draws * weight / size:.2f} times"
            for size, weight, path in zip(*self, strict=True)
        ]


class Loaded(NamedTuple):
    """The loaded data of one split."""

    examples: Examples
    reports: dict[str, Report]  # path of a source -> its report
    mixture: Mixture | None  # None: every row is drawn equally often


def load(
    field: str,
    data: Any,
    tokenizer: Any,
    vocab_size: int,
    ends: Collection[int] = (),
    row: Callable[[dict], Any] | None = None,
    whole: bool = False,
) -> Loaded:
    """Reads and tokenises the data of one split, whose sources `config.data` names in `field`: "train", "eval", "pretrain" or "ood".

    For the text that names sources see `sources`. Sources with weights are drawn from in these proportions; sources without weights
    are one set of rows. An epoch is as many draws as all sources together have rows, whatever the weights. The splits "eval" and "ood"
    take every row once and refuse weights, "pretrain" is of kind "sft", and only "train" has a `data.order`. For `ends` and `whole` see
    `tokenize`; `row` is the experiment's row function, see `alignax.data.shapes.shaped`.
    """
    named = sources(data[field], f"data.{field}")
    weights = [weight for _, weight in named if weight is not None]
    if weights and field in ("eval", "ood"):
        raise ValueError(f"data.{field} {data[field]!r} has weights, but evaluation uses every row once; leave the weights out")
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
    """Splits `a.jsonl@0.7,b.jsonl@0.3` into paths and weights: all sources have a weight, or none. A path that exists is not split.

    >>> sources("a.jsonl@0.7,b.jsonl@0.3")
    [('a.jsonl', 0.7), ('b.jsonl', 0.3)]
    """
    out: list[tuple[str, float | None]] = []
    for item in [text] if not paths.is_url(text) and paths.of(text).exists() else text.split(","):
        path, at, weight = item.strip().rpartition("@")
        if not at or paths.of(item.strip()).exists():
            out.append((item.strip(), None))
        else:
            out.append((path, _weight(weight, item, field)))
    names = [path for path, _ in out]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{field} {text!r} has an empty or a repeated source; write FILE@0.7,OTHER@0.3")
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
    """The source that each place of the stream draws from, and the number of earlier draws from that source.

    Draw j of source s is due at time (j + 1/2) / w_s, and the draws take their places in the order of these times (ties: by source).
    So in any run of consecutive places each of two sources gets its share to within one, and each of more sources to within a few.
    The places from `start` on are found without the places before.

    >>> schedule([0.75, 0.25], start=0, count=4)
    (array([0, 0, 1, 0]), array([0, 1, 0, 2]))

    Args:
      weights: shares of the k sources; they sum to 1.
      start: the first place.
      count: the number of places.

    Returns:
      The source [count] and the draw [count] of each place, int64.
    """
    # At time t a source has drawn w * t times to within 1/2, so place p is due within k/2 of time p. So every draw before
    # `first` takes a place in front of the window.
    w, k = np.asarray(weights, np.float64), len(weights)
    first = np.maximum(np.floor(w * start - k - 1), 0).astype(np.int64)
    stop = np.ceil(w * (start + count) + k + 1).astype(np.int64)
    draws = [np.arange(a, b) for a, b in zip(first, stop, strict=True)]
    source = np.repeat(np.arange(k), stop - first)
    draw = np.concatenate(draws)
    order = np.argsort((draw + 0.5) / w[source], kind="stable")[start - first.sum() :][:count]
    return source[order], draw[order]
