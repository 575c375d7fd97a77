"""Training of reward-model ensembles: K members as one tree with a leading axis K, trained by `vmap` of the shared step.

Member k has the seed `seed` + k. The seed gives it its initial head, the order of its data and, if the config asks for them, its
bootstrap sample and label noise. Members share what is frozen: the trunk under K heads (`model.freeze`) or under K adapters
(`lora.rank`). Members are sharded over the mesh axis `member`; only metrics cross that axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax.data import Batches
from alignax.experience.ensembles import mean, uwo, wco
from alignax.losses.algebra import examples
from alignax.losses.reward import correct
from alignax.mesh import sharding
from alignax.types import Batch, Metrics, Outputs, TrainState

# The member axis of each part of a training state; None: shared by all members.
AXES: Any = TrainState(step=None, params=0, opt_state=0, key=None, skipped=0, skipped_in_a_row=0, averages=0, carry=0)  # type: ignore[arg-type]
AGGREGATES = {"mean": mean, "wco": wco, "uwo": uwo(0.5)}


def over_members(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """A function of one member, vectorised over all members along the mesh axis `member`; axes are those of `jax.vmap`."""
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, spmd_axis_name="member")


def stacked(abstract: Any, members: int, mesh: Mesh | None = None) -> Any:
    """Shapes, dtypes and (with a mesh) shardings of K stacked trees, [K, ...], from those of one tree."""

    def stack(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
        layout = None if mesh is None else NamedSharding(mesh, P(*sharding(mesh, ("member",)).spec, *spec))
        return jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=layout)

    return jax.tree.map(stack, abstract)


def keys(seed: int, members: int) -> jax.Array:
    """The PRNG keys of the members, [K]: member k has the key of a run with the seed `seed` + k."""
    return jax.vmap(jax.random.key)(seed + jnp.arange(members))


def member_batches(batches: Batches, members: int, own_noise: bool) -> list[Batches]:
    """The batch stream of each member: seed + k, and with `own_noise` also noise seed + k."""
    shift = lambda k: {"seed": batches.seed + k, "noise_seed": batches.noise_seed + k * own_noise}
    return [dataclasses.replace(batches, **shift(k)) for k in range(members)]


def member_batch(streams: list[Batches], step: int, members: slice, rows: slice) -> dict[str, np.ndarray]:
    """The batches of the given members at a step, stacked, with the given rows of each: [K, B, ...]."""
    parts = [stream.batch(step, rows) for stream in streams[members]]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def trained_together(step: Callable) -> Callable:
    """The training step of all members, from that of one, `(state, frozen, batches) -> (state, metrics)`; batches are [K, B, ...]."""
    every = over_members(step, (AXES, None, 0), (AXES, 0))

    def steps(state: TrainState, frozen: Any, batches: Any) -> tuple[TrainState, Metrics]:
        state, metrics = every(state, frozen, batches)
        return state, training_metrics(metrics)

    return steps


def evaluated_together(evaluate: Callable) -> Callable:
    """The evaluation of all members on one batch, from that of one member, `(state, frozen, batch) -> (sums, Outputs)`."""
    every = over_members(evaluate, (AXES, None, None), 0)

    def evaluations(state: TrainState, frozen: Any, batch: Batch) -> tuple[Any, Outputs]:
        sums, out = every(state, frozen, batch)
        return evaluation_sums(sums, out, batch), out

    return evaluations


def training_metrics(metrics: Metrics) -> Metrics:
    """The metrics of an ensemble, from metrics [K] of its members.

    Metrics are averaged; losses and rewards are also given for each member. Tokens are summed. `skipped*` is the largest value, `finite/*`
    is true if it is for all members.
    """
    worst = {name: x.max(axis=0) for name, x in metrics.items() if name.startswith("skipped")}
    worst |= {name: x.all(axis=0) for name, x in metrics.items() if name.startswith("finite/")}
    out = {name: x.mean(axis=0) for name, x in metrics.items()} | worst | {"tokens": metrics["tokens"].sum(axis=0)}
    return out | _own({name: x for name, x in metrics.items() if name.startswith(("loss", "rewards/"))})


def evaluation_sums(sums: dict[str, tuple[jax.Array, jax.Array]], out: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The evaluation sums of an ensemble, as (sum, weight), from sums and weights [K] of its members.

    It has the mean over members, and each member's own sums except `loss:` terms. For pairs it also has the accuracy of each aggregate of
    the scores, `out.scores` [K, B, 2], and the disagreement of members.
    """
    found: Any = {name: (x.mean(axis=0), w.mean(axis=0)) for name, (x, w) in sums.items()}
    own = {name: pair for name, pair in sums.items() if not name.startswith("loss:")}
    for name, (x, w) in own.items():
        found |= {f"{name}/member_{k}": (x[k], w[k]) for k in range(len(x))}
    if out.scores is not None and out.scores.ndim == 3 and out.scores.shape[2] == 2:
        weights = examples(batch).astype(jnp.float32)
        score = {f"ensemble/accuracy_{name}": correct(aggregate(out.scores)) for name, aggregate in AGGREGATES.items()}
        score["ensemble/disagreement"] = (out.scores[..., 0] - out.scores[..., 1]).std(axis=0)  # of the margins, over members
        found |= {name: (jnp.sum(x * weights), weights.sum()) for name, x in score.items()}
    return found


def _own(metrics: Metrics) -> Metrics:
    return {f"{name}/member_{k}": x[k] for name, x in metrics.items() for k in range(len(x))}
