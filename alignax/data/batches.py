"""Batches of training data: a batch is a pure function of the step, so the data position in a checkpoint is one integer.

A batch has B prompts, N responses and T tokens, right padded. Its fields are tokens [B, N, T] int32; mask [B, N, T] bool, the
real tokens; completion_mask [B, N, T] bool, the scored tokens; and the fields of `alignax.data.examples.FIELDS` that the rows
have. Masks never come from token ids, so the pad token may be the EOS. A padding row is False in both masks, and 0 or False in
every further field.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import numpy as np

from alignax.data.examples import Examples
from alignax.data.mixture import Mixture, schedule

SCORED, UNSCORED = ("[{}]", "\x1b[1;32m{}\x1b[0m"), ("{}", "\x1b[2m{}\x1b[0m")  # how a token is shown: (plain, on a terminal)


@dataclasses.dataclass(frozen=True)
class Batches:
    """An endless, index-addressed stream of batches.

    Epochs follow one another without a gap: example i of step s is entry (s*B + i) mod n of the permutation of epoch
    (s*B + i) div n. So no example is left out at the end of an epoch, and the batch there holds rows of two epochs. In a
    mixture, `schedule` chooses the source of place s*B + i of the stream, and each source has its own epochs and permutations.
    If the examples have an `order`, epoch 0 draws them by ascending `order`; ties keep the order of the rows.
    """

    examples: Examples
    batch_size: int
    seed: int
    length: int  # T, the same for every batch
    mixture: Mixture | None = None  # the sources of the examples; None: a single source
    shuffle: bool = True
    bootstrap: bool = False  # the rows are resampled with replacement, by the seed
    noise: float = 0.0  # share of the pairs whose two sides are swapped, as if their label were wrong
    noise_seed: int = 0  # decides which pairs are swapped

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"the batch size is {self.batch_size}; use 1 or more")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"the data seed is {self.seed}; use 0 to 2**64 - 1")
        if not 0 <= self.noise < 1 or (self.noise and self.examples.N != 2):
            raise ValueError(
                f"label noise is {self.noise} for examples of {self.examples.N} responses; it must be a share of pairs, "
                "at least 0 and below 1"
            )
        _check_length(self.examples, self.length)

    def steps(self, epochs: float) -> int:
        """The number of steps that draw `epochs` times the number of examples of all sources, rounded up."""
        return math.ceil(round(epochs * len(self.examples), 6) / self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """The indices of the examples that a step draws: [B] int64."""
        start = int(step) * self.batch_size
        if self.mixture is None:
            return self._drawn(0, len(self.examples), start + np.arange(self.batch_size, dtype=np.int64))
        source, draw = schedule(self.mixture.weights, start, self.batch_size)
        rows = np.empty(self.batch_size, np.int64)
        for s, (first, count) in enumerate(self.mixture.spans()):
            rows[source == s] = first + self._drawn(s, count, draw[source == s])
        return rows

    def _drawn(self, source: int, count: int, draws: np.ndarray) -> np.ndarray:
        """The rows that the given draws of a source with `count` rows select: [draws] int64."""
        epoch, index = np.divmod(draws, count)
        if self.shuffle:
            for e in np.unique(epoch):
                first = e == 0 and self.examples.order is not None
                permutation = self._curriculum[source] if first else _permutation(self.seed, int(e), count, source)
                index[epoch == e] = permutation[index[epoch == e]]
        return _sample(self.seed, count, source)[index] if self.bootstrap else index

    @functools.cached_property
    def _curriculum(self) -> list[np.ndarray]:
        """For each source, the places of its rows by ascending `order`: [count] int64 each."""
        assert self.examples.order is not None
        out = []
        for source, (first, count) in enumerate([(0, len(self.examples))] if self.mixture is None else self.mixture.spans()):
            keys = self.examples.order[first : first + count]
            keys = keys[_sample(self.seed, count, source)] if self.bootstrap else keys
            out.append(np.argsort(keys, kind="stable"))
        return out

    def digest(self) -> int:
        """A fingerprint of what batches are made of: tokens, masks, further fields, length, mixture, order and label noise."""
        crc = zlib.crc32(repr((self.length, self.mixture and self.mixture[:2])).encode())
        if not self.shuffle:
            crc = zlib.crc32(b"file", crc)
        if self.examples.order is not None:
            crc = zlib.crc32(self.examples.order.tobytes(), crc)
        if self.noise:
            crc = zlib.crc32(repr((self.noise, self.noise_seed)).encode(), crc)
        return self.examples.digest(crc)

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, fields [B, ...]; `rows` selects a slice of the B prompts, as each of several hosts needs its own."""
        indices = self.rows(step) if rows is None else self.rows(step)[rows]
        batch = assemble(self.examples, indices, self.length)
        return swapped(batch, _wrong(self.noise_seed, len(self.examples), self.noise)[indices]) if self.noise else batch


