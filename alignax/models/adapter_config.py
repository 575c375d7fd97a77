"""PEFT's adapter_config.json: which fields are used, which are ignored, and which are refused.

Ignored fields change nothing that a loaded adapter computes. A field that is neither used nor ignored is refused by name, unless it is
null, false or empty; unknown fields too. Modules are matched by PEFT's own rules, on their full names.
"""

import functools
import math
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from alignax.models import fields, reward
from alignax.text import one_line, short

Json = dict[str, Any]
REMEDY = "merge that adapter with peft first"
# Fields that change nothing that a loaded adapter computes: notes, dropout, and settings of the initialisations (`init_lora_weights`).
HARMLESS = (
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
    "runtime_config", reward.OFFSET,
)  # fmt: skip
# Initialisations that leave the base unchanged. The others (pissa, olora, corda, loftq, lora_ga) subtract the first adapter from the base.
BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
LONGEST, SECONDS = 20_000, 10.0  # the limits: characters of a regular expression, and seconds to match all expressions of a file
HEADS = ("score", "classifier")  # head modules that PEFT names for every sequence classification model

_WHOLE, _NUMBER, _NAMES = (fields.KINDS[kind] for kind in ("a whole number above 0", "a number above 0", "a list of texts"))
_INDEX = fields.KINDS["a whole number, 0 or more"]
_text_or_names = lambda x: type(x) is str or _NAMES(x)
Kind = tuple[str, Callable[[Any], bool]]
_SWITCH: Kind = ("true or false", lambda x: x is None or type(x) is bool)
# Fields that are used: field -> its kind.
KINDS: dict[str, Kind] = {
    "peft_type": ("text", lambda x: type(x) is str),
    "r": ("a whole number above 0", _WHOLE),
    "lora_alpha": ("a number above 0", _NUMBER),
    "rank_pattern": ("whole numbers by module", lambda x: x is None or (type(x) is dict and all(map(_WHOLE, x.values())))),
    "alpha_pattern": ("numbers by module", lambda x: x is None or (type(x) is dict and all(map(_NUMBER, x.values())))),
    "target_modules": ("names of modules, a regular expression, or all-linear", _text_or_names),
    "exclude_modules": ("names of modules or a regular expression", lambda x: x is None or _text_or_names(x)),
    "layers_to_transform": ("indices of layers", lambda x: x is None or _INDEX(x) or (type(x) is list and all(map(_INDEX, x)))),
    "layers_pattern": ("names of lists of layers", lambda x: x is None or _text_or_names(x)),
    "modules_to_save": ("a list of texts", lambda x: x is None or _NAMES(x)),
    "init_lora_weights": ("true, false or text", lambda x: x is None or type(x) in (bool, str)),
    "bias": ("text", lambda x: x is None or type(x) is str),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
}


