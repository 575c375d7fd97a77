"""The overoptimisation laboratory on transformers: trained here in a world of words, or loaded from Hugging Face folders.

  Best-of-n against one reward model: Gao et al. 2022, arXiv:2210.10760.
  Best-of-n against an ensemble (mean, WCO, UWO), 25 % label noise: Coste et al. 2023, arXiv:2310.02743.
  Direct alignment: Rafailov et al. 2024, arXiv:2406.02900; RPO: Liu et al. 2024, arXiv:2405.16436.

Commands:
  alignax overopt --config experiments/overoptimization_tokens.py
  alignax overopt --config experiments/overoptimization_tokens.py --config.folders.policy=SFT --config.folders.proxies=RM0,RM1,RM2
      --config.folders.gold=GOLD --config.folders.prompts=prompts.jsonl --config.workdir=runs/mine

Hardware of the first command: 2 CPU cores, one process; 7 minutes of CPU time.

Expected of the first command, gold reward at its peak and at the end, in standard deviations under the initial policy (means over seeds,
95 % confidence intervals). docs/tables/overoptimization_tokens.md has all numbers.

  Best of 4,096, 6 seeds: single 1.46 and 0.50 +- 0.56, mean 1.59 and 0.38 +- 0.82, WCO 1.63 and 0.82 +- 1.10, UWO 1.67 and 0.92 +- 1.48.
  Without loops no curve falls; they end at 2.1 (single) to 2.5 (mean).
  Direct alignment at beta 0.01, 3 seeds: DPO 1.42 and 0.62 +- 3.22 at a KL of 9 nats, RPO 1.34 and 0.99 +- 0.31 at 4.5.

The run writes into `runs/overoptimization_tokens` the same files as experiments/overoptimization.py. docs/overoptimisation.md explains
them.
"""

from alignax import bradley_terry, default_config, dpo, rpo
from alignax.config import BadInput
from alignax.experience import ensembles
from alignax.losses import hinge, ipo_daa, score_l2
from alignax.overopt import laboratory
from alignax.overopt.folders import folders
from alignax.overopt.text import text


def get_config():
    """The config: sizes for a few minutes on 2 cores."""
    config = default_config()
    config.workdir = "runs/overoptimization_tokens"
    config.repeats = 6  # number of seeds; each has its own gold reward, pairs and reward models, and bands are over seeds
    config.uwo = 4.0  # coefficient of the variance between members; scores are smaller than in the world of vectors
    config.control = True  # also measure best-of-n in the world without loops

    config.world = {
        "tail": 0.01,  # share of the demonstrations that are loops
        "outside": -1.0,  # gold reward of a loop, in standard deviations of other answers
        "pairs": 2000,
        "noise": 0.25,  # share of the training pairs whose label is flipped
        "shared_noise": True,  # the same flipped labels for all members
        "held_out": 500,  # pairs without noise
        "prompts": 3,
        "responses": 4200,  # to each prompt
    }
    config.sft = {"answers": 40000, "width": 64, "layers": 1, "steps": 2500, "batch_size": 128, "learning_rate": 1e-2}
    config.proxy = {"members": 5, "width": 32, "layers": 1, "steps": 400, "batch_size": 64, "learning_rate": 5e-3, "l2": 1e-3}
    config.best_of_n = {"n": tuple(2**i for i in range(13))}
    config.direct = {
        "repeats": 3,
        "objectives": ("DPO", "RPO"),
        "betas": (0.01, 0.05),
        "eta": 0.1,  # RPO's
        "steps": 300,
        "every": 25,  # steps between evaluations
        "samples": 512,  # answers per evaluation
        "batch_size": 64,
        "learning_rate": 1e-3,
    }
    config.folders = {
        "policy": "",  # a Hugging Face folder; if set, nothing is trained, and best-of-n of this model is measured
        "proxies": "",  # folders of reward models, separated by commas
        "gold": "",  # folder of the reward model that is gold
        "prompts": "",  # a file with a column `data.columns.prompt`; each seed takes `world.prompts` other rows
        "max_new_tokens": 128,
        "batch_size": 32,  # responses sampled or scored side by side
    }
    return config


def loss(config):
    """The loss of the reward models; its second term anchors their offsets."""
    return bradley_terry() + config.proxy.l2 * score_l2()


def main(experiment):
    """Runs the laboratory on Hugging Face folders, or on the world of words and its control without loops."""
    config = experiment.config
    real = any(config.folders[field] for field in ("policy", "proxies", "gold", "prompts"))
    worlds = {"folders": folders(config)} if real else {"loops": text(config, loss(config))}
    if config.control and not real:
        without = config.copy_and_resolve_references()
        without.world.tail = 0.0
        worlds["control"] = text(without, loss(config))
    aggregates = {"mean": ensembles.mean, "median": ensembles.median, "WCO": ensembles.wco, "UWO": ensembles.uwo(config.uwo)}
    objectives = {"DPO": dpo, "IPO": ipo_daa, "SLiC": hinge, "RPO": lambda beta: rpo(beta, config.direct.eta)}
    if unknown := sorted(set(config.direct.objectives) - set(objectives)):
        raise BadInput(f"config field 'direct.objectives' names {', '.join(unknown)}; use {', '.join(objectives)}")
    laboratory.run(experiment, worlds, aggregates, {name: objectives[name] for name in config.direct.objectives})
