"""The jitted programs that a run calls, by name, each with the shapes of its arguments.

Checks trace these programs, the plan compiles them, and the loop runs them, so a plan shows what will run. Frozen parameters are an
argument: they keep their shardings, and are never compiled into a program.
"""

import jax

from alignax.host.functions import models_asked
from alignax.models import parameters
from alignax.program import Program
from alignax.rewards import members
from alignax.run.online import make_judge, make_learn
from alignax.run.prepare import Run
from alignax.run.reference_cache import CACHE
from alignax.run.roles import GOLD, REFERENCE, abstract, abstract_frozen, abstract_trained
from alignax.run.sampling import EVALUATION, sampled_rows, speaker_params
from alignax.run.scoring import score_of
from alignax.run.state import (
    abstract_batch,
    abstract_batches,
    abstract_compared,
    abstract_read,
    abstract_rollout,
    abstract_state,
    new_state,
    padded,
)
from alignax.run.steps import make_compare, make_data_step, make_evaluate, make_score
from alignax.train import digest


def programs(run: Run) -> dict[str, Program]:
    """The programs of a run by name; programs that the run does not call are left out.

    | name | program |
    |---|---|
    | fingerprint | the digest of the policy as its folder has it |
    | begin | the state at step 0 |
    | train | the training program: state and batches to the next state and metrics |
    | evaluate | sums of metrics of held-out data, without rollouts |
    | judge | metrics of an evaluation's samples, with rollouts |
    | rollout/lay, eval/lay | the weights of a sampler, laid out for decoding |
    | rollout/prefill, rollout/decode | the sampler of rollouts |
    | eval/prefill, eval/decode | the sampler of evaluations |
    | compare | the KL of an evaluation's samples to the reference |
    | rollout/score/NAME, eval/score/NAME | scores or log-probs of samples by a frozen model |
    | reference.cache | log-probs of the data by the reference |
    """
    online, together = run.config.rollout.samples > 0, run.policy.members > 0
    step, evaluate = (make_learn if online else make_data_step)(run), make_evaluate(run)
    if together:
        step, evaluate = members.trained_together(step), members.evaluated_together(evaluate)
    state, held = abstract_state(run), abstract_frozen(run.roles, run.mesh)
    trained, key = abstract_trained(run.roles, run.mesh), jax.eval_shape(lambda: jax.random.key(0))
    begin = jax.jit(lambda *args: new_state(run, *args), out_shardings=jax.tree.map(lambda x: x.sharding, state), donate_argnums=0)
    out = {
        "fingerprint": Program(jax.jit(digest), (parameters.abstract_params(run.policy.source.config, run.mesh),)),
        "begin": Program(begin, (trained, key, held)),
        "train": Program(jax.jit(step, donate_argnums=0), (state, held, abstract_batches(run))),
    }
    if online:
        n = len(sampled_rows(run.config, run.data.evaluated)) or 1
        samples = abstract_rollout(run, padded(run.mesh, n), run.config.eval.samples_per_prompt)
        out["judge"] = Program(jax.jit(make_judge(run)), (state, held, samples))
    else:
        out["evaluate"] = Program(jax.jit(lambda *args: evaluate(*args)[0]), (state, held, abstract_batch(run, evaluation=True)))
    for name, generator in run.samplers.items():
        parts = generator.programs(speaker_params(generator.speaker, run.roles, held, trained))
        out |= {f"{name}/{part}": program for part, program in parts.items()}
    if compared(run):
        out["compare"] = Program(jax.jit(make_compare(run)), (state.params, held, abstract_compared(run)))
    for name in dict.fromkeys((*models_asked(run.experiment), *(name for name in run.roles if name == GOLD))):
        role = run.roles[name]
        for sampler in run.samplers:
            out[score_of(sampler, name)] = Program(jax.jit(make_score(run, role)), (held[role.tree], abstract_read(run, name, sampler)))
    if run.cache is not None:
        role = run.roles[REFERENCE]
        out[CACHE] = Program(jax.jit(make_score(run, role)), (abstract(role, run.mesh), abstract_batch(run, evaluation=True)))
    return out


def compared(run: Run) -> bool:
    """Whether evaluations compare their samples with a reference: the run holds one, and the sampling is exact."""
    sampler, reference = run.samplers.get(EVALUATION), run.roles.get(REFERENCE)
    held = reference is not None and reference.tree in abstract_frozen(run.roles, run.mesh)
    return held and sampler is not None and sampler.sampling.exact and sampler.speaker.exact
