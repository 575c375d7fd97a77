import numpy as np
import pytest
import tokenizers
import transformers

from alignax.config import default_config
from alignax.data import Prompted, Rejected, assemble, bounds, load_examples, padded_length, tokenize, tokens
from alignax.data.tokens import BOS_INSIDE, prompt_ids

SENTENCES = ["Hello world, the world is round.", "the sky is blue and the sea is blue", "a cat, a hat, a world of cats"] * 4


def make(template="<s> $A", bos: str | None = "<s>", eos: str | None = "</s>"):
    """A byte-level BPE tokenizer, trained here, whose pad token is its EOS."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(SENTENCES, trainer)
    if template:
        model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos, pad_token=eos)


@pytest.fixture(scope="module")
def bos():
    return make()


@pytest.fixture(scope="module")
def bare():
    return make(template="")


def run(rows, tokenizer, max_length=64, max_prompt_length=0, bad_rows="error", path="data", dropped=(), **options):
    rejected = Rejected(path, bad_rows)
    rejected.counts.update(dict(dropped))
    rows = [Prompted(prompt, completions, i) for i, (prompt, *completions) in enumerate(rows)]
    rows = [row._replace(completions=tuple(row.completions)) for row in rows]
    options = {"vocab_size": 512, "rejected": rejected, **options}
    return tokenize(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, **options)


def sides(examples):
    """(prompt ids, completion ids) of each side."""
    spans = zip(examples.offsets[:-1], examples.offsets[1:], examples.prompt_lengths, strict=True)
    return [(examples.tokens[a : a + p].tolist(), examples.tokens[a + p : b].tolist()) for a, b, p in spans]


def test_prompt_and_completion_with_one_eos(bos):
    examples, report = run([("the sky", " is blue", " is round")], bos)
    ids = bos("the sky is blue")["input_ids"]
    assert ids[0] == 0 and bos("the sky")["input_ids"] == ids[: (prompt := len(bos("the sky")["input_ids"]))]
    assert sides(examples)[0] == (ids[:prompt], [*ids[prompt:], 1])
    assert sides(examples)[1][0] == ids[:prompt]
    assert examples.N == 2 and len(examples) == 1
    assert examples.tokens.dtype == np.int32 and examples.offsets.dtype == np.int64 and examples.scored.dtype == np.bool_
    assert examples.prompts == ["the sky"]
    assert (report.rows, report.kept, report.dropped, report.boundary_merges) == (1, 1, {}, 0)
    assert report.tokens == len(examples.tokens) and report.longest == examples.lengths.max()
    assert report.completion_tokens == sum(len(completion) for _, completion in sides(examples))


def test_a_merge_over_the_boundary_moves_it_to_the_common_prefix(bare):
    prompt_ids = bare("the wor")["input_ids"]
    merged, apart = bare("the world")["input_ids"], bare("the wor x")["input_ids"]
    assert merged[: len(prompt_ids)] != prompt_ids and apart[: len(prompt_ids)] == prompt_ids
    examples, report = run([("the wor", "ld", " x"), ("the", " cat", " hat")], bare)
    (shared, chosen), (other, rejected), *_ = sides(examples)
    assert shared == other == prompt_ids[: len(shared)] and 0 < len(shared) < len(prompt_ids)
    assert shared + chosen == [*merged, 1]
    assert shared + rejected == [*apart, 1]
    assert report.boundary_merges == 1 and any("1 (50.0% of rows)" in line for line in report.lines())


@pytest.mark.parametrize("template", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>", "</s>\n", "</s> \n\n"])
def test_exactly_one_eos_whoever_adds_it(template, ending):
    tokenizer = make(template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples, report = run([("the", f" cat{ending}", " hat")], tokenizer)
    for prompt, completion in sides(examples):
        assert completion.count(1) == 1 and completion[-1] == 1 and len(completion) > 1
        assert 1 not in prompt and (prompt[0] == 0) == template.startswith("<s>")
    assert report.eos_inside == 0 and report.boundary_merges == 0 and report.ends_written == bool(ending)


def test_an_eos_in_the_texts_is_kept_and_counted(bos):
    examples, report = run([("the</s>", " a</s> cat", " hat")], bos)
    (prompt, chosen), (_, rejected) = sides(examples)
    assert prompt[-1] == 1  # the prompt's own EOS is prompt
    assert chosen.count(1) == 2 and rejected.count(1) == 1
    assert report.eos_inside == 1


def test_a_text_that_has_an_end_gets_no_other(bos):
    """The EOS is added to texts without an end; any other end token of the model counts as an end."""
    end = bos.convert_tokens_to_ids("<s>")
    examples, report = run([("the", " cat<s>", " hat")], bos, ends=[end])
    (_, chosen), (_, rejected) = sides(examples)
    assert chosen[-1] == end and 1 not in chosen and rejected[-1] == 1 and end not in rejected
    assert report.eos_inside == 0 and run([("the", " cat<s>", " hat")], bos)[1].eos_inside == 0


def test_masks_come_from_lengths_where_pad_is_eos(bos):
    examples, _ = run([("the</s> sky", " is", " is blue and round")], bos)
    batch = assemble(examples, np.asarray([0]), padded_length(examples))
    for n, (prompt, completion) in enumerate(sides(examples)):
        tokens, mask, scored = (batch[key][0, n] for key in ("tokens", "mask", "completion_mask"))
        assert tokens[mask].tolist() == prompt + completion and 1 in prompt
        assert tokens[scored].tolist() == completion and completion[-1] == bos.pad_token_id


def test_a_long_prompt_keeps_its_end_and_the_bos(bos, bare):
    text = "the sky is blue and the sea is blue and round"
    for tokenizer, head in ((bos, [0]), (bare, [])):
        whole = tokenizer(text)["input_ids"]
        examples, report = run([(text, " a", " b"), ("the", " a", " b")], tokenizer, max_prompt_length=5)
        assert sides(examples)[0][0] == head + whole[-5 + len(head) :] and report.prompts_cut == 1
    assert sides(run([(text, " a", " b")], bos, max_prompt_length=1)[0])[0][0] == [0]
    whole = len(bos(text)["input_ids"])
    assert run([(text, " a", " b")], bos, max_prompt_length=whole)[1].prompts_cut == 0


def test_a_cut_completion_has_no_eos_and_is_counted(bos):
    prompt, long = len(bos("the")["input_ids"]), bos("the sky is blue")["input_ids"]
    examples, report = run([("the", " sky is blue", " x")], bos, max_length=len(long))
    (_, chosen), (_, rejected) = sides(examples)
    assert chosen == long[prompt:] and 1 not in chosen  # there was room for all but the EOS
    assert rejected[-1] == 1
    assert report.completions_cut == 1 and report.longest == len(long)
    assert run([("the", " sky is blue", " x")], bos, max_length=len(long) + 1)[1].completions_cut == 0


def test_pairs_identical_after_the_cut_are_dropped_and_counted(bos):
    size = len(bos("the sky is")["input_ids"])
    rows = [("the", " sky is blue", " sky is round"), ("", "a", "b")]
    examples, report = run(rows, bos, max_length=size)
    assert report.dropped == {"identical after the cut": 1} and report.kept == 1
    assert examples.prompts == [""] and report.completions_cut == 0
    assert run([("the", " sky is blue")], bos, max_length=size)[1].kept == 1  # one completion has no other to equal


def test_a_prompt_that_leaves_no_room_is_a_bad_row(bos):
    rows = [("the", " a", " b"), ("the sky is blue and the sea is blue", " a", " b")]
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 .*prompt of \d+ tokens leaves no room within max_length 4; set data.max_p"):
        run(rows, bos, max_length=4, path="x.jsonl")
    examples, report = run(rows, bos, max_length=4, bad_rows="drop", dropped={"not text": 2})
    assert report.dropped == {"not text": 2, "prompt leaves no room": 1}
    assert report.rows == 4 == report.kept + sum(report.dropped.values()) and len(examples) == 1
    assert run(rows, bos, max_length=4, max_prompt_length=3)[1].kept == 2
    exact = len(bos(rows[1][0])["input_ids"])
    assert run(rows, bos, max_length=exact, bad_rows="drop")[1].dropped == {"prompt leaves no room": 1}
    assert run(rows, bos, max_length=exact + 1)[1].kept == 2


def test_an_empty_prompt_gets_a_first_token_to_be_predicted_from(bos, bare):
    for tokenizer, first, added in ((bos, 0, 0), (bare, 0, 1), (make(template="", bos=None), 1, 1)):
        examples, report = run([("", "the cat", "a hat")], tokenizer)
        assert all(prompt == [first] for prompt, _ in sides(examples)) and report.separators_added == added
        batch = assemble(examples, np.asarray([0]), padded_length(examples))
        assert not batch["completion_mask"][..., 0].any() and batch["completion_mask"][..., 1].all()
    # A prompt that merges away into its completions: "w" is a token alone, and never in front of "orld".
    examples, report = run([(" w", "orld", "orld of cats")], bare)
    assert report.separators_added == report.boundary_merges == 1 and sides(examples)[0][0] == [0]


def test_errors_of_settings(bos):
    rows = [("the", " cat", " hat")]
    with pytest.raises(ValueError, match="no EOS token.*set tokenizer.eos_token"):
        run(rows, make(eos=None))
    with pytest.raises(ValueError, match=r"max_length is 1"):
        run(rows, bos, max_length=1)
    with pytest.raises(ValueError, match=r"max_prompt_length is 8 with data.max_length 8"):
        run(rows, bos, max_length=8, max_prompt_length=8)
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] completions"):
        run([*rows, ("the", " cat")], bos)
    largest = max(bos("the cat")["input_ids"])
    token = bos.convert_ids_to_tokens(largest)
    with pytest.raises(ValueError, match=rf"id {largest} \('{token}'\) lies outside the model's {largest} embedding.*larger than"):
        run([("the", " cat", " c")], bos, vocab_size=largest)
    assert run([("the", " cat", " c")], bos, vocab_size=largest + 1)[1].kept == 1


def test_no_row_left_is_an_error_with_the_reasons(bos):
    reasons = r"\(not text: 2; identical after the cut: 1, such as row 0 \(counted from 0\): "
    with pytest.raises(ValueError, match=rf"none of the 3 rows of x is left {reasons}"):
        run([("the", " sky is a", " sky is b")], bos, max_length=3, path="x", dropped={"not text": 2})
    with pytest.raises(ValueError, match=r"none of the 1 rows"):
        run([], bos, dropped={"not text": 1})


def test_rows_beyond_one_chunk_keep_their_order(bos, monkeypatch):
    rows = [("the" + " sky" * (i % 4), " cat" * (1 + i % 3), " hat") for i in range(11)]
    whole, report = run(rows, bos)
    monkeypatch.setattr("alignax.data.tokens.ROWS_AT_ONCE", 3)
    parts, again = run(rows, bos)
    assert report == again and sides(whole) == sides(parts)


def test_report_lines_name_everything(bos):
    _, report = run([("the", " cat", " hat"), ("the", " cat", " cat ")], bos, dropped={"not text": 1})
    text = "\n".join(report.lines())
    assert "rows: 2 of 3 kept" in text and "dropped, not text: 1" in text and f"longest row has {report.longest}" in text
    assert report.as_dict()["dropped"] == {"not text": 1} and report.as_dict()["kept"] == 2


@pytest.mark.slow
def test_counts_add_up_on_real_pairs(data_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir / "stories260k_hf", local_files_only=True)
    path = data_dir / "hh_harmless" / "dev.jsonl"
    config = default_config().data
    config.update(max_length=160, max_prompt_length=64, bad_rows="drop")
    examples, report = load_examples(path, config, tokenizer, 512)
    assert report.rows == len(path.read_text().strip().split("\n")) == report.kept + sum(report.dropped.values())
    assert report.kept == len(examples) > 1800 and report.longest == 160 == padded_length(examples)
    assert examples.prompt_lengths.max() == 64 and report.prompts_cut > 0
    last = examples.tokens[examples.offsets[1:] - 1]
    assert np.sum(last != tokenizer.eos_token_id) == report.completions_cut
    assert np.sum(examples.tokens == tokenizer.eos_token_id) == len(last) - report.completions_cut
    assert (examples.tokens[examples.offsets[:-1]] == tokenizer.bos_token_id).all()
    pairs = examples.prompt_lengths.reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    config.kind = "sft"
    chosen, _ = load_examples(path, config, tokenizer, 512)
    assert chosen.N == 1 and len(chosen) == report.rows
    with pytest.raises(ValueError, match="data.kind is 'ppo'; use one of preference, sft, unpaired, ranked"):
        config.kind = "ppo"
        load_examples(path, config, tokenizer, 512)


def test_a_token_of_the_beginning_inside_a_text_is_told(bos, bare):
    rows = [("\n<s>the sky", " is blue", " is round"), ("the sky", "<s> is blue", " is round"), ("<s>the sky", " is blue", " is round")]
    assert run(rows, bos)[1].told == run(rows, bare)[1].told == {BOS_INSIDE.format("<s>"): 2}
    assert not run(rows, make(bos=None))[1].told and not run(rows, make(bos="</s>"))[1].told


def test_a_text_that_begins_with_the_tokenizers_own_front_has_it_once(bos, bare):
    plain, none = run([("the sky", " is blue", " is round")], bos)
    examples, report = run([("<s>the sky", " is blue", " is round")], bos)
    assert examples.tokens.tolist() == plain.tokens.tolist() and examples.offsets.tolist() == plain.offsets.tolist()
    assert (report.fronts_written, none.fronts_written) == (1, 0)
    assert "  prompts that already begin with the prefix tokens of the tokenizer, kept once: 1" in report.lines()
    assert prompt_ids(["<s>the sky", "the sky"], bos) == [bos("the sky")["input_ids"]] * 2
    assert sides(run([("<s>the sky", " a")], bare)[0])[0][0] == bare("<s>the sky")["input_ids"], "no front of its own"
    two = make("<s> </s> $A </s>")  # two tokens in front, and one behind
    assert sides(run([("<s></s>the sky", " a")], two)[0]) == sides(run([("the sky", " a")], two)[0])
    assert sides(run([("</s>the sky", " a")], bos)[0])[0][0] == [0, 1, *bare("the sky")["input_ids"]], "another token stays"


def words(template, unknown, vocabulary=("</s>", "<s>", "+", "=", "0", "9")):
    """A tokenizer of whole words, to which "a" and "The sky." are unknown ones, or none."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if template:
        model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("unknown", ["</s>", "<s>", "="])
