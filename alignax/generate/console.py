"""Input and output of `alignax generate`: prompts from a file or the terminal, completions as text or JSONL."""

import dataclasses
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from alignax import output, paths
from alignax.data import bounds, chat
from alignax.data.files import HUB, read_rows
from alignax.data.folders import SUFFIXES, place, suffix
from alignax.data.kinds import prompt_alone
from alignax.data.rows import Bad, Message, Prompted
from alignax.data.shapes import in_text, said
from alignax.data.streams import opened
from alignax.data.tokens import prompt_ids
from alignax.distributed import is_main, together
from alignax.generate.generator import Completions, Generator
from alignax.generate.sampling import Sampling
from alignax.generate.stops import LENGTH, STOP_STRING, Stops, text_of
from alignax.text import short

BYTES = 40  # of a token in a file of completions at most, as a rule: its text, its id and its log-prob


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of `alignax generate`. An option's name is its field's, with dashes in place of underscores."""

    prompts: str = ""  # a file, or rows for `read_rows`; "-" or empty: standard input, which may be a terminal
    out: str = ""  # a file for JSONL, "-" for JSON on the console; empty: text on the console
    n: int = 1  # completions of each prompt
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()  # strings that end a completion
    seed: int = 0
    slots: int = 0  # rows that are decoded at once; 0: as many as there are completions, at most 64
    combine: str = ""  # FOLDER@C,WORKDIR@C: models whose logits, times their coefficients C, are added to the model's logits
    raw: bool = False  # whether lines are given to the model without its chat template
    cache: str = ""  # dtype of keys and values; empty: the dtype of activations
    temperature: float = Sampling.temperature
    top_k: int = Sampling.top_k
    top_p: float = Sampling.top_p
    min_p: float = Sampling.min_p
    repetition_penalty: float = Sampling.repetition_penalty

    def __post_init__(self) -> None:
        """Refuses impossible values of the options with a ValueError."""
        self.sampling()
        self.combination()
        for name, least in (("n", 1), ("max_new_tokens", 1), ("seed", 0), ("slots", 0)):
            if not least <= getattr(self, name) < 2**31:  # larger seeds would collide in their 32 bits
                raise ValueError(f"{name} is {short(getattr(self, name))}; it must be at least {least} and less than 2^31")

    def sampling(self) -> Sampling:
        """The sampling settings of the request."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def combination(self) -> list[tuple[str, float]]:
        """The models in `combine`, each with its coefficient."""
        found = []
        for item in self.combine.split(",") if self.combine else ():
            model, _, coefficient = item.strip().rpartition("@")
            if not model or not math.isfinite(number := as_number(coefficient)):
                raise ValueError(
                    f"combine has {short(item)}, which is not a model with its coefficient; write for example TUNED@1.0,UNTUNED@-1.0"
                )
            found.append((model, number))
        return found


