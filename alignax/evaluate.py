"""Evaluation on a schedule: held-out loss, samples, and what reward overoptimisation is seen by: gold reward against KL.

Samples come from the policy at temperature 1, so the mean log-ratio to the reference is an unbiased estimate of KL(policy || reference).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import mesh as meshes
from alignax.data import evaluation_batch
from alignax.generate import sampler
from alignax.metrics import Log
from alignax.prepare import Run, eval_batch_size, full, policy_model, reference_model
from alignax.train import means
from alignax.types import Model, Params, TrainState

SAMPLED = ("completion_length", "eos_rate", "kl", "kl_k3", "gold")  # metrics of samples
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "kl", "gold")


class Evaluation:
    """Evaluates a state, logs what it finds, and returns it."""

    def __init__(self, run: Run, program: Callable, frozen: dict[str, Params], log: Log):
        """`program(state, frozen, batch)` gives the sums of a batch; `frozen` may hold a reference."""
        self.run, self.program, self.frozen, self.log = run, program, frozen, log
        c = run.config.eval
        self.examples = run.evaluation or run.train.examples
        self.sampled = range(min(max(c.samples, c.sample_prompts), len(self.examples)))
        if self.sampled:
            config = dataclasses.replace(run.source.config, lora=run.lora)
            eos = run.tokenizer.eos_token_id
            sample = sampler(config, max_new_tokens=c.max_new_tokens, eos=eos, dtype=run.dtype, mesh=run.mesh)
            self._sample = jax.jit(lambda params, frozen, *rest: sample(full(run, frozen, params), *rest))
            self._prompts = self._prompt_batch()
        self._divergences = jax.jit(self._log_ratios)

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
        if examples is None:
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
        run, c, n = self.run, self.run.config.eval, len(self.sampled)
        if not n:
            return {}
        key = jax.random.fold_in(jax.random.fold_in(state.key, step), 1)
        out, alive = self._sample(state.params, self.frozen, *self._prompts, jnp.float32(c.temperature), key)
        completions = [t[m] for t, m in zip(meshes.gathered(out)[:n], meshes.gathered(alive)[:n], strict=True)]
        prompts = [self.examples.prompts[i] for i in self.sampled]
        texts = [run.tokenizer.decode(t, skip_special_tokens=True) for t in completions]
        scores = {
            "completion_length": float(np.mean([len(t) for t in completions])),
            "eos_rate": float(np.mean([run.tokenizer.eos_token_id in t for t in completions])),
        }
        columns: dict[str, Any] = {"prompt": prompts, "completion": texts}
        # At another temperature the samples are not the policy's, and their log-ratio estimates no KL.
        if reference_model(run, self.frozen) is not None and c.temperature == 1.0:
            k1, k3 = self._divergences(state.params, self.frozen, *self._prompts, out, alive)
            columns["log_ratio"] = meshes.gathered(k1)[:n].tolist()
            scores |= {"kl": float(np.mean(columns["log_ratio"])), "kl_k3": float(meshes.gathered(k3)[:n].mean())}
        if run.experiment.gold is not None:
            columns["gold"] = [float(x) for x in run.experiment.gold(prompts, texts)]
            scores |= {"gold": float(np.mean(columns["gold"]))}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.log.samples(step, rows[: c.samples])
        return scores

    def _log_ratios(self, params: Params, frozen: dict[str, Params], *samples: jax.Array) -> tuple[jax.Array, jax.Array]:
        reference = reference_model(self.run, frozen)
        assert reference is not None
        return divergences(policy_model(self.run, frozen, params), reference, *samples)

    def _prompt_batch(self) -> tuple[jax.Array, jax.Array]:
        """Left-padded prompts [R, P] and their mask; R is filled up to the batch shards with copies of the first."""
        examples = self.examples
        rows = [examples.prompt_tokens(i) for i in self.sampled]
        rows += [rows[0]] * (-len(rows) % meshes.batch_shards(self.run.mesh))
        width = -(-max(map(len, rows)) // 8) * 8
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        place = lambda x: jax.make_array_from_callback(x.shape, meshes.batch_sharding(self.run.mesh), lambda index: x[index])
        return place(tokens), place(mask)


def divergences(
    policy: Model, reference: Model, prompts: jax.Array, mask: jax.Array, out: jax.Array, alive: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Estimates of KL(policy || reference) from each sampled completion, in nats summed over its tokens: k1 and k3, each [R].

    k1 = sum_t lr and k3 = sum_t exp(-lr) - 1 + lr with lr = log pi - log ref; both unbiased, k1 signed, k3 >= 0 (Schulman 2020,
    "Approximating KL divergence").

    Args:
      policy: whose samples they are.
      reference: what they are measured against.
      prompts: [R, P] int, left padded.
      mask: [R, P] bool.
      out: [R, C] int, completions.
      alive: [R, C] bool, their real tokens.
    """
    join = lambda a, b: jnp.concatenate([a, b], axis=1)[:, None]  # [R, 1, P + C]
    batch = {
        "tokens": join(prompts, out),
        "mask": join(mask, alive),
        "completion_mask": join(jnp.zeros_like(mask), alive),
    }
    lr = policy.apply(policy.params, batch).logps - reference.apply(reference.params, batch).logps  # [R, 1, P + C], 0 outside completions
    return lr.sum((1, 2)), (jnp.expm1(-lr) + lr).sum((1, 2))
