"""The samplers of a run: `speaker(..)` of an experiment samples its rollouts and evaluations."""

import json
import re

import jax
import numpy as np
import pytest
import runs
import tiny
import torch
import transformers
from test_rewards_ensembles import reward_folder
from test_run_online import arguments, checked
from test_run_roles import DPO, ONLINE, PLAIN, STEERED, fields, folders  # noqa: F401

from alignax.cli import main
from alignax.config import load_experiment
from alignax.run.programs import programs
from alignax.run.sampling import speaker_params, told
from alignax.run.start import check_step, start

ALONE = """
def speaker(config, {0}):
    return {0}
"""
SEVENS = """
import jax.numpy as jnp

def speaker(policy):
    def logits(params, head, cache, tokens, at):
        return jnp.zeros((len(at), policy.predicted)).at[:, 7].set(99.0), cache
    read = lambda params, tokens, real: policy.empty(*tokens.shape)
    return policy._replace(read=read, head=lambda params: (), logits=logits, names=())
"""
PROCESSED = """
from alignax.generate import processed

def speaker(policy):
    return processed(policy, lambda logits: logits.at[:, 2].set(-jnp.inf))
"""


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rank", runs.by_turn([0, 2], [], [0]))
def test_evaluations_of_an_offline_run_sample_from_the_speaker(rank, folders, tmp_path):  # noqa: F811
    """Log-probs are those of transformers' combined logits, at the temperature of evaluations; adapters share the reference's tree."""
    given = {"models.margin.path": folders[1], "eval.sample_prompts": 4, "eval.max_new_tokens": 6, "eval.temperature": 0.7}
    given |= {"lora.rank": rank, "rollout.mesh": "tensor"}
    run = checked(arguments(tmp_path, DPO + STEERED, fields(folders, tmp_path, **given)))
    check_step(run)
    started = start(run, write=False)
    started.checkpoints.close()
    generate, prompts = run.samplers["eval"], [run.data.evaluated.prompt_tokens(i).tolist() for i in range(4)]
    params = speaker_params(generate.speaker, run.roles, started.held, started.state.params)
    out = generate(params, prompts, jax.random.key(0), 4)
    assert not out.exact and out.sampling.exact and "compare" not in started.programs
    models = [transformers.AutoModelForCausalLM.from_pretrained(folders[i]) for i in (0, 1, 0)]
    known = max(run.words.tokenizer.get_vocab().values()) + 1
    for prompt, group, logps, real in zip(prompts, out.rows(), out.logps, out.mask, strict=True):
        for tokens, found, mask in zip(group, logps, real, strict=True):
            whole = torch.tensor([[*prompt, *tokens.tolist()]])
            with torch.no_grad():
                policy, margin, reference = (model(whole).logits[0, :, :known] for model in models)
            scores = ((policy + 0.5 * margin - 0.5 * reference) / 0.7).log_softmax(-1)
            wanted = [scores[len(prompt) + t - 1, token].item() for t, token in enumerate(tokens)]
            np.testing.assert_allclose(found[mask], wanted, atol=1e-4)


def test_a_speakers_frozen_models_are_arguments_of_its_programs(folders, tmp_path):  # noqa: F811
    """Each program takes the parameters of every model; none is a constant in it. The first lines of the run say how they are laid out."""
    given = {"models.margin.path": folders[1], "eval.sample_prompts": 4}
    run = checked(arguments(tmp_path, DPO + STEERED, fields(folders, tmp_path, **given)))
    table = programs(run)
    line = told("eval", run.samplers["eval"], run.roles, run.mesh)
    assert re.fullmatch(
        r"eval: 8 completions are sampled .*, from a copy of the weights in float32, whole, with 0\.\d+ GB on each device", line
    )
    for name in ("eval/lay", "eval/prefill", "eval/decode"):
        program = table[name]
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in program.arguments[0]]
        assert len(shapes) == 3 and shapes[0] == shapes[1] == shapes[2]
        assert sum(np.size(x) for x in program.call.trace(*program.arguments).jaxpr.consts) < 100


def test_a_speaker_of_ones_own_needs_no_parameters(folders, tmp_path):  # noqa: F811
    run = checked(arguments(tmp_path, PLAIN + SEVENS, fields(folders, tmp_path, **{"eval.sample_prompts": 4, "eval.max_new_tokens": 5})))
    generate = run.samplers["eval"]
    out = generate(speaker_params(generate.speaker, run.roles, {}, {}), [[1, 5], [1, 6, 8]], jax.random.key(0))
    assert (out.tokens == 7).all() and not out.exact


@pytest.mark.slow
def test_a_run_of_dpo_logs_samples_of_the_speaker(folders, tmp_path):  # noqa: F811
    """A processor that forbids the end makes every sample as long as it may be; no KL is logged of samples that are not the policy's."""
    source = "import jax.numpy as jnp\n" + DPO + PROCESSED
    given = {"eval.sample_prompts": 4, "eval.samples_per_prompt": 16, "eval.max_new_tokens": 20}
    assert main(arguments(tmp_path, source, fields(folders, tmp_path, **given))) == 0
    found = [row for row in rows(tmp_path / "run") if "eval/prompts" in row]
    assert found and all(row["eval/truncated_rate"] == 1 and "eval/kl" not in row for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.long_but(["policy", "mixed"], "mixed"))
