"""Functions of an experiment file that a run calls in place of its own: metrics of texts, an optimizer, a combination of gradients."""

import functools
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from alignax import mesh as meshes
from alignax.cli import main
from alignax.config import load_experiment
from alignax.host.calls import Answer, Malformed, named_numbers
from alignax.losses import dpo
from alignax.optim import own_optimizer
from alignax.rewards import members
from alignax.run.checkpoint import Checkpoints
from alignax.run.prepare import prepare
from alignax.run.state import abstract_state
from alignax.train import init_state, make_step

OWN = """
import jax, jax.numpy as jnp, optax
from typing import NamedTuple
from alignax import default_config, chain, dpo, grpo, sft, logps, group_relative, report, observe
from alignax.losses import kl_k3

def get_config():
    return default_config()

class Count(NamedTuple):
    largest: jax.Array  # the largest norm that a gradient has had

def by_largest():
    norm = lambda state, updates: jnp.maximum(state.largest, optax.tree.norm(updates))
    def update(updates, state, params=None):
        state = Count(norm(state, updates))
        return jax.tree.map(lambda x: x / state.largest, updates), state
    return optax.GradientTransformation(lambda params: Count(jnp.zeros(())), update)

def optimizer(config, schedule):
    return optax.chain(by_largest(), optax.trace(decay=0.5), optax.scale_by_learning_rate(schedule))

def combine(gradients):
    unit = lambda own: optax.tree.scale(1 / jnp.maximum(optax.tree.norm(own), 1e-8), own)  # that of a KL is 0 at the reference
    first, second = gradients.values()
    return optax.tree.add(unit(first), unit(second))
"""
OFFLINE = """
def loss(config):
    return {"prefer": dpo(0.1), "imitate": sft() + observe("entropy", lambda out, batch: out.entropy.mean(axis=(1, 2)))}

def experience(config, reference):
    return chain(logps("ref_logps", reference), lambda batch: report(batch, longest=batch["mask"].sum(axis=-1).max()))
"""
ONLINE = """
def loss(config):
    return {"learn": grpo(), "stay": 0.1 * kl_k3()}

def experience(config, reference):
    return chain(logps("ref_logps", reference), group_relative(), lambda batch: report(batch, best=batch["rewards"].max()))

def reward(prompts, completions):
    return [float("a" in text) for text in completions]

def metrics(prompts, completions, weight):
    assert len(prompts) == len(completions) == len(weight)
    return {"letters": [len(text) for text in completions], "odd": [None if w > 1 else w for w in weight]}
"""


