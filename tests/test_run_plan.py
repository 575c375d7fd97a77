"""The training step compiled ahead of time: for the devices here, and for TPU slices that are not here."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
import runs
import tiny

from alignax.config import load_experiment
from alignax.run import plan
from alignax.run.prepare import prepare
from alignax.run.start import check_step

# What keeps libtpu from asking a metadata server that is not there.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


@pytest.mark.slow
def test_step_compiles_from_shapes_alone_for_these_devices(tmp_path):
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    experiment = load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in fields.items()])
    memory = plan.compile_step(prepare(experiment)).memory_analysis()
    assert memory.argument_size_in_bytes > 0 and memory.temp_size_in_bytes > 0


def test_token_level_dpo_needs_and_gets_the_references_distribution(tmp_path):
    """The step of a run is traced on shapes: refused without `reference.token_kl`, and with it but no reference."""
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "mesh.data": 2, "mesh.fsdp": 4}
    file = tmp_path / "tdpo.py"
    code = (runs.REPO / "experiments/dpo_hh.py").read_text()
    file.write_text(code + "\n\nfrom alignax.losses import tdpo2\n\n\ndef loss(config):\n    return tdpo2(config.beta)\n")
    run = lambda **more: prepare(load_experiment(file, [f"{k}={v}" for k, v in (fields | more).items()]))
    with pytest.raises(ValueError, match="set reference.token_kl=true"):
        check_step(run())
    check_step(run(**{"reference.token_kl": True}))
    file.write_text(file.read_text() + "\n\nexperience = None\n")
    with pytest.raises(ValueError, match="reference.token_kl is true, but the run has no reference"):
        run(**{"reference.token_kl": True})


@pytest.fixture
def billion(tmp_path, monkeypatch):
    """The DPO experiment on a Llama of 1.36 billion parameters that has no weights, with rows of 2,048 tokens."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'alignax[tpu]'")
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)
    changes = {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | changes))
    tiny.tokenizer().save_pretrained(folder)
    row = {"prompt": "a" * 100, "chosen": " yes" * 500, "rejected": " no" * 500}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 16)
    fields = {
        "workdir": tmp_path / "run", "model.path": folder, "model.init": "random", "model.dtype": "bfloat16", "model.logps_chunk": 512,
        "data.train": tmp_path / "pairs.jsonl", "data.max_length": 2048, "data.max_prompt_length": 1024, "batch_size": 16,
        "eval.samples": 0, "eval.sample_prompts": 0,
    }  # fmt: skip
    return load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in fields.items()])


@pytest.mark.long
@pytest.mark.slow
def test_dpo_step_of_a_1b_model_fits_16_v5e_chips(billion):
    run = prepare(billion, plan.topology_mesh("v5e:4x4", {"fsdp": -1}))
    compiled = plan.compile_step(run)
    memory = compiled.memory_analysis()
    print("peak", memory.peak_memory_in_bytes / 2**30, "GiB of 15.75")
    assert memory.peak_memory_in_bytes < 6 * 2**30
    state = sum(x.size for x in jax.tree.leaves(plan.abstract_state(run).params)) * (4 + 8 + 2)
    assert memory.argument_size_in_bytes < 1.1 * state / 16, "parameters, moments and the bfloat16 reference are sharded 16 ways"


@pytest.mark.slow
def test_too_large_a_step_is_refused_by_the_compiler(billion):
    file = Path(billion.config.model.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 200}))  # 10 billion parameters on 4 chips
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        plan.compile_step(prepare(billion, plan.topology_mesh("v5e:2x2", {"fsdp": -1})))
