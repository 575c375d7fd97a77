"""Every parser of foreign files, given good files with something wrong in them: it takes them whole, or says clearly what it refuses.

Examples are derandomised, so a failure comes back; a bug that was found here has a small test of its own beside its module.
"""

import ast
import bz2
import copy
import csv
import functools
import gzip
import io
import json
import lzma
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignax import Model, chain, cli, config
from alignax.config.blame import blaming, check_call, explained
from alignax.data import Examples, Prompted, formats, mixture, read_rows
from alignax.data.kinds import prompted_rows
from alignax.data.rows import Bad
from alignax.data.shapes import shaped
from alignax.data.tokens import tokenize
from alignax.experience import advance
from alignax.losses import at_step
from alignax.mesh import make_mesh
from alignax.models import families, hf, parameters, peft, rope
from alignax.models.fields import FIELDS as MODEL_FIELDS
from alignax.models.lora import Lora
from alignax.models.tokenizers import load_tokenizer
from alignax.run import log as metrics
from alignax.run import reference_cache as reference
from alignax.run.checkpoint import Checkpoints
from alignax.run.checks import check_objective
from alignax.run.prepare import prepare
from alignax.run.start import check_step
from alignax.text import short
from alignax.train import init_state
from alignax.types import Outputs

ONE = make_mesh({}, jax.devices()[:1])


def fuzz(examples: int) -> Any:
    calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(derandomize=True, deadline=None, database=None, max_examples=examples, suppress_health_check=calm)


# What goes wrong ----------------------------------------------------------------------------------------------------------

DEEP: Any = functools.reduce(lambda inner, _: [inner], range(80), "deep")
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 7, 0.0, -0.5, 1.5, 2**31, -(2**63), 10**400, 1e300, math.inf, -math.inf, math.nan]
        + ["", " ", "x", "1", "nan", "null", "\0", "\ud800", "ä\u2028", "../x", "auto", "x" * 5000]
        + [[], {}, [None], [1, 2], ["x"], [[]], [["a", 1]], {"": None}, {"a": {"b": [1]}}, [{"role": "user"}], DEEP]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths to everything inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, x in inner for place in places(x, (*at, key)))]


