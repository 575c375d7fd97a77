"""Tokenisation: turns prompts and completions into token ids, ends each completion with one EOS, and counts all that is lost."""

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data import bounds, chat
from alignax.data.bounds import Bound, Way
from alignax.data.counts import Report
from alignax.data.examples import FIELDS, Examples, unpair
from alignax.data.files import rows_and_faults
from alignax.data.kinds import holds_pairs, order_column, prompted_rows, unread
from alignax.data.rows import Bad, Encoded, Message, Prompted, Rejected
from alignax.data.shapes import shaped
from alignax.data.turns import TOOLS, Found

IDENTICAL = "identical after the cut"
COUNTS = (
    "prompts_cut", "completions_cut", "ends_lost", "boundary_merges", "separators_added", "eos_inside", "fronts_written", "ends_written",
    "shortened", "turns_without_eos",
)  # fmt: skip
CUT = "cut prompts that lose the {} at their beginning, in part or whole"
NO_TEMPLATE = "text rows, which use no chat template, so data.template has no effect on them"
BOS_INSIDE = "texts with the token {!r}, which begins a text, behind their beginning"
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 2048, 2**22  # of a chunk: bounds the lists of ids, and keeps the tokenizer's threads busy
PROBES, MOST_PROBES = ("a", "1", "The sky."), 64  # texts that show what a tokenizer adds; the most vocabulary tokens tried after them


class _Fitted(NamedTuple):
    prompt: list[int]
    completions: list[list[int]]
    scored: list[bytes]
    counts: dict[str, int]


def load_examples(
    path: str | pathlib.Path,
    data: Any,
    tokenizer: Any,
    vocab_size: int,
    ends: Collection[int] = (),
    row: Callable[[dict], Any] | None = None,
    whole: bool = False,
) -> tuple[Examples, Report]:
    """Reads and tokenises one source (a file, a folder, or a data set of the hub), as `config.data` says.

    For `ends` and `whole` see `tokenize`; `row` is the experiment's row function, see `alignax.data.shapes.shaped`.
    """
    raw = shaped(rows_and_faults(path), data, row)
    apart = holds_pairs(raw, data)
    if apart:
        data = data.copy_and_resolve_references()
        data.kind = "preference"
    rows, rejected = prompted_rows(raw, data, path)
    not_read = unread(raw, data)
    del raw
    lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    given = {"vocab_size": vocab_size, "ends": ends, "rejected": rejected, "template": dict(data.template), "whole": whole}
    examples, report = tokenize(rows, tokenizer, ordered=bool(order_column(data)), **given, **lengths)
    report = report._replace(unread=not_read)
    return (unpair(examples), report._replace(pairs_split=report.kept)) if apart else (examples, report)


