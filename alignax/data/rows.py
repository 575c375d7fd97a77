"""Rows of data: prompts with completions, bad rows, and the counts of rows that are left out."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]  # role, content, and whatever else the chat template reads
FIRST = 3  # bad rows that are shown for each reason


class Prompted(NamedTuple):
    """A row of data: a prompt and its N completions, best first, all of them texts, or all of them messages of a conversation."""

    prompt: str | list[Message]
    completions: tuple[str, ...] | tuple[list[Message], ...]
    row: int = 0  # the index of the row in the file
    fields: Mapping[str, Any] = {}  # further fields of the batch: labels, margin, attributes
    tools: list[Any] | None = None  # tool descriptions for the chat template
    columns: Mapping[str, Any] = {}  # of a prompt without a completion: all columns of its row, for reward functions
    told: tuple[str, ...] = ()  # remarks that the report counts, in words that many rows share
    order: float = 0.0  # the place in a curriculum: rows with smaller numbers come first


class Bad(NamedTuple):
    """A row that cannot be used: the reason under which it is counted, and what is wrong in words."""

    reason: str
    what: str


class Rejected:
    """The rows that are left out: their `counts` by reason, and the `first` few of each reason in words."""

    def __init__(self, path: str | Path = "data", bad_rows: str = "error"):
        """Begins with no rows; `bad_rows="error"` makes the first bad row a ValueError, "drop" counts bad rows."""
        if bad_rows not in ("error", "drop"):
            raise ValueError(f"data.bad_rows is {bad_rows!r}; use 'error' or 'drop'")
        self.path, self.bad_rows = path, bad_rows
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, bad: Bad, row: int, fault: bool = True) -> None:
        """Counts a bad row, or raises ValueError for it; a row without a fault of its own (`fault=False`) never raises."""
        where = f"row {row} (counted from 0): {bad.what}"
        if fault and self.bad_rows == "error":
            raise ValueError(f"{self.path}, {where}. Correct the row, or drop and count such rows with --config.data.bad_rows=drop")
        self.counts[bad.reason] += 1
        if self.counts[bad.reason] <= FIRST:
            self.first.setdefault(bad.reason, []).append(where)


class Encoded(NamedTuple):
    """A row in tokens: the prompt that N completions share, and each completion to its last scored token or the end of its text."""

    prompt: list[int]
    completions: list[list[int]]
    scored: list[bytes]  # for each token of `completions`: 1 if it is scored, else 0
    text: str  # the text of the prompt
    merged: bool = False  # a token spans the boundary of prompt and completion
    turns_without_eos: int = 0
    told: Collection[str] = ()  # remarks that the report counts, in words that many rows share
    counts: Mapping[str, int] = {}  # further counts for the report
