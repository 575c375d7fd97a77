import bz2
import gzip
import json
import lzma
import os
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignax.data import read_rows, streams
from alignax.data.files import rows_and_faults

ROWS = [
    {"prompt": "Hi,", "chosen": " hello\u2028there", "rejected": " no"},
    {"prompt": "Héé", "chosen": " yes", "rejected": " so\nwhat"},
]


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(text.encode()))
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.jsonl.bz2", "a.json.xz", "a.jsonl.zst"])
def test_every_file_form_gives_the_same_rows(tmp_path, name):
    text = jsonl(ROWS) + "\n\n" if "jsonl" in name else json.dumps(ROWS, indent=1)
    assert read_rows(write(tmp_path / name, text)) == ROWS
    assert read_rows(str(write(tmp_path / ("misnamed" + "".join((tmp_path / name).suffixes[1:])), "\ufeff" + text))) == ROWS


def test_a_dataset_on_disk_gives_the_same_rows_and_several_splits_are_named(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one") == ROWS
    datasets.DatasetDict(train=dataset, dev=dataset).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"several splits \(train, dev\); name one of them, such as .*two:train"):
        read_rows(tmp_path / "two")
    assert read_rows(tmp_path / "two" / "dev") == read_rows(f"{tmp_path}/two:dev") == ROWS
    with pytest.raises(ValueError, match=r"two has no split 'test' \(train, dev\); name one of them, such as .*two:train"):
        read_rows(f"{tmp_path}/two:test")
    with pytest.raises(ValueError, match=r"one is a single data set, without splits; leave out ':dev'"):
        read_rows(f"{tmp_path}/one:dev")
    for name in ("one", "two"):
        write(tmp_path / name / "extra.jsonl", jsonl(ROWS))
        with pytest.raises(ValueError, match=r"written by Dataset\.save_to_disk, but it also holds other files \(extra\.jsonl\)"):
            read_rows(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', r"a\.jsonl, line 3 is not JSON"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json, line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n"text"\n', r"line 2 is 'text', not an object"),
        ("a.json", '[{"a": 1}, null]', r"element 1 \(counted from 0\) is None, not an object"),
        ("a.json", '[{"a": 1},\n]', r"a\.json, line 2 is not JSON: a comma stands before the closing bracket at column 1"),
        ("a.json", '[{"a": 1} {"a": 2}]', r"line 1 is not JSON: Expecting ',' delimiter at column 11"),
        ("a.json", '[{"a": 1}] 2', r"line 1 is not JSON: Extra data"),
        ("a.json", '[{"a": 1}', r"line 1 is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"a": 1}{"a": 2}', r"line 1 is not JSON: Extra data at column 9"),
        ("a.jsonl", '{"a": "b', r"line 1 is not JSON: Unterminated string starting at column 7"),
        ("a.jsonl", '{"a": 1}\r{"a": 2}', r"line 1 is not JSON: Extra data"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"a\.jsonl, row 1 .*line 2 has the key 'a' twice in one object; keep one"),
        ("a.json", '[{"a": [{"b": 1, "b": 2}]}]', r"row 0 .*element 0 .*has the key 'b' twice"),
        (
            "a.json",
            '{"version": 1, "data": [{"a": 1}]}',
            r"is one object, which holds 1 rows under 'data'; to read them write .*a\.json:data",
        ),
        ("a.csv", "a;b\n1;2\n", r"one column, 'a;b', with ';' in it: put commas \(tabs in a \.tsv file\) between columns"),
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
    with pytest.raises(ValueError, match="not written by Dataset.save_to_disk and holds no .json, .jsonl, .ndjson, .csv"):
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
    with pytest.raises(ValueError, match=r"holds several splits \(dev, train\); name one, such as .*:dev"):
        read_rows(tmp_path)
    assert read_rows(f"{tmp_path}:train") == read_rows(f"{tmp_path}:dev") == ROWS
    with pytest.raises(ValueError, match=r"has no split 'test' \(dev, train\)"):
        read_rows(f"{tmp_path}:test")


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
        ("a.csv", "a,b\n1,2,3\n", "row 0 .*: line 2 has 3 columns, but the first line has 2; enclose a value"),
        ("a.csv", "a,b\n", "holds no rows"),
    ],
)
def test_bad_csv(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "lines", "rows"),
    [
        ("a.csv", ['q1,"a', "q2,b", 'q3,"c"'], ["line 2", ["q2", "b"], ["q3", "c"]]),
        ("a.csv", ["q1,x", 'q2,"a', "q3,c"], [["q1", "x"], "line 3", ["q3", "c"]]),
        ("a.csv", ['q1,"a" b', "q2,b"], ["line 2", ["q2", "b"]]),
        ("a.csv", ['q1,"a', 'q2,b",c', "q3,d"], ["line 2", "line 3", ["q3", "d"]]),
        ("a.csv", ['q1,"a', 'b ""c"""', "", 'q2,5" of "it"'], [["q1", 'a\nb "c"'], ["q2", '5" of "it"']]),
        ("a.tsv", ['q1\t"a', 'q2\t"c"', 'q3\tc"'], [["q1", '"a'], ["q2", "c"], ["q3", 'c"']]),
        ("a.tsv", ['q1\t"a', 'b"', "q2\t"], [["q1", "a\nb"], ["q2", ""]]),
    ],
)
def test_quotes_that_do_not_fit_make_a_bad_row_and_swallow_no_other(tmp_path, name, lines, rows):
    found = rows_and_faults(write(tmp_path / name, "\n".join([f"a{',' if name == 'a.csv' else chr(9)}b", *lines])))
    assert [[*row.values()] if isinstance(row, dict) else row.what[:6] for row in found] == rows


