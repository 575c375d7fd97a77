import gzip
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
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
        ("a.json", '[{"a": 1}, null]', r"element 1 \(counted from 0\) is None, not an object"),
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
    with pytest.raises(ValueError, match="not written by Dataset.save_to_disk and holds no .json, .jsonl, .csv, .parquet files"):
        read_rows(tmp_path)
    whole = gzip.compress(jsonl(ROWS * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz is a damaged gzip file"):
        read_rows(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_and_csv_give_the_same_rows(tmp_path):
    assert read_rows(parquet(tmp_path / "a.parquet", ROWS)) == ROWS
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    table = "\r\n".join(",".join(map(quoted, row)) for row in [list(ROWS[0]), *(row.values() for row in ROWS)])
    for name in ("a.csv", "a.csv.gz", "A.CSV"):
        assert read_rows(write(tmp_path / name, table)) == ROWS, "commas and line ends inside quotes"


def test_values_of_csv_stay_text_and_those_of_parquet_their_type(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", "prompt,n,label\n007,,true\nnull,NaN,1\n")) == [
        {"prompt": "007", "n": "", "label": "true"},
        {"prompt": "null", "n": "NaN", "label": "1"},
    ]
    rows = [{"messages": [{"role": "user", "content": "hi"}], "label": True, "margin": 0.5}]
    assert read_rows(parquet(tmp_path / "a.parquet", rows)) == rows


def test_a_row_of_csv_longer_than_a_block_of_the_parser(tmp_path):
    assert len(read_rows(write(tmp_path / "a.csv", f"a,b\n{'x' * 3_000_000},y\n"))[0]["a"]) == 3_000_000


def test_a_folder_of_files_is_one_split_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "train-00000.jsonl", jsonl(ROWS[:1]))
    parquet(tmp_path / "train-00001.parquet", ROWS[1:])
    write(tmp_path / "README.md", "# not data")
    write(tmp_path / ".train-00000.jsonl.swp.jsonl", "left over")
    assert read_rows(tmp_path) == ROWS
    write(tmp_path / "dev.jsonl", jsonl(ROWS))
    with pytest.raises(
        ValueError, match=r"several splits \(dev.jsonl, train-00000.jsonl, train-00001.parquet\); point to one of the files"
    ):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_damaged_bytes_are_a_value_error_whatever_they_are(tmp_path, name):
    """Cuts, flipped bytes and noise: rows or a `ValueError`, and nothing else."""
    rng = np.random.default_rng(0)
    if name == "a.parquet":
        whole = parquet(tmp_path / name, ROWS * 4).read_bytes()
    elif ".csv" in name:
        whole = write(tmp_path / name, "a,b\n" + '"x, y",z\n' * 20).read_bytes()
    else:
        whole = write(tmp_path / name, jsonl(ROWS * 4)).read_bytes()
    damaged = [b"", whole[:4], whole[:-1], whole[: len(whole) // 2], b"[" * 100_000, b"[" + b"9" * 5000 + b"]", rng.bytes(200), b"PAR1PAR1"]
    for place in rng.integers(0, len(whole), 60):
        damaged.append(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        try:
            read_rows(tmp_path / name)
        except ValueError as error:
            refused += 1
            assert str(tmp_path / name) in str(error) and len(str(error)) < 1000
    assert refused >= 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,a\n1,2\n", "two columns have the same name"),
        ("a.csv", "a,b\n1,2,3\n", "no readable CSV file .*Expected 2 columns, got 3"),
        ("a.csv", "a,b\n", "holds no rows"),
    ],
)
def test_bad_csv(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


def test_a_damaged_data_set_on_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    for file in (next((tmp_path / "one").glob("*.arrow")), tmp_path / "one" / "state.json"):
        whole = file.read_bytes()
        file.write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"the data set in .*one does not load"):
            read_rows(tmp_path / "one")
        file.write_bytes(whole)
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_dict.json is damaged"):
        read_rows(tmp_path)


def test_a_hub_is_asked_only_by_its_prefix(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        one = datasets.Dataset.from_list(ROWS)
        if split:
            return one
        return datasets.DatasetDict({"train": one, "test": one} if name == "org/two" else {"train": one})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("hf://org/one") == read_rows("hf://org/one:train") == read_rows("hf://org/one:main:train") == ROWS
    assert asked == [("org/one", None, None), ("org/one", None, "train"), ("org/one", "main", "train")]
    with pytest.raises(ValueError, match=r"hf://org/two holds several splits \(train, test\); name one, such as hf://org/two:train"):
        read_rows("hf://org/two")
    asked.clear()
    with pytest.raises(ValueError, match="no file or folder 'org/one'.*for a data set of the Hugging Face hub write hf://org/one"):
        read_rows("org/one")
    for wrong in ("hf://", "hf://a/b/c", "hf://a/b:c:d:e", "hf://a/b:"):
        with pytest.raises(ValueError, match="is no data set of the hub; write hf://org/name"):
            read_rows(wrong)
    assert not asked


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach\n'org/one' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"hf://org/one could not be fetched \(Couldn't reach 'org/one' on the Hub\); check the name and the"
    ):
        read_rows("hf://org/one")


def test_a_hub_without_a_network_is_a_value_error():
    """The real `load_dataset`; the suite runs with HF_DATASETS_OFFLINE, and every connection is refused."""
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    with pytest.raises(ValueError, match="hf://alignax-tests/nowhere could not be fetched"):
        read_rows("hf://alignax-tests/nowhere")
