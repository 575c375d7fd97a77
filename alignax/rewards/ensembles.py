"""Ensembles of reward models: loading from folders, scoring of responses, and the quality of the scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.data import Examples, evaluation_batch
from alignax.experience.ensembles import mean, median, uwo, wco
from alignax.losses.reward import correct
from alignax.models import hf, parameters, peft
from alignax.models.small_files import chat_template
from alignax.models.transformer import ModelConfig, forward
from alignax.paths import of as path_of
from alignax.rewards.judge import FIELDS
from alignax.rewards.members import over_members, stacked
from alignax.text import short, table
from alignax.train import digest
from alignax.types import Batch, Model, Outputs, Params

AGGREGATES = {"mean": mean, "median": median, "wco": wco, "uwo 0.5": uwo(0.5)}
BINS = 10  # of a calibration curve; fewer where there are fewer pairs


def load_ensemble(paths: Sequence[str | Path], mesh: Mesh) -> tuple[hf.Source, Params]:
    """Loads an ensemble from K model folders: the first folder's `Source`, and parameters [K, ...]; raises as `open_ensemble` does."""
    sources = open_ensemble(paths)
    return sources[0], load_members(sources, mesh)


def load_members(sources: Sequence[hf.Source], mesh: Mesh) -> Params:
    """Loads the parameters of K opened reward models as one stacked tree [K, ...].

    Raises:
      ValueError: for two members with the same weights.
    """
    return stack([peft.load_reward(source, mesh) for source in sources], sources[0].config, mesh)


def open_ensemble(paths: Sequence[str | Path]) -> list[hf.Source]:
    """Opens and checks folders of reward models, without their weights; a PEFT folder of adapters and a head names its base model.

    Raises:
      ValueError: for a folder that is no reward model, and for members of different shapes, tokenizers or chat templates.
    """
    sources = [peft.open_reward(folder) if peft.is_adapter(folder) else hf.open_folder(folder) for folder in map(path_of, paths)]
    for source in sources:
        if not source.config.num_labels:
            raise ValueError(
                f"{str(source.path)!r} is not a reward model: its config.json names no architecture for sequence classification"
            )
    hf.check_alike(sources)
    for source in sources[1:]:
        if chat_template(source.path) != chat_template(sources[0].path):
            raise ValueError(
                f"{str(source.path)!r} has another chat template than {str(sources[0].path)!r}; all members must read the same text"
            )
    return sources


def check_one_score(source: hf.Source) -> None:
    """Refuses a model of several labels: its scores would be taken for the scores of ensemble members."""
    if (count := source.config.num_labels) > 1:
        names = source.hf.get("id2label")
        told = f" ({short(list(names.values()))})" if isinstance(names, dict) else ""
        raise ValueError(
            f"{str(source.path)!r} gives {count} scores per response{told}, but one is needed; give a reward model with one label "
            "(model.num_labels 1), or keep only the wanted row of score.weight of a classifier, with num_labels 1"
        )


def stack(members: Sequence[Params], config: ModelConfig, mesh: Mesh) -> Params:
    """Stacks the parameter trees of K members into one [K, ...], sharded along the mesh axis `member`.

    Raises:
      ValueError: for two members with the same weights.
    """
    prints = [int(jax.jit(digest)(params)) for params in members]
    for k, print_ in enumerate(prints):
        if (first := prints.index(print_)) < k:
            raise ValueError(f"members {first} and {k} of the ensemble have the same weights; leave one out")
    layout = jax.tree.map(lambda x: x.sharding, stacked(parameters.abstract_params(config, mesh), len(members), mesh))
    return jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), out_shardings=layout)(*members)


def ensemble_model(config: ModelConfig, params: Params, mesh: Mesh, dtype: Any = jnp.float32) -> Model:
    """The ensemble of K reward models with stacked parameters [K, ...] as one `Model`, see `ensemble_apply`."""
    return Model(ensemble_apply(config, mesh, dtype), params)


