"""Online training: rollouts in front of the shared step, on a tiny model, in one process."""

import json
import re
import shutil
import signal
import textwrap
import time
import types
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file
from test_rewards_ensembles import reward_folder

from alignax import mesh as meshes
from alignax.cli import main
from alignax.config import load_experiment, prompts_of_rollout
from alignax.experience import best_and_worst, wco
from alignax.generate import LENGTH, STOP_ID, STOP_STRING
from alignax.host.calls import Answer
from alignax.host.workers import Abandoned, never
from alignax.models import hf
from alignax.run.checkpoint import Checkpoints
from alignax.run.evaluation import Evaluation
from alignax.run.feed import Online
from alignax.run.host_rewards import RewardFailed, asked
from alignax.run.log import Log
from alignax.run.loop import Observer
from alignax.run.online import measured, reads_once
from alignax.run.prepare import prepare
from alignax.run.programs import programs
from alignax.run.roles import abstract_frozen, load, policy_model
from alignax.run.rollout import Rollouts, decoded
from alignax.run.start import check_advantages, check_step, start
from alignax.run.state import abstract_batches, abstract_rollout, abstract_state, make_experience
from alignax.train import make_step

HEAD = """
from alignax import *
from alignax.averages import *
from alignax.experience import *
from alignax.losses import *

def get_config():
    return default_config()
"""
GRPO = """
def loss(config):
    return grpo() + 0.01 * kl_k3()

def experience(config, reference):
    return chain(logps("ref_logps", reference), group_relative())

def reward(prompts, completions, weight):
    assert len(prompts) == len(completions) == len(weight)
    return [w * (len(text) % 7) for text, w in zip(completions, weight)]

def gold(prompts, completions):
    return [float(len(text)) for text in completions]
"""
NAMED = """
def loss(config):
    return {"pretrain": 0.5 * sft(), "rollouts": grpo()}

def experience(config):
    return group_relative()

"""
PPO = """
def loss(config):
    return ppo() + 0.1 * value_loss()

def experience(config, reference):
    return chain(logps("ref_logps", reference), kl_reward(0.05), gae(), whiten_advantages())

def reward(prompts, completions):
    return [float("a" in text) for text in completions]
"""

BOTH = NAMED + GRPO[GRPO.index("def reward") :]


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A tiny model, and prompts with a column of numbers."""
    folder = tmp_path_factory.mktemp("online")
    model = tiny.folder(folder / "model")
    rows = [{"prompt": f"the {word} of", "weight": 1.0 + i % 2} for i, word in enumerate(["sun", "moon", "sea", "tree", "cat", "dog"] * 4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": "", "completion": f"once there was a {word}" + " then" * (i % 3)} for i, word in enumerate(["sun", "moon"] * 10)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    own = {
        "model.path": model, "data.train": folder / "prompts.jsonl", "data.kind": "prompt", "batch_size": 8, "steps": 8,
        "rollout.samples": 3, "rollout.max_new_tokens": 6, "rollout.minibatches": 2, "rollout.epochs": 2, "eval.sample_prompts": 4,
        "eval.max_new_tokens": 6, "eval.every": 4, "optimizer.learning_rate": 1e-3, "log.tensorboard": False, "export.final": False,
        "checkpoint.every": 4,
    }  # fmt: skip
    return {name: str(value) for name, value in own.items()}


def arguments(folder, source, fields):
    """Writes the experiment; the command line that trains it."""
    file = folder / "experiment.py"
    file.write_text(HEAD + textwrap.dedent(source))
    return ["train", "--config", str(file), *(f"--config.{name}={value}" for name, value in fields.items())]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def names(*given):
    """The field that names what a reward gives."""
    return {"rollout.reward_names": repr(given)}


def checked(args):
    """The run of a command line."""
    return prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]))


def trained(workdir, args):
    """The parameters that a run ended with."""
    run = checked(args)
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(checkpoints.latest(), abstract_state(run))
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def grpo(fields, tmp_path_factory):
    """A whole run of 8 steps: two rollouts, each of two minibatches, gone through twice."""
    folder = tmp_path_factory.mktemp("grpo")
    args = arguments(folder, GRPO, fields | {"workdir": str(folder / "run")})
    assert main(args) == 0
    return folder / "run", args


@pytest.mark.slow
def test_a_run_says_what_it_must(grpo):
    found = rows(grpo[0])
    train = [row for row in found if "loss" in row]
    assert [row["step"] for row in train] == [4, 8]
    wanted = {
        "kl", "kl_k3", "sampler_gap", "entropy", "clip_ratio/low", "clip_ratio/high", "completion_length", "truncated_rate", "eos_rate",
        "reward", "reward_std", "advantage_mean", "advantage_std", "gold", "bad_rewards", "distinct", "time/generate", "time/reward",
        "time/learn", "time/host", "compilations", "grad_norm", "tokens_per_second",
    }  # fmt: skip
    assert wanted <= train[0].keys()
    assert all(row["sampler_gap"] < 1e-5 for row in train)
    assert abs(train[0]["kl"]) < 1e-5 and train[1]["kl_k3"] > 0  # the first rollout is the reference's own
    assert train[0]["compilations"] > 0 and train[1]["compilations"] == 0
    evaluations = [row for row in found if "eval/reward" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8] and all("eval/gold" in row and "eval/kl" in row for row in evaluations)
    samples = [json.loads(line) for line in (grpo[0] / "samples.jsonl").read_text().splitlines()]
    assert samples[0].keys() == {"step", "prompt", "completion", "reward", "log_ratio", "gold"}


def test_rollouts_and_evaluations_stop_at_every_end(fields, tmp_path):
    """Ends include those of the generation config, as for Gemma, Qwen and Phi; a completion's text leaves its end out."""
    shutil.copytree(fields["model.path"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(14, 40)]}))
    run = checked(arguments(tmp_path, GRPO, fields | {"workdir": str(tmp_path / "run"), "model.path": str(tmp_path / "model")}))
    log = Log(run.workdir, steps=1, start=0, every=1, tensorboard=False, writes=False)
    generate, table = Rollouts(run).generate, programs(run)
    assert run.words.ends == (2, *range(14, 40))
    assert generate.stop_ids == Evaluation(run, {}, table, log).generate.stop_ids == {*run.words.ends}
    prompts = [run.data.train.examples.prompt_tokens(i).tolist() for i in range(8)]
    out = generate(params := hf.load_params(run.policy.source, run.mesh), prompts, jax.random.key(0), n=8)
    state, look = types.SimpleNamespace(params=params, averages={}, key=jax.random.key(0)), Mock(side_effect=Abandoned(15))
    for sampled in (
        lambda: Rollouts(run, look).sample(state, {}, 0),
        lambda: Evaluation(run, {}, table, log, look).samples(state, 0),
    ):  # a signal does not wait for what is being sampled
        with pytest.raises(Abandoned):
            sampled()
    ended = {
        int(row[-1]) for group, why in zip(out.rows(), out.ended, strict=True) for row, w in zip(group, why, strict=True) if w == STOP_ID
    }
    assert len(ended - {2}) > 3 and not np.isin(np.concatenate(sum(out.answers(), [])), run.words.ends).any()
    assert decoded(run.words.tokenizer, out) == [
        run.words.tokenizer.batch_decode(group, skip_special_tokens=True) for group in out.answers()
    ]


SLEEPER = """
import pathlib, time

calls = []

def loss(config):
    return importance_weighted(grpo())

def experience(config):
    return group_relative()

def reward(prompts, completions, config):
    asleep = pathlib.Path(config.workdir).parent / "asleep"
    calls.append(1)
    if len(calls) == config.max_skipped and not asleep.exists():
        asleep.touch()
        time.sleep(100)
    return [float(len(text) % 7) for text in completions]
"""


def sleepers(fields, call, tmp_path):
    """The workdirs of a run whose reward function never sleeps and of one where it sleeps in that call, and their command lines."""
    given = fields | {"steps": "8", "eval.every": "4", "checkpoint.every": "100", "max_skipped": str(call)}
    whole, parts = [tmp_path / name / "run" for name in ("whole", "parts")]
    for folder in (whole, parts):
        folder.parent.mkdir()
    (whole.parent / "asleep").touch()
    return whole, parts, {folder: arguments(folder.parent, SLEEPER, given | {"workdir": str(folder)}) for folder in (whole, parts)}


