"""Weights of examples that depend on the policy; they multiply the values of a loss, without gradient.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, lengths, sequence
from alignax.types import Batch, Metrics, Outputs


def wpo(objective: Loss) -> Loss:
    """Weighted preference optimisation (Zhou et al. 2024, arXiv:2406.11827, eq. 2); the paper's loss is `wpo(dpo())`.

    w(chosen) w(rejected) loss,   log w(y) = mean over tokens of (log pi(y_t) - log sum_v pi(v)^2)

    Pairs that are unlikely under the policy get a small weight, which brings off-policy data nearer to on-policy data. This is the paper's
    sampled alignment: the weight of a token is relative to the expected probability of a token sampled from the policy. The weights are not
    differentiated. If the policy is far from the data, all weights are small, and so is the step.

    Needs a model that gives `log_sum_sq`, as `alignax.forward` does.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> out = Outputs(logps, -logps, log_sum_sq=jnp.array([[[0.0, -1.0], [0.0, -3.0]]]))  # weights 1 and exp(-1)
    >>> value, _ = wpo(dpo(0.1))(out, batch, dpo().normalised(batch))
    >>> print(f"{value:.3f}")
    0.220
    """
    return objective.mapped(lambda term: term._replace(value=_weighed(term)))


def _weighed(term: Term):
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        if out.log_sum_sq is None:
            raise ValueError("wpo needs Outputs.log_sum_sq, which this model leaves out; return also log sum_v pi(v)^2 of every token")
        values, metrics = term.value(out, batch)
        if values.ndim != 1:
            raise ValueError(
                f"wpo weighs pairs, but the term {term.name!r} has values of shape {values.shape}; add this term outside: wpo(..) + .."
            )
        aligned = sequence(out.logps - out.log_sum_sq, batch) / jnp.maximum(lengths(batch), 1.0)  # [B, N]
        return values * jax.lax.stop_gradient(jnp.exp(aligned.sum(axis=1))), metrics

    return value
