"""The peer of `alignax bench dpo`: TRL's DPOTrainer, with the reference's forward pass in each step.

Command, see `peer.py` for PYTHON:
  alignax bench dpo --against 'PYTHON experiments/peers/trl_dpo.py {config}'

The reference is a second copy of the policy. Tokens are those of both responses with their prompts, without padding.
"""

import copy
import tempfile

import peer


def main() -> None:
    """Runs the trainer."""
    config = peer.begin()
    import transformers
    import trl  # pyright: ignore[reportMissingImports]  (only benchmarks need it)
    from datasets import Dataset

    model = peer.load(config, transformers.AutoModelForCausalLM)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            processing_class=transformers.AutoTokenizer.from_pretrained(config["model.path"]),
            train_dataset=Dataset.from_list(peer.rows(config, "prompt", "chosen", "rejected")),
            args=trl.DPOConfig(max_length=config["data.max_length"], beta=0.1, **peer.options(config, config["batch_size"], folder)),
        )
        peer.tell("TRL DPOTrainer", peer.clocked(trainer, lambda: float(trainer._total_train_tokens)))


if __name__ == "__main__":
    main()
