"""Optax's optimizers and learning-rate schedules, by name from a config."""

from typing import Any

import jax
import optax

from alignax.config import Experiment
from alignax.config.blame import blaming
from alignax.moments import compact

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "lion", "rmsprop", "sgd", "adafactor")


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """A schedule, step -> learning rate: linear warm-up from 0, then constant, or decay to `final` of the peak.

    Args:
      config: fields `schedule`, `learning_rate`, `warmup` (a share of the steps, for example 0.1), `final` (a share of the peak).
      steps: optimizer steps of the run.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule {config.schedule!r} is unknown; use {', '.join(SCHEDULES)}")
    if not config.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate is {config.learning_rate}; it must be above 0")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"optimizer.warmup is {config.warmup}; it must be a share of the steps, in [0, 1)")
    peak, final = config.learning_rate, config.learning_rate * config.final
    warmup = round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final),
    }[config.schedule]()
    if not warmup:
        return decay
    # The first step has a rate above 0, since a step at rate 0 is wasted.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), decay], [warmup])


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a config, by its name, behind gradient clipping by global norm (`clip`; 0: none).

    Args:
      config: fields `name`, `clip`, `b1`, `b2`, `eps`, `weight_decay`, `moments`; each optimizer takes the ones that it has.
      schedule: step -> learning rate.

    Raises:
      ValueError: for unknown names, and for fields that the optimizer does not have.
    """
    c = config
    decay = {"weight_decay": c.weight_decay, "mask": decays}
    # Optax multiplies the decay by the learning rate, except in adafactor: it is scaled here, so that `weight_decay` means the same in all.
    scaled = (lambda step: c.weight_decay * schedule(step)) if c.weight_decay else None
    table = {
        "adamw": lambda: optax.adamw(schedule, b1=c.b1, b2=c.b2, eps=c.eps, **decay),
        "adam": lambda: optax.adam(schedule, b1=c.b1, b2=c.b2, eps=c.eps),
        "lion": lambda: optax.lion(schedule, b1=c.b1, b2=c.b2, **decay),
        "rmsprop": lambda: optax.rmsprop(schedule, decay=c.b2, eps=c.eps),
        "sgd": lambda: optax.sgd(schedule, momentum=c.b1),
        "adafactor": lambda: optax.adafactor(schedule, weight_decay_rate=scaled, weight_decay_mask=decays),
    }
    if c.weight_decay and c.name in ("adam", "rmsprop", "sgd"):
        raise ValueError(
            f"optimizer.weight_decay is {c.weight_decay}, but {c.name!r} has no weight decay; use adamw, or set optimizer.weight_decay to 0"
        )
    if c.name not in table:
        raise ValueError(f"optimizer.name {c.name!r} is unknown; use {', '.join(OPTIMIZERS)}")
    if c.name == "adafactor" and c.moments != "float32":
        raise ValueError(
            f"optimizer.moments is {c.moments!r}, but adafactor's second moments are sums of rows and columns, small already; use float32"
        )
    optimizer = compact(table[c.name](), c.moments)
    return optax.chain(optax.clip_by_global_norm(c.clip), optimizer) if c.clip else optimizer


def own_optimizer(experiment: Experiment, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer that `optimizer(config, schedule)` of an experiment file makes, its own clipping and decay included.

    Raises:
      ValueError: if it is not an optax optimizer.
    """
    assert experiment.optimizer is not None
    with blaming(experiment.file):
        made = experiment.optimizer(experiment.config, schedule)
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(
            f"optimizer() of {experiment.file} returns {made!r}; return an optax.GradientTransformation, for example optax.sgd(schedule, "
            "momentum=0.9)"
        )
    return made


def decays(params: Any) -> Any:
    """The mask of weight decay: True for all leaves but norms, biases and offsets, by name (stacked over layers they have two axes)."""
    last = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
    return jax.tree_util.tree_map_with_path(lambda path, _: not last(path).endswith(("norm", "bias", "offset")), params)