def saved(workdir, step):
    """Checks that the run has saved this step alone, the last that its log has."""
    checkpoints = [folder.name for folder in (workdir / "checkpoints").iterdir()]
    assert checkpoints == [str(step)] and rows(workdir)[-1]["step"] == step


def same(parts, whole, args):
    """Checks that two runs have ended alike and said the same, bit for bit."""
    found, wanted = (trained(folder, args[folder]) for folder in (parts, whole))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    timed = ("time/", "tokens_per_second", "compilations")
    told = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(folder)] for folder in (parts, whole)]
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("ahead", "call", "where"),  # which call sleeps: one before the run, one of each evaluation (steps 0, 4, 8), one of each rollout
    [
        ("false", 5, "4, in a rollout"),
        ("false", 4, "4, in the evaluation"),
        ("false", 6, "8, in the evaluation"),
        ("true", 4, "4"),
        ("true", 6, "8, in the evaluation"),
    ],
)
def test_a_signal_does_not_wait_for_a_reward_function(ahead, call, where, fields, tmp_path):
    """The wait is given up and the state before is saved; the next start samples again, or judges what was sampled ahead."""
    whole, parts, args = sleepers(fields | {"rollout.ahead": ahead}, call, tmp_path)
    assert main(args[whole]) == 0
    process = runs.begin(args[parts], runs.environment(8))
    assert runs.stop_when(process, (parts.parent / "asleep").exists, signal.SIGTERM)
    began = time.monotonic()
    out = runs.finish(process, code=143)
    assert time.monotonic() - began < 50 and f"stopped by SIGTERM after step {where}; saved" in out
    saved(parts, int(where[0]))
    assert main(args[parts]) == 0
    same(parts, whole, args)


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_to_one_of_two_processes_ends_both(fields, tmp_path):
    """Process 0 waits for a reward function, and process 1, which is told to stop, for process 0."""
    whole, parts, args = sleepers(fields, 5, tmp_path)
    for process in runs.begin_two([args[whole]] * 2):
        runs.finish(process)
    group = runs.begin_two([args[parts]] * 2)
    assert runs.stop_when(group[1], (parts.parent / "asleep").exists, signal.SIGTERM)
    began = time.monotonic()
    out = [runs.finish(process, code=143) for process in group]
    assert time.monotonic() - began < 50 and "stopped by SIGTERM after step 4, in a rollout; saved" in out[0] and "stopped" not in out[1]
    saved(parts, 4)
    for process in runs.begin_two([args[parts]] * 2):
        runs.finish(process)
    same(parts, whole, args)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("ahead", "call"), [("false", 5), ("false", 4), ("true", 4)])
def test_what_was_learnt_before_a_reward_fails_is_saved(ahead, call, fields, tmp_path, capsys):
    """The reward fails in a rollout, an evaluation, or for samples ahead, which are judged again; the resumed run is the same."""
    given = fields | {"checkpoint.every": "100", "rollout.ahead": ahead, "max_skipped": str(call)}
    source = SLEEPER.replace("time.sleep(100)", "raise KeyError('no answer')").replace("asleep.touch()", "failing.touch()")
    # A process that has failed is replaced, and counts anew.
    source = source.replace("    calls.append(1)", "    failing = asleep.with_name('failing')\n    calls.append(1)")
    source = source.replace(
        "len(calls) == config.max_skipped", "(len(calls) == config.max_skipped or failing.exists()) and any(completions)"
    )
    found = {}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        args = arguments(tmp_path / name, source, given | {"workdir": str(tmp_path / name / "run")})
        asleep = tmp_path / name / "asleep"
        if name == "parts":
            assert main(args) == 1 and "KeyError" in capsys.readouterr().err
            assert Checkpoints(tmp_path / name / "run").latest() == 4
            args += ["--config.rollout.timeout=99", "--config.rollout.bad_rewards=drop"]
        asleep.touch()
        assert main(args) == 0
        found[name] = trained(tmp_path / name / "run", args)
    jax.tree.map(np.testing.assert_array_equal, found["parts"], found["whole"])


@pytest.mark.slow
def test_rollouts_at_a_temperature_with_stop_strings_are_scored_as_they_are_sampled(fields, tmp_path):
    """The head's one token that the tokenizer has not is the most likely by far, and never said; evaluations count what passes."""
    shutil.copytree(fields["model.path"], tmp_path / "model")
    source = hf.open_folder(tmp_path / "model")
    params = hf.load_params(source, meshes.make_mesh({"fsdp": -1}))
    hf.export(params | {"embed": params["embed"].at[95].mul(20.0)}, source, tmp_path / "model")
    more = {
        "model.path": tmp_path / "model", "rollout.temperature": 0.7, "rollout.stop": ("e", "a b"), "rollout.max_new_tokens": 12,
        "eval.temperature": 0.7, "eval.samples_per_prompt": 4, "eval.samples": 6, "eval.pass_reward": 4.0, "steps": 4,
        "workdir": tmp_path / "run",
    }  # fmt: skip
    args = arguments(tmp_path, GRPO, fields | {name: str(value) for name, value in more.items()})
    run = checked(args)
    assert (
        run.words.unused == ((95, 96),)
        and run.policy.source.config.temperature == 0.7
        and run.roles["reference"].source is run.policy.source
    )
    rollouts = Rollouts(run)
    sampled = rollouts.sample(
        types.SimpleNamespace(key=jax.random.key(0), params=hf.load_params(run.policy.source, run.mesh), averages={}), {}, 0
    )
    out = sampled.completions
    assert not (out.tokens[out.mask] == 95).any() and (out.ended == STOP_STRING).mean() > 0.1
    texts = np.array(decoded(run.words.tokenizer, out, rollouts.generate.stops))
    assert not any("e" in text for text in texts.ravel())
    batch = rollouts.judge(sampled).batch
    np.testing.assert_array_equal(batch["truncated"], out.ended == LENGTH)
    assert main(args) == 0
    found = rows(tmp_path / "run")
    (row,) = [row for row in found if "loss" in row]
    assert row["sampler_gap"] < 2e-5 and abs(row["kl"]) < 1e-5 and row["truncated_rate"] < 1
    (first, last) = [row for row in found if "eval/kl" in row]
    assert abs(first["eval/kl"]) < 1e-5 and first["eval/sampler_gap"] < 2e-5 and last["eval/kl_k3"] > 0 and last["eval/prompts"] == 6
    assert 0 <= last["eval/pass@1"] <= last["eval/pass@2"] <= last["eval/pass@4"] <= 1 and {"eval/gold_se", "eval/reward_se"} <= last.keys()
    told = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(told) == 12 and len({row["prompt"] for row in told[:6]}) == 6  # the first sample of each prompt comes first


@pytest.mark.slow
def test_rollouts_from_weights_in_int8_log_their_drift(fields, tmp_path, capsys):
    """Rollouts are weighed by what they were drawn with; evaluations sample from the policy's own weights, so they know its KL."""
    args = arguments(tmp_path, OFF_POLICY, fields | {"workdir": str(tmp_path / "run"), "rollout.int8": "true"})
    assert main(args) == 0
    assert re.search(r"rollout: .* from a copy of the weights in int8, whole, with 0\.\d+ GB", capsys.readouterr().err)
    found = rows(tmp_path / "run")
    trained, last = [row for row in found if "loss" in row], [row for row in found if "eval/prompts" in row][-1]
    assert len(trained) == 2 and all(1e-6 < abs(row["sampler_kl"]) < 0.05 and "sampler_gap" not in row for row in trained)
    assert trained[1]["compilations"] == 0 and last["eval/sampler_gap"] < 2e-5 and last["eval/kl_k3"] > 0


