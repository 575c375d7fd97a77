"""Averages of the parameters, carried beside them: functions `State -> State` between steps.

An experiment file names them: `averages(config) -> {"ema": ema(0.999)}`. The average called "reference" is what experience is given
as its reference, which then moves (TR-DPO). Others are there to be evaluated and exported (`eval.params`, `export.params`).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from alignax.types import Params, TrainState

Average = Callable[[Params, Params, jax.Array], Params]  # (average, params, steps taken) -> average


def ema(decay: float = 0.999) -> Average:
    """Exponential moving average: a <- decay a + (1 - decay) params, from the initial parameters on.

    Args:
      decay: in [0, 1); it remembers about 1 / (1 - decay) steps.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1), 0.999 say")
    return lambda average, params, step: _towards(average, params, jnp.float32(1 - decay))


def mean(start: int = 0, every: int = 1) -> Average:
    """Uniform average (Izmailov et al. 2018, arXiv:1803.05407) of the parameters after step `start` and each `every`-th step from there.

    Until the first of them it is the initial parameters.
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


def averaged(rules: Mapping[str, Average]) -> Callable[[TrainState], TrainState]:
    """The function `State -> State` that brings every average up to date after a step."""

    def update(state: TrainState) -> TrainState:
        new = {name: rule(state.averages[name], state.params, state.step) for name, rule in rules.items()}
        return dataclasses.replace(state, averages=new)

    return update


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