def check(config: Json, file: Path) -> None:
    """Refuses an adapter config with values of the wrong kind, or with options that are not supported."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {short(config.get('peft_type'))}; only LORA is supported")
    for field, (kind, is_kind) in KINDS.items():
        if not is_kind(config.get(field)):
            raise ValueError(f"{file} has {field} {short(config.get(field))}; it must be {kind}")
    begin = config.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower() not in BEGINNINGS:
        raise ValueError(
            f"{file} has init_lora_weights {short(begin)}, which changes the base as the adapter is loaded; convert it to plain LoRA first "
            "(path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    beyond = {name: value for name, value in config.items() if value and name not in KINDS and name not in HARMLESS}
    if config.get("bias") not in (None, "none"):
        beyond["bias"] = config["bias"]
    if not set(config.get("modules_to_save") or ()) <= set(HEADS):
        beyond["modules_to_save"] = config["modules_to_save"]
    for field, value in beyond.items():
        raise ValueError(f"{file} has {short(field)[1:-1]} {short(value)}, which is not supported; {REMEDY}")
    if config.get("layers_to_transform") is not None and isinstance(config["target_modules"], str):
        raise ValueError(
            f"{file} has layers_to_transform beside target_modules {short(config['target_modules'])}, which PEFT "
            "refuses; name the modules in a list, or leave layers_to_transform out"
        )


def is_reward(config: Json) -> bool:
    """Whether an adapter config belongs to a reward model: a sequence classification model with its head."""
    return config.get("task_type") == "SEQ_CLS" or not set(HEADS).isdisjoint(config.get("modules_to_save") or ())


def chosen(config: Json, modules: Sequence[str], others: Iterable[str], file: Path) -> list[str]:
    """The full names of the modules that a checked adapter config adapts.

    Args:
      config: accepted by `check`.
      modules: full names of the modules that can be adapted, such as `model.layers.0.self_attn.q_proj`.
      others: full names of the model's other modules with weights.
      file: for messages.

    Raises:
      ValueError: for a target among `others`, and if no module is adapted.
    """
    wanted = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = [m for m in modules if not _excluded(config, m, file)]
    else:
        hit = lambda m: not _excluded(config, m, file) and _targeted(config, m, file)
        if odd := next(filter(hit, others), None):
            raise ValueError(f"{file} adapts {odd!r}, which is not supported; {REMEDY}")
        found = list(filter(hit, modules))
    if not found:
        raise ValueError(
            f"{file} adapts nothing of this model: target_modules {short(wanted)} match no module; check that the "
            "adapter belongs to this model"
        )
    return found


def of_each(config: Json, field: str, plain: float, modules: Sequence[str], file: Path) -> dict[str, Any]:
    """Each adapted module's rank or alpha, by full name.

    As in PEFT, the first key of `field` (`rank_pattern` or `alpha_pattern`) that matches the end of the name decides; else `plain`.

    Raises:
      ValueError: for a key that matches no adapted module.
    """
    patterns = {key: _whole(rf"(.*\.)?({key})", field, file) for key in config.get(field) or {}}
    for key, pattern in patterns.items():
        if not any(map(pattern, modules)):
            raise ValueError(f"{file} has {field} for {short(key)}, which matches no adapted module, such as {modules[0]}; correct the key")
    own = lambda m: next((config[field][key] for key, pattern in patterns.items() if pattern(m)), plain)
    return {m: own(m) for m in modules}


def scale(config: Json, rank: int, alpha: float) -> float:
    """The factor s that multiplies the product A B: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _excluded(config: Json, module: str, file: Path) -> bool:
    """Whether PEFT excludes a module before it looks at `target_modules`."""
    names = config.get("exclude_modules") or []
    if isinstance(names, str):
        return _whole(names, "exclude_modules", file)(module)
    saved = config.get("modules_to_save") or []
    return _ends(module, names) or any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in saved)


def _targeted(config: Json, module: str, file: Path) -> bool:
    """Whether `target_modules` and `layers_to_transform` select a module."""
    wanted, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(wanted, str):
        return _whole(wanted, "target_modules", file)(module)
    if module in wanted or layers in (None, []):
        return _ends(module, wanted)
    lists = config.get("layers_pattern") or r"[^.]*"
    for name in [lists] if isinstance(lists, str) else lists:
        if at := _compiled(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", "layers_pattern", file).match(module):
            return _ends(module, wanted) and int(at["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _ends(module: str, names: Sequence[str]) -> bool:
    """Whether a module's full name is one of the names, or ends with a dot and one of them."""
    return any(module == name or module.endswith("." + name) for name in names)


def in_time(match: Callable[[], Any], file: Path) -> Any:
    """Calls a function that matches the regular expressions of a file, under a time limit, and returns its result.

    Some expressions make `re` backtrack for years. Only the main thread receives the timer's signal; other threads have no limit.

    Raises:
      ValueError: if matching takes more than `SECONDS`.
    """
    if threading.current_thread() is not threading.main_thread():
        return match()

    def leave(*_: Any) -> None:
        raise ValueError(
            f"{file} has a regular expression that takes over {SECONDS:g} s to match the modules of this model; write their names plainly"
        )

    old = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return match()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@functools.lru_cache(maxsize=64)
def _whole(pattern: str, field: str, file: Path) -> Callable[[str], bool]:
    """Compiles a regular expression to a test of whether it matches a module's full name."""
    compiled = _compiled(pattern, field, file)
    return lambda module: bool(compiled.fullmatch(module))


def _compiled(pattern: str, field: str, file: Path) -> re.Pattern[str]:
    """Compiles a regular expression of a config field."""
    if len(pattern) > LONGEST:
        raise ValueError(f"{file} has {field} with a regular expression of {len(pattern):,} characters; at most {LONGEST:,} are read")
    try:
        with warnings.catch_warnings(action="ignore"):  # `re` warns of valid but odd expressions
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"{file} has {field} with a regular expression that cannot be read ({one_line(e)}); correct it") from e
