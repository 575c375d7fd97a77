"""The table of docs/pods.md: `alignax plan` of models of published shapes, without weights, on slices that are not at hand.

Command, some minutes of a processor for each row; programs that an earlier call made are read from the cache of plans:
  python experiments/plans/llamas.py [NAME ...] >> table.md

Every row of the data has invented words: a prompt of half its tokens, and responses that fill the other half, so a head predicts half of
the positions. Hardware: none but one processor core and 4 GB of memory, for a model of any size.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alignax.bench import methods
from alignax.text import markdown

HERE = Path(__file__).parent
# Llama 3.2 1B, Llama 3.1 8B and 70B, and Qwen3 30B-A3B, whose feed-forward layers are 128 experts.
LLAMAS = {
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "70B": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "30B of experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class Kind(NamedTuple):
    """A way to train, and the programs that the table shows of it."""

    experiment: str  # file
    row: Callable[[str, Callable[[], str]], dict[str, str]]  # prompt, a maker of responses -> row of the data
    fields: dict[str, Any] = {}
    shown: tuple[str, ...] = ("train",)


PAIR = lambda prompt, response: {"prompt": prompt, "chosen": response(), "rejected": response()}
PROMPT = lambda prompt, response: {"prompt": prompt}
ONLINE = ("rollout/prefill", "rollout/decode", "train")
KINDS = {
    "SFT": Kind("../sft_hh.py", lambda prompt, response: {"prompt": prompt, "completion": response()}),
    "DPO": Kind("../dpo_hh.py", PAIR),
    "5 reward models": Kind("../rm_hh.py", PAIR, {"ensemble.members": 5}),
    "GRPO": Kind("online.py", PROMPT, {"method": "grpo"}, ONLINE),
    "PPO": Kind("online.py", PROMPT, {"method": "ppo", "model.critic": "head"}, ONLINE),
}


class Case(NamedTuple):
    """Rows of the table: the programs of a run."""

    kind: str
    llama: str
    topology: str
    tokens: int  # of a row
    rows: int  # of a batch: pairs, prompts or responses
    fields: dict[str, Any] = {}


CASES = {
    "1B-v5e": Case("DPO", "1B", "v5e:4x4", 2048, 16),
    "8B-v5p": Case("DPO", "8B", "v5p:4x4x4", 2048, 64),
    "8B-v5e": Case("DPO", "8B", "v5e:4x4", 2048, 16),
    "1B-2xv5e": Case("DPO", "1B", "v5e:4x4", 2048, 32, {"mesh.slices": 2, "mesh.data": 2}),
    "8B-v5p-8k": Case("DPO", "8B", "v5p:4x4x4", 8192, 64),
    "8B-v5p-tensor": Case("DPO", "8B", "v5p:4x4x4", 2048, 64, {"mesh.tensor": 4}),
    "8B-v6e": Case("DPO", "8B", "v6e:16x16", 2048, 256),
    "8B-v5e-256": Case("DPO", "8B", "v5e:16x16", 2048, 256),
    "70B-v5p": Case("DPO", "70B", "v5p:4x4x8", 2048, 128),
    "moe-v5p": Case("DPO", "30B of experts", "v5p:4x4x4", 2048, 64),
    "1B-sft": Case("SFT", "1B", "v5e:4x4", 2048, 32),
    "1B-ensemble": Case("5 reward models", "1B", "v5e:4x4", 2048, 16),
    "1B-grpo": Case("GRPO", "1B", "v5e:4x4", 2048, 16),
    "1B-ppo": Case("PPO", "1B", "v5e:4x4", 2048, 16),
}


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes a model folder without weights, and the data; returns the fields of the run."""
    shape, kind = LLAMAS[case.llama], KINDS[case.kind]
    words = int(shape["vocab_size"])
    config = methods.experiment("dpo", [f"vocab={words}", f"seq={case.tokens}"], folder / "bench").config
    (folder / "model").mkdir(parents=True)
    methods.write_model(config, folder / "model")
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | shape | {"max_position_embeddings": case.tokens}))
    draw, half = random.Random(0), case.tokens // 2
    text = lambda count: " ".join(f"t{draw.randrange(3, words)}" for _ in range(count))
    rows = [kind.row(text(half), lambda: text(half - 1)) for _ in range(case.rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    online = {"rollout.max_new_tokens": half} if kind.row is PROMPT else {"reference.cache": "off"}
    return {
        "workdir": folder / "run", "model.path": folder / "model", "model.init": "random", "model.dtype": "bfloat16",
        "data.train": folder / "rows.jsonl", "data.max_length": case.tokens, "data.max_prompt_length": half, "batch_size": case.rows,
        "eval.samples": 0, "eval.sample_prompts": 0,
    } | online | kind.fields | case.fields  # fmt: skip


def planned(case: Case) -> dict[str, Any]:
    """The JSON of `alignax plan` of a case."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fields = [f"--config.{name}={value}" for name, value in write(case, folder).items()]
        out, file = folder / "plan.json", HERE / KINDS[case.kind].experiment
        command = [sys.executable, "-m", "alignax", "plan", "--config", file, "--topology", case.topology, "--json", out, *fields]
        subprocess.run(command, stdout=sys.stderr)  # exit code 2 also says that a program does not fit
        return json.loads(out.read_text())


def lines(case: Case, plan: dict[str, Any]) -> list[list[str]]:
    """The rows of a case in the table, one for each program."""
    slices, several = plan["slices"], len(KINDS[case.kind].shown) > 1
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    where = [f"{slices} x {case.topology}" if slices > 1 else case.topology, mesh, f"{case.tokens:,}", str(case.rows)]
    named = lambda name: f"{case.kind}: {name}" if several else case.kind
    return [[case.llama, named(name), *where, *figures(plan["programs"][name])] for name in KINDS[case.kind].shown]


def figures(f: dict[str, Any]) -> list[str]:
    """The figures of a program in the table."""
    if f["refused"]:
        return [f["refused"], *[""] * 7, "no", f"{f['compiling']:.0f}"]
    between = sum(x for key, x in f["sent"].items() if "(DCN)" in key)
    room, low, high = f"{f['memory'] / 1e9:.1f} of {f['room'] / 1e9:.1f}", f["shortest"], f["longest"]
    found = [f"{x:.3g}" for x in (f["flops"] / 1e12, f["moved"] / 1e9, (sum(f["sent"].values()) - between) / 1e9, between / 1e9)]
    speed = f"{f['tokens'] / high / 1e3:,.3g} to {f['tokens'] / low / 1e3:,.3g}" if f["tokens"] else ""
    seconds = f"{low:.2g} to {high:.2g}"
    return [room, *found, f["bound"], seconds, speed, "yes" if f["fits"] else "no", f"{f['compiling']:.0f}"]


HEAD = [
    "model", "program", "slice", "mesh", "tokens a row", "batch", "peak GB", "TFLOP", "HBM GB", "ICI GB", "DCN GB", "bound", "seconds",
    "1,000 tokens/s", "fits", "compiled in s",
]  # fmt: skip


def main(names: list[str]) -> None:
    """Plans the cases named, by default all, and prints the table."""
    made, rows = {}, []
    for name in names or CASES:
        plan = planned(CASES[name])
        made = plan["made"]
        rows += lines(CASES[name], plan)
    print(markdown([HEAD, *rows]))
    versions = ", ".join(f"{name} {made[name]}" for name in ("alignax", "jax", "libtpu"))
    print(f"\nMade by experiments/plans/llamas.py on {made['date']}: {versions}.")


if __name__ == "__main__":
    main(sys.argv[1:])
