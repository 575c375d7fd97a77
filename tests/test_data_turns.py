"""The scored parts of conversations under small chat templates of the kinds that models have; brackets by hand mark the scored text."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from alignax.config import default_config, set_field
from alignax.data import chat, load_examples, tokenize
from alignax.data.rows import Bad, Prompted
from alignax.data.tokens import NO_TEMPLATE
from alignax.data.turns import LEFT_OUT, SPECIAL

HEAD = "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
PLAIN = HEAD + "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK + "{% endif %}"
CALLING = PLAIN.replace("{{ m.content }}<|im_end|>\n{% endif %}", "{{ m.content }}" + CALLS + "<|im_end|>\n{% endif %}")
# As Qwen 3: the last answer has its reasoning, or an empty one; earlier ones have none.
SPLIT = (
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
)
THINKING = (
    HEAD + SPLIT + "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    + ASK
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Qwen 3.5: the generation prompt opens the reasoning.
OPENING = THINKING.replace(ASK, ASK + "<think>\n").replace("enable_thinking %}<think>\n\n", "enable_thinking %}{{ '\\n' }}")
# As DeepSeek R1: rows have no reasoning, and the generation prompt opens one.
DROPPING = HEAD + SPLIT + "<|im_start|>assistant\n{{ c }}<|im_end|>\n{% endif %}{% endfor %}" + ASK + "<think>\n{% endif %}"
# As Nemotron: an empty reasoning on one line, which the generation prompt opens on two.
ONE_LINE = OPENING.replace("<think>\n{{ r }}\n</think>\n\n", "{{ '<think>\n' ~ r ~ '\n</think>\n' if r else '<think></think>' }}")
TRIMMING = PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}")
# As Mistral's first ones: the system's words stand in front of the last user's.
INST = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if system and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = PHI.replace("{{ m.content }}<|end|>", "{{ m.content + eos_token }}").replace("{% else %}{{ eos_token }}", "")
# Of channels: the last answer ends otherwise than earlier ones, and thought stands in a channel of its own.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content and loop.last %}<|start|>assistant<|channel|>analysis"
    "<|message|>{{ m.reasoning_content }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As GLM: nothing closes an answer but the header of the next turn.
UNCLOSED = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def says(role, text, **more):
    return {"role": role, "content": text} | more


def conversation(*texts):
    return [says(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def tokenizer_of(template, eos="<|im_end|>", special=()):
    tokenizer = tiny.byte_tokenizer(template, eos="<|im_end|>")
    tokenizer.add_tokens([*special], special_tokens=True)
    tokenizer.eos_token = eos
    return tokenizer


def encoded(template, prompt, *answers, tools=None, turns="last", variables=None, **options):
    """The tokenizer, and the row in tokens: each answer is a text or the messages of a completion."""
    sides = {f"side {i}": [says("assistant", a)] if isinstance(a, str) else a for i, a in enumerate(answers)}
    row = chat.split(prompt, sides, tools, turns)
    assert isinstance(row, Prompted), row
    tokenizer = tokenizer_of(template, **options)
    return tokenizer, chat.encode([row], tokenizer, variables=variables or {})[0]


def shown(template, prompt, *answers, **options):
    """The text of each side after the prompt's last header, with scored text in [ ]."""
    tokenizer, code = encoded(template, prompt, *answers, **options)
    assert not isinstance(code, Bad), code
    out = []
    for ids, scored in zip(code.completions, code.scored, strict=True):
        groups = [(on, [token for token, _ in group]) for on, group in itertools.groupby(zip(ids, scored, strict=True), key=lambda x: x[1])]
        out.append("".join(f"[{tokenizer.decode(group)}]" if on else tokenizer.decode(group) for on, group in groups))
    return out


def spans(tokenizer, code):
    """The scored texts of each side."""
    out = []
    for ids, scored in zip(code.completions, code.scored, strict=True):
        groups = itertools.groupby(zip(ids, scored, strict=True), key=lambda x: x[1])
        out.append([tokenizer.decode([token for token, _ in group]) for on, group in groups if on])
    return out


HI = conversation("hi")
REASONED = [says("assistant", "4", reasoning_content="add")]


