"""Tokens: a prompt and its completions become ids, split where the tokens say, with one EOS each and every loss counted."""

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data.rows import Bad, Prompted, preference_rows, read_rows, reject, sft_rows

Encoded = tuple[list[int], list[list[int]]]  # the prompt alone, and the N sides
IDENTICAL = "identical after the cut"
ROWS_AT_ONCE = 2048  # bounds the memory of Python lists of ids, and keeps the tokenizer's threads busy


@dataclasses.dataclass(frozen=True)
class Examples:
    """n tokenised rows of N responses each, stored flat: side s = row * N + response is `tokens[offsets[s]:offsets[s + 1]]`.

    The N sides of a row begin with the same prompt ids. A text in `prompts` is what the file holds, before any cut.
    """

    tokens: np.ndarray  # [total] int32
    offsets: np.ndarray  # [n*N + 1] int64
    prompt_lengths: np.ndarray  # [n*N] int32, at least 1
    N: int
    prompts: list[str]  # [n]
    completions: list[tuple[str, ...]]  # [n] of N

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each side, prompt included: [n*N] int64."""
        return np.diff(self.offsets)


class _Fitted(NamedTuple):
    prompt: list[int]
    completions: list[list[int]]
    counts: dict[str, int]


class Report(NamedTuple):
    """What became of every row: `kept + sum(dropped.values()) == rows`; the other counts are of kept rows."""

    rows: int
    kept: int
    dropped: dict[str, int]
    prompts_cut: int
    completions_cut: int
    boundary_merges: int
    separators_added: int
    eos_inside: int
    tokens: int
    completion_tokens: int
    longest: int
    responses: int

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
            lines.append(f"  completions with an EOS inside the text: {self.eos_inside:,}")
        lines.append(f"  tokens: {self.tokens:,}, of them scored {self.completion_tokens:,}; the longest row has {self.longest:,}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self._asdict(), "dropped": dict(self.dropped)}


def load_examples(path: str | pathlib.Path, data, tokenizer, vocab_size: int) -> tuple[Examples, Report]:
    """Read and tokenise one file or folder as the `config.data` section says."""
    kinds = {"preference": preference_rows, "sft": sft_rows}
    if data.kind not in kinds:
        raise ValueError(f"data.kind is {data.kind!r}; use one of {', '.join(kinds)}")
    rows, dropped = kinds[data.kind](read_rows(path), data, path)
    return tokenize(
        rows,
        tokenizer,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        vocab_size=vocab_size,
        bad_rows=data.bad_rows,
        path=path,
        dropped=dropped,
    )


def tokenize(
    rows: Sequence[Prompted],
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int,
    vocab_size: int,
    bad_rows: str = "error",
    path: str | pathlib.Path = "data",
    dropped: Mapping[str, int] | None = None,
) -> tuple[Examples, Report]:
    """Tokenise rows, each side as one string.

    A prompt tokenised alone may end in other tokens than it has in front of its completion, so the boundary is the common
    prefix of ids of the prompt alone and of every side. A completion is the rest and exactly one EOS. Special tokens in
    front are the tokenizer's own; where neither it nor the prompt gives a first token, BOS (else EOS) is put there.

    A prompt over `max_prompt_length` (0: no rule) keeps its last tokens, and a BOS in front within that number; a side over
    `max_length` loses the end of its completion, and the EOS with it. Rows equal in all their N > 1 sides after that are
    dropped. A prompt that leaves no room for one completion token is a bad row (`bad_rows`: "error" or "drop").

    Args:
      rows: what `preference_rows` or `sft_rows` returned, all with the same number N of completions.
      tokenizer: a Hugging Face tokenizer.
      vocab_size: rows of the model's embedding; an id at or above it is an error.
      path: named in errors.
      dropped: counts of rows left out before, taken up in the report.
    Returns: the examples and the report.
    """
    _check_limits(max_length, max_prompt_length, tokenizer, path)
    responses = {len(row.completions) for row in rows}
    if len(responses) > 1:
        raise ValueError(f"{path} has rows of {sorted(responses)} completions; give every row the same number")
    left_out: Counter[str] = Counter(dropped or {})
    counts: Counter[str] = Counter()
    kept: list[Prompted] = []
    ids, lengths, prompt_lengths = [], [], []
    for chunk, encoded in _encoded(rows, tokenizer):
        sides: list[list[int]] = []
        for row, (prompt_alone, full) in zip(chunk, encoded, strict=True):
            fitted = _fit(prompt_alone, full, tokenizer, max_length, max_prompt_length)
            if isinstance(fitted, Bad):
                # Equal after the cut is no fault of the row, and nothing could be corrected in it: never an error.
                reject(fitted, row.row, left_out, "drop" if fitted.reason == IDENTICAL else bad_rows, path)
                continue
            kept.append(row)
            counts.update(fitted.counts)
            sides += [fitted.prompt + completion for completion in fitted.completions]
            prompt_lengths += [len(fitted.prompt)] * len(fitted.completions)
        lengths += [len(side) for side in sides]
        ids.append(np.fromiter(itertools.chain.from_iterable(sides), np.int32))
        _check_vocabulary(ids[-1], tokenizer, vocab_size)
    read = len(kept) + sum(left_out.values())
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise ValueError(f"none of the {read} rows of {path} is left ({reasons}); correct the file or the settings named")
    examples = Examples(
        tokens=np.concatenate(ids),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        prompt_lengths=np.asarray(prompt_lengths, np.int32),
        N=len(kept[0].completions),
        prompts=[row.prompt for row in kept],
        completions=[row.completions for row in kept],
    )
    report = Report(
        rows=read,
        kept=len(kept),
        dropped=dict(left_out),
        prompts_cut=counts["prompts_cut"],
        completions_cut=counts["completions_cut"],
        boundary_merges=counts["boundary_merges"],
        separators_added=counts["separators_added"],
        eos_inside=counts["eos_inside"],
        tokens=len(examples.tokens),
        completion_tokens=len(examples.tokens) - int(examples.prompt_lengths.sum()),
        longest=max(lengths),
        responses=examples.N,
    )
    return examples, report


def _check_limits(max_length: int, max_prompt_length: int, tokenizer, path) -> None:
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


def _encoded(rows: Sequence[Prompted], tokenizer) -> Iterator[tuple[Sequence[Prompted], list[Encoded]]]:
    """Chunks of rows, with the ids of each row's prompt alone and of its N sides, less an EOS that the tokenizer appended."""

    def encode(texts):
        ids = tokenizer(texts, truncation=False, padding=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [row[:-1] for row in ids] if appended else ids

    # By a probe and not by the last id of each text: a text may itself end in an EOS, which is then part of it.
    appended = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        prompts = encode([row.prompt for row in chunk])
        sides = iter(encode([row.prompt + completion for row in chunk for completion in row.completions]))
        yield chunk, [(prompt, [next(sides) for _ in row.completions]) for prompt, row in zip(prompts, chunk, strict=True)]


def _fit(prompt_alone: list[int], sides: list[list[int]], tokenizer, max_length: int, max_prompt_length: int) -> _Fitted | Bad:
    """Split a row at its boundary, end its completions, and cut it to length."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    boundary = min(_common(prompt_alone, side) for side in sides)
    whole = prompt_alone[:boundary] or [eos if bos is None else bos]
    prompt = _cut_prompt(whole, max_prompt_length, bos)
    room = max_length - len(prompt)
    if room < 1:
        what = f"a prompt of {len(prompt)} tokens leaves no room within max_length {max_length}"
        return Bad("prompt leaves no room", f"{what}; set data.max_prompt_length or raise data.max_length")
    ended = [_ended(side[boundary:], eos) for side in sides]
    completions = [completion[:room] for completion in ended]
    if len(completions) > 1 and all(completion == completions[0] for completion in completions):
        return Bad(IDENTICAL, "all its completions are the same tokens")
    counts = {
        "boundary_merges": int(boundary < len(prompt_alone)),
        "separators_added": int(boundary == 0),
        "prompts_cut": int(len(prompt) < len(whole)),
        "completions_cut": sum(len(completion) > room for completion in ended),
        "eos_inside": sum(eos in completion[:-1] for completion in completions),
    }
    return _Fitted(prompt, completions, counts)


def _ended(completion: list[int], eos: int) -> list[int]:
    end = len(completion)
    while end and completion[end - 1] == eos:
        end -= 1
    return [*completion[:end], eos]


def _common(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut_prompt(prompt: list[int], max_prompt_length: int, bos: int | None) -> list[int]:
    if max_prompt_length == 0 or len(prompt) <= max_prompt_length:
        return prompt
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - max_prompt_length + len(head) :]


def _check_vocabulary(ids: np.ndarray, tokenizer, vocab_size: int) -> None:
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) lies outside the model's {vocab_size} embedding "
            f"rows: the tokenizer's vocabulary ({len(tokenizer)}) is larger than the embedding; use the model's own tokenizer"
        )
