"""Ensembles: members are what separate runs make, on any mesh; what differs between them, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from alignax import mesh
from alignax.cli import main
from alignax.config import load_experiment
from alignax.data import evaluation_batch
from alignax.rewards import members
from alignax.run.prepare import prepare
from alignax.run.start import start

STEPS = 3
SMALL = {"model.num_labels": 1, "steps": STEPS, "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "checkpoint.every": 50}
KINDS = {"full": {}, "head": {"model.freeze": True}, "lora": {"lora.rank": 2, "lora.alpha": 4.0}}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world")) | SMALL


def prepared(fields, **changes):
    given = fields | changes
    return prepare(load_experiment(runs.REPO / "experiments" / "rm_hh.py", [f"{name}={value}" for name, value in given.items()]))


def trained(fields, tmp_path, **changes):
    """The trained parameters after the run's steps, and the metrics of each step."""
    run = prepared(fields, workdir=tmp_path / "run", **changes)
    started = start(run, write=False)
    step, evaluate = (started.programs[name].call for name in ("train", "evaluate"))
    state, metrics = started.state, []
    draw, sizes = run.data.train.batch, (run.config.batch_size,)
    if run.policy.members:
        streams = members.member_batches(run.data.train, run.policy.members, run.config.ensemble.own_noise)
        draw, sizes = lambda step, *part: members.member_batch(streams, step, *part), (run.policy.members, *sizes)
    for s in range(STEPS):
        batch = mesh.put_batch(run.mesh, lambda *part, s=s: draw(s, *part), *sizes)
        state, found = step(state, started.held, {"data": batch})
        metrics.append({name: float(x) for name, x in found.items()})
    held_out = lambda part: evaluation_batch(run.data.train.examples, 0, run.config.batch_size, run.data.train.length, part)
    rows = mesh.put_batch(run.mesh, held_out, run.config.batch_size)
    sums = evaluate(state, started.held, rows)
    started.checkpoints.close()
    return jax.tree.map(np.asarray, state.params), metrics, {name: float(x / w) for name, (x, w) in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("full", "head"))])
