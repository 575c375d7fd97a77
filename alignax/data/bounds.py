"""Bounds: of a row much longer than what is kept of its tokens, only the part around the end of its prompt is tokenised.

A tokenizer takes hundreds of bytes for every token. What stands far from a place seldom changes the tokens there, and whether it does is
tried: a smaller and a larger part of the row have to give the same tokens, as far as they are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from alignax.data.rows import Bad, Encoded

LONG = 2**18  # characters up to which a text is tokenised whole
MOST = 2**24  # characters that are tokenised for a row at all, as `characters` counts them
UNSETTLED = 2**22  # the same, of a row whose parts do not tell what its tokens are
STEP = 4099  # characters by which the larger part is longer: a prime, so that no period of a text makes both parts alike
TOKEN = 16  # characters of a token, with which the search for a part that is large enough begins


class Bound(NamedTuple):
    """The lengths of a run, and what stays in front of a prompt that is cut."""

    max_length: int
    max_prompt_length: int
    fronts: tuple[str, ...]  # what the tokenizer itself puts in front of a text, and the BOS


class Texts(NamedTuple):
    """A row as texts."""

    prompt: str
    rests: Sequence[str]  # what follows it in each completion


class Way(NamedTuple):
    """How rows of a kind become tokens."""

    kind: type
    texts: Callable[[Any], tuple[str, Sequence[str]]]  # of a row, its prompt and what follows it in each completion
    part: Callable[[Any, str, Sequence[str]], Any]  # the row with others for them
    encode: Callable[[list[Any]], Sequence[Encoded | Bad]]


def encoded(rows: Sequence[Any], way: Way, kept: Callable[[Encoded], Any], bound: Bound) -> list[Encoded | Bad]:
    """Rows of a kind in tokens; long ones alone, and as far as they are kept, see `bounded`."""
    texts = [Texts(*way.texts(row)) for row in rows]
    out: list[Any] = [None if is_long(own) else too_long(own) for own in texts]
    short = [i for i, own in enumerate(texts) if out[i] is None and not is_long(own)]
    for i, code in zip(short, way.encode([rows[i] for i in short]), strict=True):
        out[i] = code
    one = lambda row, own: bounded(own, lambda part: way.encode([way.part(row, *part)])[0], kept, bound)
    return [one(rows[i], texts[i]) if code is None else code for i, code in enumerate(out)]


def is_long(row: Texts) -> bool:
    """Whether a row has a text that need not be tokenised whole."""
    return max(map(len, [row.prompt, *row.rests])) > LONG


def beginning(text: str, encode: Callable[[Texts], Encoded | Bad], most: int) -> Encoded | Bad:
    """A prompt that stands alone in tokens; of a long one of more than `most` tokens the beginning, which has more than so many."""
    return bounded(Texts(text, ()), encode, lambda code: code.prompt[:most], Bound(most + 1, 0, ()))


def bounded(row: Texts, encode: Callable[[Texts], Encoded | Bad], kept: Callable[[Encoded], Any], bound: Bound) -> Encoded | Bad:
    """A long row in tokens, as far as they are kept.

    Args:
      row: its texts.
      encode: makes tokens of them, or of a part of them.
      kept: what is kept of tokens, to be compared.
      bound: the lengths of the run.
    """
    size = max(LONG, TOKEN * bound.max_length)
    while size + STEP < max(map(len, [row.prompt, *row.rests])):
        few, more = (part(row, characters, bound) for characters in (size, size + STEP))
        if characters(more) > MOST:
            break
        code = encode(few)
        if isinstance(code, Bad):
            break
        if _enough(code, few, row, bound):
            other = encode(more)
            if isinstance(other, Bad) or kept(code) != kept(other):
                break
            return code._replace(text=row.prompt, counts={**code.counts, "shortened": 1})
        size *= 4
    return too_long(row, UNSETTLED) or encode(row)


def part(row: Texts, size: int, bound: Bound) -> Texts:
    """The part of a row that has at most so many characters on each side of the end of its prompt."""
    prompt, rests = row.prompt, [rest[:size] for rest in row.rests]
    if not bound.max_prompt_length:
        return Texts(prompt[:size], rests)  # a longer prompt, which is never cut, leaves no room, whatever it ends with
    front = next((front for front in bound.fronts if front and prompt.startswith(front)), "")
    return Texts(prompt if len(prompt) <= size + len(front) else front + prompt[-size:], rests)


def _enough(code: Encoded, few: Texts, row: Texts, bound: Bound) -> bool:
    """Whether the texts that are cut have more tokens than are kept of them."""
    if len(few.prompt) < len(row.prompt):
        if not bound.max_prompt_length:
            return len(code.prompt) >= bound.max_length
        if len(code.prompt) <= bound.max_prompt_length:
            return False
    cut = [len(a) < len(b) for a, b in zip(few.rests, row.rests, strict=True)]
    return all(len(ids) > bound.max_length for ids, is_cut in zip(code.completions, cut, strict=False) if is_cut)


def too_long(row: Texts, most: int = MOST) -> Bad | None:
    """Whether a row is too long to be tokenised."""
    size = characters(row)
    if size <= most:
        return None
    what = f"{size:,} characters would be tokenised for it, its prompt once with each completion, and at most {most:,} are"
    return Bad("too long", f"{what}; shorten it, or split it into rows")


def characters(row: Texts) -> int:
    """Characters that are tokenised of a row: its prompt once alone and once with each completion."""
    return len(row.prompt) * (len(row.rests) + 1) + sum(map(len, row.rests))