def test_a_damaged_data_set_on_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    for file in (next((tmp_path / "one").glob("*.arrow")), tmp_path / "one" / "state.json"):
        whole = file.read_bytes()
        file.write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"the data set in .*one cannot be loaded"):
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
        with pytest.raises(ValueError, match="is not a data set of the hub; write hf://org/name"):
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


def test_every_file_of_a_folder_is_read_or_named(tmp_path):
    row = lambda i: {"a": i}
    names = ["0.jsonl", "1.ndjson", "2.JSONL", "3.jsonl.gz", "4.Json.BZ2", "5.jsonl.xz", "6.jsonl.zst", "7/deep/x.jsonl"]
    for i, name in enumerate(names):
        write(tmp_path / name, jsonl([row(i)]) if "son.b" not in name.lower() else json.dumps([row(i)]))
    for name in ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "7/_SUCCESS", ".git/config"):
        write(tmp_path / name, "no rows")
    (tmp_path / "4.Json.BZ2").write_bytes(bz2.compress(json.dumps([row(4)]).encode()))
    assert read_rows(tmp_path) == [row(i) for i in range(8)]
    write(tmp_path / "7" / "more.txt", "?")
    write(tmp_path / "8.zip", "?")
    with pytest.raises(
        ValueError,
        match=r"holds files that alignax does not read \(7/more\.txt, 8\.zip\); name the files to read, such as '.*/\*\*/\*\.jsonl'",
    ):
        read_rows(tmp_path)
    assert read_rows(f"{tmp_path}/**/*.jsonl") == [row(0), row(7)]
    assert read_rows(f"{tmp_path}/[0-2].*") == [row(0), row(1), row(2)], "sorted"
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_rows(f"{tmp_path}/*.csv")
    (tmp_path / "7" / "circle").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="in a loop of links"):
        read_rows(tmp_path)


