"""Checks of the data before a run: `alignax check-data` reports what a run would make of it."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from alignax.data.batches import decode_example
from alignax.data.counts import Report
from alignax.data.examples import Examples
from alignax.data.mixture import Loaded, load
from alignax.data.tokens import IDENTICAL

BINS, BAR = 12, 40  # histograms: the most bins, and the characters of the longest bar
SIDES_AT_ONCE = 2048
SPLITS = ("train", "eval", "pretrain", "ood")


def check(
    data: Any,
    tokenizer: Any,
    vocab_size: int,
    ends: Collection[int] = (),
    colour: bool = False,
    row: Callable[[dict], Any] | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Reads and tokenises the data that `config.data` names, bad rows included, and returns a report on it.

    Bad rows are counted by reason, and the first few are described, whatever `data.bad_rows` says; `stops` names those at which a
    run would stop. All values are plain Python values, for JSON; `text` formats them for the console. `row` is the experiment's
    row function, see `alignax.data.shapes.shaped`; for `whole` see `alignax.data.tokens.tokenize`.

    Raises:
      ValueError: for an error that is not one of single rows, such as a missing column, and when no row is left.
    """
    lenient = data.copy_and_resolve_references()
    lenient.bad_rows = "drop"
    loaded = {split: load(split, lenient, tokenizer, vocab_size, ends, row, whole) for split in SPLITS if data[split]}
    if not loaded:
        raise ValueError("config fields 'data.train' and 'data.eval' are empty; set --config.data.train=FILE")
    out: dict[str, Any] = {split: _split(split_data, data, tokenizer, colour) for split, split_data in loaded.items()}
    if "train" in loaded and "eval" in loaded:
        train, evaluation = (set(loaded[split].examples.prompts) for split in ("train", "eval"))
        out["eval_prompts"], out["eval_prompts_in_train"] = len(evaluation), len(evaluation & train)
    return out


def stops(result: dict[str, Any]) -> str:
    """The bad rows at which a run with `data.bad_rows="error"` would stop, in words; empty if there are none."""
    sources = [item for split in SPLITS if split in result for item in result[split]["sources"].items()]
    found = [
        (path, ", ".join(f"{reason}: {source['dropped'][reason]}" for reason in source["bad"] if reason != IDENTICAL))
        for path, source in sources
    ]
    return "; ".join(f"{path} has bad rows ({reasons})" for path, reasons in dict.fromkeys(found) if reasons)


def _split(loaded: Loaded, data: Any, tokenizer: Any, colour: bool) -> dict[str, Any]:
    examples, reports, mixture = loaded
    ends = np.cumsum([2 * report.kept if report.pairs_split else report.kept for report in reports.values()])
    parts = zip(reports.items(), [0, *ends[:-1]], ends, strict=True)
    return {
        "sources": {path: _source(report, _rows(examples, first, end), data, tokenizer) for (path, report), first, end in parts},
        "mixture": mixture.lines(len(examples)) if mixture else [],
        "example": decode_example(examples, _middling(examples), tokenizer, colour),
    }


def _rows(examples: Examples, first: int, end: int) -> Examples:
    """The examples of rows `first` to `end` - 1."""
    sides = slice(first * examples.N, end * examples.N + 1)
    offsets = examples.offsets[sides]
    tokens = slice(offsets[0], offsets[-1])
    fields = {name: values[first:end] for name, values in examples.fields.items()}
    return Examples(examples.tokens[tokens], examples.scored[tokens], offsets - offsets[0], examples.N, examples.prompts[first:end], fields)


def _source(report: Report, examples: Examples, data: Any, tokenizer: Any) -> dict[str, Any]:
    prompts = examples.prompts[: report.kept]  # the rest repeats them where pairs were split into two rows each
    out = report.as_dict() | {
        "lines": report.lines(),
        "prompt_lengths": _lengths(report.uncut[0], data.max_prompt_length),
        "completion_lengths": _lengths(report.uncut[1], 0),
        "row_lengths": _lengths(_whole(report), data.max_length),
        "repeated_prompts": len(prompts) - len(set(prompts)),
        "characters_in_several_tokens": _spelled(examples, tokenizer),
        "unknown_tokens": 0,
    }
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
        out["unknown_tokens"] = int((examples.tokens == tokenizer.unk_token_id).sum())
    if report.responses == 2:
        chosen, rejected = np.reshape(report.uncut[1], (-1, 2)).T
        out["chosen_longer"] = float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
    if "labels" in examples.fields:
        out["labels_true"] = float(examples.fields["labels"].mean())
    if "margin" in examples.fields:
        margin = examples.fields["margin"]
        out["margin"] = {"least": float(margin.min()), "mean": float(margin.mean(dtype=np.float64)), "most": float(margin.max())}
    if "attributes" in examples.fields:
        out["attributes"] = [_spread(column) for column in examples.fields["attributes"].reshape(len(examples), -1).T]
    return out


def _spread(values: np.ndarray) -> dict[str, float]:
    """The share of rows that have an attribute, and its least, mean and greatest value; NaN is missing."""
    given = values[~np.isnan(values)].astype(np.float64)
    numbers = {"least": float(given.min()), "mean": float(given.mean()), "most": float(given.max())} if len(given) else {}
    return {"given": len(given) / len(values)} | numbers


def _whole(report: Report) -> np.ndarray:
    """The number of tokens of each side before any cut: [n*N]."""
    return np.repeat(report.uncut[0], report.responses) + np.asarray(report.uncut[1])


