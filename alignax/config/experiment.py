"""Reading and checking of an experiment file.

An experiment file defines `get_config() -> ConfigDict` and `loss(config) -> Loss` (or a function from the step to a Loss). It may also
define `experience(config, reference)`, `reward(prompts, completions)`, `gold(..)` and `metrics(..)` with the arguments of `reward`,
`averages(config)`, `row(row)`, `optimizer(config, schedule)`, `combine(gradients)`, `speaker(config, policy)`, `sampler(config, save)` and
`main(experiment)`; see `Experiment`.
"""

import ast
import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from alignax import paths
from alignax.config.blame import BadInput, blaming, check_call, near, theirs
from alignax.config.defaults import default_config
from alignax.config.overrides import a_kind, check_path, check_range, flat, set_field
from alignax.config.source import imports_from, modules_were, read_source

OFFERED = ("config", "reference", "policy", "ensemble", "prompts")  # parameters of experience(..), beside the names of `config.models`
ALIASES = {
    "policy": "model.path",
    "reference": "reference.path",
    "ensemble": "reward.path",
    "critic": "model.critic",
}  # name in `config.models` -> the field that its path moves to
CALLED = {  # function of an experiment file -> the arguments that a run gives it
    "get_config": (), "averages": ("config",), "main": ("experiment",), "optimizer": ("config", "schedule"), "combine": ("gradients",),
}  # fmt: skip