@pytest.mark.long
@pytest.mark.slow
def test_rollouts_of_a_nucleus_weigh_by_what_was_drawn(fields, tmp_path):
    """log q - log pi of a token is -log of the nucleus's mass, so E_q log q / pi is above 0 and below -log p a token."""
    args = arguments(tmp_path, OFF_POLICY, fields | {"workdir": str(tmp_path / "run"), "rollout.top_p": "0.8", "steps": "4"})
    assert main(args) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 < row["sampler_kl"] < -np.log(0.8) * row["completion_length"] and "sampler_gap" not in row


@pytest.mark.slow
@pytest.mark.long
def test_a_turn_is_the_shared_step_on_each_part_of_a_rollout(fields, tmp_path):
    """By hand: experience once, then the step on each minibatch of each epoch; the same on one device and on eight, in parts or whole."""
    given = fields | {"workdir": str(tmp_path / "run"), "optimizer.learning_rate": "1e-2", "optimizer.warmup": "0", "optimizer.eps": "1e-2"}
    args = arguments(tmp_path, GRPO, given)

    def begun(mesh, **changes):
        extra = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
        run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]] + extra), mesh)
        started = start(run, write=False)
        batch = tiny.batch(B=16, N=3, T=24)
        rng = np.random.default_rng(0)
        batch |= {"sampled_logps": jnp.zeros((16, 3, 24)), "truncated": jnp.zeros((16, 3), bool), "prompt_id": jnp.arange(16)}
        batch |= {name: jnp.asarray(rng.normal(size=(16, 3)), jnp.float32) for name in ("rewards", "gold")}
        assert batch.keys() == abstract_rollout(run, 16, 3).keys()
        return run, started, meshes.put_batch(mesh, lambda rows: {name: np.asarray(x)[rows] for name, x in batch.items()}, 16)

    one, eight = (meshes.make_mesh({"data": n}, jax.devices()[:n]) for n in (1, 8))
    run, started, batch = begun(one)
    state, frozen = started.state, started.held
    apply = policy_model(run.roles, frozen, state.params).apply
    experience = make_experience(run, frozen, state)
    written = jax.jit(lambda params, batch: experience(batch | {"old_logps": apply(params, batch).logps}))(state.params, batch)
    step = jax.jit(make_step(apply, run.learning.objective, run.learning.optimizer))
    by_hand, losses = state, []
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2), 3)
    order = jax.random.permutation(jax.random.fold_in(key, 0), 16)
    for rows in (jnp.arange(16), order):
        assert sorted(rows.tolist()) == list(range(16))
        for i in range(2):
            by_hand, metrics = step(by_hand, {name: x[rows[i::2]] for name, x in written.items()})
            losses.append(metrics["loss"])
    expected = jax.tree.map(np.asarray, by_hand.params)

    for _, begin, rollout in (begun(one), begun(eight), begun(one, microbatches=2)):
        learnt, metrics = begin.programs["train"].call(begin.state, begin.held, {"rollouts": rollout})
        assert learnt.step == 4
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4, atol=1e-6)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
        jax.tree.map(close, jax.tree.map(np.asarray, learnt.params), expected)


ONE_STEP = {"rollout.minibatches": "1", "rollout.epochs": "1"}


def by_experience(written):
    """GRPO with other functions in its experience."""
    return GRPO.replace('logps("ref_logps", reference), group_relative()', f'logps("ref_logps", reference), {written}')


@pytest.mark.slow
def test_a_packed_rollout_is_read_once_too(fields, tmp_path):
    """The reference reads a rollout part by part, and none of the fields that it does not need."""
    given = fields | ONE_STEP | {"workdir": str(tmp_path / "run"), "batch_size": "16", "model.packing": "128"}
    begun = start(checked(arguments(tmp_path, GRPO, given)), write=False)
    rollouts = Rollouts(begun.run)
    rollout = rollouts.judge(rollouts.sample(begun.state, begun.held, 0)).batch
    assert begun.run.packing is not None and begun.run.packing.pays(rollout)
    assert reads_once(begun.run, begun.state, begun.held, rollout)


@pytest.mark.long
@pytest.mark.slow
def test_a_single_step_reads_the_rollout_once(fields, tmp_path):
    """Parameters and metrics equal those of a run that also reads the rollout before the step, with less work."""
    sources = {"once": GRPO, "twice": by_experience('group_relative(), lambda batch: batch | {"seen": batch["old_logps"]}')}
    found = {}
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        run = checked(
            arguments(
                tmp_path / name,
                source,
                fields
                | ONE_STEP
                | {"workdir": str(tmp_path / name / "run"), "microbatches": "2", "batch_size": "16", "model.packing": "-1"},
            )
        )
        state, frozen = (begun := start(run, write=False)).state, begun.held
        rollouts = Rollouts(run)
        rollout = rollouts.judge(rollouts.sample(state, frozen, 0)).batch
        assert reads_once(run, state, frozen, rollout) == (name == "once")
        program = begun.programs["train"].call.lower(state, frozen, {"rollouts": rollout}).compile()
        learnt, metrics = program(state, frozen, {"rollouts": rollout})
        found[name] = jax.tree.map(np.asarray, (learnt.params, metrics)), program.cost_analysis()["flops"]
    (once, flops), (twice, more) = found.values()
    assert {"kl", "entropy", "sampler_gap", "advantage_std"} <= once[1].keys() == twice[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), once, twice)
    assert flops < 0.9 * more


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        (GRPO, {"rollout.minibatches": "2"}),
        (GRPO, {"rollout.epochs": "2"}),
        (PPO, {"model.critic": "head"}),
        (by_experience("kl_reward(0.1), group_relative()"), {}),
        (by_experience("group_relative(), lambda batch: {**batch}"), {}),
        (GRPO.replace("kl_k3()", "kl_k3() + observe('x', lambda out, batch: batch['old_logps'].sum(axis=(1, 2)))"), {}),
        (by_experience("best_and_worst()").replace("grpo() + 0.01 * kl_k3()", "dpo()"), {}),
    ],
)
def test_a_policy_that_is_asked_before_the_step_reads_the_rollout_then(fields, tmp_path, source, changes):
    run = checked(arguments(tmp_path, source, fields | ONE_STEP | changes | {"workdir": str(tmp_path / "run")}))
    abstract = abstract_state(run), abstract_frozen(run.roles, run.mesh), abstract_rollout(run, prompts_of_rollout(run.config), 3)
    assert not reads_once(run, *abstract)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(grpo, fields, tmp_path):
    workdir, args = grpo
    again = arguments(tmp_path, GRPO, fields | {"workdir": str(tmp_path / "run"), "steps": "8"})
    process = runs.begin(again, runs.environment(8))
    assert runs.stop_when(process, lambda: (tmp_path / "run" / "checkpoints" / "4").is_dir(), runs.signal.SIGKILL)
    process.communicate()
    assert main(again) == 0
    jax.tree.map(np.testing.assert_array_equal, trained(workdir, args), trained(tmp_path / "run", again))


@pytest.mark.slow
def test_ppo_trains_a_critic_beside_the_policy(fields, tmp_path):
    given = fields | {"workdir": str(tmp_path / "run"), "model.critic": "head", "steps": "4", "export.final": "true"}
    args = arguments(tmp_path, PPO, given)
    assert main(args) == 0
    params = trained(tmp_path / "run", args)
    assert np.abs(params["value"]).max() > 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert row["loss/value_loss"] > 0 and row["reward"] >= 0
    with safe_open(tmp_path / "run" / "export" / "model.safetensors", framework="np") as f:
        assert not any("value" in name for name in f.keys())  # noqa: SIM118
    assert (
        main(["generate", str(tmp_path / "run"), "--prompts", fields["data.train"], "--max-new-tokens", "2", "--out", str(tmp_path / "o")])
        == 0
    )


def texts(fields):
    """The texts on which a policy is held by pretraining."""
    return fields["data.train"].replace("prompts", "texts")


@pytest.fixture
def pretrained(fields, tmp_path):
    """The command line of a run that mixes pretraining in."""
    return arguments(tmp_path, BOTH, fields | {"workdir": str(tmp_path / "run"), "data.pretrain": texts(fields)})