def test_members_are_separate_runs(kind, fields, tmp_path):
    """Each member has its own seed for head (adapters) and order of data; trained together, members equal separate runs."""
    params, metrics, scores = trained(fields, tmp_path, **KINDS[kind], **{"ensemble.members": 2, "seed": 4})
    for k in range(2):
        alone, its_metrics, its_scores = trained(fields, tmp_path, **KINDS[kind], seed=4 + k)
        for path, x in jax.tree_util.tree_leaves_with_path(alone):
            together = params
            for key in path:
                together = together[key.key]
            np.testing.assert_allclose(together[k], x, atol=1e-5, err_msg=str(path))
        for ours, theirs in zip(metrics, its_metrics, strict=True):
            np.testing.assert_allclose(ours[f"loss/member_{k}"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(scores[f"rewards/margins/member_{k}"], its_scores["rewards/margins"], rtol=1e-4)
    assert np.abs(params["score"][0] - params["score"][1]).max() > 0.05
    assert metrics[0]["loss/member_0"] != metrics[0]["loss/member_1"] and scores["ensemble/disagreement"] > 0
    np.testing.assert_allclose(metrics[0]["loss"], (metrics[0]["loss/member_0"] + metrics[0]["loss/member_1"]) / 2, rtol=1e-6)
    if kind == "head":
        assert set(params) == {"score", "score_offset", "layers"} and not params["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1, 1), pytest.param((4, 1, 1, 1, 2), marks=pytest.mark.long)], ids=str)
def test_members_lie_along_an_axis_of_the_mesh(sizes, fields, tmp_path):
    axes = {f"mesh.{name}": size for name, size in zip(mesh.AXES, sizes, strict=True)}
    given = {"ensemble.members": 4, "ensemble.bootstrap": True, "data.label_noise": 0.25}
    plain, _, scores = trained(fields, tmp_path, **given)
    laid, _, their_scores = trained(fields, tmp_path, **given, **axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), laid, plain)
    assert their_scores.keys() == scores.keys()
    for name, x in scores.items():
        np.testing.assert_allclose(their_scores[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    run = prepared(fields, workdir=tmp_path / "run", **given, **axes)
    state = start(run, write=False).state
    assert state.params["layers"]["gate"].sharding.spec[0] == "member"
    assert state.params["layers"]["gate"].addressable_shards[0].data.shape[0] == 4 // sizes[0]
    assert state.step.shape == () and state.skipped.shape == (4,)


@pytest.mark.slow
def test_a_run_writes_a_folder_of_each_member_and_goes_on_where_it_was(fields, tmp_path, capsys):
    given = fields | {"workdir": tmp_path / "run", "ensemble.members": 2, "export.final": True}
    assert main(runs.arguments(given, "rm_hh")) == 0
    heads = [load_file(tmp_path / "run" / "export" / f"member_{k}" / "model.safetensors")["score.weight"] for k in range(2)]
    assert np.abs(heads[0] - heads[1]).max() > 0.05
    said = capsys.readouterr().err
    assert "ensemble/accuracy_mean" in (tmp_path / "run" / "metrics.jsonl").read_text() and "ensemble of 2 members" in said
    assert main(runs.arguments(given, "rm_hh")) == 0
    assert "this run is complete" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for k in range(2):
        np.testing.assert_array_equal(load_file(tmp_path / "out" / f"member_{k}" / "model.safetensors")["score.weight"], heads[k])
    assert json.loads((tmp_path / "out" / "member_1" / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    rows = [{"prompt": "Is it?", "completion": f" {word}"} for word in ("yes", "no", "abc", "a b c")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchor = ["anchor", str(tmp_path / "run"), str(tmp_path / "out"), "--samples", str(tmp_path / "samples.jsonl"), "--scale"]
    assert main(anchor) == 2 and "another run wrote it; give --force" in capsys.readouterr().err
    assert main([*anchor, "--force"]) == 0
    std = float(re.findall(r"member 1: .* standard deviation (\S+) becomes 1", capsys.readouterr().out)[0])
    scaled = load_file(tmp_path / "out" / "member_1" / "model.safetensors")["score.weight"]
    np.testing.assert_allclose(scaled, heads[1] / std, rtol=1e-3)
    assert main(["eval", str(tmp_path / "run")]) == 0 and "ensemble/accuracy_wco" in capsys.readouterr().out


def test_bootstrap_and_noise(fields, tmp_path):
    run = prepared(fields, workdir=tmp_path / "run", **{"ensemble.members": 3})
    n, size = len(run.data.train.examples), run.config.batch_size
    epoch = range(n // size)
    rows = lambda stream: np.concatenate([stream.rows(s) for s in epoch])
    streams = members.member_batches(dataclasses.replace(run.data.train, bootstrap=True, noise=0.25), 3, False)
    drawn = [rows(s) for s in streams]
    assert all(0.4 * n < len(set(d)) < 0.8 * n for d in drawn) and len({tuple(sorted(d)) for d in drawn}) == 3
    assert sorted(rows(run.data.train)) == list(range(n))
    swapped = lambda stream, row: (_both(stream, row)[0] != _both(dataclasses.replace(stream, noise=0.0), row)[0]).any()
    wrong = [{r for s in epoch for i, r in enumerate(stream.rows(s)) if swapped(stream, (s, i))} for stream in streams]
    assert all(wrong) and not (wrong[0] & set(drawn[1])) - wrong[1], "one mask for all"
    whole = dataclasses.replace(run.data.train, noise=0.25)
    assert len({r for s in epoch for i, r in enumerate(whole.rows(s)) if swapped(whole, (s, i))}) == round(0.25 * n)
    own = members.member_batches(whole, 2, True)
    mine, yours = ({r for s in epoch for i, r in enumerate(stream.rows(s)) if swapped(stream, (s, i))} for stream in own)
    assert mine != yours
    assert whole.digest() != run.data.train.digest() and run.data.train.digest() == dataclasses.replace(run.data.train, seed=9).digest()


def _both(stream, place):
    step, i = place
    return stream.batch(step, slice(i, i + 1))["tokens"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble.members": 3, "mesh.member": 2, "mesh.data": 4}, r"ensemble\.members 3 does not divide over mesh\.member 2"),
        ({"mesh.member": 2, "mesh.data": 4}, r"mesh\.member is 2 and ensemble\.members is 0"),
        ({"ensemble.bootstrap": True}, r"leave bootstrap and own_noise out"),
        ({"ensemble.members": 2, "model.num_labels": 0}, r"only reward models have members; set model\.num_labels to 1"),
        ({"ensemble.members": -1}, r"ensemble\.members' is -1"),
        ({"model.freeze": True, "lora.rank": 2}, r"model\.freeze .* lora\.rank to 0"),
        ({"data.label_noise": 1.5}, r"label noise is 1\.5 .*at least 0 and below 1"),
        ({"eval.samples": 2}, r"a reward model gives scores and no text; set eval\.samples"),
    ],
)
def test_what_is_refused(changes, message, fields, tmp_path, capsys):
    given = fields | {"workdir": tmp_path / "run"} | changes
    assert main(runs.arguments(given, "rm_hh")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_member_that_is_not_finite_is_skipped_alone(fields, tmp_path):
    run = prepared(fields, workdir=tmp_path / "run", **{"ensemble.members": 2})
    started = start(run, write=False)
    step = started.programs["train"].call
    params = started.state.params | {"score": started.state.params["score"].at[1].set(jnp.nan)}
    state = dataclasses.replace(started.state, params=params)
    before = np.asarray(params["layers"]["q"])
    streams = members.member_batches(run.data.train, 2, False)
    batch = mesh.put_batch(run.mesh, lambda *part: members.member_batch(streams, 0, *part), 2, run.config.batch_size)
    state, metrics = step(state, started.held, {"data": batch})
    assert state.skipped.tolist() == [0, 1] and metrics["skipped"] == 1 and int(state.step) == 1
    after = np.asarray(state.params["layers"]["q"])
    assert (after[0] != before[0]).any() and (after[1] == before[1]).all()