def experiment(folder, source, fields):
    """Writes an experiment; the command line that trains it."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.py").write_text(OWN + source)
    return ["train", "--config", str(folder / "experiment.py"), *(f"--config.{name}={value}" for name, value in fields.items())]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def ended(args, workdir):
    """Parameters and optimizer state that a run ended with: arrays, as each load of a file makes classes of its own."""
    run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]))
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(checkpoints.latest(), abstract_state(run))
    checkpoints.close()
    return [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state))]


@pytest.mark.long
@pytest.mark.slow
def test_gradients_and_an_optimizer_of_ones_own(tmp_path):
    """Over a mesh with microbatches; a killed run goes on bit for bit, the optimizer's own state with it."""
    world = runs.world(tmp_path) | {"steps": 6, "eval.every": 3, "eval.sample_prompts": 0, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    world |= {"microbatches": 2, "checkpoint.every": 2}
    args = experiment(tmp_path / "a", OFFLINE, world | {"workdir": tmp_path / "whole"})
    assert main(args) == 0
    found = [row for row in rows(tmp_path / "whole") if "loss" in row]
    assert all({"rewards/margins", "imitate/loss/sft", "imitate/entropy", "longest"} <= row.keys() for row in found)
    for row in found:
        assert row["loss"] == pytest.approx(row["loss/dpo"] + row["imitate/loss/sft"], rel=1e-5)
        assert 0 < row["grad_norm"] <= 2 and row["longest"] <= 48
    held_out = [row for row in rows(tmp_path / "whole") if "eval/loss" in row]
    assert len(held_out) == 3 and {"eval/loss/dpo", "eval/imitate/loss/sft"} <= held_out[0].keys()
    parts = experiment(tmp_path / "b", OFFLINE, world | {"workdir": tmp_path / "parts"})
    process = runs.begin(parts, runs.environment(8))
    assert runs.stop_when(process, lambda: (tmp_path / "parts" / "checkpoints" / "2").is_dir(), runs.signal.SIGKILL)
    process.communicate()
    assert main(parts) == 0
    for one, other in zip(ended(args, tmp_path / "whole"), ended(parts, tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
@pytest.mark.slow
def test_metrics_of_texts(tmp_path):
    """Online, each rollout and evaluation: means of what is known; and what an experience reports, once a rollout or once a step."""
    data = [{"prompt": f"the {word} of", "weight": 1.0 + i % 2} for i, word in enumerate(["sun", "moon", "sea", "tree"] * 4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    given = {
        "model.path": tiny.folder(tmp_path / "model"), "data.train": tmp_path / "prompts.jsonl", "data.kind": "prompt", "batch_size": 8,
        "rollout.samples": 3, "rollout.max_new_tokens": 6, "eval.sample_prompts": 4, "eval.max_new_tokens": 6, "eval.every": 2,
        "optimizer.learning_rate": 1e-3, "log.tensorboard": False, "export.final": False, "checkpoint.every": 4, "steps": 4,
        "checkpoint.best": "metrics/letters", "data.eval": tmp_path / "prompts.jsonl",
    }  # fmt: skip
    for name, minibatches in (("once", 1), ("twice", 2)):
        workdir = tmp_path / name / "run"
        assert main(experiment(tmp_path / name, ONLINE, given | {"workdir": workdir, "rollout.minibatches": minibatches})) == 0
        for row in rows(workdir):
            prefix = "" if "loss" in row else "eval/"
            assert row[prefix + "metrics/odd"] == 1 and 0 <= row[prefix + "metrics/letters"] <= 6
            assert prefix or (row["best"] in (0, 1) and "stay/loss/kl_k3" in row)


def test_numbers_by_name():
    assert named_numbers({"a": [1, None], "b": (2.0, 3)}, 2).rewards[0] == {"a": 1.0, "b": 2.0}
    found = named_numbers({"a": [1, "x"], "b": [2, 3]}, 2)
    assert found.at == 1 and "'x'" in found.problem and "which is not a number" in found.problem and found.rewards[1]["b"] == 3
    assert named_numbers({}, 2) == Answer([{}, {}])
    for given, text in (
        ([1, 2], "it gives a list; it must return lists by name"),
        ({"a": [1]}, "for the name 'a' it gives 1 numbers for 2"),
        ({"a" * 101: [1, 2]}, r"it gives the name '(a|\.)*'; it must give at most 1,000 names of at most 100 printable characters"),
        ({"\ud800": [1, 2]}, r"it gives the name '.ud800'; it must"),  # UTF-8 has no such character, and no log could be written
        ({"a\nb": [1, 2]}, r"it gives the name 'a.nb'; it must"),
        ({str(i): [1, 2] for i in range(1001)}, "it gives 1,001 names; it must"),
    ):
        with pytest.raises(Malformed, match=text):
            named_numbers(given, 2)


def of_ones_own(make) -> optax.GradientTransformation:
    experiment: Any = types.SimpleNamespace(file=runs.REPO / "mine.py", config=None, optimizer=lambda config, schedule: make(schedule))
    return own_optimizer(experiment, optax.constant_schedule(0.1))


def largest() -> optax.GradientTransformation:
    """A transformation with a state that is no tree like the parameters: the largest entry of each that was seen, flat."""
    norms = lambda tree: jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)])

    def update(updates, state, params=None):
        state = jnp.maximum(state, norms(updates))
        return jax.tree.unflatten(jax.tree.structure(updates), [x / s for x, s in zip(jax.tree.leaves(updates), state, strict=True)]), state

    return optax.GradientTransformation(lambda params: jnp.zeros(len(jax.tree.leaves(params))), update)


MAKE = {
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "a chain": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), largest(), optax.trace(0.5), optax.scale_by_learning_rate(rate)),
}


@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_of_ones_own_shards_and_stacks(name):
    """Sharded over a mesh its step is that of one device; of members each has its own state."""
    optimizer, batch = of_ones_own(MAKE[name]), tiny.with_reference(tiny.batch(8))
    step = make_step(tiny.plain_apply, dpo(), optimizer)
    begin = lambda seed: init_state(tiny.plain_params(seed=seed), optimizer, jax.random.key(0))
    alone = [jax.jit(step)(begin(seed), batch)[0] for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[tiny.plain_params(seed=seed) for seed in (0, 1)])
    make = members.over_members(lambda params: init_state(params, optimizer, jax.random.key(0)), 0, members.AXES)
    every, _ = jax.jit(members.over_members(step, (members.AXES, None), (members.AXES, 0)))(make(stacked), batch)
    mesh = meshes.make_mesh({"fsdp": -1})
    layout = {"embed": meshes.sharding(mesh, (None, "embed"), (96, 8)), "head": meshes.sharding(mesh, ("embed", None), (8, 96))}
    layout["bias"] = meshes.sharding(mesh)
    shardings = meshes.optimizer_shardings(mesh, optimizer, jax.eval_shape(lambda: begin(0).opt_state), layout)
    state = begin(0).replace(params=jax.device_put(tiny.plain_params(), layout), opt_state=jax.device_put(begin(0).opt_state, shardings))
    after, _ = jax.jit(step)(state, batch)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.opt_state))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, (after.params, after.opt_state), (alone[0].params, alone[0].opt_state))
    for k in (0, 1):
        jax.tree.map(lambda x, own, k=k: close(x[k], own), (every.params, every.opt_state), (alone[k].params, alone[k].opt_state))
