"""Chat templates: renders conversations by a tokenizer's own template and its variables, as text and never as tokens."""

import copy
import dataclasses
import datetime
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignax.data.rows import Bad, Message
from alignax.text import short

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
TODAY = datetime.date.today()  # the day that templates are told without `dated`: one date for all rows, also around midnight
NOW = re.compile(r"""\bstrftime_now\(\s*(['"])([^'"\\]*)\1\s*\)""")
REFUSED = "refused by the template"
QUESTION, ANSWER, THOUGHT, LATER = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"  # placeholders for texts: no text has these characters


class Opening(NamedTuple):
    """The text that a template writes between a message and the answer to it."""

    tail: str | None  # the text behind the message in the generation prompt; None: the template leaves the message out
    beyond: int  # characters at the end of `tail` that rows lack in front of an answer without reasoning
    lead: str  # what rows have there instead, "<think>\\n\\n</think>\\n\\n" say
    empty: bool  # whether `lead` stands where reasoning would be


NO_OPENING = Opening(None, 0, "", False)


@dataclasses.dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with the values of its variables (`data.template`)."""

    tokenizer: Any
    variables: Mapping[str, Any]
    openings: dict[tuple[str, bool], Opening] = dataclasses.field(default_factory=dict)  # (role in front, last answer?) -> opening
    unseen: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # (text at generation, text in rows) -> remark

    def __post_init__(self) -> None:
        """Raises ValueError for a variable that no template of the tokenizer mentions, or that alignax sets itself."""
        own = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - {"documents", "kwargs"} | {"messages"}
        for name in self.variables:
            field = f"config field 'data.template.{name}'"
            if name in own:
                raise ValueError(f"{field}: {name!r} is set by alignax, not by data.template; leave it out")
            own_template = self.tokenizer.chat_template
            sources = [*own_template.values()] if isinstance(own_template, dict) else [self.source(None)]
            if name not in mentioned(self.tokenizer, self.variables):
                raise ValueError(f"{field}: the chat template never mentions {name!r}; {_variables(sources)}")

    def source(self, tools: Any) -> str:
        """The Jinja source of the template, with today's date filled in.

        Raises:
          ValueError: the tokenizer has no chat template.
        """
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            if isinstance(self.tokenizer.chat_template, dict):
                names = ", ".join(map(repr, self.tokenizer.chat_template))
                raise ValueError(
                    f"the tokenizer's chat templates are {names}, and none is called 'default'; rename one to 'default'"
                ) from error
            raise ValueError(
                "the data holds conversations, but the tokenizer has no chat template; put chat_template.jinja into the model's folder, "
                "or use text columns"
            ) from error
        if not isinstance(template, str):
            raise ValueError(
                f"the tokenizer's chat template is {short(template)}, not text; put the model's chat_template.jinja into its folder"
            )
        return told(template, TODAY)

    def has_marks(self, tools: Any) -> bool:
        """Whether the template marks the assistant's own text with `{% generation %}`."""
        return bool(GENERATION.search(self.source(tools)))

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template writes only contents that are lists of parts, not text, as templates of some vision models do."""

        def written(content: Any) -> bool:
            try:
                return QUESTION in self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            except refusals():
                return False

        return not written(QUESTION) and written([{"type": "text", "text": QUESTION}])

    def _given(self, messages: list[Message]) -> list[Message]:
        """The messages in the form that the template takes: contents as text or as parts."""
        if not self.takes_parts:
            return messages
        parts = lambda text: [{"type": "text", "text": text}]
        return [m | {"content": parts(m["content"])} if isinstance(m.get("content"), str) else m for m in messages]

    def text(self, messages: list[Message], tools: Any, opened: bool = False, whole: bool = False, **variables: Any) -> str:
        """Renders messages as text.

        Args:
          messages: a conversation.
          tools: tool descriptions for the template.
          opened: end where the next answer begins; a last message of the assistant is the beginning of that answer.
          whole: a last message of the assistant is a whole answer instead, and another answer follows.
          variables: values of variables that replace those of this object.
        """
        said = dict(self.variables) | variables
        said |= {"chat_template": self.source(tools)} if "strftime_now" in str(self.tokenizer.chat_template) else {}
        on = opened and not whole and is_prefill(messages)
        return self.tokenizer.apply_chat_template(
            self._given(messages), tools=tools, add_generation_prompt=opened and not on, continue_final_message=on, tokenize=False, **said
        )

    def marks(self, messages: list[Message], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Renders messages as text, with the spans (start, end) that the template marks as the assistant's own, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        said = {**self.tokenizer.special_tokens_map, **self.variables}
        source = self.source(tools)
        found: Any = render_jinja_template(
            [self._given(messages)], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **said
        )
        (text,), (spans,) = found
        return text, [(start, end) for start, end in spans if start < end]

    def opening(self, before: list[Message], tools: Any, prompt: str, last: bool) -> Opening:
        """The opening of the answer to messages, which the template tells once for each role in front of the answer.

        Args:
          before: the messages in front of the answer.
          tools: tool descriptions for the template.
          prompt: `before` as `text` renders it with `opened`.
          last: whether the answer ends the conversation, or another follows.
        """
        role = before[-1]["role"], last
        known = self.openings.get(role)
        if known is None or known.tail is None or not prompt.endswith(known.tail):
            try:
                self.openings[role] = self._opening([*before[:-1], before[-1] | {"content": QUESTION}], tools, last)
            except refusals():
                return NO_OPENING
        return self.openings[role]

    def _opening(self, before: list[Message], tools: Any, last: bool) -> Opening:
        after = [] if last else [{"role": "user", "content": LATER}, {"role": "assistant", "content": LATER}]

        def between(text: str, end: int) -> str:
            start = text.rfind(QUESTION, 0, end)
            return text[start + len(QUESTION) : end] if start >= 0 else ""

        prompt = self.text(before, tools, opened=True, whole=True)
        if QUESTION not in prompt:  # the message is left out: what follows a user's message follows it
            user = [*before[:-1], {"role": "user", "content": QUESTION}]
            return NO_OPENING if before[-1]["role"] == "user" else self._opening(user, tools, last)._replace(tail=None)
        tail = between(prompt, len(prompt))
        answer = {"role": "assistant", "content": ANSWER}
        text = self.text([*before, answer, *after], tools)
        front = between(text, text.find(ANSWER))
        start = shared(front, tail)
        lead = front[start:]
        thoughts = [answer | {"reasoning_content": THOUGHT}, answer | {"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}]
        for thinking in thoughts if lead.strip() else ():
            text = self.text([*before, thinking, *after], tools)
            filled = between(text, text.find(ANSWER))[start:]
            if THOUGHT in filled and squeezed(filled.replace(THOUGHT, "")) == squeezed(lead):
                return Opening(tail, len(tail) - start, lead, True)
        return Opening(tail, len(tail) - start, lead, False)

    @functools.cached_property
    def specials(self) -> list[str]:
        """The special and added tokens, which the tokenizer cuts out of a text before all else; longest first."""
        return sorted({*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}, key=len, reverse=True)

    @functools.cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the special tokens alone, without those that are only added, such as "<think>" of most models."""
        own = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True))) or "(?!)")


