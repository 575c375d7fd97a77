"""Attention kernels of accelerators: splash, interpreted here, against `attention`; what is refused; programs compiled for a TPU.

Of cuDNN the arguments and the conditions are tested, with JAX's own computation in the kernel's place: it was not run on a GPU.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jax._src.cudnn import fused_attention_stablehlo
from test_models_attention import pulled
from test_packing import packed
from tpu_programs import LLAMAS, kernel_bytes

from alignax import mesh as meshes
from alignax.config import default_config, load_experiment
from alignax.models import kernels, parameters, transformer
from alignax.models.attention import attention, packed_attention
from alignax.models.rows import _dealt_place, laid_out
from alignax.packing import Form, Packed
from alignax.rewards.members import over_members
from alignax.run import roles
from alignax.run.prepare import prepare
from alignax.run.summary import attention as words

interpreted = functools.partial(kernels.splash, interpret=True)
instead = functools.partial(kernels.cudnn, implementation="xla")


def drawn(R, T, H, KV, h):
    """Queries, keys, values, a cotangent that is 0 at padding, and a mask with padding in front, in the middle and behind."""
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (R, T, heads, h))
    t = jnp.arange(T)[None]
    row = lambda *bounds: jnp.array(bounds)[jnp.arange(R) % len(bounds)][:, None]
    mask = (
        (t >= row(0, T // 5, 0, 0)) & (t < row(T, T, T - T // 3, 0)) & (t % row(T + 1, T + 1, 7, 5) != 3)
    )  # the fourth row is all padding
    real = mask[..., None, None]
    return draw(0, H), draw(1, KV), draw(2, KV), jnp.where(real, draw(3, H), 0.0), mask


def check_equal(kernel, behind=False, shape=(4, 256, 4, 2, 8), window=0, **options):
    """Values at real tokens, and all gradients, of a kernel and of `attention`."""
    q, k, v, cotangent, mask = drawn(*shape)
    if behind:
        mask = jnp.arange(shape[1])[None] < mask.sum(axis=1, keepdims=True)
        cotangent = jnp.where(mask[..., None, None], cotangent, 0.0)
    real = mask[..., None, None]
    layer = {"window": jnp.asarray(window)} if window else {}
    theirs = layer | ({"windows": (0, 9, window)} if window else {})
    found, grads = pulled(lambda *x: jnp.where(real, kernel(*x, mask, **theirs, **options), 0.0), cotangent, q, k, v)
    expected, own = pulled(lambda *x: jnp.where(real, attention(*x, mask, **layer, **options), 0.0), cotangent, q, k, v)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


ALL = {"window": 70, "cap": 2.0, "scalar": 3.0}


@pytest.mark.parametrize("options", runs.slow_but([{}, {"window": 70}, {"cap": 0.7}, {"scalar": 3.0}, ALL], ALL), ids=str)
def test_splash_is_attention(options):
    check_equal(interpreted, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 640, 4, 4, 16), (2, 200, 6, 1, 24), (1, 1100, 2, 1, 64), (2, 128, 2, 2, 136), (2, 7, 2, 2, 128)], ids=str
)
def test_splash_takes_rows_and_heads_of_any_size(shape):
    check_equal(interpreted, shape=shape)


def test_a_block_pads_a_row_by_little():
    sizes = {T: kernels.block_size(T) for T in (1, 128, 200, 384, 512, 640, 1024, 1100, 1152, 1408, 2048)}
    expected = {1: 128, 128: 128, 200: 256, 384: 384, 512: 512, 640: 384, 1024: 512, 1100: 384, 1152: 384, 1408: 512, 2048: 512}
    assert sizes == expected


@pytest.mark.parametrize("options", runs.slow_but([{}, {"window": 70}, {"window": 300, "scalar": 3.0}], {"window": 70}), ids=str)
def test_cudnns_arguments_mean_attention(options):
    check_equal(instead, behind=True, **options)


SHARDED = [("splash", 4, 2), ("cudnn", 3, 3), ("splash", 3, 3), ("cudnn", 4, 2)]


@pytest.mark.parametrize("case", runs.slow_but(SHARDED, SHARDED[1]), ids=str)
def test_kernels_are_the_same_on_a_mesh(case):
    """Rows over 4 devices and heads over 2; three key-value heads, which 2 devices do not divide, stay together."""
    (name, H, KV), mesh = case, meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    kernel = {"splash": interpreted, "cudnn": instead}[name]
    q, k, v, _, mask = drawn(4, 128, H, KV, 8)
    mask = jnp.arange(128)[None] < mask.sum(axis=1, keepdims=True)
    run = lambda mesh, q, k, v, mask: kernel(q, k, v, mask, mesh, windows=(0, 40), window=jnp.asarray(40)) * mask[..., None, None]
    sharded = jax.jit(functools.partial(run, mesh))(q, k, v, mask)
    expected = attention(q, k, v, mask, window=jnp.asarray(40)) * mask[..., None, None]
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_splash_computes_the_members_of_an_ensemble_together():
    mesh = meshes.make_mesh({"member": 2, "data": 2, "tensor": 2})
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (2, 4, 128, heads, 8))
    q, k, v, mask = draw(0, 4), draw(1, 2), draw(2, 2), jnp.arange(128)[None] < jnp.array([[128], [70], [3], [128]])
    run = lambda f, *x: jax.value_and_grad(lambda *x: (jnp.square(f(*x, mask)) * mask[..., None, None]).sum(), (0, 1, 2))(*x)
    together = jax.jit(over_members(functools.partial(run, functools.partial(interpreted, mesh=mesh)), 0, 0))(q, k, v)
    for member in range(2):
        alone = run(attention, q[member], k[member], v[member])
        jax.tree.map(lambda a, b, m=member: np.testing.assert_allclose(a[m], b, rtol=1e-5, atol=1e-5), together, alone)


def check_packed(mesh=None, members=0, shards=1, KV=2, window=0, **options):
    """Values and all gradients of packed rows by the TPU kernel, and by plain XLA on one device."""
    context = 1 if mesh is None else mesh.shape["context"]
    dealt = packed(tiny.batch(B=4, T=24), shards=shards, block=32 // context, context=context)
    sight, plain = laid_out(dealt).sight, laid_out(Packed(dealt, dealt.form._replace(context=1))).sight
    S, P = sight.positions.shape
    place = _dealt_place(jnp.arange(P), P, context)  # where a context mesh has what stands at each position
    order = jnp.argsort(place)
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (*((members,) if members else ()), S, P, heads, 8))
    arrays = [draw(0, 4), draw(1, KV), draw(2, KV), draw(3, 4)]

    def run(arrays, sight, *places, **how):
        attend = lambda *x: packed_attention(*x, sight, *places, window=jnp.asarray(window), **options, **how)
        both = lambda q, k, v, cotangent: pulled(attend, cotangent, q, k, v)
        return jax.jit(over_members(both, 0, 0) if members else both)(*arrays)

    expected = run(arrays, plain)
    found = run([x[..., order, :, :] for x in arrays], sight, mesh, kernel="splash", interpret=True)
    found = jax.tree.map(lambda x: x[..., place, :, :], found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    padding = np.asarray(plain.branch < 0)
    assert padding.any() and not np.asarray(found[0])[..., padding, :, :].any()


PACKED = [{"KV": 4, "shards": 2}, {"window": 9, "cap": 2.0, "scalar": 3.0, "KV": 1}]


@pytest.mark.parametrize("options", runs.by_turn(PACKED, [], PACKED[-2:]), ids=str)
def test_the_kernel_of_packed_rows_is_attention_in_blocks(options):
    check_packed(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "shards"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
        pytest.param({"member": 2, "data": 2, "tensor": 2}, 2, marks=pytest.mark.long),
        ({"context": 4, "tensor": 2}, 1),
        pytest.param({"member": 2, "data": 2, "context": 2}, 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_kernel_of_packed_rows_is_the_same_on_a_mesh(axes, shards):
    check_packed(meshes.make_mesh(axes), axes.get("member", 0), shards=shards)


WINDOWS = dataclasses.replace(tiny.MODEL, sliding_windows=(0, 9), positions="learned")


def padded(batch, where):
    """The batch with the padding of its rows behind, in front or among their tokens."""
    mask = np.asarray(batch["mask"])
    if where == "behind":
        return batch
    rank = mask if where == "front" else np.random.default_rng(0).random(mask.shape)
    new = np.take_along_axis(mask, np.argsort(rank, axis=-1, kind="stable"), -1)
    source = np.argsort(np.argsort(~new, axis=-1, kind="stable"), axis=-1)  # of each place: its token comes from there
    return {name: jnp.asarray(np.take_along_axis(np.asarray(x), source, -1)) for name, x in batch.items()}


@pytest.mark.parametrize("kernel", runs.slow_but(["splash", "cudnn"]))
def test_a_model_with_a_kernel_gives_the_same(kernel, monkeypatch):
    """Log-probs and hidden states, of layers with and without a window, wherever the padding of a row stands."""
    monkeypatch.setattr(kernels, "splash", interpreted)
    monkeypatch.setattr(kernels, "cudnn", instead)
    monkeypatch.setattr(kernels, "unmet", lambda *_: "")
    params, plain = tiny.params(WINDOWS), tiny.batch(T=128)
    forward = lambda name: jax.jit(transformer.forward(WINDOWS, attention=name, hidden=(0,)))
    expected, apply = forward("xla")(params, plain), forward(kernel)
    # A window counts places in a row, except for cuDNN, whose rows lose the padding among their tokens.
    for where in ("behind", "front", "among")[: 3 if kernel == "cudnn" else 2]:
        batch = padded(plain, where)
        out, at = apply(params, batch), lambda x, of, name: np.asarray(x)[np.asarray(of[name])]
        theirs = at(expected.hidden[0], plain, "mask")
        np.testing.assert_allclose(at(out.hidden[0], batch, "mask"), theirs, rtol=1e-4, atol=1e-5)
        if where != "among":  # a token is predicted from the place before it
            theirs = at(expected.logps, plain, "completion_mask")
            np.testing.assert_allclose(at(out.logps, batch, "completion_mask"), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_reads_packed_rows_by_the_kernel(monkeypatch):
    """Log-probs and gradients of pairs that share their prompt, of layers with and without a window, and of padded rows."""
    monkeypatch.setattr(kernels, "unmet", lambda *_: "")
    config, plain = dataclasses.replace(tiny.MODEL, sliding_windows=(0, 9)), tiny.batch(B=4, T=24)
    params, scored = tiny.params(config), plain["completion_mask"]
    calls = []

    def interpreted_blocks(*arrays, kernel, **options):
        calls.append(kernel)
        return packed_attention(*arrays, kernel=kernel, interpret=True, **options)

    def pull(name, batch):
        apply = transformer.forward(config, attention=name)
        return jax.jit(jax.value_and_grad(lambda params: jnp.where(scored, apply(params, batch).logps, 0.0).sum()))(params)

    monkeypatch.setattr(transformer, "packed_attention", interpreted_blocks)
    found, expected = pull("splash", packed(plain, shards=1, block=32)), pull("xla", plain)
    assert set(calls) == {"splash"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


bf16, f32 = jnp.bfloat16, jnp.float32
LLAMA = dataclasses.replace(tiny.MODEL, head_dim=64)
CAPPED = dataclasses.replace(LLAMA, attn_logit_softcapping=50.0)


@pytest.mark.parametrize("case", [
    (LLAMA, bf16, 1024, "tpu", "splash", ""),
    (LLAMA, f32, 1024, "tpu", "splash", ""),
    (CAPPED, bf16, 512, "tpu", "splash", ""),
    (LLAMA, bf16, 96, "tpu", "xla", "rows of 96 tokens are below 128"),
    (dataclasses.replace(LLAMA, head_dim=20), bf16, 512, "tpu", "xla", "head_dim is 20"),
    (LLAMA, bf16, 512, "gpu", "cudnn", ""),
    (LLAMA, f32, 512, "gpu", "xla", "set model.dtype=bfloat16"),
    (CAPPED, bf16, 512, "gpu", "xla", "caps them at 50.0"),
    (dataclasses.replace(LLAMA, head_dim=320), bf16, 512, "gpu", "xla", "head_dim is 320"),
    (LLAMA, bf16, 512, "cpu", "xla", "there is no other kernel for cpu"),
], ids=lambda case: f"{case[3]}-{case[4]}-{case[5][-12:]}")  # fmt: skip
def test_auto_takes_the_platforms_kernel_where_its_conditions_hold(case, monkeypatch):
    monkeypatch.setattr(kernels, "_fault", lambda *_: "")
    config, dtype, tokens, platform, kernel, why = case
    found, said = kernels.chosen("auto", config, dtype, tokens, platform)
    assert found == kernel and why in said and bool(why) == bool(said)
    if why and "below" not in why and platform != "cpu":
        with pytest.raises(ValueError, match=f"model.attention is '{kernels.OWN[platform]}', and .*{re.escape(why)}.*"):
            kernels.chosen(kernels.OWN[platform], config, dtype, tokens, platform)


def test_jax_is_asked_whether_cudnn_works_here():
    """On this machine there is no cuDNN; on a GPU JAX also judges its version and the GPU's generation."""
    found, why = kernels.chosen("auto", LLAMA, bf16, 512, "gpu")
    assert found == "xla" and "JAX refuses cudnn on this machine: " in why
    with pytest.raises(ValueError, match="model.attention 'flash' is unknown; use auto, xla, splash, cudnn"):
        kernels.chosen("flash", LLAMA, bf16, 512, "gpu")
    with pytest.raises(ValueError, match="attention 'flash' is unknown"):
        transformer.forward(tiny.MODEL, attention="flash")


