"""Tokens: a prompt and its completions become ids, split where the tokens say, with one EOS each and every loss counted."""

import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data import bounds, chat
from alignax.data.bounds import Bound
from alignax.data.chat import Encoded
from alignax.data.examples import FIELDS, Examples, unpair
from alignax.data.files import rows_and_faults
from alignax.data.kinds import holds_pairs, order_column, prompted_rows, unread
from alignax.data.rows import Bad, Prompted, Rejected
from alignax.data.shapes import shaped

IDENTICAL = "identical after the cut"
NO_TEMPLATE = "rows of text, which go through no chat template, so that data.template changes nothing in them"
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 2048, 2**22  # bound the memory of lists of ids, and keep the tokenizer's threads busy
PROBES, MOST_PROBES = ("a", "1", "The sky."), 64  # texts that show what a tokenizer adds; how many of its tokens do, after them


class _Fitted(NamedTuple):
    prompt: list[int]
    completions: list[list[int]]
    scored: list[bytes]
    counts: dict[str, int]


class Report(NamedTuple):
    """What became of every row: `kept + sum(dropped.values()) == rows`; the other counts are of kept rows."""

    rows: int
    kept: int
    dropped: dict[str, int]
    bad: dict[str, list[str]]  # the first few bad rows of each reason, in words
    prompts_cut: int
    completions_cut: int
    boundary_merges: int
    separators_added: int
    eos_inside: int
    fronts_written: int  # prompts of text that begin with what the tokenizer itself puts in front; it stands there once
    ends_written: int  # completions of text that end with an end token of their own; one stands there
    shortened: int  # rows of which only the part was tokenised that is kept, so that their lengths are lower bounds
    turns_without_eos: int
    told: dict[str, int]  # what the chat template leaves out of conversations and the like, in words, and its rows
    masks: str  # how the scored turns of conversations were found; empty: there are none
    pairs_split: int  # pairs of which two unpaired rows each were made
    tokens: int
    completion_tokens: int  # scored
    longest: int
    responses: int
    longest_prompt: int  # characters, before any cut
    unread: list[str]  # columns that nothing reads, each with the type of its values
    uncut: tuple[tuple[int, ...], tuple[int, ...]]  # tokens of prompts and of completions, before any cut and those too long for it

    def lines(self) -> list[str]:
        """Lines for the console."""
        lines = [f"rows: {self.kept:,} of {self.rows:,} kept"]
        lines += [f"  dropped, {reason}: {count:,}" for reason, count in sorted(self.dropped.items()) if count]
        sides = self.kept * self.responses
        lines += [
            f"  prompts cut: {self.prompts_cut:,} ({self.prompts_cut / self.kept:.1%} of rows)",
            f"  completions cut, EOS lost: {self.completions_cut:,} ({self.completions_cut / sides:.1%} of completions)",
            f"  tokens merged over the boundary: {self.boundary_merges:,} ({self.boundary_merges / self.kept:.1%} of rows)",
        ]
        if self.separators_added:
            lines.append(f"  prompts without a token, given a BOS or EOS: {self.separators_added:,}")
        if self.eos_inside:
            lines.append(f"  completions with an end token inside the text: {self.eos_inside:,}")
        if self.fronts_written:
            lines.append(f"  prompts that begin with the tokens which the tokenizer puts in front, kept once: {self.fronts_written:,}")
        if self.ends_written:
            lines.append(f"  completions that end with an end token of their own, kept once: {self.ends_written:,}")
        if self.shortened:
            lines.append(
                f"  long rows, tokenised as far as they are kept, so that they are longer than is said of them: {self.shortened:,}"
            )
        if self.unread:
            more = f", and {len(self.unread) - 12} more" if len(self.unread) > 12 else ""
            lines.append(f"  columns not read: {', '.join(self.unread[:12])}{more}; data.columns names those to read{self._system()}")
        if self.masks:
            lines.append(f"  conversations: scored turns are those of {self.masks}")
        lines += [f"  {what}: {count:,} rows" for what, count in sorted(self.told.items())]
        if self.turns_without_eos:
            remedy = "put the template's own into eos_token_id of generation_config.json"
            lines.append(
                f"  scored turns that the chat template ends without an end token, so that no end is learnt: {self.turns_without_eos:,}"
            )
            lines.append(f"    {remedy}")
        if self.pairs_split:
            lines.append(f"  pairs split into a True and a False row each: {self.pairs_split:,}")
        lines.append(f"  tokens: {self.tokens:,}, of them scored {self.completion_tokens:,}; the longest row has {self.longest:,}")
        return lines

    def _system(self) -> str:
        found = next((column.rpartition(" (")[0] for column in self.unread if column.lower().startswith("system")), "")
        return f", such as data.columns.system={found}" if found else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without `uncut`."""
        return {name: value for name, value in self._asdict().items() if name != "uncut"}


def load_examples(
    path: str | pathlib.Path,
    data: Any,
    tokenizer: Any,
    vocab_size: int,
    ends: Collection[int] = (),
    row: Callable[[dict], Any] | None = None,
) -> tuple[Examples, Report]:
    """Read and tokenise one source (a file, a folder, a data set of the hub) as the `config.data` section says.

    For `ends` see `tokenize`; `row` is the experiment's, see `alignax.data.shapes.shaped`.
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
    given = {"vocab_size": vocab_size, "ends": ends, "rejected": rejected, "template": dict(data.template)}
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
) -> tuple[Examples, Report]:
    """Tokenise rows, each side as one string.

    A prompt tokenised alone may end in other tokens than it has in front of its completion, so the boundary is the common
    prefix of ids of the prompt alone and of every side. A completion is the rest and exactly one end: the EOS, where it has none.
    Special tokens in front are the tokenizer's own, once, also where a text begins with them; where neither it nor the prompt gives a
    first token, BOS (else EOS) is put there. Of a very long text only the part is tokenised that is kept, see `alignax.data.bounds`.
    Conversations are tokenised by the chat template alone, see `alignax.data.chat.encode`.

    A prompt over `max_prompt_length` (0: no rule) keeps its last tokens, and a BOS in front within that number; a side over
    `max_length` loses the end of its completion, and the EOS with it. Rows of which two completions are equal after that are
    dropped. A prompt that leaves no room for one completion token is a bad row.

    Args:
      rows: what `prompted_rows` returned, all with the same number N of completions.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens of prompt and completion.
      max_prompt_length: tokens of the prompt.
      vocab_size: rows of the model's embedding; an id at or above it is an error.
      ends: tokens that end a completion beside the tokenizer's EOS, see `alignax.models.hf.end_ids`.
      rejected: what `prompted_rows` has left out, taken up in the report; says what becomes of bad rows.
      template: values of the chat template's variables.
      ordered: whether the rows have places in a curriculum.

    Returns:
      The examples and the report.
    """
    rejected = rejected or Rejected()
    _check_limits(rows, max_length, max_prompt_length, tokenizer, rejected.path)
    ends = {tokenizer.eos_token_id, *ends}
    counts: Counter[str] = Counter()
    kept: list[Prompted] = []
    prompts: list[str] = []
    uncut: tuple[list[int], list[int]] = ([], [])
    ids, scored, lengths, longest_prompt = [], [], [], 0
    told: Counter[str] = Counter()
    bound = bounds.bound(tokenizer, tokenizer.decode(_own(tokenizer)[0]), max_length, max_prompt_length)
    for chunk, encoded in _encoded(rows, tokenizer, ends, template, bound):
        sides, marks = [], []
        for row, code in zip(chunk, encoded, strict=True):
            if isinstance(code, Bad):
                rejected.add(code, row.row)
                continue
            uncut[0].append(len(code.prompt))
            uncut[1].extend(map(len, code.completions))
            longest_prompt = max(longest_prompt, len(code.text))
            fitted = _fit(code, tokenizer, ends, max_length, max_prompt_length)
            if isinstance(fitted, Bad):
                # Equal after the cut is no fault of the row, and nothing could be corrected in it.
                rejected.add(fitted, row.row, fault=fitted.reason != IDENTICAL)
                continue
            kept.append(row)
            prompts.append(code.text)
            counts.update(fitted.counts)
            told.update(code.told)
            told.update([NO_TEMPLATE] if template and isinstance(row.prompt, str) else [])
            sides += [fitted.prompt + completion for completion in fitted.completions]
            marks += [bytes(len(fitted.prompt)) + side for side in fitted.scored]
        lengths += [len(side) for side in sides]
        ids.append(np.fromiter(itertools.chain.from_iterable(sides), np.int32))
        scored.append(np.frombuffer(b"".join(marks), np.bool_))
        _check_vocabulary(ids[-1], tokenizer, vocab_size)
    if not kept:
        read = rejected.counts.total()
        raise ValueError(
            f"none of the {read} rows of {rejected.path} is left ({_reasons(rejected)}); correct the file or the settings named"
        )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    examples = _examples(kept, prompts, np.concatenate(ids), np.concatenate(scored), offsets, ordered)
    return examples, _report(examples, kept, rejected, counts, uncut, longest_prompt, tokenizer)._replace(told=dict(told))


