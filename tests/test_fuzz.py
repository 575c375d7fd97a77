"""Every parser of foreign files, given good files with something wrong in them: it takes them whole, or says clearly what it refuses.

Examples are derandomised, so a failure comes back; a bug that was found here has a small test of its own beside its module.
"""

import csv
import functools
import gzip
import io
import json
import math
import struct
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
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax import config, metrics, reference
from alignax.checkpoint import Checkpoints
from alignax.data import Examples, mixture, read_rows
from alignax.data.kinds import prompted_rows
from alignax.data.tokens import tokenize
from alignax.mesh import make_mesh
from alignax.models import families, hf, peft, transformer
from alignax.models.lora import Lora
from alignax.prepare import load_tokenizer
from alignax.train import init_state


def fuzz(examples: int) -> Any:
    return settings(derandomize=True, deadline=None, database=None, max_examples=examples)


# What goes wrong ----------------------------------------------------------------------------------------------------------

DEEP: Any = functools.reduce(lambda inner, _: [inner], range(400), "deep")
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


def changed(value: Any, at: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change(container, key)` was done to the place."""
    top = [json.loads(json.dumps(value)) if value is not DEEP else value]
    node, key = top, 0
    for step in at:
        node, key = node[key], step
    change(node, key)
    return top[0] if top else None


@st.composite
def spoiled(draw: Any, good: Any) -> Any:
    """A JSON value of which one or two places hold another value, or are not there, or have another name."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(places(good)[1:] or [()]))
        new, how = draw(VALUES), draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "repeat"]))

        def change(node: Any, key: Any, new=new, how=how) -> None:
            if how == "drop" and at:
                del node[key]
            elif how == "rename" and isinstance(node, dict):
                node[f"{key}_"] = node.pop(key)
            elif how == "repeat" and isinstance(node, list) and at:
                node.insert(key, node[key])
            else:
                node[key] = new

        good = changed(good, at, change)
        if not isinstance(good, dict | list):
            break
    return good


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes that end early, or of which some are others."""
    out = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        if out:
            i = draw(st.integers(0, len(out) - 1))
            out[i : i + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(out[: draw(st.integers(0, len(out)))] if draw(st.booleans()) else out)


REFUSED = object()


def read(call: Callable[[], Any], *names: object) -> Any:
    """What the call returns, or REFUSED after the project's own error: one line that has one of the names in it."""
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


def written_csv() -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(PAIR))
    writer.writeheader()
    writer.writerows(PAIRS)
    return out.getvalue().encode()


def written_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), out)
    return out.getvalue()


FILES = {
    "a.json": dumps(PAIRS),
    "a.jsonl": b"".join(dumps(row) + b"\n" for row in PAIRS),
    "a.jsonl.gz": gzip.compress(b"".join(dumps(row) + b"\n" for row in PAIRS), mtime=0),
    "a.csv": written_csv(),
    "a.parquet": written_parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_of_data_files(name, folder):
    path = folder / name

    @fuzz(120)
    @given(damaged(FILES[name]))
    def check(content):
        path.write_bytes(content)
        rows = read(lambda: read_rows(path), path)
        assert rows is REFUSED or (rows and all(isinstance(row, dict) and all(isinstance(k, str) for k in row) for row in rows))

    check()


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
    strict = data.copy_and_resolve_references()
    strict.bad_rows = "error"

    def examples(rows, data):
        prompted, rejected = prompted_rows(rows, data, "the file")
        assert len(prompted) + rejected.counts.total() == len(rows)
        return tokenize(prompted, tokenizer, max_length=data.max_length, max_prompt_length=0, vocab_size=300, rejected=rejected)

    @fuzz(120)
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


def whole(examples: Examples, report: Any, rows: int) -> None:
    """Nothing is lost uncounted, and every side is a prompt and then a completion."""
    assert report.rows == rows == report.kept + sum(report.dropped.values())
    assert len(examples) == report.kept == (len(examples.offsets) - 1) // examples.N
    assert (examples.lengths <= 200).all() and examples.offsets[-1] == len(examples.tokens) == len(examples.scored)
    assert (examples.prompt_lengths >= 1).all() and (examples.prompt_lengths < examples.lengths).all()
    assert all(len(field) == len(examples) and np.isfinite(field).all() for field in examples.fields.values())


@fuzz(300)
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


@fuzz(300)
@given(st.sampled_from(sorted(FIELDS)), LITERALS)
def test_overrides(field, text):
    c = config.default_config()
    if read(lambda: config.set_field(c, f"{field}={text}"), repr(field)) is not REFUSED:
        now = config.flat(c)
        assert type(now[field]) is type(FIELDS[field]) and now | {field: FIELDS[field]} == FIELDS
        assert not isinstance(now[field], float) or math.isfinite(now[field])


@fuzz(150)
@given(st.one_of(damaged("optimizer.learning_rate=1e-5".encode()).map(lambda x: x.decode("latin-1")), st.text(max_size=20)))
def test_names_of_fields(override):
    c = config.default_config()
    read(lambda: config.set_field(c, override), override, repr(override.partition("=")[0]))
    assert config.flat(c).keys() == FIELDS.keys()


DPO = runs.REPO / "experiments" / "dpo_hh.py"


@pytest.fixture(scope="module")
def effective() -> tuple[str, dict, str]:
    """The config.py of a run: what stands before its fields, they, and the rest."""
    before, fields, after = config.effective(config.load_experiment(DPO)).partition('r"""{')[0::2], None, None
    head, rest = before
    text, _, tail = rest.partition('"""')
    return head + 'r"""', json.loads("{" + text), '"""' + tail


def test_a_workdirs_config(effective, folder):
    head, fields, tail = effective
    path = folder / "config.py"

    @fuzz(100)
    @given(spoiled(fields))
    def check(changed):
        path.write_text(head + json.dumps(changed) + tail)
        experiment = read(lambda: config.load_experiment(path), path)
        if experiment is not REFUSED:
            now = config.flat(experiment.config)
            assert all(type(now[name]) is type(value) for name, value in FIELDS.items())
            assert config.difference(experiment, experiment, ()) == []

    check()


@fuzz(60)
@given(st.data())
def test_a_damaged_experiment_file(effective, folder, data):
    path = folder / "cut.py"
    content = "".join(effective).encode() if False else DPO.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=3)))
    read(lambda: config.load_experiment(path), path)


# Models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(folder) -> hf.Source:
    """A tiny model in one file, and in `shards` in several."""
    source = hf.open_folder(tiny.folder(folder / "model"))
    hf.export(hf.load_params(source, make_mesh({"fsdp": -1})), source, folder / "shards", shard_bytes=30_000)
    return source


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_config_json(kind, folder):
    import transformers

    good = transformers.AutoConfig.for_model(kind).to_dict() | {"model_type": kind}
    good |= {"num_hidden_layers": 2, "layer_types": None} if "num_hidden_layers" in good else {}
    path = folder / kind
    path.mkdir()

    @fuzz(150)
    @given(spoiled(good))
    def check(content):
        (path / "config.json").write_bytes(dumps(content))
        source = read(lambda: hf.open_folder(path), path / "config.json")
        if source is not REFUSED:
            c = source.config
            hash(c)
            sizes = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.head_dim, c.max_position_embeddings)
            assert all(type(x) is int and x > 0 for x in sizes)
            assert c.num_attention_heads % c.num_key_value_heads == 0 and c.rms_norm_eps > 0

    check()