def _lengths(values: Sequence[int] | np.ndarray, limit: int) -> dict[str, Any]:
    """Quantiles of lengths, their histogram, and the share above a limit (0: no limit); bin number BINS is open above."""
    x = np.asarray(values)
    quantiles = np.quantile(x, [0.5, 0.95], method="higher")
    # The 95 % quantile sets the width: a few very long rows would put all others into one bin. The last bin holds those few.
    width = next(w * 10**e for e in range(12) for w in (1, 2, 5) if quantiles[1] < (BINS - 1) * w * 10**e)
    counts = np.bincount(np.minimum(x // width, BINS - 1)).tolist()
    return {
        "median": int(quantiles[0]),
        "95%": int(quantiles[1]),
        "longest": int(x.max()),
        "limit": limit,
        "above_limit": float((x > limit).mean()) if limit else 0.0,
        "bin": width,
        "counts": counts,
    }


def _spelled(examples: Examples, tokenizer: Any) -> list[dict[str, Any]]:
    """The most frequent characters that the tokenizer has no token for, so that it spells their bytes in several tokens."""
    found: Counter[str] = Counter()
    sides = range(0, len(examples.offsets) - 1, SIDES_AT_ONCE)
    for start in sides:
        ids = examples.tokens[examples.offsets[start] : examples.offsets[min(start + SIDES_AT_ONCE, len(examples.offsets) - 1)]]
        found.update(c for c in tokenizer.decode(ids) if not c.isascii() and c != "\ufffd")
    size = len(tokenizer("aa", add_special_tokens=False)["input_ids"])
    tokens = {c: len(tokenizer(f"a{c}a", add_special_tokens=False)["input_ids"]) - size for c, _ in found.most_common(50)}
    return [{"character": c, "tokens": tokens[c], "times": found[c]} for c in tokens if tokens[c] > 1][:6]


def _middling(examples: Examples) -> int:
    """The index of the first example that is no longer than the median."""
    longest = examples.lengths.reshape(-1, examples.N).max(1)
    return int(np.argmax(longest <= np.median(longest)))


def text(result: dict[str, Any]) -> list[str]:
    """Formats the report of `check` as lines for the console."""
    lines = []
    for split in SPLITS:
        if split not in result:
            continue
        for path, source in result[split]["sources"].items():
            lines += [f"{split} data: {path}", *(f"  {line}" for line in _source_text(source)), ""]
        lines += [f"{split} mixture, in an epoch: {line}" for line in result[split]["mixture"]]
        lines += [f"{split} data, a row as the model sees it:", *result[split]["example"].split("\n"), ""]
    if "eval_prompts_in_train" in result:
        shared, prompts = result["eval_prompts_in_train"], result["eval_prompts"]
        lines.append(f"prompts of the evaluation data that are also in the training data: {shared:,} of {prompts:,}")
    return lines


def _source_text(source: dict[str, Any]) -> list[str]:
    lines = list(source["lines"])
    for reason, rows in source["bad"].items():
        count = source["dropped"][reason]
        lines += [f"  {reason}{f', the first {len(rows)} of {count:,}' if count > len(rows) else ''}:", *(f"    {row}" for row in rows)]
    if source["repeated_prompts"]:
        lines.append(f"  rows that repeat the prompt of an earlier row: {source['repeated_prompts']:,}")
    if "chosen_longer" in source:
        lines.append(f"  the chosen response is the longer one in {source['chosen_longer']:.1%} of pairs (ties count half)")
    if "labels_true" in source:
        lines.append(f"  labels: {source['labels_true']:.1%} are True")
    if "margin" in source:
        lines.append("  margins: {least:.4g} to {most:.4g}, mean {mean:.4g}".format(**source["margin"]))
    for i, x in enumerate(source.get("attributes", ())):
        numbers = ": {least:.4g} to {most:.4g}, mean {mean:.4g}".format(**x) if x["given"] else ""
        lines.append(f"  attribute {i}, given in {x['given']:.1%} of rows{numbers}")
    if source["unknown_tokens"]:
        lines.append(f"  unknown tokens (their text is lost): {source['unknown_tokens']:,}")
    if spelled := source["characters_in_several_tokens"]:
        shown = ", ".join(f"{_visible(s['character'])} ({s['tokens']} tokens, {s['times']:,} times)" for s in spelled)
        lines.append(f"  characters spelled in several tokens: {shown}")
    lines.append(f"  the longest prompt has {source['longest_prompt']:,} characters")
    for name, limit in (("prompt", "data.max_prompt_length"), ("completion", ""), ("row", "data.max_length")):
        lines += [f"  {line}" for line in _bars(name, limit, source[f"{name}_lengths"])]
    return lines


def _bars(name: str, limit: str, lengths: dict[str, Any]) -> list[str]:
    width, counts = lengths["bin"], lengths["counts"]
    above = f"; {lengths['above_limit']:.1%} are above {limit} {lengths['limit']}" if lengths["limit"] else ""
    head = f"tokens of a {name} before any cut: median {lengths['median']:,}, 95% {lengths['95%']:,}, longest {lengths['longest']:,}{above}"
    size = len(f"{width * len(counts):,}")
    bars = ["#" * -(-BAR * count // max(counts)) for count in counts]
    upper = lambda i: f" - {width * (i + 1) - 1:<{size},}" if width > 1 else ""
    ranges = [f"{width * i:>{size},}{upper(i)}" for i in range(len(counts))]
    ranges[BINS - 1 :] = [f"{width * (BINS - 1):>{size},} and up" for _ in ranges[BINS - 1 :]]
    wide = max(map(len, ranges))
    return [head] + [f"  {where:<{wide}}  {bar:<{BAR}} {count:,}" for where, bar, count in zip(ranges, bars, counts, strict=True)]


def _visible(character: str) -> str:
    return character if character.isprintable() else f"U+{ord(character):04X}"
