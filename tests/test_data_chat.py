"""Conversations by chat templates of real forms: ChatML, Llama 2's [INST], one with generation marks, one that rewrites history."""

import datetime
import json

import numpy as np
import pytest
import tiny

from alignax.config import default_config
from alignax.data import assemble, chat, decode_example, padded_length, prompted_rows, tokenize
from alignax.data.chat import Encoded, encode, masks
from alignax.data.template import TODAY, Template, dated
from alignax.data.tokens import CUT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no role ' ~ m['role']) }}{% endif %}"
    "{% endfor %}"
)
MARKED = (  # a line end after a block is the template's own, and dropped
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models have it: earlier answers lose what was thought.
REWRITING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}")
TOOLS = "{% if tools %}tools: {{ tools | map(attribute='name') | join(',') }}\n{% endif %}" + CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] if 'content' in m else m['tool_calls'][0]['name'] }}"
)


@pytest.fixture(scope="module")
def chatml():
    return tiny.byte_tokenizer(CHATML)


def test_a_template_that_is_none_is_no_fault_of_a_row():
    broken = tiny.byte_tokenizer("{% for m in messages %}{{ m.role }")
    sides = {side: turns(side, first="assistant") for side in ("chosen", "rejected")}
    prompted, _ = prompted_rows([{"prompt": turns("hi"), **sides}], default_config().data)
    with pytest.raises(ValueError, match=r"chat template is not valid Jinja \(line 1: .*correct chat_template\.jinja"):
        tokenize(prompted, broken, max_length=99, max_prompt_length=0, vocab_size=999)


def test_a_template_tells_the_day_that_the_run_began():
    source = "{{ strftime_now( \"%d %b %Y\" ) if strftime_now is defined }} {{ strftime_now('%H:%M') }}" + MARKED
    tokenizer = tiny.byte_tokenizer(source)
    now, then = dated(tokenizer, datetime.date(2026, 1, 2)), dated(tokenizer, datetime.date(2025, 12, 31))
    for own, said in ((now, "02 Jan 2026 00:00"), (then, "31 Dec 2025 00:00"), (tokenizer, TODAY.strftime("%d %b %Y 00:00"))):
        assert Template(own, {}).text(turns("hi"), None).startswith(said)
        assert Template(own, {}).marks(turns("hi", "ho"), None)[0].startswith(said)
    tokenizer.chat_template = {"default": source, "tool_use": "{{ strftime_now('%Y') }}" + MARKED}
    assert Template(dated(tokenizer, datetime.date(2024, 5, 6)), {}).text(turns("hi"), [{"name": "f"}]).startswith("2024<|im_start|>")
    assert dated(tiny.byte_tokenizer(None), TODAY).chat_template is None and tokenizer.chat_template["default"] == source


@pytest.fixture(scope="module")
def marked():
    return tiny.byte_tokenizer(MARKED)


