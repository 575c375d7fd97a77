"""Shapes of conversations: turns what other programs write into lists of messages with a role and a content."""

import ast
import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from alignax.data import formats
from alignax.data.rows import Bad, Message
from alignax.text import one_line, short

# The speakers of ShareGPT rows, which have `from` and `value` for `role` and `content` -> our roles.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "function_call",
}  # fmt: skip


# Roles under names that no chat template of today knows -> our roles. "observation" stays: GLM's template knows it.
ROLES = {name: role for name, role in SPEAKERS.items() if name not in ("function_call", "observation")}
# MAY_HOLD: the beginning of a text that may hold messages. BEGINS_AS_MESSAGES: the beginning of a text that surely does, for texts
# that cannot be read to their end (they were cut, say).
MAY_HOLD = re.compile(r"""\s*[\[{](?=.*["'](role|from)["']\s*:)""", re.DOTALL)
BEGINS_AS_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|from|content|value)\1\s*:\s*["']""")
WRITTEN_BY_NUMPY = re.compile(r"""\}\s+\{(?=["'])""")  # no comma between objects: a list as to_csv of pandas and datasets writes it
LEFT_OUT, NO_PREFERENCE = "left out by row()", "no preference (data.format)"
Shaped = Mapping | Bad | str  # a row, a bad row, or the reason why a row is left out


def shaped(rows: Sequence[Mapping | Bad], data: Any, row: Callable[[dict], Any] | None = None) -> list[Shaped]:
    """Applies an experiment's `row(row)`, and then `data.format`, to the first `data.limit` rows; later rows stay as they are.

    A row for which either gives None is left out; whatever either raises makes the row a bad row.
    """
    ways = [("row()", row, LEFT_OUT)] if row else []
    ways += [(f"data.format {data.format!r}", formats.named(data.format), NO_PREFERENCE)] if data.format else []
    if not ways:
        return [*rows]
    out: list[Shaped] = [*rows]
    for i, value in enumerate(rows[: data.limit or None]):
        found: Any = value
        for name, function, without in ways:
            if isinstance(found, dict):
                found = _changed(name, function, found)
                found = without if found is None else found
        out[i] = found
    return out


def _changed(name: str, function: Callable[[dict], Any], row: dict) -> Any:
    try:
        found = function(copy.deepcopy(row) if name == "row()" else row)
    except Exception as error:  # an experiment's code, or a format on a row of another structure, may raise anything
        what = f"raises {type(error).__name__}: {one_line(error)}"
        if isinstance(error, KeyError) and name != "row()":
            what = (
                f"reads {one_line(error)}, which the row does not have (it has: {', '.join(map(repr, row))}); check that the row comes "
                "from the expected data set"
            )
        return Bad(f"error in {name}", f"{name} {what}")
    if found is None or (isinstance(found, dict) and all(isinstance(column, str) for column in found)):
        return found
    return Bad(f"error in {name}", f"{name} gives {short(found)}, not a row (a dict of columns) or None")


def messages(name: str, value: Any) -> Any:
    """Reads a conversation, or a single message, as a list of messages; any other value stays as it is.

    ShareGPT's `from` becomes `role`, its `value` becomes `content`, and its `function_call` becomes the tool calls that its JSON holds.
    OpenAI's `function_call` of a message becomes a tool call. Roles such as `function`, `human` and `User` become `tool` and `user`. A
    content of several text parts becomes one text, with nothing between the parts, as templates write them; templates that take only
    parts get one again (`Template.takes_parts`). A text that holds messages as JSON makes a bad row.
    """
    if is_json(value):
        what = f"{name!r} is {short(value)}, text that holds messages in JSON or Python syntax"
        return Bad(
            "messages as text",
            f"{what}; convert the text to a list, for example with json.loads or ast.literal_eval in row(row) of the experiment",
        )
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        return value
    out: list[Any] = []
    for message in value:
        found = _message(name, message)
        if isinstance(found, Bad):
            return found
        out.append(found)
    return out


def _message(name: str, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    if isinstance(message.get("from"), str) and message.get("role") is None:
        role, rest = (
            SPEAKERS.get(message["from"]),
            {key: x for key, x in message.items() if key not in ("from", "value", "role", "content")},
        )
        if role is None:
            return Bad("unknown speaker", f"a message of {name!r} is from {short(message['from'])}, not from one of {', '.join(SPEAKERS)}")
        if role == "function_call":
            return _call(name, message.get("value"), rest)
        message = {"role": role, "content": message.get("value"), **rest}
    if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
        call = {"type": "function", "function": message["function_call"]}
        message = {key: x for key, x in message.items() if key != "function_call"} | {"tool_calls": [call]}
    if isinstance(role := message.get("role"), str) and role not in ROLES.values():
        message = {**message, "role": ROLES.get(role.lower(), role)}
    if not isinstance(message.get("content"), list):
        return message
    texts = [_text_of(part) for part in message["content"]]
    if None in texts:
        part = message["content"][texts.index(None)]
        what = f"a message of {name!r} has the part {short(part)}, but only text parts are supported"
        return Bad("not text", f"{what}; leave such rows out, or remove the part in row(row) of the experiment")
    return {**message, "content": "".join(map(str, texts))}


def _text_of(part: Any) -> str | None:
    """The text of one part of a message's content; None if the part is an image or the like."""
    if isinstance(part, dict) and part.get("type") in (None, "text", "input_text", "output_text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def _call(name: str, value: Any, rest: Message) -> Message | Bad:
    try:
        calls = json.loads(value)
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in (calls if isinstance(calls, list) else [calls])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return Bad("bad function call", f"a function_call of {name!r} is {short(value)}, not JSON with a name and arguments")
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls], **rest}


