"""Bounds on tokenisation: of a row with far more text than is kept, only the part around the end of its prompt is tokenised.

A tokenizer takes hundreds of bytes of memory for every token. Distant text seldom changes a token, and each row is checked for it:
a smaller and a larger part of the row must give the same tokens, as far as they are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from alignax.data.rows import Bad, Encoded

LONG = 2**18  # characters up to which a text is always tokenised whole
MOST = 2**24  # the most characters that are tokenised for a row, as `characters` counts them
UNSETTLED = 2**22  # the same limit for a row that is tokenised whole, since its parts do not settle its tokens
STEP = 4099  # characters that the larger part has more: a prime, so that no period of a repetitive text makes both parts alike
TOKEN = 16  # characters per token that the first part assumes


class Bound(NamedTuple):
    """The length limits of a run, and the texts that stay in front of a prompt that is cut."""

    max_length: int
    max_prompt_length: int
    fronts: tuple[str, ...]  # the text that the tokenizer itself puts in front of any text, and the BOS


class Texts(NamedTuple):
    """The texts of a row: its prompt and what follows it."""

    prompt: str
    rests: Sequence[str]  # what follows the prompt in each completion


class Way(NamedTuple):
    """The functions that read, shorten and encode rows of one type."""

    kind: type
    texts: Callable[[Any], tuple[str, Sequence[str]]]  # row -> its prompt, and what follows the prompt in each completion
    part: Callable[[Any, str, Sequence[str]], Any]  # row, prompt, rests -> the row with these texts
    encode: Callable[[list[Any]], Sequence[Encoded | Bad]]


def encoded(rows: Sequence[Any], way: Way, kept: Callable[[Encoded], Any], bound: Bound) -> list[Encoded | Bad]:
    """Encodes rows of one type into tokens; a long row alone, and as far as its tokens are kept, see `bounded`."""
    texts = [Texts(*way.texts(row)) for row in rows]
    out: list[Any] = [None if is_long(own) else too_long(own) for own in texts]
    short = [i for i, own in enumerate(texts) if out[i] is None and not is_long(own)]
    for i, code in zip(short, way.encode([rows[i] for i in short]), strict=True):
        out[i] = code
    one = lambda row, own: bounded(own, lambda part: way.encode([way.part(row, *part)])[0], kept, bound)
    return [one(rows[i], texts[i]) if code is None else code for i, code in enumerate(out)]


def is_long(row: Texts) -> bool:
    """Whether a row has a text of more than `LONG` characters, which need not be tokenised whole."""
    return max(map(len, [row.prompt, *row.rests])) > LONG


def beginning(text: str, encode: Callable[[Texts], Encoded | Bad], most: int) -> Encoded | Bad:
    """Encodes a prompt without completions; of a long one with more than `most` tokens, a beginning that has more than `most` tokens."""
    return bounded(Texts(text, ()), encode, lambda code: code.prompt[:most], Bound(most + 1, 0, ()))


def bounded(row: Texts, encode: Callable[[Texts], Encoded | Bad], kept: Callable[[Encoded], Any], bound: Bound) -> Encoded | Bad:
    """Encodes a long row into tokens, as far as they are kept.

    Args:
      row: the texts of the row.
      encode: turns these texts, or a part of them, into tokens.
      kept: gives what a run keeps of the tokens; by it, two parts of the row are compared.
      bound: the length limits of the run.
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
    """The part of a row with at most `size` characters on each side of the end of its prompt."""
    prompt, rests = row.prompt, [rest[:size] for rest in row.rests]
    if not bound.max_prompt_length:
        return Texts(prompt[:size], rests)  # a prompt is never cut, and a longer one leaves no room, whatever its end
    front = next((front for front in bound.fronts if front and prompt.startswith(front)), "")
    return Texts(prompt if len(prompt) <= size + len(front) else front + prompt[-size:], rests)


def _enough(code: Encoded, few: Texts, row: Texts, bound: Bound) -> bool:
    """Whether every shortened text of a row still has more tokens than are kept of it."""
    if len(few.prompt) < len(row.prompt):
        if not bound.max_prompt_length:
            return len(code.prompt) >= bound.max_length
        if len(code.prompt) <= bound.max_prompt_length:
            return False
    cut = [len(a) < len(b) for a, b in zip(few.rests, row.rests, strict=True)]
    return all(len(ids) > bound.max_length for ids, is_cut in zip(code.completions, cut, strict=False) if is_cut)


def too_long(row: Texts, most: int = MOST) -> Bad | None:
    """The error for a row of more than `most` characters to tokenise; None for a shorter row."""
    size = characters(row)
    if size <= most:
        return None
    what = f"the row has {size:,} characters to tokenise (its prompt counts once for each completion), and the limit is {most:,}"
    return Bad("too long", f"{what}; shorten the row, or split it into several rows")


def characters(row: Texts) -> int:
    """The number of characters that are tokenised for a row: its prompt once alone and once with each completion."""
    return len(row.prompt) * (len(row.rests) + 1) + sum(map(len, row.rests))
