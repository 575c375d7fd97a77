"""The laboratory on Hugging Face folders: what it measures, through the command, and what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny

from alignax import cli, config
from alignax.config import BadInput
from alignax.mesh import make_mesh
from alignax.models import hf, parameters
from alignax.overopt import folders

FILE = str(runs.REPO / "experiments" / "overoptimization_tokens.py")
REWARD = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}


def reward_model(path: Path, seed: int, **changes) -> Path:
    """A folder of random weights, its scores far enough apart."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tiny.CONFIG | REWARD | changes))
    tiny.tokenizer().save_pretrained(path)
    source = hf.open_folder(path)
    hf.export(parameters.init_params(source.config, make_mesh({"fsdp": -1}), jax.random.key(seed)), source, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A policy, three reward models of which one is gold, and prompts."""
    path = tmp_path_factory.mktemp("folders")
    tiny.folder(path / "policy")
    for i, name in enumerate(("a", "b", "gold")):
        reward_model(path / name, i)
    rows = [{"prompt": f"Is it {word}?"} for word in ("old", "new", "red", "far")]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields(place: Path, **changes) -> dict[str, object]:
    own = {
        "policy": place / "policy",
        "proxies": f"{place / 'a'},{place / 'b'}",
        "gold": place / "gold",
        "prompts": place / "prompts.jsonl",
    }
    sizes = {"folders.max_new_tokens": 5, "folders.batch_size": 6, "world.prompts": 2, "world.responses": 8, "repeats": 2}
    sizes |= {"best_of_n.n": "(1,2,4,8)", "mesh.data": -1, "mesh.fsdp": 1}
    return {f"folders.{name}": value for name, value in own.items()} | sizes | changes


def arguments(place: Path, workdir: Path, **changes) -> list[str]:
    given = fields(place, workdir=workdir, **changes)
    return ["overopt", "--config", FILE, *(f"--config.{name}={value}" for name, value in given.items())]


def settings(place: Path, **changes):
    return config.load_experiment(FILE, [f"{name}={value}" for name, value in fields(place, **changes).items()]).config


@pytest.fixture(scope="module")
def responses(place):
    """The policy's responses to the prompts of two seeds."""
    own = settings(place)
    return folders.sampled(own, make_mesh(own.mesh), [0, 1])


@pytest.fixture
def answered(monkeypatch, responses):
    """Replaces sampling by stored responses, so that no test samples again."""
    monkeypatch.setattr(folders, "sampled", lambda *args: responses)


@pytest.mark.slow
def test_the_command_measures_folders(place, tmp_path, capsys):
    assert cli.main(arguments(place, tmp_path / "run", repeats=1)) == 0
    said = capsys.readouterr()
    assert "16 responses: " in said.err and "cut at 5 tokens" in said.err
    (m,) = json.loads((tmp_path / "run" / "results.json").read_text())["measurements"]
    assert (m["arm"], m["members"], m["prompts"], m["responses"]) == ("folders", 2, 2, 8)
    figures = {file.name for file in (tmp_path / "run" / "figures").iterdir()}
    assert "best-of-n-folders-length.png" in figures and "best-of-n-folders-calibration.png" in figures
    samples = m["samples"]
    assert {row["prompt"] for row in samples} == {"Is it old?", "Is it new?"} and all(len(row["members"]) == 2 for row in samples)


def test_prompts_are_read_by_the_columns_of_the_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "hi", "rules": "Be brief."}))
    own = settings(tmp_path, **{"folders.prompts": tmp_path / "rows.jsonl"})
    tokenizer = tiny.byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    own.data.columns.prompt, own.data.columns.system = "question", "rules"
    (prompt,) = folders.read_prompts(own, tokenizer, 1)
    assert prompt.text == "system: Be brief.\nuser: hi\n" and prompt.given[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.slow
def test_a_score_is_that_of_the_text_as_training_has_it(place, answered):
    one, other = folders.score(settings(place), [0, 1])
    assert one.lengths is not None
    assert one.gold.shape == (2, 8) and one.members.shape == (2, 2, 8) and one.lengths.min() >= 1 and one.lengths.max() <= 5
    assert abs(one.gold.mean()) < 1e-5 and one.gold.std() == pytest.approx(1, abs=1e-5)
    assert {other.show(p, 0)[0] for p in range(2)} == {"Is it red?", "Is it far?"}, "each seed has prompts of its own"
    prompt, response = one.show(1, 3)
    tokens = tiny.tokenizer()(prompt + response)["input_ids"] + [2]
    source = hf.open_folder(place / "b")
    mesh = make_mesh({}, jax.devices()[:1])
    apply = folders.rewards.ensemble_model(source.config, jax.tree.map(lambda x: x[None], hf.load_params(source, mesh)), mesh)
    mask = np.ones((1, 1, len(tokens)), bool)
    batch = {"tokens": np.array(tokens)[None, None], "mask": mask, "completion_mask": mask}
    out = apply.apply(apply.params, batch).scores
    assert out is not None and one.members[1, 1, 3] == pytest.approx(float(out[0, 0, 0]), abs=1e-4)
    better = one.gold[:, 0] > one.gold[:, 1]
    first = one.members[0, :, 0] - one.members[0, :, 1]
    assert one.margins.shape == (2, 8)
    np.testing.assert_allclose(one.margins[0, [0, 4]], np.where(better, first, -first), atol=1e-5)


@pytest.mark.slow
def test_one_proxy_is_allowed_and_said(place, answered, capsys):
    alone = settings(place, **{"folders.proxies": place / "a"})
    assert next(folders.score(alone, [0, 1])).members.shape == (1, 2, 8)
    assert "one proxy: mean, median, WCO and UWO all equal the score of that model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folders.gold": ""}, "'folders.gold' is empty; the laboratory on folders needs policy, proxies, gold and prompts"),
        ({"best_of_n.n": "(1,16)"}, "best of n = 16 of 8 responses; lower best_of_n.n, or raise world.responses to 16"),
        ({"world.prompts": 3}, "has 4 prompts, but 6 are needed; lower world.prompts or repeats"),
        ({"folders.max_new_tokens": 200}, "exceed the model's 128 positions"),
        ({"folders.proxies": "{a},{a}"}, "name one folder twice; give each folder once"),
        ({"folders.proxies": "{a},{policy}"}, "is not a reward model"),
        ({"folders.gold": "{two}"}, "gives 2 scores per response"),
        ({"folders.proxies": "{a},{two_layers}"}, "has another shape or vocabulary"),
        ({"folders.policy": "{a}"}, "is a reward model, which gives scores and no text"),
    ],
)
def test_bad_input_is_one_line(changes, message, place, more, tmp_path, capsys):
    paths = {path.name: path for path in (*place.iterdir(), *more.iterdir())}
    changes = {name: value.format(**paths) if isinstance(value, str) else value for name, value in changes.items()}
    assert cli.main(arguments(place, tmp_path / "run", **changes)) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].startswith("alignax: error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folders.gold": "constant"}, "for every response of the initial policy; it must vary"),
        ({"folders.proxies": "broken"}, "broken: .* scores are not finite, the first of member 0 for row 0"),
    ],
)
def test_models_that_measure_nothing_are_named(changes, message, place, more, answered):
    own = settings(place, **{name: more / value for name, value in changes.items()})
    with pytest.raises(BadInput, match=message):
        next(folders.score(own, [0, 1]))


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    """Reward models that cannot be used."""
    from safetensors.numpy import load_file, save_file

    path = tmp_path_factory.mktemp("more")
    reward_model(path / "two", 3, num_labels=2, id2label={"0": "A", "1": "B"})
    reward_model(path / "two_layers", 3, num_hidden_layers=1)
    for name, weight in (("constant", 0.0), ("broken", 3e38)):
        file = reward_model(path / name, 4) / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"score.weight": np.full_like(tensors["score.weight"], weight)}, file, metadata={"format": "pt"})
    return path
