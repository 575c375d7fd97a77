"""Rollouts: prompts of the data, completions that the policy samples now, and their rewards from functions on the host.

A rollout is a batch [B, N, T] like any other. It is a function of the training state and the step alone, so a stopped run goes on bit
for bit.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax import mesh as meshes
from alignax.averages import PROPOSAL
from alignax.config import steps_of_turn
from alignax.generate import Answers, Completions, Stops, sampled_batch, text_of
from alignax.generate.stops import LENGTH, STOP_ID, STOP_STRING
from alignax.host.calls import within as within  # exported, to call a reward function by hand with its time limit
from alignax.host.functions import names_of, reward_fields
from alignax.rewards import judge as judges
from alignax.run.host_rewards import Models, bad_rewards, has_signal, known_mean, metrics_of, named, rewarded, rewards_of
from alignax.run.prepare import Run
from alignax.run.roles import GOLD
from alignax.run.sampling import ROLLOUT, speaker_params
from alignax.run.scoring import Scorers
from alignax.run.state import Held
from alignax.types import Batch, TrainState


class Sampled(NamedTuple):
    """Completions that a policy has just sampled, without rewards."""

    rows: np.ndarray  # [B] rows of the data that hold the prompts
    prompts: list[list[int]]
    completions: Completions
    metrics: dict[str, float]


class Rollout(NamedTuple):
    """A rollout on the mesh, with its metrics."""

    batch: Batch  # on the mesh, see `Rollouts`
    metrics: dict[str, float]


class Rollouts:
    """Makes the rollouts of a run.

    A batch has `tokens`, `mask`, `completion_mask` and `sampled_logps` [B, N, T], `truncated` [B, N] bool (no EOS within
    `rollout.max_new_tokens`) and `prompt_id` [B] int32 (the row of the data). A reward function adds `rewards` [B, N] float32, and
    `scores` [B, N, K] if it gives several named numbers. A completion without a reward has reward NaN and no scored token, so its weight
    is 0. Gold rewards, if there are any, are `gold` [B, N] float32.
    """

    def __init__(self, run: Run, look: Callable[[], None] = lambda: None, scorers: Scorers | None = None):
        """Compiles nothing yet.

        Args:
          run: an online run.
          look: called while completions are sampled; an exception that it raises ends the rollout.
          scorers: the frozen models that score samples; default: none.
        """
        self.run, self.look, self.generate = run, look, run.samplers[ROLLOUT]
        self.scorers = scorers or Scorers(run, {}, {}, ROLLOUT)

    def __call__(self, state: TrainState, frozen: Held, step: int) -> Rollout:
        """The rollout before training step `step`; `rollout.refill` replaces groups whose rewards are all equal, see `refilled`.

        Its metrics of text, `bad_rewards` and `gold` are those of the first samples, before any refill.

        Raises:
          RewardFailed: if a reward function fails and `rollout.bad_rewards` is "error".
        """
        batch, metrics = self.judged(self.sample(state, frozen, step))
        if self.run.config.rollout.refill:
            batch, more = self.refilled(state, frozen, step, batch)
            metrics |= more | {name: metrics[name] + more[name] for name in ("time/generate", "time/reward")}
        return self.placed(batch, metrics)

    def sample(self, state: TrainState, frozen: Held, step: int, again: int = 0, count: int | None = None) -> Sampled:
        """Samples the completions of the rollout before training step `step` from the current policy, or from its average "proposal".

        `again` is 0 for the rollout itself; from 1 on it is the number of a refill, which samples `count` groups.
        """
        run, rows, began = self.run, self.rows(step, again)[:count], time.monotonic()
        prompts = [run.data.train.examples.prompt_tokens(row).tolist() for row in rows]
        key = jax.random.fold_in(jax.random.fold_in(state.key, step), 2)
        key = jax.random.fold_in(key, again) if again else key
        params = speaker_params(self.generate.speaker, run.roles, frozen, state.averages.get(PROPOSAL, state.params))
        completions = self.generate(params, prompts, key, run.config.rollout.samples, self.look)
        return Sampled(rows, prompts, completions, {"time/generate": time.monotonic() - began} | text_metrics(completions))

    def judge(self, sampled: Sampled) -> Rollout:
        """The rollout of sampled completions, with their rewards.

        Raises:
          RewardFailed: if a reward function fails and `rollout.bad_rewards` is "error".
        """
        return self.placed(*self.judged(sampled))

    def unjudged(self, sampled: Sampled) -> Rollout:
        """The rollout of sampled completions without rewards, for a stopped run: all rewards are inf, which no reward function gives."""
        batch = said_batch(self.run, self.answers(sampled))
        fields = reward_fields(self.run.experiment) | ({GOLD: ()} if GOLD in self.run.roles else {})
        asked = {name: np.full((*batch["truncated"].shape, *more), np.inf, np.float32) for name, more in fields.items()}
        return self.placed(batch | asked, sampled.metrics | {"time/reward": 0.0})

    def waiting(self, batch: Batch) -> Sampled | None:
        """The sampled completions of a rollout from `unjudged`, which still needs rewards; None for any other rollout."""
        asked = [batch[name] for name in (*reward_fields(self.run.experiment), "gold") if name in batch]
        if not asked or not np.isposinf(meshes.gathered(asked[0])).all():
            return None
        host = {name: meshes.gathered(batch[name]) for name in ("tokens", "mask", "sampled_logps", "truncated", "prompt_id")}
        rows = host["prompt_id"]
        prompts = [self.run.data.train.examples.prompt_tokens(row).tolist() for row in rows]
        shape = (*host["truncated"].shape, self.run.config.rollout.max_new_tokens)
        tokens, mask, logps = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
        ended = np.full(shape[:2], STOP_STRING, object)
        for b, n in np.ndindex(shape[:2]):
            own = slice(len(prompts[b]), int(host["mask"][b, n].sum()))
            count = own.stop - own.start
            tokens[b, n, :count], mask[b, n, :count] = host["tokens"][b, n, own], True
            logps[b, n, :count] = host["sampled_logps"][b, n, own]
            if host["truncated"][b, n]:
                ended[b, n] = LENGTH
            elif tokens[b, n, count - 1] in self.run.words.ends:
                ended[b, n] = STOP_ID
        completions = Completions(tokens, mask, logps, ended, self.generate.sampling, 0, 0)
        return Sampled(rows, prompts, completions, {"time/generate": 0.0} | text_metrics(completions))

    def answers(self, sampled: Sampled) -> Answers:
        """The sampled completions with their texts."""
        texts = decoded(self.run.words.tokenizer, sampled.completions, self.generate.stops)
        return Answers(self.run.data.train.examples, sampled.rows, sampled.prompts, sampled.completions, texts)

    def placed(self, batch: dict[str, np.ndarray], metrics: dict[str, float]) -> Rollout:
        """Puts a batch from the host on the mesh, as a rollout."""
        count = len(batch["prompt_id"])
        return Rollout(meshes.put_batch(self.run.mesh, lambda part: {name: x[part] for name, x in batch.items()}, count), metrics)

    def judged(self, sampled: Sampled, again: bool = False) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Batch and metrics of sampled completions, on the host; `again`: a refill, for which `metrics` of the experiment is not called."""
        run, began, metrics, answers = self.run, time.monotonic(), sampled.metrics, self.answers(sampled)
        models, gold = self.scorers(answers)
        batch = samples_batch(run, answers, models)
        if run.experiment.reward is not None:
            metrics["bad_rewards"] = bad_rewards(batch)
        if run.experiment.gold is not None:
            batch |= rewards_of(run, "gold", answers, models)
        elif gold is not None:
            batch["gold"] = gold
        if "gold" in batch:
            metrics["gold"] = known_mean(batch["gold"])
        if not again:
            metrics |= metrics_of(run, answers, models)
        return batch, metrics | {"time/reward": time.monotonic() - began}

    def refilled(
        self, state: TrainState, frozen: Held, step: int, batch: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2): replaces groups whose rewards are all equal.

        New groups are of other prompts. Groups that are not replaced after `rollout.refill` refills have no scored token. The prompts of
        each refill are a function of the step.
        """
        heard = has_signal(batch["rewards"])
        found = {"signal_rate": float(heard.mean()), "reward_sampled": known_mean(batch["rewards"]), "refill/times": 0.0}
        times = {"time/generate": 0.0, "time/reward": 0.0}
        while found["refill/times"] < self.run.config.rollout.refill and not heard.all():
            found["refill/times"] += 1
            silent = np.flatnonzero(~heard)
            other, metrics = self.judged(self.sample(state, frozen, step, int(found["refill/times"]), len(silent)), again=True)
            new = np.flatnonzero(has_signal(other["rewards"]))
            place = silent[: len(new)]
            for name, x in batch.items():
                x[place] = other[name][new]
            heard[place] = True
            times = {name: seconds + metrics[name] for name, seconds in times.items()}
        batch["completion_mask"] &= heard[:, None, None]
        return batch, found | times | {"refill/dropped": float((~heard).sum())}

    def rows(self, step: int, again: int = 0) -> np.ndarray:
        """The rows of the data whose prompts the rollout before training step `step` samples: `rollout.minibatches` batches of the stream.

        `again`: the number of a refill, whose rows come after all rows of the run's rollouts in the stream; 0: the rollout itself.
        """
        run, c = self.run, self.run.config.rollout
        first = step // c.epochs
        if again:
            before = run.steps // c.epochs  # batches of the stream that all rollouts take without refills
            first = before + (step // steps_of_turn(run.config) * c.refill + again - 1) * c.minibatches
        return np.concatenate([run.data.train.rows(first + i) for i in range(c.minibatches)])


def samples_batch(run: Run, answers: Answers, models: Models) -> dict[str, np.ndarray]:
    """The batch of completions with their rewards, on the host; `models` is from `Scorers`, the fields are those of `Rollouts`."""
    batch = said_batch(run, answers)
    if run.experiment.reward is None:
        return batch
    rewards = rewards_of(run, "reward", answers, models)
    return batch | rewards | {"completion_mask": batch["completion_mask"] & rewarded(rewards)[..., None]}


def said_batch(run: Run, answers: Answers) -> dict[str, np.ndarray]:
    """The batch of completions, on the host, without rewards of reward functions."""
    batch = sampled_batch(answers.prompts, answers.completions, run.data.train.length)
    batch |= {"truncated": answers.completions.ended == LENGTH, "prompt_id": answers.rows.astype(np.int32)}
    for role, judge in run.readers.items():
        own = judges.read(judge, run.words.tokenizer, answers)
        readable = own[f"{role}_completion_mask"].any(axis=-1, keepdims=True)
        batch |= own | {"completion_mask": batch["completion_mask"] & readable}
    return batch


def trained_on(run: Run, shown: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The rows of `rollouts.jsonl`: the responses that `make_learn` shows of a rollout, as texts with special tokens."""
    tokens, mask, scored = (shown[name] for name in ("tokens", "mask", "completion_mask"))  # [b, N, T]
    rows = []
    for b, n in list(np.ndindex(tokens.shape[:2]))[: run.config.log.rollouts]:
        # If no token is scored, as without a reward, the completion begins where the prompt of the data ends.
        first = int(scored[b, n].argmax()) if scored[b, n].any() else len(run.data.train.examples.prompt_tokens(int(shown["prompt_id"][b])))
        own = tokens[b, n][mask[b, n]]
        row = {"prompt": run.words.tokenizer.decode(own[:first]), "completion": run.words.tokenizer.decode(own[first:])}
        numbers = {name: shown[name][b, n].item() for name in ("reward", "advantage", "truncated") if name in shown}
        scores = {"scores": named(names_of(run.experiment), shown["scores"][b, n])} if "scores" in shown else {}
        rows.append(row | numbers | scores)
    return rows


def decoded(tokenizer: Any, completions: Completions, stops: Stops | None = None) -> list[list[str]]:
    """The texts [B][N] of completions, without special tokens and without the stop string that ended them."""
    each = lambda rows, ended: [text_of(row, why, tokenizer, stops) for row, why in zip(rows, ended.tolist(), strict=True)]
    return [each(*pair) for pair in zip(completions.rows(), completions.ended, strict=True)]


def text_metrics(completions: Completions) -> dict[str, float]:
    """Metrics of sampled completions: mean length in tokens, the shares that ended and that were truncated, the share of distinct ones."""
    lengths = completions.mask.sum(axis=-1)
    rows = completions.tokens.reshape(-1, completions.tokens.shape[-1])
    return {
        "completion_length": float(lengths.mean()),
        "eos_rate": float((completions.ended != LENGTH).mean()),
        "truncated_rate": float((completions.ended == LENGTH).mean()),
        "distinct": len(np.unique(rows, axis=0)) / len(rows),
    }