@pytest.mark.parametrize(
    ("template", "answer", "scored"),
    [
        (PLAIN, "4", "[4<|im_end|>]"),
        (TRIMMING, " 4 \n", "[4<|im_end|>]"),
        (THINKING, "4", "[4<|im_end|>]"),  # the empty reasoning is the template's
        (THINKING, REASONED, "[<think>\nadd\n</think>\n\n4<|im_end|>]"),
        (THINKING, "<think>add</think>4", "[<think>\nadd\n</think>\n\n4<|im_end|>]"),
        (THINKING, "<think>\n\n</think>\n\n4", "[<think>\n\n</think>\n\n4<|im_end|>]"),  # an empty one that the row itself has
        (OPENING, "4", "[4<|im_end|>]"),
        (OPENING, REASONED, "[add\n</think>\n\n4<|im_end|>]"),
        (ONE_LINE, "4", "[4<|im_end|>]"),
        (ONE_LINE, REASONED, "[add\n</think>\n4<|im_end|>]"),
        (DROPPING, "4", "[4<|im_end|>]"),
        (DROPPING, "<b>4</b>", "[<b>4</b><|im_end|>]"),  # what generation goes on with begins as the answer does
        (DROPPING, "<think>add</think>4", "[4<|im_end|>]"),
        (DROPPING, "<think>\n", "[<think>\n<|im_end|>]"),  # all that it says is what generation goes on with
        (DROPPING, "<think>\n4", "[4<|im_end|>]"),
        (
            ONE_LINE.replace("{{ c }}", "{{ c | trim }}").replace("if r else", "if r else '' if '<think>' in c else"),
            "<think>\n",
            "[<think><|im_end|>]",
        ),
        (THINKING, [says("assistant", "", reasoning_content="add")], "[<think>\nadd\n</think>\n\n<|im_end|>]"),
        (OPENING, [{"role": "assistant", "reasoning_content": "add"}], "[add\n</think>\n\n<|im_end|>]"),
    ],
)
def test_what_is_scored_of_an_answer(template, answer, scored):
    assert shown(template, HI, answer) == [scored]


CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


@pytest.mark.parametrize(
    ("template", "eos", "special", "last", "earlier"),
    [
        (INST, "</s>", (), " {}</s>", " {}</s>"),
        (GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "{}<end_of_turn>", "{}<end_of_turn>"),
        (PHI, "<|endoftext|>", ("<|end|>", "<|endoftext|>"), "{}<|end|>\n<|endoftext|>", "{}<|end|>"),
        (PHI, "<|end|>", ("<|end|>", "<|endoftext|>"), "{}<|end|>", "{}<|end|>"),
        (ZEPHYR, "</s>", (), "{}</s>", "{}</s>"),
        (HARMONY, "<|return|>", CHANNELS, "<|channel|>final<|message|>{}<|return|>", "<|channel|>final<|message|>{}<|end|>"),
        (UNCLOSED, "</s>", ("<|user|>", "<|assistant|>"), "{}", "{}<|user|>"),
    ],
)
def test_answers_of_other_families(template, eos, special, last, earlier):
    """An answer with the words of a header, or of another turn, is found in its own place."""
    words = ["a", "assistant", "user", "a", "a", "user", "i"]
    turns = [says(("assistant", "user")[i % 2], word) for i, word in enumerate(words)]
    tokenizer, code = encoded(template, HI, turns, turns="all", eos=eos, special=special)
    assert spans(tokenizer, code)[0] == [*(earlier.format(word) for word in words[:-1:2]), last.format("i")]
    assert shown(template, HI, "a", eos=eos, special=special) == [f"[{last.format('a')}]"]


def test_several_turns_each_as_the_whole_has_it():
    turns = [says("assistant", "4", reasoning_content="add"), says("user", "and?"), says("assistant", "6")]
    between = "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(THINKING, HI, turns, turns="all") == [f"[4<|im_end|>]{between}<think>\n\n</think>\n\n[6<|im_end|>]"]
    assert shown(OPENING, HI, turns, turns="all") == [f"[4<|im_end|>]{between}<think>\n\n</think>\n\n[6<|im_end|>]"]
    _, code = encoded(THINKING, HI, turns, turns="all")
    assert code.told == {"left out by the chat template: 'reasoning_content' of messages of 'assistant'"}, "the earlier one's is left out"


