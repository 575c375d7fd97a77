"""`alignax plan`: what programs take on TPU slices that are not at hand, and how long at least."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import tpu_programs
from jax.experimental import pallas as pl

from alignax import chips, hlo
from alignax.cli import main, parse, plan_commands
from alignax.compiled import COUNTED
from alignax.config import load_experiment
from alignax.mesh import make_mesh
from alignax.models.rows import laid_out
from alignax.packing import deal
from alignax.run import forecast, plan, planned, turns
from alignax.run.forecast import Forecast
from alignax.run.prepare import prepare
from alignax.run.programs import programs

RM = str(runs.REPO / "experiments/rm_hh.py")
SMALL = Forecast(int(2e9), int(16e9), "", 4e12, 8e9, {"all-gather fsdp": 3e9, "all-reduce data (DCN)": 1e9}, {}, 1000.0, 0, 12.3)


@pytest.fixture
def fields(tmp_path):
    """The fields of a tiny run without samples."""
    own = runs.world(tmp_path) | {"workdir": tmp_path / "run", "eval.samples": 0, "eval.sample_prompts": 0, "mesh.fsdp": -1}
    return [f"--config.{name}={value}" for name, value in own.items() if name != "mesh.data"]


# --- figures ---


def test_a_forecast_names_its_bound_and_its_times():
    f = SMALL._replace(seconds={"compute": 2.0, "HBM": 1.0, "ICI": 0.5, "DCN": 0.0})
    assert f.fits and f.bound == "compute" and f.span == (2.0, 3.5)
    row = dict(zip(forecast.HEAD, forecast.row("train", f), strict=True))
    assert row["fits by GB"] == "14.00" and row["ICI GB"] == "3" and row["DCN GB"] == "1" and row["seconds"] == "2 to 3.5"
    assert row["tokens/s"] == "286 to 500" and row["compiled in s"] == "12"
    assert forecast.row("train", f._replace(memory=int(17e9)))[2] == "no, -1.00" and not f._replace(memory=int(17e9)).fits
    refused = SMALL._replace(memory=0, refused="needs 39.62G of 15.75G")
    assert not refused.fits and refused.bound == "" and forecast.row("train", refused)[1:3] == ["needs 39.62G of 15.75G", "no"]
    assert not math.isnan(refused.span[1])


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.62G of 15.75G hbm. Exceeded hbm capacity by 23.87G.",
         "needs 39.62G of 15.75G"),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.21G) exceeds available HBM "
         "(15.75G).", "needs 38.21G or more of 15.75G"),
        ("RESOURCE_EXHAUSTED: something\nelse", "RESOURCE_EXHAUSTED: something else"),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_program_that_does_not_fit(said, short):
    assert forecast.refusal(said) == short


def test_times_are_those_of_published_rates_and_of_the_links_of_a_group(tpu_slice):
    """v5e: 197 TFLOP/s, 820 GB/s, links of 45 GB/s. A line of 4 chips has one link, a plane of 4 x 4 two."""
    mesh = tpu_slice("v5e:4x4", {"fsdp": 4, "tensor": 4})
    sent = lambda group: hlo.Collective("all-gather", "bf16", 1, 9e9, group)
    numbers = np.arange(16).reshape(4, 4)
    found = forecast.durations(mesh.devices, 197e12, 82e9, [sent(tuple(numbers[0])), sent(tuple(numbers.ravel()))], 3.125e9)
    assert found == {"compute": 1.0, "HBM": pytest.approx(0.1), "ICI": pytest.approx(0.2 + 0.1), "DCN": pytest.approx(1.0)}
    assert forecast.axes_of(mesh, mesh.devices, tuple(numbers[:, 1])) == ["fsdp"]
    assert forecast.axes_of(mesh, mesh.devices, tuple(numbers.ravel())) == ["fsdp", "tensor"]
    assert forecast.durations(np.array(jax.devices()).reshape(1, 1, 8, 1), 1.0, 1.0, [], 0.0) == {}, "no rates of a CPU"


def test_every_slice_that_can_be_planned_has_rates(tpu_slice):
    for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        kind = tpu_slice(name, {"fsdp": -1}).devices.flat[0].device_kind
        assert chips.peak(kind) and kind in chips.RATES and kind in chips.MEMORY, name


def test_products_inside_of_kernels_count_by_their_grid_and_the_loops_around():
    """A product of 64 x 32 by 32 x 16 in each of 3 x 5 blocks, in a loop of 7, half of them left out by a choice."""

    def kernel(x, w, out):
        @pl.when(pl.program_id(0) > 0)
        def _():
            out[...] = x[...] @ w[...]

    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((192, 80), jnp.float32),
        grid=(3, 5),
        in_specs=[pl.BlockSpec((64, 32), lambda i, j: (i, 0)), pl.BlockSpec((32, 16), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((64, 16), lambda i, j: (i, j)),
    )
    loop = lambda x, w: jax.lax.scan(lambda s, _: (s + call(x, w).sum(), None), jnp.zeros(()), None, length=7)[0]
    traced = jax.jit(loop).trace(jnp.ones((192, 32)), jnp.ones((32, 80)))
    assert forecast.kernel_flops(traced.jaxpr) == 7 * 15 * 2 * 64 * 32 * 16


@pytest.mark.slow
@pytest.mark.parametrize("shared", runs.long_but([True, False], True))
def test_packed_rows_count_for_their_parts_and_for_the_pairs_that_are_seen(shared, tmp_path):
    """The parts and pairs of a real batch of 64 pairs, found by dealing it and laying its parts out."""
    rng, line = np.random.default_rng(0), lambda n: "the sun " * int(n)
    rows = [
        {"prompt": line(rng.integers(2, 20)), **{side: line(rng.integers(1, 30)) for side in ("chosen", "rejected")}} for _ in range(64)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = runs.world(tmp_path) | {"workdir": tmp_path / "run", "mesh.data": 1, "batch_size": 64, "model.packing": 800}
    given |= {"data.train": tmp_path / "long.jsonl", "data.eval": "", "data.max_length": 400, "data.max_prompt_length": 200}
    given["model.path"] = tiny.folder(tmp_path / "long", max_position_embeddings=400)
    experiment = load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in given.items()])
    run = prepare(experiment, make_mesh({}, jax.devices()[:1]))
    assert len(run.data.train.examples.lengths) == 128
    run = run._replace(packing=dataclasses.replace(run.packing, shared=shared))
    batch = {name: jnp.asarray(x) for name, x in run.data.train.batch(0, slice(0, 64)).items()}
    found, P, dealt = 0, run.packing.size(batch), deal(batch, run.packing)
    for parts in dealt:
        for i in range(int(parts.count)):
            found += int(laid_out(parts.part(jnp.int32(i), batch)[0]).sight.count.sum())
    whole = int(dealt[0].count) + (len(dealt) > 1 and int(dealt[1].count) / 4)
    assert whole >= 4
    assert (own := turns.packed(run)) is not None
    assert turns.visited_pairs(run, own, "train", P // 64) == pytest.approx(found, rel=0.15)
    assert turns.visited_pairs(run, own, "train", P // 64 // 4) == 0
    shares = turns.shares_of(run, own)
    assert 0 <= shares["parts"] * 64 - whole < 1  # the last part counts as a whole one
    scored = float(batch["completion_mask"].sum())
    assert shares[""] * P * shares["parts"] * 64 == pytest.approx(scored, rel=1e-5)


# --- the command ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --topology KIND:XxY, such as v5e:4x4"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices is 0; use 1 or more"),
        (["--topology", "v5e:2x2", "--slices", "two"], "--slices is 'two'; it must be a whole number"),
        (["--topology"], "--topology has no value; write --topology=KIND:XxY"),
        (["--topology", "v5e:2x2", "--dry-run"], "option '--dry-run' is unknown to `alignax plan`"),
    ],
)
def test_a_command_line_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        parse(["plan", "--config", RM, *words])


def test_an_unknown_slice_is_one_line(fields, tpu_slice, capsys):
    assert main(["plan", "--config", RM, "--topology", "v5e:3x3", *fields]) == 2
    assert "TPU slice 'v5e:3x3' is unknown to libtpu" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_of_two_slices_and_the_same_from_what_was_kept(fields, tpu_slice, tmp_path, monkeypatch, capsys):
    """Every program with its figures, on the console and in a file; a second plan compiles nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = ["plan", "--config", RM, "--topology", "v5e:2x2", "--slices", "2", "--config.mesh.data=2", *fields]
    assert main([*own, "--json", str(tmp_path / "plan.json")]) == 0
    first, made = capsys.readouterr().out, COUNTED.programs
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {"fingerprint", "begin", "train", "evaluate"} <= found["programs"].keys()
    train = found["programs"]["train"]
    assert found["mesh"] == {"member": 1, "data": 2, "fsdp": 4, "context": 1, "tensor": 1} and found["slices"] == 2
    assert train["fits"] and train["flops"] > 0 and train["moved"] > 0 and train["shortest"] <= train["longest"]
    assert train["sent"]["all-reduce data (DCN)"] > 0 and any("fsdp" in key and "DCN" not in key for key in train["sent"])
    assert "2 slices of v5e:2x2, mesh data 2 x fsdp 4 x tensor 1" in first and "\ntrain " in first
    assert main(own) == 0
    assert COUNTED.programs == made and capsys.readouterr().out == first
    assert main([*own, "--config.batch_size=16"]) == 0
    assert COUNTED.programs > made, "another batch is another program"


