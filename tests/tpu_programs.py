"""Runs of Llamas that have no weights, to be compiled for TPUs."""

import json
import re
import runpy
from pathlib import Path

import runs
import tiny

from alignax import hlo

TABLE = runpy.run_path(str(runs.REPO / "experiments" / "plans" / "llamas.py"))  # the script of the table of plans
LLAMAS = TABLE["LLAMAS"]


def fields(folder: Path, llama: str, tokens: int, pairs: int, **changes: object) -> dict[str, object]:
    """The fields of a DPO run on one of `LLAMAS`, with a batch of so many pairs, whose padded rows have so many tokens."""
    (folder / "model").mkdir()
    config = tiny.CONFIG | LLAMAS[llama] | {"max_position_embeddings": tokens} | changes
    (folder / "model" / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder / "model")
    row = {"prompt": "a" * (tokens // 2), "chosen": " yes" * (tokens // 8), "rejected": " no" * (tokens // 6)}
    (folder / "pairs.jsonl").write_text((json.dumps(row) + "\n") * pairs)
    return {
        "workdir": folder / "run", "model.path": folder / "model", "model.init": "random", "model.dtype": "bfloat16",
        "model.logps_chunk": 512, "model.packing": -1, "data.train": folder / "pairs.jsonl", "data.max_length": tokens,
        "data.max_prompt_length": tokens // 2, "batch_size": pairs, "eval.samples": 0, "eval.sample_prompts": 0, "reference.cache": "off",
    }  # fmt: skip


def floats(text: str) -> set[int]:
    """The sizes of a program's float32 arrays on a device."""
    return {hlo.size(dims) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}


def kernel_bytes(text: str) -> int:
    """The bytes of the operands and results of a program's Pallas kernels, each counted once."""
    program = hlo.read(text)
    calls = [i for i, _, _ in hlo.executed(program) if 'custom_call_target="tpu_custom_call"' in i.line]
    return sum(hlo.bytes_of(result, True) for i in calls for result in (i.result, *(program.of[name].result for name in i.operands)))
