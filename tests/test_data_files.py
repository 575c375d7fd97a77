import gzip
import json

import pytest

from alignax.data import read_rows

ROWS = [
    {"prompt": "Hi,", "chosen": " hello\u2028there", "rejected": " no"},
    {"prompt": "Héé", "chosen": " yes", "rejected": " so\nwhat"},
]


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