def test_a_side_with_reasoning_and_one_without_share_their_prompt():
    assert shown(THINKING, HI, REASONED, "5") == ["[<think>\nadd\n</think>\n\n4<|im_end|>]", "<think>\n\n</think>\n\n[5<|im_end|>]"]


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        PLAIN.replace(
            "{{ m.content }}<|im_end|>\n{% endif %}", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endif %}"
        ),
    ],
)
def test_a_sample_that_ends_at_once_has_its_end(template):
    """An empty sample, as a reward model reads it, consists of its end token; an empty row of data is refused earlier."""
    tokenizer = tokenizer_of(template)
    (code,) = chat.encode([Prompted(HI, ([says("assistant", "")],))], tokenizer)
    assert spans(tokenizer, code) == [["<|im_end|>"]]
    assert chat.split(HI, {"a": [says("assistant", "")]}, None, "last").reason == "empty completion"


def test_two_answers_in_a_row():
    """The header of the second answer is the template's; if it cannot be told from the first answer, the row is refused."""
    turns = [says("assistant", "a"), says("assistant", "b")]
    header = "\n<|im_start|>assistant\n"
    assert shown(PLAIN, HI, turns, turns="all") == [f"[a<|im_end|>]{header}[b<|im_end|>]"]
    assert shown(THINKING, HI, turns, turns="all") == [f"[a<|im_end|>]{header}<think>\n\n</think>\n\n[b<|im_end|>]"]
    _, bad = encoded(HARMONY, HI, turns, turns="all", eos="<|return|>", special=CHANNELS)
    assert bad.reason == "template is no prefix"
    row = chat.split(None, {"messages": [*HI, *turns]}, None, "last")
    assert row.told == (chat.GOES_ON,)
    code = chat.encode([row], tokenizer_of(PLAIN))[0]
    assert code.text.endswith("<|im_start|>assistant\na") and chat.GOES_ON in code.told


MARKED = PLAIN.replace(
    "{{ m.content }}<|im_end|>\n{% endif %}", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("key", chat.WEIGHTS)
def test_turns_of_weight_0_are_not_scored(template, key):
    """Rows of OpenAI, Mistral, axolotl and ms-swift mark such turns."""
    turns = conversation("q", "one", "and?", "two", "so?", "three", "and?", "four")
    for i, weight in ((1, 0), (3, 1), (5, False), (7, True)):
        turns[i] = turns[i] | {key: weight}
    whole = chat.split(None, {"messages": turns}, None, "all")
    tokenizer = tokenizer_of(template)
    code = chat.encode([whole], tokenizer)[0]
    assert spans(tokenizer, code) == [["two<|im_end|>", "four<|im_end|>"]] and not code.told
    assert code.text.endswith("one<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n")
    last = chat.encode([chat.split(None, {"messages": [*turns[:6], says("user", "x")]}, None, "last")], tokenizer)[0]
    assert spans(tokenizer, last) == [["two<|im_end|>"]]
    bad = chat.split(None, {"messages": turns[:2]}, None, "all")
    assert bad.reason == "no answer" and "no assistant turn that is to be trained on" in bad.what
    bad = chat.split(None, {"messages": [*HI, says("assistant", "a", **{key: 0.5})]}, None, "all")
    assert bad.reason == "bad weight" and f"{key!r}: 0.5" in bad.what


def test_a_template_that_takes_parts_alone():
    """Templates such as SmolVLM's take lists of parts only; they write nothing for a text."""
    parts = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    for template in (PLAIN, MARKED, THINKING.replace(SPLIT, "").replace("{{ c }}", "{{ m.content }}").replace("{{ r }}", "")):
        seeing = template.replace("{{ m.content }}", parts)
        for prompt in (HI, [*HI, says("assistant", "It is ")]):
            (tokenizer, code), (_, plain) = (encoded(own, prompt, "4", "5 or 6") for own in (seeing, template))
            assert code == plain and tokenizer.decode(code.prompt) == plain.text
        assert chat.encode_prompt(HI, None, tokenizer) == chat.encode_prompt(HI, None, tokenizer_of(template))


def test_the_system_in_front_of_the_last_user_only():
    prompt, turns = [says("system", "be brief"), *HI], [says("assistant", "a"), says("user", "and?"), says("assistant", "b")]
    assert shown(INST, prompt, turns, turns="all", eos="</s>") == ["[ a</s>][INST] be brief\n\nand?[/INST][ b</s>]"]


def test_a_turn_that_a_special_token_closes_and_no_end():
    turns = [says("assistant", "4"), says("user", "and?"), says("assistant", "6", reasoning_content="add")]
    channel = "<|channel|>final<|message|>"
    assert shown(HARMONY, HI, turns, turns="all", eos="<|return|>", special=CHANNELS) == [
        f"[{channel}4<|end|>]<|start|>user<|message|>and?<|end|><|start|>assistant"
        f"[<|channel|>analysis<|message|>add<|end|><|start|>assistant{channel}6<|return|>]"
    ]
    _, code = encoded(HARMONY, HI, turns, turns="all", eos="<|return|>", special=CHANNELS)
    assert code.turns_without_eos == 1
    special = ("<|user|>", "<|assistant|>")
    assert shown(UNCLOSED, HI, turns, turns="all", eos="<|user|>", special=special) == ["[4<|user|>]\nand?<|assistant|>\n[6]"]


def test_a_call_of_tools_that_no_end_closes_is_scored_whole():
    """As GLM's, whose tokenizer has tokens for the tags of arguments and calls."""
    calls = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}<value>{{ c.function.arguments.city }}</value></call>{% endfor %}"
    template, special = UNCLOSED.replace("{{ m.content }}", "{{ m.content }}" + calls), ("<value>", "</value>", "</call>", "<|tool|>")
    turns = [says("assistant", "", tool_calls=[CALL]), says("tool", "18 C"), says("assistant", "18.")]
    expected = "[<call>weather<value>Paris</value></call>]<|tool|>\n18 C<|assistant|>\n[18.]"
    assert shown(template, HI, turns, turns="all", tools=TOOLS, eos="</s>", special=special) == [expected]


