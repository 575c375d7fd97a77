"""Checkpoints are exact, whole or absent, and refused when they are damaged or another run's."""

import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import cli, init_state
from alignax.mesh import make_mesh, sharding
from alignax.run.checkpoint import Checkpoints, began, digests

ABOUT = {"policy": "p", "reference": "r", "day": "2026-01-02"}
adam = optax.adam(1e-2)


def state(scale: float = 1.0):
    params = jax.tree.map(lambda x: scale * x, tiny.params())
    return jax.jit(lambda p: init_state(p, adam, jax.random.key(3)))(params)


@pytest.mark.slow
def test_saved_state_is_that_of_its_step_though_the_next_steps_take_its_buffers(tmp_path):
    @jax.jit
    def step(s):
        updates, opt_state = adam.update(s.params, s.opt_state)
        return s.replace(step=s.step + 1, params=optax.apply_updates(s.params, updates), opt_state=opt_state)

    donating = jax.jit(step, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=10)
    now, copies = state(), {}
    for i in range(1, 6):
        now = donating(now)
        copies[i] = jax.tree.map(np.array, now.replace(key=jax.random.key_data(now.key)))
        checkpoints.save(now, ABOUT, {})
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=10)
    assert again.latest() == 5 and again.about(5).items() >= (ABOUT | {"format": 2, "step": 5}).items()
    for i, copy in copies.items():
        restored = again.restore(i, state(0.0))
        restored = restored.replace(key=jax.random.key_data(restored.key))
        jax.tree.map(np.testing.assert_array_equal, restored, copy)
    jax.tree.map(np.testing.assert_array_equal, again.restore_params(3, now.params), copies[3].params)
    again.close()


@pytest.mark.slow
def test_an_evaluation_without_the_metric_is_saved_and_never_the_best(tmp_path):
    checkpoints, now = Checkpoints(tmp_path, keep=1, best="-reward"), state()
    for step, scores in enumerate(({"reward": 0.5}, {"kl": 0.1}, {}), start=1):
        checkpoints.save(now.replace(step=jnp.int32(step)), ABOUT, scores)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(), ABOUT, {})
    checkpoints.close()
    return tmp_path


def test_half_written_checkpoint_is_never_listed(saved):
    shutil.copytree(saved / "checkpoints" / "0", saved / "checkpoints" / "1.orbax-checkpoint-tmp")
    assert Checkpoints(saved).latest() == 0


def test_a_run_goes_on_with_the_day_that_it_began(saved, tmp_path):
    assert str(began(saved)) == "2026-01-02"
    assert began(tmp_path / "new") == datetime.date.today()


def test_a_renamed_checkpoint_is_refused(saved):
    shutil.copytree(saved / "checkpoints" / "0", saved / "checkpoints" / "3")
    with pytest.raises(
        ValueError, match="saved at step 0, but its folder was renamed.*; delete that folder, and the run goes on from step 0"
    ):
        Checkpoints(saved).restore_params(3, state().params)
    with pytest.raises(
        ValueError, match="0 has no average 'emaa'; export.params .for generate, eval.params. must be one of policy$"
    ):  # which is no damage
        Checkpoints(saved).restore_params(0, state().params, "emaa")


@pytest.mark.slow
def test_who_only_reads_touches_nothing_and_what_a_killed_save_left_goes_with_the_next(tmp_path, saved):
    assert Checkpoints(tmp_path / "none", writes=False).latest() is None and not (tmp_path / "none").exists()
    half = saved / "checkpoints" / "1.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "0", half)
    there = lambda: sorted(path.relative_to(saved) for path in saved.rglob("*"))
    before = there()
    reader = Checkpoints(saved, writes=False)
    reader.restore(0, state(0.0))
    assert there() == before
    writer = Checkpoints(saved, keep=1)
    writer.save(dataclasses.replace(state(), step=jnp.int32(2)), ABOUT, {})
    writer.close()
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["2"]
    # The reader began with step 0, which was removed meanwhile.
    step, restored = reader.newest(lambda step: reader.restore(step, state(0.0)))
    assert step == 2 == int(restored.step)
    with pytest.raises(ValueError, match="none/checkpoints' holds no complete checkpoint yet"):
        Checkpoints(tmp_path / "none", writes=False).newest(lambda step: step)


def test_an_array_that_is_not_as_it_was_saved_is_refused(saved):
    file = saved / "checkpoints" / "0" / "about" / "metadata"
    about = json.loads(file.read_text())
    about["digests"]["params/norm"] = "00000000"
    file.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match="checkpoints/0 is damaged.*params/norm differs from what was saved.*; delete that folder, and the run begins"
    ):
        Checkpoints(saved).restore(0, state(0.0))


@pytest.mark.parametrize("text", ["[]", "1e999", "[" * 100_000])
def test_metadata_that_is_no_object_is_refused(tmp_path, text):
    file = tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match="checkpoints/4 is damaged .*; delete that folder"):
        Checkpoints(tmp_path)