def test_every_step_of_a_turn_has_its_own_pretraining_batch(pretrained):
    run = checked(pretrained)
    found = Online(run, {}, Rollouts(run))._batches(4, {})["pretrain"]
    assert found["tokens"].shape == (4, 8, 1, run.data.pretrain.length) and run.data.pretrain.length > run.data.train.length
    for u in range(4):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[u], found), run.data.pretrain.batch(4 + u))  # noqa: B023
    described = abstract_batches(run)["pretrain"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), described
    )


@pytest.mark.slow
@pytest.mark.long
def test_pretraining_is_mixed_in_and_goes_on_bit_for_bit(fields, pretrained, tmp_path, capsys):
    own = tmp_path / "texts.jsonl"
    shutil.copyfile(texts(fields), own)
    pretrained = [*pretrained, f"--config.data.pretrain={own}"]
    assert main(pretrained) == 0
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in found] == [4, 8]
    for row in found:  # each is a mean over the steps of a turn
        np.testing.assert_allclose(row["loss"], row["loss/grpo"] + 0.5 * row["pretrain/loss/sft"], rtol=1e-5)
    assert found[1]["pretrain/loss/sft"] < found[0]["pretrain/loss/sft"]
    whole = trained(tmp_path / "run", pretrained)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert main(pretrained) == 0
    jax.tree.map(np.testing.assert_array_equal, whole, trained(tmp_path / "run", pretrained))
    own.write_text(own.read_text().replace("sun", "sea"))
    assert main(pretrained) == 2 and "comes from another data" in capsys.readouterr().err


def critic_of(folder, **changes):
    """Fields of a critic of its own tree: a reward model of the policy's tokens."""
    return {"model.critic": str(reward_folder(folder, 7, **changes))}


@pytest.mark.slow
def test_a_critic_of_its_own_tree_is_trained_beside_the_policy(fields, tmp_path):
    """The training state is checked on shapes alone: the critic folder's sizes, sharded; gradients reach critic and policy."""
    given = fields | {"workdir": str(tmp_path / "run")} | critic_of(tmp_path, hidden_size=16, head_dim=4)
    run = checked(arguments(tmp_path, PPO, given | {"model.critic_heads": "1", "mesh.fsdp": "8"}))
    check_step(run)
    params = abstract_state(run).params
    assert params["critic"]["embed"].shape == (96, 16) and params["embed"].shape == (96, 32)
    assert params["critic"]["embed"].sharding.spec == params["embed"].sharding.spec != jax.sharding.PartitionSpec()
    assert "value" not in params and params["critic"]["score"].shape == (16, 1)
    critic = run.roles["critic"]
    start = load(critic, run.mesh)
    folder = hf.load_params(hf.open_folder(given["model.critic"]), run.mesh)
    jax.tree.map(np.testing.assert_array_equal, start, folder)
    zeroed = load(critic._replace(sources=(hf.with_heads(critic.source, 2),)), run.mesh)
    assert zeroed["score"].shape == (16, 2) and not zeroed["score"].any()
    np.testing.assert_array_equal(zeroed["embed"], folder["embed"])
    file = tmp_path / "rm7" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"ä":'))
    with pytest.raises(ValueError, match="rm7' has another tokenizer than the policy: its id .* is 'ä', not 'a'; give models"):
        checked(arguments(tmp_path, PPO, given))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_run_with_a_critic_of_its_own_tree(rank, fields, tmp_path, capsys):
    given = fields | {"workdir": str(tmp_path / "run"), "lora.rank": rank, "steps": "8", "export.final": "true"} | critic_of(tmp_path)
    source = PPO + "\ndef averages(config):\n    return elastic_reset(decay=1.0, every=4)\n"
    args = arguments(tmp_path, source, given)
    assert main(args) == 0
    assert "critic" in capsys.readouterr().err
    start = hf.load_params(hf.open_folder(given["model.critic"]), checked(args).mesh)
    found = trained(tmp_path / "run", args)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found["critic"], start)
    assert moved["embed"] > 1e-4 and moved["layers"]["q"].max() > 1e-4 and moved["score"] > 1e-4
    # Decay 1 resets the policy to where it began, not the critic.
    policy = load_file(tmp_path / "run" / "export" / "model.safetensors")
    origin = load_file(f"{fields['model.path']}/model.safetensors")
    assert policy.keys() == origin.keys()
    for name in policy:
        np.testing.assert_allclose(policy[name], origin[name], atol=1e-7)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert main(args) == 0
    jax.tree.map(np.testing.assert_array_equal, found, trained(tmp_path / "run", args))
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(load_file(tmp_path / "again" / "model.safetensors")[name], policy[name])


REWARD = "def reward(prompts, completions):\n    "  # called once at the start with one completion, which is empty
BAD = {
    "raises": ("return [1 / (not any(completions)) for _ in completions]", "ZeroDivisionError"),
    "hangs": ("import time\n    time.sleep(30 * any(completions))\n    return [0.0] * len(completions)", "no answer within 0.2 s"),
    "is not finite": ("return [float('nan') if text else 0.0 for text in completions]", "are not finite"),
    "gives too few": ("return [0.0]", "gives 1 rewards for 48 completions"),
}


@pytest.mark.parametrize("name", ["raises", *(pytest.param(name, marks=pytest.mark.slow) for name in [*BAD][1:])])
def test_a_reward_function_that_fails_stops_the_run_in_one_line(name, fields, tmp_path, capsys):
    code, message = BAD[name]
    source = GRPO[: GRPO.index("def reward")] + REWARD + code
    given = fields | {"workdir": str(tmp_path / "run"), "rollout.timeout": "0.2", "eval.sample_prompts": "0", "eval.samples": "0"}
    began = time.monotonic()
    assert main(arguments(tmp_path, source, given)) == 1
    assert message in (said := capsys.readouterr().err) and "rollout.bad_rewards=drop" in said and "Traceback" not in said
    assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.long
def test_a_run_goes_on_without_bad_rewards_and_counts_them(fields, tmp_path):
    source = GRPO[: GRPO.index("def reward")] + REWARD + BAD["is not finite"][0].replace("if text", "if len(text) % 2")
    given = fields | {"workdir": str(tmp_path / "run"), "rollout.bad_rewards": "drop", "steps": "4"}
    assert main(arguments(tmp_path, source, given)) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 < row["bad_rewards"] < 48 and row["skipped"] == 0 and row["reward"] == 0 and row["scored_rate"] < 1


