"""Samplers outside of alignax: `sampler(..)` of an experiment samples the rollouts; what it gives is checked, weighed and logged."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from test_run_online import arguments, checked, rows

from alignax import mesh as meshes
from alignax.bench.measure import measured as benched
from alignax.bench.measure import sampled_flops
from alignax.cli import commands, main
from alignax.compiled import COUNTED
from alignax.config import load_experiment
from alignax.generate import LENGTH, STOP_ID, STOP_STRING, Completions, Sampling, Shape, Stops, speaker
from alignax.host.workers import Abandoned
from alignax.models import hf, lora, parameters, peft
from alignax.run import external
from alignax.run.checkpoint import Checkpoints
from alignax.run.external import External, SamplerFailed
from alignax.run.loop import fit
from alignax.run.online import measured
from alignax.run.prepare import Run, prepare
from alignax.run.programs import programs
from alignax.run.sampling import told
from alignax.run.start import check_step, start
from alignax.run.state import abstract_state

ENDS, NEW = (2, 5), 4
GOOD = Completions(  # two prompts, two samples of each, at most three tokens
    np.array([[[7, 8, 2], [9, 0, 0]], [[5, 0, 0], [6, 6, 6]]]),
    np.array([[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [1, 1, 1]]], bool),
    -np.array([[[0.5, 1.0, 0.0], [2.0, 0, 0]], [[0.25, 0, 0], [1.0, 2.0, 3.0]]]),
    np.array([[STOP_ID, LENGTH], [STOP_ID, LENGTH]]),
)


def outside(sample=lambda *_: GOOD, stops: Stops | None = None) -> External:
    """A sampler outside of alignax, of a model of 96 tokens whose tokenizer lacks 90 to 92."""
    policy, shape = speaker(tiny.MODEL)._replace(exact=False), Shape(8, NEW, 4, 4, 1)
    return External(Path("mine.py"), sample, policy, shape, Sampling(), stops, frozenset(ENDS), ((90, 93),))


def called(sample, look=lambda: None, stops=None):
    return outside(sample, stops)({}, [[1, 3], [1, 4]], jax.random.key(3), 2, look)


def put(name, at, value):
    """The good completions with another value at one place."""
    x = np.array(getattr(GOOD, name), dtype=object if name == "ended" else None)
    x[at] = value
    return GOOD._replace(**{name: x})


def test_completions_are_padded_to_the_rollouts_size():
    out = called(lambda *_: GOOD)
    assert out.tokens.shape == out.mask.shape == out.logps.shape == out.drawn.shape == (2, 2, NEW) and out.tokens.dtype == np.int32
    assert [[x.tolist() for x in group] for group in out.rows()] == [[[7, 8, 2], [9]], [[5], [6, 6, 6]]]
    assert out.drawn_rows()[1][1].tolist() == [-1.0, -2.0, -3.0] and out.logps.dtype == np.float32
    assert [group.tolist() for group in out.answers()[0]] == [[7, 8], [9]] and not out.exact
    dirty = GOOD._replace(tokens=np.where(GOOD.mask, GOOD.tokens, 77), logps=np.where(GOOD.mask, GOOD.logps, np.nan))
    again = called(lambda *_: dirty)  # what lies behind the end of a completion does not count
    for x, y in zip(out[:4], again[:4], strict=True):
        np.testing.assert_array_equal(x, y)
    other = called(lambda *_: GOOD._replace(drawn=GOOD.logps / 2))
    assert other.drawn_rows()[0][1].tolist() == [-1.0] and other.logps[0, 1, 0] == -2.0
    called(lambda *_: put("ended", (0, 1), STOP_STRING), stops=Stops(tiny.tokenizer(), ("a",)))


BAD = {
    "nothing": (None, "its object returns None; let it return alignax.generate.Completions"),
    "a list": ([[7]], r"its object returns \[\[7\]\]; let it return"),
    "ragged lists": (GOOD._replace(tokens=[[[7], [9, 9]], [[5], [6]]]), "its object returns no arrays .*; let all completions be as long"),
    "too few prompts": (Completions(*(x[:1] for x in GOOD[:4])), r"tokens are int64 \[1, 2, 3\]; let them be integers \[2, 2, 3\], for 2"),
    "too few samples": (
        Completions(*(x[:, :1] for x in GOOD[:4])),
        r"let them be integers \[2, 2, 3\], for 2 prompts and 2 samples of each",
    ),
    "a flat array": (GOOD._replace(tokens=GOOD.tokens[..., 0]), r"tokens are int64 \[2, 2\]; let them be integers \[2, 2, 4\]"),
    "floats for tokens": (GOOD._replace(tokens=GOOD.tokens * 1.0), "tokens are float64 .*; let them be integers"),
    "a mask of numbers": (GOOD._replace(mask=GOOD.mask * 1), "mask are int64 .*; let them be booleans"),
    "a shorter mask": (GOOD._replace(mask=GOOD.mask[..., :2]), r"mask are bool \[2, 2, 2\]; let them be booleans \[2, 2, 3\]"),
    "whole log-probs": (GOOD._replace(logps=GOOD.tokens * -1), "logps are int64 .*; let them be floats"),
    "log-probs of another size": (GOOD._replace(drawn=GOOD.logps[:1]), r"drawn are float64 \[1, 2, 3\]"),
    "one reason": (GOOD._replace(ended=np.array(LENGTH)), r"ended are <U6 \[\]; let them be reasons \[2, 2\]"),
    "too long": (
        GOOD._replace(**{name: np.zeros((2, 2, 5), getattr(GOOD, name).dtype) for name in ("tokens", "mask", "logps")}),
        "completions have 5 tokens; let them have 1 to 4, which is rollout.max_new_tokens",
    ),
    "a gap": (put("mask", (1, 1, 1), False), "sample 1 of prompt 1 has a mask with a gap; let it be True from the first token"),
    "no token": (put("mask", (0, 1, 0), False), "sample 1 of prompt 0 has no token; let it have at least one, a stop id"),
    "a token too large": (put("tokens", (1, 1, 2), 96), "sample 1 of prompt 1 has the token 96; the policy has 96 tokens, from 0 on"),
    "a negative token": (put("tokens", (0, 0, 0), -1), "sample 0 of prompt 0 has the token -1; the policy has 96"),
    "a token without text": (put("tokens", (0, 0, 1), 92), "has the token 92, which the tokenizer lacks; let what samples leave out"),
    "a reason of its own": (
        put("ended", (1, 0), "stop"),
        "sample 0 of prompt 1 ended by 'stop'; let it be one of 'stop id', 'stop string'",
    ),
    "no reason": (put("ended", (1, 0), None), "sample 0 of prompt 1 ended by None; let it be one of"),
    "a stop string": (put("ended", (0, 1), STOP_STRING), "ended by 'stop string', and rollout.stop is empty; let it be 'length'"),
    "an end that is none": (
        put("ended", (1, 1), STOP_ID),
        "has 6 as token 3 of 3, and ended by 'stop id'; let it end with the first of the",
    ),
    "an end that is not told": (put("ended", (1, 0), LENGTH), "has 5 as token 1 of 1, and ended by 'length'; let it end with .* ids 2, 5"),
    "more behind an end": (put("tokens", (1, 1, 0), 2), "sample 1 of prompt 1 has 2 as token 1 of 3, and ended by 'length'"),
    "a probability above 1": (put("logps", (1, 1, 1), 0.5), "sample 1 of prompt 1 has 0.5 in logps; let them be the logarithms of prob"),
    "no number": (put("logps", (0, 0, 2), np.nan), "sample 0 of prompt 0 has nan in logps"),
    "no probability": (GOOD._replace(drawn=np.where(GOOD.tokens == 9, -np.inf, GOOD.logps)), "sample 1 of prompt 0 has -inf in drawn"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_completions_end_the_run_in_one_line(name):
    made, message = BAD[name]
    with pytest.raises(SamplerFailed, match=message) as e:
        called(lambda *_: made)
    assert str(e.value).startswith("sampler() of mine.py: ") and "\n" not in str(e.value)


def test_the_object_gets_what_it_samples_from():
    """The key is one of this process, which it may use alone; a signal is looked for before and after."""
    seen, looks = [], []

    def sample(*given):
        seen.extend([*given, len(looks)])
        return GOOD

    called(sample, lambda: looks.append(1))
    params, prompts, key, n, before = seen
    assert (params, prompts, n, before, len(looks)) == ({}, [[1, 3], [1, 4]], 2, 1, 2)
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))
    calls = []

    def look():
        raise Abandoned(15)

    with pytest.raises(Abandoned):
        called(lambda *given: calls.append(given), look)
    assert not calls


def test_every_process_gets_the_completions_of_process_0(monkeypatch):
    """The others give none, and get the arrays that process 0 sends, bit for bit."""
    sent = []
    monkeypatch.setattr(external.jax, "process_count", lambda: 2)
    monkeypatch.setattr(external.multihost_utils, "broadcast_one_to_all", lambda own: (sent.append(own), sent[0])[1])
    first = called(lambda *_: GOOD._replace(drawn=GOOD.logps / 3))
    monkeypatch.setattr(external, "is_main", lambda: False)
    second = called(lambda *_: None)
    assert [x.shape for x in jax.tree.leaves(sent[0])] == [x.shape for x in jax.tree.leaves(sent[1])]
    assert [x.dtype for x in jax.tree.leaves(sent[0])] == [x.dtype for x in jax.tree.leaves(sent[1])]
    for x, y in zip((*first[:4], first.drawn), (*second[:4], second.drawn), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_a_failure_of_any_process_is_one_of_all(monkeypatch):
    class Link:
        def gather(self, text):
            return ["", "sampler() of mine.py, line 3: no disk"]

    monkeypatch.setattr(external, "link", Link)
    with pytest.raises(SamplerFailed, match="line 3: no disk"):
        called(lambda *_: GOOD)


def test_an_external_sampler_has_a_gap_beside_its_kl():
    batch = {"completion_mask": jnp.ones((1, 2, 2), bool), "sampled_logps": jnp.array([[[-1.0, -1.0], [-2.0, -1.0]]])}
    batch |= {"old_logps": jnp.array([[[-1.0, -1.5], [-2.0, -2.0]]])}
    found = measured(batch, True, (), True)
    assert float(found["sampler_gap"]) == 1.0 and float(found["sampler_kl"]) == pytest.approx(0.75)
    assert "sampler_gap" not in measured(batch, True) and "sampler_kl" not in measured(batch)


# Runs -----------------------------------------------------------------------------------------------------------------------

ONLINE = """
def loss(config):
    return importance_weighted(grpo())

