"""Kinds of data: turns raw rows into prompts with completions.

A prompt is never guessed. It is a column, the text before a separator that the configuration names, or the leading turns of a
conversation. (A prompt inferred as the longest common prefix is silently wrong: "Paris " and "London" share nothing, and "The sky"
and "The sky is blue" share a whole answer.)
"""

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from alignax.data import chat, formats, shapes
from alignax.data.rows import Bad, Prompted, Rejected
from alignax.data.shapes import Shaped
from alignax.text import short


def prompted_rows(rows: Sequence[Shaped], data: Any, path: str | Path = "data") -> tuple[list[Prompted], Rejected]:
    """Turns raw rows into prompts with completions, as `config.data` says, and counts the rows that are left out.

    `data.kind` is "preference" (chosen, rejected), "sft" (a completion, or messages, or the chosen side of pairs), "unpaired"
    (a completion and a label), "ranked" (k completions, best first) or "prompt" (a prompt alone: completions are sampled). Pairs may
    also have a margin, and "sft" rows attributes.
    Texts without a prompt column are whole transcripts, and each side is split after its own last `data.prompt_separator`.
    Conversations are lists of messages; without a prompt column, the leading turns that the sides share are the prompt.
    `alignax.data.shapes` reads ShareGPT conversations, single messages, and a text beside messages. With `data.bad_rows="error"`
    the first bad row raises `ValueError`; with "drop" bad rows are counted. `len(prompted) + rejected.counts.total() == len(rows)`.
    """
    rejected = Rejected(path, data.bad_rows)
    if data.limit < 0:
        raise ValueError(f"data.limit is {data.limit}; use a number of rows, or 0 for all of them")
    if data.turns not in ("last", "all"):
        raise ValueError(f"data.turns is {data.turns!r}; use last or all")
    taken = rows[: data.limit] if data.limit else rows
    there = columns_of(taken)
    read = _reader([row for row in taken if isinstance(row, Mapping)], data, there, path)
    kept = []
    for index, row in enumerate(taken):
        if isinstance(row, str):
            rejected.counts[row] += 1
            continue
        result = row if isinstance(row, Bad) else _read(read, row, data)
        if isinstance(result, Bad):
            rejected.add(result, index)
        else:
            kept.append(result._replace(row=index))
    if data.kind == "ranked":
        kept = list(_of_one_size(kept, rejected, "completions", lambda row: len(row.completions)))
    if data.columns.attributes:
        kept = list(_of_one_size(kept, rejected, "attributes", lambda row: len(row.fields["attributes"][0])))
    if len(taken) < len(rows):
        rejected.counts["beyond data.limit"] = len(rows) - len(taken)
    return kept, rejected


def _read(read: Callable[[Mapping], Prompted | Bad], row: Mapping, data: Any) -> Prompted | Bad:
    """Reads a row with the reader of its kind, and adds its place in a curriculum."""
    result = read(row)
    if isinstance(result, Bad) or not (column := order_column(data)):
        return result
    number = _number(row.get(column))
    if number is None:
        return Bad("no order", f"{column!r}, named by data.order, is {short(row.get(column))}, not a finite number")
    return result._replace(order=-number if data.order.startswith("-") else number)


def order_column(data: Any) -> str:
    """The column that `data.order` names; empty if it names none."""
    if data.order == "-":
        raise ValueError("data.order is '-', which names no column; write -COLUMN, COLUMN, or file")
    return "" if data.order == "file" else data.order.removeprefix("-")


def columns_of(rows: Sequence[Shaped]) -> dict[str, None]:
    """The columns that at least one row has, in the order of the file."""
    return {column: None for row in rows if isinstance(row, Mapping) for column in row}


def unread(rows: Sequence[Shaped], data: Any) -> list[str]:
    """The columns of a file that data of this kind does not read, each with the type of its first value."""
    if data.kind == "prompt":  # reward functions may read any column
        return []
    taken = [row for row in (rows[: data.limit] if data.limit else rows) if isinstance(row, Mapping)]
    there, c = columns_of(taken), data.columns
    sides = {"preference": ("chosen", "rejected"), "sft": (_sft_column(data, there),), "ranked": ("completions",)}
    named = [c[name] for name in sides.get(data.kind, ("completion", "label"))]
    if named != [c.messages]:
        named.append(c.prompt)
    named += [c.margin, *_columns(c.attributes), c.tools, c.system, order_column(data)]
    first = {column: next((row[column] for row in taken if row.get(column) is not None), None) for column in there if column not in named}
    return [f"{column} ({_type(value)})" for column, value in first.items()]


