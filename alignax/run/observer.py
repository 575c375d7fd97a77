"""The observer of a training run: it logs the metrics of each step and prints notices on problems, each once."""

import math
from concurrent.futures import Future

import jax
import numpy as np

from alignax.run.host_rewards import RewardFailed
from alignax.run.log import Log
from alignax.run.prepare import Run
from alignax.run.rollout import trained_on
from alignax.types import Metrics

DRIFT = 2.0  # nats that the log-prob of chosen responses falls before a notice
EQUAL = {"float32": 1e-3, "bfloat16": 0.1}  # nats that log-probs of equal models may differ by rounding
QUIET = 3  # rollouts in a row without a signal before a notice
SAME = 0.2  # share of the first rollout's distinct completions; below it there is a notice


class Observer:
    """Logs training metrics, prints notices on problems (each once), and stops a run that cannot learn."""

    def __init__(self, run: Run, log: Log, equal: bool):
        """`equal`: whether policy and reference start with the same parameters."""
        self.run, self.log, self.equal = run, log, equal
        self._first: dict[str, float] = {}
        self._smooth: dict[str, float] = {}
        self._since = 0
        self._noticed = False
        self._told: set[str] = set()  # names of the notices on rollouts that were printed
        self._seen = self._unrewarded = self._silent = self._cut = 0  # steps; then rollouts in a row

    def __call__(self, step: int, metrics: Metrics, ended: Future[float] | None = None) -> None:
        """Fetches and logs the metrics of a step; `ended` gives the time at which the step ended, None: now.

        Raises:
          FloatingPointError: after `max_skipped` non-finite steps in a row, or if equal models differ.
          RewardFailed: after `max_skipped` rollouts in a row without a reward.
        """
        fetched = jax.device_get(dict(metrics))
        if shown := fetched.pop("shown", None):
            self.log.rollouts(step, trained_on(self.run, shown))
        values = {name: float(x) for name, x in fetched.items()}
        infinite = [name.removeprefix("finite/") for name, x in values.items() if name.startswith("finite/") and not x]
        values = {name: x for name, x in values.items() if not name.startswith("finite/")}
        if step == 1 and self.equal and not values["skipped"] and "logps/chosen_drift" in values:
            self._check_equal(values)
        self.log.step(step, values, values.pop("tokens"), ended and ended.result())
        self._seen += 1
        if self._seen == 1 and values.get("grad_norm") == 0 and not values["skipped"]:
            self._notice_nothing(step, values)
        if "distinct" in values:
            self._check_rewards(step, values)
        if values["skipped"]:
            self._skipped(step, values, infinite)
        elif "distinct" in values:
            self._notice_sameness(step, values)
        elif "logps/chosen_drift" in values:
            self._since = self._since or step
            self._notice(step, values)

    def _skipped(self, step: int, values: dict[str, float], infinite: list[str]) -> None:
        losses = [name for name, x in values.items() if name.startswith("loss") and not np.isfinite(x)]
        what = ", ".join(losses) or f"the gradient of {', '.join(infinite[:3])}"
        row = int(values["skipped_in_a_row"])
        self.log.line(f"step {step}: {what} is not finite; step skipped ({int(values['skipped_total'])} so far, {row} in a row)")
        if row >= self.run.config.max_skipped:
            raise FloatingPointError(
                f"{row} steps in a row were not finite ({what} at step {step}); lower optimizer.learning_rate, or look at these rows"
            )

    def _check_rewards(self, step: int, values: dict[str, float]) -> None:
        """Stops a run without rewards; prints notices on rollouts without signal, cut completions and cut inputs of reward models."""
        # After a refill that finds no group with a signal, `reward` is NaN even if samples had rewards; `reward_sampled` knows them.
        each = [x for name, x in values.items() if name.startswith("score/")]  # gdpo() trains on scores and makes no `reward` of them
        none = values.get("bad_rewards", 0) and np.isnan([values[n] for n in ("reward", "reward_sampled") if n in values] or each).all()
        self._unrewarded = self._unrewarded + 1 if none else 0
        if none and self._unrewarded >= self.run.config.max_skipped:
            raise RewardFailed(
                f"no completion of {self._unrewarded} rollouts in a row has a reward (max_skipped; the last one before step {step}); "
                "check the output of the reward function or of the reward models"
            )
        self._silent = self._silent + 1 if values.get("signal_rate") == 0 and not values.get("advantage_std") and not none else 0
        if self._silent == QUIET:
            reward = values.get("reward_sampled", values["reward"])
            self._once(
                "silent",
                f"notice at step {step}: in each group all rewards have been equal for {QUIET} rollouts (signal_rate 0, reward "
                f"{reward:.3g}), so nothing is learnt from comparing responses. Use prompts that the policy solves sometimes but not "
                "always, a reward with more than two values, or more samples per prompt (rollout.samples).",
            )
        self._cut = self._cut + 1 if values.get("truncated_rate") == 1 else 0
        if self._cut == QUIET:
            self._once(
                "cut",
                f"notice at step {step}: every completion of {QUIET} rollouts was cut at rollout.max_new_tokens, and none has ended. "
                "Raise rollout.max_new_tokens, or check in samples.jsonl whether the policy ends its answers.",
            )
        if count := int(values.get("judge_cut", 0)):
            self._once(
                "judge",
                f"notice at step {step}: {count} answers are longer than the reward models can read, and are scored without their end "
                "(judge_cut). Lower rollout.max_new_tokens, or leave out the longest prompts.",
            )

    def _once(self, name: str, line: str) -> None:
        """Prints a notice, unless one with this name was printed."""
        if name not in self._told:
            self._told.add(name)
            self.log.line(line)

    def _notice_nothing(self, step: int, values: dict[str, float]) -> None:
        reward = values.get("reward_sampled", values.get("reward", math.nan))  # reward of the samples before any refill
        alike = f": in each group all rewards are equal (reward {reward:.3g})" if values.get("signal_rate") == 0 else ""
        self.log.line(
            f"notice at step {step}: the gradient is exactly 0{alike}, so nothing was learnt. If this continues, check the loss, the "
            "masks of the data (`alignax check-data`), and the fields that the experience writes."
        )

    def _check_equal(self, values: dict[str, float]) -> None:
        margin = max(abs(values[f"logps/{side}_drift"]) for side in ("chosen", "rejected"))
        if margin > EQUAL[self.run.policy.dtype.name]:
            raise FloatingPointError(
                f"policy and reference are the same parameters, yet their log-probs differ by {margin:.3g} nats at step 0; check that the "
                "experience gets the right reference"
            )
        self.log.line(f"step 0: policy = reference, margin {values['rewards/margins']:.1e}, loss {values['loss']:.4f}")

    def _notice(self, step: int, values: dict[str, float]) -> None:
        for name in ("logps/chosen_drift", "rewards/margins"):
            first = self._first.setdefault(name, values[name])
            self._smooth[name] = 0.9 * self._smooth.get(name, 0.0) + 0.1 * (values[name] - first)
        drift, margin = self._smooth["logps/chosen_drift"], self._smooth["rewards/margins"]
        if not self._noticed and drift < -DRIFT and margin > 0:
            self._noticed = True
            self.log.line(
                f"notice at step {step}: the chosen responses lose log-probability ({drift:.1f} nats since step {self._since}) while the "
                f"margin grows (+{margin:.2f}). Only their difference is trained. To keep their log-probability, use rpo(beta, "
                "eta=0.005), with a larger eta if that is not enough, or add sft() to the loss, with a larger weight if the loss already "
                "has it."
            )

    def _notice_sameness(self, step: int, values: dict[str, float]) -> None:
        first = self._first.setdefault("distinct", values["distinct"])
        if not self._noticed and values["distinct"] < SAME * first:
            self._noticed = True
            reward = values.get("reward", np.nan)
            self.log.line(
                f"notice at step {step}: only {values['distinct']:.1%} of the completions are distinct ({first:.1%} at first), with an "
                f"entropy of {values['entropy']:.2g} nats per token and a reward of {reward:.3g}. If each prompt has one right answer, "
                "this is expected; otherwise check samples.jsonl, and add 0.01 * entropy_bonus() or more KL to the reference."
            )
