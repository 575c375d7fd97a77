"""Evaluation on a schedule: held-out loss, samples, and what reward overoptimisation is seen by: gold reward against KL.

Samples come from the policy at temperature 1, so the mean log-ratio to the reference is an unbiased estimate of KL(policy || reference).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import mesh as meshes
from alignax.config import eval_batch_size
from alignax.data import evaluation_batch
from alignax.generate import Generator, Sampling, sampled_batch, sampler_gap, shape_for
from alignax.metrics import Log
from alignax.online import make_judge
from alignax.prepare import Run
from alignax.programs import full, make_programs, policy_model, reference_model
from alignax.rollout import decoded, known_mean, rewards_of, samples_batch, text_metrics
from alignax.train import means
from alignax.types import Batch, Model, Params, TrainState

SAMPLED = ("completion_length", "eos_rate", "truncated_rate", "distinct", "kl", "kl_k3", "sampler_gap", "gold")  # metrics of samples
JUDGED = ("reward", "score/", "disagreement", "entropy")  # how metrics begin that are taken from what experience makes of samples
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "reward", "kl", "gold")


class Evaluation:
    """Evaluates a state, logs what it finds, and returns it."""

    def __init__(self, run: Run, frozen: dict[str, Params], log: Log):
        """`frozen` may hold a reference and reward models."""
        self.run, self.frozen, self.log, self.online = run, frozen, log, run.config.rollout.samples > 0
        self.program = make_judge(run) if self.online else make_programs(run)[1]
        c = run.config.eval
        self.examples = run.evaluation or run.train.examples
        self.sampled = range(min(max(c.samples, c.sample_prompts), len(self.examples)))
        if self.sampled:
            self.prompts = [self.examples.prompt_tokens(i).tolist() for i in self.sampled]
            self.generate = Generator(
                dataclasses.replace(run.source.config, lora=run.lora),
                shape_for(len(self.prompts), max(map(len, self.prompts)), c.max_new_tokens, mesh=run.mesh),
                Sampling(temperature=c.temperature),
                stop_ids=run.ends,
                dtype=run.dtype,
                mesh=run.mesh,
            )
        self._compared = jax.jit(self._compare)

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of the evaluation data and of fresh samples, without the `eval/` that the log puts before them."""
        if (name := self.run.config.eval.params) != "policy":
            state = dataclasses.replace(state, params=state.averages[name])
        scores = self.held_out(state) | self.samples(state, step)
        self.log.row({"step": step} | {f"eval/{name}": x for name, x in scores.items()})
        if scores:
            self.log.line(f"eval at step {step}: " + "  ".join(f"{n} {scores[n]:.4f}" for n in SHOWN if n in scores))
        return scores

    def held_out(self, state: TrainState) -> dict[str, float]:
        """Exact averages over the evaluation data, its last ragged batch weighed by its rows."""
        run, examples = self.run, self.run.evaluation
        if examples is None or self.online:  # a policy that is trained on its samples is judged by them
            return {}
        size = eval_batch_size(run.config)
        total: dict[str, np.ndarray] = {}
        for i in range(-(-len(examples) // size)):
            make = lambda rows, i=i: evaluation_batch(examples, i, size, run.train.length, rows)
            batch = meshes.put_batch(run.mesh, make, size)
            sums = jax.device_get(self.program(state, self.frozen, batch))
            total = {name: total.get(name, 0.0) + np.asarray(pair, np.float64) for name, pair in sums.items()}
        return means({name: (pair[0], pair[1]) for name, pair in total.items()})

    def samples(self, state: TrainState, step: int) -> dict[str, float]:
        """Completions of the first prompts: their KL to the reference, gold reward, length; some of them into the log."""
        run, c = self.run, self.run.config.eval
        if not self.sampled:
            return {}
        key = jax.random.fold_in(jax.random.fold_in(state.key, step), 1)
        completions = self.generate(full(run, self.frozen, state.params), self.prompts, key)
        prompts, rows = [self.examples.prompts[i] for i in self.sampled], np.asarray(self.sampled)
        texts = decoded(run.tokenizer, completions)
        scores = text_metrics(completions)
        columns: dict[str, Any] = {"prompt": prompts, "completion": [text for (text,) in texts]}
        gold = None if run.experiment.gold is None else rewards_of(run, "gold", self.examples, rows, completions, texts)  # [n, 1]
        if self.online and completions.sampling.exact:
            batch, found = samples_batch(run, self.examples, rows, self.prompts, completions, texts)
            batch |= {} if gold is None else {"gold": gold}
            judged = jax.device_get(self.program(state, self.frozen, self._placed(batch)))
            scores |= {name: float(x) for name, x in judged.items() if name.startswith(JUDGED)}
            columns |= found
        # At another temperature the samples are not the policy's, and their log-ratio estimates no KL.
        if reference_model(run, self.frozen) is not None and completions.sampling.exact:
            batch = sampled_batch(self.prompts, completions)
            k1, k3, gaps = map(meshes.gathered, self._compared(state.params, self.frozen, self._placed(batch)))
            columns["log_ratio"] = k1[: len(prompts)].tolist()
            scores |= {"kl": float(np.mean(columns["log_ratio"])), "kl_k3": float(k3[: len(prompts)].mean()), "sampler_gap": float(gaps)}
        if gold is not None:
            columns["gold"] = gold[:, 0].tolist()
            scores |= {"gold": known_mean(gold)}
        table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.log.samples(step, table[: c.samples])
        return scores

    def _compare(self, params: Params, frozen: dict[str, Params], batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        reference = reference_model(self.run, frozen)
        assert reference is not None
        return compare(policy_model(self.run, frozen, params), reference, batch)

    def _placed(self, batch: dict[str, np.ndarray]) -> Batch:
        """The batch on the mesh, filled up with padding rows."""
        n = len(batch["tokens"])
        size = -(-n // meshes.batch_shards(self.run.mesh)) * meshes.batch_shards(self.run.mesh)
        full = {name: np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
        return meshes.put_batch(self.run.mesh, lambda rows: {name: x[rows] for name, x in full.items()}, size)


def compare(policy: Model, reference: Model, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Estimates of KL(policy || reference) from each sampled completion, in nats summed over its tokens: k1 and k3, each [B].

    k1 = sum_t lr and k3 = sum_t exp(-lr) - 1 + lr with lr = log pi - log ref; both unbiased, k1 signed, k3 >= 0 (Schulman 2020,
    "Approximating KL divergence"). Third, by how much the sampler's log-probs differ from those of the forward pass that trains, [].

    Args:
      policy: whose samples they are.
      reference: what they are measured against.
      batch: completions with their `sampled_logps`, [B, 1, T].
    """
    logps = policy.apply(policy.params, batch).logps
    lr = logps - reference.apply(reference.params, batch).logps  # [B, 1, T], 0 outside completions
    return lr.sum((1, 2)), (jnp.expm1(-lr) + lr).sum((1, 2)), sampler_gap(logps, batch)
