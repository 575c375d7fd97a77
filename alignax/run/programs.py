"""Every jitted program that a run calls, by name, with the shapes that it calls it with.

Checks trace them, the plan compiles them, and the loop runs them: what was planned is what runs. Frozen parameters go in as an argument:
they stay sharded where they are, and are never compiled into a program.
"""

from typing import Any, NamedTuple

import jax

from alignax.config import eval_batch_size
from alignax.rewards import members
from alignax.run.online import make_judge, make_learn
from alignax.run.prepare import Run
from alignax.run.roles import GOLD, abstract_frozen
from alignax.run.state import abstract_batch, abstract_batches, abstract_read, abstract_rollout, abstract_state
from alignax.run.steps import make_data_step, make_evaluate, make_gold


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    call: Any
    arguments: tuple[Any, ...]  # shapes, types and shardings

    def shapes(self) -> Any:
        """Shapes of what it returns; the function is traced, and nothing is compiled."""
        return jax.eval_shape(self.call, *self.arguments)

    def compiled(self, platform: str) -> Any:
        """The program compiled for that platform, with `memory_analysis()` and `as_text()`. No array is made.

        Its FLOP count is no use: it counts a loop's body once.

        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, where the memory of a TPU does not hold it.
        """
        return self.call.trace(*self.arguments).lower(lowering_platforms=(platform,)).compile()


def programs(run: Run) -> dict[str, Program]:
    """The programs of a run: "train", which takes a state and gives the next, and "evaluate" of data, or "judge" of samples."""
    online, together = run.config.rollout.samples > 0, run.policy.members > 0
    step, evaluate = (make_learn if online else make_data_step)(run), make_evaluate(run)
    if together:
        step, evaluate = members.trained_together(step), members.evaluated_together(evaluate)
    state, held = abstract_state(run), abstract_frozen(run.roles, run.mesh)
    out = {"train": Program(jax.jit(step, donate_argnums=0), (state, held, abstract_batches(run)))}
    if GOLD in run.roles:
        out["gold"] = Program(jax.jit(make_gold(run.roles[GOLD])), (held[GOLD], abstract_read(run, GOLD)))
    if online:
        samples = abstract_rollout(run, eval_batch_size(run.config), run.config.eval.samples_per_prompt)
        return out | {"judge": Program(jax.jit(make_judge(run)), (state, held, samples))}
    return out | {"evaluate": Program(jax.jit(lambda *args: evaluate(*args)[0]), (state, held, abstract_batch(run, evaluation=True)))}