def dated(tokenizer: Any, day: datetime.date) -> Any:
    """A copy of a tokenizer whose chat templates, such as Llama 3.2's, are told that `day` is today."""
    own, templates = copy.copy(tokenizer), tokenizer.chat_template
    if isinstance(templates, dict):
        own.chat_template = {name: told(source, day) for name, source in templates.items()}
    elif isinstance(templates, str):
        own.chat_template = told(templates, day)
    return own


def told(source: str, day: datetime.date) -> str:
    """A template's source with a day in the place of each call of `strftime_now`, which would look at the clock."""
    now = datetime.datetime.combine(day, datetime.time())
    return NOW.sub(lambda call: repr(now.strftime(call[2])), source)


def mentioned(tokenizer: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps the variables that a chat template of the tokenizer mentions, since variables of another model's template may be given."""
    sources = tokenizer.chat_template
    sources = [*sources.values()] if isinstance(sources, dict) else [str(sources)]
    return {name: value for name, value in variables.items() if any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources)}


def is_prefill(messages: list[Message]) -> bool:
    """Whether a prompt ends in the beginning of an answer, which generation goes on with."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def shared(a: str, b: str) -> int:
    """The length of the longest common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions by which a template may refuse a conversation: it is a program, and may fail in many ways."""
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def refused(error: Exception) -> Bad:
    """The bad row for a conversation that a template refuses with an error.

    Raises:
      ValueError: the template is not valid Jinja.
    """
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        raise ValueError(
            f"the chat template is not valid Jinja (line {error.lineno}: {short(str(error.message))}); correct chat_template.jinja, or "
            "chat_template of tokenizer_config.json, in the model's folder"
        )
    return Bad(REFUSED, f"the chat template refuses the conversation: {short(str(error))}")


def _variables(sources: list[str]) -> str:
    """Names the variables that templates read, in words."""
    import jinja2
    from jinja2 import meta

    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    found: set[str] = set()
    for source in sources:
        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(MARKS.sub("", source))
        except jinja2.TemplateError:
            continue
        own = {name for name in re.findall(r"\bset\s+(\w+)", source) if not re.search(rf"\b{name} is (not )?(un)?defined", source)}
        found |= meta.find_undeclared_variables(tree) - own
    names = sorted(name for name in found - given - set(jinja2.Environment().globals) if not name.endswith("_token"))
    return f"the template reads {', '.join(map(repr, names))}" if names else "the template reads no variables; leave the field out"
