"""The demo through the command itself, on a tiny model, and the parts of its world."""

import json
import random
from pathlib import Path

import pytest
import runs

from alignax import cli, config

FILE = str(runs.REPO / "experiments" / "demo.py")
TINY = {
    "answers": 64, "pairs": 24, "held_out": 8, "width": 16, "sft_steps": 30, "sft_learning_rate": 1e-2, "steps": 4, "batch_size": 8,
    "eval.every": 2, "eval.batch_size": 8, "eval.sample_prompts": 8, "log.tensorboard": False, "mesh.data": -1, "mesh.fsdp": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """The experiment file's own functions, by name."""
    return config.load_experiment(FILE).loss.__globals__


def test_gold_counts_the_topic_once_and_takes_away_the_rest(demo):
    prompts = ["tell me about the sea"] * 6
    answers = ["waves salt fish", "waves waves waves", "waves cows", "cows cows", "", "waves <unk> the"]
    assert demo["gold"](prompts, answers) == [3.0, -1.0, 0.0, -2.0, 0.0, -1.0]
    assert demo["gold"](["what belongs to the farm"], ["waves cows"]) == [0.0]


def test_every_word_belongs_to_one_topic(demo):
    words = [word for facts in demo["FACTS"].values() for word in facts]
    assert len(words) == len(set(words))


def test_demonstrations_repeat_nothing(demo):
    rng = random.Random(0)
    for _ in range(50):
        prompt = demo["prompt"](rng)
        words = demo["answer"](prompt, rng).split()
        assert 2 <= len(words) <= 7 and words == sorted(set(words))


def test_the_world_is_a_function_of_the_seed(demo, tmp_path):
    c = config.load_experiment(FILE, ["answers=20", "held_out=5"]).config
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        c.seed = seed
        demo["write_world"](tmp_path / name, c)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    same = lambda x, y: [(tmp_path / x / f).read_bytes() == (tmp_path / y / f).read_bytes() for f in files]
    assert Path("answers.jsonl") in files and Path("model/tokenizer.json") in files
    assert all(same("a", "b")) and not all(same("a", "c"))


def test_flipped_labels(demo):
    row = {"prompt": "p", "chosen": " a", "rejected": " b"}
    assert demo["flipped"](row) == {"prompt": "p", "chosen": " b", "rejected": " a"}


def test_an_unknown_stage_is_refused(capsys, tmp_path):
    assert cli.main(["train", "--config", FILE, "--config.stage=ppo", f"--config.workdir={tmp_path / 'demo'}"]) == 2
    assert "config field 'stage' is 'ppo'; use all, sft, dpo, rpo" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_demo_runs_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    from alignax.cli import commands

    work = tmp_path / "demo"
    args = ["train", "--config", FILE, *(f"--config.{k}={v}" for k, v in (TINY | {"workdir": work}).items())]
    run, started = commands.run, []

    def killed(experiment):
        started.append(experiment.config.stage)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run(experiment)

    monkeypatch.setattr(commands, "run", killed)
    assert cli.main(args) == 130
    pairs = (work / "world" / "pairs.jsonl").read_bytes()
    assert cli.main(args) == 0
    assert started == ["sft", "dpo", "sft", "dpo", "rpo"]
    assert (work / "world" / "pairs.jsonl").read_bytes() == pairs and pairs.count(b"\n") == 24
    said = capsys.readouterr()
    assert "this run is complete: step 30 is saved" in said.err
    assert [line.split()[0] for line in said.out.split("\n")[3:6]] == ["SFT", "DPO", "RPO"]
    assert "chosen log-prob against the reference: DPO" in said.out
    assert (work / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (work / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/gold", "eval/kl", "eval/rewards/margins"} <= rows[-1].keys()

    metrics = (work / "dpo" / "metrics.jsonl").read_bytes()
    assert cli.main(["train", "--config", str(work / "dpo" / "config.py")]) == 0, "a stage is a run of its own"
    assert (work / "dpo" / "metrics.jsonl").read_bytes() == metrics
    assert cli.main(["eval", str(work / "sft")]) == 0, "without a reference, as it was trained"
    assert "loss/sft" in capsys.readouterr().out

    from transformers import AutoConfig, AutoTokenizer

    export = work / "rpo" / "export"
    tokens = AutoTokenizer.from_pretrained(export)("tell me about the sea").input_ids
    assert len(tokens) == 5 and max(tokens) < AutoConfig.from_pretrained(export).vocab_size
