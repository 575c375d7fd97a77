"""The profile of a run: a trace of a few training steps, for xprof, TensorBoard and Perfetto."""

import shutil
from typing import Any

import jax

from alignax import output
from alignax.config import steps_of_turn
from alignax.distributed import is_main
from alignax.run.log import Log
from alignax.run.prepare import Run

FOLDER = "profile"  # in the workdir


class Profile:
    """Traces the `log.profile` training steps that follow the first turn of a process, which compiles.

    Whole turns are traced, with what lies between them, such as an evaluation. The device is waited for at both ends. Process 0 alone
    traces: all processes run the same programs, and a process that waits for another is seen in the collective.
    """

    def __init__(self, run: Run, log: Log, first: int):
        """Traces nothing yet; `first`: the step from which this process goes on."""
        self.log, self.folder, self.turn = log, log.folder / FOLDER, steps_of_turn(run.config)
        self.place = run.workdir / FOLDER
        self.unfinished = self.folder / output.TMP
        self.begin = first + self.turn
        self.end = min(self.begin + run.config.log.profile, run.steps)
        self.wanted, self.traced = is_main() and self.end > self.begin, 0  # steps traced so far, in a trace that goes on

    def step(self, number: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """The context of the turn that begins after step `number`, which gave this state; begins or ends the trace if that is due.

        The context has the mark by which profilers tell steps apart.
        """
        if self.traced and number >= self.end:
            jax.block_until_ready(state)
            self.close()
        elif self.wanted and not self.traced and number == self.begin:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would be most of the trace, and slow it down
            shutil.rmtree(self.unfinished, ignore_errors=True)  # of a killed process
            jax.profiler.start_trace(self.unfinished, create_perfetto_trace=True, profiler_options=options)
        self.traced += self.turn * (self.wanted and number >= self.begin)
        return jax.profiler.StepTraceAnnotation("train", step_num=number + self.turn)

    def close(self) -> None:
        """Ends a trace that goes on, and writes it, whole or not at all.

        Raises:
          OSError: if it cannot be written.
        """
        if self.traced:
            steps, self.wanted, self.traced = self.traced, False, 0
            with self.log.paused():
                try:
                    jax.profiler.stop_trace()
                    for made in self.unfinished.glob("plugins/profile/*"):
                        there = self.folder / made.relative_to(self.unfinished)
                        there.parent.mkdir(parents=True, exist_ok=True)
                        made.rename(there)
                except (OSError, RuntimeError, ValueError) as e:  # jax has no one class of errors for a disk without room
                    raise output.unwritten(self.place, e, output.AGAIN) from e
                finally:
                    shutil.rmtree(self.unfinished, ignore_errors=True)
                self.log.publish()
            self.log.line(
                f"profile of steps {self.begin + 1} to {self.begin + steps}: `xprof {self.place}` shows it, and ui.perfetto.dev opens its "
                "perfetto_trace.json.gz"
            )
