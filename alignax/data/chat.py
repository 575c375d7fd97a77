"""Conversations: lists of messages become prompts and completions, and tokens by the tokenizer's own chat template.

Which tokens are scored is read off the template, never assumed: off its `{% generation %}` marks where it has them, else off
prefixes. The tokens of a conversation up to a turn must be a prefix of the tokens of the whole, else the row is bad.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from alignax.data.files import short
from alignax.data.rows import Bad, Message, Prompted

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BY_MARKS, BY_PREFIXES = "the template's {% generation %} marks", "prefixes of the chat template"


class Encoded(NamedTuple):
    """A row in tokens: the prompt, and N completions, each from its first scored token to its last."""

    prompt: list[int]
    completions: list[list[int]]
    scored: list[bytes]  # as completions, 1 for a scored token and 0 for another
    text: str  # of the prompt
    merged: bool = False  # a token spans the boundary
    turns_without_eos: int = 0
    counts: Mapping[str, int] = {}  # of texts: further counts of the report


def split(prompt: list | None, sides: Mapping[str, Any], tools: Any, turns: str) -> Prompted | Bad:
    """Prompt and completions of a conversational row.

    Without a prompt, several sides share their leading turns, and a single one is a whole conversation, whose completion
    begins at its last assistant turn, or with turns="all" at its first. What follows the last assistant turn is left out.

    Args:
      prompt: messages, or None.
      sides: column -> messages.
      tools: a list of tool descriptions or its JSON, or None.
      turns: "last" or "all": the assistant turns of a completion that are scored.
    """
    values = ({"the prompt": prompt} if prompt is not None else {}) | dict(sides)
    bad = next((bad for name, value in values.items() if (bad := _bad_messages(name, value))), None)
    if bad:
        return bad
    tools = _tools(tools)
    if isinstance(tools, Bad):
        return tools
    whole = {name: _until_last_answer([*(prompt or []), *side], len(prompt or [])) for name, side in sides.items()}
    for name, messages in whole.items():
        if len(messages) <= len(prompt or []):
            return Bad("no answer", f"{name!r} has no assistant turn")
    start = _start([*whole.values()], prompt, turns)
    for name, messages in whole.items():
        if bad := _bad_completion(name, messages[start:], turns, single=len(sides) == 1):
            return bad
    if start == 0:
        return Bad("no prompt", f"{next(iter(sides))!r} begins with the assistant's turn; put a user turn in front")
    first = next(iter(whole.values()))
    return Prompted(first[:start], tuple(messages[start:] for messages in whole.values()), tools=tools)


def prompt_alone(messages: list, tools: Any) -> Prompted | Bad:
    """A conversation that is to be gone on with: its completion has no message yet."""
    bad = _bad_messages("the prompt", messages) if messages else Bad("no prompt", "the prompt has no message; put a user turn there")
    tools = _tools(tools)
    if bad or isinstance(tools, Bad):
        return bad or tools
    return Prompted(messages, ([],), tools=tools)


def _tools(tools: Any) -> Any:
    """A list of tool descriptions or its JSON, as a list; None of none."""
    bad = Bad("bad tools", f"the tools are {short(tools)}; give a list of JSON schemas")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        json.dumps(tools, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return bad
    return (tools or None) if tools is None or isinstance(tools, list) else bad


def _bad_messages(name: str, messages: Any) -> Bad | None:
    for i, message in enumerate(messages):
        if not _is_message(message):
            return Bad("not messages", f"message {i} of {name!r} is {short(message)}, not a role with a content of text")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Bad("invalid Unicode", f"{name!r} holds half a surrogate pair, which is no text: {short(messages)}")
    except (TypeError, ValueError, RecursionError):
        return Bad("not messages", f"{name!r} holds what JSON cannot say: {short(messages)}")
    return None


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _until_last_answer(messages: list[Message], prompt: int) -> list[Message]:
    """Messages up to the last assistant turn after the prompt, without the empty keys that columnar files give them."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= prompt), default=-1)
    return [{key: value for key, value in message.items() if value is not None} for message in messages[: last + 1]]


def _start(whole: list[list[Message]], prompt: list | None, turns: str) -> int:
    """The index of the message that the completions begin with."""
    if len(whole) > 1:
        return len(prompt) if prompt is not None else len(list(takewhile(lambda m: all(x == m[0] for x in m), zip(*whole, strict=False))))
    answers = [i for i, message in enumerate(whole[0]) if message["role"] == "assistant" and i >= len(prompt or [])]
    return answers[-1] if turns == "last" else answers[0]


def _bad_completion(name: str, completion: list[Message], turns: str, single: bool) -> Bad | None:
    answers = [message for message in completion if message["role"] == "assistant"]
    if not answers:
        return Bad("empty completion", f"{name!r} has no turn after those that all sides share")
    if completion[0]["role"] != "assistant":
        return Bad("prompt differs", f"{name!r} goes on with a turn of {completion[0]['role']!r} where the sides begin to differ")
    if not single and turns == "last" and len(answers) > 1:
        return Bad(
            "several answers", f"{name!r} has {len(answers)} assistant turns after the prompt; score them with --config.data.turns=all"
        )
    for message in answers:
        if not message.get("content", "").strip() and not message.get("tool_calls"):
            return Bad("empty completion", f"an assistant turn in {name!r} is empty: {short(message)}")
    return None