def test_digests_see_every_bit_and_no_layout():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (8, 6), np.uint32)
    arrays = [words.view(dtype) for dtype in (np.float32, np.int32, jnp.bfloat16, np.int8)] + [words % 2 == 0]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for array in arrays:
        whole = digests([jnp.asarray(array)])
        laid_out = jax.device_put(array, sharding(mesh, ("embed", "mlp"), array.shape))
        assert digests([laid_out]) == whole
        for _ in range(4):
            flipped = bytearray(array.tobytes())
            bit = rng.integers(8) if array.dtype != bool else 0
            flipped[rng.integers(len(flipped))] ^= 1 << bit
            assert digests([jnp.asarray(np.frombuffer(flipped, array.dtype).reshape(array.shape))]) != whole
    assert digests([jnp.zeros(3)]) != digests([-jnp.zeros(3)])
    assert digests(jax.random.key(0)) != digests(jax.random.key(1))


FLIPS = """
import pathlib, random, sys, jax, numpy as np
sys.path.insert(0, "tests")
import test_run_checkpoint as t
folder, rng, seen = pathlib.Path(sys.argv[1]), random.Random(0), {"harmless": 0, "refused": 0}
raw = lambda s: [np.asarray(x).tobytes() for x in jax.tree.leaves(s.replace(key=jax.random.key_data(s.key)))]
like, right = t.state(0.0), raw(t.state())
for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size):
    whole = file.read_bytes()
    for _ in range(2 if len(whole) < 20000 else 20):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        try:
            assert raw(t.Checkpoints(folder).restore(0, like)) == right, file
            seen["harmless"] += 1
        except ValueError as e:
            assert "checkpoints/0 is damaged" in str(e) and "\\n" not in str(e), e
            seen["refused"] += 1
    file.write_bytes(whole)
assert seen["refused"] > 30, seen
"""


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused_or_harmless(saved):
    """The test has a process of its own: orbax leaves things behind after a failed restore."""
    command = [sys.executable, "-c", FLIPS, str(saved)]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, cwd=runs.REPO)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def run_of_two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    fields = runs.world(folder) | {"workdir": folder / "run", "steps": 2, "eval.samples": 0, "eval.sample_prompts": 0}
    assert cli.main(runs.arguments(fields)) == 0
    return fields, folder / "run"


@pytest.mark.slow
def test_checkpoints_of_other_models_and_data_are_refused(tmp_path, capsys):
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "steps": 2, "eval.samples": 0, "eval.sample_prompts": 0}
    assert cli.main(runs.arguments(fields)) == 0
    tiny_other = tmp_path / "other"
    shutil.copytree(str(fields["model.path"]), tiny_other)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tiny_other / "model.safetensors")
    save_file({k: x + 0.01 for k, x in tensors.items()}, str(fields["model.path"]) + "/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert cli.main(runs.arguments(fields)) == 2
    err = capsys.readouterr().err
    assert "comes from another policy (" in err and err.count("\n") == 1

    save_file(tensors, str(fields["model.path"]) + "/model.safetensors", metadata={"format": "pt"})
    pairs = Path(str(fields["data.train"]))
    text = pairs.read_text()
    pairs.write_text("".join(reversed(text.splitlines(keepends=True))))
    assert cli.main(runs.arguments(fields)) == 2
    assert "comes from another data (" in capsys.readouterr().err
    pairs.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "item, damage",
    [("params", "truncated"), *(pytest.param(*x, marks=pytest.mark.long) for x in (("train", "emptied"), ("params", "missing")))],
)
def test_damaged_checkpoint_is_refused(run_of_two_steps, tmp_path, item, damage):
    """The test has a process of its own: what orbax leaves behind after a failed restore would fail later tests."""
    fields, workdir = run_of_two_steps
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    files = [f for f in (copy / "checkpoints" / "2" / item).rglob("*") if f.is_file() and f.stat().st_size > 1000]
    assert files
    for file in files:
        file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:50] if damage == "truncated" else b"")
    done = subprocess.run(
        runs.command(runs.arguments(fields | {"workdir": copy})), env=runs.environment(), capture_output=True, text=True, cwd=runs.REPO
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("alignax: ")]
    assert len(errors) == 1 and "checkpoints/2 is damaged" in errors[0] and "delete that folder" in errors[0], done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving(tmp_path):
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "steps": 4, "eval.samples": 0, "eval.sample_prompts": 0}
    command = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *runs.command(runs.arguments(fields))]  # files of at most 40 KiB
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, cwd=runs.REPO, timeout=240)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("alignax: ")]
    assert len(errors) == 1 and errors[0].startswith("alignax: error: a checkpoint could not be written to"), done.stderr
    assert "make room, and run the same command again" in errors[0]
    assert Checkpoints(tmp_path / "run").latest() is None
    runs.finish(runs.begin(runs.arguments(fields)))
    assert Checkpoints(tmp_path / "run").latest() == 4
