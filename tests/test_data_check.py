"""`alignax check-data` on transcripts with every quirk that the raw ones of hh-rlhf have."""

import json

import pytest
import tiny

from alignax.config import default_config
from alignax.data import check
from alignax.data.check import BINS

A = "\n\nAssistant:"


def transcript(question, answer):
    return f"\n\nHuman: {question}{A}{answer}"


def raw(n=40):
    """Good transcripts, with curly quotes in half of them."""
    quote = lambda i: f"who said “{i}”?" if i % 2 else f"who said {i}?"
    return [
        {"chosen": transcript(quote(i), f" she did {i}"), "rejected": transcript(quote(i), " no one" + " at all" * (i % 5))}
        for i in range(n)
    ]


def quirks():
    rows = raw()
    rows[3]["rejected"] = rows[3]["rejected"].replace("Human: who", "Human: Who")  # the prompt differs between the sides
    rows[5]["rejected"] = transcript("who said “5”?", "")  # a side is empty
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["chosen"] = "no answer at all"
    rows[11]["chosen"] = transcript("x" * 4010, " a")  # the longest prompt
    rows[11]["rejected"] = transcript("x" * 4010, " b")
    rows[13] = rows[15]
    return rows


def look(tmp_path, train=None, evaluation=None, **changes):
    data = default_config().data
    data.update({"prompt_separator": A, "max_length": 60, "max_prompt_length": 40} | changes)
    for split, rows in (("train", train), ("eval", evaluation)):
        if rows is not None:
            path = tmp_path / f"{split}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
            data[split] = str(path)
    result = check.check(data, tiny.byte_tokenizer(), 280)
    assert json.loads(json.dumps(result, allow_nan=False)) == result, "plain values"
    return result, "\n".join(check.text(result))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    result, text = look(
        tmp_path_factory.mktemp("check"), quirks(), raw(3) + [{"chosen": transcript("new", " a"), "rejected": transcript("new", " b")}]
    )
    (source,) = result["train"]["sources"].values()
    return result, source, text


def test_every_bad_row_is_counted_and_the_first_are_shown_though_a_run_would_stop(seen):
    result, source, text = seen
    assert source["dropped"] == {"prompt differs": 1, "empty completion": 1, "chosen equals rejected": 1, "no separator": 1}
    assert source["rows"] == 40 and source["kept"] == 36
    for part in (
        "row 3 (counted from 0): the prompt differs between chosen and rejected: '\\n\\nHuman: who said “3”?\\n\\nAssistant:' and",
        "row 5 (counted from 0): the completion in 'rejected' is empty: ''",
        "row 7 (counted from 0): chosen and rejected are the same text: ' she did 7'",
        "row 9 (counted from 0): 'chosen' holds no separator",
    ):
        assert part in text, part
    assert "prompt differs: 1, empty completion: 1, chosen equals rejected: 1, no separator: 1" in check.stops(result)


def test_a_difference_deep_inside_a_prompt_is_shown_where_it_is(tmp_path):
    rows = raw(3)
    rows[1] = {"chosen": transcript("x" * 500 + "ONE" + "y" * 500, " a"), "rejected": transcript("x" * 500 + "TWO" + "y" * 500, " b")}
    _, text = look(tmp_path, rows)
    assert "...'xxxxxxxxxxxxxxxxxxxxONE" in text and "...'xxxxxxxxxxxxxxxxxxxxTWO" in text


def test_characters_spelled_as_bytes_and_the_longest_prompt(seen):
    _, source, text = seen
    spelled = {s["character"]: (s["tokens"], s["times"]) for s in source["characters_in_several_tokens"]}
    assert spelled.keys() == {"“", "”"} and {tokens for tokens, _ in spelled.values()} == {3}
    assert "characters spelled in several tokens: “ (3 tokens, " in text
    assert source["longest_prompt"] == 4010 + len(transcript("", ""))
    assert f"the longest prompt has {4010 + len(transcript('', '')):,} characters" in text


def test_lengths_are_those_before_the_cut(seen):
    _, source, text = seen
    lengths = source["prompt_lengths"]
    assert lengths["longest"] > 4010 > lengths["limit"] == 40 and sum(lengths["counts"]) == source["kept"]
    assert 0 < lengths["above_limit"] < 1 and f"{lengths['above_limit']:.1%} are above data.max_prompt_length 40" in text
    assert len(lengths["counts"]) == BINS and lengths["counts"][-1] == 1, "the last bin is open: one row alone stretches no other"
    assert sum(source["completion_lengths"]["counts"]) == sum(source["row_lengths"]["counts"]) == 2 * source["kept"]
    assert "########" in text and " and up" in text


@pytest.mark.parametrize("max_length", [30, 31, 32])
def test_a_character_cut_in_two_is_none_that_was_there(tmp_path, max_length):
    rows = [{"chosen": transcript("q", " ““““““““““"), "rejected": transcript("q", " no")}]
    result, _ = look(tmp_path, rows, max_length=max_length, max_prompt_length=20)
    (source,) = result["train"]["sources"].values()
    assert source["completions_cut"] == 1 and {s["character"] for s in source["characters_in_several_tokens"]} == {"“"}


