"""Conversations: splits lists of messages into prompts and completions, and tokenises them by the tokenizer's own chat template.

The scored tokens are read from the template, never assumed: from its `{% generation %}` marks if it has them, else from the text
that it makes of the whole conversation, see `alignax.data.turns`. A token that spans the boundary is scored, and the report counts
its row.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

from alignax.data import bounds
from alignax.data.rows import Bad, Encoded, Message, Prompted
from alignax.data.shapes import is_system, without_nulls
from alignax.data.template import Template, is_prefill
from alignax.data.turns import REASONING, Found, find, is_scored
from alignax.text import short

BY_MARKS, BY_TEXT = "the template's {% generation %} marks", "the text that the chat template writes for each turn"
NULLS = ("keys with the value null in tool calls or tools, left out",)
GOES_ON = "answers directly after another assistant message, joined with it to one turn; data.turns=all keeps two turns"
BEHIND = "messages after the last answer that is trained on, left out"
BEGUN = "prompts that end with an assistant message, which generation continues; if that message is the answer, remove it from the prompt"
SYSTEMS = "conversations with several system messages, all kept if the chat template writes them"
WEIGHTS = ("weight", "train", "training", "loss")  # keys of OpenAI and Mistral, axolotl (two), ms-swift; 0 or false: not trained on
PARTLY = ("train_detail", "training_detail")
_NO_PROMPT = "{} begins with an assistant turn, so there is no prompt before the scored text; put a user or system message first{}"
_UNLESS = ", give that turn the weight 0, or score the last turn alone (data.turns=last)"
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


def split(prompt: list | None, sides: Mapping[str, Any], tools: Any, turns: str) -> Prompted | Bad:
    """Splits a conversational row into a prompt and its completions.

    If there is no prompt, the leading turns that several sides share become the prompt, and a single side is a whole conversation.
    The completion of a single side begins at its last assistant turn, or with turns="all" at its first. Turns after the last
    assistant turn are left out. An assistant turn whose weight (a key of `WEIGHTS`) is 0 is not scored, and stays as context.

    Args:
      prompt: messages, or None.
      sides: column -> messages.
      tools: a list of tool descriptions, the JSON text of such a list, or None.
      turns: "last" or "all": which assistant turns of a completion are scored.
    """
    values = ({"the prompt": prompt} if prompt is not None else {}) | dict(sides)
    bad = next((bad for name, value in values.items() if (bad := _bad_messages(name, value) or _bad_weight(name, value))), None)
    bad = bad or next((_two_systems(name, prompt) for name, side in sides.items() if prompt and side and is_system(side[0])), None)
    if bad:
        return bad
    prompt, sides = prompt and _weighed(prompt), {name: _weighed(side) for name, side in sides.items()}
    told = NULLS if _nested_nulls([*(prompt or []), *(message for side in sides.values() for message in side)], tools) else ()
    tools = _tools(tools)
    if isinstance(tools, Bad):
        return tools
    whole = {name: _until_last_answer([*(prompt or []), *side], len(prompt or [])) for name, side in sides.items()}
    for name, messages in whole.items():
        if len(messages) <= len(prompt or []):
            roles = ", ".join(dict.fromkeys(message["role"] for message in sides[name])) or "none"
            which = "assistant turn that is to be trained on" if _unweighted(sides[name]) else f"assistant turn; its roles are {roles}"
            return Bad("no answer", f"{name!r} has no {which}")
    start = _start([*whole.values()], prompt, turns)
    for name, messages in whole.items():
        if bad := _bad_completion(name, messages[start:], turns, single=len(sides) == 1):
            return bad
    if start == 0:
        return Bad("no prompt", _NO_PROMPT.format(repr(next(iter(sides))), _UNLESS if turns == "all" and len(sides) == 1 else ""))
    first = next(iter(whole.values()))
    told += (BEHIND,) if any(len(messages) < len(prompt or []) + len(sides[name]) for name, messages in whole.items()) else ()
    told += (GOES_ON,) if prompt is None and is_prefill(first[:start]) else ()
    told += (SYSTEMS,) if any(map(_has_systems, whole.values())) else ()
    return Prompted(first[:start], tuple(messages[start:] for messages in whole.values()), tools=tools, told=told)


def prompt_alone(messages: list, tools: Any) -> Prompted | Bad:
    """Turns messages and tools into a prompt for generation, whose completion has no message yet."""
    bad = _bad_messages("the prompt", messages) if messages else Bad("no prompt", "the prompt has no message; put a user turn there")
    read = _tools(tools)
    if bad or isinstance(read, Bad):
        return bad or read
    if messages[-1].get("tool_calls"):
        return Bad("no prompt", "the prompt ends with a tool call of the assistant; add the tool's answer after the call")
    told = (NULLS if _nested_nulls(messages, tools) else ()) + ((BEGUN,) if is_prefill(messages) else ())
    told += (SYSTEMS,) if _has_systems(messages) else ()
    return Prompted(without_nulls(messages), ([],), tools=read, told=told)


def _two_systems(name: str, prompt: list) -> Bad:
    there = f"as the prompt {short(prompt[0].get('content'))} does" if is_system(prompt[0]) else "after the messages of the prompt"
    return Bad(
        "two system prompts",
        f"{name!r} begins with a system message, {there}; remove a system message, for example in row(row) of the experiment",
    )


def _has_systems(messages: list[Message]) -> bool:
    """Whether a conversation has more than one system message."""
    return sum(map(is_system, messages)) > 1


def _nested_nulls(messages: list[Message], tools: Any) -> bool:
    """Whether tool calls or tool descriptions have keys that hold null."""
    values = [message["tool_calls"] for message in messages if message.get("tool_calls")] + ([tools] if isinstance(tools, list) else [])
    return without_nulls(values) != values


def _tools(tools: Any) -> Any:
    """Reads tool descriptions, from a list or from JSON text, as a list; None if there are none."""
    bad = Bad("bad tools", f"the tools are {short(tools)}; give a list of JSON schemas")
    try:
        tools = json.loads(tools.strip() or "null") if isinstance(tools, str) else without_nulls(tools)
        json.dumps(tools, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return bad
    return (tools or None) if tools is None or isinstance(tools, list) else bad


def _bad_messages(name: str, messages: Any) -> Bad | None:
    for i, message in enumerate(messages):
        if not _is_message(message):
            return Bad("not messages", f"message {i} of {name!r} is {short(message)}, not a message with a role and a text content")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Bad("invalid Unicode", f"{name!r} holds half of a surrogate pair, which is not valid text: {short(messages)}")
    except (TypeError, ValueError, RecursionError):
        return Bad("not messages", f"{name!r} holds a value that JSON cannot represent: {short(messages)}")
    return None


def _bad_weight(name: str, messages: list[Message]) -> Bad | None:
    for i, message in enumerate(messages):
        for key in (*WEIGHTS, *PARTLY) if message["role"] == "assistant" else ():
            if (value := message.get(key)) is not None and (key in PARTLY or value not in (0, 1)):
                what = f"message {i} of {name!r} has {key!r}: {short(value)}, but a message is trained on either as a whole or not at all"
                return Bad("bad weight", f"{what}; use 0 or 1, or leave {key!r} out")
    return None


def _weighed(messages: list[Message]) -> list[Message]:
    """Gives assistant messages that are not trained on the key `weight` with 0, and removes all other keys of `WEIGHTS` and `PARTLY`."""
    out = []
    for message in messages:
        bare = {key: value for key, value in message.items() if key not in (*WEIGHTS, *PARTLY)}
        without = any(message.get(key) == 0 for key in WEIGHTS)
        out.append(message if message["role"] != "assistant" else bare | ({"weight": 0} if without else {}))
    return out


def _unweighted(messages: list[Message]) -> bool:
    return any(message["role"] == "assistant" and not is_scored(message) for message in messages)


def _reasons(message: Message) -> bool:
    return any(isinstance(value := message.get(key), str) and value.strip() for key in REASONING)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and (bool(message.get("tool_calls")) or _reasons(message)))


def _until_last_answer(messages: list[Message], prompt: int) -> list[Message]:
    """The messages up to the last scored assistant turn after the first `prompt` messages, without keys that hold null."""
    last = max((i for i, message in enumerate(messages) if is_scored(message) and i >= prompt), default=-1)
    return without_nulls(messages[: last + 1])


def _start(whole: list[list[Message]], prompt: list | None, turns: str) -> int:
    """The index of the message at which the completions begin."""
    if len(whole) > 1:
        return len(prompt) if prompt is not None else len(list(takewhile(lambda m: all(x == m[0] for x in m), zip(*whole, strict=False))))
    answers = [i for i, message in enumerate(whole[0]) if is_scored(message) and i >= len(prompt or [])]
    return answers[-1] if turns == "last" else answers[0]


def _bad_completion(name: str, completion: list[Message], turns: str, single: bool) -> Bad | None:
    answers = [message for message in completion if is_scored(message)]
    if not answers:
        return Bad("empty completion", f"{name!r} has no turn after the turns that all completions share")
    if completion[0]["role"] != "assistant":
        return Bad(
            "prompt differs",
            f"{name!r} continues with a turn of {completion[0]['role']!r} where the completions begin to differ; this turn must be an "
            "assistant turn",
        )
    if not single and turns == "last" and len(answers) > 1:
        return Bad(
            "several answers", f"{name!r} has {len(answers)} assistant turns after the prompt; score them with --config.data.turns=all"
        )
    for message in answers:
        if not message.get("content", "").strip() and not message.get("tool_calls") and not _reasons(message):
            return Bad("empty completion", f"an assistant turn in {name!r} is empty: {short(message)}")
    return None


def masks(tokenizer: Any) -> str:
    """Tells in words how the scored turns are found with a tokenizer.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    return BY_MARKS if Template(tokenizer, {}).has_marks(None) else BY_TEXT


