"""A run that trains adapters alone: what it says, stores, resumes and exports."""

import json
import signal

import numpy as np
import peft
import pytest
import runs
import torch
import torch_llama
from safetensors.numpy import load_file

LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.targets": "q_proj,v_proj,up_proj", "export.final": True, "steps": 9}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world")) | LORA


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, runs.finish(runs.begin(runs.arguments(fields | {"workdir": workdir})))


@pytest.mark.slow
def test_it_says_what_is_trained_and_what_the_reference_is(whole):
    workdir, out = whole
    assert "0.001 M more in float32 that are trained" in out
    assert "of rank 2 on q, v, up; the reference is their base, without adapters" in out
    assert "step 0: policy = reference, margin 0.0e+00" in out
    first = runs.losses(workdir)[1]
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert runs.losses(workdir)[9]["loss"] < first["loss"]


@pytest.mark.slow
def test_only_adapters_are_stored(whole, fields):
    workdir, _ = whole
    stored = sum(f.stat().st_size for f in (workdir / "checkpoints" / "9").rglob("*") if f.is_file())
    tensors = load_file(workdir / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2  # layers, modules, A and B
    assert stored < 3 * sum(x.nbytes for x in tensors.values()) + 100_000, "moments and adapters, and no base"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about PEFT
def test_transformers_and_peft_load_the_same_model(whole, fields):
    workdir, _ = whole
    load = torch_llama.transformers.AutoModelForCausalLM.from_pretrained
    merged, base = load(workdir / "export").eval(), load(fields["model.path"]).eval()
    tokens, mask = torch_llama.rows([12, 7], 12)
    plain = torch_llama.torch_logits(base, tokens, mask)
    theirs = torch_llama.torch_logits(peft.PeftModel.from_pretrained(base, str(workdir / "adapter")).eval(), tokens, mask)  # type: ignore[arg-type]
    np.testing.assert_allclose(torch_llama.torch_logits(merged, tokens, mask), theirs, atol=1e-5)
    assert np.abs(theirs - plain).max() > 1e-3
    with torch.no_grad():
        changed = {n for n, p in merged.named_parameters() if not torch.equal(p, dict(load(fields["model.path"]).named_parameters())[n])}
    assert {n.split(".")[-2] for n in changed} == {"q_proj", "v_proj", "up_proj"}


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_resumed(whole, fields, tmp_path):
    workdir = tmp_path / "run"
    args = runs.arguments(fields | {"workdir": workdir})
    process = runs.begin(args)
    done = lambda: (workdir / "metrics.jsonl").exists() and len(runs.losses(workdir)) >= 5
    assert runs.stop_when(process, done, signal.SIGKILL)
    process.communicate()
    runs.finish(runs.begin(args))
    assert runs.losses(workdir) == runs.losses(whole[0])
    a, b = (runs.final_params(w) for w in (workdir, whole[0]))
    exported = load_file(workdir / "export" / "model.safetensors")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_array_equal(a[name], exported[name])


@pytest.mark.slow
def test_an_int8_base_trains_behind_the_same_reference(fields, tmp_path, capsys):
    from alignax.cli import main

    more = {"workdir": tmp_path / "run", "lora.int8": True, "lora.dora": True, "steps": 4, "eval.every": 0}
    assert main(runs.arguments(fields | more)) == 0
    rows = runs.losses(tmp_path / "run")
    assert abs(rows[1]["rewards/margins"]) < 1e-5 and rows[4]["loss"] < rows[1]["loss"]
    assert "M parameters in int8" in capsys.readouterr().err


@pytest.mark.slow
def test_goes_on_from_a_peft_folder_on_eight_devices(whole, fields, tmp_path):
    more = {"lora.path": whole[0] / "adapter", "workdir": tmp_path / "run", "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "steps": 2}
    out = runs.finish(runs.begin(runs.arguments(fields | more), runs.environment(8)))
    # Measured against the base: what was learnt before counts as margin from the first step on.
    assert "step 0: policy = reference" not in out and runs.losses(tmp_path / "run")[1]["rewards/margins"] > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora.targets": "qq"}, "lora.targets 'qq' names no matrix of this model"),
        ({"lora.rank": -1}, "lora.rank is -1"),
        ({"lora.alpha": 0.0}, "lora.alpha is 0.0"),
        ({"lora.path": "/nowhere"}, "'/nowhere' has no adapter_config.json"),
        ({"lora.path": {}, "lora.rank": 0}, "has no adapter_model.safetensors; fetch the adapter again"),
        ({"lora.path": {}, "lora.rank": 8}, "lora.rank is 8, but the adapters in lora.path"),
        ({"model.init": "random"}, "adapts trained weights, but model.init is 'random'; set model.init=pretrained"),
    ],
)
def test_refused(change, message, fields, tmp_path, capsys):
    from alignax.cli import main

    if change.get("lora.path") == {}:  # a folder of PEFT without its weights
        (tmp_path / "adapter").mkdir()
        described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
        change = change | {"lora.path": tmp_path / "adapter"}
    assert main(runs.arguments(fields | {"workdir": tmp_path / "run"} | change)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
