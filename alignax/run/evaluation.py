"""Evaluation on a schedule: held-out loss, sampled completions, and gold reward against KL, which shows reward overoptimisation.

Samples come from the policy itself, at `eval.temperature`, so the mean log-ratio to the reference at that temperature is an unbiased
estimate of KL(policy || reference). Greedy and nucleus samples give no such estimate.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from alignax import mesh as meshes
from alignax.config import eval_batch_size
from alignax.data import evaluation_batch
from alignax.generate import Answers, sampled_batch
from alignax.host.functions import names_of
from alignax.program import Program
from alignax.run.host_rewards import bad_rewards, metrics_of, named, rewards_of
from alignax.run.log import Log
from alignax.run.prefetch import late, prefetched
from alignax.run.prepare import Run
from alignax.run.rollout import decoded, samples_batch, text_metrics
from alignax.run.sampling import EVALUATION, sampled_rows, speaker_params
from alignax.run.scoring import Scorers
from alignax.run.state import Held, put_padded
from alignax.train import means
from alignax.types import Batch, TrainState

SAMPLED = (  # metrics of sampled completions
    "completion_length", "eos_rate", "truncated_rate", "distinct", "kl", "kl_se", "kl_k3", "sampler_gap", "gold", "gold_se", "bad_gold",
    "prompts",
)  # fmt: skip
# Prefixes of the metrics that an evaluation takes over from the program "judge".
JUDGED = ("reward", "score/", "disagreement", "judge_cut", "entropy")
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "reward", "kl", "gold", "pass@1")


class Evaluation:
    """Evaluates a training state, logs the metrics, and returns them."""

    def __init__(self, run: Run, frozen: Held, programs: Mapping[str, Program], log: Log, look: Callable[[], None] = lambda: None):
        """`programs` are the programs of the run. `look` is called again and again; it may raise an exception to end the evaluation."""
        self.run, self.frozen, self.log, self.look, self.online = run, frozen, log, look, run.config.rollout.samples > 0
        self.programs, self.scorers = programs, Scorers(run, frozen, programs, EVALUATION)
        self.examples = run.data.evaluated
        self.sampled = sampled_rows(run.config, self.examples)
        if self.sampled:
            self.prompts = [self.examples.prompt_tokens(i).tolist() for i in self.sampled]
            self.generate = run.samplers[EVALUATION]

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of the evaluation data and of fresh samples, without the prefix `eval/` that they have in the log."""
        if (name := self.run.config.eval.params) != "policy":
            state = dataclasses.replace(state, params=state.averages[name])
        scores = self.held_out(state) | self.samples(state, step)
        self.log.row({"step": step} | {f"eval/{name}": x for name, x in scores.items()})
        if scores:
            self.log.line(f"eval at step {step}: {line(scores, self.run.config.eval.samples_per_prompt)}")
        return scores

    def held_out(self, state: TrainState) -> dict[str, float]:
        """Exact averages of metrics over the evaluation data; a last batch with fewer rows has less weight."""
        run, examples = self.run, self.run.data.evaluation
        if examples is None or self.online:  # online training is evaluated on samples
            return {}
        size = eval_batch_size(run.config)
        total: dict[str, np.ndarray] = {}

        def make(i: int) -> Batch:
            return meshes.put_batch(run.mesh, lambda rows: evaluation_batch(examples, i, size, run.data.train.length, rows), size)

        def sums(batch: Batch) -> Any:
            self.look()
            return self.programs["evaluate"].call(state, self.frozen, batch)

        with prefetched(make, -(-len(examples) // size)) as batches:
            for found in late(map(sums, batches)):
                total = {name: total.get(name, 0.0) + np.asarray(pair, np.float64) for name, pair in jax.device_get(found).items()}
        return means({name: (pair[0], pair[1]) for name, pair in total.items()})

    def samples(self, state: TrainState, step: int) -> dict[str, float]:
        """Samples completions of the first prompts, logs some, and returns metrics: KL to the reference, rewards, lengths."""
        run, c, n = self.run, self.run.config.eval, len(self.sampled)
        if not self.sampled:
            return {}
        key = jax.random.fold_in(jax.random.fold_in(state.key, step), 1)
        params = speaker_params(self.generate.speaker, run.roles, self.frozen, state.params)
        completions = self.generate(params, self.prompts, key, c.samples_per_prompt, self.look)
        rows, texts = np.asarray(self.sampled), decoded(run.words.tokenizer, completions, self.generate.stops)
        scores = {"prompts": float(n)} | text_metrics(completions)
        prompts = np.repeat(np.array([self.examples.prompts[i] for i in self.sampled], object)[:, None], c.samples_per_prompt, axis=1)
        found: dict[str, Any] = {"prompt": prompts, "completion": np.array(texts, object)}  # [n, samples_per_prompt]
        answers = Answers(self.examples, rows, self.prompts, completions, texts)
        models, gold = self.scorers(answers)
        if run.experiment.gold is not None:
            gold = rewards_of(run, "gold", answers, models)["gold"]
        scores |= metrics_of(run, answers, models)
        if self.online:
            batch = samples_batch(run, answers, models)
            batch |= {} if gold is None else {"gold": gold}
            judged = jax.device_get(self.programs["judge"].call(state, self.frozen, put_padded(run.mesh, batch)))
            own = completions.exact and c.temperature == run.config.rollout.temperature  # same distribution as in rollouts
            scores |= {m: float(x) for m, x in judged.items() if m.startswith(JUDGED) and np.isfinite(x) and (own or m != "entropy")}
            if run.experiment.reward is not None:
                found |= {"reward": batch["rewards"]} if "rewards" in batch else {}
                scores["bad_rewards"] = bad_rewards(batch)
            if names := names_of(run.experiment):
                found["scores"] = np.array([[named(names, x) for x in group] for group in batch["scores"]], object)
        if "compare" in self.programs:
            batch = sampled_batch(self.prompts, completions)
            k1, k3, gaps = map(meshes.gathered, self.programs["compare"].call(state.params, self.frozen, put_padded(run.mesh, batch)))
            found["log_ratio"] = k1[:n]
            scores |= spread("kl", k1[:n]) | {"kl_k3": float(k3[:n].mean()), "sampler_gap": float(gaps)}
        if gold is not None:
            found["gold"] = gold
            scores |= spread("gold", gold) | {"bad_gold": float((~np.isfinite(gold)).sum())}
        true = gold if gold is not None else found.get("reward")
        for k in tries(c.samples_per_prompt) if true is not None else ():
            scores |= spread(f"pass@{k}", pass_at(true >= c.pass_reward, k)[:, None])
        # The table begins with the first sample of every prompt, then has the second of every prompt.
        columns = {name: x.T.ravel().tolist() for name, x in found.items()}
        table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.log.samples(step, table[: c.samples])
        return scores


def line(scores: dict[str, float], samples: int) -> str:
    """The console line of an evaluation: metrics with standard errors, the number of sampled prompts, and of samples without a reward."""
    error = lambda name: f" +- {scores[name + '_se']:.4f}" if name + "_se" in scores else ""
    shown = [name for name in SHOWN if name in scores]
    told = "  ".join(f"{name} {scores[name]:.4f}{error(name)}" for name in shown)
    if "prompts" not in scores or not {"reward", "kl", "gold"} & {*shown}:
        return told
    lack = {"a reward": scores.get("bad_rewards"), "a gold reward": scores.get("bad_gold")}
    unknown = "".join(f", {count:.0f} without {what}" for what, count in lack.items() if count)
    return f"{told}  (samples: {scores['prompts']:.0f} prompts{f' x {samples}' if samples > 1 else ''}{unknown})"


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of the known values of samples [B, N], NaN being unknown, and its standard error.

    The error comes from the B means per prompt (ddof 1), since samples of one prompt are not independent. One prompt gives none.
    """
    known = np.isfinite(values)
    if not known.any():
        return {}
    x = np.where(known, values, 0.0).astype(np.float64)
    each = x.sum(axis=1)[known.any(axis=1)] / known.sum(axis=1)[known.any(axis=1)]
    error = {f"{name}_se": float(each.std(ddof=1) / math.sqrt(len(each)))} if len(each) > 1 else {}
    return {name: float(x.sum() / known.sum())} | error


def tries(samples: int) -> list[int]:
    """The values k of pass@k: powers of 2 up to the number of samples per prompt; none for a single sample."""
    return [1 << i for i in range(samples.bit_length())] if samples > 1 else []


def pass_at(passed: np.ndarray, k: int) -> np.ndarray:
    """The unbiased estimate of pass@k, the probability that at least one of k samples of a prompt passes: [B, n] bool -> [B].

    1 - C(n - c, k) / C(n, k) if c of n samples pass (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    n = passed.shape[1]
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in passed.sum(axis=1).tolist()])
