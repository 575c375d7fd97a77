"""The laboratory on Hugging Face folders: best-of-n of a policy's responses under reward models, judged by a gold reward model.

Nothing is trained. Each seed takes the next prompts of the file and samples its own responses; the models are the same for all seeds.
A reward model reads responses as text. Its own tokenizer encodes them as in training and ends them with its EOS, even responses that
were cut at `max_new_tokens`. A response that is sampled twice counts twice, as in the policy's distribution.

Policy, gold and ensemble are loaded one after another, never two at a time.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import rewards
from alignax.config import BadInput
from alignax.data import padded_length
from alignax.data.files import read_rows
from alignax.data.rows import Prompted, Rejected
from alignax.data.template import mentioned
from alignax.data.tokens import tokenize
from alignax.generate import LENGTH, sampler, speaker
from alignax.generate.console import Prompt, encoded, row_prompt
from alignax.generate.generator import check_room
from alignax.generate.stops import added_text
from alignax.models import hf
from alignax.models.tokenizers import load_tokenizer
from alignax.overopt.worlds import Scored, World, check_ranges, check_sizes, check_varies, margins
from alignax.paths import of as path_of
from alignax.run.opening import compute_dtype, open_model

RANGES = (("world.prompts", 1, math.inf), ("world.responses", 2, math.inf), ("folders.batch_size", 1, math.inf),
          ("folders.max_new_tokens", 1, math.inf))  # fmt: skip


class Responses(NamedTuple):
    """The policy's responses to P prompts, N responses to each."""

    prompts: Sequence[Prompt]
    texts: list[list[str]]  # P lists of N texts
    lengths: np.ndarray  # [P, N] in tokens of the policy


def folders(config: Any) -> World:
    """The world of Hugging Face folders: a policy, reward models as proxies, and a reward model as gold.

    Args:
      config: `world.prompts` (prompts of a seed), `world.responses` (responses to a prompt), and the group `folders`: `policy`, `proxies`
        (separated by commas), `gold`, `prompts` (a file with a column `data.columns.prompt`: text or messages), `max_new_tokens`,
        `batch_size`.

    Raises:
      BadInput: for an empty or unknown field, and for an n above the number of responses.
    """
    c = config.folders
    check_ranges(config, RANGES)
    check_sizes(config)
    for field in ("policy", "proxies", "gold", "prompts"):
        if not c[field]:
            raise BadInput(f"config field 'folders.{field}' is empty; the laboratory on folders needs policy, proxies, gold and prompts")
    return World(partial(score, config), None)


def score(config: Any, seeds: Sequence[int]) -> Iterator[Scored]:
    """Samples the responses of all seeds and scores them, one model after another; yields one `Scored` per seed."""
    c, mesh = config.folders, meshes.make_mesh(config.mesh)
    proxies = [path.strip() for path in c.proxies.split(",")]
    for paths in (proxies, [c.gold]):  # errors come before the costly sampling
        check_reward_models(paths)
    if len(proxies) == 1:
        print("  one proxy: mean, median, WCO and UWO all equal the score of that model", file=sys.stderr)
    every = sampled(config, mesh, seeds)
    golds = rated(config, mesh, [c.gold], every)
    members = rated(config, mesh, proxies, every)
    for own, (gold,), scores in zip(every, golds, members, strict=True):
        check_varies(mean := float(gold.mean()), spread := float(gold.std()))
        gold = (gold - mean) / spread
        yield Scored(gold, scores, margins(gold, scores), own.lengths, partial(show, own))


def show(own: Responses, p: int, i: int) -> tuple[str, str]:
    """The texts of prompt p and of its i-th response."""
    return own.prompts[p].text, own.texts[p][i]


def check_reward_models(paths: Sequence[str]) -> None:
    """Refuses folders that do not make an ensemble of different reward models with one score each."""
    for path, source in zip(paths, rewards.open_ensemble(paths), strict=True):
        if (labels := source.config.num_labels) != 1:
            raise BadInput(f"{path!r} gives {labels} scores per response; the laboratory takes reward models with one score")
    if len({path_of(path).resolve() for path in paths}) < len(paths):
        raise BadInput(f"the proxies {', '.join(paths)} name one folder twice; give each folder once")


# Responses ------------------------------------------------------------------------------------------------------------------