def test_a_token_over_the_boundary_is_scored_and_counted():
    spaced = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST] ' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    tokenizer, code = encoded(spaced, HI, "a pear", "a user", eos="</s>")
    assert tokenizer.tokenize("] a")[-1] != "a", "the space belongs to the word"
    assert code.merged and code.text == "[INST] hi [/INST] "
    assert [tokenizer.decode(c) for c in code.completions] == [" a pear</s>", " a user</s>"] and all(map(all, code.scored))
    assert tokenizer.decode(code.prompt) == "[INST] hi [/INST]"
    row = chat.split(HI, {"a": [says("assistant", "a pear")]}, None, "last")
    _, report = tokenize([row], tokenizer, max_length=99, max_prompt_length=0, vocab_size=999)
    assert report.boundary_merges == 1


def test_places_in_characters_of_several_bytes_and_without_offsets(monkeypatch):
    texts = ["é🙂", "🙂 日本"]
    assert shown(PLAIN, conversation("é🙂"), *texts) == [f"[{text}<|im_end|>]" for text in texts]
    tokenizer, code = encoded(PLAIN, conversation("é🙂"), *texts)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encoded(PLAIN, conversation("é🙂"), *texts)[1] == code


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
@pytest.mark.parametrize("content", ["", None])
def test_calls_of_tools_with_arguments_as_object_or_text(arguments, content):
    call = says("assistant", content, tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}])
    turns = [call, says("tool", "18 C"), says("assistant", "18.")]
    expected = (
        '[<call>weather {"city": "Paris"}</call><|im_end|>]\n<|im_start|>tool\n18 C<|im_end|>\n<|im_start|>assistant\n[18.<|im_end|>]'
    )
    assert shown(CALLING, HI, turns, turns="all") == [expected]
    as_text = CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments")  # which an object cannot be added to
    assert shown(as_text, HI, turns, turns="all") == [expected]
    printed = CALLING.replace("c.function.arguments | tojson", "c.function.arguments")  # which Python would write in its own way
    assert shown(printed, HI, turns, turns="all") == [expected]


