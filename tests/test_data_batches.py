import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers

from alignax.data import Batches, Examples, Mixture, assemble, decode_example, evaluation_batch, padded_length

ORDER_0 = [0, 2, 9, 1, 8, 5, 4, 3, 10, 6, 7]
ORDER_MILLION = [5, 8, 9, 3, 6, 10, 7, 2, 1, 0, 4]
FIELDS = ("tokens", "mask", "completion_mask")


def make(n=11, N=2, seed=0, **fields):
    """Examples of 1 to 4 prompt and 1 to 6 completion tokens; ids from 0, so that a real token may be 0, as padding is."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(1, 5, n), N)
    lengths = prompts + rng.integers(1, 7, n * N)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(0, 9, offsets[-1]).astype(np.int32)
    scored = np.concatenate([np.arange(size) >= prompt for size, prompt in zip(lengths, prompts, strict=True)])
    return Examples(tokens, scored, offsets, N, [f"p{i}" for i in range(n)], fields)


@pytest.mark.parametrize("N", [1, 2, 3])
def test_a_batch_holds_the_tokens_of_its_rows(N):
    examples = make(N=N)
    batch = assemble(examples, np.asarray([4, 0, 10]), 12)
    assert [batch[key].dtype for key in FIELDS] == [np.int32, bool, bool]
    assert all(batch[key].shape == (3, N, 12) for key in FIELDS) and set(batch) == set(FIELDS)
    for b, row in enumerate([4, 0, 10]):
        for n in range(N):
            a, z = examples.offsets[row * N + n], examples.offsets[row * N + n + 1]
            prompt, size = examples.prompt_lengths[row * N + n], z - a
            np.testing.assert_array_equal(batch["tokens"][b, n], [*examples.tokens[a:z], *[0] * (12 - size)])
            np.testing.assert_array_equal(batch["mask"][b, n], [t < size for t in range(12)])
            np.testing.assert_array_equal(batch["completion_mask"][b, n], [prompt <= t < size for t in range(12)])


def test_four_hosts_together_are_one_host_and_a_step_is_addressed_at_random():
    batches = Batches(make(29), batch_size=8, seed=3, length=16)
    again = Batches(make(29), batch_size=8, seed=3, length=16)
    walked = [batches.batch(step) for step in range(20)]
    for step in (19, 0, 7):
        whole = again.batch(np.int32(step))
        hosts = [again.batch(step, slice(2 * h, 2 * h + 2)) for h in range(4)]
        for key in FIELDS:
            np.testing.assert_array_equal(whole[key], walked[step][key])
            np.testing.assert_array_equal(np.concatenate([host[key] for host in hosts]), whole[key])


@pytest.mark.parametrize("batch_size", [1, 4, 8, 40])
def test_every_epoch_has_every_example_once_and_an_order_of_its_own(batch_size):
    n = 29
    batches = Batches(make(n), batch_size, seed=1, length=16)
    stream = np.concatenate([batches.rows(step) for step in range(4 * n // batch_size + 1)])
    epochs = stream[: 3 * n].reshape(3, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(n))}) == 4
    other = np.concatenate([Batches(make(n), batch_size, 2, 16).rows(step) for step in range(n // batch_size + 1)])
    assert (other[:n] != stream[:n]).any()


def test_the_order_is_fixed_for_ever():
    """A checkpoint stores only the step, so the order must never change between releases of alignax or NumPy."""
    batches = Batches(make(11), batch_size=11, seed=0, length=16)
    assert batches.rows(0).tolist() == ORDER_0 and batches.rows(10**6).tolist() == ORDER_MILLION


def test_without_shuffling_the_order_is_that_of_the_file():
    batches = Batches(make(5), batch_size=3, seed=0, length=16, shuffle=False)
    assert [batches.rows(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_curriculum_orders_the_first_epoch_alone_and_ties_lie_as_in_the_file():
    order = np.array([3, 1, 2, 1, 9, -4, 2, 0, 5, 1, 2], np.float64)
    expected = [5, 7, 1, 3, 9, 2, 6, 10, 0, 8, 4]
    examples = dataclasses.replace(make(11), order=order)
    batches = Batches(examples, 4, seed=0, length=16)
    stream = np.concatenate([batches.rows(step) for step in range(6)])
    assert stream[:11].tolist() == expected
    assert stream[11:22].tolist() == np.concatenate([Batches(make(11), 4, 0, 16).rows(step) for step in range(6)])[11:22].tolist()
    np.testing.assert_array_equal(Batches(examples, 4, seed=0, length=16).rows(1), stream[4:8])  # a resumed run starts anywhere
    mixed = Batches(examples, 2, 0, 16, Mixture((5, 6), (0.5, 0.5), ("a", "b")))
    rows = np.concatenate([mixed.rows(step) for step in range(5)])
    assert rows[rows < 5].tolist() == [1, 3, 2, 0, 4] and rows[rows >= 5].tolist() == [5, 7, 9, 6, 10]
    drawn = Batches(examples, 11, 0, 16, bootstrap=True).rows(0)
    assert (np.diff(order[drawn]) >= 0).all()
    assert sorted(drawn) == sorted(Batches(make(11), 11, 0, 16, bootstrap=True).rows(0)), "the same sample"
    assert len({batches.digest(), Batches(make(11), 4, 0, 16).digest(), Batches(make(11), 4, 0, 16, shuffle=False).digest()}) == 3


def test_steps_of_epochs():
    batches = Batches(make(10), batch_size=4, seed=0, length=16)
    assert batches.steps(1) == 3 and batches.steps(2) == 5 and batches.steps(0.4) == 1 and batches.steps(0.5) == 2
    assert Batches(make(10), 5, 0, 16).steps(1) == 2
    assert 0.07 * 100 > 7 and Batches(make(100), 1, 0, 16).steps(0.07) == 7


def test_evaluation_has_all_examples_in_order_and_fills_up_with_padding_rows():
    examples = make(11)
    batches = [evaluation_batch(examples, i, 4, 16) for i in range(3)]
    assert [batch["tokens"].shape for batch in batches] == [(4, 2, 16)] * 3
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in FIELDS}
    expected = assemble(examples, np.arange(11), 16)
    for key in FIELDS:
        np.testing.assert_array_equal(joined[key][:11], expected[key])
        assert not joined[key][11:].any()
        hosts = [[evaluation_batch(examples, i, 4, 16, slice(2 * h, 2 * h + 2)) for i in range(3)] for h in range(2)]
        for step, batch in enumerate(batches):
            np.testing.assert_array_equal(np.concatenate([host[step][key] for host in hosts]), batch[key])


def test_padded_length_and_its_errors():
    examples = make()
    longest = int(examples.lengths.max())
    assert padded_length(examples, 1) == longest and padded_length(examples, longest) == longest
    assert padded_length(examples) % 8 == 0 and 0 <= padded_length(examples) - longest < 8
    with pytest.raises(ValueError, match=rf"batches of {longest - 1} tokens do not hold the longest row of {longest}; use "):
        Batches(examples, 4, 0, longest - 1)
    with pytest.raises(ValueError, match="the batch size is 0"):
        Batches(examples, 0, 0, 16)
    with pytest.raises(ValueError, match="the data seed is -1"):
        Batches(examples, 4, -1, 16)


def test_decode_example_shows_what_is_scored():
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "sky", "is", "blue", "round"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokens = np.asarray([0, 2, 3, 4, 1, 0, 2, 3, 5], np.int32)
    scored = np.asarray([0, 0, 0, 1, 1, 0, 0, 0, 1], bool)
    examples = Examples(tokens, scored, np.asarray([0, 5, 9]), 2, ["sky is"])
    chosen, rejected = decode_example(examples, 0, tokenizer).split("example 0, ")[1:]
    assert chosen.startswith("response 0: 3 prompt tokens, 2 scored, 3 padding\n")
    assert "tokens      <s> sky is [blue] [</s>] (padding x 3)" in chosen and "completion  'blue </s>'" in chosen
    assert "tokens      <s> sky is [round] (padding x 4)" in rejected and "prompt      '<s> sky is'" in rejected


def test_further_fields_go_with_their_rows_and_padding_rows_have_none():
    margin, labels = np.arange(1, 12, dtype=np.float32), np.ones((11, 2), bool)
    examples = make(margin=margin, labels=labels)
    batch = assemble(examples, np.asarray([4, 0, 10]), 12)
    assert batch["margin"].tolist() == [5, 1, 11] and batch["margin"].dtype == np.float32
    assert batch["labels"].shape == (3, 2) and batch["labels"].dtype == bool
    last = evaluation_batch(examples, 2, 4, 12)
    assert last["margin"].tolist() == [9, 10, 11, 0] and last["labels"].tolist() == [[True, True]] * 3 + [[False, False]]
    assert evaluation_batch(examples, 2, 4, 12, slice(2, 4))["margin"].tolist() == [11, 0]
    assert margin[0] == 1 and labels.all(), "the examples themselves are left alone"
    nothing = Batches(examples, 4, 0, 16).batch(0, slice(0))
    assert {name: x.shape for name, x in nothing.items()} == {
        "tokens": (0, 2, 16), "mask": (0, 2, 16), "completion_mask": (0, 2, 16), "margin": (0,), "labels": (0, 2)
    }  # fmt: skip


def test_the_digest_covers_all_that_batches_are_made_of():
    base = dict(batch_size=4, seed=0, length=16)
    digest = lambda examples, mixture=None, **changes: Batches(examples, **base | changes, mixture=mixture).digest()
    examples = make(margin=np.ones(11, np.float32))
    scored = examples.scored.copy()
    scored[examples.prompt_lengths[0]] = False
    changed = [
        examples,
        make(margin=np.zeros(11, np.float32)),
        make(),
        make(n=10, margin=np.ones(10, np.float32)),
        dataclasses.replace(examples, scored=scored),
        dataclasses.replace(examples, tokens=examples.tokens[::-1].copy()),
    ]
    mixtures = [Mixture(sizes, weights, ("a", "b")) for sizes in ((5, 6), (6, 5)) for weights in ((0.5, 0.5), (0.25, 0.75))]
    digests = [digest(e) for e in changed] + [digest(examples, m) for m in mixtures] + [digest(examples, length=24)]
    assert len(set(digests)) == len(digests)
    assert digest(make(margin=np.ones(11, np.float32))) == digests[0]
    assert digest(examples, mixtures[0]._replace(paths=("c", "d"))) == digest(examples, mixtures[0]), "where files lie makes no batch"
