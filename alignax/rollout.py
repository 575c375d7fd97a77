"""Rollouts: prompts of the data, completions that the policy samples now, and what a reward function on the host says of them.

A rollout is a batch [B, N, T] like any other. It is a function of the training state and the step alone, so a run that is stopped
goes on bit for bit.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax import judges
from alignax import mesh as meshes
from alignax.averages import PROPOSAL
from alignax.calls import Answer, Call, qualified
from alignax.calls import within as within  # how a reward function is timed, to try one by hand
from alignax.checks import parameters
from alignax.config import ROLLOUTS, prompts_of_rollout, steps_of_turn
from alignax.data import Examples
from alignax.data.files import short
from alignax.generate import Completions, Stops, policy_sampling, sampled_batch, sampler, speaker, stops_of, text_of
from alignax.generate.stops import LENGTH, STOP_ID, STOP_STRING
from alignax.online import make_learn, pretraining
from alignax.prepare import Run
from alignax.programs import AHEAD, full
from alignax.types import Batch, Metrics, Params, TrainState
from alignax.workers import Abandoned

MOST = 1e15  # that a reward may be from 0: squares of larger ones, summed over a rollout, overflow float32
REWARDS = {"reward": "rewards", "gold": "gold"}  # functions of an experiment -> fields of a batch


class Sampled(NamedTuple):
    """What a policy has just said, before anybody has judged it."""

    rows: np.ndarray  # [B] of the data
    prompts: list[list[int]]
    completions: Completions
    metrics: dict[str, float]


class Rollout(NamedTuple):
    """A batch to learn from."""

    batch: Batch  # on the mesh, see `Rollouts`
    metrics: dict[str, float]


class RewardFailed(RuntimeError):
    """A reward function that raises, hangs, or gives what is no number, where `rollout.bad_rewards` is "error"."""


class Rollouts:
    """Makes the rollouts of a run.

    A batch has `tokens`, `mask`, `completion_mask` and `sampled_logps` [B, N, T], `truncated` [B, N] bool (no EOS within
    `rollout.max_new_tokens`), `prompt_id` [B] int32 (the row of the data), and where the experiment has a reward function its
    `rewards` [B, N] float32. A completion whose reward is not known has reward NaN and no scored token, so it weighs nothing. Gold
    rewards, where it has those, are `gold` [B, N] float32.
    """

    def __init__(self, run: Run, look: Callable[[], None] = lambda: None):
        """Compiles nothing yet; `look` is called while it samples, and may raise to leave."""
        c, self.run = run.config.rollout, run
        count = prompts_of_rollout(run.config)
        longest = int(run.train.examples.prompt_lengths.max())
        self.generate = sampler(
            speaker(dataclasses.replace(run.source.config, lora=run.lora), run.dtype, mesh=run.mesh),
            count * c.samples,
            longest,
            c.max_new_tokens,
            policy_sampling(c.temperature, c.top_p),
            ends=run.ends,
            stops=stops_of(run.tokenizer, c.stop),
            slots=c.slots,
            look=look,
        )

    def __call__(self, state: TrainState, frozen: dict[str, Params], step: int) -> Rollout:
        """The rollout before training step `step`, with `rollout.refill` of groups whose rewards differ, as far as they are found.

        Its metrics of text, `bad_rewards` and `gold` are those of the first sample, as what the policy says, before any refill.

        Raises:
          RewardFailed: see there.
        """
        batch, metrics = self.judged(self.sample(state, frozen, step))
        if self.run.config.rollout.refill:
            batch, more = self.refilled(state, frozen, step, batch)
            metrics |= more | {name: metrics[name] + more[name] for name in ("time/generate", "time/reward")}
        return self.placed(batch, metrics)

    def sample(self, state: TrainState, frozen: dict[str, Params], step: int, again: int = 0, count: int | None = None) -> Sampled:
        """What the rollout before training step `step` says: of the policy as it stands, or of the average that samples for it.

        `again`: which time it is that groups are replaced, from 1 on, `count` of them; 0: the rollout itself.
        """
        run, rows, began = self.run, self.rows(step, again)[:count], time.monotonic()
        prompts = [run.train.examples.prompt_tokens(row).tolist() for row in rows]
        key = jax.random.fold_in(jax.random.fold_in(state.key, step), 2)
        key = jax.random.fold_in(key, again) if again else key
        params = full(run, frozen, state.averages.get(PROPOSAL, state.params))
        completions = self.generate(params, prompts, key, n=run.config.rollout.samples)
        return Sampled(rows, prompts, completions, {"time/generate": time.monotonic() - began} | text_metrics(completions))

    def judge(self, sampled: Sampled) -> Rollout:
        """What was sampled, with what reward functions say of it.

        Raises:
          RewardFailed: see there.
        """
        return self.placed(*self.judged(sampled))

    def unjudged(self, sampled: Sampled) -> Rollout:
        """What was sampled, where a signal came before reward functions had said anything of it: all rewards are infinite, as none is."""
        texts = decoded(self.run.tokenizer, sampled.completions, self.generate.stops)
        batch = said_batch(self.run, self.run.train.examples, sampled.rows, sampled.prompts, sampled.completions, texts)
        none = np.full(batch["truncated"].shape, np.inf, np.float32)
        asked = {field: none for name, field in REWARDS.items() if getattr(self.run.experiment, name) is not None}
        return self.placed(batch | asked, sampled.metrics | {"time/reward": 0.0})

    def waiting(self, batch: Batch) -> Sampled | None:
        """What a rollout that `unjudged` made has sampled, to be judged now; None of one that is judged."""
        asked = [batch[field] for field in REWARDS.values() if field in batch]
        if not asked or not np.isposinf(meshes.gathered(asked[0])).all():
            return None
        host = {name: meshes.gathered(batch[name]) for name in ("tokens", "mask", "sampled_logps", "truncated", "prompt_id")}
        rows = host["prompt_id"]
        prompts = [self.run.train.examples.prompt_tokens(row).tolist() for row in rows]
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
            elif tokens[b, n, count - 1] in self.run.ends:
                ended[b, n] = STOP_ID
        completions = Completions(tokens, mask, logps, ended, self.generate.sampling, 0, 0)
        return Sampled(rows, prompts, completions, {"time/generate": 0.0} | text_metrics(completions))

    def placed(self, batch: dict[str, np.ndarray], metrics: dict[str, float]) -> Rollout:
        """The rollout on the mesh."""
        count = len(batch["prompt_id"])
        return Rollout(meshes.put_batch(self.run.mesh, lambda part: {name: x[part] for name, x in batch.items()}, count), metrics)

    def judged(self, sampled: Sampled) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Batch and metrics of what was sampled, on the host."""
        run, began = self.run, time.monotonic()
        rows, prompts, completions, metrics = sampled
        examples, texts = run.train.examples, decoded(run.tokenizer, completions, self.generate.stops)
        batch = samples_batch(run, examples, rows, prompts, completions, texts)
        if "rewards" in batch:
            metrics["bad_rewards"] = float(np.isnan(batch["rewards"]).sum())
        if run.experiment.gold is not None:
            batch["gold"] = rewards_of(run, "gold", examples, rows, completions, texts)
            metrics["gold"] = known_mean(batch["gold"])
        return batch, metrics | {"time/reward": time.monotonic() - began}

    def refilled(
        self, state: TrainState, frozen: dict[str, Params], step: int, batch: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2): groups without a signal make room for other prompts'.

        Those that still have none after `rollout.refill` times have no scored token. The prompts of each time are a function of the step.
        """
        heard = has_signal(batch["rewards"])
        found = {"signal_rate": float(heard.mean()), "reward_sampled": known_mean(batch["rewards"]), "refill/times": 0.0}
        times = {"time/generate": 0.0, "time/reward": 0.0}
        while found["refill/times"] < self.run.config.rollout.refill and not heard.all():
            found["refill/times"] += 1
            silent = np.flatnonzero(~heard)
            other, metrics = self.judged(self.sample(state, frozen, step, int(found["refill/times"]), len(silent)))
            new = np.flatnonzero(has_signal(other["rewards"]))
            place = silent[: len(new)]
            for name, x in batch.items():
                x[place] = other[name][new]
            heard[place] = True
            times = {name: seconds + metrics[name] for name, seconds in times.items()}
        batch["completion_mask"] &= heard[:, None, None]
        return batch, found | times | {"refill/dropped": float((~heard).sum())}

    def rows(self, step: int, again: int = 0) -> np.ndarray:
        """The rows of the data that the rollout before training step `step` is of: those of so many steps of the stream.

        `again`: those that it goes on with; they come after the last ones of the whole run in the stream.
        """
        run, c = self.run, self.run.config.rollout
        first = step // c.epochs
        if again:
            before = run.steps // c.epochs  # batches of the stream that rollouts begin with
            first = before + (step // steps_of_turn(run.config) * c.refill + again - 1) * c.minibatches
        return np.concatenate([run.train.rows(first + i) for i in range(c.minibatches)])


class Turns:
    """Online training: a rollout of the policy as it stands, then the steps on it."""

    def __init__(self, run: Run, frozen: dict[str, Params], look: Callable[[], None] = lambda: None):
        """Compiles nothing yet; `look`: see `Rollouts`."""
        self.rollouts, self.frozen, self.learn = Rollouts(run, look), frozen, make_learn(run)
        self.compiled = Compiled()

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """The state after the steps on the rollout that step `step` begins, and metrics: means over them, and of the rollout."""
        compiled, began = self.compiled.programs, time.monotonic()
        turn = self.ahead if self.rollouts.run.config.rollout.ahead else self.now
        state, metrics = turn(state, step)
        seen = sum(metrics[f"time/{part}"] for part in ("generate", "reward", "learn"))
        return state, metrics | {"time/host": time.monotonic() - began - seen, "compilations": self.compiled.programs - compiled}

    def now(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """The policy learns from what it says now."""
        batch, metrics = self.rollouts(state, self.frozen, step)
        began = time.monotonic()
        batches = {ROLLOUTS: batch} | pretraining(self.rollouts.run, step)
        state, learnt = jax.block_until_ready(self.learn(state, self.frozen, batches))
        return state, learnt | metrics | {"time/learn": time.monotonic() - began}

    def ahead(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """The policy learns from what it said a turn ago, while the host judges what it says now; that waits in the carry.

        `time/learn` is how long the device went on after the host was done. Before the first turn and after the last there is nothing
        to overlap. Where a signal ends the wait for rewards, or there are none, the state before is given away: the turn is brought to
        its end, and what was sampled is judged before the next.
        """
        rollouts, run, said = self.rollouts, self.rollouts.run, []
        carry = dict(state.carry)
        batch = carry.pop(AHEAD)
        state = dataclasses.replace(state, carry=carry)
        waits = rollouts.sample(state, self.frozen, step) if step == 0 else rollouts.waiting(batch)
        if waits is not None:
            batch, metrics = rollouts.judge(waits)
            said.append(metrics)
        following = step + steps_of_turn(run.config)
        sampled = rollouts.sample(state, self.frozen, following) if following < run.steps else None
        state, learnt = self.learn(state, self.frozen, {ROLLOUTS: batch} | pretraining(run, step))  # goes on by itself
        if sampled is not None:
            try:
                batch, metrics = rollouts.judge(sampled)
            except (Abandoned, RewardFailed):
                batch, metrics = rollouts.unjudged(sampled)
            said.append(metrics)
        began = time.monotonic()
        state, learnt = jax.block_until_ready((state, learnt))
        times = {name: sum(metrics[name] for metrics in said) for name in ("time/generate", "time/reward")}
        newest = said[-1] if step == 0 or sampled is not None else {}  # what waited for its rewards was told of when it was sampled
        state = dataclasses.replace(state, carry=state.carry | {AHEAD: batch})
        return state, learnt | newest | times | {"time/learn": time.monotonic() - began}


class Compiled:
    """Counts the programs that are compiled from now on. jax keeps its listeners, so this holds nothing else."""

    def __init__(self):
        """Starts at 0."""
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.programs += event.endswith("backend_compile_duration")


def samples_batch(
    run: Run, examples: Examples, rows: np.ndarray, prompts: Sequence[Sequence[int]], completions: Completions, texts: list[list[str]]
) -> dict[str, np.ndarray]:
    """The batch of completions of rows of the data, on the host, with their rewards; see `Rollouts`."""
    batch = said_batch(run, examples, rows, prompts, completions, texts)
    if run.experiment.reward is None:
        return batch
    rewards = rewards_of(run, "reward", examples, rows, completions, texts)
    return batch | {"rewards": rewards, "completion_mask": batch["completion_mask"] & np.isfinite(rewards)[..., None]}


def said_batch(
    run: Run, examples: Examples, rows: np.ndarray, prompts: Sequence[Sequence[int]], completions: Completions, texts: list[list[str]]
) -> dict[str, np.ndarray]:
    """The batch of completions of rows of the data, on the host, before reward functions are asked."""
    batch = sampled_batch(prompts, completions, run.train.length)
    batch |= {"truncated": completions.ended == LENGTH, "prompt_id": rows.astype(np.int32)}
    if run.judge is not None:
        own = judges.read(run.judge, run.tokenizer, examples, rows, prompts, completions, texts)
        batch |= own | {"completion_mask": batch["completion_mask"] & own["judge_completion_mask"].any(axis=-1, keepdims=True)}
    return batch


def rewards_of(run: Run, name: str, examples: Examples, rows: np.ndarray, completions: Completions, texts: list[list[str]]) -> np.ndarray:
    """Rewards [B, N] float32 of completions of rows of the data, by `reward` or `gold` of the experiment; NaN where there is none.

    Raises:
      RewardFailed: where there is none and `rollout.bad_rewards` is "error".
      Abandoned: in every process, where a signal has ended the wait of the one that asks.
    """
    c, n = run.config.rollout, len(texts[0])
    found, what, left = np.full(len(rows) * n, np.nan, np.float32), "", 0
    flat = [text for group in texts for text in group]
    if jax.process_index() == 0:  # one process asks for all: the function may be random, or dear
        ids = [row for group in completions.rows() for row in group]
        try:
            answer = answer_of(run, name, examples, np.repeat(rows, n), flat, ids, n)
        except Abandoned as e:
            answer, left = Answer([np.nan] * len(found)), e.number
        with np.errstate(over="ignore"):
            found[:] = answer.rewards
        what = answer.problem + (f", for {short(flat[answer.at])}" if answer.at >= 0 else "")
    if jax.process_count() > 1:
        found, left = map(np.asarray, multihost_utils.broadcast_one_to_all((found, np.int32(left))))
    if left:
        raise Abandoned(int(left))
    bad = ~(np.abs(found) <= MOST)  # NaN, too
    first = int(bad.argmax())
    what = what or f"{bad.sum()} of {len(bad)} rewards are not finite or beyond {MOST:g}: {found[first]:g} for {short(flat[first])} first"
    where = f"{name}() of {run.experiment.file}{behind_file(what)}"
    if bad.any() and c.bad_rewards == "error":
        raise RewardFailed(f"{where}. Mend it, or go on without these with rollout.bad_rewards=drop")
    if bad.any() and jax.process_index() == 0:
        run.workers.tell(f"{where}. Such are dropped, and counted as bad_rewards")
    return np.where(bad, np.nan, found).reshape(len(rows), n)


def answer_of(
    run: Run, name: str, examples: Examples, rows: Sequence[int] | np.ndarray, texts: list[str], ids: Sequence[np.ndarray], group: int
) -> Answer:
    """What `reward` or `gold` of the experiment says of completions of rows of the data, those of a prompt, `group`, one after another."""
    function = getattr(run.experiment, name)
    wanted = parameters(function, examples.columns)
    names = ("prompts", "completions", *wanted.named) if wanted.positional else wanted.named
    given: dict[str, list[Any]] = {}
    for column in (name for name in names if name != "config"):
        if column == "prompts":
            given[column] = [examples.prompts[row] for row in rows]
        elif column == "completions":
            given[column] = texts
        elif column == "completion_ids":
            given[column] = [own.tolist() for own in ids]
        elif column == "raw_completions":
            given[column] = run.tokenizer.batch_decode(list(ids), skip_special_tokens=False)
        else:
            given[column] = [examples.columns[column][row] for row in rows]
    c = run.config.rollout
    call = Call(name, qualified(function), wanted.positional, given, "config" in names, len(texts), c.timeout)
    return run.workers(call, group, strict=c.bad_rewards == "error")


def behind_file(problem: str) -> str:
    """A problem behind the name of its file: ", line 3: .." or ": .."."""
    return (", " if problem.startswith("line ") else ": ") + problem


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Which groups have two known rewards that differ: [B, N] -> [B] bool."""
    known = np.isfinite(rewards)
    return np.where(known, rewards, -np.inf).max(axis=1) > np.where(known, rewards, np.inf).min(axis=1)


