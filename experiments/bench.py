"""Speed and memory of the DPO step on a random Llama: tokens per second, model FLOPs per second, peak memory, first step.

Command:
  make bench                                    all cases, a JSON line each
  python experiments/bench.py --dim 512 --vocab 32768    one case of your own
  python experiments/bench.py --against 'venv/bin/python peer.py --dim {dim} --layers {layers} ...'

`--against` alternates another command with ours, A B A B, and prints the ratios. The last line of the command's output must be JSON with
`tokens_per_step`, and `cpu_s_median` (CPU seconds of a step) or `tokens_per_cpu_s`. Fields of the case in braces are filled in.

A step is: reference forward, policy forward and backward, clip, AdamW. Chosen and rejected rows have `--seq` tokens, including the prompt.
With `--mean` the lengths of completions are geometric with that mean. Rows are padded to `--seq`, or with `--packing` packed into parts of
so many positions. Tokens are those of rows without padding.

CPU seconds are summed over all threads of the process; on a shared machine they vary less than wall time. Model FLOPs exclude
recomputation: 3 policy forwards and 1 reference forward, with causal attention, and with the head only at completion positions. Each case
runs in its own process, so that its peak memory is measured alone.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time

CASE = {
    "dim": 256, "layers": 4, "heads": 8, "kv_heads": 8, "vocab": 8192, "seq": 256, "prompt": 64, "pairs": 8, "steps": 6, "warmup": 2,
    "chunk": 256, "microbatches": 1, "mean": 0, "packing": -1,
}  # fmt: skip
RAGGED = {"seq": 512, "prompt": 32, "pairs": 32, "mean": 32}  # rows about as long as those of HH's harmless pairs
REMAT = "full"
CASES = [
    {},
    {"prompt": 192},
    {"dim": 128, "layers": 2, "vocab": 65536, "seq": 512, "prompt": 128, "pairs": 4, "chunk": 64, "steps": 3},
    *({"dim": 128, "layers": n, "pairs": 2, "vocab": 1024, "seq": 128, "prompt": 32, "steps": 20} for n in (2, 8, 32)),
    {**RAGGED, "steps": 2},
    {**RAGGED, "packing": 1024},
]


def main() -> None:
    """Runs all cases, or with `--one` a single case in this process."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    for name, value in CASE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--remat", default=REMAT)
    parser.add_argument("--one", action="store_true", help="this process is the case")
    parser.add_argument("--against", default="", help="a command to compare with, run in turn with ours")
    parser.add_argument("--rounds", type=int, default=3, help="of a comparison")
    args = parser.parse_args()
    case = {name: getattr(args, name) for name in CASE} | {"remat": args.remat}
    if args.one:
        print(json.dumps(measure(case)))
    elif args.against:
        compare(case, args.against, args.rounds)
    else:
        own = case != CASE | {"remat": REMAT}
        for changes in [case] if own else CASES:
            print(json.dumps(in_process(CASE | {"remat": REMAT} | changes)), flush=True)


def in_process(case: dict) -> dict:
    """The measurements of a case, from a new process."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in case.items()]
    return last_json([sys.executable, __file__, "--one", *options])


def last_json(command: list[str]) -> dict:
    """The last JSON line of a command's output, parsed."""
    out = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not lines:
        raise SystemExit(f"{shlex.join(command)} failed:\n{out.stderr[-2000:]}")
    return json.loads(lines[-1])


def compare(case: dict, command: str, rounds: int) -> None:
    """Alternates our case with another command and prints the ratios of tokens per CPU second."""
    other = shlex.split(re.sub(r"{(\w+)}", lambda m: str(case[m.group(1)]), command))
    ratios = []
    for _ in range(rounds):
        ours, theirs = in_process(case), last_json(other)
        cpu = theirs.get("tokens_per_cpu_s") or theirs["tokens_per_step"] / theirs["cpu_s_median"]
        ratios.append(ours["tokens_per_cpu_second"] / cpu)
        print(json.dumps({"ours": ours, "theirs": theirs, "ratio_per_cpu_second": ratios[-1]}), flush=True)
    print(json.dumps({"case": case, "ratios_per_cpu_second": ratios, "median": statistics.median(ratios)}))


