"""Stop strings: strings that end a completion. The host looks for them in the completion's text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

STOP_ID, STOP_STRING, LENGTH = "stop id", "stop string", "length"  # the reasons why a completion has ended
SLACK = 8  # an allowance for tokens without text of their own: parts of a character, special tokens


@dataclasses.dataclass(frozen=True)
class Stops:
    """The stop strings of a sampler, with its tokenizer. Special tokens count with their written form as text."""

    tokenizer: Any
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses strings that can never occur with a ValueError."""
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
        """Decodes tokens into text, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def first(self, text: str) -> tuple[int, str] | None:
        """The index at which the first stop string of a text begins, and that string; None without one."""
        found = [(text.find(s), s) for s in self.strings]
        return min((hit for hit in found if hit[0] >= 0), default=None)

    def end(self, tokens: np.ndarray, seen: int) -> int | None:
        """The number of tokens [t] of a completion up to the end of its first stop string; None without one.

        `seen`: so many tokens at the beginning are known to hold no stop string.
        """
        # A token is at least one byte of text, so a stop string that ends after `seen` cannot begin before `start`.
        start = max(0, seen - max(len(s.encode()) for s in self.strings) - SLACK)
        if self.first(self.text(tokens[start:])) is None:
            return None
        return next(n for n in range(seen, len(tokens) + 1) if self.first(self.text(tokens[start:n])) is not None)


def stops_of(tokenizer: Any, strings: Sequence[str]) -> Stops | None:
    """The `Stops` of the strings in a config field; None if there are none."""
    return Stops(tokenizer, tuple(strings)) if strings else None


def bare(tokens: Any, ended: str) -> Any:
    """The tokens of a completion without its stop id; `ended` is the reason of its end, see `text_of`."""
    return tokens[:-1] if ended == STOP_ID else tokens


def text_of(tokens: Any, ended: str, tokenizer: Any, stops: Stops | None = None) -> str:
    """The text of a completion, without special tokens, and without its stop id or its stop string and what follows that string.

    Args:
      tokens: [t] tokens of the completion, with the stop id or the tokens of the stop string at the end.
      ended: the reason of its end: STOP_ID, STOP_STRING or LENGTH.
      tokenizer: the model's tokenizer.
      stops: the stop strings of the sampler.
    """
    said = lambda own: tokenizer.decode(own, skip_special_tokens=True)
    if stops is None or ended != STOP_STRING:
        return said(bare(tokens, ended))  # a stop id need not be a special token
    whole = stops.text(tokens)
    found = stops.first(whole)  # searched with special tokens, which separate the text around them
    if found is None:
        return said(tokens)
    end, count = found[0], len(tokens)
    while count and not (whole.startswith(before := stops.text(tokens[:count])) and len(before) <= end):
        count -= 1
    return said(tokens[:count]) + whole[len(stops.text(tokens[:count])) : end]


def added_text(tokenizer: Any, prompt: Sequence[int], tokens: Any) -> str:
    """The text that a completion adds to its prompt, without special tokens.

    Prompt and completion are decoded together, because some tokenizers drop a leading space.

    Args:
      tokenizer: the model's tokenizer.
      prompt: token ids of the prompt.
      tokens: [t] int array, the completion.
    """
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *tokens.tolist()]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)