def test_rollouts_are_sampled_from_the_speaker(name, folders, tmp_path):  # noqa: F811
    """The policy itself stays exact; a combination is weighed by what it was drawn with, and a resumed program is not compiled anew."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "sun and", "it", "b c")))
    given = {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 4, "rollout.max_new_tokens": 6, "steps": 3}
    given |= {"log.every": 1} | ({} if name == "policy" else {"models.margin.path": folders[1]})
    weighted = ONLINE.replace("grpo()", "importance_weighted(grpo())") + STEERED
    assert main(arguments(tmp_path, ONLINE + ALONE.format(name) if name == "policy" else weighted, fields(folders, tmp_path, **given))) == 0
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    if name == "policy":
        assert all(row["sampler_gap"] < 1e-4 for row in trained)
    else:
        assert all(row["sampler_kl"] > 0.01 and "sampler_gap" not in row for row in trained)
    assert [row["compilations"] > 0 for row in trained] == [True, False, False]


def test_rollouts_in_int8_are_planned(folders, tmp_path):  # noqa: F811
    """Their programs take int8, those of evaluations the policy's own weights."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    given = {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 4, "eval.sample_prompts": 1}
    source = ONLINE.replace("grpo()", "importance_weighted(grpo())")
    run = checked(arguments(tmp_path, source, fields(folders, tmp_path, **given, **{"rollout.int8": True})))
    check_step(run)
    table = programs(run)
    held = {name: {str(x.dtype) for x in jax.tree.leaves(table[f"{name}/decode"].arguments[0])} for name in ("rollout", "eval")}
    assert held == {"rollout": {"int8", "float32"}, "eval": {"float32"}} and "rollout/lay" in table
    assert "a copy of the weights in int8, whole" in told("rollout", run.samplers["rollout"], run.roles, run.mesh)
    assert run.samplers["eval"].speaker.exact and not run.samplers["rollout"].speaker.exact


def test_a_loss_that_takes_samples_for_the_policys_is_refused(folders, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    given = {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 4, "rollout.max_new_tokens": 6}
    for source, more in ((STEERED, {"models.margin.path": folders[1]}), (ALONE.format("reference"), {})):
        with pytest.raises(
            ValueError,
            match=r"sampled from another distribution than that of the policy that learns from them \(.*speaker\(..\).*importance_weighted",
        ):
            check_step(checked(arguments(tmp_path, ONLINE + source, fields(folders, tmp_path, **given, **more))))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def speaker(config, policy):\n    return 3", r"speaker\(\) of .* returns 3; return a Speaker"),
        ("def speaker(config, polcy):\n    return polcy", r"speaker\(\) of .* asks for 'polcy'; the nearest is 'policy'"),
        (
            "def speaker(policy, ensemble):\n    return policy",
            r"asks for 'ensemble'.*; a parameter must be one of config, policy, reference",
        ),
        ("def speaker(helpful):\n    return helpful", r"speaker\(\) of .* asks for 'helpful', a reward model, which predicts no token"),
        ("def speaker(policy):\n    return policy._replace(names='x')", "with parameters of 'x', and it is given policy; make it of"),
        ("def speaker(policy):\n    return policy._replace(vocab_size=9)", "a speaker of 9 tokens, the policy has 96; they must share"),
        ("def speaker(policy):\n    return policy.absent", "line .*: policy has no field 'absent'; it has vocab_size"),
        (STEERED + "\ndef averages(config):\n    return {'reference': ema(0.9)}", r"speaker\(..\) ask for reference, but the average"),
    ],
)
def test_speakers_that_no_run_can_sample_from_are_refused(source, message, folders, tmp_path):  # noqa: F811
    given = {"eval.sample_prompts": 4}
    given |= {"models.helpful.path": folders[2]} if "helpful" in source else {}
    given |= {"models.margin.path": folders[1]} if "margin" in source else {}
    with pytest.raises(ValueError, match=message):
        checked(arguments(tmp_path, DPO + source, fields(folders, tmp_path, **given)))


def test_a_speaker_needs_the_policys_tokenizer_and_a_policy_that_samples(folders, tmp_path):  # noqa: F811
    other = tiny.folder(tmp_path / "other", vocab_size=288)
    tiny.byte_tokenizer().save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"another tokenizer than the policy: its id 0 is '<s>', .*speaker\(..\) read the policy's own tokens"
    ):
        checked(arguments(tmp_path, DPO + STEERED, fields(folders, tmp_path, **{"models.margin.path": other, "eval.samples": 2})))
    rewarding = fields(folders, tmp_path, **{"model.path": reward_folder(tmp_path, 3)})
    with pytest.raises(ValueError, match=r"speaker\(\) of .* is for text, which a reward model does not give"):
        checked(arguments(tmp_path, PLAIN.replace("sft()", "bradley_terry()") + ALONE.format("policy"), rewarding))


def test_the_speaker_of_a_model_that_a_file_imports_is_no_hook(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from alignax import *\nfrom alignax.generate import *\n\ndef get_config():\n    return default_config()\n" + PLAIN)
    assert load_experiment(file).speaker is None
    file.write_text(file.read_text() + ALONE.format("policy"))
    assert load_experiment(file).speaker is not None
