"""The peer of `alignax bench grpo`: TRL's GRPOTrainer, with the same reward models and a KL to the reference.

Command, see `peer.py` for PYTHON:
  alignax bench grpo --against 'PYTHON experiments/peers/trl_grpo.py {config}'

Tokens are those of prompts and completions that are trained on.
"""

import tempfile

import peer


def main() -> None:
    """Runs the trainer."""
    config = peer.begin()
    import transformers
    import trl  # pyright: ignore[reportMissingImports]  (only benchmarks need it)
    from datasets import Dataset

    judges = config["reward.path"].split(",")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["model.path"], padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        peer.load(config, transformers.AutoModelForCausalLM).save_pretrained(f"{folder}/policy")  # from where TRL reads the reference too
        trainer = trl.GRPOTrainer(
            model=f"{folder}/policy",
            reward_funcs=[transformers.AutoModelForSequenceClassification.from_pretrained(judge).eval() for judge in judges],
            reward_processing_classes=[tokenizer] * len(judges),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(peer.rows(config, "prompt")),
            args=trl.GRPOConfig(
                num_generations=config["rollout.samples"],
                max_completion_length=config["rollout.max_new_tokens"],
                temperature=config["rollout.temperature"],
                top_p=config["rollout.top_p"],
                beta=0.04,
                loss_type="grpo",
                **peer.options(config, config["batch_size"] * config["rollout.samples"], folder),
            ),
        )
        peer.tell("TRL GRPOTrainer", peer.clocked(trainer, lambda: float(trainer.state.num_input_tokens_seen)))


if __name__ == "__main__":
    main()
