"""Scored turns: finds what the assistant said in the text that a chat template makes of a conversation.

A turn is scored from the end of the generation prompt in front of it to the end token that the template puts after its text. The
generation prompt tells the beginning, and the message tells the end. Both are searched in the text of the whole conversation, since
the template may write an earlier turn otherwise than when it was the last.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from alignax.data.rows import Bad, Message, Prompted
from alignax.data.template import REFUSED, Opening, Template, is_prefill, refusals, refused, shared, squeezed

LEFT_OUT = "left out by the chat template: {}"
TOOLS = LEFT_OUT.format("the tools")
SPECIAL = "messages whose own text holds {!r}, which the tokenizer reads as that special token"
REASONING = ("reasoning_content", "reasoning", "thinking")
THINKING = ("enable_thinking", "thinking")  # variables that turn reasoning on and off in templates that have such a variable


class Side(NamedTuple):
    """A conversation as text, and the spans of it that are scored."""

    text: str
    opened: int  # characters in front of the first turn that the generation prompt has too
    turns: list[tuple[int, int]]  # beginning and end of each scored span, in characters
    told: set[str]  # remarks for the report, in words


class Place(NamedTuple):
    """The place in a text where an answer begins."""

    header: int  # the message in front of the answer ends here
    start: int  # the generation prompt ends here, or what the text has of it
    opening: Opening


class Found(NamedTuple):
    """A row rendered as text: its prompt and its sides."""

    prompt: str  # the generation prompt
    sides: list[Side]  # empty for a prompt without completions
    told: set[str]


def find(row: Prompted, template: Template, ends: Sequence[str]) -> Found | Bad:
    """Renders a row as text, and finds its scored turns.

    Args:
      row: a prompt and its completions, all of them messages.
      template: the chat template.
      ends: texts of the tokens that end a turn.
    """
    import jinja2

    bad, own = None, None  # own: the error that the template itself raises
    for prompt, completions in _forms(row):
        try:
            found = _find(prompt, completions, row.tools, template, ends)
            found = found if isinstance(found, Bad) else found._replace(told=found.told | {*row.told})
        except refusals() as error:
            found = refused(error)
            own = own or (found if type(error) is jinja2.TemplateError else None)
        if isinstance(found, Found):
            return found
        bad = found if bad is None or bad.reason == REFUSED != found.reason else bad
    bad = own if own is not None and bad is not None and bad.reason == REFUSED else bad
    assert bad is not None
    return bad


def _find(prompt: list[Message], completions: list[list[Message]], tools: Any, template: Template, ends: Sequence[str]) -> Found | Bad:
    opened = template.text(prompt, tools, opened=True)
    if not any(completions):
        return Found(opened, [], _left_out(prompt, len(prompt), opened, tools, template, opened=True))
    sides: list[Side] = []
    told: set[str] = set()
    for completion in completions:
        messages, first = _joined(prompt, completion)
        side = (_marked if template.has_marks(tools) else _unmarked)(messages, first, prompt, opened, tools, template, ends)
        if isinstance(side, Bad):
            return side
        if any(isinstance(x, dict) and x and str(x) in side.text for x in _arguments(messages)):
            return Bad(REFUSED, "the chat template writes the arguments of tool calls in Python syntax, not in JSON")
        sides.append(side)
        told |= {SPECIAL.format(token) for message in messages for _, words in _own(message) for token in template.special.findall(words)}
        told |= side.told | _left_out(messages, first, side.text, tools, template)
        told |= _unseen(prompt, messages, opened, side, tools, template)
    least = min(side.opened for side in sides)
    if any(side.text[:least] != sides[0].text[:least] for side in sides):
        return Bad("prompt differs", "the chat template writes the prompt differently for each completion")
    return Found(opened, sides, told)


def _joined(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], int]:
    """Joins prompt and completion, and gives the index of the first scored message; a begun answer and its rest become one message."""
    if not is_prefill(prompt) or completion[0]["role"] != "assistant":
        return [*prompt, *completion], len(prompt)
    begun, rest = prompt[-1], completion[0]
    whole = begun | rest | {"content": begun.get("content", "") + rest.get("content", "")}
    return [*prompt[:-1], whole, *completion[1:]], len(prompt) - 1


def _unmarked(
    messages: list[Message], first: int, prompt: list[Message], opened: str, tools: Any, template: Template, ends: Sequence[str]
) -> Side | Bad:
    """Finds the turns from message `first` on by the text of the messages, for a template without marks."""
    text = template.text(messages, tools)
    answers = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    places: list[Place] = []
    for i in answers:
        before = prompt if i == first else messages[:i]
        given = opened if i == first else template.text(before, tools, opened=True, whole=True)
        begun, after = i == first and is_prefill(before), places[-1].start if places else 0
        place = _place(text, given, before, messages[i], tools, template, after, i == answers[-1], begun)
        if place is None:
            return Bad(
                "template is no prefix",
                f"the chat template writes the text before message {i} differently from the prompt that generation would use there; add "
                "{% generation %} marks to the template, or score other turns with data.turns",
            )
        if begun:
            place = place._replace(header=max(given.rfind(_content(before[-1])), 0))
        places.append(place)
    turns, told = [], set()
    bounds = [*(place.header for place in places[1:]), len(text)]
    for i, place, bound in zip(answers, places, bounds, strict=True):
        turn = _turn(text, messages, i, place, bound, tools, template, ends)
        if isinstance(turn, Bad):
            return turn
        turns += [turn[0]] if is_scored(messages[i]) else []
        told |= turn[1]
    return Side(text, places[0].start, turns, told)


def _place(
    text: str, given: str, before: list[Message], answer: Message, tools: Any, template: Template, after: int, last: bool, begun: bool
) -> Place | None:
    """The place where an answer begins, or None if it cannot be told.

    Args:
      text: the text of the whole conversation.
      given: the generation prompt of the answer.
      before: the messages of this prompt.
      answer: the message of the answer.
      tools: tool descriptions for the template.
      template: the chat template.
      after: a number of characters of `text` that certainly lie in front of the answer.
      last: whether the answer ends the conversation.
      begun: whether the prompt has the beginning of the answer.
    """
    opening = Opening("", 0, "", False) if begun else template.opening(before, tools, given, last)
    final = template.opening(before, tools, given, last=True) if not last and not begun else opening
    if final.empty and text.startswith(given[: len(given) - final.beyond] + final.lead):
        opening = final  # after the last question, an answer that calls tools is opened like a last answer
    behind_another = before[-1]["role"] == "assistant" and not begun
    if behind_another and opening.beyond and opening.lead and not opening.empty:
        return None  # the answer in front would end otherwise as the last one, so the header between the two cannot be told
    both, limit = shared(text, given), len(given) - opening.beyond
    cut = len(given) - len(opening.tail) if opening.tail is not None else min(len(template.text(before, tools)), limit)
    if both >= limit:
        start = both if both == len(given) else limit
        words = "" if text.startswith(opening.lead or "\0", limit) else _only_opening(answer, given, opening.tail or "")
        alone = words and not text[start:].lstrip().startswith(words)
        return Place(cut, len(given.rstrip()) - len(words) if alone else start, opening)
    if both >= cut and not behind_another:  # an earlier answer may be opened otherwise than the last one
        return Place(cut, both, opening)
    # The prompt is written otherwise alone than in the whole text, so its last message and the tail are searched there.
    anchor = _content(before[-1]) + given[cut:limit]
    at = text.find(anchor, after) if opening.tail is not None and given[:limit].endswith(anchor) else -1
    return Place(at + len(anchor) - (limit - cut), at + len(anchor), opening) if at >= 0 else None


def _only_opening(answer: Message, given: str, tail: str) -> str:
    """The text of an answer, if it says no more than its prompt ends with, "<think>" say; else empty."""
    (key, words), *more = _own(answer) or [("", "")]
    return words if key == "content" and not more and words in tail and given.rstrip().endswith(words) else ""


def _turn(
    text: str, messages: list[Message], i: int, place: Place, bound: int, tools: Any, template: Template, ends: Sequence[str]
) -> tuple[tuple[int, int], set[str]] | Bad:
    """The span of message i that is scored, and remarks on what is left out; `bound` is where the next answer is opened."""
    header, start, opening = place
    led = start + len(opening.lead) if text.startswith(opening.lead, start) else start
    own = _own(messages[i], ends)
    until = _until(text, [words for _, words in own], messages[i + 1 : i + 2], led, bound)
    said = max([led, *(_said(text, words, led, until) for _, words in own)])
    missing = {key for key, words in own if not _written(words, text[header:until])}
    if opening.empty and _inserted(text, led, opening.lead, _content(messages[i])):
        start = led
    stops = [at + len(end) for end in ends if (at := text.find(end, said, until)) >= 0]
    stop = min(stops) if stops else _unended(text, messages, i, said, until, tools, template)
    # A sampled answer may say nothing and end at once; rows of data with such an answer are refused when they are read.
    if own and not _without(text[start:stop], template.specials if missing == {key for key, _ in own} else ends):
        what = " and ".join(f"{key!r}" for key in sorted(missing)) or "the text"
        return Bad("left out by the template", f"the chat template leaves out {what} of message {i}, and with it all text of that message")
    return (start, stop), {_of(key, "assistant") for key in missing}


def _inserted(text: str, end: int, lead: str, content: str) -> bool:
    """Whether the empty reasoning in front of an answer at `end` comes from the template itself and not from the message."""
    place = text.find(content, end)
    return lead.strip() not in content or place >= 0 and not text[end:place].strip()


def _until(text: str, own: list[str], following: list[Message], start: int, bound: int) -> int:
    """The place where the text of the message after a turn begins, or `bound`."""
    # The last place counts: a short text may stand in the header in front of the message too.
    place = next((at for m in following for _, words in _own(m) if (at := text.rfind(words, start, bound)) >= 0), bound)
    inside = any(0 <= (at := text.find(words, start, bound)) <= place < at + len(words) for words in own)  # the next message is left out
    return bound if inside else place


def _said(text: str, words: str, start: int, until: int) -> int:
    """The end of a turn's words in a text, or of their last one if the template writes them otherwise; `start` if they are left out.

    The place that is found may lie before the true one, in what the template puts there, but never after it.
    """
    for part in (words, next(iter(re.findall(r"[^\s<>]+$", words)), "")):
        if part and (at := text.find(part, start, until)) >= 0:
            return at + len(part)
    return start


def _unended(text: str, messages: list[Message], i: int, said: int, until: int, tools: Any, template: Template) -> int:
    """The end of a turn without an end token: after a special token, or after what the template puts behind it as the last turn.

    A special token behind the arguments of a tool call may belong to the call.
    """
    if i == len(messages) - 1:
        return len(text)
    behind = until - len(text[said:until].lstrip())
    if closing := next((token for token in template.specials if text.startswith(token, behind) and not any(_calls(messages[i]))), ""):
        return behind + len(closing)
    try:
        return max(said, min(until, shared(text, template.text(messages[: i + 1], tools))))
    except refusals():
        return said


def _marked(
    messages: list[Message], first: int, prompt: list[Message], opened: str, tools: Any, template: Template, ends: Sequence[str]
) -> Side | Bad:
    """Finds the turns from message `first` on by the template's marks; what the generation prompt contains is not scored."""
    text, marks = template.marks(messages, tools)
    place = _place(text, opened, prompt, messages[first], tools, template, 0, first == len(messages) - 1, is_prefill(prompt))
    start = place.start if place else 0
    joined: list[list[int]] = []
    for begin, end in marks:
        if place and end <= start:
            continue
        if joined and joined[-1][1] == begin:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    answers = [is_scored(message) for message in messages[first:] if message["role"] == "assistant"]
    wanted = len(answers)
    if place is None or len(joined) < wanted or len(joined) > wanted and not all(answers):
        return Bad("marks do not fit", f"the chat template marks {len(joined)} spans in {wanted} assistant turns; correct its marks")
    header = text[joined[0][0] : start]
    turns = []
    for begin, end in joined:
        begin += len(header) if header and text.startswith(header, begin) else 0
        turns.append((begin, _marked_end(text, begin, end, ends)))
    silent = any(message["role"] == "assistant" and not _own(message) for message in messages[first:])
    if not silent and any(not _without(text[begin:end], ends) for begin, end in turns):
        return Bad("left out by the template", "the chat template marks an empty answer: the text of the answer is left out")
    turns = turns if all(answers) else [turn for turn, scored in zip(turns, answers, strict=True) if scored]
    return Side(text, min(start, turns[0][0]), turns, set())


