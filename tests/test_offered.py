"""Everything that is offered can be run: each public name stands in an experiment whose step is traced as a run checks itself.

A loss whose field no experience writes, an experience that no model can serve, an average that nothing starts: none of them gets through
`alignax train`'s own check of its experiment, which computes nothing.
"""

import ast
import inspect
import json
import textwrap
from typing import NamedTuple

import pytest
import runs
import tiny
from test_by_hand import BLOCKS
from test_rewards_ensembles import reward_folder
from test_run_online import HEAD, arguments, checked

import alignax
from alignax import averages, experience, losses
from alignax.cli import main
from alignax.run.start import check_step


class Offer(NamedTuple):
    """An experiment: its code behind `HEAD`, and fields of its config beside those of its kind."""

    source: str
    kind: str
    fields: dict[str, str] = {}


EXPERIMENTS = {
    "pairs": Offer(
        """
def loss(config):
    of_margins = dpo() + robust_dpo() + ipo() + ipo_daa() + ipo_mean() + hinge() + exo() + discopop() + dpop() + rpo() + rpo_token_mean()
    of_responses = nca() + bco() + sppo() + apo_zero() + apo_down() + aot() + aot_unpaired()
    of_lengths = sigmoid_norm() + ld_dpo() + r_dpo() + wpo(dpo()) + tdpo() + tdpo2()
    free = simpo() + cpo() + orpo() + slic_hf() + sft() + summed_sft()
    divergences = reverse_kl, forward_kl, jensen_shannon, alpha_divergence(0.5), chi_squared, total_variation
    exact = gkd() + kl_ref_pi() + kl_pi_ref(token_mean)
    return sum(map(f_dpo, divergences)) + of_margins + of_responses + of_lengths + free + exact

def experience(config, reference, policy):
    models = logps("ref_logps", reference), logps("old_logps", policy)
    return chain(*models, matched_margins(), matched_ratios(), reward_shift())

def averages(config):
    return {"ema": ema(0.9), "swa": swa()}
""",
        "pairs",
        {"reference.token_kl": "true"},
    ),
    "unpaired": Offer(
        """
def loss(config):
    return kto() + apo_zero_unpaired()

def experience(config, reference, policy):
    return chain(logps("ref_logps", reference), mismatched_kl(policy, reference))

def averages(config):
    return {"reference": sync(every=4)}
""",
        "pairs",
        {"data.kind": "unpaired"},
    ),
    "reward": Offer(
        "def loss(config):\n    return bradley_terry() + centring() + score_l2() + grm_sft()\n",
        "pairs",
        {"model.num_labels": "1", "model.language_head": "true"},
    ),
    "adapted members": Offer(
        "def loss(config):\n    return bradley_terry() + 0.01 * sft()\n",
        "pairs",
        {"model.num_labels": "1", "model.language_head": "true", "lora.rank": "2", "ensemble.members": "2"},
    ),
    "attributes": Offer(
        "def loss(config):\n    return attribute_regression(['help', 'length'])\n",
        "attributes",
        {"model.num_labels": "2", "data.kind": "sft", "data.columns.attributes": "help,length"},
    ),
    "groups": Offer(
        """
def loss(config):
    by_levels = grpo(level=by_token) + sapo(level=by_mean) + ppo(level=by_response)
    averaged = grpo(aggregate=token_sum(6)) + grpo(aggregate=response_mean) + grpo(aggregate=token_mean)
    others = gspo() + gmpo() + cispo() + vespo() + rloo() + reinforce() + lp_reg() + entropy_bonus()
    corrected = importance_weighted(grpo()) + importance_masked(grpo()) + off_policy_masked(grpo()) + finished(grpo())
    distances = kl_k1() + kl_k2() + kl_k3() + kl_k3_weighted() + chi2() + chi2_exact() + square_root(chi2())
    return by_levels + averaged + others + corrected + distances

def experience(config, policy, reference, ensemble):
    scores = logps("ref_logps", reference), score(ensemble), mean, median, quantile(0.25), wco, uwo(0.5)
    shaped = clip_rewards(5.0), whiten_rewards(), missing_eos_penalty(1.0), overlong_penalty(6, 2), adaptive_kl_reward()
    compared = group_relative(), gdpo((1.0, 0.5)), batch_scaled(), leave_one_out(), whiten_responses(), reinforce_plus_plus(), top_entropy()
    kept = token_statistic("proxy_logps", policy, min_p(0.02)), token_statistic("top", policy, top_k(4)), low_probability_tokens()
    return chain(*scores, *shaped, *compared, *kept, chi2_estimate())
""",
        "online",
    ),
    "several objectives": Offer(
        """
def loss(config):
    return modpo([0.5, 0.5], implicit_rewards("margin_logps"))

def experience(config, reference):
    return chain(logps("ref_logps", reference), logps("margin_logps", reference))
""",
        "pairs",
    ),
    "what is seen": Offer(
        """
import jax.numpy as jnp

def loss(config):
    return ppo() + observe("surprise", lambda out, batch: -out.logps, lambda batch: batch["completion_mask"])

def experience(config, reference, ensemble):
    wide = lambda batch: report(batch, width=jnp.float32(batch["tokens"].shape[2]))
    return chain(logps("ref_logps", reference), score(ensemble), mean, pama(), wide)
""",
        "online",
    ),
    "critic": Offer(
        """
def loss(config):
    return ppo() + 0.1 * value_loss()

def experience(config, reference, ensemble):
    start = logps("ref_logps", reference), score(ensemble), mean, kl_reward(0.1), shaping(lambda batch: batch["values"])
    return chain(*start, rewards_to_go(), gae(), whiten_advantages())

def averages(config):
    return elastic_reset(every=4) | {"slow": reset_to_average(every=4)}
""",
        "online",
        {"model.critic": "head"},
    ),
    "targets": Offer(
        """
def loss(config):
    every = alpha_pi_p(0.5), chi2_p_pi, chi2_pi_p, hellinger_pi_p, js_pi_p, kl_p_pi, kl_pi_p, tv_pi_p
    return sum(map(fdpg, every))

def experience(config, reference, ensemble, prompts):
    coefficients = fit_moments([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [0.6, 0.6])
    targets = reward_target(0.1), boolean_target(), exponential_target(coefficients)
    remembered = running_log_z(prompts), running_baseline(js_pi_p), proposal_evidence()
    return chain(logps("ref_logps", reference), score(ensemble), mean, *targets, *remembered)

def averages(config):
    return {"proposal": adopt_if_better(every=4)}
""",
        "online",
    ),
    "thresholds": Offer(
        """
import numpy as np

X = np.linspace(0, 3, 20)
END = proxy_point(X, X * (2 - X), degree=3)
FOUND, _ = nelder_mead(lambda p: ((p - END) ** 2).sum(), [[0, 0], [1, 0], [0, 1]])

def loss(config):
    return ppo()

def experience(config, reference, ensemble):
    end, found = END, FOUND.tolist()
    held = mu_ppo(found), all_ppo(found), xi_ppo(found), nm_ppo([[9, 1], [9, 2], [8, 1]], patience=1)
    return chain(logps("ref_logps", reference), score(ensemble), ppo_sat((end, end)), held[-1])

def gold(prompts, completions):
    return [float(len(text)) for text in completions]
""",
        "online",
        {"model.critic": "head", "model.critic_heads": "3"},
    ),
    "best": Offer(
        """
def loss(config):
    return dpo()

def experience(config, reference, ensemble):
    return chain(logps("ref_logps", reference), score(ensemble), mean, best_and_worst())
""",
        "online",
    ),
    "quantiles": Offer(
        """
def loss(config):
    return quark()

def experience(config, reference, ensemble):
    tokens = [90, 91, 92]
    rewarded = chain(score(ensemble), mean)
    return chain(unconditioned(tokens, rewarded), quark_pool(tokens, capacity=24, length=96))
""",
        "online",
        {"reference.token_kl": "true"},
    ),
    "own": Offer(
        """
import jax.numpy as jnp

SPREAD = Statistic("spread", lambda at: 1 - at.mean(at.probs), lambda at, value: -2 * at.probs * (at.probs - at.mean(at.probs)[..., None]))
LAST = Aggregate(lambda batch: batch["completion_mask"], words="tokens")

def loss(config) -> Objective:
    own = LAST("spread", lambda out, batch: (-out.statistics["spread"], {}), (SPREAD,))
    assert isinstance(own, Loss)
    return lambda step: fdpg(FDivergence(kl_pi_p.slope, kl_pi_p.value)) + 0.1 * (1 + step) * own

def counted(carry, batch: Batch):
    return carry + 1, batch | {"log_z": jnp.zeros(len(batch["tokens"])), "fdpg_baseline": jnp.zeros(len(batch["tokens"]))}

def experience(config, policy: Model, reference: Model, ensemble: Model) -> Experience:
    spread = token_statistic("old_spread", policy, SPREAD)
    return chain(logps("ref_logps", reference), spread, score(ensemble), mean, reward_target(), Stateful("count", jnp.zeros(()), counted))
""",
        "online",
    ),
    "own, of pairs": Offer(
        """
def value(out, batch):
    rewards = mean_ratios(out, batch) + 0.1 * sequence(out.logps, batch) / lengths(batch)
    return rewards[:, 1] - rewards[:, 0], pair_metrics(rewards, out, batch)

def loss(config):
    every = pair_ratios, mean_logps, log_odds, desensitised(0.5), diverged(forward_kl)
    compared = [pairwise(f"square_{i}", 0.1, lambda chosen, rejected: (chosen - rejected) ** 2, scores) for i, scores in enumerate(every)]
    likely = make_loss("likely", lambda out, batch: (-pair_logps(out, batch)[:, 0], {}), chosen_examples)
    scheduled = at_step(lambda step: (1 + step) * sft(per_sequence), config.seed)
    assert not statistics_of(scheduled)
    return sum(compared) + Loss(((1.0, Term("own", value, examples)),)) + likely + scheduled + sft(chosen_tokens)

def experience(config, reference):
    return logps("ref_logps", reference)
""",
        "pairs",
    ),
    "own, of groups": Offer(
        """
import jax.numpy as jnp

def value(out, batch):
    moved = log_ratios(out, batch)
    return -batch["advantages"] * jnp.exp(moved), policy_metrics(moved, out, batch, 0.2, 0.2) | target_divergences(moved, moved)

def loss(config):
    return token_mean("own", value)

def experience(config, ensemble):
    rewarded = chain(score(ensemble), mean, group_relative())
    return lambda batch: advance(rewarded, first_carry(rewarded), batch)[1]
""",
        "online",
    ),
    "by hand": Offer(
        """
import jax
import jax.numpy as jnp
import optax

from alignax.models.parameters import abstract_params

def loss(config):
    return sft()

def main(experiment):
    shape = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128,
    )
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    apply, optimizer, objective = forward(shape, mesh=mesh), optax.sgd(0.1), experiment.loss(experiment.config)
    mask = jax.ShapeDtypeStruct((4, 1, 8), bool)
    batch = {"tokens": jax.ShapeDtypeStruct((4, 1, 8), jnp.int32), "mask": mask, "completion_mask": mask}
    params = abstract_params(shape)
    begin = lambda params: init_state(params, optimizer, jax.random.key(0))
    state, metrics = jax.eval_shape(lambda p, b: make_step(apply, objective, optimizer)(begin(p), b), params, batch)
    assert isinstance(state, TrainState) and isinstance(jax.eval_shape(apply, params, batch), Outputs)
    assert "loss/sft" in jax.eval_shape(make_evaluation(apply, objective), params, state.step, batch) and "grad_norm" in metrics
""",
        "pairs",
    ),
}