def encode(
    rows: Sequence[Prompted],
    tokenizer: Any,
    ends: Collection[int] = (),
    variables: Mapping[str, Any] = NO_VARIABLES,
    whole: bool = False,
) -> list[Encoded | Bad]:
    """Encodes conversational rows into tokens exactly as the chat template writes them: no BOS or EOS is added or removed.

    A scored turn ends with the first end token after its text: the tokenizer's EOS or one of `ends`. What the template writes after
    the end token is not scored, and after the last turn it is left out, unless `whole`. Turns that the template closes without an end
    token are counted. Empty reasoning that the template itself writes in front of an answer is not scored either.

    Args:
      rows: prompts and their completions, both conversations.
      tokenizer: a Hugging Face tokenizer with a chat template.
      ends: tokens that end a turn, beside the EOS.
      variables: values of the template's variables.
      whole: completions go on to the end of the text, such as "<|im_end|>\\n", where transformers reads a reward model's score.
    """
    found = rendered(rows, tokenizer, ends, variables)
    codes = iter(tokenized([row for row in found if isinstance(row, Found)], tokenizer, ends, whole))
    return [row if isinstance(row, Bad) else next(codes) for row in found]


def rendered(rows: Sequence[Prompted], tokenizer: Any, ends: Collection[int], variables: Mapping[str, Any]) -> list[Found | Bad]:
    """Renders conversational rows as text, with the places of their scored turns; for the arguments see `encode`."""
    template = Template(tokenizer, variables)
    texts = tokenizer.batch_decode([[end] for end in sorted({tokenizer.eos_token_id, *ends})])
    template.source(None)
    return [find(row, template, texts) for row in rows]


