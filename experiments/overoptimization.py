"""The overoptimisation laboratory: a gold reward that is known, proxies that learn it from noisy pairs, and what optimising them does.

  Best-of-n against one reward model: Gao et al. 2022, arXiv:2210.10760.
  Against an ensemble (mean, WCO, UWO), 25 % label noise: Coste et al. 2023, arXiv:2310.02743.
  Direct alignment over a list of betas: Rafailov et al. 2024, arXiv:2406.02900; RPO: Liu et al. 2024, arXiv:2405.16436.
  Online: PPO and RLOO under a KL (Gao, Coste), f-DPG (Go et al. 2023, arXiv:2302.08215), constrained PPO (Moskovitz et al. 2023,
  arXiv:2310.04373), Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551), chi-squared (Laidlaw et al. 2024, arXiv:2403.03185).

Command:
  alignax overopt --config experiments/overoptimization.py

Hardware: 2 CPU cores, one process; within seven minutes of CPU time, of which the online methods take four.

Expected, gold reward at its peak and at the end, in standard deviations under the initial policy, means over seeds with 95 % confidence
intervals. Best of 4,096, 8 seeds: single 0.93 and -0.37 +- 0.09, mean 1.18 and -0.33 +- 0.44, WCO 1.29 and 0.41 +- 0.35, UWO 1.40 and
1.02 +- 0.58 (on other processors 0.95 and 1.15); without the tail all end within 0.05 of their peak, 1.4 (single) to 2.0 (mean). At beta
0.02, 4 seeds: DPO 0.39 and -0.99 at a KL of 8 nats, RPO 1.31 and 0.89 at 3.4. PPO, 8 seeds: single 0.47 and -0.98 without a KL, 0.48 and
0.47 at a coefficient of 1; UWO 0.90 and 0.07 +- 1.66 without, 1.32 and 1.19 +- 0.56 at 0.3. docs/tables/overoptimization.md has all of
them.

It leaves in `runs/overoptimization` a page, report.html, its figures as PNG, and the numbers as JSON, CSV and Markdown;
docs/overoptimisation.md says how to read them. `--config.world.responses=12600 --config.best_of_n.n='(1,16,256,4096,12500)'` goes as far
as Coste et al.
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
COEFFICIENTS = (4.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)  # of the optima


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
    config.online = {
        "repeats": 8,
        "families": FAMILIES,
        "proxies": ("single", "mean", "WCO", "UWO"),  # of PPO, RLOO and the optima
        "kl": (0.0, 0.1, 0.3, 1.0),  # coefficients of PPO's and RLOO's KL, in standard deviations of a reward model per nat
        "target": 0.5,  # beta of f-DPG's target
        "thresholds": (0.5, 0.8),  # of both reward models under constraints
        "chi2": (0.02, 0.05, 0.1, 0.3),  # coefficients of chi-squared, against a single reward model
        "decay": 0.99,  # of Elastic Reset
        "reset": 100,  # steps between resets
        "pool": 3000,  # responses
        "rollouts": 200,
        "minibatches": 2,  # steps on each
        "every": 5,  # rollouts between evaluations
        "batch_size": 64,  # groups of a rollout
        "samples": 4,  # responses of a group
        "learning_rate": 1e-3,
    }
    return config


def loss(config):
    """Of the reward models; the second term anchors their offsets."""
    return bradley_terry() + config.proxy.l2 * score_l2()


def proxies(config):
    """What is made of the scores of reward models, and of how many of them: None is all."""
    mean = ensembles.mean
    return {"single": (mean, 1), "mean": (mean, None), "WCO": (ensembles.wco, None), "UWO": (ensembles.uwo(config.uwo), None)}


def scored(reference, ensemble, *rest):
    """Experience that begins with what every method here reads."""
    return chain(logps("ref_logps", reference), score(ensemble), *rest)


def policy_gradients(config):
    """PPO and RLOO against each proxy at each coefficient of the KL; chi-squared in its place; Elastic Reset."""
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
    """f-DPG under four divergences, its target; constrained PPO, its KL in the loss too, which damps the swings of its multipliers."""
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
    """The best that a KL and a chi-squared penalty have to offer, against each proxy."""
    for name in config.online.proxies:
        proxy, members = proxies(config)[name]
        for penalty, solution in {"KL": kl_optimum, "chi-squared": chi2_optimum}.items():
            yield Optimum("Optima", name, penalty, proxy, solution, COEFFICIENTS, members)


def main(experiment):
    """The world, the same without its tail as the control, and what is compared in them."""
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
