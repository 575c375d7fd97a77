"""The peer of `alignax bench generate`: `generate` of transformers under torch, in batches of 64 rows.

Command, see `peer.py` for PYTHON, which needs no TRL here:
  alignax bench generate --against 'PYTHON experiments/peers/transformers_generate.py {config}'

Useful tokens are those up to the one that ends a completion. A batch takes as long as its longest row.
"""

import time

import peer

ROWS = 64  # of a batch, as many as alignax samples side by side on a CPU


def main() -> None:
    """Samples the completions of all prompts, turn by turn."""
    config = peer.begin()
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = peer.load(config, transformers.AutoModelForCausalLM).eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["model.path"], padding_side="left")
    texts = [row["prompt"] for row in peer.rows(config, "prompt")[: max(config["eval.samples"], config["eval.sample_prompts"])]]
    prompts = [text for text in texts for _ in range(config["eval.samples_per_prompt"])]
    batches = [
        tokenizer(own, padding=True, return_tensors="pt").to(device)
        for own in (prompts[i : i + ROWS] for i in range(0, len(prompts), ROWS))
    ]
    ends = torch.tensor(model.generation_config.eos_token_id, device=device)
    drawn = {"do_sample": True, "temperature": config["eval.temperature"], "top_p": config["eval.top_p"], "top_k": 0}
    how = drawn if config["eval.temperature"] else {"do_sample": False}

    def sample() -> float:
        made = 0
        for batch in batches:
            with torch.no_grad():
                out = model.generate(**batch, max_new_tokens=config["eval.max_new_tokens"], pad_token_id=tokenizer.pad_token_id, **how)
            ended = torch.isin(out[:, batch["input_ids"].shape[1] :], ends)
            made += int((ended.cumsum(1) - ended.long() == 0).sum())
        return float(made)

    def turn() -> peer.Turn:
        wall, cpu = time.perf_counter(), time.process_time()
        made = sample()
        return peer.Turn(made, time.perf_counter() - wall, time.process_time() - cpu)

    peer.tell("transformers generate", [turn() for _ in range(config["steps"])])


if __name__ == "__main__":
    main()