def test_prompts_too_long_for_the_budget_are_among_the_lengths(tmp_path):
    rows = [*raw(3), {"chosen": transcript("y" * 500, " a"), "rejected": transcript("y" * 500, " b")}]
    result, _ = look(tmp_path, rows, max_length=300, max_prompt_length=0)
    (source,) = result["train"]["sources"].values()
    assert source["dropped"] == {"prompt leaves no room": 1} and source["prompt_lengths"]["longest"] > 500 < source["longest_prompt"]


def test_repeated_and_shared_prompts(seen):
    result, source, text = seen
    assert source["repeated_prompts"] == 1 and "rows that repeat the prompt of an earlier row: 1" in text
    assert (result["eval_prompts_in_train"], result["eval_prompts"]) == (3, 4)
    assert "prompts of the evaluation data that are also in the training data: 3 of 4" in text


def test_an_example_is_shown_with_its_mask(seen):
    result, _, text = seen
    assert "response 1" in text and "[<|im_end|>]" in result["train"]["example"] and "\x1b" not in text
    data = default_config().data
    data.update(prompt_separator=A, train=next(iter(result["train"]["sources"])))
    data.bad_rows = "drop"
    coloured = check.check(data, tiny.byte_tokenizer(), 280, colour=True)["train"]["example"]
    assert "\x1b[1;32m<|im_end|>\x1b[0m" in coloured and "\x1b[2m<s>\x1b[0m" in coloured and "[<|im_end|>]" not in coloured


def test_a_clean_file_stops_nothing_and_length_bias_is_said(tmp_path):
    result, text = look(tmp_path, [{"chosen": transcript(i, " longer by far"), "rejected": transcript(i, " no")} for i in range(4)])
    (source,) = result["train"]["sources"].values()
    assert check.stops(result) == "" and source["chosen_longer"] == 1.0 and "the longer one in 100.0% of pairs" in text
    assert "eval" not in result and "evaluation" not in text


def test_pairs_cut_to_the_same_tokens_are_no_fault_of_the_rows(tmp_path):
    rows = [*raw(3), {"chosen": transcript("q", " s" * 99 + "a"), "rejected": transcript("q", " s" * 99 + "b")}]
    result, text = look(tmp_path, rows)
    assert check.stops(result) == "" and "dropped, identical after the cut: 1" in text
    assert "row 3 (counted from 0): two completions of the row" in text


def test_mixtures_labels_and_margins(tmp_path):
    for name, value in (("a", True), ("b", False)):
        rows = [{"prompt": f"{name}{i}", "completion": f"c{i}", "label": value} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = f"{tmp_path / 'a.jsonl'}@1,{tmp_path / 'b.jsonl'}@3"
    data = default_config().data
    data.update(kind="unpaired", train=spec)
    result = check.check(data, tiny.byte_tokenizer(), 280)
    text = "\n".join(check.text(result))
    assert [source["labels_true"] for source in result["train"]["sources"].values()] == [1.0, 0.0]
    assert "labels: 100.0% are True" in text and f"75.0% of the examples from {tmp_path / 'b.jsonl'}: 4 rows, each used 1.50 times" in text
    data.update(kind="preference", train=str(tmp_path / "pairs.jsonl"))
    data.columns.margin = "gap"
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b", "gap": i} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "margins: 0 to 2, mean 1" in "\n".join(check.text(check.check(data, tiny.byte_tokenizer(), 280)))
    data.update(kind="sft", train=str(tmp_path / "rated.jsonl"))
    data.columns.update(margin="", attributes="rated")
    rows = [{"prompt": "p", "completion": f"a{i}", "rated": [i, None, None if i else 4]} for i in range(4)]
    (tmp_path / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = check.check(data, tiny.byte_tokenizer(), 280)
    text = "\n".join(check.text(result))
    assert "attribute 0, given in 100.0% of rows: 0 to 3, mean 1.5" in text and "attribute 2, given in 25.0% of rows: 4 to 4" in text
    assert "attribute 1, given in 0.0% of rows\n" in text and json.loads(json.dumps(result)) == result


def test_lost_text_is_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "é", "chosen": "a{}", "rejected": "b"}))
    data = default_config().data
    data.train = str(tmp_path / "rows.jsonl")
    text = "\n".join(check.text(check.check(data, tiny.tokenizer(), 96)))
    assert "unknown tokens (their text is lost): 4" in text


def test_texts_to_pretrain_on_and_pairs_from_elsewhere_are_looked_at_too(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n" + json.dumps({"prompt": "p", "completion": ""}))
    ood = tmp_path / "ood.jsonl"
    ood.write_text(json.dumps(raw(1)[0]))
    result, text = look(tmp_path, raw(3), pretrain=str(texts), ood=str(ood))
    assert result["pretrain"]["sources"][str(texts)]["kept"] == 1 and "eval_prompts" not in result
    assert f"pretrain data: {texts}" in text and f"ood data: {ood}" in text
    assert check.stops(result) == f"{texts} has bad rows (empty completion: 1)"
    result, _ = look(tmp_path, quirks(), raw(3), ood=str(tmp_path / "eval.jsonl"), pretrain=str(tmp_path / "train.jsonl"))
    assert "chosen equals rejected: 1" in check.stops(result), "as pairs, though not as texts"
    with pytest.raises(ValueError, match="missing.jsonl"):
        look(tmp_path, raw(3), pretrain="missing.jsonl")


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="'data.train' and 'data.eval' are empty; set --config.data.train=FILE"):
        check.check(default_config().data, tiny.byte_tokenizer(), 280)
