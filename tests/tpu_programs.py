"""Runs of Llamas that have no weights, to be compiled for TPUs; and what a compiled program holds and sends, read from its text."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import tiny

SENT = r"= (\(?.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
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


ARRAY = r"\b([a-z]+\d+|pred)\[([\d,]*)\]"


class Collective(NamedTuple):
    """A collective of a program: its largest array on a device, and the bytes that a device sends in it, over all turns of its loops."""

    kind: str
    dtype: str
    elements: int
    sent: float


def size(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def floats(text: str) -> set[int]:
    """The sizes of a program's float32 arrays on a device."""
    return {size(dims) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}


def collectives(text: str) -> list[Collective]:
    """The collectives of a program. Loops whose number of turns is not a constant count once, and of a choice every branch counts.

    Bytes are those of rings: of n devices each sends (n - 1) / n of the larger of a collective's input and output, and twice that in an
    all-reduce. A permutation sends its array.
    """
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}$", text, re.M | re.S))
    found: list[Collective] = []
    chained: set[str] = set()  # an asynchronous collective is in each of the fusions that hide it, with one channel and a place in a chain

    def read(name: str, turns: int) -> None:
        for line in parts[name].splitlines():
            if "chain_id=" in line:
                channel = re.findall(r"channel_id=\d+", line)[0]
                if channel in chained:
                    continue
                chained.add(channel)
            if match := re.search(SENT, line):
                found.append(_collective(*match.groups(), line, turns, name.startswith("all-reduce-scatter")))
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            times = _turns(parts[loop[1]], parts[loop[2]]) if loop else 1
            called = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += re.findall(r"[\w.\-]+", branches)
            for part in called:
                read(part, turns * times)

    read(re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)[0], 1)
    return found


def _turns(condition: str, body: str) -> int:
    """How often a loop turns whose counter goes from 0 to a constant, by 1 or by a constant; else 1."""
    constants = r"[su]32\[\]\S* constant\((\d+)\)"
    ends, counter = re.findall(constants, condition), re.search(r" get-tuple-element\(.*?\), index=(\d+)", condition)
    if len(ends) != 1 or counter is None:
        return 1
    results = re.findall(r"%([\w.\-]+)", body[body.rindex(" tuple(") :].partition(")")[0])
    added = re.search(rf"%{re.escape(results[int(counter[1])])} = [^\n]* add\(%[\w.\-]+, %([\w.\-]+)\)", body)
    step = re.search(rf"%{re.escape(added[1])} = {constants}", body) if added else None
    return int(ends[0]) // (int(step[1]) if step else 1)


def _collective(result: str, kind: str, line: str, turns: int, scatter: bool) -> Collective:
    arrays = [(BYTES[dtype] * size(dims), dtype, size(dims)) for dtype, dims in re.findall(ARRAY, result)]
    bytes_, dtype, elements = max(arrays)
    if f" {kind}-start(" not in line:  # the result of a start has the input too
        bytes_ = sum(array[0] for array in arrays)
    if kind == "collective-permute":
        return Collective(kind, dtype, elements, bytes_ * turns)
    n = _group(line)
    if kind == "reduce-scatter":
        bytes_, elements = bytes_ * n, elements * n
    # An all-reduce of which each device keeps its slice is TPU's other form of a reduce-scatter.
    return Collective(kind, dtype, elements, bytes_ * (2 if kind == "all-reduce" and not scatter else 1) * (n - 1) / n * turns)


def _group(line: str) -> int:
    """How many devices a collective joins: its groups are listed, or a shape [groups, devices], or axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shape[1])
    sizes, axes = re.findall(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)[0]
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))


def kernel_bytes(text: str) -> int:
    """The bytes of the operands and results of a program's Pallas kernels, each counted once."""
    calls = re.findall(r"= (\(?[^\n]*?) custom-call\([^\n]*\"tpu_custom_call\", operand_layout_constraints=\{([^\n]*?\})\}", text)
    return sum(BYTES[dtype] * size(dims) for call in calls for part in call for dtype, dims in re.findall(ARRAY, part))
