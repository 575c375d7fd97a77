"""Losses on demonstrations and preference pairs: N = 1 or N = 2, chosen 0 and rejected 1.

Sequence log-probs are sums over the completion tokens, EOS included, unless a docstring says mean.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Over, chosen_examples, chosen_tokens, lengths, loss, sequence
from alignax.types import Batch, Metrics, Outputs

TIE = 1e-6  # reward margins below float32 rounding of a sum of log-probs are ties


def sft(over: Over = chosen_tokens) -> Loss:
    """Supervised fine-tuning on the first response: the average negative log-prob of a completion token.

    -sum_t log pi(y_t | x, y_<t) / (completion tokens of the batch)

    Args:
      over: `chosen_tokens` averages over the tokens of the global batch (every token counts the same); `per_sequence` first over
        the tokens of each response (every response counts the same).
    """
    return loss("sft", lambda out, batch: (-out.logps[:, 0], {"entropy": out.entropy[:, 0]}), over)


def summed_sft() -> Loss:
    """Supervised fine-tuning by whole responses: -log pi(y | x), summed over its tokens, averaged over the examples."""
    return loss("sft", lambda out, batch: (-sequence(out.logps, batch)[:, 0], {}), chosen_examples)


def per_sequence(batch: Batch) -> jax.Array:
    """Weights 1 / length for each completion token of the first response: [B, T]."""
    return chosen_tokens(batch) / jnp.maximum(lengths(batch)[:, :1], 1.0)


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), with cDPO's label smoothing.

    -(1 - e) log sigmoid(z) - e log sigmoid(-z),   z = beta (log pi/ref(chosen) - log pi/ref(rejected))

    Args:
      beta: strength of the KL penalty; rewards are beta * log(pi / ref).
      label_smoothing: e, the probability that a label is flipped, in [0, 0.5) (Mitchell 2023, "A note on DPO with noisy
        preferences"). Its minimum is at z = log((1 - e) / e).

    Needs the batch field `ref_logps`.
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a flip probability, in [0, 0.5)")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        rewards = beta * pair_ratios(out, batch)  # [B, 2]
        z = rewards[:, 0] - rewards[:, 1]
        nll = -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
        return nll, pair_metrics(rewards, out, batch)

    return loss("dpo", value)


def ipo(beta: float = 0.1) -> Loss:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    (h - 1 / (2 beta))^2,   h = log pi/ref(chosen) - log pi/ref(rejected), sums over tokens

    The length-averaged form of some libraries is another loss, with another beta. Needs the batch field `ref_logps`.
    """
    _check_beta(beta)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        ratios = pair_ratios(out, batch)  # [B, 2]
        h = ratios[:, 0] - ratios[:, 1]
        return jnp.square(h - 1 / (2 * beta)), pair_metrics(beta * ratios, out, batch)

    return loss("ipo", value)


def rpo(beta: float = 0.1, eta: float = 0.005) -> Loss:
    """Regularised preference optimisation: DPO and the chosen response's summed NLL (Liu et al. 2024, arXiv:2405.16436).

    dpo(beta) - eta beta log pi(chosen)

    The form of the paper's main experiments (eta 0.005). Not the `rpo_alpha` of other libraries (Pang et al. 2024), whose NLL is
    length-normalised.
    """
    return dpo(beta) + (eta * beta) * summed_sft()


def rpo_token_mean(beta: float = 0.5, eta: float = 0.2) -> Loss:
    """The paper's second form (Liu et al. 2024, arXiv:2405.16436, appendix F): the NLL averaged over each response's tokens.

    dpo(beta) - eta (1 / |y|) log pi(chosen),   averaged over examples
    """
    return dpo(beta) + eta * sft(over=per_sequence)


def pair_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """log pi/ref of each response of a pair, in nats, summed over its tokens: [B, 2].

    Raises:
      ValueError: for examples that are no pairs, and without reference log-probs.
    """
    if out.logps.shape[1] != 2:  # jax would clamp the index of the rejected response, and train nothing
        raise ValueError(f"a preference loss takes pairs, these examples have {out.logps.shape[1]} responses; set data.kind='preference'")
    if "ref_logps" not in batch:
        raise ValueError('the batch has no "ref_logps"; let experience(config, reference) return chain(logps("ref_logps", reference))')
    return sequence(out.logps - batch["ref_logps"], batch)


def pair_metrics(rewards: jax.Array, out: Outputs, batch: Batch) -> Metrics:
    """The field's metrics of a pair, each [B]; `rewards` [B, 2] are beta * log(pi / ref). A tie counts as half right."""
    logps, ref = sequence(out.logps, batch), sequence(batch["ref_logps"], batch)  # [B, 2]
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (1.0 + jnp.sign(jnp.where(jnp.abs(margins) > TIE, margins, 0.0))),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "logps/chosen_drift": logps[:, 0] - ref[:, 0],  # nats; below 0 the chosen response became less likely
        "logps/rejected_drift": logps[:, 1] - ref[:, 1],
    }


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0 (0.1 is usual)")