@pytest.mark.parametrize(
    ("template", "own"),
    [
        ("", ([], [])), ("$A", ([], [])), ("$A </s>", ([], [0])), ("<s> $A", ([1], [])), ("<s> $A </s>", ([1], [0])),
        ("<s> $A <s>", ([1], [1])), ("</s> $A", ([0], [])), ("</s> </s> $A </s>", ([0, 0], [0])),
    ],
)  # fmt: skip
def test_what_the_tokenizer_adds_is_found_whatever_its_unknown_token(template, own, unknown):
    tokenizer = words(template, unknown)
    assert tokens._own(tokenizer) == own
    assert prompt_ids(["0 + 9 =", "0 ="], tokenizer) == [own[0] + [4, 2, 5, 3], own[0] + [4, 3]]
    assert sides(run([("0 + 9 =", " 9")], tokenizer)[0])[0] == (own[0] + [4, 2, 5, 3], [5, 0])


def test_what_the_tokenizer_puts_behind_a_text_is_no_part_of_it():
    examples, report = run([("the sky", " is</s>", " is round")], make("$A <s>"))  # as BERT's [SEP], which is no EOS
    bare = make("")
    whole = lambda text: bare(text)["input_ids"]
    assert [prompt + rest for prompt, rest in sides(examples)] == [[*whole("the sky is"), 1], [*whole("the sky is round"), 1]]
    assert report.ends_written == 1 and "  completions that already end with an end token, kept once: 1" in report.lines()


