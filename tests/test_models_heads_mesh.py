"""The head and the embedding on a mesh: gradients in blocks of the vocabulary, what devices hold and what they send each other."""

import functools
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_models_heads import close, problem, teacher
from test_run_plan import TPU_ENVIRONMENT

from alignax import losses, train
from alignax import mesh as meshes
from alignax.models import statistics
from alignax.models.heads import PLAIN, Shaping, token_logps
from alignax.models.transformer import embedded
from alignax.run import plan
from alignax.types import rows

COLLECTIVE = r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def size(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def floats(text: str) -> set[int]:
    """The sizes of a program's float32 arrays on a device."""
    return {size(dims) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}


@pytest.mark.parametrize(
    ("shape", "V", "read", "how", "blocks"),
    [
        # 53 tokens: three blocks of 14 and one of 11. The others: of each tensor shard, 26 tokens, in two blocks.
        ({"data": 2, "fsdp": 4}, 53, ("ref_kl", "policy_kl"), Shaping(3.0, 0.7, ((0, 2), (13, 17), (52, 53))), True),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 52, ("policy_kl",), Shaping(None, 1.0, ((20, 30),)), True),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 51, (), PLAIN, True, marks=pytest.mark.slow),  # tensor shards do not divide it
        pytest.param({"fsdp": 8}, 53, ("ref_kl",), PLAIN, True, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, 53, ("policy_kl", "jsd", "top_k_3"), Shaping(3.0), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_in_blocks_of_the_vocabulary_are_those_of_one_device(shape, V, read, how, blocks):
    """A statistic whose slope is not local is computed from the whole vocabulary; else no device has the whole gradient of W."""
    hidden, weight, targets, mask = problem(R=8, V=V)
    mask, mesh = mask.at[:2].set(False), meshes.make_mesh(shape)
    states, head = teacher(targets, V=V)
    pulls = jax.random.normal(jax.random.key(5), (8, *targets.shape))

    def gradients(mesh, hidden, weight, targets, mask, states, head):
        def value(hidden, weight):
            options = {"teacher": (states, head), "statistics": (statistics.top_k(3),), "how": how, "mesh": mesh}
            out = token_logps(hidden, weight, targets, mask, chunk=4, **options)
            found = out._asdict() | out.statistics
            finite = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
            terms = [(pull * finite(found[name])).sum() for pull, name in zip(pulls, ("logps", "entropy", *read), strict=False)]
            return sum(terms), [found[name] for name in ("logps", "entropy", "jsd", "top_k_3")]

        return jax.value_and_grad(value, (0, 1), has_aux=True)(hidden, weight)

    args = hidden, weight, targets, mask, states, head
    batch, split = meshes.batch_sharding(mesh), meshes.sharding(mesh, ("embed", "vocab"), weight.shape)
    theirs = meshes.sharding(mesh, ("embed", "vocab"), head.shape)
    placed = jax.device_put(args, (batch, split, batch, batch, batch, theirs))
    program = jax.jit(functools.partial(gradients, mesh)).lower(*placed).compile()
    (_, values), grads = program(*placed)
    (_, wanted), wanted_grads = jax.jit(functools.partial(gradients, None))(*args)
    close(values, wanted, 1e-5)
    close(grads, wanted_grads, 2e-5)
    assert grads[1].sharding.is_equivalent_to(split, 2)
    whole = weight.size // (mesh.shape["tensor"] if split.spec[1] else 1)
    text = "\n".join(line for line in program.as_text().splitlines() if "transpose(jvp" in line and ("dot" in line or "add" in line))
    assert (whole in floats(text)) == (not blocks), "float32 sums of all columns of W"


def test_local_slopes_are_those_of_the_built_in_statistics_that_can_be():
    local = {s.name for s in vars(statistics).values() if isinstance(s, statistics.Statistic) and s.local}
    assert local == {"entropy", "ref_kl", "policy_kl"}
    assert not any(s.local for s in (statistics.min_p(0.1), statistics.top_k(3), statistics.generalised_jsd()))


def test_an_embedding_tied_to_the_head_on_a_mesh_is_that_of_one_device():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, weight, targets, mask = problem(R=8, V=52)
    tokens = (targets + 1) % 52

    def gradients(mesh, table, tokens, targets, mask):
        value = lambda table: token_logps(
            embedded(table, tokens, jnp.float32, mesh), table.T, targets, mask, chunk=4, mesh=mesh
        ).logps.sum()
        return jax.value_and_grad(value)(table)

    args = weight.T, tokens, targets, mask
    batch, split = meshes.batch_sharding(mesh), meshes.sharding(mesh, ("vocab", "embed"), weight.T.shape)
    placed = jax.device_put(args, (split, batch, batch, batch))
    value, grads = jax.jit(functools.partial(gradients, mesh))(*placed)
    wanted, wanted_grads = jax.jit(functools.partial(gradients, None))(*args)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    close(grads, wanted_grads, 2e-5)


def test_the_gradient_of_an_embedding_is_summed_in_its_own_dtype():
    """4,096 times the same token: a bfloat16 sum of ones would stop at 256."""
    tokens = jnp.zeros((2, 2048), jnp.int32)
    grads = jax.grad(lambda table: embedded(table, tokens, jnp.bfloat16, None).astype(jnp.float32).sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(grads, [[4096, 4096], [0, 0], [0, 0]])


def traffic(text: str) -> float:
    """The bytes that a device sends in a TPU program, by the rule that an all-reduce sends its array twice, and any other once."""
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    entry = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)[0]

    def sent(name: str) -> float:
        total = 0.0
        for line in parts[name].splitlines():
            if found := re.search(COLLECTIVE, line):
                dtype, dims, kind = found.groups()
                of_result = BYTES[dtype] * size(dims)
                if kind == "reduce-scatter":
                    groups = re.findall(r"replica_groups=\{\{([\d,]+)\}", line)
                    of_result *= len(groups[0].split(","))
                # An all-reduce of which each device keeps its slice is TPU's other form of a reduce-scatter.
                total += of_result * (2 if kind == "all-reduce" and not name.startswith("all-reduce-scatter") else 1)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                turns = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", parts[loop[1]])]
                total += sent(loop[2]) * (turns[0] if len(turns) == 1 else 1)
            elif calls := re.search(r"calls=%(all-reduce-scatter[\w.\-]*)", line):
                total += sent(calls[1])
        return total

    return sent(entry)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 16}, pytest.param({"fsdp": 4, "tensor": 4}, marks=pytest.mark.long)], ids=str)
