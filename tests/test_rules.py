"""Verifiable rewards: what the last number is, and real solutions judged by it."""

import json

import pytest

from alignax.rules import exact_match, last_number, matches, near_length


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7), ("1,234 apples", 1234), ("-5", -5), ("from 3-5", 5), ("it costs $12.50", 12.5), ("#### 42", 42),
        ("x = .5", 0.5),
        ("18\nand nothing more", 18), ("", None), ("none", None), ("7, 8, 9,", 9), ("a 1,000,000", 1_000_000), ("+3", 3), ("2 - 6", 6),
        ("2 - -6", -6), ("10%", 10),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_answers_may_be_numbers_or_texts():
    assert exact_match(["A: 18", "18 or 19", "no idea", "A: 18.0"], [18, "18", "18", "#### 18"]) == [1, 0, 0, 1]
    assert exact_match(["no number", "7"], ["no number", "none"]) == [0, 0]  # an answer without a number is matched by nothing


def test_real_solutions_are_judged_as_their_authors_judged_them(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / "model_solutions_dev.jsonl").read_text().splitlines()]
    said = [(row["ground_truth"], response["text"], response["correct"]) for row in rows for response in row["responses"]]
    found = exact_match([text for _, text, _ in said], [truth for truth, _, _ in said])
    agree = sum(bool(x) == correct for x, (_, _, correct) in zip(found, said, strict=True)) / len(said)
    assert len(said) > 500 and 0.1 < sum(found) / len(said) < 0.9 and agree > 0.99


def test_formats_and_lengths():
    assert matches(["<answer>\n7</answer>", "x <answer>7</answer>"], r"<answer>.*</answer>") == [1, 0]
    assert near_length(["a b c d", "a b", "", "a b c d e f g h i"], 4) == [1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="words is 0"):
        near_length(["a"], 0)
