"""Reference log-probs computed once: the same run, keys that hold what matters, interruption, damage."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from alignax.cli import main
from alignax.config import load_experiment
from alignax.run import reference_cache as reference
from alignax.run.prepare import prepare
from alignax.run.roles import frozen

FAST = {"steps": 6, "eval.samples": 0, "eval.sample_prompts": 0, "eval.every": 0}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world")) | FAST


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 16)  # 40 pairs: parts of 16, 16 and 8


@pytest.fixture(scope="module")
def cached(fields, tmp_path_factory):
    """A run that has computed the cache, and its folder."""
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROWS", 16)
        assert train(fields, folder / "run", folder / "cache") == 0
    return folder


def train(fields, workdir: Path, cache: Path | str = "off", **more) -> int:
    return main(runs.arguments(fields | {"workdir": workdir, "reference.cache": cache} | more))


def prepared(fields, **more):
    arguments = [a.removeprefix("--config.") for a in runs.arguments(fields | {"workdir": "x"} | more)[3:]]
    return prepare(load_experiment(runs.REPO / "experiments" / "dpo_hh.py", arguments))


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_a_part_that_finds_no_room_is_not_there(tmp_path):
    reference.write(tmp_path, 0, np.zeros(4, np.float32))
    with (
        runs.small_files(256),
        pytest.raises(OSError, match=r"000001\.safetensors' could not be written \(.*File too large.*\); make room"),
    ):
        reference.write(tmp_path, 1, np.zeros(4000, np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["000000.safetensors"]


@pytest.mark.slow
def test_a_cached_reference_trains_as_the_live_one(fields, cached, tmp_path):
    assert train(fields, tmp_path / "live") == 0
    a, b = runs.losses(tmp_path / "live"), runs.losses(cached / "run")
    for step in a:
        for name in ("loss", "rewards/margins", "grad_norm", "logps/chosen_drift"):
            assert a[step][name] == pytest.approx(b[step][name], rel=1e-5, abs=1e-5)
    live, stored = (runs.evaluations(w)[-1]["eval/loss"] for w in (tmp_path / "live", cached / "run"))
    assert live == pytest.approx(stored, rel=1e-5)
    assert len(parts(cached / "cache")) == 3  # training and evaluation data are one file here, so one key


@pytest.mark.slow
def test_another_run_reads_it_and_computes_nothing(fields, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "write", None)
    changes = {"optimizer.learning_rate": 1e-4, "batch_size": 16, "beta": 0.5, "mesh.data": 2, "mesh.fsdp": -1}
    assert train(fields, tmp_path / "run", cached / "cache", **changes) == 0


def test_the_key_is_what_the_numbers_depend_on(fields):
    run = prepared(fields)
    key = lambda run, digest="a": reference.key(run, run.data.train.examples, digest)
    same = [prepared(fields, **{name: value}) for name, value in (("batch_size", 16), ("seed", 3), ("optimizer.learning_rate", 1.0))]
    other = [
        prepared(fields, **{name: value})
        for name, value in (("data.max_prompt_length", 5), ("model.dtype", "bfloat16"), ("data.limit", 30))
    ]
    assert {key(r) for r in same} == {key(run)}
    assert len({key(run), key(run, "b"), *map(key, other)}) == 5
    e = run.data.train.examples
    swapped = dataclasses.replace(e, tokens=np.concatenate([e.tokens[:-1], e.tokens[-1:] + 1]))
    masked = dataclasses.replace(e, scored=np.roll(e.scored, 1))
    assert len({reference.key(run, x, "a") for x in (e, swapped, masked)}) == 3


@pytest.mark.slow
def test_an_interrupted_computation_goes_on(fields, cached, tmp_path, monkeypatch):
    cache, written = tmp_path / "cache", []
    shutil.copytree(cached / "cache", cache)
    parts(cache)[1].unlink()
    (parts(cache)[0].parent / ".000001.safetensors.host-1.alignax-tmp").write_bytes(b"half")  # what a kill leaves
    write = reference.write
    monkeypatch.setattr(reference, "write", lambda folder, index, values: (written.append(index), write(folder, index, values)))
    assert train(fields, tmp_path / "run", cache) == 0
    assert written == [1]
    for name, part in {p.name: p for p in parts(cache)}.items():
        whole = next(p for p in parts(cached / "cache") if p.name == name)
        run = prepared(fields)
        index = int(name.split(".")[0])
        a, b = (reference.read(p.parent, index, run.data.train.examples) for p in (part, whole))
        np.testing.assert_array_equal(a, b)


def spoil_bytes(file: Path):
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)


def spoil_values(file: Path):
    """Replaces a part by one that is whole and consistent, but has other log-probs than the reference."""
    from safetensors.numpy import load_file

    reference.write(file.parent, int(file.stem), load_file(file)["logps"] + np.float32(0.5))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_bytes, "is damaged: its content does not match its checksum or size; delete the file"),
        (lambda f: f.write_bytes(f.read_bytes()[:40]), "is damaged or cut short"),
        (spoil_values, "differ from those of the reference by 0.5 nats; delete that folder"),
    ],
)
def test_what_is_damaged_or_false_is_refused(spoil, message, fields, cached, tmp_path, capsys):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    spoil(parts(tmp_path / "cache")[0])
    assert train(fields, tmp_path / "run", tmp_path / "cache") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


EXPERIMENT = """
from alignax import chain, dpo, kto, logps, sync
from alignax.experience import mismatched_kl
from experiments.dpo_hh import get_config
"""
MOVING = """
def loss(config):
    return dpo()