def evaluation_batch(examples: Examples, index: int, batch_size: int, length: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    """Batch `index` of the examples in order, fields [B, ...]; padding rows fill the last batch. For `rows` see `Batches.batch`."""
    indices = np.arange(index * batch_size, (index + 1) * batch_size, dtype=np.int64)
    return assemble(examples, indices if rows is None else indices[rows], length)


def padded_length(examples: Examples, multiple: int = 8) -> int:
    """The smallest T, a multiple of `multiple`, at which a batch holds every example."""
    return -(-int(examples.lengths.max()) // multiple) * multiple


def assemble(examples: Examples, indices: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Gathers the examples at indices [B] into a batch with T = length; an index past the last example gives a padding row.

    The batch has tokens, mask, completion_mask and token fields [B, N, T], and further fields [B, ...]. For each role in
    `examples.others` it has ROLE_tokens, ROLE_mask and ROLE_completion_mask [B, N, T'], with the smallest T' for that role.
    """
    side = indices[:, None] * examples.N + np.arange(examples.N)  # [B, N]
    real = np.broadcast_to((indices < len(examples))[:, None], side.shape)
    side = np.where(real, side, 0)
    start = examples.offsets[side]
    lengths = np.where(real, examples.offsets[side + 1] - start, 0)  # [B, N]
    position = np.arange(length, dtype=np.int32)  # [T]
    mask = position < lengths[..., None]  # [B, N, T]
    tokens = np.zeros(mask.shape, np.int32)
    # `tokens[mask]` is row-major: the k-th real token of the batch comes from its side's start plus its place in the side.
    flat = lengths.ravel()
    first = np.cumsum(flat) - flat
    place = np.arange(flat.sum()) + np.repeat(start.ravel() - first, flat)
    tokens[mask] = examples.tokens[place]
    completion_mask = np.zeros(mask.shape, np.bool_)
    completion_mask[mask] = examples.scored[place]
    batch = {"tokens": tokens, "mask": mask, "completion_mask": completion_mask}
    for name, values in examples.token_fields.items():
        batch[name] = np.zeros(mask.shape, values.dtype)  # [B, N, T]
        batch[name][mask] = values[place]
    for name, values in examples.fields.items():
        batch[name] = values[side[:, 0] // examples.N]  # [B, ...]
        batch[name][~real[:, 0]] = 0
    for role, read in examples.others.items():
        own = assemble(read, indices, padded_length(read))
        batch |= {f"{role}_{name}": own[name] for name in ("tokens", "mask", "completion_mask")}
    return batch


def decode_example(examples: Examples, index: int, tokenizer: Any, colour: bool = False) -> str:
    """Shows one example as the model sees it: its text, its tokens with the scored ones in [ ] or in colour, and its padding count.

    The example is read back from an assembled batch, so that it shows what the masks say.
    """
    batch = assemble(examples, np.asarray([index]), padded_length(examples))
    lines = []
    for n in range(examples.N):
        tokens, real, scored = (batch[name][0, n] for name in ("tokens", "mask", "completion_mask"))
        first, padding = int(scored.argmax()), int((~real).sum())
        prompt, completion = tokens[:first].tolist(), tokens[first:][real[first:]].tolist()
        shown = [
            (SCORED if scored[i] else UNSCORED)[colour].format(token)
            for i, token in enumerate(tokenizer.convert_ids_to_tokens(prompt + completion))
        ]
        lines += [
            f"example {index}, response {n}: {len(prompt)} prompt tokens, {int(scored.sum())} scored, {padding} padding",
            f"  prompt      {tokenizer.decode(prompt)!r}",
            f"  completion  {tokenizer.decode(completion)!r}",
            f"  tokens      {' '.join(shown)}{f' (padding x {padding})' if padding else ''}",
        ]
    fields = "".join(f", {name} {batch[name][0].tolist()}" for name in examples.fields)
    return "\n".join([*lines, f"  fields      {fields[2:]}"] if fields else lines)


def _check_length(examples: Examples, length: int) -> None:
    longest = int(examples.lengths.max())
    if length < longest:
        raise ValueError(f"batches of {length} tokens do not hold the longest row of {longest}; use {padded_length(examples)}")


def swapped(batch: dict[str, np.ndarray], wrong: np.ndarray) -> dict[str, np.ndarray]:
    """Swaps the two responses in fields [B, 2, T] of a batch, at rows where `wrong` [B] is True; `margin` [B] changes its sign there."""
    turn = lambda x: np.where(wrong[:, None, None], x[:, ::-1], x)
    out = {name: turn(x) if x.ndim == 3 else x for name, x in batch.items()}
    return out | ({"margin": np.where(wrong, -batch["margin"], batch["margin"])} if "margin" in batch else {})


@functools.lru_cache(maxsize=16)
def _wrong(seed: int, count: int, share: float) -> np.ndarray:
    """Marks the rows that get a wrong label: [count] bool, True for a share of the rows that is exact to a row."""
    stream = np.random.Philox(key=np.asarray([seed, 0], np.uint64), counter=np.asarray([0, 0, 1, 0], np.uint64))
    wrong = np.zeros(count, bool)
    wrong[np.argsort(stream.random_raw(count), kind="stable")[: round(share * count)]] = True
    return wrong


@functools.lru_cache(maxsize=16)
def _sample(seed: int, count: int, source: int) -> np.ndarray:
    """The rows of a source's bootstrap sample: [count] int64."""
    stream = np.random.Philox(key=np.asarray([seed, 0], np.uint64), counter=np.asarray([0, 0, 2, source], np.uint64))
    return (stream.random_raw(count) % count).astype(np.int64)  # the modulo bias is count / 2**64


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, count: int, source: int) -> np.ndarray:
    # Raw Philox output is sorted, since NumPy guarantees that this stream never changes; Generator.permutation has no such guarantee.
    stream = np.random.Philox(key=np.asarray([seed, epoch], np.uint64), counter=np.asarray([0, 0, 0, source], np.uint64))
    permutation = np.argsort(stream.random_raw(count), kind="stable")
    permutation.flags.writeable = False
    return permutation
