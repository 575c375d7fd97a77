"""`alignax bench`: FLOPs counted by hand, useful tokens of a known batch, growth, peers, refusals, and two measurements."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from alignax.bench import flops, growth, methods, report
from alignax.bench.case import Case
from alignax.bench.flops import Rows
from alignax.bench.machine import peak
from alignax.bench.measure import rows_of
from alignax.cli import bench_commands, main
from alignax.config import flat
from alignax.mesh import make_mesh
from alignax.models.config import ModelConfig
from alignax.models.lora import Lora
from alignax.run.prepare import prepare
from alignax.run.programs import programs

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
        (axis, value, {"machine": {"platform": "cpu", "matrix_rate": 9e10}, "cpu_s": s, "model_flops": 1e9 * value})
        for value, s in ((2, 2.0), (6, 6.3), (12, 15.0), (24, 12.0))
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in growth.growth_table(found).splitlines()]
    assert [row[1] for row in rows[2:]] == ["2", "6", "12", "24"] and [row[-1] for row in rows[2:]] == ["", "yes", "no", "cheaper"]
    assert {row[4] for row in rows[2:]} == {"90"}  # each row has the rate of a matrix product beside it


@pytest.mark.slow
@pytest.mark.parametrize("axis", runs.long_but(growth.AXES, *growth.AXES[:2]), ids=lambda axis: axis.letter)
def test_every_size_of_growth_is_a_run(axis, tmp_path):
    """The training program of the largest size can be traced; the dimensions of its model are small."""
    sizes = growth.cases(["dim=16", "heads=2", "kv_heads=2"], 1, str(tmp_path))
    value, case = [(value, case) for own, value, case in sizes if own is axis][-1]
    experiment = case.experiment()
    methods.write(experiment.config, Path(case.folder))
    run = prepare(experiment, make_mesh({}, jax.devices()[:1]))
    assert flat(run.config)[axis.field] == value and programs(run)["train"].shapes()
    run.workers.close()


def test_a_command_of_against_gets_fields_and_the_whole_config():
    config = {"model.path": "a folder/model", "seq": 32}
    words = bench_commands.filled("peer --in={model.path} {seq} 'two words' {config}", config)
    assert words[:-1] == ["peer", "--in=a folder/model", "32", "two words"] and json.loads(words[-1]) == config


def test_a_comparison_tells_all_rounds_with_the_machine():
    ours = {"machine": {"platform": "cpu", "matrix_rate": 1e11}, "tokens_per_cpu_second": 300.0, "process_peak_bytes": 2e6}
    found = [{"ours": ours, "theirs": {}, "theirs_per_second": rate, "ratio": 300 / rate} for rate in (100.0, 150.0, 200.0)]
    text = report.comparison(found)
    assert "On this machine 1.50 to 3.00, median 2.00." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:5]]
    assert rows[1] == ["2", "300", "150", "2.00", "100", "2", ""]


def test_what_reports_no_rate_is_no_peer():
    assert bench_commands.rate_of({"tokens_per_cpu_second": 2.0}, True) == 2.0
    for odd in ({"tokens_per_second": 2.0}, {"tokens_per_cpu_second": 0}, {"tokens_per_cpu_second": None}):
        with pytest.raises(ValueError, match="let its last line be JSON with tokens_per_cpu_second"):
            bench_commands.rate_of(odd, True)


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
        (["dpo", "--json", "figures.md"], "let it end with .json"),
        (["dpo", "--config.mean=1"], "'mean' is 1; use 0 for full rows, or 2 to vocab (8192)"),
        (["dpo", "--config.model.path=m"], "does not know; give --config.data.train too"),
        (["dpo", "--config.model.path=m", "--config.data.train=d", "--config.dim=8"], "'dim' is of what the bench invents"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and not list(Path(tmp_path).iterdir())


def test_rows_have_the_lengths_that_were_asked_for(tmp_path):
    config = methods.get_config()
    config.seq, config.prompt, config.mean, config.batch_size, config.eval.sample_prompts = 40, 8, 0, 2, 9
    methods.write_rows(config, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and {len(row["prompt"].split()) for row in rows} == {8}
    assert {len(row[name].split()) for row in rows for name in ("chosen", "rejected")} == {40 - 8 - 1}  # and the EOS


def test_rows_of_a_file_may_be_longer_than_invented_ones(tmp_path):
    length = lambda *more: methods.experiment("dpo", ["seq=80", "data.train=rows.jsonl", *more], tmp_path).config.data.max_length
    assert (length(), length("data.max_length=512")) == (80, 512)


def test_one_token_in_mean_ends_a_completion_and_no_row_has_one_inside(tmp_path):
    config = methods.get_config()
    config.vocab, config.mean, config.batch_size = 100, 5, 2
    methods.write_model(config, tmp_path)
    methods.write_rows(config, tmp_path / "rows.jsonl")
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    words = {word for line in (tmp_path / "rows.jsonl").read_text().splitlines() for x in json.loads(line).values() for word in x.split()}
    assert len(ends) == len(set(ends)) == 100 / 5 and max(ends) == 99
    assert words and not words & {f"t{end}" for end in ends}


@pytest.mark.slow
@pytest.mark.parametrize("method, peer", [("generate", "transformers_generate"), ("dpo", "trl_dpo"), ("grpo", "trl_grpo")])
def test_a_peer_does_the_same_work(method, peer, tmp_path):
    """A peer gets the config of a case and prints the figures of as many useful tokens."""
    if peer.startswith("trl"):
        pytest.importorskip("trl")
    sizes = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "vocab": 64, "seq": 24, "prompt": 8, "batch_size": 4, "members": 1}
    sizes |= {"rollout.max_new_tokens": 4, "eval.max_new_tokens": 4, "eval.sample_prompts": 8, "eval.temperature": 0}
    case = Case(method, method, "", [f"{name}={value}" for name, value in sizes.items()], 1, method == "generate", str(tmp_path))
    experiment = case.experiment()
    methods.write(experiment.config, tmp_path)
    command = [
        sys.executable,
        str(runs.REPO / "experiments" / "peers" / f"{peer}.py"),
        *bench_commands.filled("{config}", flat(experiment.config)),
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()[-1])
    least, most = {"generate": (8, 8 * 4), "dpo": (4 * 2 * 24, 4 * 2 * 24), "grpo": (32 * (8 + 1), 32 * (8 + 4))}[method]
    assert found["turns"] == 1 and least <= found["tokens"] <= most and found["tokens_per_cpu_second"] > 0


def test_a_peer_without_a_config_says_how_it_is_called():
    file = runs.REPO / "experiments" / "peers" / "trl_dpo.py"
    out = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert out.returncode == 1 and "alignax bench METHOD --against" in out.stderr and out.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_small_bench_writes_its_figures(tmp_path, monkeypatch, capsys):
    """Two methods on a tiny model: the figures fit together, a second start finds its programs, and the roofline is a picture."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("XLA_FLAGS", "")
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "vocab": 128, "seq": 32, "prompt": 8, "batch_size": 4}
    sizes |= {"eval.max_new_tokens": 8}
    words = [f"--config.{name}={value}" for name, value in sizes.items()]
    out = tmp_path / "bench.json"
    assert main(["bench", "dpo", "generate", "--steps", "2", "--json", str(out), *words]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "bench.md").read_text()
    assert page in printed and "useful tokens/s" in page and found["cases"][0]["machine"]["processor"] in page
    dpo, generate = (SimpleNamespace(**case) for case in found["cases"])
    assert dpo.tokens == 4 * 2 * 32 and dpo.real_positions == 1 and 0 < dpo.mfu < 1
    assert dpo.mfu == pytest.approx(dpo.model_flops_per_cpu_second / dpo.machine["rate"], rel=0.2)
    assert dpo.cached_first_step_cpu_s < dpo.first_step_cpu_s and generate.program == "eval/decode"
    assert 64 <= generate.tokens <= 64 * 8 and not dpo.compilations_later and not generate.compilations_later


def test_a_bench_that_finds_no_room_names_its_file_and_leaves_no_half_of_one(tmp_path):
    """The files of a built-in case, and the result."""
    config = methods.get_config()
    config.method, config.vocab, config.batch_size = "dpo", 300, 16
    with runs.small_files(2000), pytest.raises(OSError, match=r"model' could not be written \(.*File too large.*\); make room"):
        methods.write(config, tmp_path)
    assert not [*tmp_path.iterdir()]
    with runs.small_files(20_000), pytest.raises(OSError, match=r"rows\.jsonl' could not be written \(.*File too large.*\); make room"):
        methods.write(config, tmp_path)  # the rows come last: where they are, the rest is
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    methods.write(config, tmp_path)
    out = tmp_path / "bench.json"
    with runs.small_files(2000), pytest.raises(OSError, match=r"bench\.json' could not be written \(.*File too large.*\); make room"):
        bench_commands.written({"cases": ["a" * 3000]}, "a page", bench_commands.files(str(out), drawn=False, force=False))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl"}
