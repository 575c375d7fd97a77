"""The models of a run by name: what each is made of, whether it is trained, and how its forward pass goes.

A run holds one tree of what is trained, and frozen trees by name. A role says which of these its parameters are: a reference may be the
base of the policy's adapters, and is then the same tree. What differs between a policy, a reference, a critic and reward models stands
here, so that programs, the loop and experience know models by their names alone.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax.models import hf, parameters, peft, transformer
from alignax.models.lora import Lora, is_quantised, join, merge, quantise, split
from alignax.models.reward import CRITIC
from alignax.models.statistics import Statistic
from alignax.models.transformer import ModelConfig
from alignax.rewards import members
from alignax.rewards.ensembles import load_members
from alignax.train import Apply
from alignax.types import Batch, Model, Outputs, Params

TRAINED = ""  # the tree of what is trained
STORED = "stored_ref_logps"  # the batch field of log-probs that come with the data, and the tree of a reference that is held as these alone
POLICY, BASE, REFERENCE, ENSEMBLE, GOLD = "policy", "base", "reference", "ensemble", "gold"  # roles that runs know; and CRITIC


Giving = Callable[[tuple[Statistic, ...]], Apply]


class Role(NamedTuple):
    """A model of a run."""

    name: str
    sources: tuple[hf.Source, ...]  # its folder; of several reward models, which are one ensemble, the folder of each
    config: ModelConfig  # of its forward pass: heads, adapters, and what becomes of its logits
    dtype: Any  # of its activations, and of its parameters where they are frozen
    tree: str  # which of the trees that a run holds it reads
    giving: Giving  # statistics -> its forward pass, of its whole tree, whose outputs have them
    init: str = "pretrained"  # or "random": without weights
    adapters: str = ""  # a PEFT folder, which is folded into it as it is read
    members: int = 0  # K of an ensemble, whose trees are stacked [K, ...]

    @property
    def source(self) -> hf.Source:
        """Its folder, of an ensemble the first one."""
        return self.sources[0]

    @property
    def trained(self) -> bool:
        """Whether training changes it."""
        return self.tree == TRAINED

    @property
    def lora(self) -> Lora | None:
        """Its adapters, which alone are trained of it."""
        return self.config.lora

    @property
    def apply(self) -> Apply:
        """Its forward pass, of its whole tree."""
        return self.giving(())


Roles = Mapping[str, Role]


def frozen(roles: Roles) -> dict[str, Role]:
    """The frozen trees that a run holds, and the role that says what each is."""
    return {role.tree: roles.get(role.tree, role) for role in roles.values() if role.tree not in (TRAINED, STORED)}


# Shapes ---------------------------------------------------------------------------------------------------------------------


def abstract(role: Role, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of what a run holds of a role; of adapters and their base that is a part of it each."""
    one = parameters.abstract_params(role.config, mesh)
    one = one if role.lora is None else split(one)[role.trained]
    one = members.stacked(one, role.members, mesh) if role.members else one
    if role.trained:
        return one
    describe = lambda path, x: jax.ShapeDtypeStruct(x.shape, leaf_dtype(role, path), sharding=x.sharding)
    return jax.tree_util.tree_map_with_path(describe, one)