WORDS = "the sky is blue, and a cat of 12 hats sat. Hello   world\n\nround, worlds of words "
CHATML = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def unsplit(model, trainer):
    """A tokenizer as of Llama 2 and Gemma: a text is one piece, and its spaces are replaced."""
    own = tokenizers.Tokenizer(model)
    own.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    given = {"vocab_size": 90, "special_tokens": ["<s>", "</s>", "<unk>"], "show_progress": False}
    own.train_from_iterator([text.replace(" ", "\u2581") for text in (*SENTENCES, WORDS)], trainer(**given))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": make,
    "bpe": lambda: unsplit(tokenizers.models.BPE(unk_token="<unk>"), tokenizers.trainers.BpeTrainer),
    "unigram": lambda: unsplit(tokenizers.models.Unigram(), lambda **x: tokenizers.trainers.UnigramTrainer(unk_token="<unk>", **x)),
    "words": lambda: words("<s> $A", "</s>", ("</s>", "<s>", "the", "a", "x", "yes", "no")),
}


def as_turns(row):
    says = lambda role, text: {"role": role, "content": text}
    return Prompted([says("user", "Hi"), says("user", row.prompt)], tuple([says("assistant", text)] for text in row.completions), row.row)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(40, 0), (40, 12), (3, 1)])
