"""What the peer commands share: the config of our own case, a clock, and the line of figures that `alignax bench --against` reads.

A peer gets the config as JSON in its only argument. So it takes the case's own model, rows, batches and number of steps:

  alignax bench dpo --against 'PYTHON experiments/peers/trl_dpo.py {config}'

PYTHON is an environment with the peer: `pip install torch==2.13.0 'trl==1.16.*'`. Torch has as many threads as the process may use cores;
`taskset -c 1 alignax bench ..` gives both sides one. On a CPU all is float32, on a GPU mixed with bfloat16.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

WARM = 2  # turns that are not counted, as in `alignax bench`
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class Turn(NamedTuple):
    """A step, or a call of a sampler."""

    tokens: float  # useful ones
    wall: float  # seconds
    cpu: float  # seconds of the processors

    def since(self, before: "Turn") -> "Turn":
        """What was done between two readings of a clock."""
        return Turn(*(b - a for a, b in zip(before, self, strict=True)))


def begin() -> dict[str, Any]:
    """The config of the case, field by field; sets the environment, which torch reads when it is imported."""
    if len(sys.argv) != 2:
        raise SystemExit("a peer takes the config of a case: alignax bench METHOD --against 'PYTHON experiments/peers/PEER.py {config}'")
    os.environ |= OFFLINE
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin, which takes CPU time from the others
    import torch
    import transformers

    torch.manual_seed(0)
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    return json.loads(sys.argv[1])


def load(config: dict[str, Any], kind: Any) -> Any:
    """The policy as a model of transformers, with the weights of its folder or new ones, as the config says."""
    import transformers

    folder = config["model.path"]
    if config["model.init"] != "random":
        return kind.from_pretrained(folder, dtype="float32")
    model = kind.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)  # what ends a completion
    return model


def rows(config: dict[str, Any], *columns: str) -> list[dict[str, Any]]:
    """The columns of the rows that the case trains on, in JSON lines."""
    with open(config["data.train"], encoding="utf-8") as f:
        read = itertools.islice(map(json.loads, f), config["data.limit"] or None)
        return [{name: row[name] for name in columns} for row in read]


def options(config: dict[str, Any], examples: int, folder: str) -> dict[str, Any]:
    """The arguments of a trainer of TRL in its fastest setting: no recomputation, equal microbatches, no log, nothing saved."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder, "max_steps": config["steps"], "per_device_train_batch_size": examples // config["microbatches"],
        "gradient_accumulation_steps": config["microbatches"], "learning_rate": config["optimizer.learning_rate"], "use_cpu": not on_gpu,
        "bf16": on_gpu, "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": on_gpu,
    }  # fmt: skip


def clocked(trainer: Any, tokens: Callable[[], float]) -> list[Turn]:
    """Runs a trainer; its steps. `tokens` tells the useful ones so far."""
    import transformers

    now = lambda: Turn(tokens(), time.perf_counter(), time.process_time())
    seen = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(now().since(self.began))

    trainer.add_callback(Clock())
    out, sys.stdout = sys.stdout, sys.stderr  # the trainer prints a summary
    trainer.train()
    sys.stdout = out
    return seen


def tell(name: str, turns: list[Turn]) -> None:
    """Prints the figures, medians over the turns after the first two, as a line of JSON."""
    import importlib.metadata

    middle = lambda each: float(statistics.median(map(each, turns[WARM:])))
    found = {
        "name": name,
        "tokens": middle(lambda turn: turn.tokens),
        "wall_s": middle(lambda turn: turn.wall),
        "cpu_s": middle(lambda turn: turn.cpu),
        "tokens_per_second": middle(lambda turn: turn.tokens / turn.wall),
        "tokens_per_cpu_second": middle(lambda turn: turn.tokens / turn.cpu),
        "first_step_s": turns[0].wall,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "turns": len(turns) - WARM,
        "versions": {module: importlib.metadata.version(module) for module in ("torch", "transformers", "trl") if module in sys.modules},
    }
    print(json.dumps(found))