def test_a_run_refuses_a_kernel_and_says_what_auto_took(tmp_path):
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run"}
    run = lambda **more: prepare(load_experiment(runs.REPO / "experiments/dpo_hh.py", [f"{k}={v}" for k, v in (fields | more).items()]))
    own = "xla (there is no other kernel for cpu)"
    assert words(run(**{"model.packing": 64})) == f"attention: packed rows by {own}; padded rows by {own}"
    with pytest.raises(ValueError, match="model.attention is 'splash', and splash is for TPUs, not for cpu; use model.attention=xla"):
        run(**{"model.attention": "splash"})
    with pytest.raises(ValueError, match="attention 'flash' is unknown; use auto, xla, splash, cudnn"):
        run(**{"model.attention": "flash"})


def test_a_kernel_is_not_taken_for_what_it_would_not_compute(monkeypatch):
    """Members that are trained under one vmap, and packed rows."""
    monkeypatch.setattr(kernels, "platform", lambda mesh: "gpu")
    config, mesh = default_config(), meshes.make_mesh({"fsdp": -1})
    config.ensemble.members = 3
    assert roles.attention(config, mesh) == ("xla", "cudnn does not compute the 3 members of an ensemble together")
    config.model.attention = "cudnn"
    with pytest.raises(ValueError, match="'cudnn', and cudnn does not compute the 3 members .* use model.attention=xla"):
        roles.attention(config, mesh)
    packed_here = "cudnn is for padded rows, and rows are packed here; set model.packing=-1"
    with pytest.raises(ValueError, match=f"model.attention is 'cudnn', and {packed_here}; or set model.attention=auto"):
        kernels.chosen("cudnn", LLAMA, bf16, 1024, "gpu", 256)
    assert kernels.chosen("auto", LLAMA, bf16, 1024, "gpu", 256) == ("xla", packed_here)
    assert kernels.chosen("auto", LLAMA, bf16, 64, "tpu", 256) == ("splash", "")
    many = dataclasses.replace(tiny.MODEL, head_dim=128, num_attention_heads=64, num_key_value_heads=1)
    found, why = kernels.chosen("auto", many, bf16, 1024, "tpu", 256)
    assert found == "xla" and "holds 32 MiB for the 64 query heads of a key-value head in packed rows, more than 15" in why
    assert kernels.chosen("auto", many, bf16, 1024, "tpu") == ("splash", "")


