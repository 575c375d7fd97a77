"""The reward functions of an experiment file: which there are, what each is given, and what its numbers are called.

`reward` gives a number for each completion, or several with names, `rollout.reward_names`; or it is a list of functions that give a number
each. Several numbers are the field `scores` [B, N, K], as those of an ensemble of reward models are.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from alignax.config import Experiment, asked
from alignax.config.blame import near
from alignax.data import Examples
from alignax.text import short

# What reward functions may ask for beside columns.
GIVEN = ("prompts", "completions", "completion_ids", "raw_completions", "logprobs", "config")
ELSEWHERE = {  # what TRL's trainers give reward functions beside these, and what to do without it
    "trainer_state": "a reward depends on the completion alone; let loss(config) or experience(..) change with the step",
    "log_metric": "return that number beside the reward, named in rollout.reward_names, with the weight 0 in rollout.reward_weights",
    "log_extra": "rollouts.jsonl and samples.jsonl have each completion with its numbers (log.rollouts, eval.samples)",
    "environments": "completions are texts, and no tools are called",
}
NAME = re.compile(r"[\w.-]+")  # of a number, which a metric is called after


class Functions(NamedTuple):
    """What `reward` or `gold` of an experiment is made of."""

    hook: str  # "reward", "gold" or "metrics"
    listed: bool  # a list of functions, which give a number each
    each: tuple[Callable, ...]
    names: tuple[str, ...]  # of the numbers of a completion; (): it is one number
    weights: tuple[float, ...]  # of the numbers in `rewards`, their sum; (): an experience makes one of them


class Parameters(NamedTuple):
    """What a reward function is given."""

    positional: bool  # prompts and completions, by their position
    named: tuple[str, ...]  # what it is given by name: of `GIVEN`, and columns of the data
    missing: tuple[str, ...]  # what it asks for and nobody has


def functions_of(experiment: Experiment, hook: str = "reward") -> Functions | None:
    """The functions of `reward` or `gold`; None, where the experiment has none."""
    given, c = getattr(experiment, hook), experiment.config.rollout
    if given is None:
        return None
    listed = not callable(given)
    each = tuple(given) if listed else (given,)
    names = () if hook != "reward" else c.reward_names or (tuple(map(title, each)) if listed else ())
    weights = (c.reward_weights or (1.0,) * len(names) * listed) if names else (1.0,)
    return Functions(hook, listed, each, names, weights)


def names_of(experiment: Experiment) -> tuple[str, ...]:
    """The names of the numbers that `reward` gives a completion; () of one number, and without it."""
    functions = functions_of(experiment)
    return () if functions is None else functions.names


def reward_fields(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """The fields of a rollout that reward functions write, with what their shapes have behind [B, N]."""
    fields: dict[str, tuple[int, ...]] = {}
    if functions := functions_of(experiment):
        fields |= {"rewards": ()} if functions.weights else {}
        fields |= {"scores": (len(functions.names),)} if functions.names else {}
    return fields | ({} if experiment.gold is None else {"gold": ()})


def title(function: Any) -> str:
    """What a function is called, or the class of an object that is called like one; of a partial function the one in it."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Any) -> bool:
    """Whether a call of the function gives a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def parameters(function: Callable, columns: Iterable[str], models: Iterable[str] = ()) -> Parameters:
    """What a reward function is given of data with such columns, in a run with such frozen models.

    The first two parameters are prompts and completions, whatever they are called, unless `completions` stands elsewhere, or one of the
    two is called as something else that is offered: then all go by name. Further ones are columns, models, or of `GIVEN`. One with a
    default keeps that where there is no such column; `**` takes all columns that are left, and no model.
    """
    try:
        there = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return Parameters(True, (), ())
    places = [p.name for p in there if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in there if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    every = any(p.kind == p.VAR_KEYWORD for p in there)
    columns = [name for name in columns if name not in GIVEN]
    by_name = "completions" in [p.name for p in named] or (every and len(there) == 1)
    second = places[1:2] == ["completions"] and (places[0] not in columns or places[0].startswith("prompt"))
    positional = (second or not by_name) and not {*places[:2]} & {*GIVEN[2:], *models}
    if positional:
        named = [p for p in named if p.name not in places[:2]]
    own = [p.name for p in named if p.name in (*GIVEN, *columns, *models)]
    rest = []
    if every:
        taken = {*own, *(places[:2] if positional else ())}
        rest = [name for name in (*(() if positional else GIVEN[:2]), *columns) if name not in taken]
    missing = [p.name for p in named if p.name not in own and p.default is p.empty]
    return Parameters(positional, (*own, *rest), tuple(missing))


def models_asked(experiment: Experiment) -> tuple[str, ...]:
    """The models of `config.models` that `reward`, `gold` or `metrics` of the experiment ask for by name."""
    models = tuple(experiment.config.models)
    every = [f for hook in ("reward", "gold", "metrics") if (own := functions_of(experiment, hook)) for f in own.each if callable(f)]
    wanted = {name for function in every for name in parameters(function, (), models).named}
    return tuple(name for name in models if name in wanted)


def check(experiment: Experiment, examples: Mapping[str, Examples]) -> None:
    """Refuses what are no reward functions, those that ask for what nobody has, and names and weights that do not fit their numbers."""
    file = experiment.file
    for functions in filter(None, (functions_of(experiment, hook) for hook in ("reward", "gold", "metrics"))):
        if functions.listed and (functions.hook != "reward" or not functions.each):
            what = (
                f"a list, and {functions.hook} is one {'number' if functions.hook == 'gold' else 'function'}"
                if functions.each
                else "an empty list"
            )
            raise ValueError(f"{functions.hook} of {file} is {what}; write one function `def {functions.hook}(prompts, completions)`")
        for function in functions.each:
            if not callable(function):
                raise ValueError(
                    f"{functions.hook} of {file} is a list with a {type(function).__name__}, {short(function)}, which is no function; "
                    "let it hold functions (prompts, completions) alone"
                )
            check_columns(title(function) if functions.listed else functions.hook, function, experiment, examples)
    check_names(experiment)


def check_columns(name: str, function: Callable, experiment: Experiment, examples: Mapping[str, Examples]) -> None:
    """Refuses a reward function that asks for columns which the data has not."""
    file, models = experiment.file, tuple(experiment.config.models)
    for split, own in examples.items():
        wanted = parameters(function, own.columns, models)
        if both := [column for column in wanted.named if column in (*GIVEN[2:], *models) and column in own.columns]:
            what = f"is models.{both[0]}.path" if both[0] in models else "every reward function is offered"
            raise ValueError(
                f"{name}() of {file} asks for {both[0]!r}, which {what}, and data.{split} has a column of that name; rename the column, in "
                "row(row) say"
            )
        if not wanted.missing:
            continue
        missing = wanted.missing[0]
        if missing in ELSEWHERE:
            raise ValueError(f"{name}() of {file} asks for {missing!r}, which there is not here: {ELSEWHERE[missing]}")
        there = ", ".join(own.columns) or "none (set data.kind=prompt)"
        raise ValueError(
            f"{name}() of {file} asks for column {missing!r}, which data.{split} has not"
            f"{near(missing, [*GIVEN, *models, *own.columns], 0.8)}; "
            f"it has: {there}. Beside columns there are {', '.join([*GIVEN, *models])}; a parameter with a default is not needed"
        )


def check_names(experiment: Experiment) -> None:
    """Refuses names and weights of numbers that there are not, or not so many."""
    c, file, functions = experiment.config.rollout, experiment.file, functions_of(experiment)
    if functions is None or not functions.names:
        for field, value in (("reward_names", c.reward_names), ("reward_weights", c.reward_weights)):
            if value:
                has = f"there is no reward(..) in {file}" if functions is None else f"reward() of {file} gives one number without a name"
                raise ValueError(f"rollout.{field} is {value}, and {has}; leave it empty, or set rollout.reward_names too")
        return
    names, weights, source = functions.names, functions.weights, "rollout.reward_names" if c.reward_names else f"the list reward of {file}"
    if functions.listed and len(names) != len(functions.each):
        raise ValueError(
            f"rollout.reward_names are {len(names)}, and reward of {file} is a list of {len(functions.each)}; give each a name"
        )
    for name in names:
        if not (isinstance(name, str) and NAME.fullmatch(name)) or names.count(name) > 1:
            what = f"{name!r} twice" if names.count(name) > 1 else f"{name!r}"
            raise ValueError(
                f"{source} gives the name {what}; set rollout.reward_names to different names, one for each number, of letters, digits and "
                "any of _ . -"
            )
    if weights and len(weights) != len(names):
        raise ValueError(f"rollout.reward_weights are {len(weights)}, and rewards are {len(names)}: {', '.join(names)}; give one for each")
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise ValueError(f"rollout.reward_weights are {weights}; give a finite number for each of {', '.join(names)}")
    if "ensemble" in asked(experiment.experience):
        raise ValueError(
            f"reward of {file} gives several numbers, {', '.join(names)}, and experience(..) asks for the reward models of reward.path; "
            "both are the field `scores`. Leave one of them out, or let reward() return one number"
        )
