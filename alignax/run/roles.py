"""Roles: the models of a run by name, with their folders, parameter trees, dtypes and forward passes.

A run holds one tree of trained parameters, and named trees of frozen ones. A role names the tree of its model. Two roles may share a
tree: the reference may be the base of the policy's adapters. The differences between policy, reference, critic and reward models are in
this file, so that programs, the loop and experiences know models only by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import paths
from alignax.models import hf, kernels, parameters, peft, transformer
from alignax.models.lora import Lora, is_quantised, join, merge, quantise, split
from alignax.models.reward import CRITIC
from alignax.models.statistics import Statistic
from alignax.models.transformer import ModelConfig
from alignax.packing import Packing, part_by_part
from alignax.rewards import members
from alignax.rewards.ensembles import load_members
from alignax.train import Apply
from alignax.types import Batch, Model, Outputs, Params

TRAINED = ""  # name of the tree of trained parameters
STORED = "stored_ref_logps"  # batch field of stored reference log-probs, and tree name of a reference that has only these
POLICY, BASE, REFERENCE, ENSEMBLE, GOLD = "policy", "base", "reference", "ensemble", "gold"  # names of roles, beside CRITIC


Giving = Callable[[tuple[Statistic, ...]], Apply]


class Role(NamedTuple):
    """A model of a run, and how the run holds and computes it."""

    name: str
    sources: tuple[hf.Source, ...]  # folder of the model; of an ensemble, the folder of each member
    config: ModelConfig  # of the forward pass: heads, adapters, treatment of logits
    dtype: Any  # dtype of activations, and of frozen parameters
    tree: str  # name of the tree with its parameters
    giving: Giving  # statistics -> forward pass on the whole tree whose outputs have these statistics
    init: str = "pretrained"  # "pretrained": weights of the folder; "random": new weights
    adapters: str = ""  # PEFT folder that is merged into the weights on loading
    members: int = 0  # K of an ensemble with stacked trees [K, ...]; 0: a single model
    reads_text: bool = False  # a frozen language model of another tokenizer than the policy's, for reward functions alone

    @property
    def source(self) -> hf.Source:
        """The folder of the model; of an ensemble, the first member's."""
        return self.sources[0]

    @property
    def trained(self) -> bool:
        """Whether the model is trained."""
        return self.tree == TRAINED

    @property
    def lora(self) -> Lora | None:
        """The adapters of the model, or None; with adapters, only they are trained."""
        return self.config.lora

    @property
    def apply(self) -> Apply:
        """The forward pass of the model on its whole tree, without further statistics."""
        return self.giving(())


Roles = Mapping[str, Role]


def frozen(roles: Roles) -> dict[str, Role]:
    """The frozen trees of a run by name, each with the role that describes it."""
    return {role.tree: roles.get(role.tree, role) for role in roles.values() if role.tree not in (TRAINED, STORED)}


# Shapes ---------------------------------------------------------------------------------------------------------------------