def sampled(config: Any, mesh: Mesh, seeds: Sequence[int]) -> list[Responses]:
    """The policy's responses for each seed, sampled at temperature 1."""
    c, P, N = config.folders, config.world.prompts, config.world.responses
    source = open_model(c.policy, "pretrained", "folders.policy")
    if source.config.num_labels:
        raise BadInput(f"folders.policy {c.policy!r} is a reward model, which gives scores and no text; give a language model")
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    source = hf.with_vocabulary(source, tokenizer)
    prompts = read_prompts(config, tokenizer, P * len(seeds))
    longest = max(len(prompt.ids) for prompt in prompts)
    check_room(source.config, longest, c.max_new_tokens)
    rows = whole_rows(config, mesh)
    policy = speaker(source.config, compute_dtype(config, mesh), mesh=mesh)
    generate = sampler(policy, P * N, longest, c.max_new_tokens, ends=hf.end_ids(source, tokenizer), slots=rows)
    params, out, cut = hf.load_params(source, mesh), [], 0
    for i, seed in enumerate(seeds):
        own = prompts[i * P : (i + 1) * P]
        found = generate(params, [prompt.ids for prompt in own], jax.random.key(seed), N)
        texts = [[added_text(tokenizer, p.ids, tokens) for tokens in row] for p, row in zip(own, found.answers(), strict=True)]
        out.append(Responses(own, texts, found.mask.sum(axis=-1)))
        cut += int((found.ended == LENGTH).sum())
    total, different = P * N * len(seeds), sum(len(set(row)) for own in out for row in own.texts)
    print(
        f"  {total} responses: {total - different} repeat another response to the same prompt, {cut} are cut at {c.max_new_tokens} tokens",
        file=sys.stderr,
    )
    return out


def read_prompts(config: Any, tokenizer: Any, wanted: int) -> list[Prompt]:
    """The first `wanted` prompts of the file `folders.prompts`."""
    file = config.folders.prompts
    rows = read_rows(file)
    if len(rows) < wanted:
        remedy = "lower world.prompts or repeats (each seed takes different prompts)"
        raise BadInput(f"{file} has {len(rows)} prompts, but {wanted} are needed; {remedy}")
    out = []
    for i, row in enumerate(rows[:wanted]):
        asked = row_prompt(i, row, file, config.data.columns)
        out.append(encoded(i, asked.prompt, asked.tools, tokenizer, file, config.data.template))
    return out


# Scores ---------------------------------------------------------------------------------------------------------------------


def rated(config: Any, mesh: Mesh, paths: Sequence[str], every: Sequence[Responses]) -> list[np.ndarray]:
    """The scores of each seed's responses by an ensemble of reward models: a list of arrays [K, P, N]."""
    source, params = rewards.load_ensemble(paths, mesh)
    model = rewards.ensemble_model(source.config, params, mesh, compute_dtype(config, mesh))
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    rows = [
        Prompted(*row, tools=p.tools) for own in every for p, texts in zip(own.prompts, own.texts, strict=True) for row in asked(p, texts)
    ]
    try:
        most = source.config.max_position_embeddings
        rejected = Rejected(config.folders.prompts)
        limits: dict[str, Any] = {"max_length": most, "max_prompt_length": 0, "vocab_size": source.config.vocab_size}
        given = {"ends": hf.end_ids(source, tokenizer), "rejected": rejected, "template": mentioned(tokenizer, config.data.template)}
        examples, report = tokenize(rows, tokenizer, whole=True, **given, **limits)
        scores = rewards.score_examples(model.apply, model.params, examples, mesh, whole_rows(config, mesh), padded_length(examples))
    except ValueError as e:
        raise BadInput(f"{', '.join(paths)}: {e}") from e
    if report.completions_cut:
        print(f"  {report.completions_cut} responses are cut at the {most} positions of {source.path}", file=sys.stderr)
    return np.split(scores.reshape(len(paths), -1, config.world.responses), len(every), axis=1)


def asked(prompt: Prompt, texts: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Pairs of a prompt and each of its responses, in the form of data rows."""
    for text in texts:
        yield prompt.given, (text,) if isinstance(prompt.given, str) else ([{"role": "assistant", "content": text}],)


def whole_rows(config: Any, mesh: Mesh) -> int:
    """The number of responses sampled or scored side by side: `folders.batch_size`, rounded up to a multiple of the batch shards."""
    shards = meshes.batch_shards(mesh)
    return -(-config.folders.batch_size // shards) * shards
