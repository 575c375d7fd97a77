"""Routed reward models: a prompt's category decides which model scores it; a model may be a mixture of experts on one frozen base.

DMoERM (Quan 2024, arXiv:2403.01197), with C categories and K experts of each:

    outer   r(x, y) = sum_c m_c(x) r_c(x, y),   m(x) one-hot: the largest of the router's C scores of the prompt
    inner   r_c = W2 PReLU(W1 [h_1; ..; h_K] + b1) + b2,   h_k [D] the state of expert k at the response's last token

Each part is something that the library has: a router is a model with C labels that reads the prompt alone, an expert is a reward model's
adapters and head over the frozen base, K of them one tree with a leading axis. All are trained by `make_step`: the router with
`category_nll()`, the base, the experts and the mixture's head with `bradley_terry()`. docs/routed.md goes through the phases.
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

from alignax.experience import Experience
from alignax.experience.logps import in_parts
from alignax.losses.algebra import Loss, Objective, make_loss
from alignax.losses.pairs import field
from alignax.models import hf, peft
from alignax.models.heads import last_states
from alignax.models.lora import join
from alignax.models.transformer import Decoder, ModelConfig
from alignax.rewards.members import AXES, over_members
from alignax.train import Apply, Stepped, init_state, make_step
from alignax.types import Batch, Metrics, Model, Outputs, Params, TrainState, rows

States = Callable[[Params, Batch], jax.Array]  # (params, batch) -> [B, N, features]
EXPERTS = {"base": None, "adapters": 0}  # the axis of each part of the parameters of K experts along which they lie

# The outer layer: which model scores a prompt --------------------------------------------------------------------------------


def of_prompts(apply: Apply) -> Apply:
    """A model that is given the prompts alone, [B, 1, T], and is read at the last token of each: what a router is."""

    def read(params: Params, batch: Batch) -> Outputs:
        mask, completion = batch["mask"][:, :1], batch["completion_mask"][:, :1]
        prompt = mask & (jnp.cumsum(completion, axis=-1) == 0)  # [B, 1, T]
        return apply(params, {"tokens": batch["tokens"][:, :1], "mask": prompt, "completion_mask": prompt})

    return read


def category_nll() -> Loss:
    """The router's loss: -log softmax(scores)_c, c being the prompt's category in the field `category` [B] int.

    The model gives `Outputs.scores` [B, 1, C] as they are: a softmax of its own before this one would flatten them.
    """

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        scores, category = category_scores(out), batch["category"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), category[:, None], axis=-1)[:, 0]
        return nll, {"router/accuracies": (jnp.argmax(scores, axis=-1) == category).astype(jnp.float32)}

    return make_loss("category_nll", value)


def category_scores(out: Outputs) -> jax.Array:
    """A router's scores of the prompts: [B, C].

    Raises:
      ValueError: for a model that gives each response scores, or one score alone.
    """
    if out.scores is None or out.scores.ndim != 3 or out.scores.shape[1] != 1:
        shape = None if out.scores is None else out.scores.shape
        raise ValueError(
            f"a router gives each prompt a score of each category, [B, 1, C], and this model gives {shape}; use of_prompts(apply)"
        )
    return out.scores[:, 0]


def one_hot(scores: jax.Array) -> jax.Array:
    """Which category is the prompt's: [B, C] -> [B, C], 1 for the largest score (the first of equal ones) and else 0; no gradient."""
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])


def side_by_side(apply: Apply, axes: Any = 0) -> Apply:
    """Reward models of one shape as one, whose scores are [B, N, C]; `axes` says where in their parameters they lie, as `vmap` does."""
    every = over_members(apply, (axes, None), 0)

    def rate(params: Params, batch: Batch) -> Outputs:
        out = every(params, batch)
        return out._replace(scores=jnp.moveaxis(out.scores, 0, -1))

    return rate


def routed(models: Model, router: Model) -> Model:
    """The reward model that scores each prompt's responses, [B, N], with the model of its category.

    Every model scores every response, and all but one score is dropped: C times the time of one model.

    Args:
      models: C of them, with scores [B, N, C]: `side_by_side`, or `alignax.rewards.ensembles.ensemble_model` of C folders.
      router: with scores [B, 1, C], see `of_prompts`; it gets no gradient from here.
    """

    def rate(params: Params, batch: Batch) -> Outputs:
        out, mask = models.apply(params["models"], batch), one_hot(category_scores(router.apply(params["router"], batch)))
        if out.scores is None or out.scores.shape[2:] != mask.shape[1:]:
            shape = None if out.scores is None else out.scores.shape
            raise ValueError(f"the router tells {mask.shape[1]} categories apart and the models' scores are {shape}; give a model for each")
        return out._replace(scores=jnp.where(mask[:, None] > 0, out.scores, 0.0).sum(axis=-1))

    return Model(rate, {"models": models.params, "router": router.params})


# The inner layer: experts on a frozen base, and an MLP over them --------------------------------------------------------------


def adapted(function: Callable[[Params, Batch], Any]) -> Callable[[Params, Batch], Any]:
    """The function, of parameters in two parts, {"base": .., "adapters": ..}."""
    return lambda params, batch: function(join(params["base"], params["adapters"]), batch)


