"""Whether a run computes the reference's log-probs of its data once and not in every step, and where it stores them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import paths
from alignax.averages import Average
from alignax.config import Experiment, asked
from alignax.data import Batches, Examples
from alignax.experience import advance, first_carry
from alignax.run.roles import REFERENCE, STORED, Roles
from alignax.types import Batch, Model, Outputs, Params

FOLDER, OFF = "reference", "off"  # the folder in a workdir; the value of `reference.cache` that turns the cache off


def cache_folder(experiment: Experiment, roles: Roles, averages: dict[str, Average], train: Batches, steps: int) -> Path | None:
    """The folder of the reference's log-probs of a run; None if they are computed in every step.

    By default it is in the workdir, where that is less work and changes nothing but rounding: a run on data reads its rows in more than
    one epoch; the reference stands still; the experience alone reads it, and of it the log-probs of the data's own rows. A run that has a
    checkpoint, and computed them in every step so far, goes on with that.
    """
    config = experiment.config
    if said := config.reference.cache:
        return None if said == OFF else paths.of(said)
    workdir = paths.of(config.workdir)
    if (
        config.rollout.samples
        or config.ensemble.members
        or config.reference.token_kl
        or REFERENCE in averages
        or REFERENCE not in asked(experiment.experience)
        or REFERENCE in asked(experiment.loss)
        or (steps - 1) * config.batch_size < len(train.examples)  # a last step that begins in the first epoch reads few rows again
        or (any((workdir / "checkpoints").glob("[0-9]*")) and not (workdir / FOLDER).is_dir())
        or not served(experiment, roles, train)
    ):
        return None
    return workdir / FOLDER


def placed(examples: Examples) -> Examples:
    """Examples with placeholders of log-probs, which are read or computed before the first step; placeholders take no memory."""
    return dataclasses.replace(examples, token_fields={STORED: np.broadcast_to(np.float32(0), len(examples.tokens))})


def served(experiment: Experiment, roles: Roles, train: Batches) -> bool:
    """Whether an experience needs no more of the reference than the log-probs of the data's own rows.

    The experience is called on a few rows, where functions of the tokens stand in for models: once with a reference that computes its
    log-probs, and once with one that has them stored. Both must give the same.
    """
    rows: dict[str, Any] = {name: jnp.asarray(x) for name, x in train.batch(0, slice(0, 4)).items()}
    batch = rows | {STORED: stand_in({}, rows).logps}

    def written(reference: Any) -> Any:
        given: dict[str, Any] = dict.fromkeys(roles, Model(stand_in, {})) | {REFERENCE: Model(reference, {})}
        given |= {"config": experiment.config, "prompts": len(train.examples)}
        assert experiment.experience is not None
        made = experiment.experience(**{name: given[name] for name in asked(experiment.experience)})
        return advance(made, first_carry(made), batch)

    stored = lambda params, batch: Outputs(batch[STORED], None)  # pyright: ignore[reportArgumentType]
    try:
        same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), written(stand_in), written(stored))
    except Exception:  # it reads what is not stored, or what these rows and models lack
        return False
    return jax.tree.all(same)


def stand_in(params: Params, batch: Batch) -> Outputs:
    """Outputs that depend on each token and all tokens before it."""
    before = jnp.cumsum(jnp.where(batch["mask"], batch["tokens"] % 97, 0), axis=-1) % 89
    x = jnp.where(batch["completion_mask"], -0.01 * (before + 1), 0.0)
    return Outputs(x, -x, -x, -x, -x, x.sum(axis=-1), x)