@st.composite
def spoiled(draw: Any, good: Any) -> Any:
    """A JSON value of which one or two places hold another value, or are not there, or have another name."""
    top = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(places(top[0])))
        node, key = top, 0
        for step in at:
            node, key = node[key], step
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "repeat"]))
        if how == "drop" and at:
            del node[key]
        elif how == "rename" and isinstance(node, dict):
            node[f"{key}_"] = node.pop(key)
        elif how == "repeat" and isinstance(node, list) and at:
            node.insert(key, node[key])
        else:
            node[key] = copy.deepcopy(draw(VALUES))
    return top[0]


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes that end early, or of which some are others; or brackets without end."""
    if draw(st.integers(0, 30)) == 30:
        return draw(st.sampled_from([b"[", b'{"a": '])) * 50_000
    out = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        if out:
            i = draw(st.integers(0, len(out) - 1))
            out[i : i + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(out[: draw(st.integers(0, len(out)))] if draw(st.booleans()) else out)


REFUSED = object()


def read(call: Callable[[], Any], *names: object) -> Any:
    """The result of the call, or REFUSED after an error of alignax: one line that contains one of the names."""
    try:
        return call()
    except ValueError as error:
        assert type(error) in (ValueError, config.BadInput), repr(error)
        text = str(error)
        assert "\n" not in text and len(text) < 2000, text
        assert any(str(name) in text for name in names), text
        return REFUSED


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Data ---------------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Is it?", "chosen": " yes", "rejected": " no", "gap": 1.5}
PAIRS = [PAIR | {"chosen": f" yes {i}"} for i in range(4)]


def written_csv(delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(PAIR), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return out.getvalue().encode()


def written_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), out)
    return out.getvalue()


def written_arrow() -> bytes:
    import pyarrow

    out, table = io.BytesIO(), pyarrow.Table.from_pylist(PAIRS)
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


LINES = b"".join(dumps(row) + b"\n" for row in PAIRS)
FILES = {
    "a.json": dumps(PAIRS),
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.csv": written_csv(),
    "a.tsv": written_csv("\t"),
    "a.parquet": written_parquet(),
    "a.arrow": written_arrow(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=(pytest.mark.slow, pytest.mark.long))])
def test_damaged_bytes_of_data_files(name, examples, folder):
    path = folder / name

    @fuzz(examples)
    @given(damaged(FILES[name]))
    def check(content):
        path.write_bytes(content)
        are_rows(read(lambda: read_rows(path), path))

    check()


def are_rows(rows: Any) -> None:
    assert rows is REFUSED or (rows and all(isinstance(row, dict) and all(isinstance(k, str) for k in row) for row in rows))


@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_folders_of_save_to_disk(examples, folder):
    import datasets

    path = folder / "saved"
    datasets.Dataset.from_list(PAIRS).save_to_disk(path)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}

    @fuzz(examples)
    @given(st.data())
    def check(data):
        spoil = data.draw(st.sampled_from(sorted(files)))
        good = files[spoil]
        change = damaged(good) if spoil.suffix != ".json" else st.one_of(damaged(good), spoiled(json.loads(good)).map(dumps))
        spoil.write_bytes(data.draw(change))
        try:
            are_rows(read(lambda: read_rows(path), path))
        finally:
            spoil.write_bytes(good)

    check()


@fuzz(30)
@given(
    st.lists(
        st.sampled_from(["a.jsonl", "B.JSONL", "train-00000-of-00001.jsonl", "test/c.ndjson", "d.txt", "README.md", "e/f.csv", ".g.jsonl"])
    )
)
def test_folders_of_files(names):
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        for name in names:
            (Path(where) / name).parent.mkdir(exist_ok=True)
            (Path(where) / name).write_bytes(FILES["a.csv"] if name.endswith("csv") else LINES)
        rows = read(lambda: read_rows(where), where)
        data = {name for name in names if name not in ("README.md", ".g.jsonl", "d.txt")}
        assert rows is REFUSED or ("d.txt" not in names and len(rows) == len(PAIRS) * len(data))
        assert data or rows is REFUSED


@fuzz(150)
@given(spoiled(PAIRS))
def test_other_values_in_json_files(content):
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "a.json"
        path.write_bytes(dumps(content))
        rows = read(lambda: read_rows(path), path)
        assert rows is REFUSED or len(rows) == (len(content) if isinstance(content, list) else 1)


MESSAGES = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": "no"}]
CALL = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}], "content": None}]
KINDS = {
    "preference": PAIRS,
    "sft": [{"messages": [*MESSAGES, *OTHER], "tools": [{"name": "f"}]}] * 2,
    "unpaired": [{"prompt": "Is it?", "completion": " yes", "label": label} for label in (True, "false", 1)],
    "ranked": [{"prompt": "Is it?", "completions": [" yes", " no", f" {i}"]} for i in range(2)],
    "preference of conversations": [{"chosen": MESSAGES, "rejected": OTHER, "tools": "[]"}] * 2,
    "preference of other shapes": [
        {"prompt": [{"from": "human", "value": "Is it?"}], "chosen": {"from": "gpt", "value": "yes"}, "rejected": "no", "system": "Hm."}
    ]
    * 2,
    "preference with calls": [{"prompt": MESSAGES[:1], "chosen": CALL, "rejected": OTHER[1:]}],
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or (m.tool_calls | tojson) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.byte_tokenizer(TEMPLATE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_kept_dropped_or_refused(kind, tokenizer):
    data = config.default_config().data
    data.kind, data.bad_rows, data.max_length = kind.split()[0], "drop", 200
    data.columns.margin = "gap" if kind == "preference" else ""
    data.columns.system = "system" if kind.endswith("shapes") else ""
    strict = data.copy_and_resolve_references()
    strict.bad_rows = "error"

    def examples(rows, data):
        prompted, rejected = prompted_rows(rows, data, "the file")
        assert len(prompted) + rejected.counts.total() == len(rows)
        return tokenize(prompted, tokenizer, max_length=data.max_length, max_prompt_length=0, vocab_size=300, rejected=rejected)

    @fuzz(100)
    @given(spoiled(KINDS[kind]))
    def check(rows):
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            return  # read_rows has refused it
        made = read(lambda: examples(rows, data), "the file", "chat template")
        if made is not REFUSED:
            whole(*made, len(rows))
        careful = read(lambda: examples(rows, strict), "the file", "chat template")
        if made is REFUSED:
            assert careful is REFUSED
        elif careful is not REFUSED:
            assert careful[0].digest() == made[0].digest()

    check()


CARD = {"info": {"post": "x", "title": "t", "subreddit": "s"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1, **PAIR}
CARD |= {"answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2}], "labels": 1, "overall_preference": -2, "system": "s"}


@fuzz(80)
@given(st.data())
def test_formats(data):
    c = config.default_config().data
    c.format = data.draw(st.sampled_from(sorted(formats.FORMATS)))
    row = data.draw(spoiled(CARD))
    if isinstance(row, dict):
        (made,) = shaped([row], c)
        assert isinstance(made, dict | str) or (isinstance(made, Bad) and "\n" not in made.what and len(made.what) < 500)


def whole(examples: Examples, report: Any, rows: int) -> None:
    """Checks that every lost row is counted, and that every side is a prompt followed by a completion."""
    assert report.rows == rows == report.kept + sum(report.dropped.values())
    assert len(examples) == report.kept == (len(examples.offsets) - 1) // examples.N
    assert (examples.lengths <= 200).all() and examples.offsets[-1] == len(examples.tokens) == len(examples.scored)
    assert (examples.prompt_lengths >= 1).all() and (examples.prompt_lengths < examples.lengths).all()
    assert all(len(field) == len(examples) and np.isfinite(field).all() for field in examples.fields.values())


@fuzz(200)
@given(
    st.one_of(
        st.text(max_size=40), st.lists(st.sampled_from(["a@0.8", "b@0.2", "a", "b", "@", ",", "1", "nan", "1e999", "\0"])).map(",".join)
    )
)
def test_mixtures(text):
    named = read(
        lambda: mixture.sources(text), repr(text), *(repr(x) for x in text.split("@")), *(repr(x.strip()) for x in text.split(","))
    )
    if named is not REFUSED:
        paths, weights = zip(*named, strict=True)
        assert all(paths) and len(set(paths)) == len(paths)
        assert all(w is None for w in weights) or all(w is not None and 0 < w < math.inf for w in weights)


# Configuration ------------------------------------------------------------------------------------------------------------

FIELDS = config.flat(config.default_config())
LITERALS = st.one_of(
    st.sampled_from(["", "1", "-1", "1.0", "1e999", "nan", "-inf", "None", "true", "False", "[1", "(1,)", "{[]: 1}", "9" * 400, "9" * 5000])
    | st.sampled_from(
        ["1+2j", "'x'", "1" + "0" * 30, "0x10", "1_000", " 1", "((" * 100, "-" * 4000 + "1", "\0", "lambda: 1", "b'x'", "1 2"]
    ),
    st.text(max_size=8),
)


@fuzz(200)
@given(st.sampled_from(sorted(FIELDS)), LITERALS)
def test_overrides(field, text):
    c = config.default_config()
    if read(lambda: config.set_field(c, f"{field}={text}"), repr(field)) is not REFUSED:
        now = config.flat(c)
        assert type(now[field]) is type(FIELDS[field]) and now | {field: FIELDS[field]} == FIELDS
        assert not isinstance(now[field], float) or math.isfinite(now[field])


@fuzz(150)
@given(st.one_of(damaged(b"optimizer.learning_rate=1e-5").map(lambda x: x.decode("latin-1")), st.text(max_size=20)))
def test_names_of_fields(override):
    c = config.default_config()
    read(lambda: config.set_field(c, override), override, short(override), short(override.partition("=")[0]))
    assert config.flat(c).keys() == FIELDS.keys()


DPO = runs.REPO / "experiments" / "dpo_hh.py"


@pytest.fixture(scope="module")
def effective() -> tuple[str, dict, str]:
    """The config.py of a run in three parts: the text before the fields, the fields, and the rest."""
    head, mark, rest = config.effective(config.load_experiment(DPO)).partition("    pinned = ")
    text, end, tail = rest.partition("\n    }\n")
    return head + mark, ast.literal_eval(text + end.strip()), "\n" + tail


def test_a_workdirs_config(effective, folder):
    head, fields, tail = effective
    path = folder / "config.py"

    @fuzz(100)
    @given(spoiled(fields))
    def check(changed):
        path.write_text(head + repr(changed) + tail)
        experiment = read(lambda: config.load_experiment(path), path, "config field")
        if experiment is not REFUSED:
            now = config.flat(experiment.config)
            assert all(type(now[name]) is type(value) for name, value in FIELDS.items())
            assert config.difference(experiment, experiment, ()) == []

    check()


@fuzz(60)
@given(st.integers(0, DPO.stat().st_size), st.binary(max_size=3))
def test_an_experiment_file_that_ends_early(folder, length, more):
    path = folder / "cut.py"  # cut and no more: any other change to code may mean anything
    path.write_bytes(DPO.read_bytes()[:length] + more)
    read(lambda: config.load_experiment(path), path)


OWN = """
import jax
import jax.numpy as jnp
from alignax import chain, default_config, ema, logps, sft
from alignax.losses import make_loss, sequence

