import gzip
import json

import ml_collections
import pytest

from alignax.data import Prompted, preference_rows, read_rows, sft_rows

ROWS = [
    {"prompt": "Hi,", "chosen": " hello\u2028there", "rejected": " no"},
    {"prompt": "Héé", "chosen": " yes", "rejected": " so\nwhat"},
]
GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def config(separator="", bad_rows="error", limit=0, **columns):
    names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "completion": "chosen", **columns}
    return ml_collections.ConfigDict(
        {"columns": names, "prompt_separator": separator, "bad_rows": bad_rows, "limit": limit, "kind": "preference"}
    )


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_file_form_gives_the_same_rows(tmp_path, name):
    text = jsonl(ROWS) + "\n\n" if "jsonl" in name else json.dumps(ROWS, indent=1)
    assert read_rows(write(tmp_path / name, text)) == ROWS
    assert read_rows(str(write(tmp_path / ("misnamed" + "".join((tmp_path / name).suffixes[1:])), "\ufeff" + text))) == ROWS


def test_a_dataset_on_disk_gives_the_same_rows_and_several_splits_are_named(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one") == ROWS
    datasets.DatasetDict(train=dataset, dev=dataset).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"several splits \(train, dev\); point to one of them, such as .*two/train"):
        read_rows(tmp_path / "two")
    assert read_rows(tmp_path / "two" / "dev") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', r"a\.jsonl, line 3 is not JSON"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json, line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n"text"\n', r"line 2 is 'text', not an object"),
        ("a.json", '[{"a": 1}, null]', r"element 1 is None, not an object"),
        ("a.jsonl", "\n \n", r"holds no rows"),
        ("a.json", "[]", r"holds no rows"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


def test_missing_damaged_and_foreign_paths(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder '.*nowhere\.jsonl'"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="not written by Dataset.save_to_disk"):
        read_rows(tmp_path)
    whole = gzip.compress(jsonl(ROWS * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz is a damaged gzip file"):
        read_rows(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


def test_columns_become_prompts_and_completions():
    rows = [{"q": "p", "good": "a", "bad": "b"}]
    prompted, dropped = preference_rows(rows, config(prompt="q", chosen="good", rejected="bad"))
    assert prompted == [Prompted("p", ("a", "b"), 0)] and not dropped
    prompted, dropped = sft_rows(rows, config(prompt="q", completion="good"))
    assert prompted == [Prompted("p", ("a",), 0)] and not dropped


def test_a_missing_column_is_named_with_the_nearest_first():
    with pytest.raises(ValueError, match=r"no column 'chosn', named by data.columns.chosen; it has: 'chosen', .*'prompt'"):
        preference_rows([GOOD], config(chosen="chosn"), "x.jsonl")
    with pytest.raises(ValueError, match=r"no prompt column 'promt' \(it has: 'prompt', .*columns.prompt.*prompt_separator"):
        preference_rows([GOOD], config(prompt="promt"), "x.jsonl")
    with pytest.raises(ValueError, match=r"data.columns.completion"):
        sft_rows([GOOD], config(completion="answer"), "x.jsonl")


BAD = [
    ({"chosen": None}, "not text", r"'chosen' is None, not text"),
    ({"prompt": 7}, "not text", r"'prompt' is 7, not text"),
    ({"rejected": [{"role": "user"}]}, "not text", r"'rejected' is \[\{'role': 'user'\}\], not text"),
    ({"chosen": "\ud800"}, "invalid Unicode", r"half a surrogate pair"),
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


@pytest.mark.parametrize(
    ("row", "separator", "reason", "message"),
    [({**GOOD, **row}, "", reason, message) for row, reason, message in BAD]
    + [(row, A, reason, message) for row, reason, message in BAD_TRANSCRIPTS],
)
def test_bad_rows_raise_or_are_counted(row, separator, reason, message):
    good = {"chosen": f"Q{A} a", "rejected": f"Q{A} b"} if separator else GOOD
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 1 \(counted from 0\): .*{message}.*--config.data.bad_rows=drop"):
        preference_rows([good, row, good], config(separator), "x.jsonl")
    prompted, dropped = preference_rows([good, row, good], config(separator, "drop"), "x.jsonl")
    assert dropped == {reason: 1}
    assert [kept.row for kept in prompted] == [0, 2]


def test_a_long_bad_value_is_shown_short():
    with pytest.raises(ValueError) as error:
        preference_rows([{**GOOD, "chosen": ["x" * 5000]}], config())
    assert len(str(error.value)) < 400


def test_transcripts_are_split_after_their_last_separator():
    rows = [{"chosen": f"\n\nHuman: a{A} b\n\nHuman: c{A} d", "rejected": f"\n\nHuman: a{A} b\n\nHuman: c{A} e"}]
    prompted, _ = preference_rows(rows, config(A))
    assert prompted == [Prompted(f"\n\nHuman: a{A} b\n\nHuman: c{A}", (" d", " e"), 0)]
    assert sft_rows(rows, config(A))[0] == [Prompted(f"\n\nHuman: a{A} b\n\nHuman: c{A}", (" d",), 0)]


@pytest.mark.parametrize(("chosen", "rejected"), [("Paris ", "London"), ("The sky", "The sky is blue")])
def test_a_prompt_is_never_guessed(chosen, rejected):
    """The longest common prefix would call "The sk" a prompt; a shared beginning belongs to both answers."""
    row = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(ValueError, match="a prompt is never guessed"):
        preference_rows([row], config())
    prompted, _ = preference_rows([{key: f"Q:{value}" for key, value in row.items()}], config("Q:"))
    assert prompted == [Prompted("Q:", (chosen, rejected), 0)]


def test_a_prompt_column_goes_before_the_separator():
    row = {"prompt": "p", "chosen": f"x{A} a", "rejected": f"y{A} b"}
    assert preference_rows([row], config(A))[0] == [Prompted("p", (f"x{A} a", f"y{A} b"), 0)]


def test_the_limit_is_counted():
    prompted, dropped = preference_rows([GOOD] * 5, config(limit=2))
    assert len(prompted) == 2 and dropped == {"beyond data.limit": 3}
    assert not preference_rows([GOOD] * 5, config(limit=9))[1]
    with pytest.raises(ValueError, match="data.limit is -1"):
        preference_rows([GOOD], config(limit=-1))
    with pytest.raises(ValueError, match="data.bad_rows is 'skip'"):
        preference_rows([{**GOOD, "chosen": ""}], config(bad_rows="skip"))
