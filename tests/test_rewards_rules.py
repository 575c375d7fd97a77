"""Verifiable rewards: what the last number is, and real solutions judged by it."""

import json
import random
import re
import time

import pytest

from alignax.rewards.rules import exact_match, last_number, matches, near_length


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7), ("1,234 apples", 1234), ("-5", -5), ("from 3-5", 5), ("it costs $12.50", 12.5), ("#### 42", 42),
        ("x = .5", 0.5),
        ("18\nand nothing more", 18), ("", None), ("none", None), ("7, 8, 9,", 9), ("a 1,000,000", 1_000_000), ("+3", 3), ("2 - 6", 6),
        ("2 - -6", -6), ("10%", 10), ("1" * 400, None), ("." * 9, None),
        ("\N{MINUS SIGN}5", -5), ("3\N{MINUS SIGN}5", 5), ("1e5", 1e5), ("1.5e-3", 0.0015), ("2E+3 m", 2000), ("1e5f", 5), ("1e999", None),
        ("(1,2,3)", 3), ("1234,567", 567), ("1,2345", 2345), ("1,23,456.5", 123456.5), (str(1e-5), 1e-5),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_answers_may_be_numbers_or_texts():
    assert exact_match(["A: 18", "18 or 19", "no idea", "A: 18.0"], [18, "18", "18", "#### 18"]) == [1, 0, 0, 1]
    assert exact_match(["-5", "5"], ["\N{MINUS SIGN}5"] * 2) == [1, 0]
    assert exact_match(["no number", "7"], ["no number", "none"]) == [0, 0]  # an answer without a number is matched by nothing


def test_real_solutions_are_judged_as_their_authors_judged_them(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / "model_solutions_dev.jsonl").read_text().splitlines()]
    said = [(row["ground_truth"], response["text"], response["correct"]) for row in rows for response in row["responses"]]
    found = exact_match([text for _, text, _ in said], [truth for truth, _, _ in said])
    agree = sum(bool(x) == correct for x, (_, _, correct) in zip(found, said, strict=True)) / len(said)
    assert len(said) > 500 and 0.1 < sum(found) / len(said) < 0.9 and agree > 0.99


def test_formats_and_lengths():
    assert matches(["<answer>\n7</answer>", "x <answer>7</answer>"], r"<answer>.*</answer>") == [1, 0]
    escaped = {r"\\Z": "\\Z", r"\\\Z": "\\", r"a\$": "a$", r"\$$": "$", r"\\$": "\\", r"a$\Z": "a"}  # pattern -> what it matches
    assert all(matches([text, "a"], pattern) == [1, text == "a"] for pattern, text in escaped.items())
    assert near_length(["a b c d", "a b", "", "a b c d e f g h i"], 4) == [1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="words is 0"):
        near_length(["a"], 0)


def test_patterns_match_as_re_has_it():
    """Random patterns and texts, against `re`."""
    rng = random.Random(0)
    atoms = ["a", "b", ".", r"\d", "[ab]", "[^a]", r"\n", "1", "{", r"\{", "[]a]", r"\x61", "x{,2}"]
    repeats = ["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}", "{,2}", "{,}"]

    def pattern(depth):
        kind = rng.randrange(6) if depth else 0
        inner = lambda: pattern(depth - 1)
        return [
            lambda: rng.choice(atoms), lambda: inner() + inner(), lambda: f"({inner()}|{inner()})",
            lambda: f"(?:{inner()})" + rng.choice(repeats),
            lambda: f"(?P<n{rng.randrange(10**9)}>{inner()})", lambda: f"({inner()})" + rng.choice(repeats),
        ][kind]()  # fmt: skip

    found = 0
    for _ in range(400):
        own = rng.choice(["", "^", r"\A"]) + pattern(4) + rng.choice(["", "$", r"\Z"])
        texts = ["".join(rng.choice("ab1x{]\n") for _ in range(rng.randrange(7))) for _ in range(8)]
        right = [float(re.fullmatch(own, text, re.DOTALL) is not None) for text in texts]
        assert matches(texts, own) == right, own
        found += sum(right)
    assert found > 200


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", "(a|aa)+", ".*.*.*.*x", "(.*a){20}", "((a*)*)*"])
def test_no_pattern_goes_back_on_its_way(pattern):
    began = time.monotonic()
    matches(["a" * 20000 + "!"], pattern)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?=a)", "not support"), (r"(a)\1", "not support"), (r"\ba", "not support"), ("a*+", "not support"),
        ("a$b", "not support"), ("(?i)a", "not support"), ("(a{100}){100}", "use fewer repetitions"), ("(", "not a regular expression"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        matches(["a"], pattern)
