"""Reward models read what their own tokenizer and chat template make of prompt and completion: transformers gives the same scores."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from test_online import arguments, checked
from test_rewards import reward_folder

from alignax import judges, rewards
from alignax.config import default_config
from alignax.data import load_examples
from alignax.models import hf
from alignax.programs import abstract_rollout
from alignax.rollout import Rollouts, decoded
from alignax.start import check_step

# As Qwen's and Gemma's, with a line break behind the end.
THEIRS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OURS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SCORED = """
def loss(config):
    return {}

def experience(config, reference, ensemble):
    return chain(logps("ref_logps", reference), score(ensemble), {})
"""
ONLINE, OFFLINE = SCORED.format("rloo()", "mean, leave_one_out()"), SCORED.format("dpo()", "mean")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a reward model of another vocabulary and template, and one of the policy's own."""
    here = tmp_path_factory.mktemp("judges")
    policy = tiny.folder(here / "policy")
    (policy / "chat_template.jinja").write_text(OURS)
    other = reward_folder(here, 1, vocab_size=288)
    tiny.byte_tokenizer(THEIRS).save_pretrained(other)
    (other / "generation_config.json").unlink()
    return policy, other, reward_folder(here, 2)


def fields(models, tmp_path, judge, data, **more):
    own = {
        "model.path": models[0], "reward.path": judge, "data.train": data, "workdir": tmp_path / "run", "batch_size": 8, "steps": 2,
        "eval.samples": 0, "log.tensorboard": False, "export.final": False,
    }  # fmt: skip
    return {name: str(value) for name, value in (own | more).items()}


def scores_of(run, batch):
    """What the run's reward models give a batch: [B, N]."""
    params = rewards.load_members(run.judges, run.mesh)
    model = rewards.ensemble_model(run.judges[0].config, params, run.mesh)
    return np.asarray(jax.jit(model.apply)(model.params, {name: jnp.asarray(x) for name, x in batch.items()}).scores)[..., 0]


