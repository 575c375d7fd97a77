"""Losses as a vector space: a loss is a sum of coefficient x average, an average has values and the weights that they are averaged over.

Weights come from data alone and are normalised once, on the global batch. So a loss and its metrics are plain sums, and the sums over
microbatches, padding rows and data-parallel shards add up exactly. `dpo(beta=0.1) + 0.005 * sft()` is a loss.

A coefficient may be a schedule: `lambda step: dpo() + eta(step) * sft()` is accepted wherever a loss is.

A metric that trains nothing is added like a loss: `dpo() + observe("entropy", lambda out, batch: out.entropy, tokens)`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.config.blame import check_call
from alignax.models.statistics import Statistic, merged
from alignax.types import Batch, Metrics, Outputs

Over = Callable[[Batch], jax.Array]
Value = Callable[[Outputs, Batch], tuple[jax.Array, Metrics]]


class Term(NamedTuple):
    """One average of a loss: its values, and the weights that they are averaged over."""

    name: str
    value: Value  # (Outputs, Batch) -> (values, {metric: values}), each shaped like the weights
    over: Over  # Batch -> weights >= 0, of data only, never of parameters
    averaged: str = ""  # how tokens are averaged, in words; "" for a term whose values are not of tokens
    statistics: tuple[Statistic, ...] = ()  # the `Outputs.statistics` that the value reads
    observed: bool = False  # True: only a metric, whose coefficient has no effect, see `observe`


@dataclasses.dataclass(frozen=True, repr=False)
class Loss:
    """A weighted sum of averages: losses add, subtract, and scale by numbers from either side; the repr is the formula.

    >>> from alignax.losses import dpo, sft
    >>> dpo(beta=0.1) + 0.01 * sft()
    dpo + 0.01 * sft
    >>> sum([dpo(), sft() / 4]) - dpo()
    dpo + 0.25 * sft - dpo_2
    """

    terms: tuple[tuple[Any, Term], ...]

    __array_ufunc__ = None  # makes a numpy array on the left leave the product to `__rmul__`

    def __add__(self, other: Any) -> "Loss":
        """The sum of two losses; a term whose name is taken is renamed to name_2, so that each term has a metric of its own.

        Raises:
          TypeError: for a number, since a constant has no gradient.
        """
        if not isinstance(other, Loss):
            raise TypeError(f"{other!r} is added to the loss {self!r}: a constant has no gradient; add a loss, such as 0.1 * sft()")
        terms = list(self.terms)
        for coefficient, term in other.terms:
            taken = {t.name for _, t in terms}
            names = itertools.chain([term.name], (f"{term.name}_{n}" for n in itertools.count(2)))
            terms.append((coefficient, term._replace(name=next(name for name in names if name not in taken))))
        return Loss(tuple(terms))

    def __radd__(self, other: Any) -> "Loss":
        """The loss itself if `other` is 0, which `sum` begins with; else the sum."""
        return self if isinstance(other, int) and other == 0 else self + other

    def __mul__(self, coefficient: Any) -> "Loss":
        """The loss times a scalar.

        Raises:
          TypeError: for another loss.
        """
        if isinstance(coefficient, Loss):
            raise TypeError(f"the losses {self!r} and {coefficient!r} are multiplied; multiply a loss only by a number")
        return Loss(tuple((coefficient * c, term) for c, term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Loss":
        """The loss divided by a scalar."""
        return self * (1 / divisor)

    def __neg__(self) -> "Loss":
        """The loss with the opposite sign."""
        return self * -1

    def __sub__(self, other: Any) -> "Loss":
        """The difference of two losses."""
        return self + (-other if isinstance(other, Loss) else other)

    def __rsub__(self, other: Any) -> "Loss":
        """The difference of two losses; a TypeError for anything else."""
        return -self + other

    def __repr__(self) -> str:
        """The formula of the loss: coefficients and names of terms."""
        shown = (f"observe({term.name})" if term.observed else _shown(c) + term.name for c, term in self.terms)
        return " + ".join(shown).replace("+ -", "- ")

    def trained(self) -> "Loss":
        """The loss without its observed terms."""
        return Loss(tuple((c, term) for c, term in self.terms if not term.observed))

    def mapped(self, change: Callable[[Term], Term]) -> "Loss":
        """The loss with `change` applied to each term; observed terms stay as they are."""
        return Loss(tuple((c, term if term.observed else change(term)) for c, term in self.terms))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that the terms of the loss read; the forward pass computes them."""
        return merged(*(term.statistics for _, term in self.terms))

    def weights(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The weights of each term, not normalised: one array for each term, shaped like its values."""
        return tuple(term.over(batch).astype(jnp.float32) for _, term in self.terms)

    def normalised(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The weights of each term, normalised to sum 1 over the batch, which must be the global one (sum 0 where all are 0)."""
        return tuple(w / jnp.where((total := w.sum()) > 0, total, 1.0) for w in self.weights(batch))

    @jax.named_scope("loss")
    def __call__(self, out: Outputs, batch: Batch, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, Metrics]:
        """The loss [] and metrics [] of a part of the batch, as weighted sums: the sums of the parts add up to those of the whole batch.

        Metrics are averaged like their term. If two terms report the same metric, the later term's is kept.

        Args:
          out: the outputs of the forward pass on the part.
          batch: the part.
          weights: the part's rows of `normalised(global batch)`.
        """
        loss, metrics = jnp.zeros(()), {}
        for (coefficient, term), w in zip(self.terms, weights, strict=True):
            result = term.value(out, batch)
            if not isinstance(result, tuple) or len(result) != 2 or not _named(result[1]):
                raise ValueError(f"the value of loss {term.name!r} is {type(result).__name__}; return (values, {{metric: values}})")
            values, extra = result
            if jnp.shape(values) != w.shape:
                raise ValueError(
                    f"values of loss {term.name!r} have shape {jnp.shape(values)}, but its weights have {w.shape}; the shapes must be equal"
                )
            if odd := [name for name, x in extra.items() if jnp.shape(x) != w.shape]:
                shape = jnp.shape(extra[odd[0]])
                raise ValueError(
                    f"metric {odd[0]!r} of loss {term.name!r} has shape {shape}, but the weights have {w.shape}; the shapes must be equal"
                )
            average = weighted_sum(values, w)
            if term.observed:
                metrics[term.name] = average
                continue
            loss += coefficient * average
            metrics |= {name: weighted_sum(jax.lax.stop_gradient(x), w) for name, x in extra.items()}
            metrics["loss/" + term.name] = average
        return loss, metrics


def _shown(coefficient: Any) -> str:
    """The text of a coefficient in front of a term; a schedule's coefficient is traced, so its value is not known."""
    try:
        number = float(coefficient)
    except jax.errors.ConcretizationTypeError:
        return "c(step) * "
    return {1.0: "", -1.0: "-"}.get(number, f"{number:.6g} * ")


def _named(values: Any) -> bool:
    """Whether `values` is a mapping whose keys are names."""
    return isinstance(values, Mapping) and all(isinstance(name, str) for name in values)


Objective = Loss | Callable[[jax.Array], Loss]  # a loss, or step -> loss
Objectives = Objective | Mapping[str, Objective]  # or several by name, of batches of their own or of one


def at_step(objective: Objective, step: jax.Array) -> Loss:
    """The loss of an objective at a step."""
    return objective if isinstance(objective, Loss) else objective(step)


def statistics_of(*objectives: Objective) -> tuple[Statistic, ...]:
    """The statistics that the objectives read; the terms of a schedule are the same in every step."""
    return merged(*(at_step(objective, jnp.zeros((), jnp.int32)).statistics for objective in objectives))


def by_name(objective: Objectives, step: jax.Array) -> dict[str, Loss]:
    """The losses of the objectives at a step, by name; the name of a single objective is ""."""
    objectives = objective if isinstance(objective, Mapping) else {"": objective}
    return {name: at_step(own, step) for name, own in objectives.items()}


def make_loss(name: str, value: Value, over: Over | None = None, statistics: tuple[Statistic, ...] = ()) -> Loss:
    """A loss of one term, averaged over the examples unless `over` says otherwise.

    Args:
      name: of the loss; its metric is `loss/<name>`.
      value: (Outputs, Batch) -> (values, {metric: values}), all shaped like the weights.
      over: Batch -> the weights that values and metrics are averaged over.
      statistics: from `alignax.models.statistics`; a run computes them, and the value reads `Outputs.statistics[name]`.

    Raises:
      ValueError: for functions of other arguments, and for a statistic that is not a `Statistic`.
    """
    check_term(name, value, over, statistics)
    return Loss(((1.0, Term(name, value, over or examples, statistics=tuple(statistics))),))


def observe(
    name: str, value: Callable[[Outputs, Batch], jax.Array], over: Over | None = None, statistics: tuple[Statistic, ...] = ()
) -> Loss:
    """A metric that is added to a loss and trains nothing: `grpo() + observe("entropy", lambda out, batch: out.entropy, over)`.

    The metric is averaged like a loss, so microbatches and shards add up exactly. It is not differentiated, a coefficient of the loss does
    not change it, and no step is skipped because it is not finite.

    Args:
      name: of the metric in the log.
      value: (Outputs, Batch) -> values, shaped like the weights.
      over: Batch -> weights, of data only; default: the examples, as in `make_loss`.
      statistics: that the value reads from `Outputs.statistics`, as in `make_loss`.

    Raises:
      ValueError: for functions of other arguments; in the step, for values that are not shaped like the weights.
    """
    check_term(name, value, over, statistics)

    def seen(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        values = value(jax.lax.stop_gradient(out), batch)
        if not hasattr(values, "shape"):
            raise ValueError(f"the function of observe({name!r}, ..) returns {type(values).__name__}; return only the values, as an array")
        return jax.lax.stop_gradient(values), {}

    return Loss(((1.0, Term(name, seen, over or examples, statistics=tuple(statistics), observed=True)),))


def check_term(name: str, value: Any, over: Any, statistics: Sequence[Any]) -> None:
    """Refuses a term whose name is not a text, whose functions take other arguments, or whose statistics are not statistics."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a loss is called {name!r}; the name must be text, because metrics contain it")
    check_call(value, f"the value of loss {name!r}", "out", "batch")
    check_call(over or examples, f"over of loss {name!r}", "batch")
    if odd := [s for s in statistics if not isinstance(s, Statistic)]:
        raise ValueError(
            f"loss {name!r} reads {odd[0]!r}, which is not a statistic; give a tuple of statistics, for example (min_p(0.02),)"
        )


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """sum(values * weights) of two arrays of one shape: []. A weight of 0 removes its value and gradient, even if they are not finite."""
    if values.shape != weights.shape:
        raise ValueError(f"values have shape {values.shape}, but weights have shape {weights.shape}; the shapes of a term must be equal")
    return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)


def token_logps(out: Outputs) -> jax.Array:
    """The log-probs of the tokens [B, N, T], or an error for a reward model, which has none."""
    if out.logps is None:
        raise ValueError(
            "this loss reads log-probs, but a reward model has none; use bradley_terry(), or set model.num_labels to 0, or "
            "model.language_head to true"
        )
    return out.logps


def sequence(x: jax.Array, batch: Batch) -> jax.Array:
    """The sum over the completion tokens of each response: [B, N, T] -> [B, N]."""
    return jnp.sum(jnp.where(batch["completion_mask"], x, 0.0), axis=-1)


def lengths(batch: Batch) -> jax.Array:
    """The number of completion tokens of each response, EOS included: [B, N] float32."""
    return batch["completion_mask"].sum(axis=-1).astype(jnp.float32)


def examples(batch: Batch) -> jax.Array:
    """The weight of each example: 1 if all of its responses have a completion token, else 0: [B]."""
    return batch["completion_mask"].any(axis=-1).all(axis=-1)


def chosen_examples(batch: Batch) -> jax.Array:
    """The weight of each example: 1 if its first response has a completion token, else 0: [B]."""
    return batch["completion_mask"][:, 0].any(axis=-1)


def chosen_tokens(batch: Batch) -> jax.Array:
    """The weight of each token of the first response: 1 for completion tokens, else 0: [B, T]."""
    return batch["completion_mask"][:, 0]