def tokenize(
    rows: Sequence[Prompted],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    vocab_size: int,
    ends: Collection[int] = (),
    rejected: Rejected | None = None,
    template: Mapping[str, Any] = chat.NO_VARIABLES,
    ordered: bool = False,
    whole: bool = False,
) -> tuple[Examples, Report]:
    """Tokenises rows, prompt and completion together as one string.

    A prompt tokenised alone may end in other tokens than in front of its completion. So the boundary is where the ids of the prompt
    alone and of every side stop being the same. A completion is the rest and exactly one end token: the EOS, if it has none.
    The tokenizer's own special tokens stand in front once, even if a text begins with them. If neither the tokenizer nor the prompt
    gives a first token, BOS (else EOS) is put there. Of a very long text only the kept part is tokenised, see `alignax.data.bounds`.
    The chat template alone writes the special tokens of conversations, see `alignax.data.chat.encode`.

    A prompt over `max_prompt_length` (0: no limit) keeps its last tokens, and a BOS in front within that number. A side over
    `max_length` loses the end of its completion, and the EOS with it. Rows in which two completions are then equal are dropped.
    A prompt that leaves no room for one completion token makes a bad row.

    Args:
      rows: the rows of `prompted_rows`, all with the same number N of completions.
      tokenizer: a Hugging Face tokenizer.
      max_length: the most tokens of prompt and completion together.
      max_prompt_length: the most tokens of the prompt.
      vocab_size: rows of the model's embedding; an id at or above it is an error.
      ends: tokens that end a completion beside the tokenizer's EOS, see `alignax.models.hf.end_ids`.
      rejected: the rows that `prompted_rows` left out, for the report; it also says whether a bad row is an error.
      template: values of the chat template's variables.
      ordered: whether the rows have places in a curriculum.
      whole: conversations keep, unscored, what the chat template writes after their last end token; for reward models, see `chat.encode`.

    Returns:
      The examples and the report.
    """
    rejected = rejected or Rejected()
    _check_limits(rows, max_length, max_prompt_length, tokenizer, rejected.path)
    fronts = (tokenizer.decode(_own(tokenizer)[0]), tokenizer.bos_token or "")
    kept = _Kept(tokenizer, {tokenizer.eos_token_id, *ends}, Bound(max_length, max_prompt_length, fronts), rejected, whole)
    for chunk in _chunks(rows):
        kept.add(chunk, _encoded(chunk, kept, template))
        _check_vocabulary(kept.ids[-1], tokenizer, vocab_size)
    if not kept.rows:
        read = rejected.counts.total()
        raise ValueError(
            f"none of the {read} rows of {rejected.path} is left ({_reasons(rejected)}); correct the file or the settings named"
        )
    if template and (texts := sum(isinstance(row.prompt, str) for row in kept.rows)):
        kept.told[NO_TEMPLATE] = texts
    examples = _examples(kept, ordered)
    return examples, _report(examples, kept)


@dataclasses.dataclass
class _Kept:
    """The rows that are kept, in tokens, and their counts; grows by one chunk at a time."""

    tokenizer: Any
    ends: Collection[int]
    bound: Bound
    rejected: Rejected
    whole: bool
    rows: list[Prompted] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)  # one array a chunk
    scored: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)  # of each side
    uncut: tuple[list[int], list[int]] = dataclasses.field(default_factory=lambda: ([], []))
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    told: Counter[str] = dataclasses.field(default_factory=Counter)
    longest_prompt: int = 0

    def fit(self, code: Encoded) -> "_Fitted | Bad":
        """Cuts a row to the length limits."""
        return _fit(code, self.tokenizer, self.ends, self.bound)

    def same(self, code: Encoded) -> Any:
        """The kept part of a row, or the reason why the row is not kept; two parts of a row are compared by it."""
        fitted = self.fit(code)
        return fitted.reason if isinstance(fitted, Bad) else fitted[:3]

    def add(self, chunk: Sequence[Prompted], codes: Sequence[Encoded | Bad]) -> None:
        """Adds the rows of a chunk, cut to length."""
        sides, marks = [], []
        for row, code in zip(chunk, codes, strict=True):
            if isinstance(code, Bad):
                self.rejected.add(code, row.row)
                continue
            self.uncut[0].append(len(code.prompt))
            self.uncut[1].extend(map(len, code.completions))
            self.longest_prompt = max(self.longest_prompt, len(code.text))
            fitted = self.fit(code)
            if isinstance(fitted, Bad):
                # Completions that only the cut made equal are no fault of the row, and there is nothing to correct in it.
                self.rejected.add(fitted, row.row, fault=fitted.reason != IDENTICAL)
                continue
            self.rows.append(row)
            self.prompts.append(code.text)
            self.counts.update(fitted.counts)
            self.told.update(code.told)
            self.told.update(_lost(row, code) if fitted.counts["prompts_cut"] else ())
            sides += [fitted.prompt + completion for completion in fitted.completions]
            marks += [bytes(len(fitted.prompt)) + side for side in fitted.scored]
        self.lengths += map(len, sides)
        self.ids.append(np.fromiter(itertools.chain.from_iterable(sides), np.int32))
        self.scored.append(np.frombuffer(b"".join(marks), np.bool_))


