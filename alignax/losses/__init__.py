from alignax.losses.algebra import (
    Loss,
    Objective,
    Term,
    at_step,
    chosen_examples,
    chosen_tokens,
    examples,
    lengths,
    loss,
    sequence,
)
from alignax.losses.preference import dpo, ipo, per_sequence, rpo, rpo_token_mean, sft, summed_sft

__all__ = [
    "Loss", "Objective", "Term", "at_step", "chosen_examples", "chosen_tokens", "dpo", "examples", "ipo", "lengths", "loss",
    "per_sequence", "rpo", "rpo_token_mean", "sequence", "sft", "summed_sft",
]  # fmt: skip
