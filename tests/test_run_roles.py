"""Models by name: which a run holds, what their parameters are, and that experience, losses and gold are given them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_rewards_ensembles import reward_folder
from test_rewards_judge import THEIRS, transformers_scores
from test_run_online import arguments, checked

from alignax import losses
from alignax.cli import main
from alignax.data import chat
from alignax.models import hf
from alignax.models.transformer import head_weight
from alignax.rewards import judge as judging
from alignax.run.loop import fit
from alignax.run.roles import abstract, freeze, frozen, load, models
from alignax.run.start import check_step, start
from alignax.types import Outputs

MODPO = """
def loss(config):
    return modpo([0.5, 0.5], implicit_rewards("margin_logps"))

def experience(config, reference, margin):
    return chain(logps("ref_logps", reference), logps("margin_logps", margin))
"""
PLAIN = """
def loss(config):
    return sft()
"""
DPO = """
def loss(config):
    return dpo()

def experience(config, reference):
    return chain(logps("ref_logps", reference))
"""
ONLINE = """
def loss(config):
    return grpo()

def experience(config, reference):
    return chain(logps("ref_logps", reference), group_relative())

def reward(prompts, completions):
    return [float(len(text)) for text in completions]
"""


STEERED = """
from alignax.generate import combined

def speaker(config, policy, margin, reference):
    return combined([policy, margin, reference], [1.0, 0.5, -0.5])
"""
TWIN = """
def metrics(prompts, completions, gold, twin, logprobs):
    gaps = [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in zip(twin, logprobs, strict=True)]
    return {"gold": gold, "gap": [max(gap, default=0.0) for gap in gaps]}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a language model of its shape with other weights, and a reward model of a tokenizer and a template of its own."""
    here = tmp_path_factory.mktemp("roles")
    gold = reward_folder(here, 7, vocab_size=288, eos_token_id=3)
    tiny.byte_tokenizer(THEIRS).save_pretrained(gold)
    return tiny.folder(here / "policy"), tiny.folder(here / "margin", initializer_range=0.05), gold


def fields(folders, tmp_path, **more):
    own = {
        "model.path": folders[0], "data.train": tiny.pairs(tmp_path / "pairs.jsonl", 8), "workdir": tmp_path / "run", "batch_size": 8,
        "steps": 2, "eval.samples": 0, "log.tensorboard": False, "export.final": False, "data.max_length": 48,
    }  # fmt: skip
    return {name: str(value) for name, value in (own | more).items()}


@pytest.mark.slow
def test_experience_is_given_models_by_the_names_of_the_config(folders, tmp_path):
    given = fields(folders, tmp_path, **{"models.margin.path": folders[1], "reference.cache": "off"})
    run = checked(arguments(tmp_path, MODPO, given))
    check_step(run)
    assert {*run.roles} == {"policy", "reference", "margin"} and {*frozen(run.roles)} == {"reference", "margin"}
    started = start(run, write=False)
    started.checkpoints.close()
    margin = models(run.roles, started.held, started.state.params)["margin"]
    batch = {name: jnp.asarray(x) for name, x in run.data.train.batch(0).items()}
    theirs = hf.load_params(hf.open_folder(folders[1]), run.mesh)
    np.testing.assert_array_equal(margin.apply(margin.params, batch).logps, run.policy.apply(theirs, batch).logps)
    state, metrics = started.programs["train"].call(started.state, started.held, {"data": batch})
    ours = run.policy.apply(load(run.policy, run.mesh), batch).logps
    written = batch | {"ref_logps": ours, "margin_logps": run.policy.apply(theirs, batch).logps}
    loss = losses.modpo([0.5, 0.5], losses.implicit_rewards("margin_logps"))
    np.testing.assert_allclose(metrics["loss"], loss(Outputs(ours, ours), written, loss.normalised(written))[0], rtol=1e-5)


@pytest.mark.slow
def test_a_reference_may_have_further_rows_of_padding(folders, tmp_path):
    """As Qwen2.5's 7B beside its 0.5B: one tokenizer, and a head padded further. Its probabilities are of the policy's tokens alone."""
    padded = shutil.copytree(folders[0], tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 104}))
    tensors = load_file(padded / "model.safetensors")
    more = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    tensors["model.embed_tokens.weight"] = np.concatenate([tensors["model.embed_tokens.weight"], more])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    (padded / "alignax.json").unlink(missing_ok=True)
    given = fields(folders, tmp_path, **{"reference.path": padded, "reference.token_kl": "true", "mesh.fsdp": 1, "mesh.data": -1})
    run = checked(arguments(tmp_path, DPO, given))
    heads = [head_weight(role.config, load(role, run.mesh)) for role in (run.roles["reference"], run.policy)]
    np.testing.assert_array_equal(*heads)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (padded / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has 104 rows in its embedding, the policy has 96, and .* has no tokenizer"):
        checked(arguments(tmp_path, DPO, given))


@pytest.mark.slow
def test_a_loss_is_given_models_too(folders, tmp_path):
    """The models' log-probs are part of the loss, although no experience writes them."""
    source = """
def loss(config, weak):
    def value(out, batch):
        return sequence(out.logps - weak.apply(weak.params, batch).logps, batch).mean(axis=1), {}
    return make_loss("apart", value)
"""
    source = "from alignax.losses import make_loss, sequence\n" + source
    run = checked(arguments(tmp_path, source, fields(folders, tmp_path, **{"models.weak.path": folders[1]})))
    check_step(run)
    started = start(run, write=False)
    started.checkpoints.close()
    batch = {name: jnp.asarray(x) for name, x in run.data.train.batch(0).items()}
    _, metrics = started.programs["train"].call(started.state, started.held, {"data": batch})
    logps = [run.policy.apply(hf.load_params(hf.open_folder(folder), run.mesh), batch).logps for folder in folders[:2]]
    np.testing.assert_allclose(metrics["loss"], (logps[0] - logps[1]).sum((1, 2)).mean() / 2, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [pytest.param("", marks=pytest.mark.slow), "cache"])
