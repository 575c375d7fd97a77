"""Errors and values in the words of a message: one line of bounded length."""

import reprlib
from typing import Any


def one_line(error: BaseException, most: int = 160) -> str:
    """What an error says, as one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


_REPR = reprlib.Repr()  # nested values to a bounded depth: what a file holds may be nested a thousand deep
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def table(rows: list[list[str]]) -> str:
    """Aligned columns; the first row is the head, the first column is left aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cell = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    lines = ["  ".join(cell(i, text) for i, text in enumerate(row)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