def measure(case: dict) -> dict:
    """The measurements of a case, taken in this process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import alignax
    from alignax.models.transformer import init
    from alignax.packing import Packing, part_by_part

    c = argparse.Namespace(**case)
    hidden = -(-(8 * c.dim // 3) // 64) * 64
    config = alignax.ModelConfig(
        vocab_size=c.vocab, hidden_size=c.dim, intermediate_size=hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.dim // c.heads, max_position_embeddings=2048,
    )  # fmt: skip
    apply = alignax.forward(config, remat=c.remat, chunk=c.chunk)
    params = jax.jit(lambda key: nn.unbox(init(config, key)))(jax.random.key(0))
    reference = jax.tree.map(jnp.copy, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    state = alignax.init_state(params, optimizer, jax.random.key(0))
    packing = Packing(c.packing) if c.packing > 0 else None
    experience = alignax.chain(alignax.logps("ref_logps", alignax.Model(part_by_part(apply, packing), reference)))
    train_step = alignax.make_step(apply, alignax.dpo(0.1), optimizer, c.microbatches, packing=packing)
    traces = []

    def traced_step(state, experience, batch):
        traces.append(1)
        return train_step(state, experience(batch))

    step = jax.jit(traced_step, donate_argnums=0)
    shape, rng = (c.pairs, 2, c.seq), np.random.default_rng(0)
    tokens = rng.integers(3, c.vocab, shape)
    lengths = np.full(shape[:2], c.seq)
    if c.mean:
        lengths = np.minimum(c.prompt + rng.geometric(1 / c.mean, shape[:2]), c.seq)
        tokens[:, 1, : c.prompt] = tokens[:, 0, : c.prompt]
    real = np.arange(c.seq) < lengths[..., None]
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "mask": jnp.asarray(real),
        "completion_mask": jnp.asarray(real & (np.arange(c.seq) >= c.prompt)),
    }

    walls, cpus, hosts, first = [], [], [], 0.0
    for i in range(c.warmup + c.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        state, metrics = step(state, experience, batch)
        host = time.perf_counter() - wall
        jax.block_until_ready(metrics)
        if i == 0:
            first = time.perf_counter() - wall
        elif i >= c.warmup:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            hosts.append(host)
    tokens, flops = int(lengths.sum()), sum(model_flops(c, hidden, int(length)) for length in lengths.ravel())
    cpu, rate = statistics.median(cpus), matmul_rate()
    return case | {
        "parameters": sum(x.size for x in jax.tree.leaves(reference)),
        "first_step_s": round(first, 3),
        "wall_s_median": round(statistics.median(walls), 4),
        "cpu_s_median": round(cpu, 4),
        "host_ms_median": round(1e3 * statistics.median(hosts), 3),
        "tokens_per_step": tokens,
        "tokens_per_second": round(tokens / statistics.median(walls), 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "model_gflops_per_cpu_second": round(flops / cpu / 1e9, 2),
        "matmul_gflops_per_cpu_second": round(rate, 2),
        "share_of_matmul_rate": round(flops / cpu / 1e9 / rate, 3),
        "retraces": len(traces) - 1,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "loss": float(metrics["loss"]),
        "real_positions": round(float(metrics.get("packed_positions", real.mean())), 3),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def model_flops(c: argparse.Namespace, hidden: int, length: int) -> float:
    """The FLOPs of a step that every implementation needs for a row of so many tokens; its prompt counts, shared or not."""
    head_dim = c.dim // c.heads
    layer = 2 * c.dim * (2 * c.heads + 2 * c.kv_heads) * head_dim + 6 * c.dim * hidden
    attention = 2 * length * c.heads * head_dim  # scores and values; the causal half
    body = c.layers * (layer + attention) * length
    head = 2 * c.dim * c.vocab * (length - c.prompt)
    return 4.0 * (body + head)


def matmul_rate() -> float:
    """The GFLOPs per CPU second of a float32 matrix product of 1024^3, best of several."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x * 1e-3)
    product(x).block_until_ready()
    best = 0.0
    for _ in range(10):
        cpu = time.process_time()
        for _ in range(4):
            product(x).block_until_ready()
        best = max(best, 4 * 2 * 1024**3 / (time.process_time() - cpu) / 1e9)
    return best


if __name__ == "__main__":
    main()
