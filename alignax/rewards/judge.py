"""The inputs of models that read text: prompts and completions in the models' own tokens and chat template.

If tokenizer and chat template of policy and reward models are equal in content, rows of data are tokenised once, for both. That is
decided by content, not by samples. Otherwise, and for every sample of the policy, the batch holds the input of the reward models as
`ensemble_tokens`, `ensemble_mask` and `ensemble_completion_mask` [B, N, T'], made on the host. Reward models of another role have its name
in the place of "ensemble". Language models of another tokenizer than the policy's read samples in the same way.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignax.config import longest_answer
from alignax.data import Examples, chat, load
from alignax.data.mixture import Loaded
from alignax.data.rows import Bad, Encoded, Prompted
from alignax.data.template import mentioned
from alignax.data.tokens import encode_texts
from alignax.generate import Answers
from alignax.generate.stops import STOP_ID, added_text
from alignax.models import hf

FIELDS = ("tokens", "mask", "completion_mask")  # batch fields that a reward model may have its own of, as ROLE_tokens
PROBE = "Yes: 1 + 1 = 2, and so on."  # an answer to try prompts with before there are samples


class Judge(NamedTuple):
    """The input format of the models of one role: reward models, or a language model that reads text."""

    role: str
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a completion
    length: int  # T', tokens of an input row
    vocab_size: int  # rows of the models' embedding
    variables: Mapping[str, Any]  # variables of the chat template
    shared: bool  # same tokenizer as the policy's: an answer to a text prompt keeps the policy's tokens


def of_data(
    config: Any,
    role: str,
    source: hf.Source,
    judge: Any,
    tokenizer: Any,
    ends: Sequence[int],
    loaded: Mapping[str, Loaded],
    row: Callable[[dict], Any] | None = None,
) -> dict[str, Examples]:
    """The examples of each split of a run, with the reward models' own input in `Examples.others` if it differs from the policy's.

    Args:
      config: config of the run, whose section `data` says how rows are read.
      role: role of the reward models.
      source: folder of the first reward model.
      judge: tokenizer of the reward models.
      tokenizer: tokenizer of the policy.
      ends: tokens that end the policy's completions.
      loaded: the splits in the policy's tokens, loaded with `whole=True`.
      row: `row` of the experiment, see `alignax.data.shapes.shaped`.

    Raises:
      ValueError: for rows that the reward model cannot read.
    """
    chats = any(report.masks for own in loaded.values() for report in own.reports.values())
    if chats:
        form(source, judge, tokenizer)
    own_ends, vocab_size = hf.end_ids(source, judge), source.config.vocab_size
    if alike(judge, tokenizer, vocab_size) and {*own_ends} == {*ends} and (not chats or written(judge) == written(tokenizer)):
        return {split: own.examples for split, own in loaded.items()}
    data = config.data.copy_and_resolve_references()
    data.update(bad_rows="drop", max_length=source.config.max_position_embeddings, max_prompt_length=0)
    data.template = type(data)(mentioned(judge, data.template))
    read = {split: load(split, data, judge, vocab_size, own_ends, row, whole=True) for split in loaded}
    judged = {split: aligned(split, source.path, own, read[split]) for split, own in loaded.items()}
    return {split: dataclasses.replace(own.examples, others=own.examples.others | {role: judged[split]}) for split, own in loaded.items()}


def alike(judge: Any, policy: Any, vocab_size: int) -> bool:
    """Whether two tokenizers are equal in content, so that every text gets the same tokens, all below `vocab_size`."""
    if not (judge.is_fast and policy.is_fast) or max(policy.get_vocab().values()) >= vocab_size:
        return False

    def content(tokenizer: Any) -> Any:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())  # truncation and padding are arguments of every call
        kept = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
        return type(tokenizer), tokenizer.split_special_tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, kept

    return content(judge) == content(policy)


def written(tokenizer: Any) -> tuple[Any, Any]:
    """The chat template and the special tokens that it uses; with its variables, they determine the text of a conversation."""
    template = tokenizer.chat_template
    return template, {name: token for name, token in tokenizer.special_tokens_map.items() if name in str(template)}


def form(source: hf.Source, judge: Any, tokenizer: Any) -> None:
    """Gives the policy's chat template to a model's tokenizer that has none.

    Raises:
      ValueError: if the tokenizer has another vocabulary than the policy's.
    """
    if judge.chat_template is not None:
        return
    if judge.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the model {str(source.path)!r} has another tokenizer than the policy, and no chat template for conversations")
    judge.chat_template = tokenizer.chat_template


def aligned(split: str, path: Path, own: Loaded, read: Loaded) -> Examples:
    """The examples in a reward model's tokens, with the rows of the policy's examples in their order."""
    place = {key: i for i, key in enumerate(keys(read))}
    if absent := [row for row in keys(own) if row not in place]:
        why = "; ".join(f"{reason}: {shown[0]}" for report in read.reports.values() for reason, shown in report.bad.items())
        raise ValueError(f"{len(absent)} rows of data.{split} cannot be read by the reward model {str(path)!r} ({why}); leave them out")
    return read.examples.taken(np.array([place[key] for key in keys(own)]))


def keys(data: Loaded) -> list[tuple[int, ...]]:
    """A key for each row: its source, its row number there, and its side if pairs were split."""
    counts = [report.kept * (2 if report.pairs_split else 1) for report in data.reports.values()]
    source, side = np.repeat(np.arange(len(counts)), counts), data.examples.fields.get("labels")
    return list(zip(source.tolist(), data.examples.rows.tolist(), *([] if side is None else [side[:, 0].tolist()]), strict=True))


def of_rollouts(config: Any, role: str, source: hf.Source, judge: Any, tokenizer: Any, every: Sequence[Examples]) -> Judge:
    """The input format of models for samples of the policy, with a length that holds every prompt and its answer.

    Raises:
      ValueError: for prompts that the model cannot read, or that leave no room for an answer.
    """
    new, most = longest_answer(config), source.config.max_position_embeddings
    tried = [asked(examples, i, PROBE) for examples in every for i in range(len(examples))]
    if any(not isinstance(row.prompt, str) for row in tried):
        form(source, judge, tokenizer)
    # With stop strings the texts are tokenised anew: a token of a stop string may also hold part of the answer.
    shared = alike(judge, tokenizer, source.config.vocab_size) and not (config.rollout.stop or config.eval.stop)
    own = Judge(role, judge, hf.end_ids(source, judge), 0, source.config.vocab_size, mentioned(judge, config.data.template), shared)
    sizes = []  # tokens of a prompt, and of the whole input row
    for code in tokens_of([row for row in tried if not (shared and isinstance(row.prompt, str))], own):
        if isinstance(code, Bad):
            raise ValueError(f"the model {str(source.path)!r} cannot read a prompt of the data: {code.what}")
        sizes.append((len(code.prompt), len(code.prompt) + len(code.completions[0]) + 2 * new))
    if shared:  # + 1: an answer that was cut gets an EOS
        sizes += [(longest, longest + new + 1) for examples in every if (longest := int(examples.prompt_lengths.max()))]
    prompt, length = (max(values) for values in zip(*sizes, strict=True))
    if prompt + new > most:
        raise ValueError(
            f"the model {str(source.path)!r} reads {most} tokens, but a prompt of {prompt} of its tokens and an answer of "
            f"max_new_tokens {new} do not fit; lower max_new_tokens, or leave that prompt out"
        )
    return own._replace(length=min(most, -(-length // 8) * 8))


def asked(examples: Examples, row: int, text: str) -> Prompted:
    """A prompt of the data with `text` as its answer, in the form of data rows."""
    prompt, tools = examples.asked(row)
    if isinstance(prompt, str):
        return Prompted(prompt, (text,))
    *before, last = prompt
    if last["role"] == "assistant":  # the prompt ends with the beginning of an answer, which `text` continues
        return Prompted(before, ([last | {"content": (last.get("content") or "") + text}],), tools=tools)
    return Prompted(prompt, ([{"role": "assistant", "content": text}],), tools=tools)


def tokens_of(rows: Sequence[Prompted], judge: Judge) -> list[Encoded | Bad]:
    """Rows of one answer each in a model's own tokens; a row with a token beyond the model's embedding is `Bad`."""
    ends = {judge.tokenizer.eos_token_id, *judge.ends}
    texts = iter(encode_texts([row for row in rows if isinstance(row.prompt, str)], judge.tokenizer, ends))
    conversations = [row for row in rows if not isinstance(row.prompt, str)]
    chats = iter(chat.encode(conversations, judge.tokenizer, ends, judge.variables, whole=True) if conversations else ())
    out = [next(texts) if isinstance(row.prompt, str) else next(chats) for row in rows]
    beyond = lambda code: isinstance(code, Encoded) and max(code.prompt + code.completions[0]) >= judge.vocab_size
    told = Bad("beyond the embedding", f"the text has tokens beyond the {judge.vocab_size} rows of the embedding")
    return [told if beyond(code) else code for code in out]


def read(judge: Judge, policy: Any, answers: Answers) -> dict[str, np.ndarray]:
    """The batch fields with the reward models' input for samples: `ROLE_tokens` and its two masks, each [B, N, T'].

    Every answer ends with the EOS, or with what the chat template writes after it, even if it was cut. A row longer than T' loses its
    end, and is True in `ROLE_cut` [B, N]. An answer that the reward models cannot read has no scored token. If the reward models have
    other tokens than the policy, `ROLE_foreign` [B] is True.

    Args:
      judge: input format of the reward models.
      policy: tokenizer of the policy.
      answers: the samples.
    """
    codes: list[Encoded | Bad | None] = []
    asks: list[Prompted] = []  # one for each None in `codes`
    examples, rows, said = answers.examples, answers.rows, answers.completions
    for i, prompt, group, own in zip(rows.tolist(), answers.prompts, said.answers(), answers.texts, strict=True):
        for tokens, text in zip(group, own, strict=True):
            if judge.shared and isinstance(examples.asked(i)[0], str):
                answer = [*tokens.tolist(), policy.eos_token_id]
                codes.append(Encoded([*prompt], [answer], [b"\1" * len(answer)], ""))
                continue
            whole = added_text(policy, prompt, tokens)  # as text after the prompt: a leading space belongs to the answer
            asks.append(asked(examples, i, whole[: whole.find(text) + len(text)] if text in whole else text))
            codes.append(None)
    anew = iter(tokens_of(asks, judge))
    foreign = {} if judge.shared else {f"{judge.role}_foreign": np.ones(len(rows), bool)}  # the ids are not the policy's
    shape = (*said.ended.shape, judge.length)
    out = {"tokens": np.zeros(shape, np.int32), "mask": np.zeros(shape, bool), "completion_mask": np.zeros(shape, bool)}
    flat = {name: x.reshape(-1, judge.length) for name, x in out.items()}
    cut = np.zeros(len(codes), bool)
    for k, code in enumerate(next(anew) if code is None else code for code in codes):
        if isinstance(code, Bad):
            continue
        ids = code.prompt + code.completions[0]
        cut[k], ids = len(ids) > judge.length, ids[: judge.length]
        scored = (bytes(len(code.prompt)) + code.scored[0])[: len(ids)]
        flat["tokens"][k, : len(ids)], flat["mask"][k, : len(ids)] = ids, True
        flat["completion_mask"][k, : len(ids)] = np.frombuffer(scored, np.bool_)
    return {f"{judge.role}_{name}": x for name, x in out.items()} | {f"{judge.role}_cut": cut.reshape(said.ended.shape)} | foreign


def without_ends(judge: Judge, own: Mapping[str, np.ndarray], answers: Answers) -> np.ndarray:
    """The mask of the tokens of answers alone, [B, N, T']: without the ends that `read` gives to answers that the policy did not end.

    Args:
      judge: input format of the model.
      own: `tokens` and `completion_mask` of the model, as `read` makes them.
      answers: the samples.
    """
    mask = own["completion_mask"]
    last = mask & (mask[..., ::-1].cumsum(axis=-1)[..., ::-1] == 1)
    given = np.isin(own["tokens"], judge.ends) & (answers.completions.ended != STOP_ID)[..., None]
    return mask & ~(last & given)
