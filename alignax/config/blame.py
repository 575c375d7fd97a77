"""Errors in the code of an experiment file, as one line: the place, the missing name, the known names and the nearest of them."""

import ast
import builtins
import difflib
import inspect
import itertools
import linecache
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from alignax import paths
from alignax.text import one_line

LIKE = 0.6  # similarity of two names, in [0, 1]: from here on one may be a misspelling of the other
PLAIN = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.expr_context)  # nodes that can be evaluated again without side effects
PACKAGE, PYTHON = Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib")).resolve()
PASSES_ON = PACKAGE / "reading.py"  # its code reads batch fields for a caller; the caller is to blame
INSTALLED = ("site-packages", "dist-packages")


class BadInput(ValueError):
    """An error in what the user gave: a config, a file or data; not the failure of a run."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns ValueError, OSError and missing devices into `BadInput`, so that callers can tell bad input from a failed run."""
    try:
        yield
    except BadInput:
        raise
    except (ValueError, OSError) as e:
        raise BadInput(str(e)) from e
    except RuntimeError as e:
        if not str(e).startswith("Unable to initialize backend"):
            raise
        raise BadInput(f"jax finds no device ({one_line(e)}); unset JAX_PLATFORMS, or set it to a platform of this machine") from e


@contextmanager
def blaming(file: Path, always: bool = True, own: bool = False) -> Iterator[None]:
    """Turns an error in the user's code into a `BadInput` of one line with file and line number.

    The user's code is the experiment file and the user's modules that it imports, see `theirs`.

    Args:
      file: the experiment file.
      always: turn errors that passed no line of the user's code, too.
      own: turn only errors that the user's code itself raised, not those of the functions that it calls.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        path = _path(e)
        places = [(_file(tb), tb.tb_lineno) for tb in path if theirs(_file(tb), file)]
        if isinstance(e, SyntaxError) and e.filename and theirs(paths.of(e.filename).resolve(), file):
            places = [(paths.of(e.filename).resolve(), e.lineno)]
        if not (places or always) or (own and not theirs(_file(path[-1]), file)):
            raise
        where, line = places[-1] if places else (file.resolve(), None)
        place = (str(file) if where == file.resolve() else str(where)) + (f", line {line}" if line else "")
        raise BadInput(f"{place}: {explained(e, file)}") from e


def explained(error: Exception, file: Path) -> str:
    """The message of an error, as one line.

    For a missing name it adds the nearest name and the names there are. For arrays that do not fit it adds their shapes in the
    experiment's code.
    """
    path = _path(error)
    known = [tb for tb in path if theirs(_file(tb), file) or (PACKAGE in _file(tb).parents and _file(tb) != PASSES_ON)]
    if known and (missing := _missing(error, known[-1])):
        return missing
    text = str(error).strip()
    if type(error).__module__.startswith("jax"):  # the rest of its message is advice on jax, over many lines
        text = re.split(r"\n\n|\nThe error occurred|\nSee ", text)[0]
    if isinstance(error, AssertionError) and not text:
        text = linecache.getline(path[-1].tb_frame.f_code.co_filename, path[-1].tb_lineno).strip()
    said = one_line(ValueError(text), 500).rstrip(".") if text else ""
    what = said if type(error) is ValueError else f"{type(error).__name__}: {said}".removesuffix(": ")
    inside = [tb for tb in path if theirs(_file(tb), file)]
    if not inside or type(error) not in (TypeError, ValueError, IndexError) or (inside[-1] is path[-1] and type(error) is ValueError):
        return what
    return what + (f". Arrays there: {arrays}" if (arrays := _arrays(inside[-1].tb_frame.f_locals)) else "")


def check_call(function: Any, what: str, *names: str) -> None:
    """Refuses a `function` that cannot be called with positional arguments called `names`; `what` names it in the error.

    Raises:
      ValueError: with the function's own parameters.
    """
    if not callable(function):
        raise ValueError(f"{what} is {function!r}; it must be a function of ({', '.join(names)})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return
    try:
        signature.bind(*names)
    except TypeError:
        raise ValueError(f"{what} takes {_bare(signature)}; it is called with ({', '.join(names)})") from None


def theirs(file: Path, experiment: Path) -> bool:
    """Whether a file is the user's code: the experiment file, or one outside alignax, Python and installed packages."""
    if file == experiment.resolve():
        return True
    return file.is_file() and not {PACKAGE, PYTHON} & set(file.parents) and not set(INSTALLED) & set(file.parts)


def near(name: object, known: Sequence[str], like: float = LIKE) -> str:
    """The known name most similar to `name`, as the end of an error's sentence; empty where the similarity stays below `like`."""
    found = difflib.get_close_matches(str(name), known, 1, like)
    return f"; the nearest is {found[0]!r}" if found else ""


