"""Rows: a prompt with its completions, or a bad row, named or counted."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]  # role, content, and whatever else the chat template reads
FIRST = 3  # bad rows that are shown for a reason


class Prompted(NamedTuple):
    """One row: a prompt and its N completions, the best first, each as text, or each as the messages of a conversation."""

    prompt: str | list[Message]
    completions: tuple[str, ...] | tuple[list[Message], ...]
    row: int = 0  # its index in the file
    fields: Mapping[str, Any] = {}  # further fields of the batch: labels, margin
    tools: list[Any] | None = None  # what the chat template is told of tools
    columns: Mapping[str, Any] = {}  # of a prompt alone: what else its row holds, for reward functions
    told: tuple[str, ...] = ()  # what the report counts of it, in words that many rows share
    order: float = 0.0  # where it stands in a curriculum: rows of smaller numbers come first


class Bad(NamedTuple):
    """Why a row cannot be used: the reason it is counted under, and what is wrong in words."""

    reason: str
    what: str


class Rejected:
    """The rows left out: `counts` by reason, and the `first` few of each in words."""

    def __init__(self, path: str | Path = "data", bad_rows: str = "error"):
        """With `bad_rows="error"` the first bad row raises; with "drop" it is counted."""
        if bad_rows not in ("error", "drop"):
            raise ValueError(f"data.bad_rows is {bad_rows!r}; use 'error' or 'drop'")
        self.path, self.bad_rows = path, bad_rows
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, bad: Bad, row: int, fault: bool = True) -> None:
        """Take up a row; one that is not at fault itself is counted and never raises."""
        where = f"row {row} (counted from 0): {bad.what}"
        if fault and self.bad_rows == "error":
            raise ValueError(f"{self.path}, {where}. Correct the row, or leave such rows out, counted, with --config.data.bad_rows=drop")
        self.counts[bad.reason] += 1
        if self.counts[bad.reason] <= FIRST:
            self.first.setdefault(bad.reason, []).append(where)


class Encoded(NamedTuple):
    """A row in tokens: the prompt that the N completions share, and each from there to its last scored token, or to the end of its text."""

    prompt: list[int]
    completions: list[list[int]]
    scored: list[bytes]  # as completions, 1 for a scored token and 0 for another
    text: str  # of the prompt
    merged: bool = False  # a token spans the boundary
    turns_without_eos: int = 0
    told: Collection[str] = ()  # what a person should know of the row, in words that many rows share
    counts: Mapping[str, int] = {}  # of texts: further counts of the report
