"""The parts of pairwise losses: a loss is a function of two rewards, and a reward is beta times the score of a response.

The function (logistic, hinge, squared, ..) and the score (log-ratio, its mean, its divergence, ..) are independent choices:
`hinge(beta, scores=mean_ratios)` is a loss. A score is a function `(Outputs, Batch) -> [B, 2]`, chosen 0 and rejected 1.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.config.blame import near
from alignax.losses.algebra import Loss, lengths, make_loss, sequence, token_logps
from alignax.types import Batch, Metrics, Outputs

Scores = Callable[[Outputs, Batch], jax.Array]  # -> [B, 2]
TIE = 1e-6  # reward margins below the float32 rounding error of a sum of log-probs are ties


def pair_logps(out: Outputs, batch: Batch) -> jax.Array:
    """The score log pi of each response of a pair, in nats, summed over its tokens: [B, 2]. For losses without a reference."""
    check_pairs(token_logps(out))
    return sequence(out.logps, batch)


def pair_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """The score log pi/ref of each response of a pair, in nats, summed over its tokens: [B, 2].

    Raises:
      ValueError: for examples that are not pairs, and without reference log-probs.
    """
    check_pairs(token_logps(out))
    return sequence(out.logps - ref_logps(batch), batch)


def mean_logps(out: Outputs, batch: Batch) -> jax.Array:
    """The score log pi of each response, averaged over its tokens: [B, 2] nats a token."""
    return pair_logps(out, batch) / jnp.maximum(lengths(batch), 1.0)


def mean_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """The score log pi/ref of each response, averaged over its tokens: [B, 2] nats a token."""
    return pair_ratios(out, batch) / jnp.maximum(lengths(batch), 1.0)


def pairwise(name: str, beta: float, value: Callable[[jax.Array, jax.Array], jax.Array], scores: Scores = pair_ratios) -> Loss:
    """Makes a loss on pairs, value(rewards of chosen, rewards of rejected) with rewards = beta * scores, averaged over the pairs.

    >>> from alignax.losses import pairwise
    >>> pairwise("exponential", 0.1, lambda chosen, rejected: jnp.exp(rejected - chosen)) + 0.1 * sft()
    exponential + 0.1 * sft

    Args:
      name: of the loss; its metric is `loss/<name>`.
      beta: above 0.
      value: [B], [B] -> [B].
      scores: the score of each response, [B, 2]; default: the summed log-ratio to the reference.
    """
    check_positive("beta", beta)

    def term(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        rewards = beta * scores(out, batch)  # [B, 2]
        return value(rewards[:, 0], rewards[:, 1]), pair_metrics(rewards, out, batch)

    return make_loss(name, term)


def logistic(z: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """The logistic loss of margins z with label smoothing e, any shape: -(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def pair_metrics(rewards: jax.Array, out: Outputs, batch: Batch) -> Metrics:
    """The usual metrics of pairs, each [B], from the `rewards` [B, 2] that the loss compares. A tie counts as half right.

    The drifts need `ref_logps`. A loss without a reference reports them only if the batch has that field.
    """
    logps = sequence(out.logps, batch)  # [B, 2]
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (1.0 + jnp.sign(jnp.where(jnp.abs(margins) > TIE, margins, 0.0))),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    if "ref_logps" in batch:
        ref = sequence(batch["ref_logps"], batch)
        metrics["logps/chosen_drift"] = logps[:, 0] - ref[:, 0]  # nats; below 0 the chosen response became less likely
        metrics["logps/rejected_drift"] = logps[:, 1] - ref[:, 1]
    return metrics


def ref_logps(batch: Batch) -> jax.Array:
    """The reference's log-probs [B, N, T], or an error that names the experience that writes them."""
    return field(batch, "ref_logps", 'logps("ref_logps", reference)')


def field(batch: Batch, name: str, experience: str) -> jax.Array:
    """A field that an experience writes, or an error that names the experience and the fields of the batch."""
    if name == "rewards" and name not in batch and "scores" in batch:
        raise ValueError(
            'the batch has several "scores" per response but no "rewards"; let experience(..) combine the scores, for example '
            "with chain(.., mean) (or wco, uwo(0.5)), or add up the numbers of reward(..) with rollout.reward_weights"
        )
    if name not in batch:
        there = f"{near(name, list(batch))}; it has {', '.join(batch)}"
        raise ValueError(f'the batch has no "{name}"; let experience(..) return chain(.., {experience}){there}')
    return batch[name]


def of_rollout(batch: Batch, name: str) -> jax.Array:
    """A field that every rollout has, or an error that says how to get rollouts."""
    if name not in batch:
        raise ValueError(f'the batch has no "{name}", which only rollouts have; set rollout.samples above 0')
    return batch[name]


def check_pairs(x: jax.Array) -> None:
    """Refuses arrays [B, N, ..] of N other than 2: jax would clamp the index of the rejected response, and nothing would be trained."""
    if x.shape[1] != 2:
        raise ValueError(
            f"a preference loss takes pairs, but these examples have {x.shape[1]} responses per prompt; set data.kind='preference', "
            "or, where the run samples the responses, rollout.samples=2"
        )


def check_positive(name: str, value: float) -> None:
    """Refuses a coefficient that is not above 0."""
    if isinstance(value, str):
        raise ValueError(f"{name} is the text {value!r}; it must be a number")
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0" + (" (0.1 is usual)" if name == "beta" else ""))


def check_range(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Refuses a value outside [low, high)."""
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; it must be {meaning}, in [{low:g}, {high:g})")


def check_smoothing(label_smoothing: float) -> None:
    """Refuses a label smoothing outside [0, 0.5)."""
    check_range("label_smoothing", label_smoothing, 0, 0.5, "a flip probability")