def _type(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "number", float: "number", list: "list", dict: "object", type(None): "empty"}
    return names.get(type(value), type(value).__name__)


def holds_pairs(rows: Sequence[Shaped], data: Any) -> bool:
    """Whether rows for data of kind "unpaired" hold pairs instead, which have to be split."""
    if data.kind != "unpaired" or data.columns.margin:
        return False
    there = columns_of(rows)
    return data.columns.label not in there and {data.columns.chosen, data.columns.rejected} <= there.keys()


def _reader(rows: Sequence[Mapping], data: Any, there: Mapping[str, None], path: Any) -> Callable[[Mapping], Prompted | Bad]:
    """Builds the function from a raw row to its prompt and completions; refuses a file that lacks the needed columns."""
    c = data.columns
    wanted = {
        "preference": ("chosen", "rejected"),
        "sft": (_sft_column(data, there),),
        "unpaired": ("completion", "label"),
        "ranked": ("completions",),
        "prompt": (),
    }
    if data.kind not in wanted:
        raise ValueError(f"data.kind is {data.kind!r}; use one of {', '.join(wanted)}")
    if c.margin and data.kind != "preference":
        raise ValueError(f"data.columns.margin is {c.margin!r}, and data of kind {data.kind!r} has no margins; leave it empty")
    if c.attributes and data.kind != "sft":
        raise ValueError(f"data.columns.attributes is {c.attributes!r}, and only data of kind 'sft' have attributes; set data.kind=sft")
    named = [(f"columns.{name}", c[name]) for name in (*wanted[data.kind], *(name for name in ("margin", "system") if c[name]))]
    named += [("columns.attributes", column) for column in _columns(c.attributes)]
    named += [("order", order_column(data))] if order_column(data) else []
    names = [name for name in wanted[data.kind] if name != "label"]
    columns = [c[name] for name in names]
    for name, column in named:
        if rows and column not in there:
            known = formats.likely(rows[0]) if name in ("columns.chosen", "columns.rejected", "columns.completions") else ""
            if name == "columns.completion" and (held := _conversation(rows[0], columns)):
                known = f"; {held!r} holds a conversation: for data.kind=sft name it with data.columns.messages={held}"
            raise ValueError(f"{path} has no column {column!r}, named by data.{name}; it has: {_nearest(column, there)}{known}")
    if data.kind == "prompt":
        return _prompt_reader(c, there, path, _conversation(rows[0], [])) if rows else lambda row: Bad("no prompt", "there is no row")
    # A column of messages is the whole conversation, even where the file has a prompt column too.
    prompt = c.prompt if c.prompt in there and names != ["messages"] else ""
    listed = any(isinstance(value := row.get(columns[0]), list) or shapes.is_json(value) for row in rows)
    if rows and not prompt and not data.prompt_separator and not listed:
        held = _conversation(rows[0], columns)
        raise ValueError(
            f"{path} has no prompt column {c.prompt!r} (it has: {_nearest(c.prompt, there)}), and alignax never guesses the prompt. Name "
            f"the column with data.columns.prompt{f'={held}, which holds a conversation' if held else ''}, or, if a text is a whole "
            "transcript, give the separator before its last answer, here in shell syntax: "
            "--config.data.prompt_separator=$'\\n\\nAssistant:'"
        )

    def read(row: Mapping) -> Prompted | Bad:
        sides = _ranking(row, columns[0]) if data.kind == "ranked" else {column: row.get(column) for column in columns}
        result = sides if isinstance(sides, Bad) else _prompted(row, prompt, sides, data)
        fields = _fields(row, data)
        if isinstance(result, Bad):
            return result
        if isinstance(fields, Bad):
            return fields
        return _equal(result._replace(fields=fields), list(sides))

    return read


def _prompt_reader(names: Any, there: Mapping[str, None], path: Any, held: str) -> Callable[[Mapping], Prompted | Bad]:
    """Builds the function from a raw row to its prompt without a completion; the row keeps all columns for reward functions.

    `held`: a column with a conversation, for the message on a file without the prompt's column.
    """
    column = names.prompt
    if column not in there:
        known = f"; {held!r} holds a conversation: name it with data.columns.prompt={held}" if held else ""
        raise ValueError(f"{path} has no column {column!r}, named by data.columns.prompt; it has: {_nearest(column, there)}{known}")

    def read(row: Mapping) -> Prompted | Bad:
        found = prompt_alone(row, names)
        return found if isinstance(found, Bad) else found._replace(columns={name: row.get(name) for name in there})

    return read


