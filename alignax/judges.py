"""What reward models read: prompt and completion as their own tokenizer and chat template have them.

Where they make the same tokens of the data as the policy's, a reward model reads the policy's: nothing is made twice. Where they do not,
the batch carries what it reads as `judge_tokens`, `judge_mask` and `judge_completion_mask` [B, N, T'], made on the host.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignax.checks import longest_answer
from alignax.data import Examples, chat, load
from alignax.data.chat import Encoded
from alignax.data.kinds import prompt_alone
from alignax.data.mixture import Loaded
from alignax.data.rows import Bad, Prompted
from alignax.data.template import mentioned
from alignax.data.tokens import encode_texts
from alignax.generate import Completions
from alignax.generate.stops import added_text
from alignax.models import hf

FIELDS = ("tokens", "mask", "completion_mask")  # of a batch, which a reward model has of its own with `judge_` in front
COMPARED = 64  # rows of each split that both tokenizers are tried on
PROBE = "Yes: 1 + 1 = 2, and so on."  # the answer that prompts are tried with


class Judge(NamedTuple):
    """How the reward models of a run read its samples, where that is not how the policy does."""

    tokenizer: Any
    ends: tuple[int, ...]
    length: int  # T', of what they read
    columns: Any  # `data.columns`, which name those of the prompts and of what belongs to them
    variables: Mapping[str, Any]  # of its chat template


def of_data(
    config: Any, source: hf.Source, judge: Any, tokenizer: Any, loaded: Mapping[str, Loaded], row: Callable[[dict], Any] | None = None
) -> dict[str, Examples]:
    """The examples of a run's splits, with what its reward models read of them where that is not what the policy does.

    Args:
      config: its section `data` says how rows are read.
      source: the first reward model's folder.
      judge: its tokenizer.
      tokenizer: the policy's.
      loaded: the splits, as the policy reads them.
      row: the experiment's, see `alignax.data.shapes.shaped`.

    Raises:
      ValueError: for rows that the reward model cannot read.
    """
    most, limit = source.config.max_position_embeddings, min(config.data.limit or COMPARED, COMPARED)
    how, same = (judge, source.config.vocab_size, hf.end_ids(source, judge), row), judge.get_vocab() == tokenizer.get_vocab()
    few, every = (data_of(config, judge, **changes) for changes in ({"limit": limit}, {"max_length": most, "max_prompt_length": 0}))
    out = {}
    for split, own in loaded.items():
        formless = judge.chat_template is None and any(report.masks for report in own.reports.values())
        if same and (formless or alike(load(split, few, *how), own)):
            out[split] = own.examples
        else:
            out[split] = dataclasses.replace(own.examples, judge=aligned(split, source.path, own, load(split, every, *how)))
    return out


def data_of(config: Any, judge: Any, **changes: Any) -> Any:
    """The section `data` as the judge's tokenizer reads it, changed: of the template's variables those that its own has."""
    data = config.data.copy_and_resolve_references()
    data.update(bad_rows="drop", **changes)
    data.template = type(data)(mentioned(judge, data.template))
    return data


def alike(few: Loaded, own: Loaded) -> bool:
    """Whether rows are the same tokens, in the same masks."""
    place = {key: i for i, key in enumerate(keys(own))}
    if any(key not in place for key in keys(few)):
        return False
    same = own.examples.taken(np.array([place[key] for key in keys(few)]))
    return all(np.array_equal(getattr(few.examples, name), getattr(same, name)) for name in ("tokens", "scored", "offsets"))


def aligned(split: str, path: Path, own: Loaded, read: Loaded) -> Examples:
    """What a reward model reads, row by row as the policy has them; rows that the policy's limits left out are left out."""
    place = {key: i for i, key in enumerate(keys(read))}
    if absent := [row for row in keys(own) if row not in place]:
        why = "; ".join(f"{reason}: {shown[0]}" for report in read.reports.values() for reason, shown in report.bad.items())
        raise ValueError(f"{len(absent)} rows of data.{split} cannot be read by the reward model {str(path)!r} ({why}); leave them out")
    return read.examples.taken(np.array([place[key] for key in keys(own)]))


def keys(data: Loaded) -> list[tuple[int, ...]]:
    """What tells a row from another: its source, its row there, and of pairs that were split its side."""
    counts = [report.kept * (2 if report.pairs_split else 1) for report in data.reports.values()]
    source, side = np.repeat(np.arange(len(counts)), counts), data.examples.fields.get("labels")
    return list(zip(source.tolist(), data.examples.rows.tolist(), *([] if side is None else [side[:, 0].tolist()]), strict=True))


