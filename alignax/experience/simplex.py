"""The simplex search of Nelder and Mead (1965, The Computer Journal 7, 308-313), as a state that is told one objective after another.

    search = first_search(rules, simplex)
    search = told(rules, search, value)         # the objective at search.asked; repeat until search.phase is DONE

The search is pure, so it can run inside a training run, in the carry of an experience (`nm_ppo`), and on the host (`nelder_mead`). It
maximises the objective. Coefficients: reflection 1, expansion 2, contraction 1/2, shrinking 1/2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.losses.pairs import check_positive

FILL, REFLECT, EXPAND, CONTRACT, SORT, DONE = range(6)  # the role of the point that is asked for; SORT asks for none, and is passed at once


class Rules(NamedTuple):
    """The settings of a search; static under jit."""

    most: int = 10  # iterations
    tolerance: float = 0.01  # the search ends when the objectives of the simplex have a smaller standard deviation (ddof 0)
    near: float = 5e-3  # points whose coordinates differ by no more count as the same, which is not asked for again


class Search(NamedTuple):
    """The state of a search. E is the largest number of points that it can ask for."""

    asked: jax.Array  # [K] the point whose objective is wanted; once DONE the best point
    phase: jax.Array  # [] int32
    points: jax.Array  # [K + 1, K] the simplex; between iterations the best point first
    values: jax.Array  # [K + 1] objectives of the points of the simplex
    place: jax.Array  # [] int32: which point of the simplex is asked for, in FILL
    reflected: jax.Array  # [] objective of the reflected point, in EXPAND and CONTRACT
    iterations: jax.Array  # [] int32
    seen: jax.Array  # [E, K] points that were asked for, then infinity
    seen_values: jax.Array  # [E] objectives of the points that were asked for, then -infinity
    evaluations: jax.Array  # [] int32: number of points that were asked for


def first_search(rules: Rules, simplex: Sequence[Sequence[float]]) -> Search:
    """The state of a new search, which asks for the first point of the simplex.

    Args:
      rules: settings of the search.
      simplex: K + 1 points to begin with: [K + 1, K].
    """
    points = jnp.asarray(np.asarray(simplex, np.float64))
    if points.ndim != 2 or points.shape[0] != points.shape[1] + 1:
        raise ValueError(f"the simplex has shape {points.shape}; give K + 1 points of K thresholds")
    check_positive("most", rules.most)
    K, none = points.shape[1], jnp.zeros((), jnp.int32)
    # An iteration asks for at most K + 2 points: a reflected one, one inside, and K of a smaller simplex.
    E = K + 1 + rules.most * (K + 2)
    seen = jnp.full((E, K), jnp.inf, points.dtype)
    values = jnp.zeros(K + 1, points.dtype)
    return Search(points[0], none, points, values, none, values[0], none, seen, jnp.full(E, -jnp.inf, points.dtype), none)


def told(rules: Rules, search: Search, value: jax.Array) -> Search:
    """The search after the objective [] at `asked` is known; it then asks for the next point that is not near one seen before."""
    n = search.evaluations
    seen, values = search.seen.at[n].set(search.asked), search.seen_values.at[n].set(value)
    search = search._replace(seen=seen, seen_values=values, evaluations=n + 1)
    near = lambda s: jnp.abs(s.seen - s.asked[None]).max(axis=1) <= rules.near  # [E]
    moves = (_filled, _reflected, _expanded, _contracted, functools.partial(_sorted, rules))
    move = lambda s: jax.lax.switch(s.phase, moves, s, s.seen_values[jnp.argmax(near(s))])
    return jax.lax.while_loop(lambda s: (s.phase == SORT) | (s.phase != DONE) & near(s).any(), move, search)


def _filled(s: Search, value: jax.Array) -> Search:
    """The search after one more point of a new simplex is known."""
    s, place = s._replace(values=s.values.at[s.place].set(value)), s.place + 1
    more = s._replace(place=place, asked=s.points[jnp.minimum(place, s.values.size - 1)])
    return _either(place < s.values.size, more, s._replace(phase=jnp.int32(SORT)))


def _reflected(s: Search, value: jax.Array) -> Search:
    """After reflection: expand if the point is the best, keep it if it is not the worst, else contract."""
    s, centre = s._replace(reflected=value), _centre(s)
    beyond = s._replace(phase=jnp.int32(EXPAND), asked=centre + 2 * (centre - s.points[-1]))
    inside = (centre + jnp.where(value > s.values[-1], s.asked, s.points[-1])) / 2
    kept = _either(value > s.values[-2], _replaced(s, s.asked, value), s._replace(phase=jnp.int32(CONTRACT), asked=inside))
    return _either(value > s.values[0], beyond, kept)


def _expanded(s: Search, value: jax.Array) -> Search:
    point = jnp.where(value > s.reflected, s.asked, 2 * _centre(s) - s.points[-1])
    return _replaced(s, point, jnp.maximum(value, s.reflected))


def _contracted(s: Search, value: jax.Array) -> Search:
    """After contraction: keep the point if it is better, else shrink the simplex towards the best point."""
    points = (s.points[:1] + s.points) / 2
    shrunk = s._replace(phase=jnp.int32(FILL), points=points, place=jnp.int32(1), asked=points[1])
    return _either(value > jnp.maximum(s.reflected, s.values[-1]), _replaced(s, s.asked, value), shrunk)


def _replaced(s: Search, point: jax.Array, value: jax.Array) -> Search:
    return s._replace(phase=jnp.int32(SORT), points=s.points.at[-1].set(point), values=s.values.at[-1].set(value))


def _sorted(rules: Rules, s: Search, value: jax.Array) -> Search:
    """Sorts the simplex, best point first; then reflects the worst point, or ends the search."""
    order = jnp.argsort(-s.values, stable=True)
    s = s._replace(points=s.points[order], values=s.values[order])
    ends = (s.iterations == rules.most) | (s.values.std() < rules.tolerance)
    over = s._replace(phase=jnp.int32(DONE), asked=s.seen[jnp.argmax(s.seen_values)])
    on = s._replace(phase=jnp.int32(REFLECT), asked=2 * _centre(s) - s.points[-1], iterations=s.iterations + 1)
    return _either(ends, over, on)


def _centre(s: Search) -> jax.Array:
    """The centre of all points of the simplex but the worst: [K]."""
    return s.points[:-1].mean(axis=0)


def _either(condition: jax.Array, this: Search, that: Search) -> Search:
    return jax.tree.map(functools.partial(jnp.where, condition), this, that)


# --- on the host ---


def nelder_mead(
    objective: Callable[[np.ndarray], float],
    simplex: Sequence[Sequence[float]],
    most: int = 10,
    tolerance: float = 0.01,
    near: float = 5e-3,
) -> tuple[np.ndarray, float]:
    """Searches for the thresholds with the largest objective on the host, in float64; each trial calls the objective.

    Typically the objective trains for a while with the given thresholds and returns the gold reward. This is expensive, so of points near
    one another only one is evaluated. `nm_ppo` searches inside one run instead.

    Args:
      objective: thresholds [K] -> the number to maximise.
      simplex: K + 1 thresholds to begin with: [K + 1, K].
      most: largest number of iterations.
      tolerance: the search stops when the objectives of the simplex have a smaller standard deviation.
      near: points whose coordinates differ by no more count as the same.

    Returns:
      The best point that was evaluated [K], and its objective.
    """
    rules = Rules(most, tolerance, near)
    with jax.enable_x64(True):
        search = first_search(rules, simplex)
    while search.phase != DONE:
        value = float(objective(np.array(search.asked)))
        if not np.isfinite(value):
            raise ValueError(
                f"the objective is {value} at thresholds {np.asarray(search.asked)}; the objective must return a finite number"
            )
        with jax.enable_x64(True):
            search = _told(rules, search, jnp.asarray(value))
    return np.array(search.asked), float(np.asarray(search.seen_values).max())


_told = jax.jit(told, static_argnums=0)
