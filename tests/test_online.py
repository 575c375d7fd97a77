"""Online training: rollouts in front of the shared step, on a tiny model, in one process."""

import json
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from safetensors import safe_open
from test_rewards import reward_folder

from alignax.checkpoint import Checkpoints
from alignax.cli import main
from alignax.config import load_experiment
from alignax.experience import best_and_worst
from alignax.prepare import prepare
from alignax.programs import abstract_state

HEAD = """
from alignax import *

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
PPO = """
def loss(config):
    return ppo() + 0.1 * value_loss()

def experience(config, reference):
    return chain(logps("ref_logps", reference), kl_reward(0.05), gae(), whiten_advantages())

def reward(prompts, completions):
    return [float("a" in text) for text in completions]
"""


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A tiny model, and prompts with a column of numbers."""
    folder = tmp_path_factory.mktemp("online")
    model = tiny.folder(folder / "model")
    rows = [{"prompt": f"the {word} of", "weight": 1.0 + i % 2} for i, word in enumerate(["sun", "moon", "sea", "tree", "cat", "dog"] * 4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def trained(workdir, args):
    """The parameters that a run ended with."""
    run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]))
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
    given = fields | {"workdir": str(tmp_path / "run"), "model.critic": "true", "steps": "4", "export.final": "true"}
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


REWARD = "def reward(prompts, completions):\n    "  # called once at the start with one completion, which is empty
BAD = {
    "raises": ("return [1 / (not any(completions)) for _ in completions]", "ZeroDivisionError"),
    "hangs": ("import time\n    time.sleep(30 * any(completions))\n    return [0.0] * len(completions)", "no answer within 0.2 s"),
    "is not finite": ("return [float('nan') if text else 0.0 for text in completions]", "are not finite"),
    "gives too few": ("return [0.0]", "gives 1 rewards for 48 completions"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_reward_function_that_fails_stops_the_run_in_one_line(name, fields, tmp_path, capsys):
    code, message = BAD[name]
    source = GRPO[: GRPO.index("def reward")] + REWARD + code
    given = fields | {"workdir": str(tmp_path / "run"), "rollout.timeout": "0.2", "eval.sample_prompts": "0", "eval.samples": "0"}
    began = time.monotonic()
    assert main(arguments(tmp_path, source, given)) == 1
    assert message in (said := capsys.readouterr().err) and "rollout.bad_rewards=drop" in said and "Traceback" not in said
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_run_goes_on_without_bad_rewards_and_counts_them(fields, tmp_path):
    source = GRPO[: GRPO.index("def reward")] + REWARD + BAD["is not finite"][0].replace("if text", "if len(text) % 2")
    given = fields | {"workdir": str(tmp_path / "run"), "rollout.bad_rewards": "drop", "steps": "4"}
    assert main(arguments(tmp_path, source, given)) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 < row["bad_rewards"] < 48 and row["skipped"] == 0 and row["reward"] == 0 and row["scored_rate"] < 1


SCORES = {"model.num_labels": "1", "eval.samples": "0", "eval.sample_prompts": "0"}
REFUSED = {
    "prompts without rollouts": ({"rollout.samples": "0"}, GRPO, "set rollout.samples"),
    "an unknown column": ({}, GRPO.replace("weight):", "answer):").replace("weight)", "answer)"), "asks for column 'answer'"),
    "steps": ({"steps": "6"}, GRPO, "use a multiple of 4"),
    "room": ({"rollout.max_new_tokens": "4000"}, GRPO, "exceed the model's"),
    "no reward models": ({}, GRPO.replace("reference):", "reference, ensemble):"), "reward.path"),
    "a reward model": (SCORES, GRPO[: GRPO.index("def gold")], "scores and no text"),
    "bad rewards": ({"rollout.bad_rewards": "ignore"}, GRPO, "use 'error' or 'drop'"),
    "a reset in a rollout": ({}, GRPO + "\ndef averages(config):\n    return elastic_reset(0.9, every=6)\n", "middle of a rollout of 4"),
    "a cache": ({"reference.cache": "cache"}, GRPO, "online training scores samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_any_compute(name, fields, tmp_path, capsys):
    changes, source, message = REFUSED[name]
    assert main(arguments(tmp_path, source, fields | {"workdir": str(tmp_path / "run")} | changes)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
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
def test_dpo_is_trained_on_pairs_of_its_own_samples(fields, tmp_path):
    source = PPO.replace("ppo() + 0.1 * value_loss()", "dpo(0.1)").replace(
        "kl_reward(0.05), gae(), whiten_advantages()", "best_and_worst()"
    )
    args = arguments(tmp_path, source, fields | {"workdir": str(tmp_path / "run"), "steps": "4"})
    assert main(args) == 0
    (row,) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 < row["loss"] <= np.log(2) * 1.01 and row["rewards/accuracies"] >= 0


@pytest.mark.slow
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
