"""Access to config fields by path: setting, listing, and the errors for unknown names and wrong values."""

import ast
import difflib
import math
from collections.abc import Sequence
from typing import Any

from alignax import paths
from alignax.config.defaults import PATHS
from alignax.text import short

MODEL = ("path", "adapters")  # fields of each model in `config.models`


def set_field(config: Any, override: str) -> None:
    """Sets one field of a config from `a.b=value`; the value is a Python literal, or plain text for a text field.

    Raises:
      ValueError: for an unknown field (with the nearest name) and for a value of another type.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"config field {short(override)} has no value; write --config.FIELD=VALUE")
    node, parts = config, path.split(".")
    if parts[:-1] == ["data", "template"]:
        config.data.template[parts[-1]] = _literal(text)
        return
    if parts[0] == "models" and len(parts) == 3:
        if parts[2] not in MODEL:
            raise ValueError(f"config field {short(path)} is unknown; a model has the fields {' and '.join(MODEL)}")
        if parts[1] not in config.models:
            config.models[parts[1]] = {}
        config.models[parts[1]][parts[2]] = text
        return
    for part in parts[:-1]:
        node = node[_known(node, part, path, config)]
        if not hasattr(node, "items"):
            raise ValueError(f"config field {short(path)} is unknown: {short(part)} has no fields")
    name = _known(node, parts[-1], path, config)
    old = node[name]
    if hasattr(old, "items"):
        there = ", ".join(sorted(old)) or f"--config.{path}.NAME=VALUE"
        raise ValueError(f"config field {path!r} is a group; set one of its fields: {there}")
    if isinstance(old, str):
        check_path(path, text)
        node[name] = text
        return
    value = _literal(text.capitalize() if isinstance(old, bool) else text)
    check_range(path, value)
    value = _elements(path, text, value, old) if isinstance(old, tuple) else _as(value, old)
    if type(value) is not type(old):
        raise ValueError(f"config field {path!r} is {short(text)}; it must be {a_kind(old)}, such as {old!r}")
    node[name] = value


def _as(value: Any, like: Any) -> Any:
    """A number as the type of `like` (int or float), if that keeps its value; other values unchanged."""
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(like, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _elements(path: str, text: str, value: Any, old: tuple) -> tuple:
    """The value of a tuple field, from a sequence or a single element; elements have the type of the old ones, text if there are none."""
    alone = not isinstance(value, (tuple, list))
    kinds = {type(x): x for x in old} or {str: ""}
    if kinds.keys() == {int, float}:
        del kinds[int]
    if alone:
        value = (text if str in kinds and not isinstance(value, str) else value,)
    like = next(iter(kinds.values()))
    values = tuple(_as(x, like) for x in value) if len(kinds) == 1 else tuple(value)
    if len(kinds) == 1 and (old or alone) and any(type(x) is not type(like) for x in values):
        raise ValueError(f"config field {path!r} is {short(text)}; it must be {a_kind((like,))}, such as {old!r}")
    for x in values:
        check_range(path, x)
    return values


def _literal(text: str) -> Any:
    """The value of a text that is a Python literal, or true or false; else the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # every error of a text that is no literal
        return text


def _known(node: Any, part: str, path: str, config: Any) -> str:
    if part in node:
        return part
    raise ValueError(f"config field {short(path)} is unknown; the nearest is {nearest(path, list(flat(config)))!r}")


def refusal(group: Any, name: str, place: str) -> str:
    """The message for code that reads or sets a ConfigDict field wrongly; `place` is the path of its group in the config."""
    path = ".".join(filter(None, (place, name)))
    if name not in group:
        likely = difflib.get_close_matches(name, group, 1, 0.8) or [nearest(name, list(flat(group)))]
        return f"config field {path!r} is unknown; the nearest is {'.'.join(filter(None, (place, *likely)))!r}"
    if hasattr(group[name], "items"):
        return f"config field {path!r} is a group; set one of its fields: {', '.join(sorted(group[name]))}"
    return f"config field {path!r} must be {a_kind(group[name])}, such as {group[name]!r}"


def nearest(path: str, fields: Sequence[str]) -> str:
    """The field that a misspelt `path` most likely means, by its spelling or initials (`lr`); of the same group if that exists."""
    group, _, name = path.rpartition(".")
    own = [field for field in fields if field.rpartition(".")[0] == group] if group else []

    def likeness(field: str) -> float:
        initials = "".join(word[0] for word in field.rpartition(".")[2].split("_"))
        return (name == initials) + difflib.SequenceMatcher(None, path, field).ratio()

    return max(own or fields, key=likeness)


def check_path(name: str, value: str) -> None:
    """Refuses a URL that cannot be read, or that a workdir cannot have, in a field that takes a path."""
    if name in PATHS:
        paths.check(value, f"config field {name!r}", hub=name.startswith("data."))
    if name == "workdir" and paths.is_url(value) and not value.startswith("gs://"):
        raise ValueError(f"config field 'workdir' is {short(value)}, but checkpoints go to this machine or to gs:// alone; choose another")


def check_range(name: str, value: Any) -> None:
    """Refuses a number that is not finite, and an integer beyond 32 bits."""
    if type(value) is int and abs(value) >= 2**31 or type(value) is float and not math.isfinite(value):
        raise ValueError(f"config field {name!r} is {short(value)}; use a finite number; a whole number must be below 2^31")


def a_kind(value: Any) -> str:
    """The type of a config value in words, for errors: "a whole number"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if isinstance(value, tuple):
        return f"a list of {names.get(type((*value, '')[0]), 'value').removeprefix('a ')}s"
    return names.get(type(value), f"a {type(value).__name__}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a config as path -> value: {"data.max_length": 512, ...}.

    Raises:
      ValueError: for a field name that is no text or has a dot.
    """
    out = {}
    for name, value in config.items():
        if not isinstance(name, str) or "." in name:
            raise ValueError(f"config field {f'{prefix}{name}'!r} is called {name!r}; the name of a field must be text without a dot")
        out |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return out