def turns(*texts, first="user"):
    """Messages whose roles take turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def read(rows, kind="sft", **changes):
    data = default_config().data
    data.update(kind=kind, **changes)
    return prompted_rows(rows, data)


def shown(tokenizer, row, prompt=False):
    """Each side of a row as the scored text in [ ] and the rest outside, or its prompt alone."""
    (code,) = encode([row], tokenizer)
    assert isinstance(code, Encoded), code
    if prompt:
        return tokenizer.decode(code.prompt)
    out = []
    for ids, scored in zip(code.completions, code.scored, strict=True):
        assert scored[0] and scored[-1] and len(ids) == len(scored)
        edges = [0, *(np.flatnonzero(np.diff(list(scored))) + 1), len(ids)]
        parts = [(tokenizer.decode(ids[a:b]), scored[a]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        out.append("".join(f"[{text}]" if on else text for text, on in parts))
    return out


CONVERSATION = [{"role": "system", "content": "be brief"}, *turns("hi", "hello", "and?", "bye", "lost")]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_last_or_all_assistant_turns_are_scored_with_their_eos(template):
    tokenizer = tiny.byte_tokenizer(template)
    (last,), _ = read([{"messages": CONVERSATION}])
    assert shown(tokenizer, last) == ["[bye<|im_end|>]"]
    assert shown(tokenizer, last, prompt=True).endswith("hello<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n")
    (every,), _ = read([{"messages": CONVERSATION}], turns="all")
    assert shown(tokenizer, every) == ["[hello<|im_end|>]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[bye<|im_end|>]"]
    assert shown(tokenizer, every, prompt=True).startswith("<|im_start|>system\nbe brief<|im_end|>\n"), "no BOS that the template has not"
    assert masks(tokenizer).startswith("the template's" if template is MARKED else "the text that")


def test_the_bos_of_the_template_is_the_only_one():
    tokenizer = tiny.byte_tokenizer(INST, eos="</s>")
    (row,), _ = read([{"messages": turns("hi", "hello", "and?", "bye")}], turns="all")
    assert shown(tokenizer, row) == ["[ hello</s>][INST] and? [/INST][ bye</s>]"]
    assert encode([row], tokenizer)[0].prompt.count(0) == 1


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_pairs_with_a_prompt_or_sharing_their_leading_turns(template):
    tokenizer = tiny.byte_tokenizer(template)
    explicit = {
        "prompt": turns("hi", "hello", "and?"),
        "chosen": turns("bye", first="assistant"),
        "rejected": turns("no", first="assistant"),
    }
    shared = {key: explicit["prompt"] + explicit[key] for key in ("chosen", "rejected")}
    (a,), _ = read([explicit], "preference")
    (b,), _ = read([shared], "preference")
    assert a == b and shown(tokenizer, a) == ["[bye<|im_end|>]", "[no<|im_end|>]"]
    assert shown(tokenizer, a, prompt=True).count("hello") == 1


def test_pairs_of_several_answers_are_scored_after_the_prompt_only(chatml):
    row = {"chosen": turns("hi", "a", "so", "b", "then", "c"), "rejected": turns("hi", "a", "so", "x")}
    (pair,), _ = read([row], "preference", turns="all")
    chosen, rejected = shown(chatml, pair)
    assert chosen == "[b<|im_end|>]\n<|im_start|>user\nthen<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]" and rejected == "[x<|im_end|>]"
    with pytest.raises(ValueError, match="'chosen' has 2 assistant turns after the prompt; score them with --config.data.turns=all"):
        read([row], "preference")


def test_rankings_and_labels_of_conversations(chatml):
    answers = [turns(text, first="assistant") for text in "abc"]
    (row,), _ = read([{"prompt": turns("q"), "completions": answers}], "ranked")
    assert shown(chatml, row) == ["[a<|im_end|>]", "[b<|im_end|>]", "[c<|im_end|>]"]
    (row,), _ = read([{"prompt": turns("q"), "completion": answers[0], "label": False}], "unpaired")
    assert shown(chatml, row) == ["[a<|im_end|>]"] and row.fields == {"labels": (False,)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": turns("hi", "a"), "rejected": turns("hi", "a", "b", "c")}, "empty completion"),  # the shared turns are no completion
        ({"chosen": turns("hi", "a"), "rejected": turns("ho", "a")}, "prompt differs"),
        ({"chosen": turns("hi", "a"), "rejected": turns("hi", " ")}, "empty completion"),
        ({"chosen": turns("hi", "a"), "rejected": turns("hi")}, "no answer"),
        ({"chosen": turns("hi", "a"), "rejected": turns("hi", "a", "lost")}, "empty completion"),
        ({"chosen": turns("a", first="assistant"), "rejected": turns("b", first="assistant")}, "no prompt"),
        ({"chosen": turns("hi", "a"), "rejected": [{"role": "user", "content": 3}]}, "not messages"),
        ({"chosen": turns("hi", "a"), "rejected": ["hi", "b"]}, "not messages"),
        ({"chosen": turns("hi", "a"), "rejected": [*turns("hi"), {"role": "assistant", "content": 1, "tool_calls": "x"}]}, "not messages"),
        ({"chosen": turns("hi", "a"), "rejected": turns("hi", "\ud800")}, "invalid Unicode"),
        ({"chosen": turns("hi", "a"), "rejected": "b"}, "not text"),
        ({"chosen": turns("hi", "a"), "rejected": turns("hi", "b"), "tools": "{"}, "bad tools"),
    ],
)
def test_bad_conversations(row, reason):
    good = {"chosen": turns("hi", "a"), "rejected": turns("hi", "b")}
    prompted, rejected = read([good, row], "preference", bad_rows="drop")
    assert len(prompted) == 1 and rejected.counts == {reason: 1}


def test_an_unknown_speaker_of_answers_is_named_and_empty_tools_are_none():
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "judge", "content": "a"}]}]
    _, rejected = read(rows, bad_rows="drop")
    assert "'messages' has no assistant turn; its roles are user, judge" in rejected.first["no answer"][0]
    (row,), _ = read([{"messages": turns("hi", "a"), "tools": " "}])
    assert row.tools is None


def test_a_text_prompt_beside_a_whole_conversation_names_the_remedy():
    row = {"prompt": "well", "chosen": turns("hi", "a"), "rejected": turns("hi", "b")}
    with pytest.raises(ValueError, match=r"'chosen' is a conversation and 'prompt' is text.*--config.data.columns.prompt= \(empty\)"):
        read([row], "preference")
    data = default_config().data
    data.columns.prompt = ""
    assert prompted_rows([row], data)[0][0].prompt == turns("hi")


def test_a_template_that_rewrites_history_is_read_as_the_whole_has_it():
    tokenizer = tiny.byte_tokenizer(REWRITING)
    conversation = turns("hi", "hm|hello", "and?", "hm|bye")
    (every,), _ = read([{"messages": conversation}], turns="all")
    assert shown(tokenizer, every) == ["[hello<|im_end|>]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[hm|bye<|im_end|>]"]
    assert encode([every], tokenizer)[0].told == {"left out by the chat template: 'content' of messages of 'assistant', in part or whole"}
    (last,), _ = read([{"messages": conversation}])
    assert shown(tokenizer, last) == ["[hm|bye<|im_end|>]"] and "hm|hello" not in shown(tokenizer, last, prompt=True)


def test_a_template_that_is_no_text():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = True
    with pytest.raises(ValueError, match="chat template is True, not text"):
        masks(tokenizer)


def test_a_template_that_refuses_and_one_that_is_missing():
    (row,), _ = read([{"messages": [{"role": "system", "content": "x"}, *turns("hi", "a")]}])
    (bad,) = encode([row], tiny.byte_tokenizer(INST, eos="</s>"))
    assert bad.reason == "refused by the template" and "no role system" in bad.what
    with pytest.raises(ValueError, match="no chat template; put chat_template.jinja into the model's folder"):
        encode([row], tiny.byte_tokenizer(None))


def test_a_prompt_that_the_template_changes_with_the_answer_is_a_bad_row():
    tokenizer = tiny.byte_tokenizer("{{ messages[-1]['content'] }}: " + MARKED)
    (row,), _ = read([{"chosen": turns("hi", "a"), "rejected": turns("hi", "b")}], "preference")
    (bad,) = encode([row], tokenizer)
    assert bad.reason == "prompt differs" and "writes the prompt differently for each completion" in bad.what


def test_marks_that_miss_a_turn_are_a_bad_row(chatml):
    tokenizer = tiny.byte_tokenizer(MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"))
    (row,), _ = read([{"messages": turns("hi", "a", "b", "c")}], turns="all")
    assert encode([row], tokenizer)[0].reason == "marks do not fit"


def test_tools_and_calls_go_through_the_template_and_empty_keys_are_left_out():
    tokenizer = tiny.byte_tokenizer(TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    conversation = [*turns("time?"), call, {"role": "tool", "content": "noon", "tool_calls": None}, *turns("noon", first="assistant")]
    for tools in ([{"name": "clock"}], json.dumps([{"name": "clock"}])):
        (row,), _ = read([{"messages": conversation, "tools": tools}], turns="all")
        assert shown(tokenizer, row) == ["[clock<|im_end|>]\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n[noon<|im_end|>]"]
        assert shown(tokenizer, row, prompt=True).startswith("tools: clock\n")


def test_an_eos_is_never_doubled_and_a_missing_one_is_counted(chatml):
    (row,), _ = read([{"messages": turns("hi", "a<|im_end|>", "b", "c<|im_end|>")}], turns="all")
    assert shown(chatml, row) == ["[a<|im_end|>]<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]"]
    other = tiny.byte_tokenizer(CHATML, eos="</s>")  # the template ends turns with a token that is not this tokenizer's EOS
    examples, report = tokenize([row], other, max_length=99, max_prompt_length=0, vocab_size=999)
    assert report.turns_without_eos == 2 and any("without an end token" in line for line in report.lines())
    assert not (examples.tokens[examples.scored] == other.eos_token_id).any()


@pytest.mark.parametrize("behind", ["", "\n", "</s>", "\n</s>"])  # as in Qwen's, Gemma's and both of Phi's templates
def test_a_turn_ends_with_the_first_of_the_ends_at_its_back(behind):
    tokenizer = tiny.byte_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>" + behind), eos="</s>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (row,), _ = read([{"prompt": turns("hi"), "completion": turns("a", first="assistant")}])
    (code,) = encode([row], tokenizer, [end])
    assert tokenizer.decode(code.completions[0]) == "a<|im_end|>" and all(code.scored[0]) and code.turns_without_eos == 0
    (code,) = encode([row], tokenizer)
    assert code.turns_without_eos == ("</s>" not in behind) and tokenizer.decode(code.completions[0]) == f"a<|im_end|>{behind}"


def test_an_end_inside_a_turn_is_counted_and_not_the_last(chatml):
    tokenizer = tiny.byte_tokenizer(CHATML, eos="</s>")
    (row,), _ = read([{"prompt": turns("hi"), "completion": turns("a</s> b", first="assistant")}])
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    examples, report = tokenize([row], tokenizer, max_length=99, max_prompt_length=0, vocab_size=999, ends=ends)
    assert tokenizer.decode(examples.tokens[examples.scored]) == "a</s> b<|im_end|>"
    assert (report.eos_inside, report.turns_without_eos) == (1, 0)


def test_several_spans_reach_the_batch_and_are_cut(chatml):
    rows, _ = read([{"messages": turns("hi", "hello", "and?", "bye")}, {"messages": turns("hi", "hello")}], turns="all")
    options = {"max_prompt_length": 0, "vocab_size": 999}
    examples, report = tokenize(rows, chatml, max_length=99, **options)
    batch = assemble(examples, np.asarray([0]), padded_length(examples))
    tokens, scored = batch["tokens"][0, 0], batch["completion_mask"][0, 0]
    assert chatml.decode(tokens[scored]) == "hello<|im_end|>bye<|im_end|>"
    assert np.diff(scored.astype(int)).tolist().count(1) == 2
    assert examples.prompts[0] == chatml.decode(examples.prompt_tokens(0)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (report.completions_cut, report.eos_inside, report.turns_without_eos) == (0, 0, 0)
    assert report.masks.startswith("the text that") and report.completion_tokens == examples.scored.sum()
    assert "[<|im_end|>] Ċ <|im_start|>" in decode_example(examples, 0, chatml)
    whole = int(examples.lengths[0])
    cut, report = tokenize(rows, chatml, max_length=whole - 2, **options)
    assert len(cut.scored) == len(cut.tokens) and chatml.decode(cut.tokens[whole - 2 :][cut.scored[whole - 2 :]]) == "hello<|im_end|>"
    assert report.completions_cut == 1 and chatml.eos_token_id not in cut.tokens[: whole - 2][-2:] and cut.lengths[0] == whole - 2
    assert report.ends_lost == 1 and any("completions cut: 1 (50.0%), EOS lost: 1" in line for line in report.lines())
    between = tokenize(rows, chatml, max_length=whole - 6, **options)[1]  # the cut lies in front of the second answer
    assert (between.completions_cut, between.ends_lost) == (1, 0)


@pytest.mark.parametrize(
    ("role", "template", "lost"), [("system", CHATML, ["system message"]), ("user", TOOLS, ["tools"]), ("user", CHATML, [])]
)
def test_a_cut_prompt_that_loses_its_system_message_or_its_tools_is_told(role, template, lost):
    tokenizer, tools = tiny.byte_tokenizer(template), [{"name": "f"}]
    prompt = [{"role": role, "content": "Be brief."}, *turns("hi")]
    rows, _ = read([{"prompt": prompt, "completion": turns("ho", first="assistant"), "tools": tools}])
    for most, is_cut in ((20, True), (119, False)):
        _, report = tokenize(rows, tokenizer, max_length=180, max_prompt_length=most, vocab_size=999)
        assert report.prompts_cut == is_cut
        assert [what for what in report.told if what.startswith("cut prompts")] == [CUT.format(what) for what in lost if is_cut]


def test_text_and_conversations_may_share_a_file(chatml):
    rows = [{"prompt": "hi", "completion": " ho"}, {"prompt": turns("hi"), "completion": turns("ho", first="assistant")}]
    prompted, _ = read(rows)
    examples, _ = tokenize(prompted, chatml, max_length=99, max_prompt_length=0, vocab_size=999)
    sides = np.split(examples.tokens, examples.offsets[1:-1])
    assert chatml.decode(sides[0]) == "<s>hi ho<|im_end|>"
    assert chatml.decode(sides[1]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>"


def test_prompts_that_hold_the_answer_and_turns_behind_it_are_told(chatml):
    rows = [{"prompt": turns("hi", "a")}, {"prompt": turns("hi")}]
    prompted, _ = read(rows, "prompt")
    _, report = tokenize(prompted, chatml, max_length=99, max_prompt_length=0, vocab_size=999)
    assert report.told == {chat.BEGUN: 1}
    (row, other), _ = read([{"messages": turns("hi", "a", "b")}, {"messages": turns("hi", "a")}])
    assert (row.told, row.prompt, row.completions) == ((chat.BEHIND,), other.prompt, other.completions) and other.told == ()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_prompt_alone_ends_where_the_answer_begins(template):
    """A prompt without an answer has the tokens that it has before an answer; reward functions get the row's own columns."""
    tokenizer, messages = tiny.byte_tokenizer(template), turns("hi", "hello", "and?")
    (row,), _ = read([{"prompt": messages, "answer": 4, "tools": "[]"}], "prompt")
    (alone,) = encode([row], tokenizer)
    (pair,), _ = read([{"prompt": messages, "completion": turns("bye", first="assistant")}])
    (before,) = encode([pair], tokenizer)
    assert alone.prompt == before.prompt and alone.text == before.text and alone.completions == [[tokenizer.eos_token_id]]
    assert row.columns["answer"] == 4 and row.columns["prompt"] == messages and row.tools is None
    for bad, message in (([], "has no message"), ([{"role": "user"}], "message 0"), (3, "'prompt' is 3, not text")):
        with pytest.raises(ValueError, match=message):
            read([{"prompt": bad}], "prompt")