@pytest.fixture
def v5e(tpu_slice):
    """A mesh of the 4 chips of a v5e:2x2 that is not here."""
    return tpu_slice("v5e:2x2", {"fsdp": 2, "tensor": 2})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "head, changes",
    [(64, {}), (128, {"sliding_windows": (0, 256), "attn_logit_softcapping": 50.0})],
    ids=str,
)
def test_a_tpu_program_has_the_splash_kernel_and_no_scores(head, changes, v5e):
    """The forward and the backward pass of a Llama; the xla path's blocks of scores [R, KV, G, t, s] are what is looked for."""
    T = 1024
    config = dataclasses.replace(
        tiny.MODEL, head_dim=head, hidden_size=4 * head, intermediate_size=320, vocab_size=2000, max_position_embeddings=T, **changes
    )
    params = parameters.abstract_params(config, v5e)
    shape = lambda dtype: jax.ShapeDtypeStruct((4, 2, T), dtype, sharding=meshes.batch_sharding(v5e))
    batch = {"tokens": shape(jnp.int32), "mask": shape(bool), "completion_mask": shape(bool)}

    def hlo(name):
        apply = transformer.forward(config, dtype=jnp.bfloat16, mesh=v5e, attention=name)
        program = jax.jit(jax.value_and_grad(lambda params, batch: apply(params, batch).logps.sum()))
        return program.trace(params, batch).lower(lowering_platforms=("tpu",)).compile().as_text()

    # The xla path's scores of 128 queries with the keys up to their end: 640, 768 and 896 are sizes of nothing else here.
    scores = lambda text: {
        x for x in re.findall(r"[a-z]+\d+\[([\d,]+)\]", text) if {"128"} < set(x.split(",")) & {"128", "640", "768", "896"}
    }
    own, plain = hlo("auto"), hlo("xla")
    for phase in "fwd", "dq", "dkv":
        assert f"splash_mha_{phase}" in own and f"splash_mha_{phase}" not in plain
    assert "tpu_custom_call" in own and "tpu_custom_call" not in plain
    assert scores(plain) and not scores(own) and f"{T},{T}" not in own, (scores(plain), scores(own))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("llama", "T"), [("1B", 2048), ("1B", 8192), ("8B", 2048), ("8B", 8192)])