def prompt_alone(row: Mapping, names: Any) -> Prompted | Bad:
    """The prompt of a row (text or messages) without a completion; `names` is `data.columns`."""
    value = shapes.messages(names.prompt, row.get(names.prompt))
    if names.system and not isinstance(value, Bad):
        joined = shapes.with_system(row.get(names.system), value, {})
        value = joined if isinstance(joined, Bad) else joined[0]
    if isinstance(value, list):
        return chat.prompt_alone(value, row.get(names.tools))
    return value if isinstance(value, Bad) else _bad_text(names.prompt, value) or Prompted(value, ("",))


def _conversation(row: Mapping, columns: Sequence[str]) -> str:
    """The name of a column, outside `columns`, that holds messages; empty if there is none."""
    return next((name for name, value in row.items() if name not in columns and shapes.holds_messages(value)), "")


def _sft_column(data: Any, there: Mapping[str, None]) -> str:
    """The kind of column that SFT data is read from: "completion", else "messages", else "chosen"."""
    return next((name for name in ("completion", "messages", "chosen") if data.columns[name] in there), "completion")


def _ranking(row: Mapping, column: str) -> dict[str, Any] | Bad:
    value = row.get(column)
    if not isinstance(value, list) or len(value) < 2:
        return Bad("no ranking", f"{column!r} is {short(value)}, not a list of two or more completions, best first")
    return {f"{column}[{i}]": side for i, side in enumerate(value)}


def _of_one_size(rows: list[Prompted], rejected: Rejected, what: str, size: Callable[[Prompted], int]) -> Iterator[Prompted]:
    """Yields the rows whose `size` is the most frequent one, and rejects the others."""
    most = Counter(map(size, rows)).most_common(1)
    for row in rows:
        if (k := size(row)) == most[0][0]:
            yield row
        else:
            rejected.add(Bad(f"another number of {what}", f"the row has {k} {what}, but most rows have {most[0][0]}"), row.row)


def _fields(row: Mapping, data: Any) -> dict[str, Any] | Bad:
    """The further batch fields of a row; `alignax.data.examples.FIELDS` has their types."""
    fields: dict[str, Any] = {}
    if data.kind == "unpaired":
        value = row.get(data.columns.label)
        label = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
        if label is None or not isinstance(value, bool | int | str):
            return Bad("no label", f"{data.columns.label!r} is {short(value)}, not true or false")
        fields["labels"] = (label,)  # [N]
    if data.columns.margin:
        margin = _number(row.get(data.columns.margin))
        if margin is None:
            return Bad("no margin", f"{data.columns.margin!r} is {short(row.get(data.columns.margin))}, not a finite number")
        fields["margin"] = margin
    if data.columns.attributes:
        attributes = _attributes(row, _columns(data.columns.attributes))
        if isinstance(attributes, Bad):
            return attributes
        fields["attributes"] = (attributes,)  # [N, labels]
    return fields


