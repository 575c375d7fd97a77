"""The methods of docs/online.md, each on a tiny run: what a loss reads is written, and what is new trains from end to end."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
from test_docs import ONLINE
from test_rewards_ensembles import reward_folder
from test_run_online import arguments, checked, rows

from alignax.cli import main
from alignax.config import load_experiment
from alignax.mesh import make_mesh
from alignax.run.loop import fit, summary
from alignax.run.prepare import prepare
from alignax.run.start import check_step, start

ENSEMBLE = "score(ensemble), uwo(0.5), "
METHODS = {  # experience after the reference's log-probs, loss, and fields of the config; as the table of the page has them
    "GRPO": ("group_relative()", "grpo() + b * kl_k3()", {}),
    "batch deviation": ("batch_scaled()", "grpo() + b * kl_k3()", {}),
    "GDPO": ("score(ensemble), gdpo((1.0, 0.5))", "grpo() + b * kl_k3()", {}),
    "RLOO": ("kl_reward(b), leave_one_out(), whiten_responses()", "rloo()", {}),
    "Dr. GRPO": ("group_relative(std=False)", "grpo(aggregate=token_sum(n))", {}),
    "DAPO": ("overlong_penalty(n, 2), group_relative()", "finished(grpo(clip_high=0.28, aggregate=token_mean))", {}),
    "entropy": ("group_relative(), top_entropy(0.2)", "ppo()", {}),
    "GSPO": ("group_relative()", "gspo()", {}),
    "GMPO": ("group_relative()", "gmpo()", {}),
    "SAPO": ("group_relative()", "sapo(level=by_mean)", {}),
    "CISPO": ("group_relative()", "cispo()", {}),
    "Lp-Reg": (
        'group_relative(), token_statistic("proxy_logps", policy, min_p(0.02)), low_probability_tokens()',
        "lp_reg()",
        {"rollout.minibatches": "2"},
    ),
    "VESPO": ("group_relative()", "vespo()", {"rollout.ahead": "true"}),
    "masked": ("group_relative()", "importance_masked(grpo(), level=by_response)", {"rollout.ahead": "true"}),
    "off-policy": ("group_relative()", "off_policy_masked(grpo())", {"rollout.epochs": "2"}),
    "REINFORCE++": ("kl_reward(b), reinforce_plus_plus()", "ppo()", {}),
    "its baseline": ("group_relative(std=False), whiten_advantages()", "ppo() + b * kl_k2(token_mean)", {}),
    "PPO": ("kl_reward(b), gae(), whiten_advantages()", "ppo() + 0.1 * value_loss()", {"model.critic": "head"}),
    "f-DPG": ("reward_target(b), running_log_z(prompts), running_baseline(js_pi_p)", "fdpg(js_pi_p)", {}),
    "online DPO": ("best_and_worst()", "dpo(b)", {}),
    "constrained": ("score(ensemble), xi_ppo((0.48, 0.23))", "ppo()", {}),
    "GKD": ("", "gkd()", {"reference.token_kl": "true"}),
}


def source(experience: str, loss: str) -> str:
    """An experiment of the method; an ensemble gives the rewards."""
    written = experience if "score(" in experience else ENSEMBLE + experience
    return f"""
b, n = 0.04, 6

def loss(config):
    return {loss}

