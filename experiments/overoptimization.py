"""The overoptimisation laboratory: a gold reward that is known, proxies that learn it from noisy pairs, and what optimising them does.

  Best-of-n against one reward model: Gao et al. 2022, arXiv:2210.10760.
  Against an ensemble (mean, WCO, UWO), 25 % label noise: Coste et al. 2023, arXiv:2310.02743.
  Direct alignment over a list of betas: Rafailov et al. 2024, arXiv:2406.02900; RPO: Liu et al. 2024, arXiv:2405.16436.

Command:
  alignax overopt --config experiments/overoptimization.py

Hardware: 2 CPU cores, one process; within three minutes of CPU time.

Expected, gold reward at its peak and at the end, in standard deviations under the initial policy. Best of 4,096, 8 seeds: single 0.93 and
-0.35, mean 1.18 and -0.33, WCO 1.29 and 0.42, UWO 1.38 and 0.95; without the tail all end within 0.05 of their peak, 1.4 (single) to 2.0
(mean). At beta 0.02, 4 seeds: DPO 0.39 and -0.99 at a KL of 8 nats, RPO 1.31 and 0.89 at 3.4.

It leaves in `runs/overoptimization` a page, report.html, its figures as PNG, and the numbers as JSON and CSV; docs/overoptimisation.md
says how to read them. `--config.world.responses=12600 --config.best_of_n.n='(1,16,256,4096,12500)'` goes as far as Coste et al.
"""

from alignax import bradley_terry, default_config, dpo, hinge, ipo_daa, rpo, score_l2
from alignax.config import BadInput
from alignax.experience import ensembles
from alignax.overopt import laboratory
from alignax.overopt.vectors import vectors


def get_config():
    """Sizes for minutes on 2 cores."""
    config = default_config()
    config.workdir = "runs/overoptimization"
    config.repeats = 8  # seeds: other gold rewards, data and models; bands are over them
    config.uwo = 0.5  # coefficient of the variance between members
    config.control = True  # measure best-of-n in the same world without its tail, too

    config.world = {
        "dimension": 16,  # of a response
        "tail": 0.02,  # share of responses that lie far out
        "stretch": 2.0,  # how far
        "radius": 1.45,  # in sqrt(dimension): the gold reward of what lies beyond is `outside`, before it is standardised
        "outside": -1.0,
        "pairs": 1000,
        "noise": 0.25,  # share of the training pairs whose label is flipped
        "shared_noise": True,  # the same pairs for all members
        "held_out": 1000,  # pairs without noise
        "prompts": 6,
        "responses": 4200,  # to each prompt
    }
    config.proxy = {"members": 5, "steps": 1000, "batch_size": 64, "learning_rate": 3e-3, "l2": 1e-3}
    config.best_of_n = {"n": tuple(2**i for i in range(13))}
    config.direct = {
        "repeats": 4,
        "objectives": ("DPO", "IPO", "SLiC", "RPO"),
        "betas": (0.02, 0.1, 0.5),
        "eta": 0.05,  # of RPO
        "pool": 3000,  # responses
        "steps": 3000,
        "every": 25,  # steps between evaluations
        "batch_size": 64,
        "learning_rate": 1e-3,
    }
    return config


def loss(config):
    """Of the reward models; the second term anchors their offsets."""
    return bradley_terry() + config.proxy.l2 * score_l2()


def main(experiment):
    """The world, the same without its tail as the control, and what is compared in them."""
    config = experiment.config
    worlds = {"tail": vectors(config, loss(config))}
    if config.control:
        without = config.copy_and_resolve_references()
        without.world.tail = 0.0
        worlds["control"] = vectors(without, loss(config))
    aggregates = {"mean": ensembles.mean, "median": ensembles.median, "WCO": ensembles.wco, "UWO": ensembles.uwo(config.uwo)}
    objectives = {"DPO": dpo, "IPO": ipo_daa, "SLiC": hinge, "RPO": lambda beta: rpo(beta, config.direct.eta)}
    if unknown := sorted(set(config.direct.objectives) - set(objectives)):
        raise BadInput(f"config field 'direct.objectives' names {', '.join(unknown)}; use {', '.join(objectives)}")
    laboratory.run(experiment, worlds, aggregates, {name: objectives[name] for name in config.direct.objectives})
