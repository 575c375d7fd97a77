"""The bench of a GRPO iteration: its FLOPs by hand, and its own side at small sizes."""

import argparse
import sys

import pytest
import runs

from alignax.config import load_experiment

FILE = str(runs.REPO / "experiments" / "bench_online.py")


@pytest.fixture(scope="module")
def bench():
    """The functions of the file, by name."""
    sys.path.insert(0, str(runs.REPO / "experiments"))
    yield load_experiment(FILE).loss.__globals__
    sys.path.remove(str(runs.REPO / "experiments"))


def test_flops_by_hand(bench):
    c = argparse.Namespace(dim=2, layers=1, vocab=5, prompts=3, samples=4, new=2, members=1)
    assert bench["hidden_size"](c) == 64
    token = 8 * 2**2 + 6 * 2 * 64  # four projections of 2 x 2, three of 2 x 64: twice as many FLOPs as weights
    read = lambda T: token * T + 4 * 2 * T * T / 2  # scores and values, the causal half
    head = 2 * 2 * 5 * 2  # of two tokens
    sampled = read(1) + 4 * (read(3) - read(1) + head)
    scored = 4 * (read(3) + head) + 4 * read(3)  # by the reference; by the reward model
    assert bench["model_flops"](c, [1]) == 3 * (sampled + scored + 3 * 4 * (read(3) + head))


@pytest.mark.long
@pytest.mark.slow
def test_our_side_compiles_once_and_stays_in_its_programs(bench):
    sizes = {"dim": 32, "layers": 1, "heads": 2, "vocab": 64, "prompts": 4, "samples": 2, "prompt": 8, "new": 6, "microbatches": 2}
    command = [sys.executable, FILE, "--side=ours", "--iterations=2", *(f"--{name}={value}" for name, value in sizes.items())]
    found = bench["last_json"](["env", f"PYTHONPATH={runs.REPO}", "XLA_FLAGS=", *command])
    assert found["compilations"] == 0 and 0 < found["outside_programs"] < 1 and found["sampler_gap"] < 1e-5
    assert 4 * 2 * (4 + 1) <= found["tokens"] <= 4 * 2 * (8 + 6) and found["tokens_per_cpu_second"] > 0
    assert 0 < sum(found["seconds"].values()) <= found["first_iteration_s"]
