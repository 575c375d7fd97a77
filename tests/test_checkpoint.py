"""Checkpoints are exact, whole or absent, and refused when they are damaged or another run's."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import cli, init_state
from alignax.checkpoint import Checkpoints

ABOUT = {"policy": "p", "reference": "r"}
adam = optax.adam(1e-2)


def state(scale: float = 1.0):
    params = jax.tree.map(lambda x: scale * x, tiny.params())
    return jax.jit(lambda p: init_state(p, adam, jax.random.key(3)))(params)


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
    assert again.latest() == 5 and again.about(5) == ABOUT | {"format": 1}
    for i, copy in copies.items():
        restored = again.restore(i, state(0.0))
        restored = restored.replace(key=jax.random.key_data(restored.key))
        jax.tree.map(np.testing.assert_array_equal, restored, copy)
    jax.tree.map(np.testing.assert_array_equal, again.restore_params(3, now.params), copies[3].params)
    again.close()


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(), ABOUT, {})
    checkpoints.close()
    return tmp_path


def test_another_models_checkpoint_is_refused(saved):
    other = state().replace(params={"embed": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"checkpoints/0 is damaged, or of another model.*delete that folder"):
        Checkpoints(saved).restore(0, other)


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_checkpoint_is_refused(saved, how):
    files = [f for f in (saved / "checkpoints" / "0" / "params").rglob("*") if f.is_file() and f.stat().st_size > 1000]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:50]) if how == "truncated" else file.unlink()
    with pytest.raises(ValueError, match=r"checkpoints/0 is damaged"):
        Checkpoints(saved).restore(0, state())


def test_half_written_checkpoint_is_never_listed(saved):
    shutil.copytree(saved / "checkpoints" / "0", saved / "checkpoints" / "1.orbax-checkpoint-tmp")
    assert Checkpoints(saved).latest() == 0


def test_commands_refuse_damaged_and_foreign_checkpoints(tmp_path, capsys):
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
    assert "grew from a policy with digest" in err and err.count("\n") == 1

    save_file(tensors, str(fields["model.path"]) + "/model.safetensors", metadata={"format": "pt"})
    for file in (tmp_path / "run" / "checkpoints" / "2" / "train").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert cli.main(runs.arguments(fields)) == 2
    err = capsys.readouterr().err
    assert "checkpoints/2 is damaged" in err and "delete that folder" in err and err.count("\n") == 1


def test_a_disk_that_fills_up_while_saving(tmp_path):
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "steps": 4, "eval.samples": 0, "eval.sample_prompts": 0}
    command = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *runs.command(runs.arguments(fields))]  # files of at most 40 KiB
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, cwd=runs.REPO, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("alignax: error: a checkpoint could not be written to")
    assert "make room, and run the same command again" in done.stderr
    assert Checkpoints(tmp_path / "run").latest() is None
    runs.finish(runs.begin(runs.arguments(fields)))
    assert Checkpoints(tmp_path / "run").latest() == 4
