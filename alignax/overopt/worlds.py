"""The interface between worlds and the laboratory: responses scored by K reward models and a gold reward, and policies in training.

Every world trains its own reward models on preferences that its gold reward labels; the laboratory compares them. A world is a set of
functions of seeds. Each seed is a whole experiment, with its own gold reward, data and models.
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
    """Responses of the initial policy with the scores of one seed. Gold has mean 0 and standard deviation 1 under the initial policy."""

    gold: np.ndarray  # [P, N] gold rewards of N responses to each of P prompts
    members: np.ndarray  # [K, P, N] scores of each reward model
    margins: np.ndarray  # [K, H] on H held-out pairs: score of the response that gold prefers less score of the other
    lengths: np.ndarray | None  # [P, N] in tokens; None if responses have no tokens
    show: Callable[[int, int], tuple[str, str]]  # p, i -> texts of prompt p and of its i-th response


class Trajectory(NamedTuple):
    """Measurements of one seed's policy in training, at E evaluations."""

    steps: np.ndarray  # [E]
    values: dict[str, np.ndarray]  # quantity -> [E]: "gold" and "kl" (to the initial policy, nats), "proxy", and others


class Method(NamedTuple):
    """An online method, with the parts of an experiment file: a loss, an experience, averages. Each coefficient is a run of its own."""

    family: str  # section of the report
    objective: str  # name within the family
    proxy: Aggregate  # aggregate of the reward models' scores that is measured as "proxy"
    loss: Callable[[Any], Loss]  # traced coefficient -> loss
    experience: Callable[[Any, Model, Model], Experience]  # traced coefficient, reference, reward models -> experience
    coefficients: tuple[float | None, ...] = (None,)  # None: the method has no coefficient, and its functions get 0
    symbol: str = "β"  # symbol of the coefficient in the report
    members: int | None = None  # number of reward models used, the first ones; None: all
    averages: Mapping[str, Average] = {}  # see alignax.averages
    critic: bool = False  # whether the policy has a critic
    over_steps: tuple[str, ...] = ()  # quantities drawn over steps too; "score 1" is the mean score of reward model 1


class Optimum(NamedTuple):
    """The exact optima of a reward under a penalty, one evaluation per coefficient. Training with this penalty moves towards them."""

    family: str
    objective: str
    setting: str  # name of the penalty
    proxy: Aggregate
    solution: Callable[[Any, Any], Any]  # rewards [M] of equally likely responses, a coefficient -> probabilities [M]
    coefficients: tuple[float, ...]
    members: int | None = None


class Online(NamedTuple):
    """The online training of a world."""

    learn: Callable[[Sequence[int], Method], Iterable[list[Trajectory]]]  # for each coefficient, the trajectories of all seeds
    solve: Callable[[Sequence[int], Optimum], list[Trajectory]]  # one trajectory per seed, whose steps are the coefficients


class World(NamedTuple):
    """A world: functions of seeds that train and measure models."""

    score: Callable[[Sequence[int]], Iterable[Scored]]  # trains each seed's reward models; one Scored per seed
    align: Callable[[Sequence[int], Loss], Iterable[Trajectory]] | None  # trains a policy of each seed; None: no direct alignment
    online: Online | None = None


def check_varies(mean: float, std: float) -> None:
    """Refuses a gold reward that is constant or not finite, given its mean and standard deviation under the initial policy."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise BadInput(f"the gold reward has mean {mean} and standard deviation {std} under the initial policy; it must be finite")
    if std <= 1e-6 * max(abs(mean), 1.0):
        raise BadInput(f"the gold reward is {mean:g} for every response of the initial policy; it must vary, or nothing can be measured")


def check_ranges(config: Any, ranges: Sequence[tuple[str, float, float]]) -> None:
    """Refuses config fields outside their range; a range is (field "group.name", lowest, highest)."""
    for field, low, high in ranges:
        group, name = field.split(".")
        if not low <= config[group][name] <= high:
            raise BadInput(f"config field {field!r} is {config[group][name]}; it must be in {low:g} ... {high:g}")


def check_sizes(config: Any) -> None:
    """Refuses a best-of-n with an n above the number of responses."""
    if (most := max(config.best_of_n.n, default=1)) > config.world.responses:
        raise BadInput(f"best of n = {most} of {config.world.responses} responses; lower best_of_n.n, or raise world.responses to {most}")


def check_trained(state: TrainState) -> None:
    """Stops if a training step of one or several models was not finite: such a model gives no valid measurement."""
    if skipped := int(jnp.sum(state.skipped)):
        raise FloatingPointError(f"{skipped} training steps of {state.skipped.size} models were not finite; lower the learning rate")


def margins(gold: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The margins [K, H] of pairs of neighbouring responses to a prompt, from gold [P, N] and scores [K, P, N]. Ties are left out.

    Raises:
      BadInput: if every pair is a tie.
    """
    even = gold.shape[1] // 2 * 2
    better = np.sign(gold[:, 0:even:2] - gold[:, 1:even:2])  # [P, N / 2]
    if not (pairs := np.isin(better, (-1, 1))).any():
        raise BadInput(
            "no two neighbouring responses to a prompt differ in gold reward; let the gold reward vary, or sample more responses"
        )
    return ((members[:, :, 0:even:2] - members[:, :, 1:even:2]) * better)[:, pairs]