@pytest.mark.parametrize("arguments", [{"arguments": ""}, {"arguments": None}, {}])
def test_calls_without_arguments_have_none(arguments):
    call = says("assistant", None, tool_calls=[{"type": "function", "function": {"name": "now", **arguments}}])
    for template in (CALLING, CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments")):
        assert shown(template, HI, [call]) == ["[<call>now {}</call><|im_end|>]"]


def test_what_a_template_leaves_out_is_told():
    call = says("assistant", "look", tool_calls=[CALL], reasoning_content="hm", weight=1)
    prompt = [says("user", "hi", name="Ann"), call, says("tool", "18 C", tool_call_id="1"), says("user", "so?")]
    _, code = encoded(PLAIN, prompt, "ok", tools=TOOLS)
    assert code.told == {
        LEFT_OUT.format(what) for what in ("the tools", "'name' of messages of 'user'", "'tool_calls' of messages of 'assistant'",
        "'reasoning_content' of messages of 'assistant'", "'tool_call_id' of messages of 'tool'")
    }  # fmt: skip
    _, code = encoded(PLAIN.replace("messages %}", "messages if m.role != 'tool' %}"), prompt, "ok")
    assert "left out by the chat template: 'content' of messages of 'tool', in part or whole" in code.told
    assert encoded(CALLING.replace("{{ m.content }}", "{{ m.content }}{{ tools }}", 1), prompt[:1], "ok", tools=TOOLS)[1].told == {
        "left out by the chat template: 'name' of messages of 'user'"
    }


def test_special_tokens_in_the_text_of_messages_are_told():
    """As where a dataset holds what a template has written already; tags that are added tokens and not special are ordinary text."""
    rendered = [says("user", "<|im_start|>user\nhi<|im_end|>\n")]
    assert encoded(PLAIN, rendered, "yes")[1].told == {SPECIAL.format("<|im_start|>"), SPECIAL.format("<|im_end|>")}
    assert encoded(PLAIN, HI, "a <b> c", "<s>yes")[1].told == {SPECIAL.format("<s>")}
    tokenizer = tokenizer_of(PLAIN)
    tokenizer.add_tokens(["<think>"])
    row = chat.split(HI, {"a": [says("assistant", "<think>so</think> 4")]}, None, "last")
    assert chat.encode([row], tokenizer)[0].told == set()


@pytest.mark.parametrize("template", [PLAIN, PHI])
def test_an_answer_of_which_only_the_end_is_left_is_a_bad_row(template):
    special = ("<|end|>", "<|endoftext|>") if template == PHI else ()
    _, bad = encoded(template, HI, [says("assistant", "", tool_calls=[CALL])], tools=TOOLS, special=special)
    assert bad.reason == "left out by the template" and "leaves out 'tool_calls' of message 1" in bad.what


@pytest.mark.parametrize(
    ("template", "answer", "begun", "remedy"),
    [
        (THINKING, "4", r"adds nothing, but in the data these answers follow '<think>\n\n</think>\n\n'", "enable_thinking=false"),
        (OPENING, "4", r"adds nothing, but in the data these answers follow '\n</think>\n\n'", "enable_thinking=false"),
        (DROPPING, "4", r"adds '<think>\n', but in the data these answers follow nothing", "begins both the same way"),
    ],
)
def test_what_generation_asks_and_rows_do_not_is_told_with_the_remedy(template, answer, begun, remedy):
    _, code = encoded(template, HI, answer)
    (told,) = code.told
    assert begun in told and remedy in told
    if "enable_thinking" in remedy:
        _, code = encoded(template, HI, answer, variables={"enable_thinking": False})
        assert not code.told
        assert code.text == chat.encode_prompt(HI, None, tokenizer_of(template), {"enable_thinking": False})[0]
    assert not encoded(PLAIN, HI, answer)[1].told and not encoded(OPENING, HI, REASONED)[1].told


def test_variables_of_the_config_reach_rows_and_prompts(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": HI, "completion": [says("assistant", "4")]}) + "\n")
    data = default_config()
    set_field(data, "data.kind=sft")
    options = tokenizer_of(THINKING), 999
    _, report = load_examples(tmp_path / "a.jsonl", data.data, *options)
    assert any("enable_thinking=false" in line and line.endswith(": 1 rows") for line in report.lines())
    set_field(data, "data.template.enable_thinking=false")
    examples, report = load_examples(tmp_path / "a.jsonl", data.data, *options)
    assert not report.told and examples.prompts[0].endswith("<think>\n\n</think>\n\n")
    set_field(data, "data.kind=prompt")
    assert load_examples(tmp_path / "a.jsonl", data.data, *options)[0].prompts == examples.prompts
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "hi"}) + "\n")
    assert load_examples(tmp_path / "text.jsonl", data.data, *options)[1].told == {NO_TEMPLATE: 1}
    set_field(data, "data.template.enable_thinkin=false")
    with pytest.raises(ValueError, match=r"data.template.enable_thinkin'.*never mentions.*the template reads 'enable_thinking'"):
        load_examples(tmp_path / "a.jsonl", data.data, *options)
    with pytest.raises(ValueError, match=r"data.template.messages'.*set by alignax"):
        chat.encode_prompt(HI, None, options[0], {"messages": []})