def test_splash_moves_an_eighth_of_the_bytes_of_xla_attention(llama, T, v5e):
    """One layer's attention of 8,192 tokens on one chip, forward and backward: the table of docs/performance.md, "Compiled for TPUs"."""
    config, R, mesh = LLAMAS[llama], 8192 // T, meshes.make_mesh({}, v5e.devices.flat[:1])
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=meshes.sharding(mesh))
    heads = lambda n: shape(bf16, R, T, config[n], config["head_dim"])
    q, k, mask = heads("num_attention_heads"), heads("num_key_value_heads"), shape(jnp.bool_, R, T)

    def compiled(kernel):
        def run(q, k, v, mask, dout):
            out, pull = jax.vjp(lambda *x: kernels.attend(kernel, *x, mask, mesh), q, k, v)
            return out, pull(dout)

        program = jax.jit(run).trace(q, k, k, mask, q).lower(lowering_platforms=("tpu",)).compile()
        return program.as_text(), program.cost_analysis()["bytes accessed"]

    (text, around), (_, plain) = compiled("splash"), compiled("xla")
    print(f"xla {plain / 1e9:.2f} GB, splash's program {around / 1e9:.2f}, its kernels {kernel_bytes(text) / 1e9:.2f}")
    assert 0 < 8 * kernel_bytes(text) < plain


