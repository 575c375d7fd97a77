"""Shapes of rows that other programs write, an experiment's `row(row)`, and the formats of well-known sets."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny

from alignax.config import default_config, load_experiment
from alignax.data import Prompted, check, load_examples, prompted_rows, read_rows
from alignax.data.chat import SYSTEMS
from alignax.data.formats import FORMATS
from alignax.data.kinds import unread
from alignax.data.shapes import messages, shaped
from alignax.mesh import make_mesh
from alignax.run.prepare import prepare

USER, YES, NO = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"), ("assistant", "go")))
SYSTEM = {"role": "system", "content": "French."}


def config(kind="preference", columns=(), **changes):
    data = default_config().data
    data.update(kind=kind, **changes)
    data.columns.update(dict(columns))
    return data


def only(row, kind="preference", row_hook=None, turns="last", **columns):
    data = config(kind, columns, turns=turns)
    (prompted,), rejected = prompted_rows(shaped([row], data, row_hook), data)
    assert not rejected.counts
    return prompted


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "hello", "rejected": "go"},
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], "chosen": [YES], "rejected": "go"},
        {"prompt": USER, "chosen": [YES], "rejected": [NO]},
        {"prompt": "hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {
            "prompt": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": {"from": "gpt", "value": "go"},
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
            "chosen": YES,
            "rejected": NO,
        },
        {"prompt": [{"role": "user", "content": [{"text": "h", "type": None}, "i"]}], "chosen": "hello", "rejected": "go"},
    ],
)
def test_shapes_of_one_pair(row):
    assert only(row) == Prompted([USER], ([YES], [NO]))


def test_a_conversation_that_begins_otherwise_than_its_prompt_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'chosen' is a conversation and 'prompt' is text.*--config.data.columns.prompt= \(empty\)"):
        only({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]})
    with pytest.raises(ValueError, match=r"no prompt column 'prompt' .* Name the column with data\.columns\.prompt=turns, which holds"):
        only({"turns": [{"from": "human", "value": "hi"}], "chosen": YES, "rejected": NO})
    with pytest.raises(ValueError, match=r"no column 'completion', .*; 'talk' holds a conversation: .*data.columns.messages=talk"):
        only({"talk": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "sft")
    with pytest.raises(ValueError, match=r"no column 'prompt', .*; 'talk' holds a conversation: name it with data.columns.prompt=talk"):
        only({"talk": [{"from": "human", "value": "hi"}]}, "prompt")
    with pytest.raises(ValueError, match=r"'chosen' is \[\['yes', 3\]\], a list without messages, and 'prompt' is text; give text or"):
        only({"prompt": "hi", "chosen": [["yes", 3]], "rejected": [["no", 1]]})
    with pytest.raises(ValueError, match="'messages' has no assistant turn; its roles are none"):
        only({"messages": []}, "sft")
    with pytest.raises(ValueError, match="'rejected' is 7, neither text nor messages, and 'prompt' is a conversation"):
        only({"prompt": [USER], "chosen": "hello", "rejected": 7})
    with pytest.raises(ValueError, match="a message of 'prompt' is from 'narrator', not from one of human, "):
        only({"prompt": [{"from": "narrator", "value": "hi"}], "chosen": "hello", "rejected": "go"})


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "text": None}, {"type": "text"}, 3])
@pytest.mark.parametrize("kind", ["preference", "prompt"])
def test_a_part_that_is_no_text_is_refused_by_name(part, kind):
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}], "chosen": "hello", "rejected": "go"}
    with pytest.raises(ValueError, match=r"a message of 'prompt' has the part .*, but only text parts are supported; leave such rows out"):
        only(row, kind)


def flipped(value):
    """Messages whose contents come first."""
    return [dict(reversed(m.items())) for m in value]


FORMS = [
    json.dumps,
    str,
    lambda value: json.dumps(value, indent=1, sort_keys=True),
    lambda value: str(flipped(value)),
    lambda value: str(np.array(flipped(value))),
    lambda value: json.dumps([{"id": 1, "name": None, **m} for m in value]),
    lambda value: json.dumps([{"content": 'so "he" said', "role": "user"}, *value]),
    lambda value: json.dumps([{"content": None} | value[0]]),
    lambda value: json.dumps(value[0]),
    lambda value: json.dumps({"messages": value}),
    lambda value: json.dumps(value)[:-9],
]


@pytest.mark.parametrize("form", FORMS)
def test_messages_as_text_are_refused_with_the_remedy(form):
    """A table of CSV, say, holds them as JSON, or as Python writes them; they are no text to be learnt."""
    for row, kind in (
        ({"prompt": form([USER])}, "prompt"),
        ({"messages": form([USER, YES])}, "sft"),
        ({"prompt": "hi", "chosen": form([USER, YES]), "rejected": form([USER, NO])}, "preference"),
        ({"conversations": form([{"from": "human", "value": "hi"}])}, "sft"),
    ):
        with pytest.raises(ValueError, match=r"text that holds messages in .*; convert the text to a list, .* in row\(row\)"):
            only(row, kind, **({"messages": "conversations"} if "conversations" in row else {}))
    others = (
        '[{"roles": 1}]',
        '[{"name": "Ann", "role": "user"}]',
        '[{"from": "A", "to": "B"}]',
        '{"role": "user"} it is',
        "['\\d', 'from':",
    )
    for text in others:
        assert only({"prompt": "hi", "completion": text}, "sft").completions == (text,)


def test_openais_earlier_calls_of_functions():
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    said = {"role": "assistant", "content": None, "function_call": call}
    result = {"role": "function", "name": "weather", "content": "18 C"}
    row = only({"messages": [USER, said, result, YES]}, "sft")
    calls = [{"type": "function", "function": call}]
    assert row.prompt == [USER, {"role": "assistant", "tool_calls": calls}, result | {"role": "tool"}]
    assert messages("c", [{"from": "function", "value": "18 C"}]) == [{"role": "tool", "content": "18 C"}]


@pytest.mark.parametrize("null", [{}, {"tool_calls": None}])
@pytest.mark.parametrize(("asked", "front"), [([], []), ([SYSTEM], [SYSTEM]), ([SYSTEM], []), ([], [SYSTEM])])
def test_sides_that_repeat_the_prompt_have_it_once(asked, front, null):
    repeated = [m | null for m in (*front, USER)]
    row = only({"prompt": [*asked, USER], "chosen": [*repeated, YES], "rejected": [*repeated, NO]})
    assert (row.prompt, row.completions) == ([*(asked or front), USER], ([YES], [NO]))
    row = only({"prompt": [*asked, USER], "completion": [*repeated, YES]}, "sft")
    assert (row.prompt, row.completions) == ([*(asked or front), USER], ([YES],))


def test_roles_of_other_names():
    there = {"human": "user", "User": "user", "gpt": "assistant", "ASSISTANT": "assistant", "model": "assistant", "System": "system"}
    there |= {"observation": "observation", "developer": "developer", "judge": "judge"}
    assert [m["role"] for m in messages("c", [{"role": role, "content": "x"} for role in there])] == [*there.values()]


def test_share_gpt_conversations_with_calls():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [("system", "French."), ("human", "hi"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "hello")]
    found = messages("conversations", [{"from": speaker, "value": text} for speaker, text in turns])
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert found == [SYSTEM, USER, called, {"role": "tool", "content": "3"}, YES]
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    assert only(row, "sft", messages="conversations") == Prompted([USER], ([YES],))
    assert messages("c", [{"from": "function_call", "value": "f(1)"}]).what.endswith("'f(1)', not JSON with a name and arguments")


def test_a_system_column_becomes_a_message_or_is_said_not_to_be_read():
    row = {"system": "French.", "prompt": "hi", "chosen": "hello", "rejected": "go", "n": 1, "tags": ["a"], "none": None}
    assert only(row, system="system") == Prompted([SYSTEM, USER], ([YES], [NO]))
    assert only(row | {"system": ""}, system="system") == Prompted([USER], ([YES], [NO]))
    whole = {"system": "French.", "chosen": [USER, YES], "rejected": [USER, NO]}
    assert only(whole, system="system") == Prompted([SYSTEM, USER], ([YES], [NO]))
    assert only({"system": "French.", "prompt": "hi"}, "prompt", system="system").prompt == [SYSTEM, USER]
    assert only(row | {"prompt": [SYSTEM, USER]}, system="system") == Prompted([SYSTEM, USER], ([YES], [NO])), "once"
    whole = {"system": "French. ", "messages": [SYSTEM | {"role": "developer"}, USER, YES]}
    assert only(whole, "sft", system="system").prompt == [SYSTEM | {"role": "developer"}, USER]
    with pytest.raises(ValueError, match="no column 'sytem', named by data.columns.system"):
        only(row, system="sytem")
    assert unread([row], config()) == ["system (text)", "n (number)", "tags (list)", "none (empty)"]
    assert unread([row], config("prompt")) == []
    assert unread([row], config(columns={"system": "system", "margin": "n"})) == ["tags (list)", "none (empty)"]


OTHER = {"role": "system", "content": "German."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "French.", "messages": [OTHER, USER, YES]}, "system prompt 'French.' in data.columns.system and 'German.' in its mess"),
        ({"system": "French.", "messages": [SYSTEM, USER, OTHER, YES]}, "'French.' in data.columns.system and 'German.' in its messages"),
        ({"system": "French.", "prompt": [OTHER, USER], "completion": [YES]}, "and 'German.' in its messages"),
        ({"prompt": [SYSTEM, USER], "completion": [OTHER, USER, YES]}, "'completion' begins with a system message, as the prompt 'Fren"),
        ({"prompt": [SYSTEM, USER], "completion": [SYSTEM, YES]}, "'completion' begins with a system message, as the prompt 'French.' "),
        ({"prompt": [USER], "completion": [OTHER, YES]}, "'completion' begins with a system message, after the messages of the prompt"),
    ],
)
def test_two_places_that_give_a_row_different_system_prompts(row, message):
    with pytest.raises(ValueError, match=message):
        only(row, "sft", system="system" if "system" in row else "")


def test_several_system_messages_of_one_conversation_are_counted():
    conversation = [SYSTEM, USER, YES, OTHER, USER, NO]
    row = only({"messages": conversation}, "sft")
    assert row.prompt == conversation[:-1] and SYSTEMS in row.told
    assert SYSTEMS in only({"prompt": conversation[:-1]}, "prompt").told
    assert only({"messages": conversation[:3]}, "sft").told == ()


def test_a_conversation_that_opens_with_an_answer():
    opened = [YES, USER, NO]
    assert only({"messages": opened}, "sft").prompt == opened[:2]
    with pytest.raises(ValueError, match="a user or system message first, give that turn the weight 0, or score the last turn alone"):
        only({"messages": opened}, "sft", turns="all")
    assert only({"messages": [SYSTEM, *opened]}, "sft", turns="all") == Prompted([SYSTEM], (opened,))
    assert only({"messages": [YES | {"weight": 0}, USER, NO]}, "sft", turns="all").completions == ([NO],)


def hook(row):
    if row["n"] == 1:
        return None
    if row["n"] == 2:
        raise KeyError("absent")
    return {"prompt": row.pop("q"), "chosen": "hello", "rejected": "go"} if row["n"] else [row]


def test_an_experiments_row_comes_first_and_its_errors_are_named():
    rows = [{"q": "hi", "n": n} for n in (3, 1, 2, 0, 4)]
    data = config(bad_rows="drop", limit=4)
    kept, rejected = prompted_rows(shaped(rows, data, hook), data)
    assert kept == [Prompted("hi", ("hello", "go"), 0)] and rows[0] == {"q": "hi", "n": 3}
    assert rejected.counts == {"left out by row()": 1, "error in row()": 2, "beyond data.limit": 1}
    assert rejected.first["error in row()"] == [
        "row 2 (counted from 0): row() raises KeyError: 'absent'",
        "row 3 (counted from 0): row() gives [{'n': 0, 'q': 'hi'}], not a row (a dict of columns) or None",
    ]
    with pytest.raises(ValueError, match=r"data, row 2 \(counted from 0\): row\(\) raises KeyError: 'absent'\. Correct the row, or"):
        prompted_rows(shaped(rows, config(), hook), config())


def test_rows_of_another_set_are_told_by_the_column_that_a_format_reads():
    data = config(format="helpsteer3")
    with pytest.raises(
        ValueError, match=r"'helpsteer3' reads 'context', which the row does not have \(it has: 'prompt'\); check that the row comes from"
    ):
        prompted_rows(shaped([{"prompt": "hi"}], data), data)


def test_a_run_reads_its_rows_through_the_hook_of_its_experiment(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(
        "from alignax.config import default_config\n"
        "def get_config():\n    return default_config()\n"
        "def loss(config):\n    return None\n"
        "def row(row):\n    return None if row['n'] else {'prompt': row['q'], 'chosen': ' a', 'rejected': ' b'}\n"
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"q": "hi", "n": n}) + "\n" for n in (0, 1, 0)))
    experiment = load_experiment(file, [f"data.train={tmp_path / 'a.jsonl'}"])
    result = check.check(experiment.config.data, tiny.byte_tokenizer(), 280, row=experiment.row)
    (source,) = result["train"]["sources"].values()
    assert source["kept"] == 2 and source["dropped"] == {"left out by row()": 1} and not check.stops(result)


def test_a_run_goes_through_a_column_that_its_rows_are_given(tmp_path):
    file = tmp_path / "experiment.py"
    dpo = (runs.REPO / "experiments" / "dpo_hh.py").read_text()
    file.write_text(dpo + "\n\ndef row(row):\n    return row | {'length': len(row['chosen'])}\n")
    fields = runs.world(tmp_path) | {"data.order": "-length", "workdir": str(tmp_path / "run")}
    run = prepare(load_experiment(file, [f"{name}={value}" for name, value in fields.items()]), make_mesh({}, jax.devices()[:1]))
    lengths = [len(row["chosen"]) for row in read_rows(tmp_path / "pairs.jsonl")]
    drawn = [lengths[row] for step in range(len(lengths) // 8) for row in run.data.train.rows(step)]
    assert drawn == sorted(lengths, reverse=True)[: len(drawn)] and len(set(drawn)) > 1
    assert not run.data.reports["train"].dropped and run.data.train.examples.order is not None


A, TEXTS = "\n\nAssistant:", {"prompt": "hi", "chosen": "hello", "rejected": "go"}
PAIR, MARGIN = {"chosen": [USER, YES], "rejected": [USER, NO]}, {"margin": 2.0}
POST = {"id": "x", "post": "Long.", "title": "T", "subreddit": "tifu", "site": None, "article": None}
SUMMARIES = [{"text": "go", "policy": "a", "note": None}, {"text": "hello", "policy": "b", "note": None}]
CARDS = [
    (
        "hh_rlhf",
        {"chosen": f"\n\nHuman: hi{A} hello", "rejected": f"\n\nHuman: hi{A} go"},
        {"prompt": f"\n\nHuman: hi{A}", "chosen": " hello", "rejected": " go"},
    ),
    (
        "ultrafeedback_binarized",
        {"prompt": "hi", "prompt_id": "1", "messages": [], "score_chosen": 8.5, "score_rejected": 6.5, **PAIR},
        PAIR | MARGIN,
    ),
    ("helpsteer2", {"split": "train", "prompt": "hi", "response_1": "go", "response_2": "hello", "preference_strength": 2}, TEXTS | MARGIN),
    (
        "helpsteer3",
        {"domain": "general", "context": [USER], "response1": "hello", "response2": "go", "overall_preference": -2},
        {**TEXTS, **MARGIN, "prompt": [USER]},
    ),
    ("helpsteer3", {"context": [USER], "response1": "hello", "response2": "go", "overall_preference": 0}, None),
    ("shp", {"history": "hi", "human_ref_A": "go", "human_ref_B": "hello", "labels": 0, "score_ratio": 2.0}, TEXTS),
    ("pku_saferlhf", {"prompt": "hi", "response_0": "go", "response_1": "hello", "better_response_id": 1, "safer_response_id": 0}, TEXTS),
    (
        "pku_saferlhf_safer",
        {"prompt": "hi", "response_0": "hello", "response_1": "go", "better_response_id": 1, "safer_response_id": 0},
        TEXTS,
    ),
    ("orca_dpo_pairs", {"system": "French.", "question": "hi", "chosen": "hello", "rejected": "go"}, {**TEXTS, "prompt": [SYSTEM, USER]}),
    ("orca_dpo_pairs", {"system": "", "input": "hi", "chosen": "hello", "rejected": "go"}, {**TEXTS, "prompt": [USER]}),
    ("orca_dpo_pairs", {"system": "", "input": "hi", "chosen": "hello", "rejected": "go", "status": "tie"}, None),
    ("ultrafeedback_binarized", {"prompt": "hi", "score_chosen": 8.0, "score_rejected": 8.0, **PAIR}, None),
    ("dpo_mix", {"dataset": "x", "chosen_rating": 5.0, "rejected_rating": 5.0, **PAIR}, None),
    ("dpo_mix", {"dataset": "x", "prompt": [USER], "chosen_rating": 5.0, "rejected_rating": 3.0, **PAIR}, PAIR | MARGIN),
    ("capybara", {"source": "x", "conversation": [{"input": "hi", "output": "hello"}], "prompt": "hi", "rating_chosen": 5, **PAIR}, PAIR),
    (
        "nectar",
        {"prompt": "hi", "answers": [{"answer": "go", "rank": 3.0}, {"answer": "hello", "rank": 1.0}, {"answer": "so", "rank": 2.0}]},
        TEXTS | {"completions": ["hello", "so", "go"]},
    ),
    (
        "webgpt_comparisons",
        {"question": {"full_text": "hi"}, "answer_0": "hello", "score_0": 1.0, "answer_1": "go", "score_1": -1.0},
        TEXTS | MARGIN,
    ),
    ("webgpt_comparisons", {"question": {"full_text": "hi"}, "answer_0": "hello", "score_0": 0.0, "answer_1": "go", "score_1": 0.0}, None),
    (
        "summarize_from_feedback",
        {"info": POST, "summaries": SUMMARIES, "choice": 1, "worker": "w"},
        {**TEXTS, "prompt": "SUBREDDIT: r/tifu\nTITLE: T\nPOST: Long.\nTL;DR:"},
    ),
    (
        "summarize_from_feedback",
        {"info": POST | {"post": None, "article": "Long."}, "summaries": SUMMARIES[::-1], "choice": 0},
        {**TEXTS, "prompt": "Article:\n\nLong.\n\nTL;DR:"},
    ),
    ("skywork_reward_preference", {"source": "x", **PAIR}, PAIR),
    (
        "openai_preference",
        {"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES], "non_preferred_output": [NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CARDS)
def test_formats_of_well_known_sets(name, row, expected):
    assert FORMATS[name](row) == expected
    data = config(format=name, bad_rows="drop")
    kept, rejected = prompted_rows(shaped([row, {"x": 1}], data), data)
    assert rejected.counts == {f"error in data.format {name!r}": 1} | ({"no preference (data.format)": 1} if expected is None else {})
    assert len(kept) == (expected is not None) and all(len(row.completions) == 2 for row in kept)


def test_every_format_has_a_row_here_and_an_unknown_one_names_the_nearest(tmp_path):
    assert {name for name, *_ in CARDS} == set(FORMATS)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"no column 'chosen', .*; its rows look like those of data\.format=helpsteer3$"):
        only({"context": [USER], "response1": "hello", "response2": "go", "overall_preference": 0})
    with pytest.raises(ValueError, match="data.format is 'helpsteer-3'; the nearest is 'helpsteer3', and the formats are hh_rlhf, "):
        load_examples(tmp_path / "a.jsonl", config(format="helpsteer-3"), tiny.byte_tokenizer(), 280)