def is_json(value: Any) -> bool:
    """Whether a value is a text that holds messages, as JSON or as Python writes them."""
    return isinstance(value, str) and in_text(value) is not None


def in_text(text: str) -> list[Any] | None:
    """The messages that a text holds, as JSON or as Python writes them; [] if only its beginning can be read; None if it holds none.

    A list of other objects with a role, such as {"name": "Ann", "role": "engineer"}, is an ordinary answer and holds none.
    """
    if not MAY_HOLD.match(text):
        return None
    for loads in (json.loads, ast.literal_eval, lambda text: ast.literal_eval(WRITTEN_BY_NUMPY.sub("}, {", text))):
        try:
            with warnings.catch_warnings(action="ignore"):  # warnings of escapes that Python does not know
                found: Any = loads(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict) and not {"role", "from"} & found.keys():
            found = next((value for key, value in found.items() if key in ("messages", "conversations")), None) if len(found) == 1 else None
        found = [found] if isinstance(found, dict) else found
        return (
            found if holds_messages(found) and all({"content", "value", "tool_calls", "function_call"} & m.keys() for m in found) else None
        )
    return [] if BEGINS_AS_MESSAGES.match(text) else None


def holds_messages(value: Any) -> bool:
    """Whether a value is a conversation in any of the shapes that `messages` reads."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def together(prompt: Any, sides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turns prompt and sides into messages if one of them is text and the other messages; any other values stay as they are.

    A text beside messages becomes a user's turn if it is the prompt, and an assistant's turn if it is a side. If the first user message
    of every side is the text of the prompt, the sides contain the prompt, and None is returned for it. Messages of the prompt that all
    sides repeat are kept once, with the system message that the prompt or all sides have.
    """
    if isinstance(prompt, list):
        if prompt and sides and all(_are_messages(value) for value in (prompt, *sides.values())):
            prompt, sides = _once(prompt, sides)
        return prompt, {name: said("assistant", side) if isinstance(side, str) else side for name, side in sides.items()}
    if isinstance(prompt, str) and sides and all(_are_messages(side) for side in sides.values()):
        if all(side[0]["role"] == "assistant" for side in sides.values()):
            return said("user", prompt), dict(sides)
        asked = [next((m.get("content") for m in side if m["role"] == "user"), None) for side in sides.values()]
        if all(text == prompt for text in asked):
            return None, dict(sides)
    return prompt, dict(sides)


def _once(prompt: list[Message], sides: Mapping[str, list[Message]]) -> tuple[list[Message], Mapping[str, list[Message]]]:
    """A prompt, and its sides without the prompt if all repeat it; keys that hold null, which columnar files add, do not count."""
    (system, asked), *split = (_system_and_rest(value) for value in (prompt, *sides.values()))
    first = split[0][0]
    if any(front != first or without_nulls(rest[: len(asked)]) != without_nulls(asked) for front, rest in split):
        return prompt, sides
    if system and first and system != first:
        return prompt, sides
    return [*(system or first), *asked], {name: rest[len(asked) :] for name, (_, rest) in zip(sides, split, strict=True)}


def _system_and_rest(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    count = sum(1 for _ in takewhile(is_system, messages))
    return without_nulls(messages[:count]), messages[count:]


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null in its objects, since columnar files give every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def said(role: str, text: str) -> list[Message]:
    """A conversation of one message with the given role and text."""
    return [{"role": role, "content": text}]


def _are_messages(side: Any) -> bool:
    return isinstance(side, list) and bool(side) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in side)


def is_system(message: Any) -> bool:
    """Whether a message is a system prompt, whose role some programs call "developer"."""
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def with_system(system: Any, prompt: Any, sides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | Bad:
    """Puts the text of a row's system column in front of its messages; texts become conversations, and an empty text adds no message.

    Messages that already begin with the same system prompt keep it once; messages with another system prompt make a bad row.
    """
    if system is not None and not isinstance(system, str):
        return Bad("no system prompt", f"the system prompt is {short(system)}, not text")
    sides = {name: said("assistant", side) if isinstance(side, str) else side for name, side in sides.items()}
    prompt = said("user", prompt) if isinstance(prompt, str) else prompt
    if not system:
        return prompt, sides
    values = {"the prompt": prompt} if prompt is not None else sides
    found = {name: _begun(system, value) if isinstance(value, list) else value for name, value in values.items()}
    if bad := next((value for value in found.values() if isinstance(value, Bad)), None):
        return bad
    return (found["the prompt"], sides) if prompt is not None else (None, found)


def _begun(system: str, messages: list[Any]) -> list[Any] | Bad:
    """The messages with the given system prompt in front; a bad row if they have another one."""
    own = [message for message in messages if is_system(message)]
    if not own:
        return said("system", system) + messages
    if own == messages[:1] and str(own[0].get("content")).strip() == system.strip():
        return messages
    what = f"the row has the system prompt {short(system)} in data.columns.system and {short(own[-1].get('content'))} in its messages"
    return Bad("two system prompts", f"{what}; remove one of the two, for example in row(row) of the experiment")