def ensemble_apply(
    config: ModelConfig, mesh: Mesh, dtype: Any = jnp.float32, role: str = "ensemble", attention: str = "xla"
) -> Callable[[Params, Batch], Outputs]:
    """The forward pass of an ensemble: `(params [K, ...], batch) -> Outputs` with scores [B, N, K].

    Members read `ROLE_tokens` [B, N, T'] and its masks where the batch has them (`ensemble_tokens`, see `alignax.rewards.judge`), and
    `tokens` [B, N, T] otherwise. Members are sharded over the mesh axis `member` and send each other nothing; the members of one device
    score one after another, in one program.
    """
    apply, side = forward(config, dtype=dtype, remat="none", mesh=mesh, attention=attention), mesh.shape["member"]

    def rate(params: Params, batch: Batch) -> Outputs:
        if f"{role}_mask" in batch:
            batch = {name: batch[f"{role}_{name}"] for name in FIELDS}
        # A vmap over the members of a device took 1.2 to 1.9 times as long as this loop, and K times the memory: the activations no
        # longer fit into the caches.
        scores = lambda members: jax.lax.map(lambda one: apply(one, batch).scores, members)
        if side == 1:
            found = scores(params)  # [K, B, N]
        else:
            apart = jax.tree.map(lambda x: x.reshape(side, -1, *x.shape[1:]), params)  # [side, K / side, ...]
            found = over_members(scores, 0, 0)(apart)
            found = found.reshape(-1, *found.shape[2:])
        return Outputs(None, None, scores=jnp.moveaxis(found, 0, -1))  # pyright: ignore[reportArgumentType]

    return rate


def score_examples(
    apply: Callable[[Params, Batch], Outputs], params: Params, examples: Examples, mesh: Mesh, batch_size: int, length: int
) -> np.ndarray:
    """The score of every response by every member: [K, n, N] float32, or [K, n, N, labels] for models with several labels.

    Raises:
      ValueError: for scores that are not finite, with their count, and member and row of the first.
    """
    scores = np.moveaxis(np.concatenate(list(rated(apply, params, examples, mesh, batch_size, length))), -1, 0)
    if bad := np.argwhere(~np.isfinite(scores)).tolist():
        member, row, *_ = bad[0]
        raise ValueError(f"{len(bad)} scores are not finite, the first of member {member} for row {row} (counted from 0); check that model")
    return scores


