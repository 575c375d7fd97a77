"""Speed and memory of a GRPO iteration on a random Llama: rollout, scores of an ensemble of reward models, advantages, one update.

Command:
  make bench                                            ours, and TRL's GRPOTrainer in turn where `trl` is installed; a JSON line each
  python experiments/bench_online.py --dim 128          a case of your own
  python experiments/bench_online.py --against 'venv/bin/python experiments/bench_online.py --side theirs --dim {dim} ...'

An iteration samples `--samples` completions of `--new` tokens to each of `--prompts` prompts (half of `--prompt` to `--prompt` tokens). It
takes their log-probs under a reference, their mean score under `--members` reward models of the policy's shape, and advantages within each
group. It ends with one AdamW step on `grpo() + 0.04 * kl_k3()`. The temperature is 1. A completion ends early at the EOS, one token in
`--vocab`. Scoring and training take `--microbatches` parts. All of this is the same on both sides.

Each side runs in its own process on one core and one thread: ours, theirs, ours, theirs. Tokens are those of prompts and completions that
are trained on. CPU seconds are those of the process, the median over the iterations after the first. Our side takes the turns of
`alignax.run.feed` on a prepared run, as `alignax train` does. `outside_programs` is the share of an iteration's wall time outside compiled
programs; `compilations` counts those after the first iteration. `--against` runs a command in place of TRL. The last line of its output
must be JSON with `tokens_per_cpu_second`; fields of the case in braces are filled in.

Model FLOPs exclude recomputation, padding, and old log-probs of the policy (with a single step all ratios are 1). A prompt is read once for
all its samples. Completions are decoded token by token, then read by the reference, by each reward model, and by the policy forward and
backward. Attention counts as causal, and the head only where it predicts a token of a completion.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import last_json, matmul_rate

CASE = {
    "dim": 256, "layers": 4, "heads": 8, "vocab": 8192, "prompts": 16, "samples": 8, "prompt": 64, "new": 64, "members": 3,
    "microbatches": 8, "iterations": 3,
}  # fmt: skip
WARMUP = 1  # iterations before the timed ones
KL = 0.04
ROWS = 64  # prompts in the data


def bench() -> None:
    """Alternates our side and theirs, or with `--side` runs one side in this process."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    for name, value in CASE.items():
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--side", default="", help="ours or theirs: this process is that side")
    parser.add_argument("--against", default="", help="a command to compare with; without one TRL, where it is installed")
    parser.add_argument("--rounds", type=int, default=3, help="of a comparison")
    args = parser.parse_args()
    case = {name: getattr(args, name) for name in CASE}
    if args.side:
        if sys.platform == "linux":
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), case)
            print(json.dumps((ours if args.side == "ours" else theirs)(Path(folder), case)))
        return
    command = lambda side: [sys.executable, __file__, f"--side={side}", *(f"--{name}={value}" for name, value in case.items())]
    other = command("theirs") if importlib.util.find_spec("trl") else []
    if args.against:
        other = shlex.split(re.sub(r"{(\w+)}", lambda m: str(case[m.group(1)]), args.against))
    if not other:
        print(json.dumps({"side": "ours"} | last_json(command("ours"))), flush=True)
        return
    ratios = []
    for _ in range(args.rounds):
        sides = {}
        for side, line in (("ours", command("ours")), ("theirs", other)):
            sides[side] = last_json(line)
            print(json.dumps({"side": side} | sides[side]), flush=True)
        ratios.append(sides["ours"]["tokens_per_cpu_second"] / sides["theirs"]["tokens_per_cpu_second"])
    print(json.dumps({"ratios_per_cpu_second": [round(r, 2) for r in ratios], "median": round(statistics.median(ratios), 2)}))


def write(folder: Path, case: dict) -> None:
    """Writes the files that both sides read: prompts, and a model folder without weights (a config and a tokenizer of whole words)."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    c, draw = argparse.Namespace(**case), random.Random(0)
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, c.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.dim,
        "intermediate_size": hidden_size(c), "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads, "head_dim": c.dim // c.heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(description))
    # The final space keeps a prompt's last word and a completion's first word apart when texts are joined.
    line = lambda: " ".join(draw.choice(words[3:]) for _ in range(draw.randint(c.prompt // 2, c.prompt))) + " "
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line()}) + "\n" for _ in range(ROWS)))


def hidden_size(c: argparse.Namespace) -> int:
    """The hidden size F of the MLP."""
    return -(-(8 * c.dim // 3) // 64) * 64


def get_config():
    """The config of our side; the case sets its sizes."""
    from alignax import default_config

    config = default_config()
    config.data.kind = "prompt"
    config.model.init = "random"
    config.model.remat = "none"
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup = 0.0
    return config


def loss(config):
    """The loss: GRPO with a KL to the reference."""
    from alignax import grpo
    from alignax.losses import kl_k3

    return grpo() + KL * kl_k3()


def experience(config, reference, ensemble):
    """The experience: each response's mean score compared with its group."""
    from alignax import chain, group_relative, logps, mean, score

    return chain(logps("ref_logps", reference, config.microbatches), score(ensemble, config.microbatches), mean, group_relative())