def _lost(row: Prompted, code: Encoded) -> list[str]:
    """Remarks on what a conversation begins with and loses when its prompt is cut: its system message, its tools."""
    if isinstance(row.prompt, str):
        return []
    system = any(message["role"] in ("system", "developer") for message in row.prompt[:1])
    return [CUT.format(what) for what, there in (("system message", system), ("tools", row.tools and TOOLS not in code.told)) if there]


def _examples(kept: _Kept, ordered: bool) -> Examples:
    rows = kept.rows
    return Examples(
        tokens=np.concatenate(kept.ids),
        scored=np.concatenate(kept.scored),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.lengths, dtype=np.int64)]),
        N=len(rows[0].completions),
        prompts=kept.prompts,
        fields={name: np.asarray([row.fields[name] for row in rows], FIELDS[name]) for name in rows[0].fields},
        columns={name: [row.columns[name] for row in rows] for name in rows[0].columns},
        rows=np.array([row.row for row in rows], np.int64),
        conversations=[None if isinstance(row.prompt, str) else (row.prompt, row.tools) for row in rows],
        order=np.asarray([row.order for row in rows], np.float64) if ordered else None,
    )


def _report(examples: Examples, kept: _Kept) -> Report:
    """The report on what became of the rows."""
    counts: dict[str, Any] = {name: kept.counts[name] for name in COUNTS}
    return Report(
        rows=len(kept.rows) + kept.rejected.counts.total(),
        kept=len(kept.rows),
        dropped=dict(kept.rejected.counts),
        bad=kept.rejected.first,
        **counts,
        told=dict(kept.told),
        masks=chat.masks(kept.tokenizer) if any(not isinstance(row.prompt, str) for row in kept.rows) else "",
        pairs_split=0,
        tokens=len(examples.tokens),
        completion_tokens=int(examples.scored.sum()),
        longest=int(examples.lengths.max()),
        responses=examples.N,
        longest_prompt=kept.longest_prompt,
        unread=[],
        uncut=(tuple(kept.uncut[0]), tuple(kept.uncut[1])),
    )


def _reasons(rejected: Rejected) -> str:
    first = {reason: f", such as {shown[0]}" for reason, shown in rejected.first.items()}
    return "; ".join(f"{reason}: {count}{first.get(reason, '')}" for reason, count in rejected.counts.items())


def _check_limits(rows: Sequence[Prompted], max_length: int, max_prompt_length: int, tokenizer: Any, path: Any) -> None:
    if max_length < 2:
        raise ValueError(f"data.max_length is {max_length}; a row needs a prompt token and a completion token: use 2 or more")
    if max_prompt_length < 0 or max_prompt_length >= max_length:
        raise ValueError(
            f"data.max_prompt_length is {max_prompt_length} with data.max_length {max_length}; use less than max_length, "
            "or 0 for prompts that are never cut"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer has no EOS token, so no completion of {path} could be ended; set tokenizer.eos_token to the token "
            "that ends an answer (eos_token in tokenizer_config.json)"
        )
    responses = {len(row.completions) for row in rows}
    if len(responses) > 1:
        raise ValueError(f"{path} has rows of {sorted(responses)} completions; give every row the same number")


def _chunks(rows: Sequence[Prompted]) -> Iterator[Sequence[Prompted]]:
    """Splits rows into chunks that are tokenised together, bounded in rows and in characters."""
    start, size = 0, 0
    for i, row in enumerate(rows):
        if i > start and (i - start == ROWS_AT_ONCE or size > CHARACTERS_AT_ONCE):
            yield rows[start:i]
            start, size = i, 0
        size += _size(row.prompt) * (len(row.completions) + 1) + sum(map(_size, row.completions))
    if start < len(rows):
        yield rows[start:]


