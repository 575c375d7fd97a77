"""Averages of the parameters, which training updates after each step by functions `State -> State`.

An experiment file names the averages: `averages(config) -> {"ema": ema(0.999)}`. Two names have a meaning. The average "reference" is the
reference model of the experience, which then moves (TR-DPO). In an online run the average "proposal" samples the rollouts (see
`adopt_if_better`). Averages of other names can be evaluated and exported (`eval.params`, `export.params`).

A reset also changes the parameters: `averages(config) -> elastic_reset(0.995, every=17)` gives two averages by name.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from alignax.models.reward import CRITIC, VALUE
from alignax.types import Params, TrainState

Average = Callable[[Params, Params, jax.Array], Params]  # (average, params, steps taken) -> average
INITIAL = "initial"  # name of the average in which an elastic reset keeps the initial parameters
PROPOSAL = "proposal"  # name of the average that samples the rollouts, if there is one


def ema(decay: float = 0.999) -> Average:
    """Exponential moving average: a <- decay a + (1 - decay) params, from the initial parameters on.

    Args:
      decay: in [0, 1); the average remembers about 1 / (1 - decay) steps.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1), for example 0.999")
    return _ema(decay)


def _ema(decay: float) -> Average:
    return lambda average, params, step: _towards(average, params, jnp.float32(1 - decay))


def swa(start: int = 0, every: int = 1) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407).

    The uniform average of the parameters after step `start` and after each `every`-th step from there. Before the first of
    these steps it equals the initial parameters.
    """
    _check_every(every)

    def update(average: Params, params: Params, step: jax.Array) -> Params:
        since = step - max(start, 1)
        return _towards(average, params, _due(since, every) / (jnp.maximum(since, 0) // every + 1))

    return update


def sync(alpha: float = 0.6, every: int = 512) -> Average:
    """Trust-region update of a reference, TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656).

    Every `every` steps a <- alpha params + (1 - alpha) a.

    Args:
      alpha: in (0, 1]; 1 is the paper's hard update.
      every: steps between updates.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be above 0 and at most 1 (the whole step)")
    _check_every(every)
    return lambda average, params, step: _towards(average, params, alpha * _due(step - every, every))


@dataclasses.dataclass(frozen=True)
class Turning:
    """An average that also changes the training state every `every` steps."""

    rule: Average
    every: int  # steps
    turn: Callable[[TrainState, str, jax.Array], TrainState]  # (state, name of the average, whether a turn is due: bool []) -> state

    def __call__(self, average: Params, params: Params, step: jax.Array) -> Params:
        """The average after a step, by the rule."""
        return self.rule(average, params, step)

    def after(self, state: TrainState, name: str) -> TrainState:
        """The state after its averages were updated: changed where a turn is due, else the same."""
        return self.turn(state, name, _due(state.step, self.every) == 1)


def still(average: Params, params: Params, step: jax.Array) -> Params:
    """The average unchanged: the rule of an average that only turns change."""
    return average


def chosen(which: jax.Array, one: Params, other: Params) -> Params:
    """Selects one of two parameter trees: `one` where `which` is True, else `other`."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)


def elastic_reset(decay: float = 0.995, every: int = 17, name: str = "ema") -> dict[str, Average]:
    """Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551): limits the drift of the policy, with or without a KL penalty.

    ema <- decay ema + (1 - decay) params after each step;  after every `every`-th  params <- ema, then ema <- initial parameters

    A reset leaves the optimizer's moments and a critic as they are. It keeps 1 - decay^every of what was learnt since the last reset: 8 %
    with the defaults, which are the authors' for IMDB; 99.5 % with 0.995 and 1040, the authors' for StackLLaMA. Steps are optimizer steps.
    The authors' code averages once an iteration, which may be many optimizer steps, or once an epoch on the iteration's samples.

    Args:
      decay: in [0, 1]; with 0 a reset does nothing; with 1 each reset goes to the initial parameters.
      every: steps between resets; online a multiple of the steps on a rollout.
      name: of the average. The average "reference" is the KL's reference too, as in the authors' code for IMDB.

    Returns:
      Two averages: `name`, and "initial", which stays at the initial parameters. Combine them with others by `|`.
    """
    if name == INITIAL:
        raise ValueError(
            f"the average of an elastic reset is called {name!r}, which is the name of the initial parameters; choose another name"
        )
    return {name: _reset(decay, every, INITIAL), INITIAL: still}


def reset_to_average(decay: float = 0.995, every: int = 17) -> Average:
    """An ablation of Elastic Reset, without its second half: every `every` steps params <- ema, and the average goes on from there."""
    return _reset(decay, every, None)


def _reset(decay: float, every: int, home: str | None) -> Turning:
    """A turn sets the policy to this average, and this average to the average `home`, unless that is None."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1], for example 0.995")

    def turn(state: TrainState, name: str, due: jax.Array) -> TrainState:
        average = state.averages[name]
        params = jax.tree_util.tree_map_with_path(lambda path, a, p: p if _is_value(path) else jnp.where(due, a, p), average, state.params)
        averages = state.averages if home is None else state.averages | {name: chosen(due, state.averages[home], average)}
        return dataclasses.replace(state, params=params, averages=averages)

    return turning(_ema(decay), every, turn)


def turning(rule: Average, every: int, turn: Callable[[TrainState, str, jax.Array], TrainState]) -> Turning:
    """A `Turning`, with `every` checked: steps between turns, online a multiple of the steps on a rollout."""
    _check_every(every)
    return Turning(rule, every, turn)


def averaged(rules: Mapping[str, Average]) -> Callable[[TrainState], TrainState]:
    """The function `State -> State` that updates every average after a step, and then applies the turns that are due."""

    def update(state: TrainState) -> TrainState:
        new = {name: rule(state.averages[name], state.params, state.step) for name, rule in rules.items()}
        state = dataclasses.replace(state, averages=new)
        for name, rule in rules.items():
            state = rule.after(state, name) if isinstance(rule, Turning) else state
        return state

    return update


def _is_value(path: tuple) -> bool:
    """Whether a leaf belongs to a critic, which a reset leaves as it is."""
    name = lambda key: jax.tree_util.keystr(key, simple=True)
    return name(path[-1:]) == VALUE or name(path[:1]) == CRITIC


def _towards(average: Params, params: Params, share: jax.Array) -> Params:
    """average + share (params - average): exactly the parameters at share 1, exactly the average at share 0."""
    # At share 1 a + share (p - a) would round, and a hard update would not equal the policy bit for bit.
    return jax.tree.map(lambda a, p: jnp.where(share == 1, p, a + share * (p - a)), average, params)


def _due(since: jax.Array, every: int) -> jax.Array:
    """1.0 at steps 0, every, 2 every, ..., else 0.0."""
    return ((since >= 0) & (since % every == 0)).astype(jnp.float32)


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every is {every}; it must be a number of steps, at least 1")


__all__ = ["elastic_reset", "ema", "reset_to_average", "swa", "sync"]
