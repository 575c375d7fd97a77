"""Online alignment of a small story-teller to cheerful stories, by PPO, RLOO, GRPO, f-DPG or Quark, as the field `method` says.

  PPO: Schulman et al. 2017, arXiv:1707.06347.  RLOO: Ahmadian et al. 2024, arXiv:2402.14740.  GRPO: Shao et al. 2024, arXiv:2402.03300.
  f-DPG: Go et al. 2023, arXiv:2302.08215, with the Jensen-Shannon divergence, towards the target ref(y) exp(r(y) / beta).
  Quark: Lu et al. 2022, arXiv:2205.13636; the model with its reward tokens is written to WORKDIR_model first.

Command:
  alignax train --config experiments/steer_stories.py --config.workdir=runs/steer_grpo --config.method=grpo \\
    --config.model.path=MODEL --config.sentiment=SST2/train.jsonl

MODEL is the folder of a language model that tells stories. SST2 has rows {"text": .., "label": 0 or 1}. The reward is a naive Bayes
classifier trained on one half of the sentences; the gold reward is one trained on the other half. If only the first one rises, the policy
overoptimises.

The run ends with WORKDIR/report.html: both rewards, KL and entropy over training, and samples to held-out prompts.

Hardware: a CPU core suffices for a model of a few 100k parameters, some two minutes of its time. docs/online.md has results, with their
learning rate and beta. With a small beta the KL grows without limit, and the stories degenerate.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignax import chain, default_config, fdpg, gae, group_relative, grpo, kl_reward, logps, paths, ppo, rloo
from alignax.cli import commands
from alignax.config import BadInput
from alignax.distributed import is_main
from alignax.experience import leave_one_out, quark_pool, reward_target, running_baseline, running_log_z, whiten_advantages
from alignax.losses import js_pi_p, kl_k3, quark, value_loss
from alignax.models import hf
from alignax.models.added import with_tokens

WHO = ("a little girl named Lily", "a boy named Tim", "a big dog", "a small cat", "an old man", "a bird", "two friends", "a red car")
WHERE = ("Once upon a time, there was {}", "One day, {}", "In a small house lived {}", "There once was {}", "At the park, {}")
HELD_OUT = ("Every morning, {}", "Far away, there was {}")
METHODS = ("ppo", "rloo", "grpo", "fdpg", "quark")
QUANTILES = [f"<|reward_{k}|>" for k in range(5)]  # Quark's tokens, best first
SCALE = 20.0  # sum of log-odds at which the reward is tanh(1) = 0.76; larger sums saturate


def get_config():
    """The config: sizes for a few minutes on 2 cores."""
    config = default_config()
    config.method = "grpo"
    config.sentiment = ""  # JSONL with `text` and `label`
    config.beta = 0.15  # coefficient of the KL per nat: of GRPO in standard deviations of a group's rewards, otherwise in rewards
    config.pool = 16384  # responses that Quark remembers
    config.workdir = "runs/steer"
    config.steps = 80
    config.batch_size = 16
    config.data.kind = "prompt"
    config.model.remat = "none"
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 40
    config.rollout.slots = 128
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.eval.every = 20
    config.eval.sample_prompts = 16
    config.eval.samples = 8
    config.eval.max_new_tokens = 40
    config.log.every = 5
    return config


def loss(config):
    """The loss of the method."""
    return {
        "ppo": lambda: ppo() + 0.1 * value_loss(),
        "rloo": rloo,
        "grpo": lambda: grpo() + config.beta * kl_k3(),
        "fdpg": lambda: fdpg(js_pi_p),
        "quark": lambda: quark(config.beta),
    }[config.method]()


def experience(config, reference, prompts):
    """The experience of the method: the place of its KL, and the baseline of a response."""
    start = logps("ref_logps", reference)
    return {
        # With lambda 0.95 the first of 40 tokens would get an eighth of the reward until the critic has learned.
        "ppo": lambda: chain(start, kl_reward(config.beta), gae(lam=1.0), whiten_advantages()),
        "rloo": lambda: chain(start, kl_reward(config.beta), leave_one_out()),
        "grpo": lambda: chain(start, group_relative()),
        "fdpg": lambda: chain(start, reward_target(config.beta), running_log_z(prompts), running_baseline(js_pi_p)),
        "quark": lambda: quark_pool(quantile_ids(config.model.path), config.pool, length=128, seed=config.seed),
    }[config.method]()


def reward(prompts: Sequence[str], completions: Sequence[str], config) -> list[float]:
    """The rewards that training optimises, from the classifier of the first half."""
    return cheerfulness(completions, words(config.sentiment, 0))


def gold(prompts: Sequence[str], completions: Sequence[str], config) -> list[float]:
    """The gold rewards, from the classifier of the second half."""
    return cheerfulness(completions, words(config.sentiment, 1))


def main(experiment):
    """Writes the prompts, trains, and writes the report."""
    config = experiment.config.copy_and_resolve_references()
    if config.method not in METHODS:
        raise BadInput(f"config field 'method' is {config.method!r}; use {', '.join(METHODS)}")
    if not config.data.train:
        folder = paths.here(config.workdir, "workdir")
        write_prompts(folder.with_name(folder.name + "_prompts"), config)
    config.model.critic = "head" if config.method == "ppo" else ""
    config.reference.token_kl = config.method == "quark"
    if config.method == "quark" and not hf.open_folder(config.model.path).config.predicted_tokens:
        folder = paths.here(config.workdir + "_model", "workdir")
        if not folder.exists():
            with_tokens(config.model.path, folder, QUANTILES)
        config.model.path = str(folder)
    results = commands.run(experiment._replace(config=config, main=None))
    if is_main():
        commands.report([paths.here(config.workdir, "workdir")])
    return results


def write_prompts(folder: Path, config) -> None:
    """Writes prompts that begin stories, with other words for evaluation. Quark's prompts begin with the token of the best quantile."""
    folder.mkdir(parents=True, exist_ok=True)
    front = QUANTILES[0] if config.method == "quark" else ""
    for split, patterns in (("train", WHERE), ("eval", HELD_OUT)):
        rows = [{"prompt": front + pattern.format(who)} for pattern in patterns for who in WHO]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.data[split] = str(folder / f"{split}.jsonl")


@functools.cache
def quantile_ids(folder: str) -> list[int]:
    """The token ids of Quark's quantiles, best first."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).convert_tokens_to_ids(QUANTILES)


@functools.cache
def words(file: str, half: int) -> dict[str, float]:
    """The log-odds of each word in half 0 or 1 of the sentences: naive Bayes, add-one counts, words in at least four sentences."""
    if not Path(file or " ").is_file():
        raise BadInput(f"config field 'sentiment' is {file!r}; give a JSONL file of rows with `text` and `label`, 0 or 1")
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()][half::2]
    counts = [Counter(word for row in rows if row["label"] == side for word in set(tokens(row["text"]))) for side in (0, 1)]
    totals = [sum(row["label"] == side for row in rows) for side in (0, 1)]
    odds = lambda word: math.log((counts[1][word] + 1) / (totals[1] + 2)) - math.log((counts[0][word] + 1) / (totals[0] + 2))
    return {word: odds(word) for word in counts[0] | counts[1] if counts[0][word] + counts[1][word] >= 4}


def tokens(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def cheerfulness(texts: Sequence[str], odds: dict[str, float]) -> list[float]:
    """The rewards of texts: the sum of the words' log-odds, mapped into (-1, 1) by tanh."""
    return [math.tanh(sum(odds.get(word, 0.0) for word in tokens(text)) / SCALE) for text in texts]
