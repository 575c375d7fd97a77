"""The training step compiled ahead of time: for the devices here, and for TPU slices that are not here."""

import time

import jax
import pytest
import runs
import tpu_programs
from tpu_programs import LLAMAS, TABLE

from alignax import hlo
from alignax.config import load_experiment
from alignax.run import plan
from alignax.run.prepare import prepare
from alignax.run.programs import programs
from alignax.run.start import check_step


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
def llama(tmp_path, tpu_slice):
    """Makes the DPO run of `tpu_programs.fields` on the chips of a slice that is not here."""

    def run(topology, shape, *model, **changes):
        fields = tpu_programs.fields(tmp_path, *model, **changes)
        experiment = load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in fields.items()])
        return prepare(experiment, tpu_slice(topology, shape))

    return run


COMPILED = [("v5e:4x4", {"fsdp": 16}, "1B", 2048, 16, 4), ("v5p:4x4x4", {"fsdp": 64}, "8B", 8192, 64, 12)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "shape", "model", "tokens", "pairs", "most"), COMPILED, ids=str)
def test_dpo_steps_of_llamas_fit_slices(topology, shape, model, tokens, pairs, most, llama):
    """The table of docs/performance.md, "Compiled for TPUs"; `most` are the GB of a chip.

    The only collective of a whole matrix of the vocabulary is the gather of the head in bfloat16, where `tensor` is 1. For v5p the
    compiler makes it an all-reduce of zeros and each device's part.
    """
    run = llama(topology, shape, model, tokens, pairs)
    begin = time.process_time()
    compiled = plan.compile_step(run)
    seconds, memory, text = time.process_time() - begin, compiled.memory_analysis(), compiled.as_text()
    found = hlo.collectives(hlo.read(text))
    sent = sum(c.sent for c in found)
    print(f"peak {memory.peak_memory_in_bytes / 1e9:.2f} GB, sent {sent / 1e9:.2f} GB, {seconds:.0f} CPU seconds")
    assert memory.peak_memory_in_bytes < most * 1e9 and seconds < 600 and "splash_mha" in text
    state = sum(x.size for x in jax.tree.leaves(plan.abstract_state(run).params)) * (4 + 8 + 2)
    assert memory.argument_size_in_bytes < 1.1 * state / run.mesh.size, "parameters, moments and the bfloat16 reference are sharded"
    whole = LLAMAS[model]["hidden_size"] * LLAMAS[model]["vocab_size"]
    assert {c.dtype for c in found if c.elements >= whole} == {"bf16"}


@pytest.mark.slow
def test_too_large_a_step_is_refused_by_the_compiler(llama):
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        plan.compile_step(llama("v5e:2x2", {"fsdp": -1}, "8B", 2048, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1B-sft", "1B-ensemble", "1B-grpo", "1B-ppo", "moe-v5p"])
def test_the_kinds_of_the_table_of_plans_are_runs(name, tpu_slice, tmp_path):
    """Runs whose programs include those that the table shows; nothing is compiled."""
    case = TABLE["CASES"][name]
    kind = TABLE["KINDS"][case.kind]
    given = TABLE["write"](case._replace(rows=16, tokens=128), tmp_path) | {"mesh.fsdp": -1}
    file = runs.REPO / "experiments" / "plans" / kind.experiment
    run = prepare(load_experiment(file, [f"{k}={v}" for k, v in given.items()]), tpu_slice("v5e:2x2", {"fsdp": -1}))
    assert {*kind.shown} <= programs(run).keys()
    assert run.policy.config.num_experts == (128 if name.startswith("moe") else 0)
