"""Kinds of data from a file to the fields of a batch."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from alignax.config import default_config
from alignax.data import Batches, concatenate, evaluation_batch, load_examples, unpair

PAIRS = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no {i} {i}", "gap": i / 2} for i in range(5)]


def load(tmp_path, rows, kind, columns=(), **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = default_config().data
    data.update(kind=kind, **changes)
    data.columns.update(dict(columns))
    return load_examples(path, data, tiny.tokenizer(), 96)


def texts(examples, side):
    """Prompt and scored text of a side."""
    decode, a, b = tiny.tokenizer().decode, *examples.offsets[side : side + 2]
    return decode(examples.tokens[a:b][~examples.scored[a:b]]), decode(examples.tokens[a:b][examples.scored[a:b]])


def test_margins_reach_the_batch(tmp_path):
    examples, _ = load(tmp_path, PAIRS, "preference", {"margin": "gap"})
    assert Batches(examples, 5, 0, 16, shuffle=False).batch(0)["margin"].tolist() == [0, 0.5, 1, 1.5, 2]
    assert "margin" not in Batches(load(tmp_path, PAIRS, "preference")[0], 5, 0, 16).batch(0)


def test_attributes_reach_the_batch_and_missing_ones_are_nan(tmp_path):
    rows = [
        {"prompt": "p", "completion": "a", "help": 1, "more": [2.5, None]},
        {"prompt": "p", "completion": "b", "help": "", "more": [float("nan"), "3"]},
        {"prompt": "p", "completion": "c", "help": None, "more": [None, -1e3]},
    ]
    examples, _ = load(tmp_path, rows, "sft", {"attributes": "help, more"})
    given = Batches(examples, 4, 0, 16, shuffle=False).batch(0)["attributes"]
    assert given.shape == (4, 1, 3) and given.dtype == np.float32
    np.testing.assert_array_equal(given[:3, 0], [[1, 2.5, np.nan], [np.nan, np.nan, 3], [np.nan, np.nan, -1e3]])
    assert evaluation_batch(examples, 1, 2, 16)["attributes"][:, 0].tolist()[1] == [0, 0, 0], "a padding row"
    one, _ = load(tmp_path, rows, "sft", {"attributes": "help"}, bad_rows="drop")
    with pytest.raises(ValueError, match=r"differ in their further fields \(\[\('attributes', 1, 3\)\] and \[\('attributes', 1, 1\)\]\)"):
        concatenate([examples, one])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"help": "much"}, "an attribute in help, more is 'much', neither a finite number nor null"),
        ({"help": float("inf")}, "is inf, neither"),
        ({"help": True}, "is True, neither"),
        ({"help": None, "more": None}, "help, more are empty"),
        ({"more": [1, 2]}, "row 3 .* the row has 3 attributes, but most rows have 2"),
    ],
)
def test_rows_without_usable_attributes(row, message, tmp_path):
    good = {"prompt": "p", "help": 1, "more": 2}
    rows = [*(good | {"completion": f"c{i}"} for i in range(3)), good | {"completion": "x"} | row]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows, "sft", {"attributes": "help,more"})
    _, report = load(tmp_path, rows, "sft", {"attributes": "help,more"}, bad_rows="drop")
    assert report.kept == 3 and set(report.dropped) <= {"no attribute", "another number of attributes"}


def test_attributes_belong_to_single_responses(tmp_path):
    with pytest.raises(ValueError, match="only data of kind 'sft' have attributes; set data.kind=sft"):
        load(tmp_path, PAIRS, "preference", {"attributes": "gap"})
    with pytest.raises(ValueError, match="has no column 'gpa', named by data.columns.attributes; it has: 'gap'"):
        load(tmp_path, PAIRS, "sft", {"attributes": "gap,gpa"})


def test_labelled_completions(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f" c{i}", "label": i % 3 == 0} for i in range(5)]
    examples, report = load(tmp_path, rows, "unpaired")
    batch = evaluation_batch(examples, 0, 8, 16)
    assert batch["labels"].tolist() == [[True], [False], [False], [True]] + [[False]] * 4 and batch["labels"].shape == (8, 1)
    assert examples.N == 1 and texts(examples, 4) == ("<s>4?", " c4</s>") and report.pairs_split == 0


@pytest.mark.parametrize("count", [4, 5])
def test_pairs_taken_apart(tmp_path, count):
    rows = [*PAIRS[:count], {"prompt": "x", "chosen": "s" * 90 + "a", "rejected": "s" * 90 + "b"}]
    examples, report = load(tmp_path, rows, "unpaired", max_length=40)
    assert (report.rows, report.kept, report.pairs_split, report.dropped) == (count + 1, count, count, {"identical after the cut": 1})
    assert any(f"pairs split into a True and a False row each: {count}" in line for line in report.lines())
    assert len(examples) == 2 * count and examples.N == 1 and not examples.fields["labels"].all()
    seen = set()
    for row in range(2 * count):
        prompt, completion = texts(examples, row)
        label = bool(examples.fields["labels"][row, 0])
        assert prompt == f"<s>{examples.prompts[row]}" and completion.startswith(" yes" if label else " no")
        assert f" {row % count}" in completion and completion.endswith("</s>")
        seen.add((prompt, label))
    assert len(seen) == 2 * count
    neighbours = zip(examples.prompts, examples.prompts[1:], strict=False)
    assert all(a != b for a, b in neighbours), "neighbours are each other's mismatched partner"
    assert abs(examples.fields["labels"][:4].mean() - 0.5) < 0.3
    with pytest.raises(ValueError, match="data of kind 'unpaired' has no margins"):
        load(tmp_path, rows, "unpaired", {"margin": "gap"})


def test_rankings(tmp_path):
    rows = [{"prompt": f"{i}?", "completions": [f" {c}{i}" for c in "abc"]} for i in range(4)]
    examples, report = load(tmp_path, rows, "ranked")
    assert examples.N == 3 and [texts(examples, 3 + n)[1] for n in range(3)] == [" a1</s>", " b1</s>", " c1</s>"]
    assert evaluation_batch(examples, 0, 4, 16)["tokens"].shape == (4, 3, 16) and report.responses == 3
    rows[2]["completions"][1:] = ["s" * 50 + "a", "s" * 50 + "b"]
    assert load(tmp_path, rows, "ranked", max_length=20)[1].dropped == {"identical after the cut": 1}, "two of three ranks are the same"


def test_parts_put_together_are_the_parts(tmp_path):
    first, _ = load(tmp_path, PAIRS[:2], "preference", {"margin": "gap"})
    second, _ = load(tmp_path, PAIRS[2:], "preference", {"margin": "gap"})
    whole, _ = load(tmp_path, PAIRS, "preference", {"margin": "gap"})
    assert concatenate([first, second]).digest() == whole.digest() != first.digest()
    assert concatenate([first]) is first
    with pytest.raises(ValueError, match="differ in their responses"):
        concatenate([first, unpair(second)])
    plain, _ = load(tmp_path, PAIRS[2:], "preference")
    with pytest.raises(ValueError, match=r"differ in their further fields \(\[\('margin',\)\] and \[\]\)"):
        concatenate([first, plain])
    np.testing.assert_array_equal(whole.prompt_tokens(3), whole.tokens[whole.offsets[6] :][: whole.prompt_lengths[7]])


def test_examples_without_row_numbers_and_conversations_are_taken_and_asked_too(tmp_path):
    whole, _ = load(tmp_path, PAIRS, "preference")
    bare = dataclasses.replace(whole, rows=np.zeros(0, np.int64), conversations=[])
    there = np.array([2, 0])
    assert bare.taken(there).rows.shape == (0,) and bare.taken(there).digest() == whole.taken(there).digest()
    assert whole.taken(there).rows.tolist() == whole.rows[there].tolist()
    assert bare.asked(1) == whole.asked(1) == (PAIRS[1]["prompt"], None)
    asked = ([{"role": "user", "content": "hi"}], None)
    assert dataclasses.replace(whole, conversations=[None, asked, None, None, None]).asked(1) == asked
    joined = concatenate([bare, dataclasses.replace(whole, conversations=[asked] * 5)])
    assert joined.asked(1) == bare.asked(1) and joined.asked(6) == asked and joined.taken(there).rows.shape == (0,)
