"""Verifiable rewards: plain functions of text, to be called in an experiment's `reward(prompts, completions, ..)`."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> float | None:
    """The last number of a text, as GSM8K's answers are read (Cobbe et al. 2021, arXiv:2110.14168); None where there is none.

    Commas between digits are taken out; a sign counts where no digit stands in front of it.
    """
    found = NUMBER.findall(re.sub(r"(?<=\d)[-+](?=\d)", " ", text))
    return float(found[-1].replace(",", "")) if found else None


def exact_match(completions: Sequence[str], answers: Sequence[str | float]) -> list[float]:
    """1 where the last number of a completion is that of its answer, else 0."""
    right = [last_number(str(answer)) for answer in answers]
    return [float(a is not None and last_number(text) == a) for text, a in zip(completions, right, strict=True)]


def matches(completions: Sequence[str], pattern: str) -> list[float]:
    """1 where the whole of a completion matches a regular expression, in which a dot is any character, else 0."""
    wanted = re.compile(pattern, re.DOTALL)
    return [float(wanted.fullmatch(text) is not None) for text in completions]


def near_length(completions: Sequence[str], words: int) -> list[float]:
    """1 at so many words, falling linearly to 0 at none and at twice as many."""
    if words < 1:
        raise ValueError(f"words is {words}; it must be 1 or more")
    return [max(0.0, 1 - abs(len(text.split()) - words) / words) for text in completions]
