"""Reward models read what their own tokenizer and chat template make of prompt and completion: transformers gives the same scores."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import torch
import transformers
from test_rewards_ensembles import reward_folder
from test_run_online import arguments, checked

from alignax import rewards
from alignax.cli import main
from alignax.cli.reward_commands import pairs_of
from alignax.config import default_config
from alignax.data import load_examples
from alignax.generate import LENGTH, STOP_ID, Answers, Completions, Sampling
from alignax.models import hf
from alignax.rewards import judge as judges
from alignax.run.rollout import Rollouts, decoded
from alignax.run.sampling import ROLLOUT
from alignax.run.scoring import Scorers
from alignax.run.start import check_step, start
from alignax.run.state import abstract_rollout

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


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A policy and a reward model of its vocabulary and template, which writes something behind the end."""
    here = tmp_path_factory.mktemp("alike")
    judge = reward_folder(here, 4, vocab_size=288, eos_token_id=3)
    for folder in (here / "lm4", judge):
        tiny.byte_tokenizer(THEIRS).save_pretrained(folder)
    return here / "lm4", judge


def conversations(file):
    """Pairs of one turn each, written to a file."""
    pairs = [("is it?", "yes", "no, never"), ("why so?", "so", "it is what it is"), ("a", "b", "c"), ("d e", "f", "g h")]
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)} for p, c, r in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [[row["prompt"] + row[side] for side in ("chosen", "rejected")] for row in rows]


def fields(models, tmp_path, judge, data, **more):
    own = {
        "model.path": models[0], "reward.path": judge, "data.train": data, "workdir": tmp_path / "run", "batch_size": 8, "steps": 2,
        "eval.samples": 0, "log.tensorboard": False, "export.final": False,
    }  # fmt: skip
    return {name: str(value) for name, value in (own | more).items()}


def scores_of(run, batch):
    """The scores of a batch by the run's reward models: [B, N]."""
    params = rewards.load_members(run.roles["ensemble"].sources, run.mesh)
    model = rewards.ensemble_model(run.roles["ensemble"].config, params, run.mesh)
    return np.asarray(jax.jit(model.apply)(model.params, {name: jnp.asarray(x) for name, x in batch.items()}).scores)[..., 0]


def transformers_scores(folder, rows):
    """The scores that transformers gives rows of token ids, one row at a time."""
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
    rollouts, params = Rollouts(run), hf.load_params(run.policy.source, run.mesh)
    sampled = rollouts.sample(types.SimpleNamespace(key=jax.random.key(0), params=params, averages={}), {}, 0)
    batch = rollouts.judge(sampled).batch
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in abstract_rollout(run, 8, 3).items()}
    judge, texts = transformers.AutoTokenizer.from_pretrained(models[1]), decoded(run.words.tokenizer, sampled.completions)
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
    (code,) = judges.tokens_of([judges.asked(examples, 0, "ok")], judges.Judge("ensemble", tokenizer, (), 0, 999, {}, False))
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
    which = run.data.train.rows(0)
    wanted = transformers_scores(models[1], [read(p, a) for p, *answers in (pairs[i] for i in which) for a in answers])
    np.testing.assert_allclose(scores_of(run, run.data.train.batch(0)).ravel(), wanted, atol=1e-4)