def elsewhere(name: str, known: Sequence[str]) -> str:
    """As `near`, of a name that may be meant to be one of ours: where that is, if `from alignax import *` does not bring it."""
    from alignax.moved import offered

    homes = {other: home for other, home in offered().items() if other not in known}
    if name in homes:
        return f"; it is {homes[name]}.{name}: import it from there"
    nearest = near(name, [*known, *homes])
    return next((f"; the nearest is '{home}.{x}'" for x, home in homes.items() if nearest.endswith(f" {x!r}")), nearest)


def fields(names: Mapping[str, Any]) -> str:
    """Fields as text, each with type and shape: `tokens int32[8, 2, 48], mask bool[8, 2, 48]`."""
    return ", ".join(f"{name} {_described(x)}" for name, x in names.items())


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return "None" if value is None else type(value).__name__


def _inner(value: Any) -> dict[str, Any] | None:
    """The fields of a mapping or a named tuple; None for other values."""
    if isinstance(value, Mapping):
        return {str(name): x for name, x in value.items()}
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    return None if names is None else dict(zip(names, value, strict=True))


def _arrays(names: Mapping[str, Any]) -> str:
    """The arrays among local variables as text, with those inside batches and outputs."""
    parts = []
    for name, value in names.items():
        if (inner := _inner(value)) and any(hasattr(x, "dtype") for x in inner.values()):
            parts.append(f"{name} ({fields(inner)})")
        elif hasattr(value, "dtype"):
            parts.append(f"{name} {_described(value)}")
    return "; ".join(parts)


def _missing(error: Exception, tb: TracebackType) -> str:
    """The message for an error about a missing name: its owner, the nearest name, the names there are; empty for other errors."""
    names = tb.tb_frame.f_globals | tb.tb_frame.f_locals
    if isinstance(error, NameError) and error.name:
        return f"{type(error).__name__}: {one_line(error)}{elsewhere(error.name, [*names, *dir(builtins)])}"
    if isinstance(error, ImportError) and (found := re.match(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))):
        return f"ImportError: {found[0]}{(elsewhere if found[2] == 'alignax' else near)(found[1], dir(sys.modules.get(found[2])))}"
    node = _node(tb)
    if isinstance(error, TypeError) and isinstance(node, ast.Call) and re.search(r"\(\) (got|missing|takes) ", str(error)):
        function = _value(node.func, names)
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return ""
        name = function.__name__ if inspect.isroutine(function) else ast.unparse(node.func)
        return f"TypeError: {one_line(error)}; {name}() takes {_bare(signature)}"
    if not isinstance(node, ast.Attribute | ast.Subscript) or not isinstance(error, AttributeError | LookupError | TypeError):
        return ""
    name = node.attr if isinstance(node, ast.Attribute) else _value(node.slice, names)
    owner, of = _value(node.value, names), ast.unparse(node.value)
    if isinstance(name, str) and hasattr(owner, "lock") and hasattr(owner, "items"):  # a ConfigDict
        from alignax.config.overrides import refusal

        return refusal(owner, name, re.sub(r"\['(\w+)'\]", r".\1", of).partition(".")[2])
    return _absent(name, owner, of, error) if isinstance(error, AttributeError | KeyError) else ""


def _absent(name: Any, owner: Any, of: str, error: Exception) -> str:
    """The message for a `name` that `owner` lacks; `of` is the owner's expression in the code."""
    inner = _inner(owner)
    if inner is not None and name not in inner:
        there = fields(inner) if any(hasattr(x, "dtype") for x in inner.values()) else ", ".join(inner)
        return f"{of} has no field {name!r}{near(name, list(inner))}; it has {there or 'none'}"
    what = f"{type(error).__name__}: {one_line(error)}"
    return what if owner is None else what + near(name, [x for x in dir(owner) if not x.startswith("_")], 0.8)


def _path(error: Exception) -> list[TracebackType]:
    """The traceback entries of an error, from the outermost to the innermost."""
    out, tb = [], error.__traceback__
    while tb is not None:
        out.append(tb)
        tb = tb.tb_next
    return out


def _file(tb: TracebackType) -> Path:
    return paths.of(tb.tb_frame.f_code.co_filename).resolve()


def _node(tb: TracebackType) -> ast.expr | None:
    """The expression that was being evaluated, if it is an attribute, a subscript or a call."""
    code = tb.tb_frame.f_code
    at = next(itertools.islice(code.co_positions(), tb.tb_lasti // 2, None), None)
    linecache.checkcache(code.co_filename)
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == at:
                return node
    return None


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression of names, attributes, subscripts and constants; None for other expressions and on errors."""
    if not all(isinstance(part, PLAIN) for part in ast.walk(node)):
        return None
    try:
        return eval(ast.unparse(node), names)
    except Exception:
        return None


def _bare(signature: inspect.Signature) -> str:
    """The parameters of a signature as text, without annotations."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))