def _size(value: str | list[Message]) -> int:
    return len(value) if isinstance(value, str) else sum(len(message.get("content") or "") for message in value)


def _encoded(chunk: Sequence[Prompted], kept: _Kept, template: Mapping[str, Any]) -> list[Encoded | Bad]:
    """Encodes the rows of a chunk, texts and conversations each in their own way, and long rows as far as they are kept."""
    tokenizer, ends = kept.tokenizer, kept.ends
    conversations = [row for row in chunk if not isinstance(row.prompt, str)]
    found = iter(chat.rendered(conversations, tokenizer, ends, template) if conversations else ())
    out: list[Any] = [row if isinstance(row.prompt, str) else next(found) for row in chunk]
    texts = Way(Prompted, lambda row: (row.prompt, row.completions), _part, lambda rows: encode_texts(rows, tokenizer, ends))
    chats = Way(Found, chat.parts, chat.part, lambda rows: chat.tokenized(rows, tokenizer, ends, kept.whole))
    for way in (texts, chats):
        own = [i for i, row in enumerate(out) if isinstance(row, way.kind)]
        for i, code in zip(own, bounds.encoded([out[i] for i in own], way, kept.same, kept.bound), strict=True):
            out[i] = code
    return out


def _part(row: Prompted, prompt: str, rests: Sequence[str]) -> Prompted:
    return row._replace(prompt=prompt, completions=tuple(rests))


def encode_texts(rows: Sequence[Prompted], tokenizer: Any, ends: Collection[int]) -> list[Encoded]:
    """Encodes rows of text: splits them at their boundaries, and ends each completion with one of `ends`, the EOS if it has none."""
    if not rows:
        return []
    bos, eos, own = tokenizer.bos_token_id, tokenizer.eos_token_id, _own(tokenizer)
    prompts = [_once(ids, *own) for ids in _ids([str(row.prompt) for row in rows], tokenizer)]
    sides = iter(_ids([f"{row.prompt}{completion}" for row in rows for completion in row.completions], tokenizer))
    out = []
    for (prompt, written), row in zip(prompts, rows, strict=True):
        full = [_once(next(sides), *own)[0] for _ in row.completions]
        boundary = min(_common(prompt, side) for side in full)
        full = [_until_end(side, text, boundary, tokenizer, ends) for text, side in zip(row.completions, full, strict=True)]
        completions = [_ended(side[boundary:], eos, ends) for side in full]
        written_ends = sum(bool(text) and side[-1] in ends for text, side in zip(row.completions, full, strict=True))
        marks, counts = [b"\1" * len(c) for c in completions], {"fronts_written": int(written), "ends_written": written_ends}
        inside = bos not in (None, eos, *ends) and any(bos in ids for ids in (prompt[1:], *completions))
        told = (BOS_INSIDE.format(tokenizer.bos_token),) if inside else ()
        out.append(Encoded(prompt[:boundary], completions, marks, str(row.prompt), boundary < len(prompt), told=told, counts=counts))
    return out