def get_config():
    config = default_config()
    config.beta = 0.1
    config.optimizer.learning_rate = 1e-3
    return config

def loss(config):
    return own(beta=config.beta) + 0.1 * sft()

def experience(config, reference):
    return chain(logps("ref_logps", reference, config.microbatches), lambda batch: batch | {"twice": 2.0 * batch["ref_logps"]})

def averages(config):
    return {"ema": ema(0.9)}

def gold(prompts, completions):
    return [float(len(text)) for text in completions]

def own(beta):
    def value(out, batch):
        ratios = sequence(out.logps - batch["ref_logps"], batch)
        margins = ratios[:, 0] - ratios[:, 1]
        return -jax.nn.log_sigmoid(beta * margins), {"margins": jnp.abs(margins)}
    return make_loss("own", value)
"""
WORDS = ("name", "id", "attr", "arg")  # where nodes of a syntax tree hold a word
ODD = st.sampled_from([None, True, 0, -1, 1.5, math.nan, 2**40, "", "x", "ref_logps", b"x", ..., (), "a" * 300])


@st.composite
def misspelt(draw: Any, source: str) -> str:
    """Code of which one or two places are otherwise: a letter of a word, a constant, an argument, a statement that is not there."""
    tree = ast.parse(source)
    for _ in range(draw(st.integers(1, 2))):
        nodes = [
            node for node in ast.walk(tree) if isinstance(node, (ast.expr, ast.FunctionDef, ast.arg, ast.keyword, ast.alias, ast.Assign))
        ]
        node = draw(st.sampled_from(nodes))
        words = [(name, word) for name in WORDS if isinstance(word := getattr(node, name, None), str)]
        how = draw(st.sampled_from(["letter", "letter", "part", "statement"]))
        if words and how == "letter":
            name, word = words[0]
            at = draw(st.integers(0, len(word) - 1))
            setattr(node, name, word[:at] + draw(st.sampled_from(["", word[at] * 2, "x"])) + word[at + 1 :] or "x")
        elif isinstance(node, ast.Constant):
            node.value = draw(ODD)
        elif isinstance(node, ast.Call) and how == "part":
            node.args, node.keywords = node.args[:-1], node.keywords[: -1 if not node.args else None]
        elif isinstance(node, ast.arguments | ast.FunctionDef) and how == "part" and node.args.args:
            node.args.args.pop()
        elif isinstance(node, ast.FunctionDef) and how == "statement":
            node.body.pop(draw(st.integers(0, len(node.body) - 1)))
            node.body = node.body or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def traced(path: Path) -> None:
    """Runs the checks that a run makes with an experiment file before it computes, without a model."""
    experiment = config.load_experiment(path)
    with blaming(path):
        objective = experiment.loss(experiment.config)
    check_objective(objective, path)
    batch = {name: jax.ShapeDtypeStruct((4, 2, 8), dtype) for name, dtype in (("tokens", jnp.int32), ("completion_mask", jnp.bool_))}
    out = Outputs(*[jax.ShapeDtypeStruct((4, 2, 8), jnp.float32)] * 2)
    zeros = lambda params, batch: Outputs(jnp.zeros((4, 2, 8)), jnp.zeros((4, 2, 8)))
    given = {"config": experiment.config, "reference": Model(zeros, {}), "policy": Model(zeros, {}), "prompts": 4}

    def step(out: Outputs, batch: Any) -> Any:
        make = experiment.experience or chain
        made = make(**{name: given[name] for name in config.asked(experiment.experience)})
        check_call(made, "what experience() returns", "batch")
        batch = advance(made, {}, batch)[1]
        loss = at_step(objective, jnp.zeros((), jnp.int32))
        return loss(out, batch, loss.normalised(batch))

    try:
        with blaming(path, always=False):
            jax.eval_shape(step, out, batch)
    except KeyError as e:
        raise ValueError(explained(e, path)) from e


@pytest.mark.parametrize("examples", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_mistakes_in_experiment_files(folder, examples):
    path = folder / "own.py"

    @fuzz(examples)
    @given(misspelt(OWN))
    def check(source):
        written(path, source)
        read(lambda: traced(path), "")

    check()


def written(path: Path, source: str) -> None:
    """Writes an experiment file that is not taken for the one before it: the clock of compiled files knows seconds alone."""
    path.write_text(source)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.long
def test_mistakes_of_an_experiment_whose_model_and_data_are_there(folder):
    path, fields = folder / "whole.py", runs.world(folder) | {"workdir": folder / "whole"}
    overrides = [f"{name}={value}" for name, value in fields.items()]

    @fuzz(30)
    @given(misspelt(OWN))
    def check(source):
        written(path, source)
        read(lambda: check_step(prepare(config.load_experiment(path, overrides))), "")

    check()


ARGUMENTS = st.one_of(
    st.sampled_from(["--config", str(DPO), "--dry-run", "--json", "-", "--", "-x", "--config.", "--config.=", "--help=1", "eval", "x"]),
    st.tuples(st.sampled_from([*sorted(FIELDS), "optimizer", "lr", "data.columns", "a.b.c", "optimizer.name.x"]), LITERALS).map(
        lambda x: f"--config.{x[0]}={x[1]}"
    ),
    st.text(max_size=8),
)


@fuzz(150)
@given(st.sampled_from([name for name in cli.WANTED if name not in ("generate", "bench")]), st.lists(ARGUMENTS, max_size=5))
def test_command_lines(folder, monkeypatch, capsys, command, words):
    """None of these names a model, so each is refused, in one line. (`bench` needs no model.)"""
    (folder / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "here")
    assert cli.main([command, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("alignax: error: ") and said.count("\n") == 1 and len(said) < 2000, said


# Models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(folder) -> hf.Source:
    """A tiny model in one file, and in `shards` in several."""
    source = hf.open_folder(tiny.folder(folder / "model"))
    hf.export(hf.load_params(source, ONE), source, folder / "shards", shard_bytes=30_000)
    return source


def check_config(good: dict, contents: Any, path: Path, examples: int) -> None:
    """Accepted or refused; what is accepted has sizes and angles that a model can have. The good one is accepted."""
    (path / "config.json").write_bytes(dumps(good))
    assert hf.open_folder(path).config.vocab_size == good["vocab_size"]

    @fuzz(examples)
    @given(contents)
    def check(content):
        (path / "config.json").write_bytes(dumps(content))
        source = read(lambda: hf.open_folder(path), path / "config.json")
        if source is not REFUSED:
            c = source.config
            assert hash(c) is not None and c.num_attention_heads % c.num_key_value_heads == 0 and c.rms_norm_eps > 0
            sizes = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.head_dim, c.max_position_embeddings)
            assert all(type(x) is int and x > 0 for x in sizes)
            assert not c.sliding_windows or len(c.sliding_windows) == c.num_hidden_layers
            if c.positions == "rope":
                assert all(bool(jnp.isfinite(x).all()) for x in rope.rope_tables(c, jnp.arange(3)[None]))

    check()


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_config_json(kind, folder):
    import transformers

    full = transformers.AutoConfig.for_model(kind).to_dict() | {"model_type": kind}
    good = json.loads(json.dumps({name: value for name, value in full.items() if name in MODEL_FIELDS}))
    good |= {"num_hidden_layers": 2} if "num_hidden_layers" in good else {}
    good |= {"layer_types": ["full_attention"] * 2} if "layer_types" in good else {}
    path = folder / kind
    path.mkdir()
    check_config(good, spoiled(good), path, 60)


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_parameters(kind, folder):
    path = folder / f"rope_{kind}"
    path.mkdir()
    base = {name: tiny.CONFIG[name] for name in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ROPES[kind]
    base |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    check_config(base | {"rope_parameters": rope}, spoiled(rope).map(lambda rope: base | {"rope_parameters": rope}), path, 60)


@pytest.fixture
def shapes(model, monkeypatch):
    """Shapes of the tiny model, found once: only its files are spoiled."""
    plan = hf.plan(model, model.config)
    monkeypatch.setattr(hf, "plan", lambda source, config: plan)
    found = {name: parameters.abstract_params(model.config, mesh) for name, mesh in (("none", None), ("one", ONE))}
    monkeypatch.setattr(hf, "abstract_params", lambda config, mesh=None: found["one" if mesh else "none"])


def tensor_file(data: bytes) -> tuple[dict, bytes]:
    """The header and the rest of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: Any, rest: bytes) -> bytes:
    text = dumps(header)
    return len(text).to_bytes(8, "little") + text + rest


