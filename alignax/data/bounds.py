"""Bounds: of a text much longer than what is kept of its tokens, only the part that can matter is tokenised.

A tokenizer takes hundreds of bytes for every token. Where it splits a text at spaces before anything else, the tokens on one
side of a space between two letters do not depend on the other side, and a text may be cut there.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from alignax.data.rows import Bad, Prompted

LONG = 2**18  # characters up to which a text is tokenised whole
MOST = 2**24  # characters that are tokenised for a row at all, as `characters` counts them
WINDOW = 2**12  # characters in which a space between two letters is looked for
GAP = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


class Bound(NamedTuple):
    """How long texts may be for a tokenizer and the lengths of a run."""

    characters: int  # that hold more tokens than are kept; 0: no text may be cut
    front: str  # what the tokenizer itself puts in front of a text
    max_length: int
    max_prompt_length: int


def bound(tokenizer: Any, front: str, max_length: int, max_prompt_length: int) -> Bound:
    """The bound of a tokenizer: so many characters that even its longest tokens fill the lengths."""
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return Bound((max_length + 2) * longest if splits_at_spaces(tokenizer) else 0, front, max_length, max_prompt_length)


def splits_at_spaces(tokenizer: Any) -> bool:
    """Whether no token has a letter, a space and a letter in a row, by the tokenizer's own first splitting of texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split, normal = getattr(backend, "pre_tokenizer", None), getattr(backend, "normalizer", None)
    if split is None or any(re.search(r"[A-Za-z] +[A-Za-z]", str(token)) for token in tokenizer.added_tokens_decoder.values()):
        return False
    for text in ("ab cd", "x, ab cd 12 ef."):
        text = text if normal is None else normal.normalize_str(text)  # which may replace spaces, so that nothing splits at them
        if text.find("cd") < 1 or text.find("cd") - 1 not in {end for _, (_, end) in split.pre_tokenize_str(text)}:
            return False
    return True


def shortened(row: Prompted, bound: Bound) -> Prompted:
    """A row of text without the parts whose tokens are cut off in any case; the row itself where nothing can be said of that."""
    enough = max(bound.characters, LONG)
    texts = [str(row.prompt), *map(str, row.completions)]
    if not bound.characters or all(len(text) <= enough + WINDOW for text in texts):
        return row
    prompt, completions = texts[0], [_head(text, enough) for text in texts[1:]]
    if bound.max_prompt_length:
        prompt = _tail(prompt, enough, bound.front)
    elif len(prompt) > enough + WINDOW:
        # A prompt that is never cut leaves no room, whatever stands behind it.
        prompt, completions = _head(prompt, enough), [text[:1] for text in completions]
    return row._replace(prompt=prompt, completions=tuple(completions))


def same_tokens(row: Prompted, short: Prompted, prompt: Sequence[int], completions: Sequence[Sequence[int]], bound: Bound) -> bool:
    """Whether the tokens of a shortened row are, as far as they are kept, those of the row."""
    if len(str(short.prompt)) < len(str(row.prompt)):
        first = len(str(short.prompt).removeprefix(bound.front).split(" ", 2)[1])  # tokens of the first word may be others
        if bound.max_prompt_length:
            if len(prompt) < bound.max_prompt_length + first + len(bound.front) + 4:
                return False
        elif len(prompt) <= bound.max_length:
            return False
        else:
            return True
    cut = [len(str(a)) < len(str(b)) for a, b in zip(short.completions, row.completions, strict=True)]
    return all(len(ids) > bound.max_length + 1 for ids, is_cut in zip(completions, cut, strict=True) if is_cut)


def too_long(row: Prompted) -> Bad | None:
    """Whether a row is too long to be tokenised at all."""
    size = characters(row)
    if size <= MOST:
        return None
    what = f"{size:,} characters would be tokenised for it, its prompt once with each completion, and at most {MOST:,} are"
    return Bad("too long", f"{what}; shorten it, or split it into rows")


def characters(row: Prompted) -> int:
    """Characters that are tokenised of a row: its prompt once alone and once with each completion."""
    return _size(row.prompt) * (len(row.completions) + 1) + sum(map(_size, row.completions))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else sum(len(message.get("content") or "") for message in value)


def _head(text: str, enough: int) -> str:
    """The beginning of a text, up to a gap behind `enough` characters."""
    gap = GAP.search(text, enough, enough + WINDOW) if len(text) > enough + WINDOW else None
    return text[: gap.start()] if gap else text


def _tail(text: str, enough: int, front: str) -> str:
    """The end of a text, from a gap in front of its last `enough` characters on, with the tokenizer's front where it begins so."""
    start = len(text) - enough - WINDOW
    gap = GAP.search(text, start, start + WINDOW) if start > 0 else None
    return (front if front and text.startswith(front) else "") + text[gap.start() :] if gap else text
