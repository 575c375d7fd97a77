"""Averages of the parameters, carried beside them: functions `State -> State` between steps.

An experiment file names them: `averages(config) -> {"ema": ema(0.999)}`. The average called "reference" is what experience is given
as its reference, which then moves (TR-DPO); online, the one called "proposal" is what samples (see `adopt_if_better`). Others are there to
be evaluated and exported (`eval.params`, `export.params`).

A reset also moves the parameters: `averages(config) -> elastic_reset(0.995, every=17)`, which are two averages by name.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from alignax.models.reward import CRITIC, VALUE
from alignax.types import Params, TrainState

Average = Callable[[Params, Params, jax.Array], Params]  # (average, params, steps taken) -> average
INITIAL = "initial"  # the average that an elastic reset keeps the initial parameters as
PROPOSAL = "proposal"  # the average that rollouts are sampled from, where there is one


def ema(decay: float = 0.999) -> Average:
    """Exponential moving average: a <- decay a + (1 - decay) params, from the initial parameters on.

    Args:
      decay: in [0, 1); it remembers about 1 / (1 - decay) steps.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1), 0.999 say")
    return _ema(decay)


def _ema(decay: float) -> Average:
    return lambda average, params, step: _towards(average, params, jnp.float32(1 - decay))


def swa(start: int = 0, every: int = 1) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407).

    The uniform average of the parameters after step `start` and each `every`-th step from there. Until the first of them it is the
    initial parameters.
    """
    _check_every(every)

    def update(average: Params, params: Params, step: jax.Array) -> Params:
        since = step - max(start, 1)
        return _towards(average, params, _due(since, every) / (jnp.maximum(since, 0) // every + 1))

    return update


def sync(alpha: float = 0.6, every: int = 512) -> Average:
    """Trust-region update of a reference, TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656).

    Every so many steps a <- alpha params + (1 - alpha) a.

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
    """An average by which the state is changed every so many steps."""

    rule: Average
    every: int  # steps
    turn: Callable[[TrainState, str, jax.Array], TrainState]  # of the state, the average's name, and whether it is due, bool []

    def __call__(self, average: Params, params: Params, step: jax.Array) -> Params:
        """The average after a step, as the rule has it."""
        return self.rule(average, params, step)

    def after(self, state: TrainState, name: str) -> TrainState:
        """The state after all averages have been brought up to date: as it is, or changed."""
        return self.turn(state, name, _due(state.step, self.every) == 1)


def still(average: Params, params: Params, step: jax.Array) -> Params:
    """The rule of an average that is only changed by turns."""
    return average


def chosen(which: jax.Array, one: Params, other: Params) -> Params:
    """One tree of parameters or the other."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)


def elastic_reset(decay: float = 0.995, every: int = 17, name: str = "ema") -> dict[str, Average]:
    """Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551): against drift, without a KL penalty or beside one.

    ema <- decay ema + (1 - decay) params after each step;  after every `every`-th  params <- ema, then ema <- initial parameters

    Optimizer moments stay, and so does a critic. A reset keeps 1 - decay^every of what was learnt since the last one: 8 % of the
    defaults, which are the authors' for IMDB; 99.5 % of 0.995 and 1040, theirs for StackLLaMA. Steps are those of the optimizer; their code
    averages once an iteration, which may be many of them, or once an epoch on it.

    Args:
      decay: in [0, 1]; 0 averages nothing, so a reset does nothing; with 1 each reset is to the initial parameters.
      every: steps between resets, online a multiple of those on a rollout.
      name: of the average. As "reference" it is the KL's reference too, as in the authors' code for IMDB.

    Returns:
      Two averages, to be put beside others with `|`: this one and "initial", which stands still.
    """
    if name == INITIAL:
        raise ValueError(f"the average of an elastic reset is called {name!r}, which is where it goes back to; give it another name")
    return {name: _reset(decay, every, INITIAL), INITIAL: still}


def reset_to_average(decay: float = 0.995, every: int = 17) -> Average:
    """Elastic Reset without its second half, an ablation: every so many steps params <- ema, and the average goes on from there."""
    return _reset(decay, every, None)


def _reset(decay: float, every: int, home: str | None) -> Turning:
    """The policy goes to this average, and the average to the one that is its home, if it has one."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1], 0.995 say")

    def turn(state: TrainState, name: str, due: jax.Array) -> TrainState:
        average = state.averages[name]
        params = jax.tree_util.tree_map_with_path(lambda path, a, p: p if _is_value(path) else jnp.where(due, a, p), average, state.params)
        averages = state.averages if home is None else state.averages | {name: chosen(due, state.averages[home], average)}
        return dataclasses.replace(state, params=params, averages=averages)

    return turning(_ema(decay), every, turn)


def turning(rule: Average, every: int, turn: Callable[[TrainState, str, jax.Array], TrainState]) -> Turning:
    """See `Turning`; `every` is a number of steps, online a multiple of those on a rollout."""
    _check_every(every)
    return Turning(rule, every, turn)


def averaged(rules: Mapping[str, Average]) -> Callable[[TrainState], TrainState]:
    """The function `State -> State` that brings every average up to date after a step, and then takes the turns that are due."""

    def update(state: TrainState) -> TrainState:
        new = {name: rule(state.averages[name], state.params, state.step) for name, rule in rules.items()}
        state = dataclasses.replace(state, averages=new)
        for name, rule in rules.items():
            state = rule.after(state, name) if isinstance(rule, Turning) else state
        return state

    return update


def _is_value(path: tuple) -> bool:
    """Whether a leaf is a critic's: it goes on with the values that it has learnt."""
    name = lambda key: jax.tree_util.keystr(key, simple=True)
    return name(path[-1:]) == VALUE or name(path[:1]) == CRITIC


def _towards(average: Params, params: Params, share: jax.Array) -> Params:
    """average + share (params - average); exactly the parameters at share 1, and the average untouched at 0."""
    # Not a + share (p - a): that rounds, so a hard update would not be the policy bit for bit.
    return jax.tree.map(lambda a, p: jnp.where(share == 1, p, a + share * (p - a)), average, params)


def _due(since: jax.Array, every: int) -> jax.Array:
    """1.0 at steps 0, every, 2 every, ..., else 0.0."""
    return ((since >= 0) & (since % every == 0)).astype(jnp.float32)


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every is {every}; it is a number of steps, at least 1")


__all__ = ["elastic_reset", "ema", "reset_to_average", "swa", "sync"]
