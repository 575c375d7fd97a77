"""The head and the embedding on a mesh: gradients in blocks of the vocabulary, what devices hold and what they send each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tpu_programs
from test_models_heads import close, problem, teacher
from tpu_programs import LLAMAS, floats

from alignax import hlo, losses, train
from alignax import mesh as meshes
from alignax.config import load_experiment
from alignax.models import statistics
from alignax.models.heads import PLAIN, Shaping, token_logps
from alignax.models.transformer import TIED, UNTIED, embedded
from alignax.run import plan
from alignax.run.prepare import prepare
from alignax.types import rows


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


@pytest.mark.parametrize("lookup", [TIED, UNTIED], ids=("tied", "untied"))
def test_an_embedding_tied_to_the_head_on_a_mesh_is_that_of_one_device(lookup):
    """Stored as a table that is the head too, and as one that is not: the values and the gradients are the same."""
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, weight, targets, mask = problem(R=8, V=52)
    tokens = (targets + 1) % 52

    def gradients(mesh, table, tokens, targets, mask):
        value = lambda table: token_logps(
            embedded(table, tokens, jnp.float32, mesh, lookup), table.T, targets, mask, chunk=4, mesh=mesh
        ).logps.sum()
        return jax.value_and_grad(value)(table)

    args = weight.T, tokens, targets, mask
    batch, split = meshes.batch_sharding(mesh), meshes.sharding(mesh, lookup.stored, weight.T.shape)
    placed = jax.device_put(args, (split, batch, batch, batch))
    value, grads = jax.jit(functools.partial(gradients, mesh))(*placed)
    wanted, wanted_grads = jax.jit(functools.partial(gradients, None))(*args)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    close(grads, wanted_grads, 2e-5)


def test_the_gradient_of_an_embedding_is_summed_in_its_own_dtype():
    """4,096 times the same token: a bfloat16 sum of ones would stop at 256."""
    tokens = jnp.zeros((2, 2048), jnp.int32)
    grads = jax.grad(lambda table: embedded(table, tokens, jnp.bfloat16, None, TIED).astype(jnp.float32).sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(grads, [[4096, 4096], [0, 0], [0, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 16}, pytest.param({"fsdp": 4, "tensor": 4}, marks=pytest.mark.long)], ids=str)
def test_a_tpu_step_of_a_1b_head_and_embedding_holds_no_whole_gradient_and_sends_half(shape, tpu_slice):
    """A DPO step of nothing but the head and the embedding of a Llama 1B, on the 16 chips of a v5e:4x4, 65,536 tokens.

    A gathered table, a gathered head and all-reduced gradients sent 16 bytes for each of D V / tensor weights: two and two for the
    bfloat16 weights, twice four for the head's gradient and twice two for the embedding's. Tensor shards also all-reduced the looked-up
    embeddings and the gradient of the hidden states. Of n devices in a ring each sends (n - 1) / n of that.
    """
    mesh, D, V = tpu_slice("v5e:4x4", shape), 2048, 128256
    split = lambda dims, axes: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=meshes.sharding(mesh, axes, dims))
    params = {"embed": split((V, D), UNTIED.stored), "head": split((D, V), ("embed", "vocab"))}
    field = lambda dtype: jax.ShapeDtypeStruct((16, 2, 2048), dtype, sharding=meshes.batch_sharding(mesh))
    batch = {"tokens": field(jnp.int32), "completion_mask": field(bool), "ref_logps": field(jnp.float32)}

    def apply(params, batch):
        tokens, scored = rows(batch["tokens"]), rows(batch["completion_mask"])
        x = jnp.tanh(embedded(params["embed"], tokens, jnp.bfloat16, mesh, UNTIED))
        out = token_logps(x[:, :-1], params["head"], tokens[:, 1:], scored[:, 1:], chunk=512, mesh=mesh)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))).reshape(batch["tokens"].shape), out)

    loss = losses.dpo(beta=0.1)
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda params: train.init_state(params, optimizer, jax.random.key(0)), params)
    at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh))
    state = jax.tree.map(at, state).replace(params=params)
    step = jax.jit(train.make_step(apply, loss, optimizer), donate_argnums=0)
    compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    text, tensor = compiled.as_text(), mesh.shape["tensor"]
    weights, activations, ring = D * V // tensor, 65536 // mesh.shape["fsdp"] * D, lambda n: (n - 1) / n
    before = 16 * weights * ring(mesh.shape["fsdp"]) + 4 * 2 * activations * ring(tensor)
    sent = sum(c.sent for c in hlo.collectives(hlo.read(text)))
    print("peak", compiled.memory_analysis().peak_memory_in_bytes / 1e9, "GB; sent", sent / 1e6, "MB, before", before / 1e6)
    assert max(floats(text)) < weights
    assert 4 * weights < sent < before / 2


@pytest.mark.long
@pytest.mark.slow
def test_a_tpu_step_of_dpo_holds_and_sends_no_whole_matrix_of_the_vocabulary(tpu_slice, tmp_path):
    """A whole DPO step with its reference, of a Llama 1B with two layers, on fsdp 4 x tensor 4 of a v5e:4x4; rows of 2,048 tokens."""
    tensor, llama = 4, LLAMAS["1B"]
    fields = tpu_programs.fields(tmp_path, "1B", 2048, 16, num_hidden_layers=2, tie_word_embeddings=False)
    experiment = load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in fields.items()])
    text = plan.compile_step(prepare(experiment, tpu_slice("v5e:4x4", {"fsdp": 4, "tensor": tensor}))).as_text()
    found, weights = hlo.collectives(hlo.read(text)), llama["hidden_size"] * llama["vocab_size"] // tensor
    largest = max(found, key=lambda c: c.elements)
    print("sent", sum(c.sent for c in found) / 1e6, "MB; the largest:", largest)
    assert max(floats(text)) < weights
    assert (largest.kind, largest.dtype, largest.elements) == ("all-gather", "bf16", weights), "the head of a tensor shard"