def test_a_reward_model_of_the_policys_format_reads_the_policys_tokens(models, tmp_path):
    data = tiny.pairs(tmp_path / "pairs.jsonl", 8)
    run = checked(arguments(tmp_path, OFFLINE, fields(models, tmp_path, models[2], data, **{"data.max_length": 48})))
    assert not run.judges and "ensemble_tokens" not in run.data.train.batch(0)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "is it?"}) + "\n")
    own = {"data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 4}
    args = arguments(tmp_path, ONLINE, fields(models, tmp_path, models[2], tmp_path / "prompts.jsonl", **own))
    assert checked(args).judges["ensemble"].shared and not checked([*args, "--config.rollout.stop=('x',)"]).judges["ensemble"].shared
    file, before = models[2] / "tokenizer.json", (models[2] / "tokenizer.json").read_text()
    file.write_text(json.dumps(json.loads(before) | {"post_processor": None}))  # the same tokens, and no <s> in front
    assert not (judge := checked(args).judges["ensemble"]).shared and judge.length % 8 == 0
    with pytest.raises(ValueError, match=r"rm2' reads 128 tokens, but a prompt of 6 of its tokens and an answer of max_new_tokens 123 do"):
        checked([*args, "--config.rollout.max_new_tokens=123"])
    file.write_text(before)
    config, known = models[2] / "config.json", (models[2] / "config.json").read_text()
    config.write_text(json.dumps(json.loads(known) | {"max_position_embeddings": 16}))
    with pytest.raises(ValueError, match=r"rm2' reads 16 tokens, but a prompt of 7 of its tokens and an answer of max_new_tokens 10 do"):
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


def test_what_a_template_writes_behind_the_end_is_read_and_not_scored(alike, tmp_path):
    """A reward model reads that text also in the policy's own rows of data; the policy learns the same tokens as without it."""
    chats = conversations(tmp_path / "pairs.jsonl")
    given = fields(alike, tmp_path, alike[1], tmp_path / "pairs.jsonl", **{"data.max_length": 64})
    run = checked(arguments(tmp_path, OFFLINE, given))
    assert not run.data.train.examples.others and not run.data.train.examples.conversations
    batch, judge = run.data.train.batch(0), transformers.AutoTokenizer.from_pretrained(alike[1])
    wanted = [judge.apply_chat_template(chat)["input_ids"] for i in run.data.train.rows(0) for chat in chats[i]]
    assert [row[real].tolist() for row, real in zip(batch["tokens"].reshape(16, -1), batch["mask"].reshape(16, -1), strict=True)] == wanted
    np.testing.assert_allclose(scores_of(run, batch).ravel(), transformers_scores(alike[1], wanted), atol=1e-4)
    source = OFFLINE.replace(", ensemble", "").replace(", score(ensemble), mean", "")
    alone = checked(arguments(tmp_path, source, {k: v for k, v in given.items() if k != "reward.path"})).data.train.batch(0)
    learnt = lambda batch: batch["tokens"][batch["completion_mask"]].tolist()
    assert learnt(alone) == learnt(batch) and (batch["mask"].sum(-1) == alone["mask"].sum(-1) + 1).all()


def test_an_exported_reward_model_gives_in_transformers_what_training_and_judging_saw(alike, tmp_path):
    chats = conversations(tmp_path / "pairs.jsonl")
    given = {"model.path": alike[0], "model.num_labels": 1, "data.train": tmp_path / "pairs.jsonl", "data.eval": tmp_path / "pairs.jsonl"}
    given |= {"workdir": tmp_path / "run", "batch_size": 8, "eval.samples": 0, "data.max_length": 64, "steps": 1}
    run = checked(arguments(tmp_path, "def loss(config):\n    return bradley_terry()", given))
    params, batch = hf.load_params(run.policy.source, run.mesh, jax.random.key(7)), run.data.train.batch(0)
    trained = np.asarray(jax.jit(run.policy.apply)(params, {name: jnp.asarray(x) for name, x in batch.items()}).scores)
    hf.export(params, run.policy.source, tmp_path / "out", eos=run.words.tokenizer.eos_token_id)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for pair in chats for chat in pair]
    with torch.no_grad():
        wanted = theirs(**tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")).logits.numpy().reshape(-1, 2)
    assert wanted.std() > 0.01
    np.testing.assert_allclose(trained, wanted[run.data.train.rows(0)], atol=1e-4)
    source, stacked = rewards.load_ensemble([tmp_path / "out"], run.mesh)
    examples = pairs_of(run.config, source, None)["eval"]
    model = rewards.ensemble_model(source.config, stacked, run.mesh)
    judged = rewards.score_examples(model.apply, stacked, examples, run.mesh, 8, run.data.train.length)
    np.testing.assert_allclose(judged[0], wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "preference"])
