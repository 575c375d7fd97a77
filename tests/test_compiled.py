"""Compiled programs on disk: a second start compiles nothing, and the folder can do no harm."""

import os
import subprocess
import sys
import warnings

import jax
import pytest
import runs

from alignax import compiled

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
FIELDS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
SCRIPT = """
import jax
from alignax.compiled import COUNTED, keep
keep()
print(jax.jit(lambda x: x * 3)(14), COUNTED)
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """jax's settings of the cache, by name, after `keep`; the test's own are put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = {name: jax.config.values[name] for name in FIELDS}
    jax.config.update("jax_enable_compilation_cache", True)

    def kept():
        compiled.keep()
        return {name: jax.config.values[name] for name in FIELDS}

    with warnings.catch_warnings():
        yield kept
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_folder_of_caches_unless_a_variable_says_otherwise(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert not settings()["jax_compilation_cache_dir"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    found = settings()
    assert found["jax_compilation_cache_dir"] == str(tmp_path / "alignax" / "programs") and os.stat(compiled.folder()).st_mode & 0o77 == 0
    assert found["jax_persistent_cache_min_compile_time_secs"] == 0
    assert str(compiled.COUNTED).endswith(f"read from {compiled.folder()}")


def test_several_processes_share_no_default_folder_but_one_that_was_named(settings, tmp_path, monkeypatch):
    assert settings()["jax_compilation_cache_dir"]
    compiled.share_only()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
    compiled.share_only()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "shared")


def test_a_cache_that_is_turned_off_leaves_the_disk_alone(settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert not settings()["jax_compilation_cache_dir"] and not [*tmp_path.iterdir()]
    assert str(compiled.COUNTED).endswith("compiled, none is kept")


def test_a_folder_that_cannot_be_made_is_no_error(settings, tmp_path):
    (tmp_path / "alignax").write_text("a file")
    assert not settings()["jax_compilation_cache_dir"]


def test_simulated_devices_read_no_programs_whoever_asks_for_it(settings):
    from alignax.mesh import order_collectives

    assert settings()["jax_enable_compilation_cache"]
    order_collectives()
    assert not jax.config.values["jax_enable_compilation_cache"]


def test_programs_that_were_not_read_for_longest_make_room(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}", (1000 - i % 4, 0))
    compiled.prune(tmp_path, 250)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "4"]


def test_a_damaged_folder_costs_a_compilation_and_nothing_else(tmp_path):
    env = runs.environment(1, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(runs.REPO))
    env = {name: value for name, value in env.items() if name not in VARIABLES}

    def start():
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.strip()

    place = tmp_path / "alignax" / "programs"
    assert start() == f"42 programs: 1 compiled, 0 read from {place}"
    assert start() == f"42 programs: 0 compiled, 1 read from {place}"
    (file,) = place.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert start() == f"42 programs: 1 compiled, 0 read from {place}"


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    less = {"steps": 2, "mesh.data": 1, "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "model.packing": -1}
    fields = runs.world(tmp_path) | less
    env = runs.environment(1, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "programs"))
    lines = []
    for name in ("first", "second", "second"):
        out = runs.finish(runs.begin(runs.arguments(fields | {"workdir": tmp_path / name}), env))
        lines += [line for line in out.splitlines() if line.startswith("programs: ")]
    assert ", 0 read from" in lines[0] and lines[1].startswith("programs: 0 compiled, ") and len(lines) == 3
    assert runs.losses(tmp_path / "first") == runs.losses(tmp_path / "second")