def names(source: str) -> set[str]:
    """The names that code reads."""
    return {node.id for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Name)}


def test_every_public_name_stands_in_an_experiment():
    """A name may stand in a block of docs/by_hand.md instead, which another test runs."""
    used = set().union(*map(names, (HEAD, *BLOCKS.values(), *(offer.source for offer in EXPERIMENTS.values()))))
    offered = {*losses.__all__, *experience.__all__, *averages.__all__}
    offered |= {name for name in alignax.__all__ if not inspect.ismodule(getattr(alignax, name))}
    assert not offered - used


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Fields of a config for each kind of data: a tiny policy, two reward models of its tokens, pairs, prompts and attributes."""
    folder = tmp_path_factory.mktemp("offered")
    judges = [reward_folder(folder, seed) for seed in range(2)]
    prompts = [{"prompt": f"the {word} of"} for word in ("sun", "moon", "sea", "tree") * 4]
    answers = [{"prompt": "Is it?", "completion": f" yes {i}", "help": i % 3, "length": None if i % 2 else i} for i in range(16)]
    for name, rows in (("prompts", prompts), ("attributes", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = {
        "model.path": folder / "lm0", "batch_size": 8, "steps": 4, "eval.samples": 0, "log.tensorboard": False, "export.final": False,
        "data.max_length": 48,
    }  # fmt: skip
    online = {"data.train": folder / "prompts.jsonl", "data.kind": "prompt", "rollout.samples": 3, "rollout.max_new_tokens": 6}
    online |= {"reward.path": ",".join(map(str, judges)), "rollout.minibatches": 1, "rollout.epochs": 2}
    own = {
        "pairs": {"data.train": tiny.pairs(folder / "pairs.jsonl", 16)},
        "attributes": {"data.train": folder / "attributes.jsonl"},
        "online": online,
    }
    return {kind: {name: str(value) for name, value in (every | fields).items()} for kind, fields in own.items()}


@pytest.mark.parametrize("name", runs.by_turn(EXPERIMENTS, ("groups",), ("pairs", "several objectives", "critic", "own, of pairs")))
def test_what_is_offered_finds_what_it_reads(name, kinds, tmp_path):
    offer = EXPERIMENTS[name]
    args = arguments(tmp_path, offer.source, kinds[offer.kind] | offer.fields | {"workdir": str(tmp_path / "run")})
    if "def main(" in offer.source:
        assert main(args) == 0
    else:
        run = checked(args)
        check_step(run)
        run.workers.close()