def test_the_split_of_a_file_is_told_by_its_name_or_its_folder(tmp_path):
    for name in ("data/train_sft-00000-of-00002.jsonl", "data/train_sft-00001-of-00002.jsonl", "data/train_prefs-00000-of-00001.jsonl"):
        write(tmp_path / "hub" / name, jsonl([{"a": name}]))
    with pytest.raises(ValueError, match=r"holds several splits \(train_prefs, train_sft\)"):
        read_rows(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"holds several splits that are 'train' \(train_prefs, train_sft\)"):
        read_rows(f"{tmp_path}/hub:train")
    assert [row["a"][-14:] for row in read_rows(f"{tmp_path}/hub:train_sft")] == ["0-of-00002.jsonl"[-14:], "1-of-00002.jsonl"[-14:]]
    for name in ("helpful/train.jsonl", "helpful/test.jsonl", "harmless/train.jsonl", "harmless/test.jsonl"):
        write(tmp_path / "hh" / name, jsonl([{"a": name}]))
    with pytest.raises(ValueError, match=r"holds 'test' in several folders \(harmless, helpful\); point to one of them, or name the"):
        read_rows(f"{tmp_path}/hh:test")
    assert read_rows(f"{tmp_path}/hh/helpful:test") == [{"a": "helpful/test.jsonl"}]
    assert read_rows(f"{tmp_path}/hh/*/test.jsonl") == [{"a": "harmless/test.jsonl"}, {"a": "helpful/test.jsonl"}]
    for name in ("train/b.jsonl", "test/a.jsonl"):
        write(tmp_path / "by folder" / name, jsonl([{"a": name}]))
    assert read_rows(f"{tmp_path}/by folder:train") == [{"a": "train/b.jsonl"}]
    write(tmp_path / "a:train", jsonl(ROWS))
    assert read_rows(f"{tmp_path}/a:train") == ROWS, "a path that exists is itself"


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["main/train-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl"], ":train", r"in several folders \(main, socratic\)"),
        (["main/train/0000.jsonl", "socratic/train/0000.jsonl"], "", r"in several folders \(main, socratic\)"),
        (["train_sft.jsonl", "train_prefs.jsonl"], "", r"holds several splits \(train_prefs, train_sft\)"),
        (["train_v1.jsonl", "train_v2.jsonl"], ":train", r"several splits that are 'train' \(train_v1, train_v2\)"),
        ([f"train_{x}-00000-of-00001-0123456789abcdef.jsonl" for x in ("sft", "gen")], ":train", r"\(train_gen, train_sft\)"),
        (["train.jsonl", "heldout.jsonl"], "", r"holds 'train' and files without a split in their names \(heldout.jsonl\); write .*:train"),
        (["train.jsonl", "notice.csv"], "", r"without a split in their names \(notice.csv\)"),
        (["train-00000.jsonl", "train-1.jsonl", "train2.jsonl", "train-2024-05.jsonl"], "", ""),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002-0123456789abcdef.jsonl"], "", ""),
        (["data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl"], "", r"holds 2 of the 3 files of 'train'; .*\*\*/\*.json"),
        (["train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"], ":train", "holds 1 of the 2 files of 'train'; fetch the others"),
        (["train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"], ":test", None),
        (["rows.00001.of.00002.jsonl", "rows.00002.of.00002.jsonl"], "", ""),
        (["train-00000-of-00002.jsonl"], "/*.jsonl", ""),
        (["train/en/a.jsonl", "train/b.jsonl"], "", ""),
        (["license-questions.jsonl", "LICENSE.txt", "README_en.md", "citation"], "", ""),
        (["train.jsonl", "train.parquet"], "", r"holds 'train' in two formats, .*/train.jsonl and .*/train.parquet, .*; name the files"),
        (["train.jsonl", "train.jsonl.gz"], ":train", r"such as .*/train.jsonl or '.*/\*.jsonl.gz', or move the others away"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "train.csv"], "", "holds 'train' in two formats, .*train.csv and .*"),
        (["train-00000-of-00002.jsonl", "train-00000-of-00001.parquet"], ":train", "in two formats"),
        (["train/a.jsonl", "train/a.csv"], "", "holds 'a' in two formats"),
        (["jsonl/rows.jsonl", "parquet/rows.parquet"], "", "holds 'rows' in two formats"),
        (["train.jsonl", "train.csv"], "/*", "holds 'train' in two formats"),
        (["train-2024-05.jsonl", "train-2024-06.JSONL"], "", ""),
        (["a.jsonl", "b.ndjson", "test.csv"], "/[ab].*", ""),
    ],
)
def test_files_are_one_split_by_their_numbers_alone(tmp_path, names, split, message):
    for name in names:
        write(tmp_path / name, jsonl([{"a": name}]))
    if message is None:
        assert read_rows(f"{tmp_path}{split}")
        return
    if not message:
        assert len(read_rows(f"{tmp_path}{split}")) == sum(name.lower().endswith((".jsonl", ".ndjson")) for name in names)
        return
    with pytest.raises(ValueError, match=message):
        read_rows(f"{tmp_path}{split}")


def test_the_cache_of_the_hub_is_read_where_it_holds_one_version(tmp_path):
    blob = write(tmp_path / "blobs" / "0a1b", jsonl(ROWS))
    file = tmp_path / "snapshots" / "abc" / "data" / "train-00000-of-00001.jsonl"
    file.parent.mkdir(parents=True)
    file.symlink_to(blob)
    assert read_rows(tmp_path) == read_rows(f"{tmp_path}:train") == ROWS
    write(tmp_path / "snapshots" / "old" / "x.jsonl", "{}")
    with pytest.raises(ValueError, match="the hub's cache of 2 versions"):
        read_rows(tmp_path)
    write(tmp_path / "refs" / "main", "abc")
    assert read_rows(tmp_path) == ROWS


def test_objects_over_several_lines_and_rows_under_a_key(tmp_path):
    spread = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    assert read_rows(write(tmp_path / "a.json", spread)) == ROWS
    path = write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS}))
    assert read_rows(f"{path}:data") == ROWS
    with pytest.raises(ValueError, match=r"not a single JSON object with a list of rows under 'train'; the file has rows under data"):
        read_rows(f"{path}:train")
    conversation = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]}
    assert read_rows(write(tmp_path / "c.jsonl", json.dumps(conversation))) == [conversation], "one row of an ordinary kind"