def expert_states(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state at step 0 of K experts with the adapters [K, ...] that `params` hold."""
    init = over_members(lambda adapters: init_state(adapters, optimizer, key), 0, AXES)
    return init(params["adapters"])


def expert_step(apply: Apply, objective: Objective, optimizer: optax.GradientTransformation, microbatches: int = 1) -> Callable:
    """The shared training step of K experts at once, each on data of its own (phase 2).

    Args:
      apply: of a whole adapted model, `forward(config)` with `config.lora`.
      objective: as of `make_step`, and the others too.

    Returns:
      `step(state, base, batch) -> (state, metrics)`, to be jitted: state of `expert_states`, batch [K, B, ...], metrics [K].
    """

    def step(state: TrainState, base: Params, batch: Batch) -> Stepped:
        own = lambda adapters, part: apply(join(base, adapters), part)
        return make_step(own, objective, optimizer, microbatches)(state, batch)

    return over_members(step, (AXES, None, 0), (AXES, 0))


def load_experts(folders: Sequence[str | Path], source: hf.Source, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """PEFT folders of one kind, over the folder that they were trained on: the adapted model, and {"base": .., "adapters": [K, ...]}.

    Raises:
      ValueError: for folders that are no such adapters, or adapt otherwise than the first.
    """
    found = [peft.read_adapter(Path(folder), source, mesh) for folder in folders]
    for folder, (spec, _) in zip(folders, found, strict=True):
        if spec != found[0][0]:
            raise ValueError(f"{str(folder)!r} adapts as {spec}, and {str(folders[0])!r} as {found[0][0]}; experts must be alike")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(adapters for _, adapters in found))
    return dataclasses.replace(source.config, lora=found[0][0]), {"base": hf.load_params(source, mesh), "adapters": stacked}


def state_of(config: ModelConfig, dtype: Any = jnp.float32, remat: str = "none", mesh: Mesh | None = None) -> States:
    """A model's state at the last token of each row, where reward models are read: `(params, batch) -> [B, N, D]` float32."""
    decoder = Decoder(config, dtype, remat, mesh)

    def states(params: Params, batch: Batch) -> jax.Array:
        hidden, _ = decoder.apply({"params": params}, rows(batch["tokens"]), rows(batch["mask"]))  # [R, T, D]
        return last_states(hidden, rows(batch["mask"])).reshape(*batch["tokens"].shape[:2], -1)

    return states


def concatenated(states: States) -> States:
    """[h_1; ..; h_K] of K experts whose parameters are {"base": .., "adapters": [K, ...]}: [B, N, K D]."""
    every = jax.vmap(adapted(states), in_axes=(EXPERTS, None))  # not along the mesh axis `member`, where whole mixtures may lie

    def features(params: Params, batch: Batch) -> jax.Array:
        h = jnp.moveaxis(every(params, batch), 0, 2)  # [B, N, K, D]
        return h.reshape(*h.shape[:2], -1)

    return features


def features(states: States, params: Params, microbatches: int = 1) -> Experience:
    """Writes `features` [B, N, K D]: what the frozen experts make of each response, which `mixture` reads.

    Args:
      states: `concatenated(..)`, or another function of parameters and batch.
      params: of the experts; no gradient goes into them.
      microbatches: parts that the batch is read in, one after another, to bound memory.
    """
    return Partial(_Features(microbatches, states), params)


@dataclasses.dataclass(frozen=True)
class _Features:
    """The static part of `features`."""

    microbatches: int
    states: States

    def __call__(self, params: Params, batch: Batch) -> Batch:
        return batch | {"features": in_parts(lambda part: self.states(params, part), batch, self.microbatches)}


def init_mixture(key: jax.Array, size: int, hidden: int) -> Params:
    """The mixture's head: W1 [F, H] and W2 [H, 1] from N(0, 1 / inputs), biases 0, the slope 1/4 as PReLU's paper has it.

    Args:
      key: of the weights.
      size: F = K D, of the features.
      hidden: H, the D of one expert in the paper.
    """
    one, other = jax.random.split(key)
    weight = lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0])
    zeros = {"b1": jnp.zeros((hidden,)), "b2": jnp.zeros((1,))}
    return zeros | {"W1": weight(one, (size, hidden)), "W2": weight(other, (hidden, 1)), "slope": jnp.full((), 0.25)}


def mixture(params: Params, batch: Batch) -> Outputs:
    """Scores [B, N] of `features` [B, N, F]: W2 PReLU(W1 f + b1) + b2, PReLU being x where positive, else slope x (arXiv:1502.01852).

    The model that phase 3 trains: its parameters are W1, b1, the slope, W2 and b2, and the experts are data.
    """
    f = field(batch, "features", "features(states, experts)")
    x = f.reshape(-1, f.shape[-1]) @ params["W1"] + params["b1"][None]
    x = jnp.where(x > 0, x, params["slope"] * x) @ params["W2"] + params["b2"][None]
    return Outputs(None, None, scores=x.reshape(f.shape[:2]))  # pyright: ignore[reportArgumentType]


def mixture_model(states: States) -> Apply:
    """Experts and head as one reward model, of parameters {"base": .., "adapters": [K, ...], "head": ..}."""

    def rate(params: Params, batch: Batch) -> Outputs:
        experts = {name: params[name] for name in EXPERTS}
        return mixture(params["head"], features(states, experts)(batch))

    return rate
