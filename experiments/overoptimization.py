"""The overoptimisation laboratory: a known gold reward, proxies that learn it from noisy pairs, and policies optimised against them.

  Best-of-n against one reward model: Gao et al. 2022, arXiv:2210.10760.
  Best-of-n against an ensemble (mean, WCO, UWO), 25 % label noise: Coste et al. 2023, arXiv:2310.02743.
  Direct alignment over a list of betas: Rafailov et al. 2024, arXiv:2406.02900; RPO: Liu et al. 2024, arXiv:2405.16436.
  Online: PPO and RLOO under a KL (Gao, Coste), f-DPG (Go et al. 2023, arXiv:2302.08215), constrained PPO (Moskovitz et al. 2023,
  arXiv:2310.04373), Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551), chi-squared (Laidlaw et al. 2024, arXiv:2403.03185).

Command:
  alignax overopt --config experiments/overoptimization.py

Hardware: 2 CPU cores, one process; at most seven minutes of CPU time, four of them for the online methods.

Expected gold reward at its peak and at the end, in standard deviations under the initial policy (means over seeds, 95 % confidence
intervals). docs/tables/overoptimization.md has all numbers.

  Best of 4,096, 8 seeds: single 0.93 and -0.37 +- 0.09, mean 1.18 and -0.33 +- 0.44, WCO 1.29 and 0.41 +- 0.35, UWO 1.40 and 1.02 +- 0.58
  (its end on other processors: 0.95 and 1.15). Without the tail all end within 0.05 of their peak, 1.4 (single) to 2.0 (mean).
  Direct alignment at beta 0.02, 4 seeds: DPO 0.39 and -0.99 at a KL of 8 nats, RPO 1.31 and 0.89 at 3.4.
  PPO, 8 seeds: single 0.47 and -0.98 without a KL, 0.48 and 0.47 with a KL coefficient of 1; UWO 0.90 and 0.07 +- 1.66 without a KL, 1.32
  and 1.19 +- 0.56 with 0.3.

The run writes into `runs/overoptimization` a page report.html, its figures as PNG, and the numbers as JSON, CSV and Markdown.
docs/overoptimisation.md says how to read them. `--config.world.responses=12600 --config.best_of_n.n='(1,16,256,4096,12500)'` reaches the n
of Coste et al.
"""

from functools import partial

import jax.numpy as jnp

from alignax import bradley_terry, chain, default_config, dpo, fdpg, gae, kl_reward, logps, ppo, rloo, rpo, score
from alignax.averages import elastic_reset
from alignax.config import BadInput
from alignax.experience import ensembles, leave_one_out, mu_ppo, reward_target, running_baseline, running_log_z, whiten_advantages, xi_ppo
from alignax.losses import chi2_exact, hinge, ipo_daa, js_pi_p, kl_k2, kl_p_pi, kl_pi_p, score_l2, token_mean, tv_pi_p, value_loss
from alignax.overopt import laboratory
from alignax.overopt.online import chi2_optimum, kl_optimum, online
from alignax.overopt.vectors import vectors
from alignax.overopt.worlds import Method, Optimum

FAMILIES = ("PPO", "RLOO", "f-DPG", "Constraints", "Elastic Reset", "Chi-squared", "Optima")
COEFFICIENTS = (4.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)  # coefficients of the optima


def get_config():
    """The config: sizes for a few minutes on 2 cores."""
    config = default_config()
    config.workdir = "runs/overoptimization"
    config.repeats = 8  # number of seeds; each has its own gold reward, data and models, and bands are over seeds
    config.uwo = 0.5  # coefficient of the variance between members
    config.control = True  # also measure best-of-n in the world without the tail

    config.world = {
        "dimension": 16,  # of the vector of a response
        "tail": 0.02,  # share of responses that are stretched
        "stretch": 2.0,  # factor of stretched responses
        "radius": 1.45,  # in sqrt(dimension); responses farther out have the gold reward `outside`, before standardisation
        "outside": -1.0,
        "pairs": 1000,
        "noise": 0.25,  # share of the training pairs whose label is flipped
        "shared_noise": True,  # the same flipped labels for all members
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
        "eta": 0.05,  # RPO's
        "pool": 3000,  # responses that the policy chooses from
        "steps": 3000,
        "every": 25,  # steps between evaluations
        "batch_size": 64,
        "learning_rate": 1e-3,
    }
    config.online = {
        "repeats": 8,
        "families": FAMILIES,
        "proxies": ("single", "mean", "WCO", "UWO"),  # proxies of PPO, RLOO and the optima
        "kl": (0.0, 0.1, 0.3, 1.0),  # coefficients of PPO's and RLOO's KL, in standard deviations of a reward model per nat
        "target": 0.5,  # beta of f-DPG's target
        "thresholds": (0.5, 0.8),  # each for both reward models of constrained PPO
        "chi2": (0.02, 0.05, 0.1, 0.3),  # coefficients of chi-squared, against a single reward model
        "decay": 0.99,  # Elastic Reset's
        "reset": 100,  # steps between resets
        "pool": 3000,  # responses that the policy chooses from
        "rollouts": 200,
        "minibatches": 2,  # steps per rollout
        "every": 5,  # rollouts between evaluations
        "batch_size": 64,  # groups per rollout
        "samples": 4,  # responses per group
        "learning_rate": 1e-3,
    }
    return config


