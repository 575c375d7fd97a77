"""Examples: tokenised rows in flat arrays, with the further fields that a batch takes from them."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignax.data.rows import Message

# Batch fields that come from columns of the rows, and their types; a further field costs a line here and its reading in kinds.py.
FIELDS = {"labels": np.bool_, "margin": np.float32, "attributes": np.float32}


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenised rows of a data set, n rows of N responses: side s = row * N + response is `tokens[offsets[s]:offsets[s + 1]]`.

    The N sides of a row begin with the same prompt: the tokens in front of the first scored token, at least one. The texts in
    `prompts` are as the file holds them, or as the chat template writes them, before any cut.
    """

    tokens: np.ndarray  # [total] int32
    scored: np.ndarray  # [total] bool: tokens of the completion_mask
    offsets: np.ndarray  # [n*N + 1] int64
    N: int
    prompts: list[str]  # [n]
    fields: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [n, ...], as in FIELDS
    token_fields: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [total], computed from the tokens
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # name -> [n], of prompt data, for reward functions
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))  # [n] row numbers in the files, or [0]
    conversations: list[tuple[list[Message], Any] | None] = dataclasses.field(default_factory=list)  # [n] (messages, tools), or []
    others: "dict[str, Examples]" = dataclasses.field(default_factory=dict)  # role -> the same rows in the format of that role's model
    order: np.ndarray | None = None  # [n] float64: the first epoch draws rows by ascending numbers; None: no curriculum

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each side, prompt included: [n*N] int64."""
        return np.diff(self.offsets)

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """The number of prompt tokens of each side, those in front of its first scored token: [n*N] int64, at least 1."""
        scored = np.flatnonzero(self.scored)
        return scored[np.searchsorted(scored, self.offsets[:-1])] - self.offsets[:-1]

    def prompt_tokens(self, row: int) -> np.ndarray:
        """The tokens of a row's prompt, after any cut: [P] int32, for P tokens."""
        side = row * self.N
        return self.tokens[self.offsets[side] :][: self.prompt_lengths[side]]

    def asked(self, row: int) -> tuple[str | list[Message], Any]:
        """The prompt of a row as the file has it (text, or messages before any template), and its tools."""
        return (self.conversations[row] if self.conversations else None) or (self.prompts[row], None)

    def taken(self, rows: np.ndarray) -> "Examples":
        """The examples of the given rows [m], in that order; without columns, conversations, token fields, `others` and `order`."""
        sides = (rows[:, None] * self.N + np.arange(self.N)[None]).ravel()
        lengths = self.lengths[sides]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        gather = np.arange(offsets[-1]) + np.repeat(self.offsets[sides] - offsets[:-1], lengths)
        fields = {name: x[rows] for name, x in self.fields.items()}
        prompts = [self.prompts[row] for row in rows.tolist()]
        numbers = self.rows[rows] if len(self.rows) else self.rows
        return Examples(self.tokens[gather], self.scored[gather], offsets, self.N, prompts, fields, rows=numbers)

    def digest(self, crc: int = 0) -> int:
        """A fingerprint of the tokens and fields that batches are made of, `others` included, continued from `crc`."""
        crc = zlib.crc32(repr((self.N, sorted(self.fields))).encode(), self.token_digest(crc))
        for name in sorted(self.fields):
            crc = zlib.crc32(np.ascontiguousarray(self.fields[name]).tobytes(), crc)
        for name in sorted(self.others):
            crc = self.others[name].digest(crc)
        return crc

    def token_digest(self, crc: int = 0) -> int:
        """A fingerprint of what a model's log-probs depend on: tokens, masks and lengths; continued from `crc`."""
        for array in (self.tokens, self.scored, self.offsets):
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        return crc


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Joins parts into one set of examples, in order; ValueError if they differ in the number of responses or in their fields."""
    if len(parts) == 1:
        return parts[0]
    fields = [sorted((name, *x.shape[1:]) for name, x in p.fields.items()) for p in parts]
    for what, values in (("responses", [p.N for p in parts]), ("further fields", fields)):
        if any(value != values[0] for value in values):
            shown = " and ".join(map(str, values))
            raise ValueError(f"the sources differ in their {what} ({shown}); mix sources of one kind")
    ends = np.cumsum([0, *(len(p.tokens) for p in parts)])
    return Examples(
        tokens=np.concatenate([p.tokens for p in parts]),
        scored=np.concatenate([p.scored for p in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), *(p.offsets[1:] + end for p, end in zip(parts, ends, strict=False))]),
        N=parts[0].N,
        prompts=[prompt for p in parts for prompt in p.prompts],
        fields={name: np.concatenate([p.fields[name] for p in parts]) for name in parts[0].fields},
        columns={name: [x for p in parts for x in p.columns[name]] for name in parts[0].columns if all(name in p.columns for p in parts)},
        rows=np.concatenate([p.rows for p in parts]) if all(len(p.rows) for p in parts) else np.zeros(0, np.int64),
        conversations=[x for p in parts for x in p.conversations or [None] * len(p)],
        order=None if any(p.order is None for p in parts) else np.concatenate([p.order for p in parts if p.order is not None]),
    )


def unpair(pairs: Examples) -> Examples:
    """Splits n pairs into 2n rows of one response: the chosen ones are labelled True and the rejected ones False.

    The two rows of a pair lie n rows apart, and neighbours differ in prompt and label, since unpaired losses compare neighbours.
    ValueError if the pairs have an `order`.
    """
    if pairs.order is not None:
        raise ValueError(
            "data.order would put the two rows of a pair next to each other, but unpaired losses compare neighbouring rows; leave "
            "data.order empty"
        )
    n = len(pairs)
    pair = np.arange(n)
    sides = np.concatenate([2 * pair + pair % 2, 2 * pair + 1 - pair % 2])
    lengths = pairs.lengths[sides]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    gather = np.arange(offsets[-1]) + np.repeat(pairs.offsets[sides] - offsets[:-1], lengths)
    labels = (sides % 2 == 0)[:, None]  # [2n, N = 1]
    prompts, rows = [*pairs.prompts, *pairs.prompts], np.concatenate([pairs.rows, pairs.rows])
    given = {"rows": rows, "conversations": [*pairs.conversations, *pairs.conversations]}
    return Examples(pairs.tokens[gather], pairs.scored[gather], offsets, 1, prompts, {"labels": labels}, **given)