def prompt_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts without completions, at least one id each."""
    own = _own(tokenizer)
    return [_once(ids, *own)[0] or [_separator(tokenizer)] for ids in _ids(texts, tokenizer)]


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, truncation=False, padding=False, return_attention_mask=False, verbose=False)["input_ids"]


def _own(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts in front of a text, and those that it puts behind it."""
    # Probes tell these tokens, not the last id of each text: a text may itself end in an EOS, which is then part of it. A probe tells
    # nothing if it has no token, and little if it becomes the unknown token and the tokenizer adds it; then the vocabulary is tried.
    found: list[tuple[list[int], list[int]]] = []
    words = map(tokenizer.convert_ids_to_tokens, range(0, len(tokenizer), -(-len(tokenizer) // MOST_PROBES)))
    for text in map(str, itertools.chain(PROBES, words)):
        whole, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        around = [(whole[:i], whole[i + len(bare) :]) for i in places]
        found = [pair for pair in found if pair in around] or around or found
        if len(found) == 1:
            return found[0]
    return found[0] if found else ([], [])


def _once(ids: list[int], front: list[int], end: list[int]) -> tuple[list[int], bool]:
    """Tokens of a text with the tokenizer's front tokens once and without its end tokens; and whether the text wrote the front too."""
    ids = ids[: len(ids) - len(end)]
    written = bool(front) and ids[: 2 * len(front)] == front * 2
    return ids[len(front) :] if written else ids, written


def _separator(tokenizer: Any) -> int:
    """The token that a prompt without tokens is given: BOS, else EOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _fit(row: Encoded, tokenizer: Any, ends: Collection[int], bound: Bound) -> _Fitted | Bad:
    """Cuts an encoded row to the length limits; a bad row if no scored token is left, or if two completions become equal."""
    whole = row.prompt or [_separator(tokenizer)]
    prompt = _cut_prompt(whole, bound.max_prompt_length, tokenizer.bos_token_id)
    room = bound.max_length - len(prompt)
    if room < 1 or not all(any(side[:room]) for side in row.scored):
        least = "at least " if "shortened" in row.counts else ""
        what = f"a prompt of {least}{len(prompt)} tokens leaves no room within max_length {bound.max_length}"
        return Bad("prompt leaves no room", f"{what}; set data.max_prompt_length or raise data.max_length")
    completions = [completion[:room] for completion in row.completions]
    if len(set(map(tuple, completions))) < len(completions):
        return Bad(IDENTICAL, "two completions of the row have the same tokens after the cut")
    counts = {
        "boundary_merges": int(row.merged),
        "separators_added": int(not row.prompt),
        "prompts_cut": int(len(prompt) < len(whole)),
        "completions_cut": sum(len(completion) > room for completion in row.completions),
        "ends_lost": sum(side[room - 1 : room + 1] == b"\1\1" for side in row.scored),
        "eos_inside": sum(_end_inside(*side, ends) for side in zip(completions, row.scored, strict=True)),
        "turns_without_eos": row.turns_without_eos,
        **row.counts,
    }
    return _Fitted(prompt, completions, [side[:room] for side in row.scored], counts)


def _end_inside(completion: list[int], scored: bytes, ends: Collection[int]) -> bool:
    """Whether a scored end token is followed by another scored token."""
    return any(token in ends and scored[i : i + 2] == b"\1\1" for i, token in enumerate(completion[:-1]))


def _until_end(side: list[int], text: Any, boundary: int, tokenizer: Any, ends: Collection[int]) -> list[int]:
    """A side up to its last end token, if only white space of the completion follows that token, as templates write turns."""
    last = next((i for i in range(len(side) - 1, boundary - 1, -1) if side[i] in ends), None) if text[-1:].isspace() else None
    return side if last is None or tokenizer.decode(side[last + 1 :]).strip() else side[: last + 1]


def _ended(completion: list[int], eos: int, ends: Collection[int]) -> list[int]:
    """The completion with one end token: the first of several at its end, or the EOS if it has none."""
    end = len(completion)
    while end and completion[end - 1] in ends:
        end -= 1
    return completion[: end + 1] if end < len(completion) else [*completion, eos]


def _common(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut_prompt(prompt: list[int], max_prompt_length: int, bos: int | None) -> list[int]:
    if max_prompt_length == 0 or len(prompt) <= max_prompt_length:
        return prompt
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - max_prompt_length + len(head) :]


def _check_vocabulary(ids: np.ndarray, tokenizer: Any, vocab_size: int) -> None:
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) lies outside the model's {vocab_size} embedding "
            f"rows: the tokenizer's vocabulary ({len(tokenizer)}) is larger than the embedding; use the model's own tokenizer"
        )