def as_number(text: str) -> float:
    """The number in a text; NaN for a text that is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class Prompt(NamedTuple):
    """A prompt of `alignax generate`, as given and as encoded for the model."""

    given: str | list[Message]  # as given: text, or the messages of a conversation
    tools: Any  # tools of the conversation, or None
    text: str  # as text; a conversation as its chat template writes it
    ids: list[int]  # as token ids


def read(request: Request, tokenizer: Any, data: Any, most: int = sys.maxsize) -> list[Prompt] | None:
    """Reads the prompts of a request from rows of data, a text file or standard input; None if a person types them at a terminal.

    Rows are read as in training: each has a `prompt`, text or messages (and `tools`). A text file has one prompt per line. If the
    tokenizer has a chat template and the request is not `raw`, a line is a user's message, or a conversation in JSON.

    Args:
      request: the options of the command.
      tokenizer: a Hugging Face tokenizer.
      data: `config.data`, for the names of columns and the variables of the chat template.
      most: the most tokens of a useful prompt; a longer prompt is not tokenised whole.

    Raises:
      ValueError: for a file that is missing or without prompts, and for a row that is no prompt; it names the row.
    """
    file = request.prompts or "-"
    if file == "-" and jax.process_count() > 1:
        raise ValueError("several processes cannot share a terminal; give --prompts FILE")
    if file == "-" and sys.stdin.isatty():
        return None
    path = place(file)[0]
    if file != "-" and (file.startswith(HUB) or path.is_dir() or suffix(path) in SUFFIXES):
        found = [row_prompt(i, row, file, data.columns) for i, row in enumerate(read_rows(file))]
        return [encoded(i, row.prompt, row.tools, tokenizer, file, data.template, most) for i, row in enumerate(found)]
    if file != "-" and not paths.of(file).is_file():
        raise ValueError(f"there is no file {file!r}; give --prompts a file with one prompt per line, or rows with a column 'prompt'")
    try:
        text = sys.stdin.read() if file == "-" else text_of_file(paths.of(file))
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{'standard input' if file == '-' else file} holds no prompts; write one prompt per line")
    return [encoded(i, turns(line, request, tokenizer), None, tokenizer, file, data.template, most) for i, line in enumerate(lines)]


def text_of_file(path: Path) -> str:
    """The text of a file, decompressed if need be, without a byte order mark and with \\n as the only line end."""
    with opened(path) as stream:
        return io.StringIO(stream.read().decode("utf-8-sig"), newline=None).read()


def turns(line: str, request: Request, tokenizer: Any) -> Any:
    """The prompt in a line of text: a user's message, a conversation in JSON, or without a chat template the plain text."""
    if request.raw or not tokenizer.chat_template:
        return line
    return in_text(line) or said("user", line)


def row_prompt(i: int, row: Mapping[str, Any], file: str, columns: Any) -> Prompted:
    """The prompt of a row of data, in the column `data.columns.prompt` or else "prompt"; a row without one is refused."""
    row = {columns.prompt: row["prompt"], **row} if "prompt" in row else row
    found = prompt_alone(row, columns)
    if isinstance(found, Bad):
        raise ValueError(f"row {i} of {file}: {found.what}")
    return found


def encoded(
    row: int,
    prompt: Any,
    tools: Any,
    tokenizer: Any,
    file: str,
    template: Mapping[str, Any] = chat.NO_VARIABLES,
    most: int = sys.maxsize,
) -> Prompt:
    """Encodes a prompt as in training. Of a prompt much longer than `most` tokens, only a beginning of more than `most` is encoded."""
    if isinstance(prompt, str):
        encode = lambda part: chat.Encoded(prompt_ids([part.prompt], tokenizer)[0], [], [], part.prompt)
        code = bounds.beginning(prompt, encode, most)
        found = code if isinstance(code, Bad) else (code.text, code.prompt)
    else:
        found = chat.encode_prompt(prompt, tools, tokenizer, template, most)
    if isinstance(found, Bad):
        raise ValueError(f"row {row} of {file}: {found.what}")
    return Prompt(prompt, tools, *found)


def typed(request: Request, tokenizer: Any, data: Any, most: int = sys.maxsize) -> Iterator[Prompt]:
    """Iterates over prompts that a person types at the terminal, one per line, until the end of input; arguments as in `read`.

    A line that is no prompt is refused in words, and the next one is read.
    """
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        try:
            prompt = encoded(0, turns(line, request, tokenizer), None, tokenizer, "the terminal", data.template, most)
        except ValueError as e:
            print(f"alignax: {e}", file=sys.stderr)
            continue
        yield prompt