def experience(config, reference):
    return chain(logps("ref_logps", reference))

def averages(config):
    return {"reference": sync()}
"""
MISMATCHED = """
def loss(config):
    return kto()

def experience(config, reference, policy):
    return chain(logps("ref_logps", reference), mismatched_kl(policy, reference))
"""


READING = """
import jax.numpy as jnp
def loss(config):
    return dpo()

def experience(config, reference):
    return chain(logps("ref_logps", reference), lambda batch: WHAT)
"""
OTHER_ROWS = "logps('other', reference)(batch | {'tokens': jnp.roll(batch['tokens'], 1, axis=0)})"
ENTROPY = "batch | {'entropy': reference.apply(reference.params, batch).entropy}"


@pytest.fixture
def chosen(fields, tmp_path):
    """The folder that a run chooses for log-probs of the reference, relative to its workdir; 6 steps of 8 read 40 pairs twice."""

    def folder(code: str = "", **more):
        file = runs.REPO / "experiments" / "dpo_hh.py"
        if code:
            file = tmp_path / "experiment.py"
            file.write_text(EXPERIMENT + code)
        given = fields | {"workdir": tmp_path / "run", "reference.cache": ""} | more
        run = prepare(load_experiment(file, [f"{name}={value}" for name, value in given.items()]))
        return run.cache and str(run.cache.relative_to(tmp_path / "run"))

    return folder


def test_log_probs_that_are_read_twice_are_cached_in_the_workdir(chosen, tmp_path):
    assert chosen() == "reference" and chosen(**{"microbatches": 4, "mesh.data": 2, "mesh.tensor": 4}) == "reference"
    assert not chosen(steps=5) and not chosen(**{"reference.cache": "off"})
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)  # a run that computed them in every step goes on with that
    assert not chosen()
    (tmp_path / "run" / "reference").mkdir()
    assert chosen() == "reference"


@pytest.mark.parametrize(
    "code",
    [MOVING, READING.replace("WHAT", OTHER_ROWS), READING.replace("WHAT", ENTROPY)],
    ids=["moving", "other rows", "entropy"],
)
def test_an_experience_that_needs_more_than_log_probs_of_the_rows_gets_the_reference_itself(code, chosen):
    assert chosen(READING.replace("WHAT", "batch")) == "reference"
    assert not chosen(code)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_caches_by_itself_goes_on_from_its_cache(fields, tmp_path, capsys, monkeypatch):
    assert train(fields, tmp_path / "live") == train(fields, tmp_path / "run", "") == 0
    said = capsys.readouterr().err
    assert said.count("are computed once, for 1.2 epochs; reference.cache=off computes them in every step") == 1
    live, stored = (runs.losses(tmp_path / name) for name in ("live", "run"))
    assert [row["loss"] for row in stored.values()] == pytest.approx([row["loss"] for row in live.values()], rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    monkeypatch.setattr(reference, "write", None)
    assert train(fields, tmp_path / "run", "") == 0 and "going on after step 3" in capsys.readouterr().err
    assert runs.losses(tmp_path / "run") == stored


@pytest.mark.parametrize(
    "code, change, message",
    [
        (MOVING, {}, "would become outdated: the average 'reference' moves"),
        (MISMATCHED, {"data.kind": "unpaired"}, "this experience scores others"),
        ("loss = lambda config: dpo()\nexperience = lambda config: chain()", {}, "the run has no reference"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(code, change, message, fields, tmp_path, capsys):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT + code)
    given = fields | {"workdir": tmp_path / "run", "reference.cache": tmp_path / "cache"} | change
    assert main(["train", "--config", str(file), *(f"--config.{k}={v}" for k, v in given.items())]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_log_probs_that_are_not_there_yet_take_no_memory(fields):
    """The programs keep the data that they were made with, placeholders included, to the end of the run."""
    run = prepared(fields, **{"reference.cache": "c"})
    for examples in (run.data.train.examples, run.data.evaluated):
        place = examples.token_fields["stored_ref_logps"]
        assert place.shape == examples.tokens.shape and place.dtype == np.float32
        assert np.lib.array_utils.byte_bounds(place)[1] - np.lib.array_utils.byte_bounds(place)[0] == 4
    batch = run.data.train.batch(0)["stored_ref_logps"]
    assert batch.shape == run.data.train.batch(0)["tokens"].shape and not batch.any()


def test_the_reference_is_held_only_where_samples_are_compared_with_it(fields):

    assert "reference" not in frozen(prepared(fields, **{"reference.cache": "c"}).roles)
    assert "reference" in frozen(prepared(fields, **{"reference.cache": "c", "eval.samples": 2}).roles)
    assert "reference" in frozen(prepared(fields).roles)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_share_one_cache(fields, tmp_path):
    tiny.pairs(tmp_path / "pairs.jsonl")
    two = fields | {"workdir": tmp_path / "run", "reference.cache": tmp_path / "cache", "mesh.data": 4, "mesh.fsdp": 2}
    out = [runs.finish(process) for process in runs.begin_two([runs.arguments(two)] * 2)]
    assert "reference log-probs of 40 rows, 0 of 1 parts" in out[0] and "reference log-probs" not in out[1]
    assert len(parts(tmp_path / "cache")) == 1 and not list((tmp_path / "cache").glob("*/.*"))