@pytest.mark.slow
@pytest.mark.parametrize("axis", runs.long_but(["fsdp", "context"], "context"))
def test_a_tpu_program_of_packed_rows_has_the_kernel_and_no_scores(axis, tpu_slice):
    """The forward and the backward pass of a Llama whose pairs share their prompt; XLA's scores of two blocks are [KV, G t, s]."""
    v5e = tpu_slice("v5e:2x2", {axis: 2, "tensor": 2})
    shards = meshes.batch_shards(v5e)
    config = dataclasses.replace(
        tiny.MODEL, head_dim=64, hidden_size=384, intermediate_size=320, vocab_size=2000, num_attention_heads=12, num_key_value_heads=4
    )
    params = parameters.abstract_params(config, v5e)
    shape = lambda dtype: jax.ShapeDtypeStruct((4, 2, 512), dtype, sharding=meshes.batch_sharding(v5e))
    batch = Packed(
        {"tokens": shape(jnp.int32), "mask": shape(bool), "completion_mask": shape(bool)},
        Form(4096 // shards, shards, True, 256, context=v5e.shape["context"]),
    )

    def lowered(name):
        apply = transformer.forward(config, dtype=jnp.bfloat16, mesh=v5e, attention=name)
        program = jax.jit(jax.value_and_grad(lambda params, batch: apply(params, batch).logps.sum()))
        return program.trace(params, batch).lower(lowering_platforms=("tpu",))

    own, plain = lowered("auto"), lowered("xla")
    scores = "2x768x256xf32"  # of a device's two key-value heads
    assert scores in plain.as_text() and scores not in own.as_text()
    compiled = own.compile().as_text()
    for name in "forward", "backward_queries", "backward_keys":
        assert f"{name}_packed_attention" in compiled and f"{name}_packed_attention" not in plain.as_text()


@pytest.mark.slow
def test_a_tpu_program_keeps_attention_or_moves_inputs_to_the_host(v5e):
    """The forward pass of splash runs once under "attention" and twice under "full"; under "offload" arrays are in the host's memory."""
    config = dataclasses.replace(tiny.MODEL, head_dim=64, hidden_size=256, num_hidden_layers=4)
    params = parameters.abstract_params(config, v5e)
    shape = lambda dtype: jax.ShapeDtypeStruct((4, 2, 128), dtype, sharding=meshes.batch_sharding(v5e))
    batch = {"tokens": shape(jnp.int32), "mask": shape(bool), "completion_mask": shape(bool)}
    found = {}
    for remat in ("full", "attention", "offload"):
        apply = transformer.forward(config, dtype=jnp.bfloat16, mesh=v5e, attention="splash", remat=remat)
        program = jax.jit(jax.grad(lambda params, batch, apply=apply: apply(params, batch).logps.sum()))
        compiled = program.trace(params, batch).lower(lowering_platforms=("tpu",)).compile()
        calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line and "splash_mha_fwd" in line]
        found[remat] = len(calls), compiled.memory_analysis().host_temp_size_in_bytes
    print(found)
    assert found["full"][0] == 2 and found["attention"][0] == 1
    inputs = 4 * 4 * 128 * 256 * 2  # of 4 layers, [R, T, D] of a device in bfloat16
    assert found["offload"][1] >= inputs and found["full"][1] == found["attention"][1] == 0