def ours(folder: Path, case: dict) -> dict:
    """The measurements of alignax on a case."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from alignax.config import load_experiment
    from alignax.run.feed import make_feed
    from alignax.run.prepare import prepare
    from alignax.run.start import start

    c = argparse.Namespace(**case)
    fields = {
        "model.path": folder / "model", "data.train": folder / "prompts.jsonl", "workdir": folder / "run", "batch_size": c.prompts,
        "microbatches": c.microbatches, "steps": WARMUP + c.iterations,
        "rollout.samples": c.samples, "rollout.max_new_tokens": c.new, "eval.max_new_tokens": c.new,
        "rollout.slots": c.prompts * c.samples, "log.rollouts": 0, "reward.path": ",".join(map(str, judges(folder, c.members))),
    }  # fmt: skip
    started = start(prepare(load_experiment(__file__, [f"{name}={x}" for name, x in fields.items()])))
    started.checkpoints.close()
    run, state, held = started.run, started.state, started.held
    feed, seen = make_feed(run, held, started.programs), []
    inside = Inside(feed)
    learn = inside.clocked(started.programs["train"].call)
    for step in range(WARMUP + c.iterations):
        inside.seconds, wall, cpu = 0.0, time.perf_counter(), time.process_time()
        state, batches, metrics = feed(state, step)
        state, learnt = learn(state, held, batches)
        state, times = feed.after(state, learnt)
        metrics = learnt | metrics | times
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        seen.append({name: float(x) for name, x in metrics.items()} | {"wall": wall, "cpu": cpu, "outside": 1 - inside.seconds / wall})
    middle = lambda name: statistics.median(row[name] for row in seen[WARMUP:])
    gflops, rate = model_flops(c, run.data.train.examples.prompt_lengths.tolist()) / 1e9, matmul_rate()
    return found(case, middle("tokens"), middle("wall"), middle("cpu"), seen[0]["wall"]) | {
        "seconds": {part: round(middle(f"time/{part}"), 4) for part in ("generate", "reward", "learn", "host")},
        "outside_programs": round(middle("outside"), 4),
        "compilations": sum(int(row["compilations"]) for row in seen[1:]),
        "model_gflops": round(gflops, 1),
        "model_gflops_per_cpu_second": round(gflops / middle("cpu"), 2),
        "share_of_matmul_rate": round(gflops / middle("cpu") / rate, 3),
        "sampler_gap": max(row["sampler_gap"] for row in seen),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def judges(folder: Path, members: int) -> list[Path]:
    """Writes folders of random reward models, and returns their paths."""
    from alignax.bench.methods import write_judge

    out = [folder / f"judge_{k}" for k in range(members)]
    for k, judge in enumerate(out):
        write_judge(folder / "model", judge, k)
    return out


class Inside:
    """A clock of the wall seconds that an iteration spends in compiled programs, from call to finished result."""

    def __init__(self, feed: Any):
        """Puts the clock around each program of the sampler."""
        self.seconds, generate = 0.0, feed.rollouts.generate
        generate._empty, generate._prefill, generate._decode = map(self.clocked, (generate._empty, generate._prefill, generate._decode))

    def clocked(self, program: Callable) -> Callable:
        """A program with the clock around its calls."""
        import jax

        def call(*args: Any) -> Any:
            began = time.perf_counter()
            out = jax.block_until_ready(program(*args))
            self.seconds += time.perf_counter() - began
            return out

        return call


def found(case: dict, tokens: float, wall: float, cpu: float, first: float) -> dict:
    """The measurements of an iteration that both sides report."""
    return case | {
        "tokens": round(tokens),
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "tokens_per_second": round(tokens / wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "first_iteration_s": round(first, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def model_flops(c: argparse.Namespace, prompts: list[int]) -> float:
    """The FLOPs of an iteration that every implementation needs (see the module), for the mean of the prompt lengths `prompts`."""
    per_token = c.layers * (8 * c.dim**2 + 6 * c.dim * hidden_size(c))
    read = lambda T: per_token * T + c.layers * 2 * c.dim * T**2  # a forward pass over a row, attention causal
    head = 2 * c.dim * c.vocab * c.new
    row = lambda p: c.samples * ((1 + 1 + c.members + 3) * read(p + c.new) + (1 + 1 + 3) * head) - (c.samples - 1) * read(p)
    return c.prompts * statistics.mean(map(row, prompts))


def theirs(folder: Path, case: dict) -> dict:
    """The measurements of TRL's GRPOTrainer, in its fastest setting: no recomputation, equal microbatches, no log, nothing saved."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # not among our dependencies

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    c = argparse.Namespace(**case)
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    scored: Any = transformers.AutoConfig.from_pretrained(folder / "model", num_labels=1)
    judge = lambda: transformers.AutoModelForSequenceClassification.from_config(scored).eval()
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    begun, seen = [0.0, 0.0, 0], []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun[:] = time.perf_counter(), time.process_time(), state.num_input_tokens_seen

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter(), time.process_time(), state.num_input_tokens_seen
            seen.append([b - a for a, b in zip(begun, now, strict=True)])

    trainer = trl.GRPOTrainer(
        model=str(folder / "policy"), reward_funcs=[judge() for _ in range(c.members)], reward_processing_classes=[tokenizer] * c.members,
        processing_class=tokenizer, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        args=trl.GRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=c.samples,
            per_device_train_batch_size=c.prompts * c.samples // c.microbatches, gradient_accumulation_steps=c.microbatches,
            max_completion_length=c.new, max_steps=WARMUP + c.iterations, beta=KL,
            loss_type="grpo", learning_rate=1e-6, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    out, sys.stdout = sys.stdout, sys.stderr  # the trainer prints a summary
    trainer.train()
    sys.stdout = out
    wall, cpu, tokens = (statistics.median(row[i] for row in seen[WARMUP:]) for i in range(3))
    return found(case, tokens, wall, cpu, seen[0][0]) | {"trl": trl.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    bench()