def trained_on(run: Run, shown: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of `rollouts.jsonl`: what `make_learn` shows of a rollout, as texts with their special tokens."""
    tokens, mask, scored = (shown[name] for name in ("tokens", "mask", "completion_mask"))  # [b, N, T]
    rows = []
    for b, n in list(np.ndindex(tokens.shape[:2]))[: run.config.log.rollouts]:
        # Where no token is scored, as without a reward, the prompt of the data says where the completion begins.
        first = int(scored[b, n].argmax()) if scored[b, n].any() else len(run.train.examples.prompt_tokens(int(shown["prompt_id"][b])))
        own = tokens[b, n][mask[b, n]]
        row = {"prompt": run.tokenizer.decode(own[:first]), "completion": run.tokenizer.decode(own[first:])}
        numbers = {name: shown[name][b, n].item() for name in ("reward", "advantage", "truncated") if name in shown}
        rows.append(row | numbers)
    return rows


def known_mean(x: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where all is."""
    return float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")


def decoded(tokenizer: Any, completions: Completions, stops: Stops | None = None) -> list[list[str]]:
    """Texts [B][N], special tokens and what has ended them left out."""
    each = lambda rows, ended: [text_of(row, why, tokenizer, stops) for row, why in zip(rows, ended.tolist(), strict=True)]
    return [each(*pair) for pair in zip(completions.rows(), completions.ended, strict=True)]


def text_metrics(completions: Completions) -> dict[str, float]:
    """Of what was sampled: mean length in tokens, how much of it ended, and how much of it differs."""
    lengths = completions.mask.sum(axis=-1)
    rows = completions.tokens.reshape(-1, completions.tokens.shape[-1])
    return {
        "completion_length": float(lengths.mean()),
        "eos_rate": float((completions.ended != LENGTH).mean()),
        "truncated_rate": float((completions.ended == LENGTH).mean()),
        "distinct": len(np.unique(rows, axis=0)) / len(rows),
    }
