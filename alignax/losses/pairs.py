"""What losses on pairs share: a loss is a function of two rewards, and a reward is beta times a score of a response.

Which function (logistic, hinge, squared, ..) and which score (log-ratio, its mean, its divergence, ..) are independent choices:
`hinge(beta, scores=mean_ratios)` is a loss. A score is a function `(Outputs, Batch) -> [B, 2]`, chosen 0 and rejected 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.config.blame import near
from alignax.losses.algebra import Loss, lengths, make_loss, sequence, token_logps
from alignax.types import Batch, Metrics, Outputs

Scores = Callable[[Outputs, Batch], jax.Array]  # -> [B, 2]
TIE = 1e-6  # reward margins below float32 rounding of a sum of log-probs are ties


def pair_logps(out: Outputs, batch: Batch) -> jax.Array:
    """log pi of each response of a pair, in nats, summed over its tokens: [B, 2]. For losses without a reference."""
    check_pairs(token_logps(out))
    return sequence(out.logps, batch)


def pair_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """log pi/ref of each response of a pair, in nats, summed over its tokens: [B, 2].

    Raises:
      ValueError: for examples that are no pairs, and without reference log-probs.
    """
    check_pairs(token_logps(out))
    return sequence(out.logps - ref_logps(batch), batch)


def mean_logps(out: Outputs, batch: Batch) -> jax.Array:
    """log pi of each response, averaged over its tokens: [B, 2] nats a token."""
    return pair_logps(out, batch) / jnp.maximum(lengths(batch), 1.0)


def mean_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """log pi/ref of each response, averaged over its tokens: [B, 2] nats a token."""
    return pair_ratios(out, batch) / jnp.maximum(lengths(batch), 1.0)


def pairwise(name: str, beta: float, value: Callable[[jax.Array, jax.Array], jax.Array], scores: Scores = pair_ratios) -> Loss:
    """A loss on pairs, averaged over the pairs: value(rewards of chosen, rewards of rejected), rewards = beta * scores.

    Args:
      name: of its metric, `loss/<name>`.
      beta: above 0.
      value: [B], [B] -> [B].
      scores: what a response is rewarded by; default: its summed log-ratio to the reference.
    """
    check_positive("beta", beta)

    def term(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        rewards = beta * scores(out, batch)  # [B, 2]
        return value(rewards[:, 0], rewards[:, 1]), pair_metrics(rewards, out, batch)

    return make_loss(name, term)


def logistic(z: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def pair_metrics(rewards: jax.Array, out: Outputs, batch: Batch) -> Metrics:
    """The field's metrics of a pair, each [B]; `rewards` [B, 2] are what the loss compares. A tie counts as half right.

    The drifts need `ref_logps`; a loss without a reference reports them only if the batch has it.
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
    """The reference's log-probs [B, N, T], or an error that says where they come from."""
    return field(batch, "ref_logps", 'logps("ref_logps", reference)')


def field(batch: Batch, name: str, experience: str) -> jax.Array:
    """A field that an experience writes, or an error that names it and those that there are."""
    if name == "rewards" and name not in batch and "scores" in batch:
        raise ValueError(
            'the batch has several "scores" of a response and no "rewards"; let experience(..) make one of them, chain(.., mean) say (or '
            "wco, uwo(0.5)), or add up the numbers of reward(..) with rollout.reward_weights"
        )
    if name not in batch:
        there = f"{near(name, list(batch))}; it has {', '.join(batch)}"
        raise ValueError(f'the batch has no "{name}"; let experience(..) return chain(.., {experience}){there}')
    return batch[name]


def of_rollout(batch: Batch, name: str) -> jax.Array:
    """A field that every rollout has, or an error that says so."""
    if name not in batch:
        raise ValueError(f'the batch has no "{name}", which rollouts have; set rollout.samples above 0')
    return batch[name]


def check_pairs(x: jax.Array) -> None:
    """Refuses log-probs or scores of no pairs: jax would clamp the index of the rejected response, and train nothing."""
    if x.shape[1] != 2:
        raise ValueError(f"a preference loss takes pairs, these examples have {x.shape[1]} responses; set data.kind='preference'")


def check_positive(name: str, value: float) -> None:
    """Refuses a coefficient that is not above 0."""
    if isinstance(value, str):
        raise ValueError(f"{name} is the text {value!r}; it must be a number")
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0" + (" (0.1 is usual)" if name == "beta" else ""))


def check_range(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Refuses a value outside [low, high)."""
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; it is {meaning}, in [{low:g}, {high:g})")


def check_smoothing(label_smoothing: float) -> None:
    """Refuses what is no flip probability."""
    check_range("label_smoothing", label_smoothing, 0, 0.5, "a flip probability")