UNREWARDED = GRPO[: GRPO.index("def reward")]
OFFLINE = {
    "rollout.samples": "0",
    "data.kind": "preference",
    "data.columns.chosen": "prompt",
    "data.columns.rejected": "prompt",
    "data.prompt_separator": " ",
}
AHEAD = {"rollout.ahead": "true"}
SEVERAL = (
    UNREWARDED
    + """
def reward(prompts, completions):
    return {"short": [float(len(text) < 6) for text in completions], "a": [float("a" in text) for text in completions]}
"""
)
OFF_POLICY = GRPO.replace("grpo()", "importance_weighted(grpo())")
PROPOSAL = "\ndef averages(config):\n    return {'proposal': adopt_if_better(every=4)}\n"
SCORES = {"model.num_labels": "1", "eval.samples": "0", "eval.sample_prompts": "0"}
REFUSED = {
    "groups of one": ({"rollout.samples": "1"}, GRPO, "every advantage is 0"),
    "pairs of groups of one": (
        {"rollout.samples": "1"}, GRPO.replace("grpo()", "dpo()").replace("group_relative", "best_and_worst"), "every advantage is 0"
    ),
    "rewards of one name": ({}, GRPO + "\nreward = [reward, reward]\n", "gives the name 'reward' twice"),
    "several gold rewards": ({}, GRPO + "\ngold = [gold, reward]\n", "gold must be a single number"),
    "weights of one reward": ({"rollout.reward_weights": "2"}, GRPO, "gives one number without a name; leave it empty"),
    "numbers without names": ({}, SEVERAL, "to return several numbers for each completion, set rollout.reward_names=('short', 'a')"),
    "names of other numbers": (
        names("short", "b") | {"rollout.reward_weights": "1,2"}, SEVERAL, "gives 'short', 'a', and rollout.reward_names are 'short', 'b'"
    ),
    "numbers that nobody makes one": (names("short", "a"), SEVERAL, 'several "scores" per response but no "rewards"; let experience(..)'),
    "a KL of numbers that nobody makes one": (
        names("short", "a"), SEVERAL.replace("group_relative()", "kl_reward(0.1), leave_one_out()"), 'no "rewards"; let experience(..)'
    ),
    "a refill of numbers without weights": (
        names("short", "a") | {"rollout.refill": "2"}, SEVERAL.replace("group_relative", "wco, group_relative"), "rollout.reward_weights"
    ),
    "what TRL's trainer has": ({}, GRPO.replace("weight):", "weight, trainer_state):"), "'trainer_state', which alignax does not have"),
    "completions read as messages": (
        {}, GRPO.replace("len(text) %", "len(text[0]['content']) %"), "even if prompts are conversations, called with a prompt"
    ),
    "one of a list that raises": (
        {}, GRPO + "\ndef other(prompts, completions):\n    raise KeyError('x')\nreward = [reward, other]\n", "other() of"
    ),
    "a refill of samples ahead": (AHEAD | {"rollout.refill": "2"}, OFF_POLICY, "rollout.refill is 2: it uses the rewards"),
    "a refill without rewards": ({"rollout.refill": "2"}, UNREWARDED, "so it needs reward(..)"),
    "no process": ({"rollout.reward_workers": "0"}, GRPO, "'rollout.reward_workers' is 0"),
    "prompts without rollouts": ({"rollout.samples": "0"}, GRPO, "set rollout.samples"),
    "an unknown column": ({}, GRPO.replace("weight):", "answer):").replace("weight)", "answer)"), "asks for column 'answer'"),
    "steps": ({"steps": "6"}, GRPO, "use a multiple of 4"),
    "room": ({"rollout.max_new_tokens": "4000"}, GRPO, "exceed the model's"),
    "a reference that nobody reads": (
        {"reference.path": "here"}, GRPO.replace("reference)", ")").replace('logps("ref_logps", ), ', ""), "nothing asks for a reference"
    ),
    "no reward models": ({}, GRPO.replace("reference):", "reference, ensemble):"), "reward.path"),
    "reward models that nobody reads": ({"reward.path": "here"}, GRPO, "nothing asks for a reward model"),
    "a reward that overflows": ({}, GRPO.replace("[w *", "[1e30 + w *"), "a finite number up to 1e+15 for each"),
    "a reward model": (SCORES, GRPO[: GRPO.index("def gold")], "scores and no text"),
    "bad rewards": ({"rollout.bad_rewards": "ignore"}, GRPO, "use 'error' or 'drop'"),
    "a reset in a rollout": ({}, GRPO + "\ndef averages(config):\n    return elastic_reset(0.9, every=6)\n", "middle of a rollout of 4"),
    "a proposal and ahead": (AHEAD, OFF_POLICY + PROPOSAL, "leave one of them out"),
    "samples of before": (AHEAD, GRPO, "does not read sampled_logps; correct the loss, as in importance_weighted(grpo())"),
    "samples of before that are only seen": (
        AHEAD, GRPO.replace("kl_k3()", "kl_k3() + observe('x', lambda out, batch: batch['sampled_logps'].sum(axis=(1, 2)))"),
        "does not read sampled_logps",
    ),
    "samples of a proposal": ({}, GRPO + PROPOSAL, "does not read sampled_logps"),
    "no evidence": ({}, OFF_POLICY + PROPOSAL, "put proposal_evidence() at the end of the experience's chain"),
    "ahead of nothing": (AHEAD | {"rollout.samples": "0"}, GRPO, "no rollouts to sample ahead"),
    "a proposal of nothing": (OFFLINE, UNREWARDED + PROPOSAL, "samples rollouts"),
    "texts without a loss": ({"data.pretrain": "texts.jsonl"}, GRPO, "has no loss for it; return for example {"),
    "a loss without texts": ({}, BOTH, "data.pretrain is empty"),
    "a misspelt name": ({"data.pretrain": "texts.jsonl"}, BOTH.replace('"pretrain"', '"pretrian"'), "the nearest name is 'pretrain'"),
    "one name": ({"data.pretrain": "texts.jsonl"}, BOTH.replace('"rollouts": grpo()', ""), "names no loss 'rollouts'"),
    "names offline": ({"rollout.samples": "0", "data.kind": "sft", "data.train": "texts.jsonl"}, NAMED, "has a loss of rollouts"),
    "true for a critic": ({"model.critic": "true"}, PPO, "model.critic 'true' is not a critic; use 'head'"),
    "no critic's folder": ({"model.critic": "nowhere"}, PPO, "model folder 'nowhere' does not exist"),
    "heads of no critic": ({"model.critic_heads": "2"}, PPO, "model.critic_heads is 2 and there is no critic"),
    "a cache": ({"reference.cache": "cache"}, GRPO, "online training scores samples"),
    "int8 without weights": ({"rollout.int8": "true"}, GRPO, "(rollout.ahead, rollout.int8, rollout.top_p below 1, speaker(..)"),
    "int8 of nothing": ({"rollout.int8": "true"} | OFFLINE, UNREWARDED, "rollout.int8 is true, and rollout.samples is 0"),
    "a nucleus without weights": ({"rollout.top_p": "0.9"}, GRPO, "does not read sampled_logps; correct the loss"),
    "no nucleus": ({"rollout.top_p": "0"}, GRPO, "'rollout.top_p' is 0.0; it must be above 0 and at most 1"),
    "greedy rollouts": ({"rollout.temperature": "0"}, GRPO, "'rollout.temperature' is 0.0; it must be above 0, to sample from"),
    "texts at a temperature": ({"data.pretrain": "texts.jsonl", "rollout.temperature": "0.7"}, BOTH, "data.pretrain is learnt at 1"),
    "one sample many times": ({"eval.temperature": "0", "eval.samples_per_prompt": "4"}, GRPO, "all samples of a prompt are the same"),
    "a stop string of nothing": ({"rollout.stop": "[\"\"]"}, GRPO, "a stop string is empty; give some text"),
    "a stop string that is a number": ({"eval.stop": "(3,)"}, GRPO, "a stop string is 3; give some text"),
    "a stop string that never occurs": ({"eval.stop": "aé"}, GRPO, "stop string 'aé' can never occur"),
}  # fmt: skip


QUICK = (  # one of each kind
    "rewards of one name", "what TRL's trainer has", "a refill of samples ahead", "an unknown column", "steps", "no reward models",
    "a reward model", "int8 without weights", "samples of before", "no evidence", "a misspelt name", "no critic's folder",
    "greedy rollouts", "a stop string that never occurs",
)  # fmt: skip


@pytest.mark.parametrize("name", runs.slow_but(REFUSED, *QUICK))
def test_what_cannot_be_is_refused_before_any_compute(name, fields, tmp_path, capsys):
    changes, source, message = REFUSED[name]
    changes = {name: texts(fields) if value == "texts.jsonl" else value for name, value in changes.items()}
    assert main(arguments(tmp_path, source, fields | {"workdir": str(tmp_path / "run")} | changes)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_rollout_of_one_response_is_refused(fields, tmp_path):
    """A single response is refused even with reinforce_plus_plus(), which the error for groups of one recommends."""
    source = GRPO.replace("group_relative()", "reinforce_plus_plus()")
    more = {"workdir": str(tmp_path / "run"), "rollout.samples": "1", "rollout.minibatches": "1"}
    begun = lambda **more: prepare(
        load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]] + [f"{k}={v}" for k, v in more.items()]),
        meshes.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    args = arguments(tmp_path, source, fields | more)
    with pytest.raises(ValueError, match="a rollout is of one response .* Set rollout.samples or batch_size to 2 or more"):
        check_advantages(begun(batch_size=1))
    check_advantages(begun(batch_size=2))