def _marked_end(text: str, begin: int, end: int, ends: Sequence[str]) -> int:
    """The end of a marked turn: after its last end token, or after the first of several in a row."""
    stop = max((at + len(e) for e in ends if (at := text.rfind(e, begin, end)) >= 0), default=end)
    while doubled := next((e for e in ends for f in ends if text.endswith(e + f, begin, stop)), None):
        stop -= next(len(f) for f in ends if text.endswith(doubled + f, begin, stop))
    return stop


def is_scored(message: Message) -> bool:
    """Whether a message may be scored: it is the assistant's and has no weight of 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _without(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.replace(end, "")
    return text.strip()


def _written(words: str, text: str) -> bool:
    """Whether a text holds the given words, perhaps with other white space."""
    return words in text or squeezed(words) in squeezed(text)


def _content(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _own(message: Message, ends: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The texts, none blank, that the rendering of a message should hold, each with its key in the message."""
    out = [(key, value.strip()) for key in REASONING if isinstance(value := message.get(key), str)][:1]
    content = _content(message)
    while end := next((end for end in ends if content.endswith(end) and content != end), None):
        content = content.removesuffix(end).rstrip()
    out.append(("content", content))
    for call in _calls(message):
        out += [("tool_calls", text) for text in (str(call.get("name", "")), *_leaves(call.get("arguments")))]
    return [(key, text) for key, text in out if text]


