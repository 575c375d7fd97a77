import json
import struct
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignax.data import columns, read_rows, streams

PEAK = """
import json, resource, sys
import datasets, pyarrow.parquet
from alignax.data import read_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, said = peak(), []
for name in sys.argv[1:]:
    try:
        read_rows(name)
    except ValueError as e:
        said.append(str(e))
print(json.dumps([said, peak() - before]))
"""
ANY = lambda _: None


def write(path, table, new=pyarrow.ipc.new_file, codec=None):
    with new(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    return path


def repeated(count, size):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), pyarrow.array(["a" * size]))


@pytest.mark.slow
def test_a_small_file_of_columns_is_refused_before_it_is_unpacked(tmp_path):
    """Files of up to 1.7 MB hold from 80 MB to 16 GB; a process takes less than 100 MiB to find that out of all of them."""
    large = pyarrow.table({"prompt": ["a" * (200 << 20)]})
    files = [write(tmp_path / "zstd.arrow", large, codec="zstd"), write(tmp_path / "lz4.arrow", large, pyarrow.ipc.new_stream, "lz4")]
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "data-00000-of-00001.arrow", large, pyarrow.ipc.new_stream, "zstd")
    dictionary = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0], pyarrow.int32()), large["prompt"].combine_chunks())
    files += [tmp_path / "saved", write(tmp_path / "dictionary.arrow", pyarrow.table({"prompt": dictionary}), codec="zstd")]
    files.append(write(tmp_path / "repeated.arrow", pyarrow.table({"prompt": repeated(200_000, 80_000)})))
    files.append(write(tmp_path / "nulls.arrow", pyarrow.table({"prompt": pyarrow.nulls(2_000_000_000)})))
    everything = pyarrow.ListViewArray.from_arrays([0] * 20_000, [100_000] * 20_000, pyarrow.array(np.zeros(100_000, np.int8)))
    files.append(write(tmp_path / "views.arrow", pyarrow.table({"prompt": everything})))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": repeated(200, 24 << 20)}), tmp_path / "repeated.parquet", compression="zstd")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.nulls(20_000_000, pyarrow.int32())}), tmp_path / "nulls.parquet")
    files.append(tmp_path / "nulls.parquet")
    assert sum(file.stat().st_size for file in files if file.is_file()) < 4e6
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, files)], capture_output=True, text=True, check=True)
    said, peak = json.loads(done.stdout)
    for file, line in zip(files, said, strict=True):
        assert line.startswith(f"{file} grows from ") and line.endswith("if you expect this size, write its rows as JSONL"), line
        assert "\n" not in line
    assert "to more than 209,715,2" in said[0] and "to more than 16,000,000,000 bytes" in said[5], said
    assert peak < 100, peak
    with pytest.raises(ValueError, match=r"repeated\.parquet grows from [\d,]+ to more than 251,6\d\d,\d{3} bytes"):
        read_rows(tmp_path / "repeated.parquet")  # ten rows are decoded, and not 64


def test_sizes_are_those_of_the_values_in_python():
    text, lists = ["ab", None, "", "abcd"], [[1, 2], [], None, [3]]
    of = lambda array: columns.sizes(array, ANY).tolist()
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary()):
        assert of(pyarrow.array(text, kind)) == [10, 8, 8, 12], kind
        assert of(pyarrow.array(text, kind)[1:]) == [8, 8, 12], kind
    assert of(pyarrow.array(text).dictionary_encode()) == [10, 10, 8, 12], "a null counts as the first value"
    for kind in (pyarrow.list_, pyarrow.large_list, pyarrow.list_view, pyarrow.large_list_view):
        assert of(pyarrow.array(lists, kind(pyarrow.int8()))) == [24, 8, 8, 16], kind
        assert of(pyarrow.array(lists, kind(pyarrow.int8()))[2:]) == [8, 16], kind
    assert of(pyarrow.array([[True, False]] * 3, pyarrow.list_(pyarrow.bool_(), 2))[1:]) == [24, 24]
    assert of(pyarrow.array([{"a": "x", "b": 1}, {"a": "xyz", "b": None}])) == [25, 27]
    assert of(pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8()))) == [33, 8]
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([2, 5], pyarrow.int32()), pyarrow.array(["a", "bcd"]))
    assert of(runs) == [9, 9, 11, 11, 11] and of(runs[1:4]) == [9, 11, 11]
    assert of(pyarrow.nulls(3)) == [8, 8, 8] and of(pyarrow.array([b"abc"], pyarrow.binary(3))) == [11]
    tags = pyarrow.array([0, 1], pyarrow.int8())
    union = pyarrow.UnionArray.from_dense(tags, pyarrow.array([0, 0], pyarrow.int32()), [pyarrow.array([1]), pyarrow.array(["abc"])])
    assert of(union) == [19, 19], "as the largest value of any kind"


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_every_kind_of_value_is_read_as_pyarrow_reads_it(codec, tmp_path):
    texts, size = ["a" * 300, "b", None] * 40, 120
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([100, size], pyarrow.int32()), pyarrow.array(["a", "b"]))
    table = pyarrow.table(
        {"runs": runs, "view": pyarrow.array(texts, pyarrow.string_view()), "dictionary": pyarrow.array(texts).dictionary_encode()}
        | {"lists": [[{"role": "user", "content": text}] for text in texts], "nulls": pyarrow.nulls(size), "flag": [True] * size}
    )
    for name, new in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        assert read_rows(write(tmp_path / name, table, new, codec)) == table.to_pylist()
    pyarrow.parquet.write_table(table.drop_columns("runs"), tmp_path / "a.parquet", compression=codec or "none", data_page_size=64)
    assert read_rows(tmp_path / "a.parquet") == table.drop_columns("runs").to_pylist()


def test_the_sizes_of_pages_are_read_from_their_headers(tmp_path):
    """What a footer says of its pages may be wrong; a page of n values and b bytes counts as max(b, 4 n) bytes."""
    numbers = pyarrow.table({"x": pyarrow.array(np.arange(1000, dtype=np.int64))})
    for version in ("1.0", "2.0"):
        pyarrow.parquet.write_table(
            numbers, tmp_path / "a.parquet", use_dictionary=False, data_page_size=800, write_batch_size=100, data_page_version=version
        )
        content = (tmp_path / "a.parquet").read_bytes()
        file = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
        pages = [*columns._pages(content, file.metadata.row_group(0))]
        assert len(pages) == 10 and all(800 <= page < 820 for page in pages), pages


def test_a_length_that_a_buffer_claims_is_refused_whatever_it_is(tmp_path):
    """The length in front of a buffer is what pyarrow allocates."""
    file = write(tmp_path / "a.arrow", pyarrow.table({"prompt": ["a" * 5003]}), codec="zstd")
    content, claimed = file.read_bytes(), struct.pack("<q", 5003)
    at = content.rindex(claimed)  # after the metadata, in which the length stands, too, as a buffer's own
    for length in (1 << 40, (1 << 63) - 1, -2):
        file.write_bytes(content[:at] + struct.pack("<q", length) + content[at + 8 :])
        with pytest.raises(streams.Grown, match=r"a\.arrow grows from [\d,]+ to more than [\d,]{15,} bytes"):
            read_rows(file)
