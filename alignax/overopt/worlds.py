"""What a world is to the laboratory: responses that K reward models and a gold reward have scored, and policies in training.

Every world makes its own reward models from preferences that the gold reward labels, and only the laboratory compares. A world is
functions of seeds; a seed is a whole experiment: another gold reward, other data, other models.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alignax.averages import Average
from alignax.config import BadInput
from alignax.experience import Experience
from alignax.experience.ensembles import Aggregate
from alignax.losses import Loss
from alignax.types import Model, TrainState


class Scored(NamedTuple):
    """Responses of the initial policy, as the reward models of one seed score them. Gold has mean 0 and standard deviation 1 there."""

    gold: np.ndarray  # [P, N]
    members: np.ndarray  # [K, P, N]
    margins: np.ndarray  # [K, H] of held-out pairs: score of the response that gold prefers less that of the other
    lengths: np.ndarray | None  # [P, N] tokens; None where responses have none
    show: Callable[[int, int], tuple[str, str]]  # p, i -> texts of a prompt and of its i-th response


class Trajectory(NamedTuple):
    """A policy of one seed in training, at each of E evaluations."""

    steps: np.ndarray  # [E]
    values: dict[str, np.ndarray]  # quantity -> [E]: "gold" and "kl" (to the initial policy, nats), "proxy", and others


class Method(NamedTuple):
    """An online method, as an experiment file has it: a loss, an experience, averages; a run for each of its coefficients."""

    family: str  # the section of the report that it is in
    objective: str  # which of that family it is
    proxy: Aggregate  # of the scores of its reward models: what is measured as "proxy"
    loss: Callable[[Any], Loss]  # of a coefficient, which is traced
    experience: Callable[[Any, Model, Model], Experience]  # of a coefficient, the reference and the reward models
    coefficients: tuple[float | None, ...] = (None,)  # None: it has none, and is given 0
    symbol: str = "β"  # of the coefficient
    members: int | None = None  # reward models that it is given, the first ones; None: all
    averages: Mapping[str, Average] = {}  # see alignax.averages
    critic: bool = False  # whether the policy has one
    over_steps: tuple[str, ...] = ()  # quantities that are drawn over steps too; "score 1" is the mean score of the first reward model


class Optimum(NamedTuple):
    """The exact optima of a reward under a penalty, an evaluation for each coefficient: what training that objective goes towards."""

    family: str
    objective: str
    setting: str  # which penalty
    proxy: Aggregate
    solution: Callable[[Any, Any], Any]  # rewards [M] of equally likely responses, a coefficient -> probabilities [M]
    coefficients: tuple[float, ...]
    members: int | None = None


class Online(NamedTuple):
    """Online training in a world."""

    learn: Callable[[Sequence[int], Method], Iterable[list[Trajectory]]]  # for each coefficient trajectories of every seed
    solve: Callable[[Sequence[int], Optimum], list[Trajectory]]  # of every seed; the steps are the coefficients


class World(NamedTuple):
    """Where the laboratory measures."""

    score: Callable[[Sequence[int]], Iterable[Scored]]  # seeds -> trains the reward models of each; one Scored a seed
    align: Callable[[Sequence[int], Loss], Iterable[Trajectory]] | None  # trains a policy of each seed; None: no direct alignment here
    online: Online | None = None


def check_varies(mean: float, std: float) -> None:
    """Refuses a gold reward under which nothing can be measured, given its mean and standard deviation under the initial policy."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise BadInput(f"the gold reward has mean {mean} and standard deviation {std} under the initial policy; it must be finite")
    if std <= 1e-6 * max(abs(mean), 1.0):
        raise BadInput(f"the gold reward is {mean:g} for every response of the initial policy; it must vary, or nothing can be measured")


def check_ranges(config: Any, ranges: Sequence[tuple[str, float, float]]) -> None:
    """Refuses fields of a config, each "group.name", outside the lowest and the highest of what they may be."""
    for field, low, high in ranges:
        group, name = field.split(".")
        if not low <= config[group][name] <= high:
            raise BadInput(f"config field {field!r} is {config[group][name]}; it must be in {low:g} ... {high:g}")


def check_sizes(config: Any) -> None:
    """Refuses a best-of-n of more responses than there are."""
    if (most := max(config.best_of_n.n, default=1)) > config.world.responses:
        raise BadInput(f"best of n = {most} of {config.world.responses} responses; lower best_of_n.n, or raise world.responses to {most}")


def check_trained(state: TrainState) -> None:
    """Stops where a step, of one model or of several, was not finite: what such a model says is no measurement."""
    if skipped := int(jnp.sum(state.skipped)):
        raise FloatingPointError(f"{skipped} training steps of {state.skipped.size} models were not finite; lower the learning rate")


def margins(gold: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Margins [K, H] of the pairs that neighbouring responses to a prompt make, from gold [P, N] and scores [K, P, N]; ties are no pairs.

    Raises:
      BadInput: where every pair is a tie.
    """
    even = gold.shape[1] // 2 * 2
    better = np.sign(gold[:, 0:even:2] - gold[:, 1:even:2])  # [P, N / 2]
    if not (pairs := np.isin(better, (-1, 1))).any():
        raise BadInput("no two neighbouring responses to a prompt differ in gold reward; it must vary, or sample more responses")
    return ((members[:, :, 0:even:2] - members[:, :, 1:even:2]) * better)[:, pairs]