def loss(config):
    """The loss of the reward models; its second term anchors their offsets."""
    return bradley_terry() + config.proxy.l2 * score_l2()


def proxies(config):
    """The proxies by name: an aggregate of scores, and the number of reward models it uses (None: all)."""
    mean = ensembles.mean
    return {"single": (mean, 1), "mean": (mean, None), "WCO": (ensembles.wco, None), "UWO": (ensembles.uwo(config.uwo), None)}


def scored(reference, ensemble, *rest):
    """An experience that begins with the fields that every method reads: `ref_logps` and `scores`."""
    return chain(logps("ref_logps", reference), score(ensemble), *rest)


def policy_gradients(config):
    """The policy gradient methods: PPO and RLOO against each proxy at each KL coefficient, RLOO under chi-squared, and Elastic Reset."""
    c = config.online

    def with_critic(beta, reference, ensemble, proxy=ensembles.mean):
        return scored(reference, ensemble, proxy, kl_reward(beta), gae(), whiten_advantages())

    def of_groups(beta, reference, ensemble, proxy):
        return scored(reference, ensemble, proxy, kl_reward(beta), leave_one_out())

    def unpenalised(_, reference, ensemble):
        return scored(reference, ensemble, ensembles.mean, leave_one_out())

    actor_critic = lambda _: ppo() + 0.1 * value_loss()
    clipped = lambda _: rloo()
    for name in c.proxies:
        proxy, members = proxies(config)[name]
        own = {"proxy": proxy, "coefficients": c.kl, "members": members}
        yield Method("PPO", name, loss=actor_critic, experience=partial(with_critic, proxy=proxy), critic=True, **own)
        yield Method("RLOO", name, loss=clipped, experience=partial(of_groups, proxy=proxy), **own)
    penalised = lambda coefficient: rloo() + coefficient * chi2_exact()
    yield Method("Chi-squared", "single", ensembles.mean, penalised, unpenalised, c.chi2, "c", members=1)
    resets = {"PPO": {}, "Elastic Reset": elastic_reset(c.decay, c.reset)}
    for name, averages in resets.items():
        shown = {"members": 1, "critic": True, "averages": averages, "over_steps": ("gold", "kl")}
        yield Method("Elastic Reset", name, ensembles.mean, actor_critic, with_critic, **shown)


def towards_targets(config):
    """f-DPG under four divergences and its exact target; constrained PPO with a KL in its loss, which damps the multipliers' swings."""
    c = config.online

    def target(_, reference, ensemble, divergence):
        return scored(reference, ensemble, ensembles.mean, reward_target(c.target), running_log_z(), running_baseline(divergence))

    def held(threshold, reference, ensemble, method, learning_rate):
        return scored(reference, ensemble, method(jnp.stack([threshold, threshold]), learning_rate))

    for name, divergence in {"JS": js_pi_p, "forward KL": kl_p_pi, "reverse KL": kl_pi_p, "TV": tv_pi_p}.items():
        loss = lambda _, divergence=divergence: fdpg(divergence)
        yield Method("f-DPG", name, ensembles.mean, loss, partial(target, divergence=divergence), members=1)
    yield Optimum("f-DPG", "target", "", ensembles.mean, kl_optimum, (c.target,), members=1)
    damped = lambda _: ppo() + kl_k2(token_mean)
    for name, (method, learning_rate) in {"xi-PPO": (xi_ppo, 0.3), "mu-PPO": (mu_ppo, 0.5)}.items():
        experience = partial(held, method=method, learning_rate=learning_rate)
        shown = {"symbol": "θ", "members": 2, "over_steps": ("score 1", "score 2", "kl")}
        yield Method("Constraints", name, ensembles.mean, damped, experience, c.thresholds, **shown)


def optima(config):
    """The exact optima under a KL and a chi-squared penalty, against each proxy."""
    for name in config.online.proxies:
        proxy, members = proxies(config)[name]
        for penalty, solution in {"KL": kl_optimum, "chi-squared": chi2_optimum}.items():
            yield Optimum("Optima", name, penalty, proxy, solution, COEFFICIENTS, members)


def main(experiment):
    """Runs the laboratory on the world and on its control without the tail."""
    config = experiment.config
    worlds = {"tail": vectors(config, loss(config))._replace(online=online(config, loss(config)))}
    if config.control:
        without = config.copy_and_resolve_references()
        without.world.tail = 0.0
        worlds["control"] = vectors(without, loss(config))
    aggregates = {"mean": ensembles.mean, "median": ensembles.median, "WCO": ensembles.wco, "UWO": ensembles.uwo(config.uwo)}
    objectives = {"DPO": dpo, "IPO": ipo_daa, "SLiC": hinge, "RPO": lambda beta: rpo(beta, config.direct.eta)}
    c = config.online
    named = (
        ("direct.objectives", config.direct.objectives, tuple(objectives)),
        ("online.proxies", c.proxies, tuple(proxies(config))),
        ("online.families", c.families, FAMILIES),
    )
    for field, names, known in named:
        if unknown := sorted(set(names) - set(known)):
            raise BadInput(f"config field {field!r} names {', '.join(unknown)}; use {', '.join(known)}")
    methods = sorted([*policy_gradients(config), *towards_targets(config), *optima(config)], key=lambda own: FAMILIES.index(own.family))
    methods = [own for own in methods if own.family in c.families]
    laboratory.run(experiment, worlds, aggregates, {name: objectives[name] for name in config.direct.objectives}, methods)
