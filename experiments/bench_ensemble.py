"""Cost of scoring with an ensemble: K random Llama reward models in one program, against K calls one after another, in float32.

Command:
  make bench                                        all cases, a JSON line each
  python experiments/bench_ensemble.py --members 3  another number of members

Each case runs in its own process on one core. Both ways compile first, and their scores are compared. Then they alternate, call by call,
on the same rows. `ratio` is the CPU seconds of the one program over those of the K calls together, each the median over the calls. FLOPs
and bytes are XLA's estimates, for one member in the program (XLA counts its loop over members once) and for the program of one model.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

from bench import last_json

LIMIT = 1.1  # largest ratio that passes
CASES = {
    "short": {"rows": 32, "seq": 64, "dim": 128, "layers": 2},
    "long": {"rows": 16, "seq": 256, "dim": 256, "layers": 4},
}


def main() -> None:
    """Runs all cases, or with `--one` a single case in this process."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--calls", type=int, default=7, help="timed ones of each way")
    parser.add_argument("--one", action="store_true", help="this process is the case")
    args = parser.parse_args()
    if args.one:
        if sys.platform == "linux":
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measure(CASES[args.cases], args.members, args.calls)))
        return
    for case in args.cases.split(","):
        options = ["--one", "--cases", case, "--members", str(args.members), "--calls", str(args.calls)]
        found = last_json([sys.executable, __file__, *options])
        print(json.dumps({"case": case} | found | {"within_limit": found["ratio"] <= LIMIT}), flush=True)


def measure(case: dict, members: int, calls: int) -> dict:
    """The measurements of both ways, taken in this process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    import alignax
    from alignax.mesh import make_mesh
    from alignax.models.transformer import init
    from alignax.rewards.ensembles import ensemble_model

    dim, shape = case["dim"], (case["rows"], 1, case["seq"])
    config = alignax.ModelConfig(
        vocab_size=8192, hidden_size=dim, intermediate_size=-(-(8 * dim // 3) // 64) * 64, num_hidden_layers=case["layers"],
        num_attention_heads=8, num_key_value_heads=8, head_dim=dim // 8, max_position_embeddings=2048, num_labels=1,
    )  # fmt: skip
    make = jax.jit(lambda key: nn.unbox(init(config, key)))
    models = [make(jax.random.key(k)) for k in range(members)]
    real = np.ones(shape, bool)
    batch = {
        "tokens": jnp.asarray(np.random.default_rng(0).integers(3, 8192, shape), jnp.int32),
        "mask": jnp.asarray(real),
        "completion_mask": jnp.asarray(real & (np.arange(case["seq"]) >= case["seq"] // 2)),
    }
    stack = jax.tree.map(lambda *x: jnp.stack(x), *models)
    together = ensemble_model(config, stack, make_mesh({}, jax.devices()[:1])).apply
    alone = alignax.forward(config, remat="none")

    def compiled(apply: Any, params: Any) -> Any:
        return jax.jit(lambda params, batch: apply(params, batch).scores).lower(params, batch).compile()

    programs = compiled(together, stack), compiled(alone, models[0])
    ways = lambda: programs[0](stack, batch), lambda: jnp.stack([programs[1](params, batch) for params in models], axis=-1)
    np.testing.assert_allclose(ways[0](), ways[1](), atol=1e-4)
    times = [], []
    for _ in range(calls):
        for seconds, way in zip(times, ways, strict=True):
            cpu = time.process_time()
            jax.block_until_ready(way())
            seconds.append(time.process_time() - cpu)
    one, many = (statistics.median(seconds) for seconds in times)
    cost, single = (program.cost_analysis() for program in programs)
    temporary = [round(program.memory_analysis().temp_size_in_bytes / 2**20, 1) for program in programs]
    return case | {
        "members": members,
        "cpu_s_together": round(one, 4),
        "cpu_s_one_after_another": round(many, 4),
        "ratio": round(one / many, 3),
        "gflops_of_a_member": round(cost["flops"] / 1e9, 3),
        "gflops_alone": round(single["flops"] / 1e9, 3),
        "mbytes_of_a_member": round(cost["bytes accessed"] / 1e6, 1),
        "mbytes_alone": round(single["bytes accessed"] / 1e6, 1),
        "temporary_mib_together": temporary[0],
        "temporary_mib_alone": temporary[1],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    main()