def experience(config, policy, reference, ensemble, prompts):
    return chain(logps("ref_logps", reference), {written})
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny policy, two reward models of its tokens, and prompts."""
    folder = tmp_path_factory.mktemp("methods")
    judges = [reward_folder(folder, seed) for seed in range(2)]
    prompts = [{"prompt": f"the {word} of"} for word in ("sun", "moon", "sea", "tree", "cat", "dog") * 4]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    own = {
        "model.path": folder / "lm0", "reward.path": ",".join(map(str, judges)), "data.train": folder / "prompts.jsonl",
        "data.kind": "prompt", "batch_size": 8, "steps": 4, "rollout.samples": 3, "rollout.max_new_tokens": 6, "eval.every": 0,
        "eval.sample_prompts": 0, "eval.samples": 0, "log.tensorboard": False, "export.final": False, "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    return {name: str(value) for name, value in own.items()}


@pytest.mark.parametrize("name", runs.by_turn(METHODS, ("GRPO",), ("GDPO", "DAPO", "GMPO", "PPO", "f-DPG", "GKD", "off-policy")))
def test_every_method_of_the_page_finds_what_it_reads(given, tmp_path, name):
    """Methods are traced on shapes alone, as a run checks itself before it computes; all terms of a loss are averaged alike."""
    experience, loss, fields = METHODS[name]
    run = checked(arguments(tmp_path, source(experience, loss), given | fields | {"workdir": str(tmp_path / "run")}))
    check_step(run)
    assert not any("averaged differently" in line for line in summary(run, {"policy": "", "reference": ""}, 0))


def test_the_page_has_the_methods():
    plain = ONLINE.replace("overlong_penalty(..)", "overlong_penalty(n, 2)")
    for name in ("GRPO", "GDPO", "Lp-Reg", "Dr. GRPO", "DAPO", "REINFORCE++", "its baseline", "PPO", "f-DPG", "online DPO", "GKD"):
        experience, loss, _ = METHODS[name]
        assert f"`{loss}`" in ONLINE and experience in plain, name


def test_a_kl_of_another_average_is_told_of_at_the_start(given, tmp_path):
    loss = "grpo() + b * kl_k3(token_mean)"
    run = checked(arguments(tmp_path, source("group_relative()", loss), given | {"workdir": str(tmp_path / "run")}))
    (line,) = [line for line in summary(run, {"policy": "", "reference": ""}, 0) if "averaged differently" in line]
    assert "grpo over responses, kl_k3 over tokens" in line


def trained(args: list[str], workdir: Path) -> list[dict]:
    """The log of a run on one device."""
    overrides = [a.removeprefix("--config.") for a in args[3:]]
    fit(start(prepare(load_experiment(args[2], overrides), make_mesh({"data": 1}, jax.devices()[:1]))))
    return [row for row in rows(workdir) if "loss" in row]


@pytest.mark.slow
def test_several_rewards_at_uncertain_tokens_of_samples_ahead(given, tmp_path):
    """GDPO's advantages at the tokens of highest entropy, VESPO's weights on samples of the policy a turn ago."""
    fields = given | {"workdir": str(tmp_path / "run"), "rollout.ahead": "true", "log.every": "1", "optimizer.learning_rate": "1e-2"}
    experience = "score(ensemble), gdpo((1.0, 0.5)), top_entropy(0.2)"
    found = trained(arguments(tmp_path, source(experience, "vespo() + b * kl_k3(token_mean)"), fields), tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in found)
    np.testing.assert_allclose(found[0]["vespo/weight"], 1.0, atol=1e-4)  # the first samples are the policy's own
    assert all(0 < row["vespo/weight"] < 1.6 and row["vespo/weight"] != 1.0 for row in found[1:])
    assert all(0 < row["advantage_std"] < 1 for row in found)  # 1 before four tokens in five have none


@pytest.mark.slow
@pytest.mark.long
def test_low_probability_tokens_are_kept_by_the_policy_without_its_noise(given, tmp_path):
    """Through the command line: two steps on a rollout, whose proxy is the policy's that sampled it; some tokens are protected."""
    fields = given | {"workdir": str(tmp_path / "run"), "rollout.minibatches": "2", "rollout.epochs": "2", "log.every": "1", "steps": "8"}
    experience = 'group_relative(), token_statistic("proxy_logps", policy, min_p(0.02)), low_probability_tokens(0.5)'
    assert main(arguments(tmp_path, source(experience, "lp_reg()"), fields | {"optimizer.learning_rate": "1e-2"})) == 0
    found = [row for row in rows(tmp_path / "run") if "loss/lp_reg" in row]
    assert len(found) == 2 and all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in found)
    assert all(0 < row["lp_reg/protected"] < 0.5 for row in found)


@pytest.mark.slow
def test_a_student_is_distilled_on_its_own_samples(given, tmp_path):
    """The divergence from a teacher falls on rollouts without a reward, at a temperature and a share of its own."""
    teacher = tiny.folder(tmp_path / "teacher", initializer_range=0.1)
    experiment = """
def loss(config):
    return gkd()

def experience(config, reference):
    return logps("ref_logps", reference)
"""
    fields = {name: value for name, value in given.items() if name != "reward.path"}
    fields |= {"workdir": str(tmp_path / "run"), "reference.path": str(teacher), "reference.token_kl": "true", "reference.jsd_beta": "0.3"}
    fields |= {
        "reference.jsd_temperature": "1.5",
        "rollout.samples": "1",
        "steps": "24",
        "optimizer.learning_rate": "1e-2",
        "log.every": "4",
    }
    found = [row["loss/gkd"] for row in trained(arguments(tmp_path, experiment, fields), tmp_path / "run")]
    assert 0 < found[-1] < 0.7 * found[0]


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("jsd_beta", "1.5", "reference.jsd_beta is 1.5; it must be the teacher's share of the mixture, in [0, 1]"),
        ("jsd_temperature", "0.0", "reference.jsd_temperature is 0.0; it must be above 0"),
    ],
)
def test_a_mixture_that_is_none_is_refused(given, tmp_path, capsys, field, value, text):
    fields = given | {"workdir": str(tmp_path / "run"), "reference.token_kl": "true", f"reference.{field}": value}
    assert main(arguments(tmp_path, source("", "gkd()"), fields)) == 2
    assert text in capsys.readouterr().err