@pytest.mark.slow
@pytest.mark.long
def test_an_ensemble_of_reward_models_rewards_rollouts(fields, tmp_path):
    folders = [reward_folder(tmp_path, seed) for seed in range(2)]
    source = """
    def loss(config):
        return rloo()

    def experience(config, reference, ensemble):
        return chain(logps("ref_logps", reference), score(ensemble), uwo(0.5), kl_reward(0.1), leave_one_out())
    """
    given = fields | {"workdir": str(tmp_path / "run"), "reward.path": ",".join(map(str, folders)), "model.path": str(tmp_path / "lm0")}
    assert main(arguments(tmp_path, source, given)) == 0
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    for row in found:  # UWO of two members: their mean less half the square of half their distance, on average
        assert row["disagreement"] > 0 and row["reward"] < (row["score/member_0"] + row["score/member_1"]) / 2
    (tmp_path / "again").mkdir()
    args = arguments(tmp_path / "again", source, given | {"workdir": str(tmp_path / "other"), "reward.path": f"{folders[0]},{folders[0]}"})
    assert main(args) == 2


@pytest.mark.slow
@pytest.mark.long
def test_samples_ahead_are_of_the_policy_a_turn_ago(grpo, fields, tmp_path):
    """The first rollout is the policy's own; each further one was drawn before the steps on the one before it, and is in the checkpoint."""
    given = fields | AHEAD | {"steps": "12", "workdir": str(tmp_path / "run")}
    args = arguments(tmp_path, OFF_POLICY, given)
    assert main(args) == 0
    train = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in train] == [4, 8, 12] and "sampler_gap" not in train[0] and train[2]["compilations"] == 0
    assert abs(train[0]["sampler_kl"]) < 1e-5 < abs(train[1]["sampler_kl"]) and train[1]["importance_weight"] != 1
    assert train[0]["kl_k3"] < 1e-5 and "distinct" in train[1] and "distinct" not in train[2]

    run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]))
    checkpoints = Checkpoints(tmp_path / "run", keep=9)
    state = checkpoints.restore(8, abstract_state(run))
    checkpoints.close()
    waiting = state.carry["ahead"]
    gap = lambda params: np.abs(
        np.where(waiting["completion_mask"], run.policy.apply(params, waiting).logps - waiting["sampled_logps"], 0)
    ).max()
    first = hf.load_params(run.policy.source, run.mesh)
    assert gap(first) > 1e-4 and gap(state.params) > 1e-4  # neither the initial policy's nor the newest one's
    assert np.isfinite(waiting["rewards"]).all() and np.array_equal(waiting["prompt_id"], Rollouts(run).rows(8))

    (tmp_path / "again").mkdir()
    again = arguments(tmp_path / "again", OFF_POLICY, given | {"workdir": str(tmp_path / "other")})
    process = runs.begin(again, runs.environment(8))
    assert runs.stop_when(process, lambda: (tmp_path / "other" / "checkpoints" / "4").is_dir(), runs.signal.SIGKILL)
    process.communicate()
    assert main(again) == 0
    jax.tree.map(np.testing.assert_array_equal, trained(tmp_path / "run", args), trained(tmp_path / "other", again))


@pytest.mark.long
@pytest.mark.slow
def test_fdpg_samples_from_its_proposal(fields, tmp_path):
    source = """
    def loss(config):
        return fdpg(js_pi_p)

    def experience(config, reference, prompts):
        start = logps("ref_logps", reference)
        return chain(start, reward_target(0.5), running_log_z(prompts), running_baseline(js_pi_p), proposal_evidence())

    def averages(config):
        return {"proposal": adopt_if_better(every=8)}

    def reward(prompts, completions):
        return [float("a" in text) for text in completions]
    """
    given = fields | {"workdir": str(tmp_path / "run"), "steps": "12", "optimizer.schedule": "constant", "checkpoint.keep": "9"}
    args = arguments(tmp_path, source, given)
    assert main(args) == 0
    train = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert abs(train[0]["sampler_kl"]) < 1e-5 < abs(train[1]["sampler_kl"])
    run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]))
    checkpoints = Checkpoints(tmp_path / "run", keep=9)
    states = {step: checkpoints.restore(step, abstract_state(run)) for step in (4, 8, 12)}
    checkpoints.close()
    differ = lambda a, b: any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    first = hf.load_params(run.policy.source, run.mesh)
    assert not differ(states[4].averages["proposal"], first) and states[8].carry["log_z"]["log_z"].shape == (24,)
    gains = states[4].carry["proposal"]["gain"], states[8].carry["proposal"]["gain"]
    assert gains[0] != 0 and gains[1] == 0
    decided = states[8].averages["proposal"]  # the policy as it stands, or what sampled so far
    assert differ(decided, states[8].params) != differ(decided, first)
    assert not differ(decided, states[12].averages["proposal"])


def test_pairs_are_the_best_and_the_worst_of_a_group():
    batch = tiny.batch(B=4, N=3)
    rewards = jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [jnp.nan, 3.0, -1.0], [jnp.nan, jnp.nan, 5.0]])
    pairs = best_and_worst()(batch | {"rewards": rewards, "prompt_id": jnp.arange(4)})
    np.testing.assert_array_equal(pairs["rewards"][0], [2.0, 0.0])
    np.testing.assert_array_equal(pairs["rewards"][2], [3.0, -1.0])
    np.testing.assert_array_equal(pairs["tokens"][0], batch["tokens"][0, jnp.array([1, 0])])
    np.testing.assert_array_equal(pairs["completion_mask"].any((1, 2)), [True, False, True, False])
    assert pairs["prompt_id"].shape == (4,) and pairs["tokens"].shape == (4, 2, batch["tokens"].shape[2])


@pytest.mark.slow
@pytest.mark.long
def test_dpo_is_trained_on_pairs_of_its_own_samples(fields, tmp_path):
    source = PPO.replace("ppo() + 0.1 * value_loss()", "dpo(0.1)").replace(
        "kl_reward(0.05), gae(), whiten_advantages()", "best_and_worst()"
    )
    args = arguments(tmp_path, source, fields | {"workdir": str(tmp_path / "run"), "steps": "4"})
    assert main(args) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 < row["loss"] <= np.log(2) * 1.01 and row["rewards/accuracies"] >= 0


@pytest.mark.slow
@pytest.mark.long
def test_rewards_held_at_thresholds_and_a_policy_that_is_reset(fields, tmp_path):
    folders = [reward_folder(tmp_path, seed) for seed in range(2)]
    source = """
    def loss(config):
        return ppo()

    def experience(config, reference, ensemble):
        return chain(logps("ref_logps", reference), score(ensemble), mu_ppo((50.0, -50.0)))

    def averages(config):
        return elastic_reset(decay=1.0, every=2)
    """
    given = fields | {"workdir": str(tmp_path / "run"), "reward.path": ",".join(map(str, folders)), "model.path": str(tmp_path / "lm0")}
    given |= {"steps": "3", "rollout.samples": "2", "rollout.minibatches": "1", "rollout.epochs": "1", "checkpoint.every": "3"}
    given |= {"eval.every": "0", "eval.samples": "0", "eval.sample_prompts": "0"}
    assert main(arguments(tmp_path, source, given)) == 0
    found = {row["step"]: row for row in rows(tmp_path / "run") if "loss" in row}
    up, down = ([found[step][f"constraint/multiplier_{k}"] for step in (1, 2, 3)] for k in (0, 1))
    assert up[0] == down[0] == 0.5 and up[0] < up[1] < up[2] and down[0] > down[1] > down[2]
    # Decay 1: the reset after step 2 is to the initial parameters, which the rollout before step 3 is of.
    assert found[2]["kl_k3"] > 1e-6 and abs(found[1]["kl_k3"]) < 1e-9 and abs(found[3]["kl_k3"]) < 1e-9