@pytest.mark.parametrize("begun", ["Let me see.\n<think>", "Let me", " it is ", ""])
@pytest.mark.parametrize("template", [PLAIN, TRIMMING, THINKING, ZEPHYR])
def test_the_beginning_of_an_answer_is_gone_on_with_as_transformers_has_it(template, begun):
    tokenizer = tokenizer_of(template)
    prompt = [*HI, says("assistant", begun)]
    text, ids = chat.encode_prompt(prompt, None, tokenizer)
    assert text == tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_that_go_on_with_an_answer_have_one_turn():
    prompt = [*HI, says("assistant", "It is ")]
    assert shown(PLAIN, prompt, "4.", "5.") == ["[4.<|im_end|>]", "[5.<|im_end|>]"]
    tokenizer, code = encoded(PLAIN, prompt, "4.", "5.")
    assert tokenizer.decode(code.prompt) == code.text == chat.encode_prompt(prompt, None, tokenizer)[0]
    assert not code.told
    bad = chat.encode_prompt([*HI, says("assistant", "", tool_calls=[CALL])], None, tokenizer)
    assert "ends with a tool call of the assistant" in bad.what


def test_parquet_and_json_lines_give_the_same_tokens(tmp_path):
    """Arrow gives every object the keys of all others, with null."""
    rows = []
    for name, key in (("weather", "city"), ("stock", "symbol")):
        call = {"type": "function", "function": {"name": name, "arguments": {key: "Paris"}}}
        schemas = [
            {"name": n, "parameters": {"properties": {k: {"type": "string"}}}} for n, k in (("weather", "city"), ("stock", "symbol"))
        ]
        rows.append({"messages": [*HI, says("assistant", "", tool_calls=[call])], "tools": schemas})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = default_config().data
    data.kind = "sft"
    tokenizer = tokenizer_of("{{ tools | tojson }}" + CALLING)
    lines, parquet = (load_examples(tmp_path / f"rows.{kind}", data, tokenizer, 999) for kind in ("jsonl", "parquet"))
    assert lines[0].digest() == parquet[0].digest() and "null" not in tokenizer.decode(parquet[0].tokens)
    assert not lines[1].told and parquet[1].told == {chat.NULLS[0]: 2}


def test_a_message_in_front_of_an_answer_that_the_template_leaves_out():
    """What is opened behind it is what is opened behind a user's, and its text is told wherever it stands."""
    template = THINKING.replace(
        "{{ m.content }}<|im_end|>\n{% else %}", "{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}"
    ).replace("m.role != 'assistant'", "m.role in ('system', 'user')")
    turns = [says("assistant", "look"), says("function", "18 C"), says("assistant", "18.")]
    header = "\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert shown(template, HI, turns, turns="all") == [f"[look<|im_end|>]{header}[18.<|im_end|>]"]
    assert LEFT_OUT.format("'content' of messages of 'function', in part or whole") in encoded(template, HI, turns, turns="all")[1].told


def test_a_template_that_refuses_is_quoted_and_not_another_try():
    raising = CALLING.replace(
        "{% if m.role != 'assistant' %}", "{% if m.role == 'x' %}{{ raise_exception('no x') }}{% elif m.role != 'assistant' %}"
    )
    turns = [says("assistant", "", tool_calls=[CALL]), says("x", "18 C"), says("assistant", "18.")]
    _, bad = encoded(raising.replace("arguments | tojson", "arguments.items() | list | tojson"), HI, turns, turns="all")
    assert bad.what.endswith("'no x'")
