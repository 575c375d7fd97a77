"""Strings that end a completion, looked for in its text by the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

STOP_ID, STOP_STRING, LENGTH = "stop id", "stop string", "length"  # why a completion has ended
SLACK = 8  # tokens of no text of their own: parts of a character, special ones


@dataclasses.dataclass(frozen=True)
class Stops:
    """Stop strings of a tokenizer. Special tokens count as the text that they are written as."""

    tokenizer: Any
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for strings that can never occur."""
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"a stop string is {'empty' if string == '' else string}; give some text, or none")
            if odd := sorted({c for c in string if not c.isspace() and c not in self.text(self._ids(c))}):
                raise ValueError(
                    f"stop string {string!r} can never occur: the tokenizer writes {', '.join(map(repr, odd))} as "
                    f"{', '.join(repr(self.text(self._ids(c))) for c in odd)}; leave it out"
                )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, tokens: Any) -> str:
        """The text of tokens as they are."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def first(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string of a text begins, and which it is."""
        found = [(text.find(s), s) for s in self.strings]
        return min((hit for hit in found if hit[0] >= 0), default=None)

    def end(self, tokens: np.ndarray, seen: int) -> int | None:
        """How many tokens there are when the first stop string is whole, or None; in the first `seen` there was none."""
        # A token is a byte of text at least, so a string that ends after `seen` begins no earlier than this.
        start = max(0, seen - max(len(s.encode()) for s in self.strings) - SLACK)
        if self.first(self.text(tokens[start:])) is None:
            return None
        return next(n for n in range(seen, len(tokens) + 1) if self.first(self.text(tokens[start:n])) is not None)


def stops_of(tokenizer: Any, strings: Sequence[str]) -> Stops | None:
    """The stop strings of a config field; None of none."""
    return Stops(tokenizer, tuple(strings)) if strings else None


def bare(tokens: Any, ended: str) -> Any:
    """A completion's tokens without the stop id that has ended it."""
    return tokens[:-1] if ended == STOP_ID else tokens


def text_of(tokens: Any, ended: str, tokenizer: Any, stops: Stops | None = None) -> str:
    """The text that a completion's tokens say: without special tokens, without what has ended it, and without what follows that.

    Args:
      tokens: with the stop id, or the tokens of the stop string, at their end.
      ended: STOP_ID, STOP_STRING or LENGTH.
      tokenizer: of the model.
      stops: its stop strings.
    """
    said = lambda own: tokenizer.decode(own, skip_special_tokens=True)
    if stops is None or ended != STOP_STRING:
        return said(bare(tokens, ended))  # an end need not be a special token
    whole = stops.text(tokens)
    found = stops.first(whole)  # it may hold special tokens, and what they stand between is no string
    if found is None:
        return said(tokens)
    end, count = found[0], len(tokens)
    while count and not (whole.startswith(before := stops.text(tokens[:count])) and len(before) <= end):
        count -= 1
    return said(tokens[:count]) + whole[len(stops.text(tokens[:count])) : end]


def added_text(tokenizer: Any, prompt: Sequence[int], tokens: Any) -> str:
    """A completion as text, without special tokens: what it adds to its prompt's, so that a space in front is kept by every tokenizer."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *tokens.tolist()]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)