def _examples(
    kept: list[Prompted], prompts: list[str], tokens: np.ndarray, scored: np.ndarray, offsets: np.ndarray, ordered: bool
) -> Examples:
    """Rows that are kept, with their tokens."""
    return Examples(
        tokens=tokens,
        scored=scored,
        offsets=offsets,
        N=len(kept[0].completions),
        prompts=prompts,
        fields={name: np.asarray([row.fields[name] for row in kept], FIELDS[name]) for name in kept[0].fields},
        columns={name: [row.columns[name] for row in kept] for name in kept[0].columns},
        rows=np.array([row.row for row in kept], np.int64),
        order=np.asarray([row.order for row in kept], np.float64) if ordered else None,
    )


def _report(
    examples: Examples, kept: list[Prompted], rejected: Rejected, counts: Counter[str], uncut: Any, longest_prompt: int, tokenizer: Any
) -> Report:
    """What became of the rows; `uncut`: tokens of prompts and of completions before any cut."""
    return Report(
        rows=len(kept) + rejected.counts.total(),
        kept=len(kept),
        dropped=dict(rejected.counts),
        bad=rejected.first,
        prompts_cut=counts["prompts_cut"],
        completions_cut=counts["completions_cut"],
        boundary_merges=counts["boundary_merges"],
        separators_added=counts["separators_added"],
        eos_inside=counts["eos_inside"],
        fronts_written=counts["fronts_written"],
        ends_written=counts["ends_written"],
        shortened=counts["shortened"],
        turns_without_eos=counts["turns_without_eos"],
        told={},
        masks=chat.masks(tokenizer) if any(not isinstance(row.prompt, str) for row in kept) else "",
        pairs_split=0,
        tokens=len(examples.tokens),
        completion_tokens=int(examples.scored.sum()),
        longest=int(examples.lengths.max()),
        responses=examples.N,
        longest_prompt=longest_prompt,
        unread=[],
        uncut=(tuple(uncut[0]), tuple(uncut[1])),
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


def _encoded(
    rows: Sequence[Prompted], tokenizer: Any, ends: Collection[int], template: Mapping[str, Any], bound: Bound
) -> Iterator[tuple[Sequence[Prompted], list[Encoded | Bad]]]:
    """Chunks of rows, in tokens, each kind by its own way."""
    for chunk in _chunks(rows):
        found: list[Encoded | Bad | None] = [bounds.too_long(row) if not isinstance(row.prompt, str) else None for row in chunk]
        left = [i for i, bad in enumerate(found) if bad is None]
        texts, conversations = ([i for i in left if isinstance(chunk[i].prompt, str) is text] for text in (True, False))
        for i, code in zip(texts, _bounded([chunk[i] for i in texts], tokenizer, ends, bound), strict=True):
            found[i] = code
        chats = chat.encode([chunk[i] for i in conversations], tokenizer, ends, template) if conversations else []
        for i, code in zip(conversations, chats, strict=True):
            found[i] = code
        yield chunk, [code for code in found if code is not None]


def _chunks(rows: Sequence[Prompted]) -> Iterator[Sequence[Prompted]]:
    """Rows that are tokenised together: so many that neither they nor their characters are too many."""
    start, size = 0, 0
    for i, row in enumerate(rows):
        if i > start and (i - start == ROWS_AT_ONCE or size > CHARACTERS_AT_ONCE):
            yield rows[start:i]
            start, size = i, 0
        size += bounds.characters(row)
    if start < len(rows):
        yield rows[start:]


def _bounded(rows: Sequence[Prompted], tokenizer: Any, ends: Collection[int], bound: Bound) -> list[Encoded | Bad]:
    """Rows of text in tokens, of long ones only the part that is kept."""
    short = [bounds.shortened(row, bound) for row in rows]
    bad = [bounds.too_long(row) for row in short]
    whole = [row for row, refused in zip(short, bad, strict=True) if refused is None]
    codes = iter(encode_texts(whole, tokenizer, ends))
    out: list[Encoded | Bad] = []
    for row, part, refused in zip(rows, short, bad, strict=True):
        found = refused or next(codes)
        if part is not row and isinstance(found, Encoded):
            if bounds.same_tokens(row, part, found.prompt, found.completions, bound):
                found = found._replace(text=str(row.prompt), counts={**found.counts, "shortened": 1})
            else:
                found = bounds.too_long(row) or encode_texts([row], tokenizer, ends)[0]
        out.append(found)
    return out


def encode_texts(rows: Sequence[Prompted], tokenizer: Any, ends: Collection[int]) -> list[Encoded]:
    """Rows of text in tokens, split at their boundaries, completions ended by one of `ends`: the EOS, where they have none."""
    if not rows:
        return []
    eos, own = tokenizer.eos_token_id, _own(tokenizer)
    prompts = [_once(ids, *own) for ids in _ids([str(row.prompt) for row in rows], tokenizer)]
    sides = iter(_ids([f"{row.prompt}{completion}" for row in rows for completion in row.completions], tokenizer))
    out = []
    for (prompt, written), row in zip(prompts, rows, strict=True):
        full = [_once(next(sides), *own)[0] for _ in row.completions]
        boundary = min(_common(prompt, side) for side in full)
        completions = [_ended(side[boundary:], eos, ends) for side in full]
        written_ends = sum(bool(text) and side[-1] in ends for text, side in zip(row.completions, full, strict=True))
        marks, counts = [b"\1" * len(c) for c in completions], {"fronts_written": int(written), "ends_written": written_ends}
        out.append(Encoded(prompt[:boundary], completions, marks, str(row.prompt), boundary < len(prompt), counts=counts))
    return out


def prompt_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of prompts that stand alone, each at least one."""
    own = _own(tokenizer)
    return [_once(ids, *own)[0] or [_separator(tokenizer)] for ids in _ids(texts, tokenizer)]


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, truncation=False, padding=False, return_attention_mask=False, verbose=False)["input_ids"]


def _own(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts in front of a text, and those behind it."""
    # By probes and not by the last id of each text: a text may itself end in an EOS, which is then part of it. A probe says nothing where
    # it has no token, and little where it becomes the unknown token and that is what the tokenizer adds; then the vocabulary's are asked.
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
    """Tokens of a text without what the tokenizer put behind it, and with its front once; and whether the text had that too."""
    ids = ids[: len(ids) - len(end)]
    written = bool(front) and ids[: 2 * len(front)] == front * 2
    return ids[len(front) :] if written else ids, written


def _separator(tokenizer: Any) -> int:
    """The first token of a prompt that has none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _fit(row: Encoded, tokenizer: Any, ends: Collection[int], max_length: int, max_prompt_length: int) -> _Fitted | Bad:
    """Cut a row to length."""
    bos = tokenizer.bos_token_id
    whole = row.prompt or [_separator(tokenizer)]
    prompt = _cut_prompt(whole, max_prompt_length, bos)
    room = max_length - len(prompt)
    if room < 1 or not all(any(side[:room]) for side in row.scored):
        what = f"a prompt of {len(prompt)} tokens leaves no room within max_length {max_length}"
        return Bad("prompt leaves no room", f"{what}; set data.max_prompt_length or raise data.max_length")
    completions = [completion[:room] for completion in row.completions]
    if len(set(map(tuple, completions))) < len(completions):
        return Bad(IDENTICAL, "two of its completions are the same tokens after the cut")
    counts = {
        "boundary_merges": int(row.merged),
        "separators_added": int(not row.prompt),
        "prompts_cut": int(len(prompt) < len(whole)),
        "completions_cut": sum(len(completion) > room for completion in row.completions),
        "eos_inside": sum(_end_inside(*side, ends) for side in zip(completions, row.scored, strict=True)),
        "turns_without_eos": row.turns_without_eos,
        **row.counts,
    }
    return _Fitted(prompt, completions, [side[:room] for side in row.scored], counts)


def _end_inside(completion: list[int], scored: bytes, ends: Collection[int]) -> bool:
    """Whether a scored end is followed by another scored token."""
    return any(token in ends and scored[i : i + 2] == b"\1\1" for i, token in enumerate(completion[:-1]))


def _ended(completion: list[int], eos: int, ends: Collection[int]) -> list[int]:
    """The completion with the first of the ends at its back alone, or with the EOS where it has none."""
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