def check_weights(model: hf.Source, path: Path) -> None:
    source = model._replace(path=path)
    params = read(lambda: hf.load_params(source, ONE), path)
    if params is not REFUSED:
        assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in jax.tree.leaves(params))


@fuzz(60)
@given(st.data())
def test_weight_files(model, shapes, folder, data):
    whole = (model.path / "model.safetensors").read_bytes()
    header, rest = tensor_file(whole)
    path = folder / "weights"
    path.mkdir(exist_ok=True)
    content = data.draw(st.one_of(damaged(whole), spoiled(header).map(lambda header: with_header(header, rest))))
    (path / "model.safetensors").write_bytes(content)
    check_weights(model, path)


@fuzz(60)
@given(st.data())
def test_an_index_of_weight_files(model, shapes, folder, data):
    index = folder / "shards" / "model.safetensors.index.json"
    good = index.read_bytes()
    files = sorted({*json.loads(good)["weight_map"].values()})
    moved = st.sampled_from([*files, "absent.safetensors", "../model/model.safetensors", "."])
    content = data.draw(
        st.one_of(damaged(good), spoiled(json.loads(good)).map(dumps), moved.map(lambda f: good.replace(files[0].encode(), f.encode(), 1)))
    )
    try:
        index.write_bytes(content)
        check_weights(model, index.parent)
    finally:
        index.write_bytes(good)