def of_rollouts(config: Any, source: hf.Source, judge: Any, tokenizer: Any, ends: Sequence[int], every: Sequence[Examples]) -> Judge | None:
    """How reward models read samples; None: as the policy has them.

    Raises:
      ValueError: for prompts that the reward model cannot read, or that leave no room for an answer.
    """
    new, names = longest_answer(config), config.data.columns
    own = Judge(judge, hf.end_ids(source, judge), 0, names, mentioned(judge, config.data.template))
    same = judge.get_vocab() == tokenizer.get_vocab()
    if any(names.prompt not in examples.columns for examples in every):  # rows that are no prompts alone: what was made of them is gone
        if same:
            return None
        raise ValueError(f"reward model {str(source.path)!r} has another tokenizer than the policy; for that, set data.kind to prompt")
    tried = [(e, i) for e in every for i in range(len(e))]
    rows = [asked(own, examples, i, PROBE) for examples, i in tried]
    messages = any(isinstance(row, Prompted) and not isinstance(row.prompt, str) for row in rows)
    if messages and judge.chat_template is None:
        if same:
            return None
        raise ValueError(f"reward model {str(source.path)!r} has another tokenizer than the policy, and no chat template for conversations")
    few = [row for row in rows[:COMPARED] if not isinstance(row, Bad)]
    if same and tokens_of(few, judge, own.ends, own.variables) == tokens_of(few, tokenizer, ends, config.data.template):
        return None
    found = tokens_of(rows, judge, own.ends, own.variables)
    if bad := next((code for code in found if isinstance(code, Bad)), None):
        raise ValueError(f"the reward model {str(source.path)!r} cannot read a prompt of the data: {bad.what}")
    longest, most = max(len(code.prompt) for code in found if isinstance(code, Encoded)), source.config.max_position_embeddings
    if longest + new > most:
        raise ValueError(
            f"the reward model {str(source.path)!r} reads {most} tokens, and a prompt of {longest} of its own with an answer of "
            f"max_new_tokens {new} does not fit; lower it, or leave that prompt out"
        )
    return own._replace(length=min(most, -(-(longest + 2 * new) // 8) * 8))


def asked(judge: Judge, examples: Examples, row: int, text: str) -> Prompted | Bad:
    """A prompt of the data with an answer, as rows of data have them."""
    found = prompt_alone({name: values[row] for name, values in examples.columns.items()}, judge.columns)
    if isinstance(found, Bad):
        return found
    if isinstance(found.prompt, str):
        return found._replace(completions=(text,))
    *before, last = found.prompt
    if isinstance(last, dict) and last["role"] == "assistant":  # an answer that was begun is gone on with
        return found._replace(prompt=before, completions=([last | {"content": (last.get("content") or "") + text}],))
    return found._replace(completions=([{"role": "assistant", "content": text}],))


def tokens_of(rows: Sequence[Prompted | Bad], tokenizer: Any, ends: Sequence[int], variables: Mapping[str, Any]) -> list[Encoded | Bad]:
    """Rows of one answer each, in tokens."""
    texts = [row for row in rows if isinstance(row, Prompted) and isinstance(row.prompt, str)]
    conversations = [row for row in rows if isinstance(row, Prompted) and not isinstance(row.prompt, str)]
    done = iter(encode_texts(texts, tokenizer, {tokenizer.eos_token_id, *ends}) if texts else ())
    chats = iter(chat.encode(conversations, tokenizer, ends, variables) if conversations else ())
    return [row if isinstance(row, Bad) else next(done) if isinstance(row.prompt, str) else next(chats) for row in rows]


def read(
    judge: Judge,
    policy: Any,
    examples: Examples,
    rows: np.ndarray,
    prompts: Sequence[Sequence[int]],
    said: Completions,
    texts: list[list[str]],
) -> dict[str, np.ndarray]:
    """What reward models read of samples, `judge_tokens` and so on, [B, N, T']; an answer that they refuse has no scored token.

    What is longer loses its end, and `judge_cut` [B, N] says so.

    Args:
      judge: how they read.
      policy: its tokenizer.
      examples: the data.
      rows: of the data, which the prompts are of [B].
      prompts: in the policy's tokens.
      said: completions.
      texts: of the completions, without stop strings.
    """
    asks = []
    for i, prompt, answers, own in zip(rows.tolist(), prompts, said.answers(), texts, strict=True):
        for tokens, text in zip(answers, own, strict=True):
            whole = added_text(policy, prompt, tokens)  # a space in front is the answer's own
            asks.append(asked(judge, examples, i, whole[: whole.find(text) + len(text)] if text in whole else text))
    shape = (*said.ended.shape, judge.length)
    out = {"tokens": np.zeros(shape, np.int32), "mask": np.zeros(shape, bool), "completion_mask": np.zeros(shape, bool)}
    flat = {name: x.reshape(-1, judge.length) for name, x in out.items()}
    cut = np.zeros(len(asks), bool)
    for k, code in enumerate(tokens_of(asks, judge.tokenizer, judge.ends, judge.variables)):
        if isinstance(code, Bad):
            continue
        ids = code.prompt + code.completions[0]
        cut[k], ids = len(ids) > judge.length, ids[: judge.length]
        scored = (bytes(len(code.prompt)) + code.scored[0])[: len(ids)]
        flat["tokens"][k, : len(ids)], flat["mask"][k, : len(ids)] = ids, True
        flat["completion_mask"][k, : len(ids)] = np.frombuffer(scored, np.bool_)
    return {f"judge_{name}": x for name, x in out.items()} | {"judge_cut": cut.reshape(said.ended.shape)}
