import pytest

from alignax.config import default_config
from alignax.data import Prompted, prompted_rows

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def config(separator="", kind="preference", columns=(), **changes):
    data = default_config().data
    data.update(prompt_separator=separator, kind=kind, **changes)
    data.columns.update(dict(columns))
    return data


def read(rows, *args, path="data", **changes):
    """The prompted rows, and the counts of those left out."""
    prompted, rejected = prompted_rows(rows, config(*args, **changes), path)
    assert len(prompted) + rejected.counts.total() == len(rows)
    return prompted, rejected.counts


def test_columns_become_prompts_and_completions():
    rows = [{"q": "p", "good": "a", "bad": "b"}]
    pairs, none = read(rows, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert pairs == [Prompted("p", ("a", "b"), 0)] and not none
    assert read(rows, kind="sft", columns={"prompt": "q", "completion": "good"})[0] == [Prompted("p", ("a",), 0)]
    # Without the column of completions, SFT is on the chosen side of pairs.
    assert read(rows, kind="sft", columns={"prompt": "q", "chosen": "good"})[0] == [Prompted("p", ("a",), 0)]


def test_a_missing_column_is_named_with_the_nearest_first():
    with pytest.raises(ValueError, match=r"no column 'chosn', named by data.columns.chosen; it has: 'chosen', .*'prompt'"):
        read([GOOD], columns={"chosen": "chosn"}, path="x.jsonl")
    with pytest.raises(ValueError, match=r"no prompt column 'promt' \(it has: 'prompt', .*columns.prompt.*prompt_separator"):
        read([GOOD], columns={"prompt": "promt"}, path="x.jsonl")
    with pytest.raises(ValueError, match=r"no column 'answer', named by data.columns.completion"):
        read([{"prompt": "p"}], kind="sft", columns={"completion": "answer"}, path="x.jsonl")
    with pytest.raises(ValueError, match=r"no column 'gap', named by data.columns.margin"):
        read([GOOD], columns={"margin": "gap"})
    with pytest.raises(ValueError, match=r"no column 'label', named by data.columns.label"):
        read([{"prompt": "p", "completion": "c"}], kind="unpaired")


BAD = [
    ({"chosen": None}, "not text", r"'chosen' is None, not text"),
    ({"prompt": 7}, "not text", r"'prompt' is 7, not text"),
    ({"rejected": [{"role": "user"}]}, "not text", r"'rejected' is \[\{'role': 'user'\}\], not text"),
    ({"chosen": "\ud800"}, "invalid Unicode", r"half of a surrogate pair"),
    ({"rejected": " \n"}, "empty completion", r"'rejected' is empty: ' \\n'"),
    ({"rejected": "a"}, "chosen equals rejected", r"same text: 'a'"),
]
A = "\n\nAssistant:"
BAD_TRANSCRIPTS = [
    (
        {"chosen": "The sky", "rejected": "The sky is blue"},
        "no separator",
        r"'chosen' holds no separator '\\n\\nAssistant:': 'The sky'",
    ),
    (
        {"chosen": f"Q1{A} yes", "rejected": f"Q2{A} no"},
        "prompt differs",
        r"the prompt differs between chosen and rejected: .*Q1.*Q2",
    ),
    ({"chosen": f"Q{A} yes", "rejected": f"Q{A} "}, "empty completion", r"'rejected' is empty"),
    ({"chosen": f"Q{A} yes", "rejected": f"Q{A} yes"}, "chosen equals rejected", r"same text: ' yes'"),
    ({"chosen": f"Q{A} yes", "rejected": 3}, "not text", r"'rejected' is 3"),
]


def test_a_separator_is_told_as_a_shell_takes_it():
    """Copied from the message, it works; typed with a backslash and an n, it is told what a shell makes a line break of."""
    row = {"chosen": f"Q{A} yes", "rejected": f"Q{A} no"}
    with pytest.raises(ValueError, match=r"--config\.data\.prompt_separator=\$'\\n\\nAssistant:'$"):
        read([row])
    with pytest.raises(ValueError, match=r"no separator '\\\\n\\\\nAssistant:'; in a shell a line break is \$'\\n': "):
        read([row], "\\n\\nAssistant:")


@pytest.mark.parametrize(
    ("row", "separator", "reason", "message"),
    [({**GOOD, **row}, "", reason, message) for row, reason, message in BAD]
    + [(row, A, reason, message) for row, reason, message in BAD_TRANSCRIPTS],
)
def test_bad_rows_raise_or_are_counted(row, separator, reason, message):
    good = {"chosen": f"Q{A} a", "rejected": f"Q{A} b"} if separator else GOOD
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 1 \(counted from 0\): .*{message}.*--config.data.bad_rows=drop"):
        read([good, row, good], separator, path="x.jsonl")
    prompted, dropped = read([good, row, good], separator, bad_rows="drop")
    assert dropped == {reason: 1}
    assert [kept.row for kept in prompted] == [0, 2]


def test_a_long_bad_value_is_shown_short():
    with pytest.raises(ValueError) as error:
        read([{**GOOD, "chosen": {"x": ["x" * 5000] * 99}}])
    assert len(str(error.value)) < 400


def test_transcripts_are_split_after_their_last_separator():
    rows = [{"chosen": f"\n\nHuman: a{A} b\n\nHuman: c{A} d", "rejected": f"\n\nHuman: a{A} b\n\nHuman: c{A} e"}]
    prompted, _ = read(rows, A)
    assert prompted == [Prompted(f"\n\nHuman: a{A} b\n\nHuman: c{A}", (" d", " e"), 0)]
    assert read(rows, A, "sft")[0] == [Prompted(f"\n\nHuman: a{A} b\n\nHuman: c{A}", (" d",), 0)]


@pytest.mark.parametrize(("chosen", "rejected"), [("Paris ", "London"), ("The sky", "The sky is blue")])
def test_a_prompt_is_never_guessed(chosen, rejected):
    """The longest common prefix would call "The sk" a prompt; a shared beginning belongs to both answers."""
    row = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(ValueError, match="alignax never guesses the prompt"):
        read([row])
    prompted, _ = read([{key: f"Q:{value}" for key, value in row.items()}], "Q:")
    assert prompted == [Prompted("Q:", (chosen, rejected), 0)]


def test_a_prompt_column_goes_before_the_separator():
    row = {"prompt": "p", "chosen": f"x{A} a", "rejected": f"y{A} b"}
    assert read([row], A)[0] == [Prompted("p", (f"x{A} a", f"y{A} b"), 0)]


def test_the_limit_is_counted():
    prompted, dropped = read([GOOD] * 5, limit=2)
    assert len(prompted) == 2 and dropped == {"beyond data.limit": 3}
    assert not read([GOOD] * 5, limit=9)[1]
    with pytest.raises(ValueError, match="data.limit is -1"):
        read([GOOD], limit=-1)
    with pytest.raises(ValueError, match="data.bad_rows is 'skip'"):
        read([GOOD], bad_rows="skip")
    with pytest.raises(ValueError, match="data.turns is 'some'; use last or all"):
        read([GOOD], turns="some")
    with pytest.raises(ValueError, match="data.kind is 'ppo'; use one of preference, sft, unpaired, ranked"):
        read([GOOD], kind="ppo")


def test_labels_of_single_completions():
    rows = [{"prompt": "p", "completion": f"c{i}", "label": label} for i, label in enumerate([True, 0, "True", "false", 1])]
    prompted, _ = read(rows, kind="unpaired")
    assert [row.fields for row in prompted] == [{"labels": (label,)} for label in (True, False, True, False, True)]
    for bad in (None, 2, 0.5, 1.0, "yes", [True]):
        kept, dropped = read([*rows, rows[0] | {"label": bad}], kind="unpaired", bad_rows="drop")
        assert len(kept) == 5 and dropped == {"no label": 1}


def test_margins_are_finite_numbers():
    rows = [GOOD | {"gap": gap} for gap in (1, -0.5, "2.5")]
    prompted, _ = read(rows, columns={"margin": "gap"})
    assert [row.fields["margin"] for row in prompted] == [1.0, -0.5, 2.5]
    for bad in (None, True, float("nan"), float("inf"), 10**400, "much", "1e99"):
        _, dropped = read([*rows, GOOD | {"gap": bad}], columns={"margin": "gap"}, bad_rows="drop")
        assert dropped == {"no margin": 1}
    with pytest.raises(ValueError, match="data.columns.margin is 'gap', and data of kind 'sft' has no margins"):
        read(rows, kind="sft", columns={"margin": "gap"})


def test_rankings_have_the_size_of_most():
    rows = [{"prompt": "p", "completions": list(texts)} for texts in ("ab", "abc", "bca", "aba", "a", "cb ")]
    prompted, dropped = read([*rows, {"prompt": "p", "completions": None}], kind="ranked", bad_rows="drop")
    assert [row.completions for row in prompted] == [("a", "b", "c"), ("b", "c", "a")]
    assert dropped == {"another number of completions": 1, "equal completions": 1, "no ranking": 2, "empty completion": 1}
    with pytest.raises(ValueError, match=r"row 0 .*the row has 2 completions, but most rows have 3"):
        read(rows[:3], kind="ranked")


def test_the_first_bad_rows_are_kept_in_words():
    rows = [GOOD | {"chosen": i} for i in range(9)]
    _, rejected = prompted_rows([*rows, GOOD], config(bad_rows="drop"), "x.jsonl")
    assert rejected.first == {"not text": [f"row {i} (counted from 0): 'chosen' is {i}, not text" for i in range(3)]}
    assert rejected.counts == {"not text": 9}


def test_the_order_is_a_column_of_numbers_up_or_down():
    rows = [GOOD | {"length": value} for value in (3, "1.5", -2)]
    for order, expected in (("length", [3, 1.5, -2]), ("-length", [-3, -1.5, 2]), ("file", [0, 0, 0]), ("", [0, 0, 0])):
        assert [row.order for row in read(rows, order=order)[0]] == expected
    with pytest.raises(ValueError, match="no column 'lenght', named by data.order; it has: 'length'"):
        read(rows, order="-lenght")
    with pytest.raises(ValueError, match="data.order is '-', which names no column"):
        read(rows, order="-")
    for value in (None, "long", float("nan"), "1_000"):
        with pytest.raises(ValueError, match=r"row 3 .*'length', named by data.order, is .*, not a finite number"):
            read([*rows, GOOD | {"length": value}], order="length")