def answer(
    generator: Generator, params: Any, prompts: Sequence[Prompt], key: jax.Array, request: Request, tokenizer: Any, further: bool = False
) -> None:
    """Samples completions of prompts, and writes or prints them; a summary goes to stderr. All processes sample, process 0 writes.

    `further`: completions of earlier prompts are in the request's file already, and these are appended.
    """
    if request.out not in ("", "-"):
        with together():
            if is_main():
                most = BYTES * request.max_new_tokens * request.n * len(prompts)
                output.require_space(paths.of(request.out), most, "the file of completions")
    began = time.perf_counter()
    out = generator(params, [p.ids for p in prompts], key, request.n)
    seconds = time.perf_counter() - began
    if not is_main():
        return
    stops = generator.stops
    found = rows(prompts, out, tokenizer, stops)
    if request.out:
        write(request.out, found, further)
    else:
        show(found, [prompt.text for prompt in prompts] if len(prompts) > 1 else None)
    for line in summary(out, seconds, generator.shape.slots, stops):
        print(line, file=sys.stderr)


def rows(prompts: Sequence[Prompt], out: Completions, tokenizer: Any, stops: Stops | None) -> list[list[dict[str, Any]]]:
    """The completions of each prompt as rows for JSON. A conversation stays a list of messages, for any model's chat template."""
    return [
        [
            {
                "prompt": prompt.given,
                **({"tools": prompt.tools} if prompt.tools else {}),
                "sample": s,
                "completion": text_of(tokens, str(out.ended[p, s]), tokenizer, stops),
                "ended": str(out.ended[p, s]),
                "tokens": tokens.tolist(),
                "logps": [float(x) for x in out.logps[p, s][out.mask[p, s]]],
                "exact": out.exact,
            }
            for s, tokens in enumerate(samples)
        ]
        for p, (prompt, samples) in enumerate(zip(prompts, out.rows(), strict=True))
    ]


def show(found: Sequence[Sequence[dict[str, Any]]], prompts: Sequence[str] | None) -> None:
    """Prints completions for a person to read; with `prompts`, each prompt's text stands before its completions."""
    for i, samples in enumerate(found):
        if prompts:
            print(f"> {prompts[i]}")
        for row in samples:
            print(row["completion"] + (" ..." if row["ended"] == LENGTH else ""))
        if prompts:
            print()


def begin(request: Request, force: bool) -> None:
    """Refuses a request's file that cannot be written, or that would be lost without `force`, before anything is computed.

    An earlier file stays whole until the first completions are there.
    """
    if request.out not in ("", "-") and is_main():
        output.claim(paths.of(request.out), force=force)


def write(file: str, found: Sequence[Sequence[dict[str, Any]]], further: bool) -> None:
    """Writes completions as JSONL, one row each, to the console for "-", else to a file: in its place, or with `further` at its end."""
    rows = [row for samples in found for row in samples]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file == "-":
        print("\n".join(map(output.json_text, rows)))
    elif further:
        if there := paths.remote(paths.of(file)):
            there.write_text(there.read_text() + text)  # an object cannot grow
            return
        output.append(paths.of(file), text.encode())
    else:
        output.write_text(paths.of(file), text)


def summary(out: Completions, seconds: float, slots: int, stops: Stops | None) -> list[str]:
    """The lines of a summary: counts, speed, how completions ended, completions per stop string, and the meaning of the log-probs."""
    tokens, ended = int(out.mask.sum()), Counter(out.ended.ravel().tolist())
    how = ", ".join(f"{why} {count}" for why, count in sorted(ended.items()))
    lines = [
        f"{out.ended.size} completions of {len(out.ended)} prompts: {tokens} tokens in {seconds:.1f} s, {out.steps} steps of {slots} rows; "
        f"ended by {how}"
    ]
    if stops is not None:
        texts = [
            stops.text(t) for row, why in zip(out.rows(), out.ended, strict=True) for t, w in zip(row, why, strict=True) if w == STOP_STRING
        ]
        counts = Counter(hit[1] for text in texts if (hit := stops.first(text)))
        lines += [f"stop string {s!r} ended {counts[s]} completions" for s in stops.strings]
    if not out.exact:
        drawn = "" if out.sampling.exact else f"drawn at {out.sampling}; "
        whose = "the model's own" if out.of_model else "those of the combined models"
        lines.append(f"{drawn}logps are {whose}, at temperature 1")
    return lines
