"""The reward functions of an experiment file: which functions there are, their arguments, and the names of their numbers.

`reward` gives one number for each completion, or several numbers with the names `rollout.reward_names`; or it is a list of functions
that give one number each. Several numbers are the field `scores` [B, N, K], like the scores of an ensemble of reward models.
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

# Arguments that reward functions may ask for beside columns of the data and models.
GIVEN = ("prompts", "completions", "completion_ids", "raw_completions", "logprobs", "config")
ELSEWHERE = {  # further arguments that TRL's trainers give reward functions, with what to do instead
    "trainer_state": "a reward depends on the completion alone; let loss(config) or experience(..) change with the step",
    "log_metric": "return the number with the reward: name it in rollout.reward_names, with the weight 0 in rollout.reward_weights",
    "log_extra": "rollouts.jsonl and samples.jsonl have each completion with its numbers (log.rollouts, eval.samples)",
    "environments": "completions are texts, and no tools are called",
}
HELD = ("reference", "ensemble")  # models that reward functions may ask for beside those of `config.models`, as experiences do
NAME = re.compile(r"[\w.-]+")  # the name of a number, which becomes part of a metric's name


class Functions(NamedTuple):
    """The functions behind `reward`, `gold` or `metrics` of an experiment, with the names and weights of their numbers."""

    hook: str  # "reward", "gold" or "metrics"
    listed: bool  # whether the experiment has a list of functions, which give one number each
    each: tuple[Callable, ...]
    names: tuple[str, ...]  # names of a completion's numbers; (): a single number
    weights: tuple[float, ...]  # weights of the numbers in their sum `rewards`; (): an experience combines the numbers instead


class Parameters(NamedTuple):
    """The arguments of a reward function."""

    positional: bool  # whether prompts and completions are passed by position
    named: tuple[str, ...]  # arguments passed by name: names of `GIVEN`, columns of the data, models
    missing: tuple[str, ...]  # parameters without a default that nothing can fill


def functions_of(experiment: Experiment, hook: str = "reward") -> Functions | None:
    """The functions of `reward`, `gold` or `metrics` of an experiment; None if it has none."""
    given, c = getattr(experiment, hook), experiment.config.rollout
    if given is None:
        return None
    listed = not callable(given)
    each = tuple(given) if listed else (given,)
    names = () if hook != "reward" else c.reward_names or (tuple(map(title, each)) if listed else ())
    weights = (c.reward_weights or (1.0,) * len(names) * listed) if names else (1.0,)
    return Functions(hook, listed, each, names, weights)


def names_of(experiment: Experiment) -> tuple[str, ...]:
    """The names of the numbers that `reward` gives for a completion; () if it gives a single number, or without `reward`."""
    functions = functions_of(experiment)
    return () if functions is None else functions.names


def reward_fields(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """The fields of a rollout that reward functions write, each with the axes of its shape after [B, N]."""
    fields: dict[str, tuple[int, ...]] = {}
    if functions := functions_of(experiment):
        fields |= {"rewards": ()} if functions.weights else {}
        fields |= {"scores": (len(functions.names),)} if functions.names else {}
    return fields | ({} if experiment.gold is None else {"gold": ()})


def title(function: Any) -> str:
    """The name of a function, of the function inside a partial, or of a callable object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Any) -> bool:
    """Whether a call of the function returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def parameters(function: Callable, columns: Iterable[str], models: Iterable[str] = ()) -> Parameters:
    """The arguments of a reward function for data with these columns, in a run with these frozen models.

    The first two parameters are prompts and completions, whatever their names. All arguments go by name instead if `completions` is not
    the second parameter but another one, if the first is a column and the second `completions`, or if one of the two has the name of a
    model or of another argument of `GIVEN`. Further parameters are columns, models, or names of `GIVEN`. A parameter with a default keeps
    it if there is no such column; `**` takes all remaining columns, but no model.
    """
    try:
        there = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function written in C may have no signature
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


def models_offered(experiment: Experiment) -> tuple[str, ...]:
    """The names of the frozen models that `reward`, `gold` and `metrics` of the experiment may ask for."""
    return (*HELD, *experiment.config.models)


def models_asked(experiment: Experiment) -> tuple[str, ...]:
    """The names of the frozen models that `reward`, `gold` or `metrics` of the experiment ask for."""
    models = models_offered(experiment)
    every = [f for hook in ("reward", "gold", "metrics") if (own := functions_of(experiment, hook)) for f in own.each if callable(f)]
    wanted = {name for function in every for name in parameters(function, (), models).named}
    return tuple(name for name in models if name in wanted)


def check(experiment: Experiment, examples: Mapping[str, Examples]) -> None:
    """Refuses reward functions that are none or that ask for unknown arguments, and names and weights that do not fit the numbers."""
    file = experiment.file
    for functions in filter(None, (functions_of(experiment, hook) for hook in ("reward", "gold", "metrics"))):
        if functions.listed and (functions.hook != "reward" or not functions.each):
            what = (
                f"a list, but {functions.hook} must be a single {'number' if functions.hook == 'gold' else 'function'}"
                if functions.each
                else "an empty list"
            )
            raise ValueError(f"{functions.hook} of {file} is {what}; write one function `def {functions.hook}(prompts, completions)`")
        for function in functions.each:
            if not callable(function):
                raise ValueError(
                    f"{functions.hook} of {file} is a list with a {type(function).__name__}, {short(function)}, which is not a function; "
                    "the list must hold only functions of (prompts, completions)"
                )
            check_columns(title(function) if functions.listed else functions.hook, function, experiment, examples)
    check_names(experiment)


def check_columns(name: str, function: Callable, experiment: Experiment, examples: Mapping[str, Examples]) -> None:
    """Refuses a reward function that asks for columns that the data lacks, or for a name that is a column and something else, too."""
    file, models = experiment.file, models_offered(experiment)
    for split, own in examples.items():
        wanted = parameters(function, own.columns, models)
        if both := [column for column in wanted.named if column in (*GIVEN[2:], *models) and column in own.columns]:
            model = f"is set by models.{both[0]}.path" if both[0] in experiment.config.models else "is one of the run's models"
            what = f"a model of that name {model}" if both[0] in models else "alignax gives every reward function an argument of that name"
            raise ValueError(
                f"{name}() of {file} asks for {both[0]!r}, which is ambiguous: {what}, and data.{split} has a column of that name; rename "
                "the column, for example in row(row)"
            )
        if not wanted.missing:
            continue
        missing = wanted.missing[0]
        if missing in ELSEWHERE:
            raise ValueError(f"{name}() of {file} asks for {missing!r}, which alignax does not have: {ELSEWHERE[missing]}")
        there = ", ".join(own.columns) or "none (set data.kind=prompt)"
        raise ValueError(
            f"{name}() of {file} asks for column {missing!r}, which data.{split} does not "
            f"have{near(missing, [*GIVEN, *models, *own.columns], 0.8)}; it has: {there}. Other possible parameters are "
            f"{', '.join([*GIVEN, *models])}; a parameter with a default may be missing"
        )


def check_names(experiment: Experiment) -> None:
    """Refuses `rollout.reward_names` and `rollout.reward_weights` that do not fit the numbers of `reward`."""
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
            f"rollout.reward_names has {len(names)} names, but reward of {file} is a list of {len(functions.each)} functions; name each "
            "function"
        )
    for name in names:
        if not (isinstance(name, str) and NAME.fullmatch(name)) or names.count(name) > 1:
            what = f"{name!r} twice" if names.count(name) > 1 else f"{name!r}"
            raise ValueError(
                f"{source} gives the name {what}; set rollout.reward_names to different names, one for each number, of letters, digits "
                "and the characters _ . -"
            )
    if weights and len(weights) != len(names):
        raise ValueError(
            f"rollout.reward_weights has {len(weights)} weights for {len(names)} rewards: {', '.join(names)}; give one weight for each"
        )
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise ValueError(f"rollout.reward_weights are {weights}; give a finite number for each of {', '.join(names)}")
    if "ensemble" in asked(experiment.experience):
        raise ValueError(
            f"reward of {file} gives several numbers, {', '.join(names)}, and experience(..) asks for the reward models of reward.path; "
            "both would fill the field `scores`. Leave one of them out, or let reward() return one number"
        )