def test_a_loss_may_ask_for_the_reference(cache, folders, tmp_path):
    """The reference is then held or read from the cache, without any experience; a model from the policy's own folder is held, too."""
    source = """
def loss(config, reference, twin):
    def value(out, batch):
        apart = out.logps - reference.apply(reference.params, batch).logps
        return sequence(apart, batch).mean(axis=1) + sequence(out.logps - twin.apply(twin.params, batch).logps, batch).mean(axis=1), {}
    return make_loss("apart", value)
"""
    changes = {"models.twin.path": folders[0], "steps": 1} | ({"reference.cache": tmp_path / cache} if cache else {})
    source = "from alignax.losses import make_loss, sequence\n" + source
    assert main(arguments(tmp_path, source, fields(folders, tmp_path, **changes))) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [abs(row["loss"]) < 1e-4 for row in rows if "loss" in row] == [True]


@pytest.mark.slow
def test_a_held_tree_has_the_shapes_that_are_planned(folders, tmp_path):
    """Every kind of role is checked: whole, base of adapters, without a critic's head, and stacked reward models."""
    source = MODPO.replace("margin)", "margin, ensemble)")
    given = {"models.margin.path": folders[1], "models.ensemble.path": reward_folder(tmp_path, 3), "lora.rank": 2, "lora.int8": "true"}
    run = checked(arguments(tmp_path, source, fields(folders, tmp_path, **given)))
    assert {*frozen(run.roles)} == {"base", "margin", "ensemble"} and run.roles["reference"].tree == "base"
    for role in frozen(run.roles).values():
        held = freeze(role, load(role, run.mesh))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), held)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract(role, run.mesh))