def test_a_tpu_step_of_a_1b_head_and_embedding_holds_no_whole_gradient_and_sends_half(shape, monkeypatch):
    """A DPO step of nothing but the head and the embedding of a Llama 1B, on the 16 chips of a v5e:4x4, 4,096 tokens for each.

    A gathered table, a gathered head and all-reduced gradients sent 16 bytes for each of D V / tensor weights: two and two for the
    bfloat16 weights, twice four for the head's gradient and twice two for the embedding's.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'alignax[tpu]'")
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)
    mesh, D, V = plan.topology_mesh("v5e:4x4", shape), 2048, 128256
    split = lambda dims, axes: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=meshes.sharding(mesh, axes, dims))
    params = {"embed": split((V, D), ("vocab", "embed")), "head": split((D, V), ("embed", "vocab"))}
    field = lambda dtype: jax.ShapeDtypeStruct((16, 2, 2048), dtype, sharding=meshes.batch_sharding(mesh))
    batch = {"tokens": field(jnp.int32), "completion_mask": field(bool), "ref_logps": field(jnp.float32)}

    def apply(params, batch):
        tokens, scored = rows(batch["tokens"]), rows(batch["completion_mask"])
        x = jnp.tanh(embedded(params["embed"], tokens, jnp.bfloat16, mesh))
        out = token_logps(x[:, :-1], params["head"], tokens[:, 1:], scored[:, 1:], chunk=512, mesh=mesh)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))).reshape(batch["tokens"].shape), out)

    loss = losses.dpo(beta=0.1)
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda params: train.init_state(params, optimizer, jax.random.key(0)), params)
    at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh))
    state = jax.tree.map(at, state).replace(params=params)
    step = jax.jit(train.make_step(apply, loss, optimizer), donate_argnums=0)
    compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    text, weights = compiled.as_text(), D * V // mesh.shape["tensor"]
    sent = traffic(text)
    print("peak", compiled.memory_analysis().peak_memory_in_bytes / 1e9, "GB; sent", sent / 1e6, "MB of", 16 * weights / 1e6)
    assert max(floats(text)) < weights
    # Tensor shards also sum the looked-up embeddings and the gradient of the hidden states, and all four exchange those of their slices.
    activations = 6 * 2 * 4096 * mesh.shape["tensor"] * D if mesh.shape["tensor"] > 1 else 0
    assert 4 * weights < sent < 16 * weights / 2 + activations