def test_arrow_files_and_their_kinds_of_text(tmp_path):
    text = ["a", "b", "a"]
    table = pyarrow.table(
        {"d": pyarrow.array(text).dictionary_encode(), "l": pyarrow.array(text, pyarrow.large_string()), "n": [[["x"]]] * 3}
    )
    rows = [{"d": x, "l": x, "n": [["x"]]} for x in text]
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert read_rows(tmp_path / name) == rows
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(text)] * 2, ["a", "a"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="two columns have the same name"):
        read_rows(tmp_path / "b.parquet")
    assert read_rows(write(tmp_path / "a.tsv", "a\tb\n1,2\t3\n")) == [{"a": "1,2", "b": "3"}]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_grows_without_bound_is_refused_by_name(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(streams, "HARMLESS", 2**20)
    for content in (" ", "[" + " ", '{"a": "', ROWS[0]["prompt"]):
        path = write(tmp_path / f"a.jsonl{suffix}", content + " " * 2**23)
        with pytest.raises(
            ValueError, match=rf"a\.jsonl{suffix} grows from [\d,]+ to more than [\d,]+ bytes .*decompress the file yourself"
        ):
            read_rows(path)
    with pytest.raises(ValueError, match="is a zip archive, which alignax does not read; unpack it"):
        read_rows(write(tmp_path / "b.jsonl", "PK\x03\x04"))


@pytest.mark.parametrize("codec", ["snappy", "zstd"])
def test_columns_that_grow_without_bound_are_refused_by_the_true_cause(codec, tmp_path, monkeypatch):
    """Equal values are stored once, so a kilobyte may hold gigabytes; the file is not damaged, and few rows are decoded at a time."""
    monkeypatch.setattr(streams, "HARMLESS", 2**20)
    table = pyarrow.table({"prompt": ["a"] * 1000, "chosen": [" " * 2**16] * 1000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression=codec)
    assert (tmp_path / "a.parquet").stat().st_size < 2**13
    with pytest.raises(
        ValueError, match=r"^\S*a\.parquet grows from [\d,]+ to more than [4-8],\d{3},\d{3} bytes .*write its rows as JSONL$"
    ):
        read_rows(tmp_path / "a.parquet")
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"a\.arrow grows from .*write its rows as JSONL$"):
        read_rows(tmp_path / "a.arrow")


@pytest.mark.parametrize("mode", ["", "gz", "xz"])
def test_a_tar_archive_is_named_also_where_it_is_compressed(mode, tmp_path):
    with tarfile.open(tmp_path / "a.tgz", f"w:{mode}") as archive:
        archive.add(write(tmp_path / "a.jsonl", jsonl(ROWS)), "a.jsonl")
    with pytest.raises(ValueError, match="a.tgz is a tar archive, which alignax does not read; unpack it"):
        read_rows(tmp_path / "a.tgz")


def test_a_line_too_long_is_a_bad_row_and_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROW", 64)
    path = write(tmp_path / "a.jsonl", jsonl([{"a": 1}, {"a": "x" * 300}, {"a": 2}, {"a": "y" * 54}, {"a": "y" * 55}]))
    rows = rows_and_faults(path)
    assert [row if isinstance(row, dict) else row.reason for row in rows] == [
        {"a": 1},
        "too long",
        {"a": 2},
        {"a": "y" * 54},
        {"a": "y" * 55},
    ]
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1 \(counted from 0\): line 2 has 310 bytes, but a row can have at most"):
        read_rows(path)
    array = [{"a": "x" * 20}] * 9 + [{"a": "x" * 57}]
    assert read_rows(write(tmp_path / "b.json", "\n " + json.dumps(array[:9]))) == array[:9], "an array on one line is no row"
    assert read_rows(f"{write(tmp_path / 'd.json', json.dumps({'data': array[:9]}))}:data") == array[:9], "nor one object of rows"
    with pytest.raises(ValueError, match=r"b\.json, row 9 .*: element 9 \(counted from 0\) has 66 bytes, but a row can have at most 64"):
        read_rows(write(tmp_path / "b.json", json.dumps(array)))


def test_utf_16_and_other_text_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS).encode("utf-16"))
    with pytest.raises(ValueError, match="it begins as UTF-16 does; convert it to UTF-8"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n{"a": "\xe9"}\r\n')
    with pytest.raises(ValueError, match="not UTF-8 text .*in line 2"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": NaN}\r\n')
    assert np.isnan(read_rows(tmp_path / "a.jsonl")[0]["a"]), "as Python and pandas write a missing number"