def rated(
    apply: Callable[[Params, Batch], Outputs], params: Params, examples: Examples, mesh: Mesh, batch_size: int, length: int
) -> Iterator[np.ndarray]:
    """The scores of a model for the examples, batch by batch in order and without padding rows: [b, N, ...]."""
    rate = jax.jit(lambda params, batch: apply(params, batch).scores)
    for i in range(-(-len(examples) // batch_size)):
        make = lambda rows, i=i: evaluation_batch(examples, i, batch_size, length, rows)
        found = meshes.gathered(rate(params, meshes.put_batch(mesh, make, batch_size)))
        yield found[: len(examples) - i * batch_size]


class Anchored(NamedTuple):
    """Ensemble parameters [K, ...] with anchored scores, and mean and standard deviation of the scores before: [K, labels]."""

    params: Params
    mean: np.ndarray
    std: np.ndarray


def anchored(params: Params, scores: np.ndarray, scale: bool = False) -> Anchored:
    """Anchors the members of an ensemble: their scores on samples of the initial policy get mean 0, with `scale` standard deviation 1.

        r_k <- (r_k - mean_k) / std_k     std_k = 1 without `scale`

    Preferences do not determine the offset of a member, yet minima and variances over members depend on it; Gao et al. 2022,
    arXiv:2210.10760, section 2, recentre in the same way. The mean goes into `score_offset`, the scale into the head. ddof is 0.

    Args:
      params: parameters of the K members, [K, ...].
      scores: their scores of the samples, [K, n, N] or [K, n, N, labels].
      scale: whether to divide by the standard deviation too, so that all members count equally.

    Raises:
      ValueError: for a member that gives all samples the same score.
    """
    K, _, labels = params["score"].shape
    flat = scores.astype(np.float64).reshape(K, -1, labels)
    mean, std = flat.mean(axis=1), flat.std(axis=1, ddof=0)  # [K, labels]
    if alike := np.argwhere(std <= 1e-6 * np.abs(flat).max(axis=1)).tolist():
        k, label = alike[0]
        raise ValueError(
            f"member {k} gives all {flat.shape[1]} samples the score {mean[k, label]:.6g}; give more samples, or leave this member out"
        )
    divisor = np.asarray(std if scale else np.ones_like(std), np.float32)
    offset = (params["score_offset"] + np.asarray(mean, np.float32)) / divisor
    return Anchored(params | {"score": params["score"] / divisor[:, None], "score_offset": offset}, mean, std)


def rounded(params: Params, dtype: str) -> Params:
    """The parameters rounded to the dtype of an exported folder, held in float32."""
    # Leaf by leaf: within one program XLA may remove a cast and its inverse.
    return params if dtype == "float32" else jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def assess(scores: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """The quality of an ensemble's scores on pairs, as plain values for JSON.

    Args:
      scores: [K, n, 2], the chosen response first.
      lengths: completion tokens of each response, [n, 2].

    Returns:
      Under `models`, for each member and aggregate: `accuracy` (a tie counts half) and its `standard_error`; `margin` (chosen minus
      rejected score, mean); `calibration` (bins of equal count: mean predicted probability that the first response wins, share that does,
      number of pairs; each pair counts in both orders, as otherwise the first would always win); `calibration_error` (mean distance of
      probability and share); `length_correlation` (of score and length of a response). For the whole: `pairs`; `longer_is_chosen` (share
      of pairs, a tie counts half); `disagreement` (standard deviation of the margin over members, mean over pairs); `split_votes` (share
      of pairs on whose winner members differ).
    """
    rated = {f"member {k}": s for k, s in enumerate(scores)}
    if len(scores) > 1:
        rated |= {name: np.asarray(aggregate(jnp.asarray(scores))) for name, aggregate in AGGREGATES.items()}
    margins = scores[..., 0] - scores[..., 1]  # [K, n]
    return {
        "pairs": int(scores.shape[1]),
        "longer_is_chosen": float(np.mean(0.5 * (1 + np.sign(lengths[:, 0] - lengths[:, 1])))),
        "disagreement": float(margins.std(axis=0).mean()),
        "split_votes": float((np.sign(margins) != np.sign(margins[:1])).any(axis=0).mean()),
        "models": {name: _assess(s, lengths) for name, s in rated.items()},
    }


def _assess(scores: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    right = np.asarray(correct(jnp.asarray(scores)), np.float64)  # [n]
    margin = (scores[:, 0] - scores[:, 1]).astype(np.float64)
    both = np.concatenate([margin, -margin])
    order = np.argsort(both, kind="stable")
    predicted, won = 1 / (1 + np.exp(-both[order])), np.repeat([1.0, 0.0], len(margin))[order]
    bins = [
        [float(p.mean()), float(w.mean()), len(p)]
        for p, w in zip(np.array_split(predicted, BINS), np.array_split(won, BINS), strict=True)
        if len(p)
    ]
    total = sum(count for *_, count in bins)
    return {
        "accuracy": float(right.mean()),
        "standard_error": float(right.std() / math.sqrt(len(right))),
        "margin": float(margin.mean()),
        "calibration": bins,
        "calibration_error": sum(abs(p - w) * count for p, w, count in bins) / total,
        "length_correlation": _correlation(scores.ravel(), lengths.ravel()),
    }


def described(result: Mapping[str, Any]) -> list[str]:
    """The results of `assess` on each split as lines for the console."""
    lines = []
    for split, found in result.items():
        where = {"eval": "evaluation data", "ood": "out-of-distribution data"}[split]
        lines.append(f"{where}: {found['pairs']:,} pairs; the longer response is the chosen one in {found['longer_is_chosen']:.1%}")
        rows = [["", "accuracy", "+-", "margin", "calibration error", "score ~ length"]]
        for name, x in found["models"].items():
            numbers = (x["accuracy"], x["standard_error"], x["margin"], x["calibration_error"], x["length_correlation"])
            rows.append([name, *(f"{number:.3f}" for number in numbers)])
        lines += [table(rows), ""]
        if len(found["models"]) > 1:
            lines += [
                f"members disagree by {found['disagreement']:.3f} (standard deviation of the margin), and on the winner in "
                f"{found['split_votes']:.1%} of pairs",
                "",
            ]
        name = "mean" if "mean" in found["models"] else "member 0"
        curve = [[f"{p:.3f}", f"{w:.3f}", f"{count / 2:.0f}"] for p, w, count in found["models"][name]["calibration"]]
        lines += [f"calibration of {name}: predicted probability, and share of wins"]
        lines += [table([["said", "was", "pairs"], *curve]), ""]
    return lines


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two arrays; 0 if one is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0