def experience(config):
    return group_relative()

def reward(prompts, completions):
    return [float(len(text) % 5) for text in completions]
"""
OWN = """
import jax
from alignax import generate
from alignax.models import hf

def sampler(config, tokenizer, ends):
    source = hf.with_vocabulary(open_folder(config.model.path), tokenizer)
    policy = generate.policy_config(source.config, config.rollout.temperature, source.config.unused_tokens)
    read = generate.speaker(policy, mesh=make_mesh({"fsdp": -1}, jax.devices()[:COUNT]), name="policy")
    sampling = generate.policy_sampling(config.rollout.temperature, config.rollout.top_p)
    return generate.sampler(read, 48, LONGEST, config.rollout.max_new_tokens, sampling, ends=ends)
"""
FAILS = """
def sampler(config):
    calls = []
    def sample(params, prompts, key, n):
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("the server is gone")
        return OTHER(params, prompts, key, n)
    OTHER = own(config)
    return sample
"""


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("external")
    texts = [{"prompt": text} for text in ("the sun", "a moon", "the sea of", "it", "cats and", "b c", "d", "the end of")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(tiny.CONFIG))
    own = {
        "model.path": folder / "model", "model.init": "random",
        "data.train": folder / "prompts.jsonl", "data.kind": "prompt", "batch_size": 8,
        "steps": 4, "rollout.samples": 3, "rollout.max_new_tokens": 6, "rollout.minibatches": 2, "model.remat": "none", "eval.samples": 0,
        "optimizer.learning_rate": 1e-2, "log.tensorboard": False, "export.final": False, "checkpoint.every": 2, "log.every": 1,
    }  # fmt: skip
    return {name: str(value) for name, value in own.items()}


def given(fields, tmp_path, **more):
    return fields | {"workdir": str(tmp_path / "run")} | {name.replace("__", "."): str(value) for name, value in more.items()}


PLAIN = "\ndef sampler(config):\n    return lambda params, prompts, key, n: None\n"


def test_a_run_compiles_nothing_for_a_sampler_outside(fields, tmp_path):
    """Its evaluations keep our own sampler, and its weights."""
    run = checked(arguments(tmp_path, ONLINE + PLAIN, given(fields, tmp_path, eval__sample_prompts=4)))
    names = programs(run).keys()
    assert "eval/decode" in names and not any(name.startswith("rollout/") for name in names)
    assert "sampled by sampler() of" in told("rollout", run.samplers["rollout"], run.roles, run.mesh)
    assert run.samplers["eval"].speaker.exact and run.samplers["rollout"].programs({}) == {}
    assert sampled_flops(run, {}) == 0.0
    with pytest.raises(ValueError, match=r"sampler\(\) of .* samples the rollouts, outside of alignax; leave the word generate out"):
        benched(run.experiment, sampling=True)


THREE, FEW = "\ndef sampler(config):\n    return 3\n", "\ndef sampler():\n    return lambda params, prompts: 0\n"
WRONG, ABSENT = "\ndef sampler(config, tokeniser):\n    return 0\n", "\ndef sampler(config):\n    return config.absent\n"
REFUSED = {
    "three": (THREE, {}, r"what sampler\(\) of .* returns is 3; it must be a function of \(params, prompts, key, n\)"),
    "too few": (FEW, {}, r"takes \(params, prompts\); it is called with \(params, prompts, key, n\)"),
    "a wrong parameter": (WRONG, {}, "asks for 'tokeniser'; the nearest is 'tokenizer'; a parameter must be one of config, tokenizer, "),
    "a misspelling": (PLAIN.replace("sampler", "samplr"), {}, r"has a function samplr\(\), which nothing calls; the nearest is 'sampler'"),
    "no function": ("\nsampler = 3\n", {}, "sampler of .* is 3; it must be a function"),
    "an error": (ABSENT, {}, "experiment.py, line .*absent"),
    "int8": (PLAIN, {"rollout__int8": True}, r"rollout.int8 is True, and sampler\(\) of .*; leave rollout.int8=False"),
    "slots": (PLAIN, {"rollout__slots": 64}, "rollout.slots is 64, and sampler"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_can_sample_with_is_refused(name, fields, tmp_path):
    source, more, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        checked(arguments(tmp_path, ONLINE + source, given(fields, tmp_path, **more)))


def test_a_run_without_rollouts_needs_no_sampler(fields, tmp_path):
    offline = {"data__train": tiny.pairs(tmp_path / "pairs.jsonl", 8), "data__kind": "preference", "rollout__samples": 0}
    with pytest.raises(ValueError, match=r"sampler\(\) of .* is for samples, but rollout.samples is 0; set it, for example to 8"):
        checked(arguments(tmp_path, "\ndef loss(config):\n    return sft()\n" + PLAIN, given(fields, tmp_path, **offline)))


def test_a_loss_that_takes_the_samples_for_the_policys_is_refused(fields, tmp_path):
    run = checked(arguments(tmp_path, ONLINE.replace("importance_weighted(grpo())", "grpo()") + PLAIN, given(fields, tmp_path)))
    with pytest.raises(ValueError, match=r"speaker\(..\), sampler\(..\), or the average.*correct the loss, as in importance_weighted"):
        check_step(run)


def test_our_own_sampler_that_a_file_imports_is_no_hook(tmp_path):
    file, body = tmp_path / "mine.py", "\ndef get_config():\n    return default_config()\n\ndef loss(config):\n    return sft()\n"
    file.write_text("from alignax import *\nfrom alignax.generate import *\n" + body)
    assert load_experiment(file).sampler is None
    file.write_text(file.read_text() + PLAIN)
    assert load_experiment(file).sampler is not None


def fitted(args, count: int) -> Run:
    """A run to its end on some of the devices."""
    mesh = meshes.make_mesh({"fsdp": -1}, jax.devices()[:count])
    run = prepare(load_experiment(args[2], [a.removeprefix("--config.") for a in args[3:]]), mesh)
    fit(start(run))
    return run


def last(run: Run) -> dict:
    """The parameters that a run ended with."""
    checkpoints = Checkpoints(run.workdir)
    state = checkpoints.restore(checkpoints.latest(), abstract_state(run))
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params)


def own(more, tmp_path, count: int) -> str:
    """The source of a sampler outside that is our own generator, of the run's shape."""
    longest = int(checked(arguments(tmp_path, ONLINE, more)).data.train.examples.prompt_lengths.max())
    return OWN.replace("LONGEST", str(longest)).replace("COUNT", str(count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ahead", "count"), [("false", 1), pytest.param("true", 1, marks=pytest.mark.long), pytest.param("false", 8, marks=pytest.mark.long)]
)
def test_a_sampler_outside_that_is_our_own_gives_the_same_parameters(ahead, count, fields, tmp_path):
    more = given(fields, tmp_path, rollout__ahead=ahead)
    source = own(more, tmp_path, count)
    ours = fitted(arguments(tmp_path, ONLINE, more | {"workdir": str(tmp_path / "own")}), count)
    theirs = fitted(arguments(tmp_path, ONLINE + source, more), count)
    jax.tree.map(np.testing.assert_array_equal, last(ours), last(theirs))
    found, others = ([row for row in rows(run.workdir) if "loss" in row] for run in (theirs, ours))
    assert len(found) == 2 and [row["loss"] for row in found] == [row["loss"] for row in others]
    assert all("sampler_kl" in row and "sampler_gap" in row for row in found) and found[0]["sampler_gap"] < 1e-5
    assert found[1]["sampler_gap"] > 1e-3 if ahead == "true" else found[1]["sampler_gap"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("times", runs.long_but([1, 2], 1))
def test_what_was_learnt_before_a_sampler_fails_is_saved(times, fields, tmp_path, capsys):
    """The same command goes on from there, here up to the sampler's next failure."""
    more = given(fields, tmp_path, steps=6)
    source = own(more, tmp_path, 1).replace("def sampler(", "def own(")
    fails = FAILS.replace("config):", "config, tokenizer, ends):").replace("own(config)", "own(config, tokenizer, ends)")
    args = arguments(tmp_path, ONLINE + source + fails, more)
    for done in ([2], [2, 4])[:times]:
        with pytest.raises(
            SamplerFailed, match=rf"^sampler\(\) of {tmp_path}/experiment.py, line \d+: ConnectionError: the server is gone$"
        ):
            fitted(args, 1)
        assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == done
    said = capsys.readouterr().err
    assert f"saved after step {2 * times}. The same command goes on from there" in said
    assert "after a service or module that the sampler uses is repaired. If experiment.py changes, it is another run" in said


TOLD = """
def sampler(config, save):
    return lambda params, folder, key, n: save(params, folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_save_writes_the_policy_that_the_object_gets(rank, fields, tmp_path):
    """With adapters it is the merged model; what another has written is left alone, and nothing is compiled at the second call."""
    model = tiny.folder(tmp_path / "model")
    more = given(fields, tmp_path, model__path=model, model__init="pretrained", lora__rank=rank)
    run = checked(arguments(tmp_path, ONLINE + TOLD, more))
    save = lambda params, folder: run.samplers["rollout"].sample(params, folder, None, 1)
    source, params = run.policy.source, hf.load_params(run.policy.source, run.mesh)
    changed = jax.tree.map(lambda x: 0.5 * x, params)
    if rank:
        adapters = parameters.init_adapters(source.config, run.policy.lora, run.mesh, params, jax.random.key(0))
        adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.1), adapters)
        changed = lora.join(params, adapters)
    save(changed, tmp_path / "served")
    before = COUNTED.programs
    save(changed, tmp_path / "served")
    assert COUNTED.programs == before
    wanted = peft.merged(source, run.policy.lora, adapters, run.mesh) if rank else changed
    found = hf.load_params(hf.open_folder(tmp_path / "served"), run.mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), found, wanted)
    with pytest.raises(ValueError, match="something else wrote it; choose another folder"):
        save(changed, model)


SHARED = """
import jax, numpy as np
from alignax.generate import LENGTH, Completions

def sampler(config, save):
    def sample(params, prompts, key, n):
        if jax.process_index() == FAILS:
            raise ConnectionError("the server is gone")
        save(params, config.workdir + "_served")
        if jax.process_index():
            return None
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        tokens = rng.integers(10, 90, (len(prompts), n, 3))
        return Completions(tokens, tokens > 0, np.full(tokens.shape, -4.5), np.full(tokens.shape[:2], LENGTH))
    return sample
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("fails", [2, 1, 0])
def test_two_processes_train_on_the_completions_of_process_0(fails, fields, tmp_path):
    """Both call the object, which writes the weights of both; a failure of either ends both in one line."""
    args = arguments(tmp_path, ONLINE + SHARED.replace("FAILS", str(fails)), given(fields, tmp_path))
    code = 0 if fails == 2 else 1
    out = [runs.finish(process, code) for process in runs.begin_two([args] * 2)]
    if fails < 2:
        assert any("ConnectionError: the server is gone" in text for text in out) and not any("Traceback" in text for text in out)
        return
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in found] == [2, 4] and all(row["completion_length"] == 3 and row["sampler_gap"] > 0 for row in found)
    assert hf.open_folder(tmp_path / "run_served").config.vocab_size == 96


def test_the_command_ends_in_one_line(monkeypatch, capsys):
    def train(*_):
        raise SamplerFailed("sampler() of mine.py, line 3: ConnectionError: the server is gone")

    monkeypatch.setattr(commands, "train", train)
    assert main(["train", "--config", "mine.py"]) == 1
    assert capsys.readouterr().err == "alignax: stopped: sampler() of mine.py, line 3: ConnectionError: the server is gone\n"