def test_of_long_rows_only_what_is_kept_is_tokenised_and_it_is_the_same(name, monkeypatch, max_length, max_prompt_length):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = CHATML
    rows = [("the sky", " is " + WORDS * 20, " is round"), (WORDS * 20, " a" * 300, " b " + WORDS * 20), ("a cat", " x" * 900, " yes")]
    rows += [("<s>" + WORDS * 20, " yes", " no"), (" ".join(WORDS) * 10, " yes", " no"), ("-" * 2000, " yes", " no")]
    rows = [Prompted(prompt, sides, i) for i, (prompt, *sides) in enumerate(rows)]
    turns = [{"role": role, "content": WORDS[:9]} for _ in range(30) for role in ("assistant", "user")]
    every = [rows, [as_turns(row) for row in rows], [Prompted([turns[1]], (turns[:-1],)), Prompted(turns, (turns[:-1],), 1)]]
    begun = lambda text: [{"role": "assistant", "content": text, "weight": 0}, *turns[1:3]]  # what is scored lies far behind
    every += [[every[1][0], Prompted([turns[1]], (begun("a" + WORDS * 20), begun("b" + end)), 1)] for end in (WORDS * 20, "")]
    for given in every:
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "vocab_size": 512}
        monkeypatch.setattr(bounds, "LONG", 2**18)
        whole, before = tokenize(given, tokenizer, rejected=Rejected("rows", "drop"), **limits)
        monkeypatch.setattr(bounds, "LONG", 0)
        monkeypatch.setattr(bounds, "STEP", 67)
        examples, after = tokenize(given, tokenizer, rejected=Rejected("rows", "drop"), **limits)
        assert examples.digest() == whole.digest() and examples.prompts == whole.prompts
        assert after.dropped == before.dropped and after.shortened >= 1 > before.shortened
        same = ("kept", "prompts_cut", "completions_cut", "ends_lost", "fronts_written")
        assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]