@fuzz(60)
@given(st.data())
def test_generation_configs(model, folder, data):
    path = folder / "generation"
    path.mkdir(exist_ok=True)
    good = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6, "top_k": 20, "suppress_tokens": [1, 2], "do_sample": True}
    (path / hf.GENERATION).write_bytes(data.draw(st.one_of(damaged(dumps(good)), spoiled(good).map(dumps))))
    source = model._replace(path=path)
    for reader in (hf.stop_ids, hf.unread):
        found = read(lambda reader=reader: reader(source), path / hf.GENERATION)
        assert found is REFUSED or "\n" not in str(found)


@fuzz(30)
@given(st.data())
def test_tokenizers(model, folder, data):
    path = folder / "tokenizer"
    path.mkdir(exist_ok=True)
    files = {name: json.loads((model.path / name).read_bytes()) for name in ("tokenizer.json", "tokenizer_config.json")}
    files["tokenizer_config.json"]["chat_template"] = TEMPLATE
    spoil = data.draw(st.sampled_from(sorted(files)))
    for name, good in files.items():
        (path / name).write_bytes(data.draw(st.one_of(damaged(dumps(good)), spoiled(good).map(dumps))) if name == spoil else dumps(good))
    tokenizer = read(lambda: load_tokenizer(path, 96), path)
    if tokenizer is not REFUSED:
        assert type(tokenizer.eos_token_id) is int and len(tokenizer) <= 96
        rows = [Prompted("Is it?", (" yes", " no")), Prompted(MESSAGES[:1], (MESSAGES[1:], OTHER[1:]))]
        for row in rows:
            read(lambda row=row: tokenize([row], tokenizer, max_length=200, max_prompt_length=0, vocab_size=96), "data", "tokenizer")


