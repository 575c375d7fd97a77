"""Routed reward models: the category of a prompt selects the model that scores it; a model may be a mixture of experts on a frozen base.

DMoERM (Quan 2024, arXiv:2403.01197), with C categories and K experts in each:

    outer   r(x, y) = sum_c m_c(x) r_c(x, y),   m(x) one-hot at the largest of the router's C scores of the prompt
    inner   r_c = W2 PReLU(W1 [h_1; ..; h_K] + b1) + b2,   h_k [D] the state of expert k at the response's last token

The parts are those of the library. A router is a model with C labels that reads only the prompt. An expert is the adapters and the head
of a reward model on the frozen base; K experts are one tree with a leading axis. `make_step` trains all parts: the router with
`category_nll()`; the base, the experts and the mixture's head with `bradley_terry()`. docs/routed.md describes the phases.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from alignax import paths
from alignax.experience import Experience
from alignax.experience.logps import in_parts
from alignax.losses.algebra import Loss, Objective, make_loss
from alignax.losses.pairs import field
from alignax.models import hf, peft
from alignax.models.heads import last_states
from alignax.models.lora import join
from alignax.models.transformer import Decoder, ModelConfig, decoded, read
from alignax.rewards.members import AXES, over_members
from alignax.train import Apply, Stepped, init_state, make_step
from alignax.types import Batch, Metrics, Model, Outputs, Params, TrainState, rows

States = Callable[[Params, Batch], jax.Array]  # (params, batch) -> [B, N, features]
EXPERTS = {"base": None, "adapters": 0}  # the expert axis of each part of the parameters; None: shared

# The outer layer: which model scores a prompt --------------------------------------------------------------------------------


def of_prompts(apply: Apply) -> Apply:
    """A router's forward pass, from a model's: it reads only the prompts, [B, 1, T], and scores each at its last token."""

    def read(params: Params, batch: Batch) -> Outputs:
        mask, completion = batch["mask"][:, :1], batch["completion_mask"][:, :1]
        prompt = mask & (jnp.cumsum(completion, axis=-1) == 0)  # [B, 1, T]
        return apply(params, {"tokens": batch["tokens"][:, :1], "mask": prompt, "completion_mask": prompt})

    return read


def category_nll() -> Loss:
    """The loss of a router: -log softmax(scores)_c, where c is the prompt's category, in the batch field `category` [B] int.

    `Outputs.scores` are [B, 1, C], without a softmax: a second softmax would flatten the distribution.
    """

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        scores, category = category_scores(out), batch["category"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), category[:, None], axis=-1)[:, 0]
        return nll, {"router/accuracies": (jnp.argmax(scores, axis=-1) == category).astype(jnp.float32)}

    return make_loss("category_nll", value)


def category_scores(out: Outputs) -> jax.Array:
    """The scores of a router for each prompt and category: `Outputs.scores` [B, 1, C] -> [B, C].

    Raises:
      ValueError: for a model that scores each response, or that gives a single score.
    """
    if out.scores is None or out.scores.ndim != 3 or out.scores.shape[1] != 1:
        shape = None if out.scores is None else out.scores.shape
        raise ValueError(
            f"a router must give each prompt a score for each category, [B, 1, C], but this model gives {shape}; use of_prompts(apply)"
        )
    return out.scores[:, 0]


def one_hot(scores: jax.Array) -> jax.Array:
    """The category of each prompt, one-hot: 1 at its largest score (the first of equal ones), else 0; [B, C] -> [B, C], no gradient."""
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])


def side_by_side(apply: Apply, axes: Any = 0) -> Apply:
    """The forward pass of C reward models of one shape, with scores [B, N, C]; `axes` is `in_axes` of `vmap` for their parameters."""
    every = over_members(apply, (axes, None), 0)

    def rate(params: Params, batch: Batch) -> Outputs:
        out = every(params, batch)
        return out._replace(scores=jnp.moveaxis(out.scores, 0, -1))

    return rate


def routed(models: Model, router: Model) -> Model:
    """The routed reward model: the model of a prompt's category scores its responses, [B, N].

    Every model scores every response, and one score is kept. This takes C times as long as one model.

    Args:
      models: C reward models as one, with scores [B, N, C]: `side_by_side`, or `alignax.rewards.ensembles.ensemble_model` of C folders.
      router: model with scores [B, 1, C], see `of_prompts`; it gets no gradient from these scores.
    """

    def rate(params: Params, batch: Batch) -> Outputs:
        out, mask = models.apply(params["models"], batch), one_hot(category_scores(router.apply(params["router"], batch)))
        if out.scores is None or out.scores.shape[2:] != mask.shape[1:]:
            shape = None if out.scores is None else out.scores.shape
            raise ValueError(
                f"the router has {mask.shape[1]} categories, but the scores of the models have shape {shape}; give one model for each "
                "category"
            )
        return out._replace(scores=jnp.where(mask[:, None] > 0, out.scores, 0.0).sum(axis=-1))

    return Model(rate, {"models": models.params, "router": router.params})


# The inner layer: experts on a frozen base, and an MLP over them --------------------------------------------------------------


def adapted(function: Callable[[Params, Batch], Any]) -> Callable[[Params, Batch], Any]:
    """A function of whole parameters, as a function of {"base": .., "adapters": ..}."""
    return lambda params, batch: function(join(params["base"], params["adapters"]), batch)


def expert_states(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The training state of K experts at step 0; `params["adapters"]` are [K, ...]."""
    init = over_members(lambda adapters: init_state(adapters, optimizer, key), 0, AXES)
    return init(params["adapters"])