def abstract(role: Role, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings of the tree that a run holds for a role: of an adapted model the adapters or the base."""
    one = parameters.abstract_params(role.config, mesh)
    one = one if role.lora is None else split(one)[role.trained]
    one = members.stacked(one, role.members, mesh) if role.members else one
    if role.trained:
        return one
    describe = lambda path, x: jax.ShapeDtypeStruct(x.shape, leaf_dtype(role, path), sharding=x.sharding)
    return jax.tree_util.tree_map_with_path(describe, one)


def abstract_trained(roles: Roles, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings of the trained parameters: the policy, and a critic with its own trunk."""
    policy = abstract(roles[POLICY], mesh)
    return policy | {CRITIC: abstract(roles[CRITIC], mesh)} if CRITIC in roles else policy


def abstract_frozen(roles: Roles, mesh: Mesh) -> dict[str, Params]:
    """Shapes, dtypes and shardings of the frozen trees, by name."""
    return {tree: abstract(role, mesh) for tree, role in frozen(roles).items()}


def leaf_dtype(role: Role, path: Any) -> Any:
    """The dtype of a frozen leaf: that of activations, to which the forward pass casts all but norms anyway; int8 if quantised."""
    leaf = hf.leaf_name(path)
    if is_quantised(role.lora, leaf, role.config.num_experts > 0):
        return jnp.int8
    return parameters.read_dtype(leaf, role.dtype)


# Arrays ---------------------------------------------------------------------------------------------------------------------


def load(role: Role, mesh: Mesh, key: jax.Array | None = None) -> Params:
    """Loads the whole initial parameters of a role, float32: the weights of its folders; a missing head is drawn from `key`.

    A critic's head begins at 0 instead, unless its folder has a head with as many labels as the critic has values.
    """
    if role.members and not role.trained:
        return load_members(role.sources, mesh)
    if role.init == "random":
        return parameters.init_params(role.source.config, mesh, jax.random.key(0) if key is None else key)
    params = hf.load_params(role.source, mesh, key)
    if role.adapters:
        spec, adapters = peft.read_adapter(paths.of(role.adapters), role.source, mesh)
        params = jax.jit(functools.partial(merge, spec), donate_argnums=0)(params, adapters)
    if role.name == CRITIC and role.source.stored.num_labels != role.source.config.num_labels:
        params = params | {"score": jnp.zeros_like(params["score"])}
    return params


def freeze(role: Role, params: Params) -> Params:
    """The tree that a run holds for a frozen role, copied from its whole parameters, with the dtypes of `leaf_dtype`."""
    if role.lora is not None:
        params = split(jax.jit(quantise)(params) if role.lora.int8 else params)[0]
    elif not role.members:
        params = _part(params, parameters.abstract_params(role.config))
    # Copies, never aliases: the training step donates the policy's buffers.
    copy = lambda path, x: jnp.array(x, leaf_dtype(role, path), copy=True)
    return jax.tree_util.tree_map_with_path(copy, params)


def _part(params: Params, like: Params) -> Params:
    """The leaves of `params` that `like` has; a reference made from the policy's weights has no critic's head."""
    return {name: _part(params[name], x) if isinstance(x, dict) else params[name] for name, x in like.items()}


# Functions ------------------------------------------------------------------------------------------------------------------


def make_apply(
    model: ModelConfig, config: Any, dtype: Any, mesh: Mesh, teacher: Any = None, statistics: tuple[Statistic, ...] = ()
) -> Apply:
    """The forward pass of a model with the config's remat, chunk size and divergence, on `mesh`."""
    c, mixture = config.model, (config.reference.jsd_beta, config.reference.jsd_temperature)
    options: Any = {"teacher": teacher, "mixture": mixture, "statistics": statistics, "attention": attention(config, mesh)[0]}
    return transformer.forward(model, dtype=dtype, remat=c.remat, chunk=c.logps_chunk, mesh=mesh, **options)


def attention(config: Any, mesh: Mesh) -> tuple[str, str]:
    """The attention that the models of a run ask `alignax.models.kernels.chosen` for, and why "auto" is "xla" for all of them, else ""."""
    name = config.model.attention
    members = config.ensemble.members or (mesh.shape["member"] if mesh.shape["member"] > 1 else 0)
    if members and name in ("auto", "cudnn") and kernels.platform(mesh) == "gpu":
        why = f"cudnn does not compute the {members} members of an ensemble together"
        if name == "cudnn":
            raise ValueError(f"model.attention is 'cudnn', and {why}; use model.attention=xla")
        return "xla", why
    return name, ""


def kernel(role: Role, config: Any, mesh: Mesh, tokens: int, block: int = 0) -> tuple[str, str]:
    """The attention kernel of a model of a run for rows of `tokens`; and why "auto" did not take the platform's own, else "".

    Of packed rows `block` is the number of tokens in a block; 0: rows are padded.
    """
    name, why = attention(config, mesh)
    found, reason = kernels.chosen(name, role.config, role.dtype, tokens, kernels.platform(mesh), block)
    return found, why or reason


def make_giving(model: ModelConfig, config: Any, dtype: Any, mesh: Mesh) -> Giving:
    """The cached forward passes of a language model by statistics: equal statistics give the same function."""
    return functools.cache(lambda statistics: make_apply(model, config, dtype, mesh, statistics=statistics))


def scores_alone(apply: Apply) -> Giving:
    """The forward pass of a model without log-probs, which refuses statistics of log-probs."""

    def giving(statistics: tuple[Statistic, ...]) -> Apply:
        if statistics:
            raise ValueError(
                f"the statistic {statistics[0].name!r} needs log-probs, which a reward model does not have; ask a language model for it"
            )
        return apply

    return giving


def whole(roles: Roles, held: Mapping[str, Params], params: Params) -> Params:
    """The whole parameters of the policy, from its trained ones and, with adapters, the frozen base."""
    return params if roles[POLICY].lora is None else join(held[BASE], params)


def policy_apply(roles: Roles, held: Mapping[str, Params], forward: Apply) -> Apply:
    """The policy's forward pass as a function of the trained parameters, with `values` of a critic with its own trunk."""
    critic = roles.get(CRITIC)

    def both(params: Params, batch: Batch) -> Outputs:
        out = forward(whole(roles, held, params), batch)
        return out if critic is None else out._replace(values=critic.apply(params[CRITIC], batch).values)

    return both


def policy_model(roles: Roles, held: Mapping[str, Params], params: Params, packing: Packing | None = None) -> Model:
    """The policy as a `Model` of the trained parameters, for what is not differentiated; with `packing` it computes packed parts."""
    giving = lambda statistics: part_by_part(policy_apply(roles, held, roles[POLICY].giving(statistics)), packing)
    return Model(giving(()), params, giving)


def models(roles: Roles, held: Mapping[str, Params], params: Params, packing: Packing | None = None) -> dict[str, Model]:
    """All models of a run by role, as an experience gets them, from the trained parameters; with `packing` they compute packed parts."""
    own = {name: frozen_model(role, held[role.tree], packing) for name, role in roles.items() if role.tree in held and name != BASE}
    stored = {name: STORED_MODEL for name, role in roles.items() if role.tree == STORED}
    return own | stored | {POLICY: policy_model(roles, held, params, packing)}


def frozen_model(role: Role, params: Params, packing: Packing | None = None) -> Model:
    """A frozen role as a `Model` of its parameters; with `packing` it computes packed parts."""
    own = role.name if role.members or role.reads_text else ""  # other models read the tokens of the batch
    pack = lambda apply: part_by_part(apply, packing, own)
    return Model(pack(role.apply), params, lambda statistics: pack(role.giving(statistics)))


def stored_outputs(params: Params, batch: Batch) -> Outputs:
    """The forward pass of a reference with stored log-probs: [B, N, T] from the batch; other rows are refused, the entropy is NaN."""
    if STORED not in batch:
        raise ValueError("reference.cache holds log-probs of the data's own rows, and this experience scores others; leave it empty")
    return Outputs(batch[STORED], jnp.full_like(batch[STORED], jnp.nan))  # entropy is not stored


def stored_statistics(statistics: tuple[Statistic, ...]) -> Apply:
    """Refuses statistics of a reference with stored log-probs."""
    raise ValueError(f"reference.cache holds log-probs and not {statistics[0].name!r}, which an experience asks for; leave it empty")


STORED_MODEL = Model(stored_outputs, {}, stored_statistics)  # the reference of `reference.cache`