@pytest.fixture(scope="module")
def adapter(model, folder) -> Path:
    """A PEFT folder of the tiny model."""
    spec = Lora(2, 4.0, ("q", "up"), dora=True)
    adapters = parameters.init_adapters(model.config, spec, ONE, hf.load_params(model, ONE), jax.random.key(0))
    peft.write_adapter(adapters, spec, model, str(model.path), folder / "adapter")
    file = folder / "adapter" / peft.CONFIG  # with everything that is read, each as PEFT's default or of no effect
    config = json.loads(file.read_text()) | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*up_proj": 8.0}}
    config |= {"exclude_modules": ["lm_head"], "layers_to_transform": [0, 1], "layers_pattern": "layers", "init_lora_weights": True}
    file.write_text(json.dumps(config | {"modules_to_save": [], "lora_bias": False, "loftq_config": {}}))
    peft.read_adapter(folder / "adapter", model, ONE)
    return folder / "adapter"


@fuzz(120)
@given(st.data())
def test_adapters(model, adapter, shapes, folder, data):
    path = folder / "other adapter"
    path.mkdir(exist_ok=True)
    good = {name: (adapter / name).read_bytes() for name in (peft.CONFIG, peft.WEIGHTS)}
    header, rest = tensor_file(good[peft.WEIGHTS])
    change = data.draw(st.sampled_from(sorted(good)))
    values = spoiled(json.loads(good[change])).map(dumps) if change == peft.CONFIG else spoiled(header).map(lambda x: with_header(x, rest))
    for name, content in good.items():
        (path / name).write_bytes(data.draw(st.one_of(values, values, damaged(content))) if name == change else content)
    placed = lambda layers, spec, source, mesh: layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "place_adapters", placed)
        made = read(lambda: peft.read_adapter(path, model, ONE), path)
    if made is not REFUSED:
        spec, layers = made
        assert 0 < spec.scale < math.inf and {name.partition("_lora_")[0] for name in layers} == set(spec.targets)
        assert all(np.isfinite(x).all() and x.shape[0] == 2 for x in layers.values())


