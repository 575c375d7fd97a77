"""What a world is to the laboratory: responses that K reward models and a gold reward have scored, and policies in training.

Every world makes its own reward models from preferences that the gold reward labels, and only the laboratory compares. A world is
two functions of seeds; a seed is a whole experiment: another gold reward, other data, other models.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alignax.config import BadInput
from alignax.losses import Loss


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


class World(NamedTuple):
    """Where the laboratory measures."""

    score: Callable[[Sequence[int]], Iterable[Scored]]  # seeds -> trains the reward models of each; one Scored a seed
    align: Callable[[Sequence[int], Loss], Iterable[Trajectory]] | None  # trains a policy of each seed; None: no direct alignment here


def check_varies(mean: float, std: float) -> None:
    """Refuses a gold reward under which nothing can be measured, given its mean and standard deviation under the initial policy."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise BadInput(f"the gold reward has mean {mean} and standard deviation {std} under the initial policy; it must be finite")
    if std <= 1e-6 * max(abs(mean), 1.0):
        raise BadInput(f"the gold reward is {mean:g} for every response of the initial policy; it must vary, or nothing can be measured")
