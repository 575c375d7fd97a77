"""Weights that depend on the policy: not differentiated, so they are part of the value, never of the average."""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, lengths, sequence
from alignax.types import Batch, Metrics, Outputs


def wpo(objective: Loss) -> Loss:
    """Weighted preference optimisation (Zhou et al. 2024, arXiv:2406.11827, eq. 2): `wpo(dpo())` is the paper's.

    w(chosen) w(rejected) loss,   log w(y) = mean over tokens of (log pi(y_t) - log sum_v pi(v)^2)

    Pairs that the policy would hardly say weigh little, so that off-policy data is nearer to on-policy data. The paper's sampled
    alignment: the weight of a token is relative to what a sample of the policy is expected to have. Not differentiated.
    Far from the data every weight is small, and so is the step.

    Needs a model that gives `log_sum_sq`, as `alignax.forward` does.
    """
    return objective.mapped(lambda term: term._replace(value=_weighed(term)))


def _weighed(term: Term):
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        if out.log_sum_sq is None:
            raise ValueError("wpo needs Outputs.log_sum_sq, which this model leaves out; return log sum_v pi(v)^2 of every token too")
        values, metrics = term.value(out, batch)
        if values.ndim != 1:
            raise ValueError(f"wpo weighs pairs, the term {term.name!r} has values of shape {values.shape}; add it outside: wpo(..) + ..")
        aligned = sequence(out.logps - out.log_sum_sq, batch) / jnp.maximum(lengths(batch), 1.0)  # [B, N]
        return values * jax.lax.stop_gradient(jnp.exp(aligned.sum(axis=1))), metrics

    return value