def _calls(message: Message) -> Iterator[dict[str, Any]]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            yield call["function"] if isinstance(call.get("function"), dict) else call


def _leaves(value: Any) -> Iterator[str]:
    """Yields the strings in a call's arguments that are letters and digits alone; JSON may escape others."""
    if isinstance(value, str) and value.isalnum():
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(inner)


def _arguments(messages: Iterable[Message]) -> Iterator[Any]:
    for message in messages:
        for call in _calls(message):
            yield call.get("arguments")


def _left_out(messages: list[Message], first: int, text: str, tools: Any, template: Template, opened: bool = False) -> set[str]:
    """Remarks on what a template leaves out: tools, keys of messages, and the text of messages in front of and between the answers."""

    def unread(fewer: list[Message], tools: Any) -> bool:
        try:
            return template.text(fewer, tools, opened=opened) == text
        except refusals():
            return False

    told = {TOOLS} if tools and unread(messages, None) else set()
    for key in {key: None for message in messages for key in message if key not in ("role", "content")}:
        if unread([{k: v for k, v in message.items() if k != key} for message in messages], tools):
            told |= {_of(key, m["role"]) for m in messages if key in m and not (key == "weight" and m["role"] == "assistant")}
    for message in (message for i, message in enumerate(messages) if i < first or message["role"] != "assistant"):
        if not _written(_content(message), text):
            told.add(_of("content", message["role"]))
    return told