def masks(tokenizer: Any) -> str:
    """How scored turns are found, in words.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    return BY_MARKS if GENERATION.search(_template(tokenizer, None)) else BY_PREFIXES


def _template(tokenizer: Any, tools: Any) -> str:
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise ValueError(
            "the data holds conversations, and the tokenizer has no chat template; put the model's chat_template.jinja into its "
            "folder, or use columns of text"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"the tokenizer's chat template is {short(template)}, not text; put the model's chat_template.jinja into its folder"
        )
    return template


def encode(rows: Sequence[Prompted], tokenizer: Any) -> list[Encoded | Bad]:
    """Tokens of conversational rows, as the chat template has them: no BOS and no EOS is added, and none taken away.

    A scored turn ends with its first EOS in a row of them; what the template puts behind that is not scored, and behind the
    last turn it is left out. A turn that the template ends without an EOS is counted.
    """
    spans = _by_marks if masks(tokenizer) == BY_MARKS else _by_prefixes
    return [_row(row, tokenizer, spans) for row in rows]


Spans = tuple[list[int], list[tuple[int, int]]]  # tokens of a conversation, and the beginning and end of each scored turn


def _row(row: Prompted, tokenizer: Any, spans: Callable[[Any, Prompted, Any], Spans | Bad]) -> Encoded | Bad:
    if not any(row.completions):
        alone = encode_prompt(row.prompt, row.tools, tokenizer)
        return alone if isinstance(alone, Bad) else Encoded(alone[1], [[tokenizer.eos_token_id]], [b"\1"], alone[0])
    sides = []
    try:
        text = _text(tokenizer, row.prompt, row.tools, opened=True)
        for completion in row.completions:
            found = spans(tokenizer, row, completion)
            if isinstance(found, Bad):
                return found
            sides.append(_side(*found, tokenizer.eos_token_id))
    except _refusals() as error:
        return _refused(error)
    prompts = [prompt for prompt, *_ in sides]
    if any(prompt != prompts[0] for prompt in prompts):
        return Bad("prompt differs", "the chat template renders the prompt in another way before each side")
    _, completions, scored, without = zip(*sides, strict=True)
    return Encoded(prompts[0], [*completions], [*scored], text, turns_without_eos=sum(without))


def encode_prompt(messages: Any, tools: Any, tokenizer: Any) -> tuple[str, list[int]] | Bad:
    """Text and tokens of a conversation up to where the next answer begins, as rows have them."""
    if bad := _bad_messages("the prompt", messages):
        return bad
    _template(tokenizer, tools)
    try:
        text = _text(tokenizer, messages, tools, opened=True)
    except _refusals() as error:
        return _refused(error)
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return (text, ids) if ids else Bad("no prompt", "the chat template makes no token of the conversation")


def _refusals() -> tuple[type[Exception], ...]:
    """A template is a program of its own, and may refuse a conversation in any of these ways."""
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def _refused(error: Exception) -> Bad:
    return Bad("refused by the template", f"the chat template refuses the conversation: {short(str(error))}")


def _text(tokenizer: Any, messages: Any, tools: Any, opened: bool = False) -> str:
    """The messages as the template has them; `opened`: up to where the next answer begins."""
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=opened, tokenize=False)


def _by_prefixes(tokenizer: Any, row: Prompted, completion: list[Message]) -> Spans | Bad:
    messages = [*row.prompt, *completion]
    turns = [i for i, m in enumerate(messages) if i >= len(row.prompt) and m["role"] == "assistant"]
    texts = [_text(tokenizer, messages, row.tools)]
    for i in turns:
        texts += [_text(tokenizer, messages[:i], row.tools, opened=True), _text(tokenizer, messages[: i + 1], row.tools)]
    ids, *parts = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    for k, part in enumerate(parts):
        if ids[: len(part)] != part:
            where = f"{'end' if k % 2 else 'beginning'} of turn {turns[k // 2]}"
            what = f"the tokens up to the {where} are no prefix of the tokens of the whole: the chat template changes with what follows"
            return Bad("template is no prefix", f"{what}; give it {{% generation %}} marks, or score other turns with data.turns")
    spans = [(len(start), len(end)) for start, end in zip(parts[::2], parts[1::2], strict=True)]
    if any(start >= end for start, end in spans):
        return Bad("empty completion", "the chat template makes no token of an assistant turn")
    return ids, spans


def _by_marks(tokenizer: Any, row: Prompted, completion: list[Message]) -> Spans | Bad:
    messages = [*row.prompt, *completion]
    out = tokenizer.apply_chat_template(messages, tools=row.tools, return_dict=True, return_assistant_tokens_mask=True)
    mask = [0, *out["assistant_masks"], 0]
    starts = [i for i in range(1, len(mask)) if mask[i] > mask[i - 1]]
    ends = [i for i in range(1, len(mask)) if mask[i] < mask[i - 1]]
    turns = sum(m["role"] == "assistant" for m in messages)
    if len(starts) != turns:
        return Bad("marks do not fit", f"the chat template marks {len(starts)} spans in {turns} assistant turns; correct its marks")
    spans = [(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)]
    return out["input_ids"], spans[-sum(m["role"] == "assistant" for m in completion) :]


def _side(ids: list[int], spans: list[tuple[int, int]], eos: int) -> tuple[list[int], list[int], bytes, int]:
    """Prompt, completion, the completion's mask, and the number of its turns without an EOS."""
    scored, without = [False] * len(ids), 0
    for start, end in spans:
        last = max((i for i in range(start, end) if ids[i] == eos), default=None)
        if last is None:
            without, last = without + 1, end - 1
        while last > start and ids[last] == ids[last - 1] == eos:
            last -= 1
        scored[start : last + 1] = [True] * (last + 1 - start)
    first, stop = scored.index(True), len(scored) - scored[::-1].index(True)
    return ids[:first], ids[first:stop], bytes(scored[first:stop]), without