@pytest.mark.parametrize("kind", runs.slow_but(["xla", "packed", "cudnn"], "xla"))
def test_attention_that_is_kept_is_not_computed_again(kind, monkeypatch):
    """The backward pass under `remat` "attention" has no forward pass of a kernel; under "full" it has one."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    q, k, mask = shape(2, 128, 4, 64), shape(2, 128, 2, 64), jnp.ones((2, 128), bool)
    if kind == "cudnn":  # of JAX's kernel what can be traced without a GPU
        for name, answer in (
            ("check_cudnn_version", 91000),
            ("check_is_flash_attention", None),
            ("is_cuda_compute_capability_equal", False),
        ):
            monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer, **__: answer)
    sight = laid_out(packed(tiny.batch(B=2), shards=1)).sight if kind == "packed" else None
    P = sight.positions.size if sight is not None else 0
    run, mark, backward, arrays = {
        "xla": (lambda *x: attention(*x, mask), " exp ", 2, (q, k, k)),  # the backward pass of two blocks of queries
        "packed": (packed_attention, "while[", 1, (shape(1, P, 4, 64), shape(1, P, 2, 64), shape(1, P, 2, 64), sight)),
        "cudnn": (lambda *x: kernels.cudnn(*x, mask), "dot_product_attention_fwd", 0, (q, k, k)),
    }[kind]

    def count(remat):
        own: Any = jax.checkpoint(run, policy=transformer.REMAT[remat])
        return str(jax.make_jaxpr(jax.grad(lambda *x: own(*x).astype(jnp.float32).sum(), (0, 1, 2)))(*arrays)).count(mark)

    forward = count("attention") - backward
    assert forward > 0 and count("full") == 2 * forward + backward