def abstract_trained(roles: Roles, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of what is trained: the policy, and a critic of its own tree beside it."""
    policy = abstract(roles[POLICY], mesh)
    return policy | {CRITIC: abstract(roles[CRITIC], mesh)} if CRITIC in roles else policy


def abstract_frozen(roles: Roles, mesh: Mesh) -> dict[str, Params]:
    """Shapes, types and shardings of the frozen trees, by name."""
    return {tree: abstract(role, mesh) for tree, role in frozen(roles).items()}


def leaf_dtype(role: Role, path: Any) -> Any:
    """The dtype of a frozen leaf: that of activations, to which the forward pass casts everything but the norms anyway."""
    leaf = hf.leaf_name(path)
    if is_quantised(role.lora, leaf):
        return jnp.int8
    return jnp.float32 if leaf.endswith(("norm", "norm_bias", "_scale")) else role.dtype


# Arrays ---------------------------------------------------------------------------------------------------------------------


def load(role: Role, mesh: Mesh, key: jax.Array | None = None) -> Params:
    """The whole parameters of a role as they begin, float32: those of its folders; a head that they lack is drawn from the key.

    A critic's head begins at 0 instead, unless its folder scores as many labels as there are values.
    """
    if role.members and not role.trained:
        return load_members(role.sources, mesh)
    if role.init == "random":
        return parameters.init_params(role.source.config, mesh, jax.random.key(0) if key is None else key)
    params = hf.load_params(role.source, mesh, key)
    if role.adapters:
        spec, adapters = peft.read_adapter(Path(role.adapters), role.source, mesh)
        params = jax.jit(functools.partial(merge, spec), donate_argnums=0)(params, adapters)
    if role.name == CRITIC and role.source.stored.num_labels != role.source.config.num_labels:
        params = params | {"score": jnp.zeros_like(params["score"])}
    return params


def freeze(role: Role, params: Params) -> Params:
    """The tree that a run holds of a frozen role, from its whole parameters: copies, in the types that `leaf_dtype` says."""
    if role.lora is not None:
        params = split(jax.jit(quantise)(params) if role.lora.int8 else params)[0]
    elif not role.members:
        params = _part(params, parameters.abstract_params(role.config))
    # Copies, never aliases: the training step gives the policy's own buffers away.
    copy = lambda path, x: jnp.array(x, leaf_dtype(role, path), copy=True)
    return jax.tree_util.tree_map_with_path(copy, params)


def _part(params: Params, like: Params) -> Params:
    """The leaves that a tree like that has: a reference that starts as the policy does has no critic's head."""
    return {name: _part(params[name], x) if isinstance(x, dict) else params[name] for name, x in like.items()}


# Functions ------------------------------------------------------------------------------------------------------------------


def make_apply(
    model: ModelConfig, config: Any, dtype: Any, mesh: Mesh, teacher: Any = None, statistics: tuple[Statistic, ...] = ()
) -> Apply:
    """A forward pass as the config wants it."""
    c, mixture = config.model, (config.reference.jsd_beta, config.reference.jsd_temperature)
    options: Any = {"teacher": teacher, "mixture": mixture, "statistics": statistics}
    return transformer.forward(model, dtype=dtype, remat=c.remat, chunk=c.logps_chunk, mesh=mesh, **options)


def make_giving(model: ModelConfig, config: Any, dtype: Any, mesh: Mesh) -> Giving:
    """A language model's forward passes, one for each set of statistics, so that equal ones are one function."""
    return functools.cache(lambda statistics: make_apply(model, config, dtype, mesh, statistics=statistics))


def scores_alone(apply: Apply) -> Giving:
    """The forward pass of models that give no log-probs, and refuse what is read of these."""

    def giving(statistics: tuple[Statistic, ...]) -> Apply:
        if statistics:
            raise ValueError(f"the statistic {statistics[0].name!r} is of log-probs, and a reward model has none; ask a language model")
        return apply

    return giving


def whole(roles: Roles, held: Mapping[str, Params], params: Params) -> Params:
    """The whole of the policy's parameters, from those that are trained."""
    return params if roles[POLICY].lora is None else join(held[BASE], params)


def policy_apply(roles: Roles, held: Mapping[str, Params], forward: Apply) -> Apply:
    """A forward pass of the policy as a function of what is trained, with the values of a critic of its own tree."""
    critic = roles.get(CRITIC)

    def both(params: Params, batch: Batch) -> Outputs:
        out = forward(whole(roles, held, params), batch)
        return out if critic is None else out._replace(values=critic.apply(params[CRITIC], batch).values)

    return both


def policy_model(roles: Roles, held: Mapping[str, Params], params: Params) -> Model:
    """The policy as a function of what is trained."""
    giving = lambda statistics: policy_apply(roles, held, roles[POLICY].giving(statistics))
    return Model(giving(()), params, giving)


def models(roles: Roles, held: Mapping[str, Params], params: Params) -> dict[str, Model]:
    """Every model of a run by its role's name, as experience is given it; `params` are what is trained."""
    own = {name: Model(role.apply, held[role.tree], role.giving) for name, role in roles.items() if role.tree in held and name != BASE}
    stored = {name: STORED_MODEL for name, role in roles.items() if role.tree == STORED}
    return own | stored | {POLICY: policy_model(roles, held, params)}


def stored_outputs(params: Params, batch: Batch) -> Outputs:
    """A reference whose log-probs came with the data; it can score nothing else."""
    if STORED not in batch:
        raise ValueError("reference.cache holds log-probs of the data's own rows, and this experience scores others; leave it empty")
    return Outputs(batch[STORED], jnp.full_like(batch[STORED], jnp.nan))  # the entropy is not stored


def stored_statistics(statistics: tuple[Statistic, ...]) -> Apply:
    """Refuses what was not stored."""
    raise ValueError(f"reference.cache holds log-probs and not {statistics[0].name!r}, which an experience asks for; leave it empty")


STORED_MODEL = Model(stored_outputs, {}, stored_statistics)  # the reference of `reference.cache`
