"""`alignax bench`: FLOPs counted by hand, useful tokens of a known batch, growth, refusals, and one measurement."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignax.bench import flops, growth, methods
from alignax.bench.flops import Rows
from alignax.bench.machine import peak
from alignax.bench.measure import rows_of
from alignax.cli import main
from alignax.models.config import ModelConfig
from alignax.models.lora import Lora

SHAPE = ModelConfig(
    vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    max_position_embeddings=64,
)  # fmt: skip
# A layer by hand: q and o [8, 8], k and v [8, 4], gate, up and down [8, 12].
LAYER = 8 * 8 * 2 + 8 * 4 * 2 + 8 * 12 * 3
ROWS = Rows(np.array([10, 6]), np.array([4, 1]))


def test_flops_of_a_step_by_hand():
    """6 N a token of the layers, 12 L H Q T / 2 of attention, 6 D V a scored token."""
    layers = 6 * 3 * LAYER * 16
    attention = sum(12 * 3 * 2 * 4 * T * T / 2 for T in (10, 6))
    head = 6 * 8 * 100 * 5
    assert flops.training(SHAPE, ROWS) == layers + attention + head
    assert flops.forward(SHAPE, ROWS).total == flops.training(SHAPE, ROWS) / 3


def test_adapters_have_no_gradient_of_frozen_weights():
    lora = Lora(rank=2, alpha=4.0, targets=("q",))
    adapted = dataclasses.replace(SHAPE, lora=lora)
    own = flops.forward(adapted, ROWS)
    assert own.adapters == 2 * 3 * 2 * (8 + 8) * 16
    assert flops.training(adapted, ROWS) == 2 * own.matrices + 3 * own.adapters + 3 * own.attention + 2 * own.head


def test_sampling_reads_a_prompt_once():
    prompts, completions = np.array([7]), np.array([[3, 5]])
    whole = flops.forward(SHAPE, Rows(np.array([10, 12]), np.array([3, 5]))).total
    again = flops.forward(SHAPE, Rows(np.array([7]), np.array([0]))).total
    assert flops.sampling(SHAPE, prompts, completions) == whole - again


def test_a_window_leaves_fewer_keys():
    """Of a row of 10 tokens with a window of 4: 4 * 10 - 16 / 2 = 32 pairs, in place of 50."""
    assert flops.keys(SHAPE, np.array([10])) == 3 * 50
    assert flops.keys(dataclasses.replace(SHAPE, sliding_windows=(4, 0, 0)), np.array([10])) == 32 + 2 * 50


def test_useful_tokens_are_those_that_a_model_reads():
    mask = np.array([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    batch = {"mask": mask, "completion_mask": mask & np.array([0, 0, 1, 1], bool), "judge_mask": mask[:, :, :3]}
    batch |= {"judge_completion_mask": batch["completion_mask"][:, :, :3]}
    assert rows_of(batch).tokens == 5 and rows_of(batch).scored.tolist() == [1, 0]  # type: ignore
    assert rows_of(batch, "judge").lengths.tolist() == [3, 2]  # type: ignore


def test_chips_of_the_table():
    assert peak("TPU v5 lite") == 197e12 and peak("TPU v5p") == 459e12 and peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("cpu") is None


def test_growth_tells_linear_from_not():
    axis = growth.AXES[0]
    found = [
        (axis, value, {"machine": {"platform": "cpu"}, "cpu_s": s, "model_flops": 1e9 * value})
        for value, s in ((2, 2.0), (6, 6.3), (12, 15.0), (24, 12.0))
    ]
    lines = growth.growth_table(found).splitlines()
    assert [line.split()[-1] for line in lines if line and line.split()[0] in ("6", "12", "24")] == ["yes", "no", "cheaper"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["dpoo"], "bench knows no method 'dpoo'; use sft, dpo"),
        (["dpo", "--steps", "0"], "--steps is 0; use 1 or more"),
        (["dpo", "--config.betta=1"], "betta"),
        (["dpo", "--config.seq=32"], "leaves no completion"),
        (["growth", "dpo"], "growth is measured alone"),
        (["sft", "dpo", "--against", "true"], "--against compares one case"),
        (["sft", "--against", "run {nothing}"], "has {nothing}, which is no field"),
        (["--config", "nowhere.py"], "nowhere.py"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and not list(Path(tmp_path).iterdir())


def test_rows_have_the_lengths_that_were_asked_for(tmp_path):
    config = methods.get_config()
    config.seq, config.prompt, config.mean, config.batch_size = 40, 8, 0, 2
    methods.write_rows(config, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {len(row["prompt"].split()) for row in rows} == {8}
    assert {len(row[name].split()) for row in rows for name in ("chosen", "rejected")} == {40 - 8 - 1}  # and the EOS


@pytest.mark.slow
def test_a_small_bench_writes_its_figures(tmp_path, monkeypatch, capsys):
    """Two methods on a tiny model: the figures fit together, a second start finds its programs, and the roofline is a picture."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("XLA_FLAGS", "")
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "vocab": 128, "seq": 32, "prompt": 8, "batch_size": 4}
    sizes |= {"rollout.max_new_tokens": 8, "members": 1}
    words = [f"--config.{name}={value}" for name, value in sizes.items()]
    out = tmp_path / "bench.json"
    assert main(["bench", "dpo", "generate", "--steps", "2", "--json", str(out), *words]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "useful tokens/s" in printed and (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    dpo, generate = (SimpleNamespace(**case) for case in found["cases"])
    assert dpo.tokens == 4 * 2 * 32 and dpo.real_positions == 1 and 0 < dpo.mfu < 1
    assert dpo.mfu == pytest.approx(dpo.model_flops_per_cpu_second / dpo.machine["rate"], rel=0.2)
    assert dpo.cached_first_step_cpu_s < dpo.first_step_cpu_s and generate.program == "rollout/decode" and generate.tokens > 0