def test_samples_are_read_to_the_end_of_what_the_policys_own_template_writes(kind, alike, tmp_path):
    """This holds for samples with any kind of end, and for data of every kind."""
    chats = conversations(tmp_path / "pairs.jsonl")
    own = {"data.kind": kind, "rollout.samples": 4, "rollout.max_new_tokens": 6, "data.max_length": 64}
    run = checked(arguments(tmp_path, ONLINE, fields(alike, tmp_path, alike[1], tmp_path / "pairs.jsonl", **own)))
    rollouts, params = Rollouts(run), hf.load_params(run.policy.source, run.mesh)
    sampled = rollouts.sample(types.SimpleNamespace(key=jax.random.key(1), params=params, averages={}), {}, 0)
    batch, judge = rollouts.judge(sampled).batch, transformers.AutoTokenizer.from_pretrained(alike[1])
    rows = [
        judge.apply_chat_template([chats[i][0][0], {"role": "assistant", "content": text}])["input_ids"]
        for i, group in zip(sampled.rows, decoded(run.words.tokenizer, sampled.completions), strict=True)
        for text in group
    ]
    assert np.asarray(batch["truncated"]).any() and not np.asarray(batch["ensemble_cut"]).any()
    np.testing.assert_allclose(scores_of(run, batch).ravel(), transformers_scores(alike[1], rows), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_an_answer_that_was_cut_is_read_as_one_that_has_ended(shared, tmp_path):
    """The judge adds the end, in the policy's tokens or its own; the policy's tokens stay as they are."""
    tokenizer, data = tiny.tokenizer(), default_config().data
    data.kind = "prompt"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "is it?"}) + "\n")
    examples, _ = load_examples(tmp_path / "a.jsonl", data, tokenizer, 96)
    said, prompt = tokenizer(" yes", add_special_tokens=False)["input_ids"], examples.prompt_tokens(0).tolist()
    tokens, mask = np.array([[[*said, 0], [*said, 2]]], np.int32), np.array([[[True] * 4 + [False], [True] * 5]])
    ended = np.array([["length", "stop id"]], object)
    completions = Completions(tokens, mask, np.zeros(mask.shape, np.float32), ended, Sampling(), 0, 0)
    judge = judges.Judge("ensemble", tokenizer, (2,), 16, 96, {}, shared)
    texts = decoded(tokenizer, completions)
    batch = judges.read(judge, tokenizer, Answers(examples, np.zeros(1, np.int64), [prompt], completions, texts))
    whole = [*prompt, *said, 2]
    for n in range(2):
        assert batch["ensemble_tokens"][0, n][batch["ensemble_mask"][0, n]].tolist() == whole
        assert batch["ensemble_tokens"][0, n][batch["ensemble_completion_mask"][0, n]].tolist() == [*said, 2]
    assert not batch["ensemble_cut"].any()