def _columns(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def _attributes(row: Mapping, columns: Sequence[str]) -> list[float] | Bad:
    """The numbers in the columns of attributes, where a column holds a number or a list of numbers; NaN for a missing one."""
    cells = [row.get(column) for column in columns]
    values = [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]
    missing = [value is None or value == "" or value != value for value in values]
    numbers = [math.nan if absent else _number(value) for value, absent in zip(values, missing, strict=True)]
    for value, number in zip(values, numbers, strict=True):
        if number is None:
            return Bad("no attribute", f"an attribute in {', '.join(columns)} is {short(value)}, neither a finite number nor null")
    if all(missing):
        return Bad("no attribute", f"{', '.join(columns)} {'are' if len(columns) > 1 else 'is'} empty")
    return [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) or (isinstance(value, str) and "_" in value) else float(value)  # Python's 1_000
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 1e38 else None  # float32 can hold it


def _prompted(row: Mapping, prompt: str, sides: Mapping[str, Any], data: Any) -> Prompted | Bad:
    """A row's prompt and completions; the prompt comes from its column or from the `sides` (column or place in it -> value)."""
    sides = {name: shapes.messages(name, value) for name, value in sides.items()}
    asked = shapes.messages(prompt, row.get(prompt)) if prompt else None
    if bad := next((value for value in (asked, *sides.values()) if isinstance(value, Bad)), None):
        return bad
    joined = shapes.together(asked, sides)
    if data.columns.system:
        joined = shapes.with_system(row.get(data.columns.system), *joined)
        if isinstance(joined, Bad):
            return joined
    asked, sides = joined[0], joined[1]
    lists = [name for name, side in sides.items() if isinstance(side, list)]
    if lists == [*sides] and (asked is None or isinstance(asked, list)) and (asked is not None or not prompt or row.get(prompt)):
        return chat.split(asked, sides, row.get(data.columns.tools), data.turns)
    if isinstance(asked, list):
        name = next(name for name in sides if name not in lists)
        return Bad("not messages", f"{name!r} is {short(sides[name])}, neither text nor messages, and {prompt!r} is a conversation")
    if lists == [*sides] and isinstance(asked, str):
        if odd := next((name for name in lists if not shapes.holds_messages(sides[name])), ""):
            return Bad(
                "not text", f"{odd!r} is {short(sides[odd])}, a list without messages, and {prompt!r} is text; give text or messages"
            )
        what = f"{lists[0]!r} is a conversation and {prompt!r} is text. If the conversation contains the prompt, set"
        return Bad("conversation with a text prompt", f"{what} --config.data.columns.prompt= (empty)")
    values = ({prompt: asked} if prompt else {}) | sides
    bad = next((bad for name, value in values.items() if (bad := _bad_text(name, value))), None)
    if bad:
        return bad
    if prompt:
        return _filled(Prompted(str(asked), tuple(sides.values())), list(sides))
    if not data.prompt_separator:
        return Bad("no prompt", f"{next(iter(sides))!r} is text, and the file has no prompt column; name it with data.columns.prompt")
    return _split(sides, data.prompt_separator)


def _split(sides: Mapping[str, str], separator: str) -> Prompted | Bad:
    parts = {name: text.rpartition(separator) for name, text in sides.items()}
    for name, (_, found, _) in parts.items():
        if not found:
            typed = "; in a shell a line break is $'\\n'" if "\\n" in separator else ""  # typed as a backslash and an n
            return Bad("no separator", f"{name!r} holds no separator {separator!r}{typed}: {short(sides[name])}")
    prompts = [before + found for before, found, _ in parts.values()]
    if len(set(prompts)) > 1:
        shown = " and ".join(_where(prompts, prompt) for prompt in dict.fromkeys(prompts))
        return Bad("prompt differs", f"the prompt differs between {' and '.join(sides)}: {shown}")
    return _filled(Prompted(prompts[0], tuple(after for _, _, after in parts.values())), list(sides))


def _bad_text(name: str, value: Any) -> Bad | None:
    if not isinstance(value, str):
        return Bad("not text", f"{name!r} is {short(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return Bad("invalid Unicode", f"{name!r} holds half of a surrogate pair, which is not valid text: {short(value)}")
    return None


def _filled(row: Prompted, names: Sequence[str]) -> Prompted | Bad:
    for name, completion in zip(names, row.completions, strict=True):
        if isinstance(completion, str) and not completion.strip():
            return Bad("empty completion", f"the completion in {name!r} is empty: {short(completion)}")
    return row


def _equal(row: Prompted, names: Sequence[str]) -> Prompted | Bad:
    seen: dict[str, str] = {}
    for name, completion in zip(names, row.completions, strict=True):
        key = completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True)
        if key in seen:
            reason = "chosen equals rejected" if len(names) == 2 else "equal completions"
            return Bad(reason, f"{seen[key]} and {name} are the same text: {short(completion)}")
        seen[key] = name
    return row


def _nearest(column: str, there: Mapping[str, Any]) -> str:
    def distance(other):
        return -difflib.SequenceMatcher(None, column.lower(), other.lower()).ratio()

    return ", ".join(repr(name) for name in sorted(there, key=distance))


def _where(prompts: Sequence[str], prompt: str) -> str:
    """The part of a prompt where it begins to differ from the other prompts."""
    start = max(len(commonprefix(prompts)) - 20, 0)
    return f"{'...' if start else ''}{prompt[start : start + 50]!r}{'...' if start + 50 < len(prompt) else ''}"