def expert_step(apply: Apply, objective: Objective, optimizer: optax.GradientTransformation, microbatches: int = 1) -> Callable:
    """The training step of K experts together, each on its own data (phase 2).

    Args:
      apply: forward pass of a whole adapted model, `forward(config)` with `config.lora`.
      objective: loss of an expert, see `make_step`.
      optimizer: optimizer of an expert, see `make_step`.
      microbatches: parts of a batch, see `make_step`.

    Returns:
      `step(state, base, batch) -> (state, metrics)`, not jitted: state of `expert_states`, batch [K, B, ...], metrics [K].
    """

    def step(state: TrainState, base: Params, batch: Batch) -> Stepped:
        own = lambda adapters, part: apply(join(base, adapters), part)
        return make_step(own, objective, optimizer, microbatches)(state, batch)

    return over_members(step, (AXES, None, 0), (AXES, 0))


def load_experts(folders: Sequence[str | Path], source: hf.Source, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """Loads K experts from PEFT folders over one base: config of the adapted model, and {"base": .., "adapters": [K, ...]}.

    Raises:
      ValueError: for folders without adapters of this base, and adapters of another kind than the first.
    """
    found = [peft.read_adapter(paths.of(folder), source, mesh) for folder in folders]
    for folder, (spec, _) in zip(folders, found, strict=True):
        if spec != found[0][0]:
            raise ValueError(
                f"{str(folder)!r} has the adapters {spec}, but {str(folders[0])!r} has {found[0][0]}; all experts must have adapters of "
                "the same kind"
            )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(adapters for _, adapters in found))
    return dataclasses.replace(source.config, lora=found[0][0]), {"base": hf.load_params(source, mesh), "adapters": stacked}


def state_of(config: ModelConfig, dtype: Any = jnp.float32, remat: str = "none", mesh: Mesh | None = None) -> States:
    """The function for a model's state at the last token of each row, which reward heads read: `(params, batch) -> [B, N, D]` float32."""
    decoder = Decoder(config, dtype, remat, mesh)

    def states(params: Params, batch: Batch) -> jax.Array:
        laid = read(config, batch)
        hidden, _ = decoded(decoder, params, laid)  # [R, T, D]
        return last_states(hidden, rows(batch["mask"]), laid.places).reshape(*batch["tokens"].shape[:2], -1)

    return states


def concatenated(states: States) -> States:
    """The function for the states of K experts, [h_1; ..; h_K]: `({"base": .., "adapters": [K, ...]}, batch) -> [B, N, K D]`."""
    every = jax.vmap(adapted(states), in_axes=(EXPERTS, None))  # the mesh axis `member` stays free: whole mixtures may lie along it

    def features(params: Params, batch: Batch) -> jax.Array:
        h = jnp.moveaxis(every(params, batch), 0, 2)  # [B, N, K, D]
        return h.reshape(*h.shape[:2], -1)

    return features


def features(states: States, params: Params, microbatches: int = 1) -> Experience:
    """An experience that writes `features` [B, N, K D], the states of frozen experts for each response; `mixture` reads them.

    Args:
      states: `concatenated(..)`, or another function of parameters and batch.
      params: parameters of the experts; they get no gradient.
      microbatches: parts of the batch that are computed one after another, to bound memory.
    """
    return Partial(_Features(microbatches, states), params)


@dataclasses.dataclass(frozen=True)
class _Features:
    """The experience of `features`, static under jit."""

    microbatches: int
    states: States

    def __call__(self, params: Params, batch: Batch) -> Batch:
        return batch | {"features": in_parts(lambda part: self.states(params, part), batch, self.microbatches)}


def init_mixture(key: jax.Array, size: int, hidden: int) -> Params:
    """Initial parameters of a mixture's head: W1 [F, H] and W2 [H, 1] from N(0, 1 / inputs), biases 0, slope 1/4 as in PReLU's paper.

    Args:
      key: PRNG key of the weights.
      size: F = K D, the number of features.
      hidden: H; in the paper D of one expert.
    """
    one, other = jax.random.split(key)
    weight = lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0])
    zeros = {"b1": jnp.zeros((hidden,)), "b2": jnp.zeros((1,))}
    return zeros | {"W1": weight(one, (size, hidden)), "W2": weight(other, (hidden, 1)), "slope": jnp.full((), 0.25)}


def mixture(params: Params, batch: Batch) -> Outputs:
    """The mixture's head, which phase 3 trains: scores [B, N] from the batch field `features` [B, N, F].

        W2 PReLU(W1 f + b1) + b2,   PReLU(x) = x if x > 0, else slope x (arXiv:1502.01852)

    The parameters are W1, b1, slope, W2 and b2; the outputs of the experts are data.
    """
    f = field(batch, "features", "features(states, experts)")
    x = f.reshape(-1, f.shape[-1]) @ params["W1"] + params["b1"][None]
    x = jnp.where(x > 0, x, params["slope"] * x) @ params["W2"] + params["b2"][None]
    return Outputs(None, None, scores=x.reshape(f.shape[:2]))  # pyright: ignore[reportArgumentType]


def mixture_model(states: States) -> Apply:
    """The forward pass of a whole mixture: scores [B, N] from {"base": .., "adapters": [K, ...], "head": ..} and a batch."""

    def rate(params: Params, batch: Batch) -> Outputs:
        experts = {name: params[name] for name in EXPERTS}
        return mixture(params["head"], features(states, experts)(batch))

    return rate
