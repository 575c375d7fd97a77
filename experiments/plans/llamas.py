"""The table of docs/pods.md: `alignax plan` of DPO on Llamas of published shapes, without weights, on slices that are not at hand.

Command, some minutes of a processor for each row; rows that an earlier call made are read from the cache of plans:
  python experiments/plans/llamas.py [NAME ...] >> table.md

Every row has invented words: a prompt of half its tokens, and two responses that fill the other half, so a head predicts half of the
positions. Hardware: none but one processor core and 4 GB of memory, for a model of any size.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from alignax.bench import methods
from alignax.text import markdown

DPO = Path(__file__).parent.parent / "dpo_hh.py"
# Llama 3.2 1B and Llama 3.1 8B.
LLAMAS = {
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Case(NamedTuple):
    """A row of the table."""

    llama: str
    topology: str
    tokens: int  # of a row
    pairs: int  # of a batch
    fields: dict[str, Any]


CASES = {
    "1B-v5e": Case("1B", "v5e:4x4", 2048, 16, {}),
    "8B-v5p": Case("8B", "v5p:4x4x4", 2048, 64, {}),
    "8B-v5e": Case("8B", "v5e:4x4", 2048, 16, {}),
    "1B-2xv5e": Case("1B", "v5e:4x4", 2048, 32, {"mesh.slices": 2, "mesh.data": 2}),
    "8B-v5p-8k": Case("8B", "v5p:4x4x4", 8192, 64, {}),
    "8B-v5p-tensor": Case("8B", "v5p:4x4x4", 2048, 64, {"mesh.tensor": 4}),
    "8B-v6e": Case("8B", "v6e:16x16", 2048, 256, {}),
    "8B-v5e-256": Case("8B", "v5e:16x16", 2048, 256, {}),
}


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes a model folder without weights, and pairs; returns the fields of the run."""
    shape = LLAMAS[case.llama]
    words = int(shape["vocab_size"])
    config = methods.experiment("dpo", [f"vocab={words}", f"seq={case.tokens}"], folder / "bench").config
    (folder / "model").mkdir(parents=True)
    methods.write_model(config, folder / "model")
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | shape | {"max_position_embeddings": case.tokens}))
    draw, half = random.Random(0), case.tokens // 2
    text = lambda count: " ".join(f"t{draw.randrange(3, words)}" for _ in range(count))
    rows = [{"prompt": text(half), "chosen": text(half - 1), "rejected": text(half - 1)} for _ in range(case.pairs)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "workdir": folder / "run", "model.path": folder / "model", "model.init": "random", "model.dtype": "bfloat16",
        "data.train": folder / "pairs.jsonl", "data.max_length": case.tokens, "data.max_prompt_length": half, "batch_size": case.pairs,
        "eval.samples": 0, "eval.sample_prompts": 0, "reference.cache": "off",
    } | case.fields  # fmt: skip


def planned(case: Case) -> dict[str, Any]:
    """The JSON of `alignax plan` of a case."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fields = [f"--config.{name}={value}" for name, value in write(case, folder).items()]
        out = folder / "plan.json"
        command = [sys.executable, "-m", "alignax", "plan", "--config", DPO, "--topology", case.topology, "--json", out, *fields]
        subprocess.run(command, stdout=sys.stderr)  # exit code 2 also says that a program does not fit
        return json.loads(out.read_text())


def row(case: Case, plan: dict[str, Any]) -> list[str]:
    """The row of a case: of its training program."""
    slices, f = plan["slices"], plan["programs"]["train"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    where = [case.llama, f"{slices} x {case.topology}" if slices > 1 else case.topology, mesh, f"{case.tokens:,}", str(case.pairs)]
    if f["refused"]:
        return [*where, f["refused"], *[""] * 8, f"{f['compiling']:.0f}"]
    between = sum(x for key, x in f["sent"].items() if "(DCN)" in key)
    room, low, high = f"{f['memory'] / 1e9:.1f} of {f['room'] / 1e9:.1f}", f["shortest"], f["longest"]
    figures = [f"{x:.3g}" for x in (f["flops"] / 1e12, f["moved"] / 1e9, (sum(f["sent"].values()) - between) / 1e9, between / 1e9)]
    speed = f"{f['tokens'] / high / 1e3:,.0f} to {f['tokens'] / low / 1e3:,.0f}"
    return [*where, room, *figures, f["bound"], f"{low:.2f} to {high:.2f}", speed, "yes" if f["fits"] else "no", f"{f['compiling']:.0f}"]


HEAD = [
    "DPO of", "slice", "mesh", "tokens a row", "pairs", "peak GB", "TFLOP", "HBM GB", "ICI GB", "DCN GB", "bound", "seconds",
    "1,000 tokens/s", "fits", "compiled in s",
]  # fmt: skip


def main(names: list[str]) -> None:
    """Plans the cases named, by default all, and prints the table."""
    made, rows = {}, []
    for name in names or CASES:
        plan = planned(CASES[name])
        made = plan["made"]
        rows.append(row(CASES[name], plan))
    print(markdown([HEAD, *rows]))
    versions = ", ".join(f"{name} {made[name]}" for name in ("alignax", "jax", "libtpu"))
    print(f"\nMade by experiments/plans/llamas.py on {made['date']}: {versions}.")


if __name__ == "__main__":
    main(sys.argv[1:])
