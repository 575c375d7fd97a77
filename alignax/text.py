"""Text for messages and the console: errors and values as one line of bounded length, and tables."""

import reprlib
from typing import Any


def one_line(error: BaseException, most: int = 160) -> str:
    """The message of an error, as one line of at most `most` characters."""
    try:
        text = str(error)
    except Exception:  # a foreign class of errors
        text = ""
    text = " ".join(text[: 100 * most].split()) or type(error).__name__  # many megabytes of words would be a list of each
    return text if len(text) <= most else text[: most - 3] + "..."


_REPR = reprlib.Repr()  # bounds the depth too, since a value in a file may be nested a thousand deep
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: Any) -> str:
    """A value as an error message shows it, in at most 80 characters."""
    try:
        text = _REPR.repr(value)
    except Exception:  # of an integer of thousands of digits, for example
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def table(rows: list[list[str]]) -> str:
    """Formats rows of cells as aligned columns; the first row is the head, and the first column is left-aligned."""
    lines = ["  ".join(row).rstrip() for row in aligned(rows)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(rows: list[list[str]]) -> str:
    """Formats rows of cells as a Markdown table, aligned like `table`."""
    head, *body = aligned(rows)
    rule = ["-" * len(cell) if i == 0 else "-" * (len(cell) - 1) + ":" for i, cell in enumerate(head)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def aligned(rows: list[list[str]]) -> list[list[str]]:
    """The cells of rows, padded to the widths of their columns: at least 3, the first column on the right, the others on the left."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    return [
        [text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))] for row in rows
    ]