class Experiment(NamedTuple):
    """An experiment: its config, and the functions that its file defines."""

    file: Path
    config: Any  # ConfigDict
    loss: Callable[[Any], Any]  # config -> Loss, step -> Loss, or losses by name: {"rollouts": .., "pretrain": ..}; `combine`: any names
    experience: Callable[..., Any] | None  # any of config, reference, policy, ensemble (Models), prompts (a count) -> experience
    gold: Callable[..., Sequence[float]] | None  # prompts, completions, by name also columns of the data, config -> gold rewards
    reward: Callable[..., Any] | Sequence[Callable] | None  # arguments of gold -> rewards to train on, see alignax.host.functions
    averages: Callable[[Any], dict[str, Any]] | None  # config -> averages of the parameters by name, see alignax.averages
    main: Callable[["Experiment"], Any] | None  # runs in place of the single run: several stages, a sweep
    row: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None  # raw row of data -> row to read, or None to leave it out
    metrics: Callable[..., dict[str, Sequence[float]]] | None = None  # arguments of reward -> numbers by name, for the log
    optimizer: Callable[..., Any] | None = None  # config, schedule -> optax optimizer, in place of config.optimizer's
    combine: Callable[[dict[str, Any]], Any] | None = None  # gradients by name of loss -> gradient to follow; None: their sum
    speaker: Callable[..., Any] | None = None  # any of config, policy, reference, language models (Speakers) -> Speaker to sample from
    sampler: Callable[..., Any] | None = (
        None  # any of config, tokenizer, ends, save -> (params, prompts, key, n) -> Completions of rollouts
    )


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file and applies overrides such as `data.max_length=160`."""
    file = paths.of(file)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"experiment file {str(file)!r} {what}; give the path of a Python file such as experiments/dpo_hh.py")
    with blaming(file):
        module = load_module(file, file.read_bytes())
    check_hooks(module, file)
    with blaming(file):
        config = module.get_config()
    check_config(config, file)
    check_own_fields(config, module, file)
    for override in overrides:
        set_field(config, override)
    name_models(config)
    check_asked(module, config, file)
    return Experiment(file, config, module.loss, *(hook(module, name) for name in Experiment._fields[3:]))


def hook(module: ModuleType, name: str) -> Any:
    """What an experiment file has under the name of a function that a run calls; a namespace or function of ours of that name is none."""
    found = vars(module).get(name)
    ours = inspect.ismodule(found) and found.__name__ == f"alignax.{name}"
    return None if ours or (inspect.isfunction(found) and found.__module__.startswith("alignax.generate.")) else found


def check_hooks(module: ModuleType, file: Path) -> None:
    """Refuses an experiment file that lacks a needed function, misspells one, or defines one with wrong parameters."""
    for name in ("get_config", "loss"):
        if hook(module, name) is None:
            raise BadInput(f"{file} has no function {name}(){near(name, list(vars(module)))}; see experiments/dpo_hh.py")
    for name in ("experience", "gold", "reward", "metrics", "speaker", "sampler"):
        given = hook(module, name)
        if given is not None and not callable(given) and not isinstance(given, Sequence):
            raise BadInput(f"{name} of {file} is {given!r}; it must be a function")
    for name, parameters in CALLED.items():
        if hook(module, name) is not None:
            check_call(hook(module, name), f"{name}() of {file}", *parameters)
    hooks = ("get_config", *Experiment._fields[2:])
    tree = ast.parse(read_source(file))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list else []
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            if name not in (*hooks, *used) and not name.startswith("_") and (nearest := near(name.lower(), hooks, 0.8)):
                raise BadInput(f"{file} has a function {name}(), which nothing calls{nearest}; a run calls {', '.join(hooks)}")


def name_models(config: Any) -> None:
    """Moves models of `config.models` such as `reference` to their own fields (`ALIASES`), and refuses impossible names and empty paths."""
    for name in list(config.models):
        if name in ("config", "prompts", "base") or not name.isidentifier():
            raise ValueError(f"config.models has a model called {name!r}; choose another name, one that a function parameter can have")
        given = config.models[name]
        if not hasattr(given, "items") or not isinstance(given.get("path", ""), str) or not given.get("path", ""):
            raise ValueError(f"config field 'models.{name}.path' is empty; set it to FOLDER, a Hugging Face model folder")
        for field in ("path", "adapters"):
            paths.check(given.get(field, ""), f"config field 'models.{name}.{field}'")
        if name not in ALIASES:
            continue
        group, _, field = ALIASES[name].partition(".")
        if extra := sorted(set(given) - {"path"}):
            raise ValueError(
                f"config field 'models.{name}.{extra[0]}' is unknown: {name!r} stands for {ALIASES[name]}, which has only a path"
            )
        if config[group][field] not in ("", given.path):
            raise ValueError(f"models.{name}.path is {given.path!r} and {ALIASES[name]} {config[group][field]!r}; leave one of them out")
        config[group][field] = given.path
        del config.models[name]


def check_asked(module: ModuleType, config: Any, file: Path) -> None:
    """Refuses an experience, a loss, a speaker or a sampler with a parameter that no run passes."""
    own = asked(module.loss)[1:]  # without the first parameter, the config under any name
    check_call(module.loss, f"loss() of {file}", "config", *own)
    wants = {
        "experience": (asked(hook(module, "experience")), (*OFFERED, *config.models)),
        "loss": (own, ("reference", "policy", "ensemble", *config.models)),
        "speaker": (asked(hook(module, "speaker")), ("config", "policy", "reference", *config.models)),
        "sampler": (asked(hook(module, "sampler")), ("config", "tokenizer", "ends", "save")),
    }
    for name, (every, offered) in wants.items():
        for wanted in every:
            if wanted not in offered:
                raise BadInput(
                    f"{name}() of {file} asks for {wanted!r}{near(wanted, offered, 0.5)}; a parameter must be one of {', '.join(offered)}"
                )


def load_module(file: Path, source: bytes) -> ModuleType:
    """Runs the source of an experiment file and returns its module; `source` may be older than the file on disk.

    The folders of the experiment, and of the file that a run began from, are appended to `sys.path` for its imports. The module enters
    `sys.modules`, where data classes and child processes look for its definitions.
    """
    module = ModuleType("alignax_experiment_" + file.stem)
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    text = source.decode(errors="replace")
    for folder in (str(file.resolve().parent), imports_from(file, text)):
        if folder not in sys.path and not paths.is_url(folder):
            sys.path.append(folder)
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except ModuleNotFoundError as e:
        path = (e.name or "").replace(".", "/")
        if {f"{path}.py", f"{path}/__init__.py"} & {*(modules_were(text) or ())}:
            where = imports_from(file, text)
            raise BadInput(f"{file} imports {e.name!r}, which was there when the run began and is gone; put it back into {where!r}") from e
        raise
    return module


def check_config(config: Any, file: Path) -> None:
    """Refuses a value that is no config, misspelt top-level fields, and fields of a wrong type, range or path."""
    if not hasattr(config, "lock"):
        raise ValueError(f"get_config() of {file} returns {config!r}; it must return a ConfigDict, such as a changed default_config()")
    known = list(default_config())
    for name in config:
        if name not in known and (likely := near(name, known, 0.8)):
            raise ValueError(f"config field {name!r} of {file} is unknown{likely}")
    fields = flat(config)
    for name, default in flat(default_config()).items():
        if type(value := fields.get(name)) is not type(default):
            raise ValueError(f"config field {name!r} of {file} is {value!r}; it must be {a_kind(default)}, such as {default!r}")
    for name, value in fields.items():
        check_range(name, value)
        check_path(name, value)


def check_own_fields(config: Any, module: ModuleType, file: Path) -> None:
    """Refuses an experiment's own top-level field that the user's code never reads and that resembles a grouped field, such as `lr`."""
    known = flat(default_config())
    leaves = {path.rpartition(".")[2]: path for path in reversed(known)}
    initials = {"".join(word[0] for word in leaf.split("_")): leaf for leaf in leaves if "_" in leaf}
    names = sorted(set(map(str, config)) - set(default_config()))
    own = {name: difflib.get_close_matches(initials.get(name, name), leaves, 1, 0.8) for name in names}
    if not any(own.values()) or hasattr(module, "main"):  # main() may give the config to code that is not seen here
        return
    code = [x.__code__.co_filename for x in vars(module).values() if inspect.isfunction(x)]
    code += [vars(x).get("__file__") or "" for x in vars(module).values() if inspect.ismodule(x)]
    files = {path for path in map(paths.of, code) if theirs(path.resolve(), file)} | {file}
    nodes = [node for path in files for node in ast.walk(ast.parse(read_source(path)))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for name, likely in own.items():
        if likely and name not in read:
            raise BadInput(
                f"config field {name!r} of {file} is unknown, and the experiment reads no field of that name; the nearest field is "
                f"{leaves[likely[0]]!r}"
            )


def asked(experience: Callable | None) -> tuple[str, ...]:
    """The parameters of an experience, except its own with a default; a run holds a reference only if this has it."""
    parameters = () if experience is None else inspect.signature(experience).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(p.name for p in named if p.default is p.empty or p.name in OFFERED)