def tokenized(rows: Sequence[Found], tokenizer: Any, ends: Collection[int], whole: bool = False) -> list[Encoded | Bad]:
    """Tokenises the rows that `rendered` found; for `whole` see `encode`."""
    every = [text for row in rows for text in ([side.text for side in row.sides] or [row.prompt])]
    if not every:
        return []
    batch = tokenizer(every, add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokens = iter(Tokens(tokenizer, text, ids, batch, i) for i, (text, ids) in enumerate(zip(every, batch["input_ids"], strict=True)))
    return [_encoded(row, [next(tokens) for _ in row.sides or "1"], {tokenizer.eos_token_id, *ends}, whole) for row in rows]


def parts(row: Found) -> tuple[str, list[str]]:
    """Splits the text of a row at its first scored turn: the text in front of it, and the rest of each side."""
    front = _front(row)
    return (row.sides[0].text[:front] if row.sides else row.prompt), [side.text[front:] for side in row.sides]


def part(row: Found, prompt: str, rests: Sequence[str]) -> Found:
    """Shortens a row to `prompt`, the end or beginning of its prompt, and to `rests`, the beginnings of its rests (see `parts`)."""
    front, sides = _front(row), []
    for side, rest in zip(row.sides, rests, strict=True):
        # A turn whose end is cut off stops beyond the text, so that it does not count as a turn without an end token.
        turns = [(start - front, min(stop - front, len(rest) + 1)) for start, stop in side.turns if start - front < len(rest)]
        turns = [(start + len(prompt), stop + len(prompt)) for start, stop in turns]
        sides.append(side._replace(text=prompt + rest, opened=max(side.opened - front, 0) + len(prompt), turns=turns))
    return row._replace(prompt=row.prompt if row.sides else prompt, sides=sides)


def _front(row: Found) -> int:
    """The number of characters, in front of the scored ones, that all sides of a row share."""
    starts = [side.turns[0][0] for side in row.sides]
    texts = {side.text[:start] for side, start in zip(row.sides, starts, strict=True)}
    return starts[0] if len(texts) == 1 else min((side.opened for side in row.sides), default=len(row.prompt))


def _encoded(row: Found, tokens: list["Tokens"], ends: Collection[int], whole: bool) -> Encoded | Bad:
    if not row.sides:
        (prompt,) = tokens
        eos = prompt.tokenizer.eos_token_id
        if not prompt.ids:
            return Bad("no prompt", "the chat template writes no token for the conversation")
        return Encoded(prompt.ids, [[eos]], [b"\1"], row.prompt, told=row.told)
    if not all(side.turns for side in row.sides):  # happens to a shortened row only
        return Bad("empty completion", "the scored text begins after the end of the text")
    front = _front(row)
    places = [own.place(front) for own in tokens]
    boundary = min(place for place, _ in places)
    while any(own.ids[:boundary] != tokens[0].ids[:boundary] for own in tokens):
        boundary -= 1
    merged = any(inside or place > boundary for place, inside in places)
    completions, marks, without = [], [], 0
    for side, own in zip(row.sides, tokens, strict=True):
        scored = bytearray(len(own.ids))
        for start, stop in side.turns:
            first, inside = (boundary, False) if start == front else own.place(start)
            last, cut = own.place(stop)
            last, merged = last + (cut and last == first), merged or inside
            if last <= first:
                return Bad("empty completion", "the chat template writes no token for an assistant turn")
            scored[first:last] = b"\1" * (last - first)
            without += own.ids[last - 1] not in ends and stop <= len(side.text)
        end = len(scored) if whole else scored.rindex(1) + 1
        completions.append(own.ids[boundary:end])
        marks.append(bytes(scored[boundary:end]))
    return Encoded(tokens[0].ids[:boundary], completions, marks, row.sides[0].text[:front], merged, without, row.told)


class Tokens(NamedTuple):
    """The tokens of a text, with the places of tokens in it."""

    tokenizer: Any
    text: str
    ids: list[int]
    batch: Any  # the tokenizer's output for several texts, which knows the places of tokens
    row: int  # the place of this text in `batch`

    def place(self, at: int) -> tuple[int, bool]:
        """The number of tokens that end before character `at`, and whether the next token begins before it and so spans it."""
        if at >= len(self.text) or at == 0:
            return (len(self.ids) if at else 0), False
        if self.tokenizer.is_fast and (token := self.batch.char_to_token(self.row, at)) is not None:
            start = self.batch.token_to_chars(self.row, token).start
            if start < at:
                return token, True
            if token == 0 or (before := self.batch.token_to_chars(self.row, token - 1)) is not None and before.end == at:
                return token, False
        # The tokenizer tells no places of tokens here, or none of white space, so the text in front is tokenised alone.
        alone = self.tokenizer(self.text[:at], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        pairs = zip(alone, self.ids, strict=False)
        common = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(alone), len(self.ids)))
        return common, common < len(alone)


def encode_prompt(
    messages: Any, tools: Any, tokenizer: Any, variables: Mapping[str, Any] = NO_VARIABLES, most: int = sys.maxsize
) -> tuple[str, list[int]] | Bad:
    """Encodes a conversation for generation: its text and tokens up to the next answer, as training rows have them.

    A last message of the assistant is the beginning of that answer, which goes on. Of a long conversation with more than `most` tokens
    only the beginning is encoded, see `alignax.data.bounds.beginning`.
    """
    row = prompt_alone(messages, tools)
    found = row if isinstance(row, Bad) else rendered([row], tokenizer, (), variables)[0]
    if isinstance(found, Bad):
        return found
    code = bounds.beginning(found.prompt, lambda own: tokenized([part(found, own.prompt, ())], tokenizer, ())[0], most)
    return code if isinstance(code, Bad) else (code.text, code.prompt)
