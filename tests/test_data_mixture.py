"""Mixtures: exact proportions, every source through its own epochs, and a position as the only state."""

import json

import numpy as np
import pytest
import tiny

from alignax.config import default_config
from alignax.data import Batches, Mixture, concatenate, load, schedule
from alignax.data.mixture import sources


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (0.5, 0.25, 0.25), (0.6, 0.3, 0.07, 0.03), (1 / 3, 2 / 3), (0.001, 0.999)])
def test_the_schedule_is_exact_and_addressed_at_random(weights):
    n, k = 5000, len(weights)
    source, draw = schedule(weights, 0, n)
    for s, weight in enumerate(weights):
        assert draw[source == s].tolist() == list(range((source == s).sum())), "no draw is missed or taken twice"
        drawn = np.cumsum(source == s)
        assert np.abs(drawn - weight * np.arange(1, n + 1)).max() <= max(0.5, k / 2)
    for start, count in ((0, 1), (1, 7), (63, 64), (1234, 500), (n - 1, 1)):
        again, at = schedule(weights, start, count)
        np.testing.assert_array_equal(again, source[start : start + count])
        np.testing.assert_array_equal(at, draw[start : start + count])


def test_the_schedule_far_out_goes_on_from_one_window_to_the_next():
    start = 10**12
    source, draw = schedule((0.7, 0.2, 0.1), start, 1000)
    halves = [schedule((0.7, 0.2, 0.1), start + 500 * i, 500) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([s for s, _ in halves]), source)
    np.testing.assert_array_equal(np.concatenate([d for _, d in halves]), draw)
    assert np.abs(np.bincount(source) - [700, 200, 100]).max() <= 2


def test_the_schedule_is_fixed_for_ever():
    """The schedule of a mixture must never change between releases: a checkpoint stores only the step."""
    assert schedule((0.7, 0.2, 0.1), 0, 20)[0].tolist() == [0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0]
    far = [7 * 10**8, 7 * 10**8 + 1, 2 * 10**8, 7 * 10**8 + 2, 10**8, 7 * 10**8 + 3, 7 * 10**8 + 4, 2 * 10**8 + 1]
    assert schedule((0.7, 0.2, 0.1), 10**9, 8)[1].tolist() == far


def write(path, words):
    rows = [{"prompt": f"{word}?", "chosen": " yes", "rejected": " no"} for word in words]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return write(folder / "a.jsonl", [f"a{i}" for i in range(12)]), write(folder / "b.jsonl", [f"b{i}" for i in range(5)])


def read(spec, field="train", **changes):
    data = default_config().data
    data.update({field: spec, **changes})
    return load(field, data, tiny.tokenizer(), 96)


def test_batches_of_a_mixture(files):
    loaded = read(f"{files[0]}@3,{files[1]}@1")
    assert loaded.mixture == Mixture((12, 5), (0.75, 0.25), files) and len(loaded.examples) == 17
    batches = Batches(loaded.examples, 8, 1, 16, loaded.mixture)
    rows = np.stack([batches.rows(step) for step in range(30)])
    assert ((rows >= 12).sum(1) == 2).all(), "each batch has the share exactly, where it divides"
    for first, count in ((0, 12), (12, 5)):
        drawn = rows[(rows >= first) & (rows < first + count)]
        epochs = drawn[: len(drawn) // count * count].reshape(-1, count)
        assert (np.sort(epochs) == first + np.arange(count)).all() and len({tuple(e) for e in epochs}) > 3
    again = Batches(loaded.examples, 8, 1, 16, loaded.mixture)
    np.testing.assert_array_equal(again.rows(17), rows[17])
    assert batches.steps(1) == 3, "an epoch is as many draws as there are rows"
    assert loaded.mixture.lines(24) == [
        f"75.0% of the examples from {files[0]}: 12 rows, each used 1.50 times",
        f"25.0% of the examples from {files[1]}: 5 rows, each used 1.20 times",
    ]
    tokens = batches.batch(3)["tokens"]
    hosts = [batches.batch(3, slice(4 * h, 4 * h + 4))["tokens"] for h in range(2)]
    np.testing.assert_array_equal(np.concatenate(hosts), tokens)


def test_sources_of_one_size_have_orders_of_their_own(files, tmp_path):
    other = write(tmp_path / "c.jsonl", [f"c{i}" for i in range(12)])
    loaded = read(f"{files[0]}@1,{other}@1")
    rows = Batches(loaded.examples, 24, 0, 16, loaded.mixture).rows(0)
    assert set(rows) == set(range(24)) and (rows[rows < 12] != rows[rows >= 12] - 12).any()


def test_sources_without_weights_are_one_set_of_rows(files):
    loaded = read(",".join(files))
    assert loaded.mixture is None and list(loaded.reports) == list(files)
    assert loaded.examples.prompts == [f"a{i}?" for i in range(12)] + [f"b{i}?" for i in range(5)]
    alone = read(files[1]).examples
    np.testing.assert_array_equal(loaded.examples.tokens[-len(alone.tokens) :], alone.tokens)
    np.testing.assert_array_equal(loaded.examples.prompt_lengths[-10:], alone.prompt_lengths)
    assert read(",".join(files), "eval").mixture is None


def test_a_path_that_exists_is_itself(tmp_path):
    path = write(tmp_path / "a,b@2", ["x"])
    assert sources(path) == [(path, None)]
    assert sources(f"{write(tmp_path / 'c@3', 'y')},d.jsonl") == [(str(tmp_path / "c@3"), None), ("d.jsonl", None)]
    assert sources("hf://org/name:train@2,b.jsonl@0.5") == [("hf://org/name:train", 2.0), ("b.jsonl", 0.5)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a@1,b", "gives some sources a weight and others none"),
        ("a@0,b@1", "the weight of 'a@0' is '0'; write a positive number"),
        ("a@-1,b@1", "is '-1'"),
        ("a@nan,b@1", "is 'nan'"),
        ("a@inf,b@1", "is 'inf'"),
        ("a@x,b@1", "is 'x'"),
        ("a,,b", "has an empty or a repeated source"),
        ("a@1,a@2", "has an empty or a repeated source"),
    ],
)
def test_bad_lists_of_sources(spec, message):
    with pytest.raises(ValueError, match=rf"data\.train.*{message}"):
        sources(spec)


def test_sources_must_fit_one_another_and_evaluation_takes_no_weights(files, tmp_path):
    for split in ("eval", "ood"):
        with pytest.raises(ValueError, match=rf"data\.{split} .*evaluation uses every row once; leave the weights out"):
            read(f"{files[0]}@1,{files[1]}@1", split)
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(json.dumps({"prompt": "p", "completions": ["a", "b", "c"]}))
    pair = tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"the sources differ in their responses \(3 and 2\)"):
        read(f"{ranked},{pair}", kind="ranked")


def test_only_training_rows_have_an_order(tmp_path):
    rows = [{"prompt": "p", "chosen": f" {i}", "rejected": " b", "length": -i} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "length"}) for row in rows))
    data = default_config().data
    data.update(train=str(tmp_path / "a.jsonl"), eval=str(tmp_path / "b.jsonl"), order="length")
    train, evaluation = (load(split, data, tiny.byte_tokenizer(), 300).examples for split in ("train", "eval"))
    assert train.order is not None and train.order.tolist() == [0, -1, -2] and evaluation.order is None
    both = concatenate([train, train])
    assert both.order is not None and both.order.tolist() == [0, -1, -2] * 2
    data.update(kind="unpaired")
    with pytest.raises(ValueError, match="data.order would put the two rows of a pair next to each other"):
        load("train", data, tiny.byte_tokenizer(), 300)