def test_rows_whose_parts_do_not_tell_their_tokens_are_read_whole_up_to_a_limit(bos, monkeypatch):
    runs = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0, "<s>": 1, "a": 2, "b": 3, "aa": 4, "aaaa": 5}, [("a", "a"), ("aa", "aa")])
    )
    runs = transformers.PreTrainedTokenizerFast(tokenizer_object=runs, bos_token="<s>", eos_token="</s>")
    row, limits = ("b" + "a" * 1202, "a", "b"), {"max_prompt_length": 5}  # the last runs of four begin where the first one does
    whole, _ = run([row], runs, **limits)
    for name, value in (("UNSETTLED", 4000), ("LONG", 100), ("STEP", 67)):
        monkeypatch.setattr(bounds, name, value)
    examples, report = run([row], runs, **limits)
    assert examples.digest() == whole.digest() and report.shortened == 0
    monkeypatch.setattr(bounds, "UNSETTLED", 2000)
    with pytest.raises(ValueError, match=r"row 0 .*: the row has 3,611 characters to tokenise .* and the limit is 2,000; shorten"):
        run([row], runs, **limits)
    assert run([("ab", "a", "b"), row], runs, bad_rows="drop", **limits)[1].dropped == {"too long": 1}
    assert run([(WORDS * 90, " is blue", " a")], bos, **limits)[1].shortened == 1


def test_the_last_id_of_the_vocabulary_and_the_first_beyond_it(bos):
    last = len(bos) - 1
    examples, _ = run([("the sky", " " + bos.convert_tokens_to_string([bos.convert_ids_to_tokens(last)]))], bos, vocab_size=len(bos))
    assert last in examples.tokens
    with pytest.raises(ValueError, match=rf"token id {last} .* lies outside the model's {last} embedding rows"):
        run([("the sky", " " + bos.convert_tokens_to_string([bos.convert_ids_to_tokens(last)]))], bos, vocab_size=last)


def test_chunks_are_bounded_in_characters(bos, monkeypatch):
    rows = [(f"the sky {i}", " is blue", " is round") for i in range(20)]
    whole, _ = run(rows, bos)
    monkeypatch.setattr(tokens, "CHARACTERS_AT_ONCE", 100)
    assert [len(chunk) for chunk in tokens._chunks([Prompted("x" * 60, ("y",), i) for i in range(3)])] == [1, 1, 1]
    assert run(rows, bos)[0].digest() == whole.digest()