# What runs leave ----------------------------------------------------------------------------------------------------------


@fuzz(40)
@given(st.data())
def test_what_a_checkpoint_says_of_its_run(saved, data):
    checkpoints, file = saved
    good = json.dumps({"policy": "p", "reference": "r", "format": 2, "step": 0, "digests": {}}).encode()
    file.write_bytes(data.draw(st.one_of(damaged(good), spoiled(json.loads(good)).map(dumps))))
    about = read(lambda: checkpoints.about(0), "checkpoints/0")
    assert about is REFUSED or (about["format"], about["step"]) == (2, 0)


@pytest.fixture(scope="module")
def saved(folder):
    """Checkpoints, and the file of one in which it says which run wrote it."""
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0)), {"policy": "p", "reference": "r"}, {})
    checkpoints.close()
    (file,) = (f for f in (folder / "run" / "checkpoints" / "0" / "about").iterdir() if f.is_file() and b'"policy"' in f.read_bytes())
    assert json.loads(file.read_bytes()).items() >= {"policy": "p", "reference": "r", "format": 2, "step": 0}.items()
    again = Checkpoints(folder / "run")
    yield again, file
    again.close()


@fuzz(100)
@given(st.data())
def test_logs(folder, data):
    path = folder / "metrics.jsonl"
    rows = [{"step": i, "loss": 0.5, "eval/loss": None} for i in range(3)]
    text = b"".join(dumps(row) + b"\n" for row in rows)
    lines = spoiled(rows).map(lambda rows: b"".join(dumps(row) + b"\n" for row in rows) if isinstance(rows, list) else dumps(rows))
    path.write_bytes(data.draw(st.one_of(damaged(text), lines)))
    found = read(lambda: metrics.read_rows(path), path)
    assert found is REFUSED or all(type(row["step"]) is int for row in found)


@fuzz(80)
@given(st.data())
def test_parts_of_a_cached_reference(folder, data):
    scored = np.array([False, True, True, False, True])
    examples = Examples(np.arange(5, dtype=np.int32), scored, np.array([0, 3, 5]), 2, ["a"])
    file = folder / "000000.safetensors"
    reference.write(folder, 0, np.array([-1.0, -2.0, -3.0], np.float32))
    good = file.read_bytes()
    header, rest = tensor_file(good)
    file.write_bytes(data.draw(st.one_of(damaged(good), spoiled(header).map(lambda header: with_header(header, rest)))))
    values = read(lambda: reference.read(folder, 0, examples), file)
    assert values is REFUSED or values.tolist() == [-1.0, -2.0, -3.0]