@pytest.mark.long
@pytest.mark.slow
def test_thresholds_are_searched_for_by_the_gold_rewards_of_rollouts(fields, tmp_path):
    folders = [reward_folder(tmp_path, seed) for seed in range(2)]
    source = """
    def loss(config):
        return ppo()

    def experience(config, reference, ensemble):
        return chain(logps("ref_logps", reference), score(ensemble), nm_ppo([[9, 1], [9, 2], [8, 1]], patience=1))

    def gold(prompts, completions):
        return [float("nan") if len(text) % 3 == 1 else float("a" in text) for text in completions]
    """
    given = fields | {"workdir": str(tmp_path / "run"), "reward.path": ",".join(map(str, folders)), "model.path": str(tmp_path / "lm0")}
    given |= {"steps": "4", "rollout.minibatches": "1", "rollout.epochs": "1", "rollout.bad_rewards": "drop"}
    assert main(arguments(tmp_path, source, given)) == 0
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [[row[f"constraint/threshold_{k}"] for k in (0, 1)] for row in found[:3]] == [[9, 1], [9, 2], [8, 1]]
    assert [row["constraint/evaluations"] for row in found] == [0, 1, 2, 3] and [row["constraint/phase"] for row in found[:3]] == [0, 0, 0]
    args = arguments(tmp_path, source, given)
    run, checkpoints = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]])), Checkpoints(tmp_path / "run")
    search = checkpoints.restore(4, abstract_state(run)).carry["nm_ppo"].search
    checkpoints.close()
    np.testing.assert_allclose(search.seen_values[:4], [row["gold"] for row in found], rtol=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_a_value_head_for_every_reward(fields, tmp_path):
    """Head 0 learns the KL's returns and each further one those of a reward model, whose scores lie apart."""
    folders = [reward_folder(tmp_path, seed) for seed in range(2)]
    source = """
    def loss(config):
        return ppo() + 0.1 * value_loss(heads=(0.2, 0.5, 0.5))

    def experience(config, reference, ensemble):
        return chain(logps("ref_logps", reference), score(ensemble), xi_ppo((1.0, 0.0), estimator=gae()))
    """
    given = fields | {"workdir": str(tmp_path / "run"), "reward.path": ",".join(map(str, folders)), "model.path": str(tmp_path / "lm0")}
    given |= {"model.critic": "head", "model.critic_heads": "3", "steps": "8", "eval.samples": "0", "eval.sample_prompts": "0"}
    args = arguments(tmp_path, source, given)
    assert main(args) == 0
    first, second = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert first["loss/value_loss"] > 0 and first["constraint/multiplier_0"] == 0  # as it was on the first rollout
    assert first["kl"] == 0 < second["kl_k3"]  # policy and reference are the same numbers at first: head 0 learns from the second rollout
    moved = np.abs(trained(tmp_path / "run", args)["value"]).max(axis=0)
    assert moved.shape == (3,) and (moved > 0).all()


@pytest.mark.parametrize("shift", [0.0, 200.0])
def test_the_kl_of_anothers_samples_is_weighted_to_be_the_policys(shift):
    """Numbers by hand, also hundreds of nats from the sampler, where ratios overflow; a response without a scored token is left out."""
    batch = tiny.batch(B=4, N=2)
    inside = batch["completion_mask"] = batch["completion_mask"].at[0, 0].set(False)
    rng = np.random.default_rng(0)
    own, reference, sampler = (np.where(inside, -rng.exponential(0.5, inside.shape), 0) for _ in range(3))
    sampler -= np.where(inside, shift, 0) * (np.arange(8) % 2).reshape(4, 2, 1)
    found = measured(batch | {"old_logps": own, "ref_logps": reference, "sampled_logps": sampler}, other=True)
    logs = (own - sampler).sum(axis=-1).ravel()[1:]
    weights = np.exp(logs - logs.max())
    np.testing.assert_allclose(found["kl"], weights @ (own - reference).sum(axis=-1).ravel()[1:] / weights.sum(), rtol=1e-4)
    np.testing.assert_allclose(found["sampler_kl"], -logs.mean(), rtol=1e-4)


def test_prompts_of_refills_are_a_function_of_the_step(fields, tmp_path):
    args = arguments(tmp_path, GRPO, fields | {"workdir": str(tmp_path / "run"), "rollout.refill": "2"})
    rollouts = Rollouts(checked(args))
    stream = rollouts.run.data.train
    first = 8 // 2  # steps over epochs: batches that the rollouts begin with
    asked = [rollouts.rows(step, again) for step in (0, 4) for again in (1, 2)]
    for i, rows in enumerate(asked):
        np.testing.assert_array_equal(rows, np.concatenate([stream.rows(first + 2 * i), stream.rows(first + 2 * i + 1)]))
    np.testing.assert_array_equal(rollouts.rows(4), np.concatenate([stream.rows(2), stream.rows(3)]))


@pytest.mark.slow
def test_groups_without_a_signal_are_replaced_and_the_rollouts_are_written(fields, tmp_path):
    """Trained groups have rewards that differ, as far as such groups are found; a resumed run is the same bit for bit."""
    source = (
        GRPO[: GRPO.index("def reward")] + "def reward(prompts, completions):\n    return [float('a' in text) for text in completions]\n"
    )
    given = fields | {"rollout.refill": "2", "log.rollouts": "48", "eval.every": "0", "rollout.epochs": "1", "checkpoint.every": "2"}
    args = arguments(tmp_path, source, given | {"workdir": str(tmp_path / "run"), "steps": "4"})
    assert main(args) == 0
    train, file = [row for row in rows(tmp_path / "run") if "loss" in row], tmp_path / "run" / "rollouts.jsonl"
    for row in train:
        assert 0 < row["signal_rate"] < 1 <= row["refill/times"] <= 2
        written = [own for own in map(json.loads, file.read_text().splitlines()) if own["step"] == row["step"]]
        assert len(written) == 48 and all(own["prompt"].startswith("<s>the ") for own in written)
        groups = [written[i : i + 3] for i in range(0, 48, 3)]
        alike = [group for group in groups if len({own["reward"] for own in group}) == 1]
        assert len(alike) == row["refill/dropped"] < 16 * (1 - row["signal_rate"])
        for group in groups:
            r = np.array([own["reward"] for own in group])
            np.testing.assert_allclose([own["advantage"] for own in group], (r - r.mean()) / (r.std(ddof=1) + 1e-4), atol=1e-5)
            assert all(own["reward"] == float("a" in re.sub("<(pad|s|/s|unk)>", "", own["completion"])) for own in group)
            assert all(own["truncated"] != own["completion"].endswith("</s>") for own in group)
    whole, params = file.read_text(), trained(tmp_path / "run", args)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert main(args) == 0
    assert file.read_text() == whole
    jax.tree.map(np.testing.assert_array_equal, params, trained(tmp_path / "run", args))


LISTED = (
    UNREWARDED
    + """
import asyncio

def short(completions, **columns):
    return [float(len(text) < 6) for text in completions]

async def has_a(prompts, completions, logprobs, level=1):
    await asyncio.sleep(0.01)
    assert all(x <= 0 for own in logprobs for x in own)
    return [float("a" in text) if len(text) % 3 else None for text in completions]

reward = [short, has_a]
"""
)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ahead", runs.long_but(["false", "true"], "false"))
def test_rewards_of_a_list_are_in_every_log(ahead, fields, tmp_path):
    """Every log has each number under its function's name, and their weighted sum, which leaves out missing numbers."""
    given = fields | {"workdir": str(tmp_path / "run"), "rollout.reward_weights": "1,0.5", "log.rollouts": "48", "rollout.ahead": ahead}
    source = LISTED.replace("grpo()", "importance_weighted(grpo())") if ahead == "true" else LISTED
    args = arguments(
        tmp_path, source, given | {"rollout.epochs": "1", "rollout.reward_workers": "2", "steps": "4", "checkpoint.every": "2"}
    )
    assert main(args) == 0
    found = rows(tmp_path / "run")
    read = lambda name: [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
    file, samples = read("rollouts.jsonl"), read("samples.jsonl")
    evaluation = [row for row in found if "eval/reward" in row][-1]
    train = [row for row in found if "loss" in row]
    shown = [([own for own in file if own["step"] == row["step"]], row, "") for row in train]
    shown.append(([own for own in samples if own["step"] == evaluation["step"]], evaluation, "eval/"))
    for written, metrics, begin in shown:
        assert len(written) == (4 if begin else 48)
        for own in written:
            text = re.sub("<(pad|s|/s|unk)>", "", own["completion"])
            assert own["scores"] == {"short": float(len(text) < 6), "has_a": float("a" in text) if len(text) % 3 else None}
            assert own["reward"] == own["scores"]["short"] + 0.5 * (own["scores"]["has_a"] or 0.0)
        for name in ("short", "has_a"):
            known = [own["scores"][name] for own in written if own["scores"][name] is not None]
            assert metrics[f"{begin}score/{name}"] == pytest.approx(np.mean(known))
        assert metrics[f"{begin}reward"] == pytest.approx(np.mean([own["reward"] for own in written]))
        assert metrics[f"{begin}bad_rewards"] == 0 and f"{begin}score/member_0" not in metrics and f"{begin}disagreement" not in metrics
    if ahead == "true":  # what waits for the next turn is in the checkpoint
        whole = trained(tmp_path / "run", args)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        assert main(args) == 0
        jax.tree.map(np.testing.assert_array_equal, whole, trained(tmp_path / "run", args))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("aggregate", ["wco, group_relative()", "gdpo((1.0, 0.5))", "xi_ppo((0.5, 0.5))"])
def test_named_numbers_are_scores_as_those_of_reward_models(aggregate, fields, tmp_path):
    source = SEVERAL.replace("float(len(text) < 6)", "float(s % 7) if (s := sum(map(ord, text))) % 5 else None")
    given = fields | names("short", "a") | {"workdir": str(tmp_path / "run"), "log.rollouts": "48", "rollout.bad_rewards": "drop"}
    given |= {"steps": "2", "rollout.epochs": "1", "eval.every": "0"}
    assert main(arguments(tmp_path, source.replace("group_relative()", aggregate), given)) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    missing = [own["scores"]["short"] is None for own in written]
    assert 0 < sum(missing) == row["bad_rewards"] < 48 and {"score/short", "score/a"} <= row.keys() and row["skipped"] == 0
    # The multipliers of xi_ppo begin at 0, so its advantages are those of a KL that is 0 on the first rollout.
    assert (row["advantage_std"] > 0) == (not aggregate.startswith("xi_ppo")) and np.isfinite(row["grad_norm"])
    if aggregate.startswith("wco"):
        for own, none in zip(written, missing, strict=True):
            assert own["reward"] == (None if none else min(own["scores"].values())) and (not none or own["advantage"] == 0)


def observed(steps, **config):
    """The log's lines about metrics of steps."""
    said = []
    log = types.SimpleNamespace(step=lambda *_: None, line=said.append)
    observe = Observer(types.SimpleNamespace(config=types.SimpleNamespace(**config)), log, equal=False)  # type: ignore
    for step, metrics in enumerate(steps, start=1):
        whole = {"skipped": 0, "tokens": 8, "distinct": 0.9, "entropy": 1.0, "reward": 1.0} | metrics
        observe(step, {name: x for name, x in whole.items() if x is not None})
    return said


def test_a_run_that_cannot_learn_is_told_so_once():
    silent = {"signal_rate": 0.0, "advantage_std": 0.0, "grad_norm": 0.1}
    (line,) = observed([silent] * 2 + [silent | {"signal_rate": 0.1}] + [silent] * 9)
    assert line.startswith("notice at step 6: in each group all rewards have been equal for 3 rollouts (signal_rate 0, reward 1)")
    assert len(observed(([silent] * 3 + [{}]) * 3)) == 1
    assert observed([silent | {"advantage_std": 0.5}] * 9) == []  # a critic or the whole batch still compares
    (line,) = observed([{"truncated_rate": 1.0}] * 9)
    assert "every completion of 3 rollouts was cut" in line
    (line,) = observed([{"judge_cut": 0.0}, {"judge_cut": 3.0}, {"judge_cut": 1.0}])
    assert line.startswith("notice at step 2: 3 answers are longer than the reward models can read")
    (line,) = observed([{"grad_norm": 0.0, "signal_rate": 0.0}, {"grad_norm": 0.0, "signal_rate": 0.5}])
    assert line.startswith("notice at step 1: the gradient is exactly 0: in each group all rewards are equal (reward 1)")
    said = []
    log = types.SimpleNamespace(step=lambda *_: None, line=said.append)
    Observer(None, log, equal=False)(1, {"skipped": 0, "tokens": 8, "grad_norm": 0.0})  # type: ignore
    assert "the gradient is exactly 0, so nothing was learnt" in said[0]  # offline, too


def test_a_run_without_any_reward_stops():
    none = {"bad_rewards": 4.0, "reward": float("nan")}
    assert observed([none, none, {"bad_rewards": 1.0}, none, none], max_skipped=3) == []
    (line,) = observed([none | {"reward_sampled": 0.5, "signal_rate": 0.0, "grad_norm": 0.1}] * 9, max_skipped=3)
    assert "in each group all rewards have been equal" in line  # there are some, and a refill has found none that differ
    with pytest.raises(RewardFailed, match="no completion of 3 rollouts in a row has a reward"):
        observed([{}, none, none, none], max_skipped=3)
    # Of gdpo(), which makes no reward of several numbers: there are some, and there are none.
    some, none = ({"bad_rewards": 4.0, "reward": None, "score/a": a, "score/b": float("nan")} for a in (1.0, float("nan")))
    assert observed([some] * 9, max_skipped=3) == []
    with pytest.raises(RewardFailed, match="no completion of 3 rollouts in a row has a reward"):
        observed([none] * 3, max_skipped=3)


def test_a_signal_to_another_process_ends_the_wait_for_rewards(monkeypatch):
    """The test plays process 0, which asks; process 1, which waits, gets a signal at its second look."""
    workers: Any = types.SimpleNamespace(stop=never)
    signals = iter([0, 15])
    monkeypatch.setattr("alignax.run.host_rewards.jax.process_count", lambda: 2)
    monkeypatch.setattr("alignax.run.host_rewards.multihost_utils.process_allgather", lambda own: np.array([own, [next(signals, 0), 0]]))

    def ask():
        end = time.monotonic() + 10
        while not (number := workers.stop()):
            assert time.monotonic() < end
            time.sleep(0.01)
        raise Abandoned(number)

    with pytest.raises(Abandoned) as left:
        asked(workers, ask)
    assert left.value.number == 15
    assert asked(workers, lambda: Answer([1.0])) == Answer([1.0])  # what is there already is not lost


@pytest.mark.slow
def test_signal_is_where_rewards_of_a_group_differ():
    batch = tiny.batch(B=4, N=3) | {"old_logps": jnp.zeros((4, 3, 24))}
    rewards = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [jnp.nan, 2.0, 2.0], [jnp.nan, jnp.nan, 5.0]])
    found = measured(batch | {"rewards": rewards})
    assert found["signal_rate"] == 0.25 and found["bad_rewards"] == 3
    nothing = measured(batch | {"rewards": jnp.full((4, 3), jnp.nan)})
    assert np.isnan(nothing["reward"]) and nothing["signal_rate"] == 0 and nothing["bad_rewards"] == 12
    scores = jnp.stack([rewards, jnp.zeros((4, 3))], axis=-1)  # one member that knows nothing takes its response alone
    found = measured(wco(batch | {"scores": scores}))
    assert found["bad_rewards"] == 3 and np.isfinite(found["reward"])


def test_completions_that_become_the_same_are_told_of_once():
    """The collapse after which a policy says "!!!!" to everything."""
    said = []
    log = types.SimpleNamespace(step=lambda *_: None, line=said.append)
    observe = Observer(None, log, equal=False)  # type: ignore
    for step, distinct in enumerate((0.9, 0.5, 0.1, 0.01), start=1):
        observe(step, {"skipped": 0, "tokens": 8, "distinct": distinct, "entropy": 0.02, "reward": 1.0})
    (line,) = said
    assert line.startswith("notice at step 3: only 10.0% of the completions are distinct (90.0% at first)") and "entropy_bonus()" in line