def test_formats_are_compared_by_content_and_not_by_rows(models, tmp_path):
    """A tokenizer that differs from the policy's in the last of many rows alone; a template of its own, for conversations."""
    data = tiny.pairs(tmp_path / "pairs.jsonl", 70)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "is it?", "chosen": " YES", "rejected": " no"}) + "\n")
    other = shutil.copytree(models[2], tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    given = lambda judge, data: arguments(tmp_path, OFFLINE, fields(models, tmp_path, judge, data, **{"data.max_length": 64}))
    examples = checked(given(other, data)).data.train.examples
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    last = lambda examples: tokenizer.decode(examples.tokens[examples.offsets[140] : examples.offsets[141]])
    assert last(examples) != last(examples.others["ensemble"]) == last(examples).replace("YES", "yes")
    conversations(tmp_path / "chats.jsonl")
    assert checked(given(models[2], tmp_path / "chats.jsonl")).data.train.examples.others == {}, "no template: the policy's"
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert checked(given(other, data)).data.train.examples.others == {}
    (other / "chat_template.jinja").write_text(OURS.replace("</s>", " </s>"))
    assert checked(given(other, data)).data.train.examples.others == {}, "a text goes through no template"
    assert checked(given(other, tmp_path / "chats.jsonl")).data.train.examples.others != {}


@pytest.mark.slow
def test_samples_of_conversations_anchor_a_reward_model_of_another_template(models, tmp_path):
    """The samples are as `alignax generate --out` writes them."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": pair[0][:1]}) + "\n" for pair in conversations(tmp_path / "x")))
    samples, out = tmp_path / "samples.jsonl", tmp_path / "out"
    told = ["--prompts", tmp_path / "prompts.jsonl", "--out", samples, "--n", 2, "--max-new-tokens", 8]
    assert main(["generate", *map(str, [models[0], *told])]) == 0
    assert main(["anchor", *map(str, [models[1], out, "--samples", samples, "--config.batch_size=8"])]) == 0
    judge, rows = transformers.AutoTokenizer.from_pretrained(models[1]), [json.loads(line) for line in samples.read_text().splitlines()]
    chats = [[*row["prompt"], {"role": "assistant", "content": row["completion"]}] for row in rows if row["completion"].strip()]
    wanted = transformers_scores(models[1], [judge.apply_chat_template(chat)["input_ids"] for chat in chats])
    assert len(chats) > 4 and wanted.std() > 0.01
    np.testing.assert_allclose(json.loads((out / "config.json").read_text())["score_offset"], [wanted.mean()], atol=1e-4)


WATCHED = """
def loss(config):
    return grpo()

def experience(config):
    return group_relative()

def reward(prompts, completions, reader):
    return [sum(own) / max(len(own), 1) for own in reader]
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A language model of another vocabulary and template than the policy's."""
    folder = tiny.folder(tmp_path_factory.mktemp("reader") / "lm", vocab_size=288, eos_token_id=3)
    tiny.byte_tokenizer(THEIRS).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.parametrize("kind", runs.by_turn(["text", "messages"], [], ["messages"]))
def test_a_language_model_of_another_tokenizer_reads_text_for_reward_functions(kind, models, reader, tmp_path):
    """Log-probs are transformers' of the model's own tokens; an end that the policy did not sample has none."""
    words = ("sun", "moon", "sea", "a tree", "cat", "dog", "the owl", "x")
    asked = [f"{word} and" if kind == "text" else [{"role": "user", "content": f"{word} and?"}] for word in words]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    given = {"data.kind": "prompt", "rollout.samples": 8, "rollout.max_new_tokens": 12, "models.reader.path": reader, "reward.path": ""}
    run = checked(arguments(tmp_path, WATCHED, fields(models, tmp_path, "", tmp_path / "prompts.jsonl", **given)))
    started = start(run, write=False)
    started.checkpoints.close()
    rollouts = Rollouts(run, scorers=Scorers(run, started.held, started.programs, ROLLOUT))
    sampled = rollouts.sample(started.state, started.held, 0)
    found, ended = rollouts.scorers(rollouts.answers(sampled)).models["reader"], sampled.completions.ended.ravel()
    assert {*ended} == {STOP_ID, LENGTH} and run.roles["reader"].reads_text
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(reader), transformers.AutoModelForCausalLM.from_pretrained(reader)
    texts, count = decoded(run.words.tokenizer, sampled.completions), max(tokenizer.get_vocab().values()) + 1
    every = [(asked[i], text) for i, group in zip(sampled.rows, texts, strict=True) for text in group]
    for (prompt, text), why, logps in zip(every, ended, found, strict=True):
        if kind == "text":
            before = tokenizer(prompt)["input_ids"]
            whole = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        else:
            before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}])["input_ids"]
            whole = whole[: len(whole) - 1 - whole[::-1].index(tokenizer.eos_token_id)]
        whole = [*whole, tokenizer.eos_token_id] if why == STOP_ID else whole
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0, :, :count].log_softmax(-1)
        wanted = [scores[t - 1, whole[t]].item() for t in range(len(before), len(whole))]
        np.testing.assert_allclose(logps, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_completion_that_does_not_fit_has_no_log_probs(models, reader, tmp_path):
    """The list is [NaN], since a sum of some of the log-probs would look like one of all."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    given = {"data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 6, "models.reader.path": reader}
    run = checked(arguments(tmp_path, WATCHED, fields(models, tmp_path, "", tmp_path / "prompts.jsonl", **given)))
    started = start(run, write=False)
    started.checkpoints.close()
    scorers = Scorers(run, started.held, started.programs, ROLLOUT)
    rollouts = Rollouts(run, scorers=scorers)
    answers = rollouts.answers(rollouts.sample(started.state, started.held, 0))
    answers.texts[0][0] = "longer than the row of the model by far" * 3
    assert [np.isnan(own).all() for own in scorers(answers).models["reader"]] == [True] + [False] * 15


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            WATCHED.replace("(config):\n    return group", "(config, reader):\n    return group"),
            "read the policy's own tokens; let",
        ),
        (WATCHED.replace("loss(config)", "loss(config, reader)"), "alone ask for reader, which then reads text"),
    ],
)
def test_methods_that_need_equal_tokens_get_no_other_tokenizer(source, message, models, reader, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    given = {"data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 6, "models.reader.path": reader}
    with pytest.raises(ValueError, match="reader.* has another tokenizer than the policy: its id 0 is '<s>', not '<pad>'; .*" + message):
        checked(arguments(tmp_path, source, fields(models, tmp_path, "", tmp_path / "prompts.jsonl", **given)))