def test_other_spellings_name_the_same_models(folders, tmp_path):
    source = (
        MODPO.replace("margin)", "margin=None)")
        .replace(', logps("margin_logps", margin)', "")
        .replace('modpo([0.5, 0.5], implicit_rewards("margin_logps"))', "dpo()")
    )
    run = checked(arguments(tmp_path, source, fields(folders, tmp_path, **{"models.reference.path": folders[1]})))
    assert run.config.reference.path == str(folders[1]) and not run.config.models and run.roles["reference"].tree == "reference"


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (PLAIN, {"models.weak.path": 1}, "'models.weak.path' is set and nothing asks for that model"),
        (MODPO, {}, r"experience\(\) of .* asks for 'margin'"),
        (MODPO, {"models.margin.path": "none"}, "model folder 'none' does not exist"),
        (MODPO, {"models.margin.path": 1, "models.margin.adapters": "none"}, "none"),
        (MODPO, {"models.margin.path": 1, "models.reference.path": 1, "reference.path": "x"}, "leave one of them out"),
        (MODPO, {"models.margin.pth": 1}, "models.margin.pth"),
        (MODPO, {"models.margin.path": 2, "models.margin.adapters": 1}, "is a reward model; give the adapters' folder"),
        (MODPO, {"models.margin.path": 1, "models.margin.adapters": "nope://x/y"}, "nope:// paths are not known to fsspec"),
        (PLAIN.replace("config)", "config, critic)"), {}, r"loss\(\) of .* asks for 'critic'"),
        (PLAIN, {"models.gold.path": 2}, "the run samples nothing that the gold model could score"),
        (PLAIN, {"models.gold.path": 1, "eval.samples": 2}, "is a language model; give a reward model"),
    ],
)
def test_models_that_no_run_can_use_are_refused(folders, tmp_path, source, changes, message):
    changes = {name: folders[x] if isinstance(x, int) and name.startswith("models") else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        start(checked(arguments(tmp_path, source, fields(folders, tmp_path, **changes))), write=False)


@pytest.mark.slow
@pytest.mark.parametrize("online", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_gold_reward_model_scores_samples_as_transformers_does(online, folders, tmp_path):
    """Online in rollouts and evaluations, offline in evaluations; its template is its own. Functions are given what models say, too."""
    policy, judge = tiny.folder(tmp_path / "policy", vocab_size=288, eos_token_id=3), transformers.AutoTokenizer.from_pretrained(folders[2])
    tiny.byte_tokenizer(THEIRS.replace("<|im_start|>", "")).save_pretrained(policy)
    (policy / "generation_config.json").unlink()
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": turn("user", text)} for text in ("is it?", "why so?", "a b", "go")]
    rows = [row | ({} if online else {"chosen": turn("assistant", "yes"), "rejected": turn("assistant", "no")}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"model.path": policy, "data.train": tmp_path / "rows.jsonl", "models.gold.path": folders[2], "eval.samples": 4}
    own |= {"eval.max_new_tokens": 6, "data.max_length": 100, "mesh.data": 2}
    if online:
        own |= {"data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 6}
        own |= {"models.helpful.path": folders[2]}  # which the reward is of
    source = (ONLINE.replace("completions)", "completions, helpful)").replace("[float(len(text)) for text in completions]", "helpful"), DPO)
    assert main(arguments(tmp_path, source[not online] + TWIN, fields(folders, tmp_path, **own, **{"models.twin.path": policy}))) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    asked = {json.dumps(row["prompt"][0]["content"])[1:-1]: row["prompt"] for row in rows}
    whole = [
        next(turns for text, turns in asked.items() if text in row["prompt"]) + turn("assistant", row["completion"]) for row in samples
    ]
    read = [judge.apply_chat_template(chat)["input_ids"] for chat in whole]
    np.testing.assert_allclose([row["gold"] for row in samples], transformers_scores(folders[2], read), atol=1e-4)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["eval/gold"]) and np.isfinite(row["eval/kl"]) for row in logged if "eval/prompts" in row)
    assert not online or all(np.isfinite(row["gold"]) for row in logged if "loss" in row)
    first = next(row for row in logged if "eval/prompts" in row)
    np.testing.assert_allclose(first["eval/metrics/gold"], first["eval/gold"], atol=1e-5)
    assert not online or first["eval/metrics/gap"] < 1e-4  # offline a model is scored over all rows of its head, and sampled without some
    assert not online or np.allclose([row["reward"] for row in samples], [row["gold"] for row in samples], atol=1e-6)


# MODPO ----------------------------------------------------------------------------------------------------------------------


def batch_of(chosen, rejected, **more):
    """Pairs of one scored token with these log-probs."""
    shape = (len(chosen), 2, 2)
    place = lambda a, b: jnp.stack([jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)], 1)[..., None] * jnp.array([[[0.0, 1.0]]])
    mask = jnp.broadcast_to(jnp.array([[[False, True]]]), shape)
    return place(chosen, rejected), {"completion_mask": mask, "ref_logps": place(*more.pop("ref"))} | more


def test_modpo_has_the_values_of_its_authors():
    """The values are those of modpo_loss of github.com/ZHZisZZ/modpo, for three objectives."""
    margins = jnp.array([[[0.7, -0.2], [-0.3, 0.5]], [[0.1, 0.4], [0.6, 0.0]]])
    logps, batch = batch_of([-10, -12.5], [-11, -9], ref=([-10.5, -12], [-10, -9.5]), margins=margins)
    loss = losses.modpo([0.5, 0.3, 0.2], lambda batch: batch["margins"])
    each = [loss(Outputs(logps, logps), batch, (jnp.eye(2)[i],))[0] for i in range(2)]
    np.testing.assert_allclose(each, [0.703197, 0.723597], atol=1e-6)
    with pytest.raises(ValueError, match=r"margins have shape \(2, 2, 2\), but the weights of 1 other objectives need \(2, 2, 1\)"):
        losses.modpo([0.5, 0.5], lambda batch: batch["margins"])(Outputs(logps, logps), batch, (jnp.ones(2),))
    with pytest.raises(ValueError, match="give first a weight above 0 for the objective of the pairs"):
        losses.modpo([0.0, 1.0], lambda batch: batch["margins"])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_modpos_optimum_is_that_of_the_weighted_reward(weights):
    """The model is a bandit, and the first reward labels its pairs: pi ~ ref exp(w r / beta)."""
    beta, rng = 0.5, np.random.default_rng(0)
    rewards, start_ = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), jax.nn.log_softmax(jnp.asarray(rng.normal(size=6), jnp.float32))
    i, j = np.triu_indices(6, 1)
    i, j = np.concatenate([i, j]), np.concatenate([j, i])
    wins = jax.nn.sigmoid(rewards[0, i] - rewards[0, j])
    loss = losses.modpo(weights, lambda batch: batch["margins"], beta)
    margins = jnp.stack([rewards[1, i], rewards[1, j]], 1)[..., None]

    def value(z):
        p = jax.nn.log_softmax(z)
        logps, batch = batch_of(p[i], p[j], ref=(start_[i], start_[j]), margins=margins)
        return loss(Outputs(logps, logps), batch, (wins / wins.sum(),))[0]

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 1500))

    def step(carry, _):
        updates, state = optimizer.update(jax.grad(value)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (z, _), _ = jax.lax.scan(step, (start_, optimizer.init(start_)), None, 1500)
    best = jax.nn.log_softmax(start_ + jnp.asarray(weights) @ rewards / beta)
    np.testing.assert_allclose(jax.nn.log_softmax(z), best, atol=1e-2)


SCORED = """
def loss(config):
    return grpo()

def experience(config, ensemble):
    return chain(score(ensemble), mean, group_relative())

def reward(prompts, completions, ensemble):
    return [float(x if isinstance(x, float) else sum(x)) for x in ensemble]

def metrics(prompts, completions, reference, ensemble, logprobs):
    gaps = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(reference, logprobs, strict=True)]
    each = [own if isinstance(own, list) else [own] for own in ensemble]
    return {"gap": gaps, "several": [isinstance(own, list) for own in ensemble]} | {
        f"member_{k}": [own[k] for own in each] for k in range(len(each[0]))
    }
"""


@pytest.mark.slow
@pytest.mark.parametrize(("K", "rank"), [(1, 2), pytest.param(2, 0, marks=pytest.mark.long)])
def test_reward_functions_are_given_the_reference_and_the_ensemble(K, rank, folders, tmp_path):
    """The functions alone make the run hold the reference; scores are those that the experience has of the same samples."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "sun and", "it", "b c")))
    judges = [str(reward_folder(tmp_path, k)) for k in range(K)]
    given = {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 2, "rollout.max_new_tokens": 6, "log.every": 1}
    given |= {"reward.path": ",".join(judges), "lora.rank": rank, "optimizer.learning_rate": 1e-2, "eval.sample_prompts": 3}
    args = arguments(tmp_path, SCORED, fields(folders, tmp_path, **given))
    run = checked(args)
    assert run.roles["reference"].tree == ("base" if rank else "reference") and "rollout/score/reference" in check_step(run)
    assert main(args) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in logged if "loss" in row]
    for row in trained:
        assert row["metrics/several"] == (K > 1)
        if K > 1:
            np.testing.assert_allclose(
                [row[f"metrics/member_{k}"] for k in range(K)], [row[f"score/member_{k}"] for k in range(K)], atol=1e-5
            )
        else:
            np.testing.assert_allclose(row["metrics/member_0"], row["reward"], atol=1e-5)
    assert trained[0]["metrics/gap"] < 1e-4 < trained[1]["metrics/gap"]  # the reference stands still
    assert {"eval/kl", "eval/metrics/gap"} <= {name for row in logged for name in row}


ASKING = """
def loss(config):
    return dpo()

def experience(config, reference):
    return chain(logps("ref_logps", reference))

def metrics(prompts, completions, reference):
    return {"mean": [sum(own) for own in reference]}
"""
COLUMN = ONLINE.replace("completions)", "completions, reference)")
MOVING = """
def averages(config):
    return {"reference": ema(0.9)}
"""


def test_a_function_holds_the_reference_that_a_cache_would_replace(folders, tmp_path):
    given = {"reference.cache": tmp_path / "cache", "eval.top_p": 0.9}  # such samples are not compared with the reference
    held = lambda **more: checked(arguments(tmp_path, ASKING, fields(folders, tmp_path, **given, **more))).roles["reference"].tree
    assert held(**{"eval.samples": 2}) == "reference" and held() == "stored_ref_logps"


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (ASKING.replace("reference):\n    return {", "ensemble):\n    return {"), {}, "'reward.path' is empty; set --config.reward.path="),
        (ASKING + MOVING, {}, "the average 'reference' changes it during training; let experience"),
        (
            COLUMN,
            {"reference": "x"},
            "asks for 'reference', which is ambiguous: .* one of the run's models, and data.train has a column of that name",
        ),
    ],
    ids=["no reward model", "a moving reference", "a column of that name"],
)
def test_models_that_functions_cannot_have_are_refused(source, row, message, folders, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | row) + "\n")
    given = {"data.train": tmp_path / "rows.jsonl", "eval.samples": 2}
    given |= {"data.kind": "prompt", "rollout.samples": 2} if source == COLUMN else {}
    with pytest.raises(ValueError, match=message):
        checked(arguments(tmp_path, source, fields(folders, tmp_path, **given)))


def test_a_model_that_no_function_asks_for_is_refused_and_a_column_of_its_name(folders, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "helpful": 1}) + "\n")
    online = {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 2, "models.helpful.path": folders[2]}
    with pytest.raises(
        ValueError, match=r"'models\.helpful\.path' is set and nothing asks for that model; .* or reward\(..\) ask for helpful"
    ):
        checked(arguments(tmp_path, ONLINE, fields(folders, tmp_path, **online)))
    asking = ONLINE.replace("completions):", "completions, helpful):")
    with pytest.raises(
        ValueError,
        match=r"asks for 'helpful', which is ambiguous: a model of that name is set by models\.helpful\.path, and data\.train has a",
    ):
        checked(arguments(tmp_path, asking, fields(folders, tmp_path, **online)))


@pytest.mark.slow
@pytest.mark.parametrize("refill", [pytest.param(0, marks=pytest.mark.long), 2])
def test_programs_are_called_with_the_shapes_that_are_planned(refill, folders, tmp_path):
    """All that an online run calls is in the table, refills and a speaker included; nothing is compiled after the first rollout."""
    called = {}

    def recorded(name, program):
        def call(*args):
            kinds = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
            called.setdefault(name, []).append(kinds(args) == kinds(program.arguments))
            return program.call(*args)

        return call

    changes = {"models.gold.path": folders[2], "eval.sample_prompts": 3, "eval.max_new_tokens": 5, "steps": 3, "log.every": 1}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "sun and", "it", "b c")))
    changes |= {"data.train": tmp_path / "p.jsonl", "data.kind": "prompt", "rollout.samples": 4, "rollout.max_new_tokens": 6}
    changes |= {"rollout.refill": refill, "models.helpful.path": folders[2], "batch_size": 16}
    some = "[float(bool({*text} & {*'aeiou'})) for text in completions]"  # alike in some groups: a refill is of fewer than a rollout
    source = ONLINE.replace("completions)", "completions, helpful)").replace("[float(len(text)) for text in completions]", some)
    if refill:
        source = source.replace("grpo()", "importance_weighted(grpo())") + STEERED
        changes |= {"models.margin.path": folders[1]}
    run = checked(arguments(tmp_path, source, fields(folders, tmp_path, **changes)))
    started = start(run)
    for generator, name in ((run.samplers[name], name) for name in ("rollout", "eval")):
        for part in ("lay", "prefill", "decode"):
            setattr(generator, f"_{part}", recorded(f"{name}/{part}", started.programs[f"{name}/{part}"]))
    table = {name: program._replace(call=recorded(name, program)) for name, program in started.programs.items()}
    fit(started._replace(programs=table))
    assert {*called} == {*table} - {"fingerprint", "begin"}  # which start() has called
    assert all(all(same) for same in called.values()), called
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "compilations" in row]
    assert [row["compilations"] > 0 for row in trained] == [True, False, False]
    assert not refill or all(row["signal_rate"] < 1 <= row["refill/times"] for row in trained)


def test_each_run_of_a_process_keeps_its_own_day(folders, tmp_path):
    """Templates of the policy and of a reward model tell the day; a second run begins on another, and the first reads samples later."""
    told = "{{ strftime_now('%d %b') }}" + THEIRS
    policy = tiny.folder(tmp_path / "policy", vocab_size=288, eos_token_id=3)
    gold = shutil.copytree(folders[2], tmp_path / "gold")
    for folder in (policy, gold):
        tiny.byte_tokenizer(told).save_pretrained(folder)
    (policy / "generation_config.json").unlink()
    asked = ({"prompt": [{"role": "user", "content": f"is it {i}?"}]} for i in range(8))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    own = {"model.path": policy, "models.gold.path": gold, "data.train": tmp_path / "p.jsonl", "data.kind": "prompt"}
    own |= {"rollout.samples": 2, "rollout.max_new_tokens": 6, "data.max_length": 100}
    made = {}
    for name, day in (("first", "2026-01-02"), ("second", "2025-12-31")):
        kept = tmp_path / name / "checkpoints" / "1" / "about" / "metadata"
        kept.parent.mkdir(parents=True)
        kept.write_text(json.dumps({"day": day}))
        made[name] = checked(arguments(tmp_path, ONLINE, fields(folders, tmp_path, **own, workdir=tmp_path / name)))
    for name, day, said in (("first", "2026-01-02", "02 Jan"), ("second", "2025-12-31", "31 Dec")):
        run, examples = made[name], made[name].data.train.examples
        assert str(run.day) == day and said in examples.prompts[0]
        assert said in chat.encode_prompt(*examples.asked(0), run.words.tokenizer)[0]
        judge = run.judges["gold"]
        (code,) = judging.tokens_of([judging.asked(examples, 0, "yes")], judge)
        assert said in judge.tokenizer.decode(code.prompt)
