"""Text for messages and the console: errors and values as one line of bounded length, and tables."""

import reprlib
from typing import Any


def one_line(error: BaseException, most: int = 160) -> str:
    """The message of an error, as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


_REPR = reprlib.Repr()  # bounds the depth too, since a value in a file may be nested a thousand deep
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: Any) -> str:
    """A value as an error message shows it, in at most 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def table(rows: list[list[str]]) -> str:
    """Formats rows of cells as aligned columns; the first row is the head, and the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cell = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    lines = ["  ".join(cell(i, text) for i, text in enumerate(row)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
