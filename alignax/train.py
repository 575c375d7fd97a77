"""The training step that all methods share, and the evaluation of a loss."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignax.losses.algebra import Loss, Objectives, by_name
from alignax.packing import Packing, Parts, deal, sizes
from alignax.text import short
from alignax.types import Batch, Metrics, Outputs, Params, TrainState, gathered, microbatch

Apply = Callable[[Params, Batch], Outputs]
Stepped = tuple[TrainState, Metrics, *tuple[Outputs, ...]]  # what a step returns, with Outputs if `outputs`
Sums = dict[str, tuple[jax.Array, jax.Array]]  # metric -> (weighted sum, weight)
Part = tuple[Any, tuple[Metrics, list[Outputs]]]  # gradient, metrics and outputs of a part of a batch
Gradient = Callable[..., Part]  # of parameters, batches by name, and weights by name
Combine = Callable[[dict[str, Params]], Params]  # gradients of objectives, by name -> the gradient for the optimizer


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: jax.Array, averages: dict[str, Params] | None = None
) -> TrainState:
    """The training state at step 0; `averages` maps names to the parameters that each average starts from."""
    zero = lambda: jnp.zeros((), jnp.int32)  # each call makes a buffer of its own, since the step donates them
    return TrainState(zero(), params, optimizer.init(params), key, zero(), zero(), averages or {})


def make_step(
    apply: Apply,
    objective: Objectives,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    outputs: bool = False,
    combine: Combine | None = None,
    packing: Packing | None = None,
    gradient_dtype: Any = None,
) -> Callable[[TrainState, Any], Stepped]:
    """Makes the training step: forward, loss, gradients summed over microbatches, optimizer update.

    Every method has the same step; methods differ in the loss and in the fields that the experience wrote into the batch. A step whose
    loss or gradient is not finite leaves parameters and optimizer as they were; `skipped` counts it.

    Args:
      apply: pure forward pass `(params, batch) -> Outputs`.
      objective: a Loss; or `step -> Loss`, for coefficients that follow a schedule; or a mapping of several such objectives by name. Then a
        batch is a mapping of the same names too (whose values may be one batch). Each loss is averaged over its own batch, and the losses
        are summed.
      optimizer: any optax transformation.
      microbatches: parts that B is split into, each with its own forward and backward pass; the result does not depend on it.
      outputs: whether the step also returns the outputs of its forward pass.
      combine: for a mapping, a pure function `{name: gradient} -> gradient` that combines the losses' own gradients. They are of the whole
        batch, trees like the parameters. It costs a forward and a backward pass for each loss. None: the gradient of the sum, in
        one backward pass.
      packing: how the examples of a batch are packed into parts, which take the place of microbatches. None: rows are padded. A batch of
        which padded microbatches have no more positions than parts is padded too.
      gradient_dtype: the dtype in which gradients are held and summed over microbatches and parts, for example bfloat16 for half the
        memory; `combine` and the optimizer are given the parameters' own. None: the parameters' own.

    Returns:
      `step(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`. Metrics are means over the global batch, and `grad_norm`,
      `skipped` (0 or 1 in this step), `skipped_total`, `skipped_in_a_row`, and `finite/<leaf>` for every parameter. In a mapping, metrics
      of all losses but the first have the loss's name in front (`pretrain/loss/sft`). If rows are
      packed, `packed_positions` is the share of the computed positions that hold a token. With `outputs` the step returns
      `(state, metrics, Outputs)`; the outputs are of the parameters before the step, and of a mapping's first batch.

    Raises:
      ValueError: in the step, if `combine` does not return a gradient.
    """

    def step(state: TrainState, batch: Any) -> Stepped:
        batches = batch if isinstance(objective, Mapping) else {"": batch}
        losses = by_name(objective, state.step)
        prefixes = prefixed(losses)
        weights = {name: loss.normalised(batches[name]) for name, loss in losses.items()}

        def part_loss(
            names: Iterable[str], params: Params, part: dict[str, Batch], part_weights: Any
        ) -> tuple[jax.Array, tuple[Metrics, list[Outputs]]]:
            value, metrics, given = jnp.zeros(()), {}, []
            for name in names:
                given.append(apply(params, part[name]))
                own, found = losses[name](given[-1], part[name], part_weights[name])
                value += own
                metrics |= {prefixes[name] + metric: x for metric, x in found.items()}
            return value, (metrics | {"loss": value}, given[:outputs])

        def each(names: Iterable[str], params: Params, *part: Any) -> tuple[dict[str, Params], tuple[Metrics, list[Outputs]]]:
            own = {name: jax.grad(partial(part_loss, [name]), has_aux=True)(params, *part) for name in names}
            found = [metrics for _, (metrics, _) in own.values()]
            metrics = functools.reduce(operator.or_, found) | {"loss": sum(metrics["loss"] for metrics in found)}
            return {name: grads for name, (grads, _) in own.items()}, (metrics, next(iter(own.values()))[1][1])

        def gradient(names: Iterable[str]) -> Gradient:
            own = partial(each, names) if combine is not None else jax.grad(partial(part_loss, names), has_aux=True)
            return own if gradient_dtype is None else partial(held_in, gradient_dtype, own)

        found = []
        for names, how in together(batches, packing, microbatches):
            own = {name: batches[name] for name in names}, {name: weights[name] for name in names}
            found.append(
                (in_microbatches if how is None else partial(in_packed_parts, how))(gradient(names), state.params, *own, microbatches)
            )
        grads, metrics, given = joined(found, combine is not None)
        of_parameters = lambda grads: jax.tree.map(lambda x, like: x.astype(like.dtype), grads, state.params)
        if combine is None:
            grads = of_parameters(grads)
        else:
            grads = combine({name: of_parameters(grads[name]) for name in losses})  # loops sort the names of a mapping
            check_gradient(grads, state.params)
        state, metrics = followed(state, optimizer, grads, metrics)
        return state, metrics, *given

    return step


def held_in(dtype: Any, gradient: Gradient, *args: Any) -> Part:
    """What `gradient(*args)` gives, with the gradient in another dtype."""
    grads, more = gradient(*args)
    return jax.tree.map(lambda x: x.astype(dtype), grads), more


def together(batches: dict[str, Batch], packing: Packing | None, microbatches: int) -> list[tuple[list[str], Packing | None]]:
    """The losses that take their parts together, by name, and how their batch is packed: those of one packed batch, or all padded ones.

    The group of the first loss comes first.
    """
    groups: dict[int, list[str]] = {}
    for name, batch in batches.items():
        packed = packing is not None and packing.pays(batch, microbatches)
        groups.setdefault(id(batch) if packed else 0, []).append(name)
    return [(names, packing if group else None) for group, names in groups.items()]


def in_microbatches(gradient: Gradient, params: Params, batches: dict[str, Batch], weights: Any, microbatches: int) -> Part:
    """The gradient, metrics and outputs of whole batches, summed over padded microbatches."""
    parts = microbatch((batches, weights), microbatches)
    first = lambda parts: jax.tree.map(lambda x: x[0], parts)
    if microbatches == 1:
        return gradient(params, *first(parts))

    def add(total: Any, part: Any) -> tuple[Any, list[Outputs]]:
        grads, (metrics, given) = gradient(params, *part)
        return jax.tree.map(jnp.add, total, (grads, metrics)), given

    grads, (metrics, _) = jax.eval_shape(gradient, params, *first(parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
    (grads, metrics), given = jax.lax.scan(add, zeros, parts)
    return grads, (metrics, gathered(given))


def in_packed_parts(
    packing: Packing, gradient: Gradient, params: Params, batches: dict[str, Batch], weights: Any, microbatches: int
) -> Part:
    """The gradient, metrics and outputs of one batch, which all losses read, summed over its packed parts."""
    batch, computed, sums = next(iter(batches.values())), jnp.zeros((), jnp.int32), None
    for parts in deal(batch, packing, microbatches):

        def part(i: jax.Array, parts: Parts = parts) -> Part:
            own, beside = parts.part(i, batch, weights)
            return gradient(params, dict.fromkeys(batches, own), beside)

        def turn(i: jax.Array, sums: Part, parts: Parts = parts, part: Callable[[jax.Array], Part] = part) -> Part:
            (grads, (metrics, given)), (own, (seen, out)) = sums, part(i)
            grads, metrics = jax.tree.map(jnp.add, (grads, metrics), (own, seen))
            return grads, (metrics, parts.put(given, out, i))

        if sums is None:
            grads, (metrics, given) = jax.eval_shape(part, computed)
            grads, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
            sums = grads, (metrics, parts.zeros(given))
        sums = parts.each(turn, sums)
        computed += parts.computed
    assert sums is not None
    grads, (metrics, given) = sums
    filled = sizes(batch, packing.shared).sum() / jnp.maximum(computed, 1)
    return grads, (metrics | {"packed_positions": filled}, given)


def joined(found: list[Part], apart: bool) -> tuple[Any, Metrics, list[Outputs]]:
    """One gradient (`apart`: the gradients by name), the metrics and the first outputs of several groups of losses."""
    (grads, (metrics, given)), *rest = found
    for more, (seen, _) in rest:
        grads = grads | more if apart else jax.tree.map(jnp.add, grads, more)
        metrics = seen | metrics | {"loss": metrics["loss"] + seen["loss"]}
    return grads, metrics, given


@jax.named_scope("optimizer")
def followed(state: TrainState, optimizer: optax.GradientTransformation, grads: Params, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The state after an optimizer update, unchanged if the loss or gradient is not finite; and the metrics, the step's own added."""
    norms = jax.tree.map(jnp.linalg.norm, grads)
    norm = optax.tree.norm(norms)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    skipped = 1 - finite.astype(jnp.int32)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )
    metrics |= {"grad_norm": norm, "skipped": skipped}
    metrics |= {"skipped_total": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    names = jax.tree_util.tree_leaves_with_path(norms)
    metrics |= {"finite/" + jax.tree_util.keystr(p, simple=True, separator="."): jnp.isfinite(n) for p, n in names}
    return state, metrics


def check_gradient(grads: Any, params: Params) -> None:
    """Refuses a combined gradient whose tree or shapes are not those of the parameters."""
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if jax.tree.structure(grads) != jax.tree.structure(params) or shapes(grads) != shapes(params):
        raise ValueError(
            f"combine(gradients) gives {short(shapes(grads))}; return one gradient, a tree like each of "
            "those that it is given, jax.tree.map(lambda a, b: a + b, *gradients.values()) say, of two"
        )


def prefixed(losses: dict[str, Loss]) -> dict[str, str]:
    """The prefix of each loss's metrics: `name/`, but an empty one for the first loss."""
    return {name: f"{name}/" if i else "" for i, name in enumerate(losses)}


def make_evaluation(apply: Apply, objective: Objectives) -> Callable[[Params, jax.Array, Batch], Sums]:
    """Makes the evaluation of one batch: sums that add up over batches, so that `means` gives exact averages, ragged last batch included.

    With a mapping, every loss is evaluated on the same batch.

    Returns:
      `evaluate(params, step, batch) -> {metric: (weighted sum, weight)}`, to be jitted. The total loss is not a metric here, since each
      term has weights of its own: `means` computes it.
    """

    def evaluate(params: Params, step: jax.Array, batch: Batch) -> Sums:
        losses, out = by_name(objective, step), apply(params, batch)
        sums = {}
        for name, prefix in prefixed(losses).items():
            loss = losses[name]
            for i, (term, weights) in enumerate(zip(loss.terms, loss.weights(batch), strict=True)):
                value, metrics = Loss((term,))(out, batch, (weights,))
                metrics = {prefix + metric: x for metric, x in metrics.items()}
                # Each term has an entry of its own: terms are averaged over their own weights before they are added.
                sums |= {metric: (x, weights.sum()) for metric, x in (metrics | {f"loss:{prefix}{i}": value}).items()}
        return sums

    return evaluate


def means(sums: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Averages from evaluation sums, and `loss`, the coefficient-weighted sum of its terms' averages.

    >>> from alignax.train import means
    >>> means({"loss:0": (3.0, 2.0), "rewards/margins": (1.0, 4.0)})
    {'loss': 1.5, 'rewards/margins': 0.25}
    """
    average = {name: float(total) / float(weight) if weight else 0.0 for name, (total, weight) in sums.items()}
    terms = [name for name in average if name.startswith("loss:")]
    return {"loss": sum(average.pop(name) for name in terms)} | average


def digest(params: Params) -> jax.Array:
    """A fingerprint of parameter values, the same in every sharding: uint32 [], to be jitted.

    The sum modulo 2^32 of a hash of each value and its place (MurmurHash3's finaliser).
    """

    total = jnp.zeros((), jnp.uint32)
    for x in jax.tree.leaves(params):
        total = total * jnp.uint32(1000003) + _hashed(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32))
    return total


def leaf_digests(tree: Any) -> jax.Array:
    """A digest of each array's bits, in the order of the leaves, the same in every sharding: uint32 [leaves], to be jitted.

    Unlike `digest` it takes any dtype, and is exact: one changed element always changes it, several with a probability of 1 - 2^-32.
    """
    return jnp.stack([_hashed(_words(x)) for x in jax.tree.leaves(tree)])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array's elements as uint32; an element of 64 bits gives two."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}").astype(jnp.uint32)


def _hashed(words: jax.Array) -> jax.Array:
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    h = words ^ (place * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