def _of(key: str, role: str) -> str:
    return LEFT_OUT.format(f"{key!r} of messages of {role!r}{', in part or whole' if key == 'content' else ''}")


def _unseen(prompt: list[Message], messages: list[Message], given: str, side: Side, tools: Any, template: Template) -> set[str]:
    """Remarks on text that generation has in front of an answer and the row has not."""
    start = side.turns[0][0]
    if side.text[:start] == given:
        return set()
    if side.text[: side.opened] != given[: side.opened]:
        return {"prompts are written differently at generation than before these answers"}
    beyond, slot = given[side.opened :], side.text[side.opened : start]
    if (beyond, slot) not in template.unseen:
        asked, there = (repr(words) if words else "nothing" for words in (beyond, slot))
        told = f"at generation the chat template adds {asked}, but in the data these answers follow {there}"
        template.unseen[beyond, slot] = f"{told}; {_remedy(prompt, messages, side.text[start:], tools, template)}"
    return {template.unseen[beyond, slot]}


def _remedy(prompt: list[Message], messages: list[Message], said: str, tools: Any, template: Template) -> str:
    """The remedy, in words, that makes generation and rows alike: the value of a variable that does so, if there is one."""
    for name in THINKING:
        for value in (False, True) if name in template.source(tools) else ():
            text = template.text(messages, tools, **{name: value})
            given = template.text(prompt, tools, opened=True, **{name: value})
            if text.startswith(given) and text[len(given) :].lstrip() == said.lstrip():
                return f"set --config.data.template.{name}={str(value).lower()}, which makes both begin the same way"
    return (
        "use rows with reasoning (reasoning_content) where the prompt asks for reasoning, or a chat template that begins both the same way"
    )


def _forms(row: Prompted) -> Iterator[tuple[list[Message], list[list[Message]]]]:
    """Yields a row's messages in the forms that templates want for tool calls: arguments as object or text, empty content or none."""
    conversations = [list(row.prompt), *(list(completion) for completion in row.completions)]
    every: list[Message] = [message for conversation in conversations for message in conversation if isinstance(message, dict)]
    called = [message for message in every if message.get("tool_calls")]
    toggles = (False, True) if any(not message.get("content") for message in called) else (False,)
    for as_text in (False, True) if any(True for _ in _arguments(called)) else (False,):
        for toggle in toggles:
            prompt, *rest = [[_form(message, as_text, toggle) for message in conversation] for conversation in conversations]
            yield prompt, rest


def _form(message: Any, as_text: bool, toggle: bool) -> Message:
    if not message.get("tool_calls"):
        return message if "content" in message or not isinstance(message, dict) else message | {"content": ""}
    calls = [_call(call, as_text) for call in message["tool_calls"]] if isinstance(message["tool_calls"], list) else message["tool_calls"]
    message = message | {"tool_calls": calls}
    if toggle and not message.get("content"):
        message = {k: v for k, v in message.items() if k != "content"} if "content" in message else message | {"content": ""}
    return message


def _call(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], as_text)}
    if "name" not in call:
        return call
    value = call.get("arguments")
    if value is None or isinstance(value, str) and not value.strip():
        value = {}  # the function takes no arguments
    if as_text:
        return call | {"arguments": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return call
    return call | {"arguments": read} if isinstance(read, dict) else call