@pytest.mark.slow
def test_what_does_not_fit_is_said_by_how_much(tpu_slice, tmp_path, monkeypatch):
    """The 8B's training program on 4 chips of v5e, refused by the compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = tpu_programs.fields(tmp_path, "8B", 2048, 4)
    experiment = load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in own.items()])
    run = prepare(experiment, tpu_slice("v5e:2x2", {"fsdp": -1}))
    found = forecast.forecast(run, "train", programs(run)["train"])
    assert not found.fits and re.fullmatch(r"needs [\d.]+G( or more)? of 15.75G", found.refused), found.refused


@pytest.mark.slow
@pytest.mark.long
def test_two_plans_at_once_print_nothing_of_libtpus(fields, tmp_path):
    """In processes without the variables of these tests: neither is locked out nor asks for a device, and the first line is ours."""
    pytest.importorskip("libtpu")
    bare = {k: v for k, v in runs.environment().items() if k not in plan.DESCRIBING}
    bare |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "nowhere"}
    args = ["plan", "--config", RM, "--topology", "v5e:2x2", *fields]
    for process in [runs.begin(args, bare) for _ in range(2)]:
        lines = runs.finish(process).splitlines()
        assert lines[0] == "compiling fingerprint (1 of 4)", lines[:5]
        assert not [line for line in lines if "libtpu" in line and "Compiled by" not in line]


@pytest.mark.slow
def test_a_search_tries_meshes_then_remats_then_microbatches(fields, tpu_slice, monkeypatch, capsys, tmp_path):
    """With forecasts that make 2 x 2, "dots" and 2 microbatches the quickest, in place of compilation."""
    tried = []

    def invented(run, name, program):
        c, shape = run.config, run.mesh.shape
        tried.append((shape["data"], shape["fsdp"], shape["tensor"], c.model.remat, c.microbatches))
        cost = 10 * (shape["fsdp"] != 2) + 5 * (shape["data"] != 2) + 3 * (c.model.remat != "dots") + (c.microbatches != 2)
        return SMALL._replace(seconds={"compute": 1.0 + cost})

    monkeypatch.setattr(plan_commands, "forecast", invented)
    assert main(["plan", "--config", RM, "--topology", "v5e:2x2", "--search", "--json", str(tmp_path / "p.json"), *fields]) == 0
    meshes = [own[:3] for own in dict.fromkeys(tried)]
    assert meshes[0] == (1, 4, 1) and {(2, 2, 1), (4, 1, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2)} <= set(meshes)
    assert tried[-1][:4] == (2, 2, 1, "dots"), "the last are microbatches of the best"
    out = capsys.readouterr().out
    assert out.index("data 2 x fsdp 2 x tensor 1, remat dots, 2 microbatches") < out.index("data 1 x fsdp 4 x tensor 1, remat full, 1")
    assert "data 2 x fsdp 2 x tensor 1, remat dots, 2 microbatches" in json.loads((tmp_path / "p.json").read_text())["search"]


# --- a run beside its plan ---


def told(tmp_path, changes, *, topology="v5e:2x2") -> list[str]:
    """What a run on such a slice is told whose plan was for v5e:2x2 and other fields, read back from its file."""
    given = runs.world(tmp_path) | {"workdir": tmp_path / "run"}
    of = lambda slice, more: plan_commands.prepared(
        load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in (given | more).items()]), slice
    )
    before = {"facts": planned.facts(of("v5e:2x2", {})), "programs": forecast.as_json({"train": SMALL})}
    (tmp_path / "plan.json").write_text(json.dumps(before))
    return [*planned.differences(planned.read(tmp_path / "plan.json"), of(topology, changes))]


def test_a_run_as_planned_is_told_nothing_wherever_it_is(tpu_slice, tmp_path):
    copied = tiny.pairs(tmp_path / "elsewhere.jsonl")
    moved = {"workdir": tmp_path / "other", "data.train": copied, "mesh.data": 4, "log.every": 3, "seed": 5, "model.init": "random"}
    assert told(tmp_path, moved) == []


def test_a_run_that_is_not_as_planned_is_told_what_differs(tpu_slice, tmp_path):
    changes = {"mesh.data": 2, "mesh.fsdp": -1, "batch_size": 16, "model.remat": "none"}
    assert told(tmp_path, changes, topology="v5e:4x4") == [
        "chips is '1 x 16 TPU v5 lite', planned was '1 x 4 TPU v5 lite'",
        "mesh is 'data 2 x fsdp 8 x tensor 1', planned was 'data 4 x fsdp 1 x tensor 1'",
        "slice is [4, 4, 1, 1], planned was [2, 2, 1, 1]",
        "batch_size is 16, planned was 8",
        "model.remat is 'none', planned was 'full'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read (No such file or directory)"), ("{}", "is no plan"), ("[1", "is no plan"), ("7", "is no plan")],
)
def test_what_is_no_plan_is_refused(text, message, tmp_path, capsys):
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    assert main(["train", "--config", RM, "--plan", str(file), f"--config.workdir={tmp_path}/run"]) == 2
    assert message in (said := capsys.readouterr().err) and "give a file of `alignax plan --json FILE`" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_warns_of_what_is_not_as_planned(tpu_slice, tmp_path):
    told(tmp_path, {})
    given = runs.world(tmp_path) | {"workdir": tmp_path / "run", "steps": 1, "eval.every": 0}
    out = runs.finish(runs.begin([*runs.arguments(given), "--plan", str(tmp_path / "plan.json")]))
    assert "alignax: warning: not as planned: chips is '1 x 1 cpu', planned was '1 x 4 TPU v5 lite'" in out
    assert "alignax: warning: not as planned: steps is 1, planned was 24" in out
    assert (tmp_path / "run" / "metrics.jsonl").exists()