def transformers_scores(folder, rows):
    """What transformers gives token ids, each alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.array([float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in rows])


@pytest.mark.slow
def test_samples_are_scored_as_the_reward_models_template_has_them(models, tmp_path):
    prompts = [[{"role": "user", "content": f"{word} and?"}] for word in ("sun", "moon", "sea", "a tree", "cat", "dog", "the owl", "x")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    own = {"data.kind": "prompt", "rollout.samples": 3, "rollout.max_new_tokens": 6}
    run = checked(arguments(tmp_path, ONLINE, fields(models, tmp_path, models[1], tmp_path / "prompts.jsonl", **own)))
    check_step(run)
    rollouts, params = Rollouts(run), hf.load_params(run.source, run.mesh)
    sampled = rollouts.sample(types.SimpleNamespace(key=jax.random.key(0), params=params, averages={}), {}, 0)
    batch = rollouts.judge(sampled).batch
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in abstract_rollout(run, 8, 3).items()}
    judge, texts = transformers.AutoTokenizer.from_pretrained(models[1]), decoded(run.tokenizer, sampled.completions)
    rows = [
        judge.apply_chat_template([*prompts[i], {"role": "assistant", "content": text}])["input_ids"]
        for i, group in zip(sampled.rows, texts, strict=True)
        for text in group
    ]
    assert rows[0] != np.asarray(batch["tokens"][0, 0])[: len(rows[0])].tolist() and len({*map(tuple, rows)}) > 6
    np.testing.assert_allclose(scores_of(run, batch).ravel(), transformers_scores(models[1], rows), atol=1e-4)


def test_prompts_of_every_shape_are_the_reward_models_as_they_are_the_policys(tmp_path):
    """A system column and the messages of ShareGPT too."""
    tokenizer, data = tiny.byte_tokenizer(THEIRS), default_config().data
    data.kind, data.columns.system = "prompt", "system"
    (tmp_path / "a.jsonl").write_text(json.dumps({"system": "be brief", "prompt": [{"from": "human", "value": "hi"}]}) + "\n")
    examples, _ = load_examples(tmp_path / "a.jsonl", data, tokenizer, 999)
    (code,) = judges.tokens_of([judges.asked(examples, 0, "ok")], judges.Judge(tokenizer, (), 0, 999, {}, False))
    turns = [{"role": role, "content": text} for role, text in (("system", "be brief"), ("user", "hi"), ("assistant", "ok"))]
    assert code.prompt + code.completions[0] == tokenizer.apply_chat_template(turns)["input_ids"]


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_pairs_are_scored_as_the_reward_model_tokenises_them(kind, models, tmp_path):
    pairs = [("is it?", " yes", " no, never"), ("why so?", " so", " it is what it is"), ("a", " b", " c"), ("d e", " f", " g h")]
    turn = lambda role, text: text if kind == "text" else [{"role": role, "content": text}]
    rows = [{"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)} for p, c, r in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = checked(arguments(tmp_path, OFFLINE, fields(models, tmp_path, models[1], tmp_path / "pairs.jsonl", **{"data.max_length": 64})))
    check_step(run)
    judge = transformers.AutoTokenizer.from_pretrained(models[1])
    read = {
        "text": lambda p, a: judge(p + a)["input_ids"] + [judge.eos_token_id],
        "messages": lambda p, a: judge.apply_chat_template(turn("user", p) + turn("assistant", a))["input_ids"],
    }[kind]
    which = run.train.rows(0)
    wanted = transformers_scores(models[1], [read(p, a) for p, *answers in (pairs[i] for i in which) for a in answers])
    np.testing.assert_allclose(scores_of(run, run.train.batch(0)).ravel(), wanted, atol=1e-4)


def test_a_reward_model_of_the_policys_format_reads_the_policys_tokens(models, tmp_path):
    data = tiny.pairs(tmp_path / "pairs.jsonl", 8)
    run = checked(arguments(tmp_path, OFFLINE, fields(models, tmp_path, models[2], data, **{"data.max_length": 48})))
    assert run.judge is None and "judge_tokens" not in run.train.batch(0)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "is it?"}) + "\n")
    own = {"data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 4}
    args = arguments(tmp_path, ONLINE, fields(models, tmp_path, models[2], tmp_path / "prompts.jsonl", **own))
    assert checked(args).judge.shared and not checked([*args, "--config.rollout.stop=('x',)"]).judge.shared
    file, before = models[2] / "tokenizer.json", (models[2] / "tokenizer.json").read_text()
    file.write_text(json.dumps(json.loads(before) | {"post_processor": None}))  # the same tokens, and no <s> in front
    assert not (judge := checked(args).judge).shared and judge.length % 8 == 0
    with pytest.raises(ValueError, match=r"rm2' reads 128 tokens, and a prompt of 6 of its own with an answer of max_new_tokens 123 does"):
        checked([*args, "--config.rollout.max_new_tokens=123"])
    file.write_text(before)
    config, known = models[2] / "config.json", (models[2] / "config.json").read_text()
    config.write_text(json.dumps(json.loads(known) | {"max_position_embeddings": 16}))
    with pytest.raises(ValueError, match=r"rm2' reads 16 tokens, and a prompt of 7 of its own with an answer of max_new_tokens 10 does"):
        checked([*args, "--config.rollout.max_new_tokens=10"])
    checked([*args, "--config.rollout.max_new_tokens=9"])
    with pytest.raises(ValueError, match=r"rows of \d+ tokens exceed the 16 positions of the reward model .*; lower data.max_length"):
        checked(arguments(tmp_path, OFFLINE, fields(models, tmp_path, models[2], data, **{"data.max_length": 48})))
    config.write_text(known)
    short = shutil.copytree(models[0], tmp_path / "short")
    (short / "config.json").write_text(json.dumps(tiny.CONFIG | {"max_position_embeddings": 16}))
    own |= {"reference.path": short, "rollout.max_new_tokens": 10}
    with pytest.raises(ValueError, match="prompts of 7 tokens and rollout.max_new_tokens 10 exceed the model's 16 positions"):
        checked(arguments(tmp_path, ONLINE, fields(models, tmp_path, models[2], tmp_path / "prompts.jsonl", **own)))


@pytest.mark.slow
def test_members_of_several_templates_are_no_ensemble(models, tmp_path):
    other = reward_folder(tmp_path, 3)
    (other / "chat_template.jinja").write_text(OURS)
    with pytest.raises(ValueError, match="rm3' has another chat template than .*rm2'"):
        rewards.open_ensemble([models[2], other])
