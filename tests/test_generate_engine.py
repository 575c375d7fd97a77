"""The programs of generation: how weights are laid out for them, what travels between devices, and prompts that are read in pieces."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_generate import KEY, PARAMS, PROMPTS, STOPS, base, same

from alignax.generate import Generator, Sampling, Shape, combined, sampled_batch, shape_for, speaker
from alignax.generate.generator import room_for
from alignax.mesh import MEMORY, device_bytes, make_mesh
from alignax.models import hf, parameters
from alignax.models.lora import MATRICES, Lora, join, quantise, split
from alignax.models.transformer import ModelConfig, forward

SLOW, LONG = pytest.mark.slow, (pytest.mark.slow, pytest.mark.long)
COLLECTIVE = re.compile(r" = (\(?.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}


def travels(hlo: str) -> list[tuple[str, int]]:
    """The collectives of all loops of a compiled program, as (operation, bytes of its result on a device); a loop's body counts once."""
    found, loops = [], {name for line in re.findall(r" while\(.*", hlo) for name in re.findall(r"body=%?([\w.\-]+)", line)}
    name, lines = "", {}
    for line in hlo.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = begin[1]
        lines.setdefault(name, []).append(line)
    for line in (line for loop in loops for line in lines[loop]):
        if hit := COLLECTIVE.search(line):
            sizes = re.findall(r"\b(\w+)\[([\d,]*)\]", hit[1])
            found.append((hit[2], sum(BYTES[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in sizes)))
    return found


# --- prompts in pieces ---


@pytest.mark.parametrize("piece", [3, pytest.param(4, marks=LONG), pytest.param(1, marks=LONG)])
def test_pieces_of_a_prompt_change_nothing(piece):
    out = Generator(speaker(tiny.MODEL, piece=piece), Shape(8, 12, 21, 7, 5), stop_ids=STOPS)(PARAMS, PROMPTS, KEY, n=3)
    same(out, base()[1])


WINDOWS = {"sliding_windows": (3, 0), "attn_logit_softcapping": 5.0}
ANGLES = {"rope_scaling": (("rope_type", "longrope"), ("short_factor", (1.0,) * 4), ("long_factor", (2.0,) * 4))}


@SLOW
@pytest.mark.parametrize(
    ("fields", "cache"),
    [
        pytest.param(WINDOWS, "", id="windows"),
        pytest.param({"positions": "learned"}, "", id="learned", marks=pytest.mark.long),
        pytest.param(ANGLES | {"max_position_embeddings": 20}, "", id="longrope", marks=pytest.mark.long),
        pytest.param({}, "int8", id="int8", marks=pytest.mark.long),
    ],
)
def test_pieces_of_every_kind_of_model(fields, cache):
    """Also with an int8 cache, whose keys a later piece reads as they were before they were rounded."""
    config = dataclasses.replace(tiny.MODEL, **fields)
    params = tiny.params(config)
    whole, pieces = (
        Generator(speaker(config, cache_dtype=cache, piece=piece), Shape(8, 12, 7, 7, 12), stop_ids=STOPS)(params, PROMPTS, KEY)
        for piece in (8, 3)
    )
    same(pieces, whole)


@SLOW
@pytest.mark.parametrize("weights", [pytest.param("train", marks=pytest.mark.long), "tensor"])
def test_pieces_on_a_mesh(weights):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    generator = Generator(speaker(tiny.MODEL, mesh=mesh, weights=weights, piece=3), shape_for(21, 8, 12, mesh=mesh), stop_ids=STOPS)
    params = jax.device_put(PARAMS, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh)))
    same(generator(params, PROMPTS, KEY, n=3), base()[1])


def test_no_activation_has_the_length_of_the_prompt():
    """The memory of reading a prompt grows with its length by the cache alone."""
    own = speaker(dataclasses.replace(tiny.MODEL, max_position_embeddings=4096), piece=32)
    read = lambda P: jax.make_jaxpr(own.read)(PARAMS, jnp.zeros((2, P), jnp.int32), jnp.ones((2, P), bool))
    sizes = {x.aval.size for eqn in flat(read(1024).jaxpr) for x in eqn.outvars}
    cache = 2 * 2 * 2 * 1024 * 8  # [L, R, KV, P, h]
    assert max(sizes) == cache and max(sizes - {cache, cache // 2}) < 2 * 1024 * tiny.MODEL.hidden_size


def flat(jaxpr):
    """All equations of a program, with those of its loops and calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from flat(getattr(inner, "jaxpr", inner))


# --- weights laid out for decoding ---


def test_one_device_copies_weights_only_into_another_dtype():
    same_dtype, half = (Generator(speaker(tiny.MODEL, dtype), Shape(8, 12, 7, 7, 5)) for dtype in (jnp.float32, jnp.bfloat16))
    assert same_dtype.lay(PARAMS) is PARAMS and "lay" not in same_dtype.programs(PARAMS)
    laid = half.lay(PARAMS)
    assert laid["layers"]["q"].dtype == laid["embed"].dtype == jnp.bfloat16 and laid["layers"]["mlp_norm"].dtype == jnp.float32
    assert half.lay(laid) is laid and "lay" in half.programs(PARAMS)


@SLOW
def test_a_copy_in_bfloat16_gives_the_same_numbers():
    kept, copied = (
        Generator(speaker(tiny.MODEL, jnp.bfloat16, weights=weights), Shape(8, 12, 7, 7, 5), stop_ids=STOPS)(PARAMS, PROMPTS, KEY)
        for weights in ("train", "auto")
    )
    same(copied, kept)


KINDS = {
    "experts": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "dora": {"lora": Lora(4, 8.0, ("q", "v", "o", "down"), dora=True)},
    "int8": {"lora": Lora(4, 8.0, ("q", "up"), int8=True)},
    "biases": {"predicted_tokens": 91, "positions": "learned", "norm": "layer", "attention_bias": True, "mlp_bias": True},
    "odd": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 2, "qk_norm": "head"},  # 6 columns over 4 parts: whole
}


@SLOW
@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        pytest.param(weights, kind, marks=() if (weights, kind) == ("tensor", "experts") else pytest.mark.long)
        for kind in KINDS
        for weights in ("replicated", "tensor")
    ],
)
def test_layouts_of_every_kind_of_model(weights, kind):
    config, mesh = dataclasses.replace(tiny.MODEL, **KINDS[kind]), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = tiny.params(config)
    if config.lora and config.lora.int8:
        trunk, adapters = split(params)
        params = join(quantise(trunk), adapters)
    alone = Generator(config, Shape(8, 12, 8, 8, 5), stop_ids=STOPS)(params, PROMPTS, KEY)
    on_mesh = jax.device_put(params, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(config, mesh)))
    own = Generator(speaker(config, mesh=mesh, weights=weights), Shape(8, 12, 8, 8, 5), stop_ids=STOPS)
    same(own(on_mesh, PROMPTS, KEY), alone)


@pytest.mark.long
@SLOW
def test_combined_speakers_are_laid_out_each():
    mesh = make_mesh({"fsdp": 8})
    on_mesh = jax.device_put(PARAMS, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh)))
    two = combined([speaker(tiny.MODEL, mesh=mesh, weights=name) for name in ("tensor", "replicated")], [1.5, -0.5])
    out = Generator(two, Shape(8, 12, 8, 8, 5), stop_ids=STOPS)((on_mesh, on_mesh), PROMPTS, KEY)
    same(out, Generator(tiny.MODEL, Shape(8, 12, 8, 8, 5), stop_ids=STOPS)(PARAMS, PROMPTS, KEY)._replace(of_model=False))


# --- weights in int8 ---


def drift(config, params, prompts, out):
    """logp(sampled) - logp(scored) of all tokens of completions."""
    batch = sampled_batch(prompts, out)
    logps = jax.jit(forward(config, remat="none"))(params, batch).logps
    return np.asarray(batch["sampled_logps"] - logps)[np.asarray(batch["completion_mask"])]


def test_weights_in_int8_are_the_rounded_weights():
    generator = Generator(speaker(tiny.MODEL, int8=True), Shape(8, 12, 21, 7, 12), stop_ids=STOPS)
    out = generator(PARAMS, PROMPTS, KEY, n=3)
    laid = generator.lay(PARAMS)
    assert not out.exact and generator.lay(laid) is laid and "lay" in generator.programs(PARAMS)
    layers = dict(laid["layers"])
    assert {name for name, x in layers.items() if x.dtype == jnp.int8} == set(MATRICES) and laid["embed"].dtype == jnp.float32
    layers |= {name: layers[name] * layers.pop(name + "_scale")[:, None] for name in MATRICES}
    near = jax.tree.map(lambda x, y: jnp.abs(x - y).max() / jnp.abs(y).max(), layers, PARAMS["layers"])
    assert all(near[name] < 0.51 / 127 for name in MATRICES)
    rounded = laid | {"layers": layers, "lm_head": laid["lm_head"] * laid["lm_head_scale"][None]}
    untied = dataclasses.replace(tiny.MODEL, tie_word_embeddings=False)
    assert np.abs(drift(untied, rounded, PROMPTS, out)).max() < 1e-5


@SLOW
def test_weights_in_int8_of_a_real_model(data_dir):
    """Without rounding the largest drift is 3e-5 here. Greedy tokens part late, where two tokens are almost equally likely."""
    source = hf.open_folder(data_dir / "stories260k_hf")
    params = hf.load_params(source, make_mesh({}, jax.devices()[:1]))
    prompts = [[1], [1, 403, 407], [1, 410], [1, 385, 300, 20]]
    make = lambda int8, how: Generator(speaker(source.config, int8=int8), Shape(8, 96, 32, 4, 96), how, stop_ids=[2])
    out = make(True, None)(params, prompts, KEY, n=8)
    found = drift(source.config, params, prompts, out)
    print("drift", np.abs(found).mean(), np.abs(found).max(), "KL per token", found.mean())
    assert 1e-3 < np.abs(found).mean() < 0.04 and np.abs(found).max() < 0.6 and abs(found.mean()) < 0.005
    whole, rounded = (make(int8, Sampling(temperature=0.0))(params, prompts, KEY).tokens for int8 in (False, True))
    agreed = np.cumprod(whole == rounded, axis=-1).sum(axis=-1)
    print("greedy tokens that agree", agreed.ravel())
    assert agreed.min() > 20 and agreed.mean() > 50


def test_a_step_reads_int8():
    """No weight is converted before the loop over steps: it would be read in its dtype, at twice the bytes or more."""
    own = speaker(tiny.MODEL, int8=True)
    text = Generator(own, Shape(8, 12, 8, 8, 5), stop_ids=STOPS).programs(PARAMS)["decode"].compiled("cpu").as_text()
    entry = text[text.index("\nENTRY ") :]
    body = text.replace(entry, "")
    assert "s8[32,96]" in entry and re.search(r"= f32\[32,96\]\S* (?!parameter)", body), "the head is converted in the loop"
    for shape in ("32,96", "2,32,32", "2,32,16", "2,32,48", "2,48,32"):
        assert not re.search(rf"= (f32|bf16)\[{shape}\]", entry), shape


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=(SLOW,) if kind == "biases" else LONG) for kind in ("biases", "experts", "dora", "int8")]
)
def test_weights_in_int8_on_a_mesh(kind):
    """They travel in int8, and give the numbers of one device."""
    config, mesh = dataclasses.replace(tiny.MODEL, **KINDS[kind]), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = tiny.params(config)
    if config.lora and config.lora.int8:
        trunk, adapters = split(params)
        params = join(quantise(trunk), adapters)
    make = lambda mesh: Generator(speaker(config, mesh=mesh, weights="tensor", int8=True), Shape(8, 12, 8, 8, 5), stop_ids=STOPS)
    on_mesh = jax.device_put(params, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(config, mesh)))
    if kind == "int8":  # as a run holds it
        on_mesh = params | {"layers": params["layers"] | {name: x for name, x in on_mesh["layers"].items() if x.dtype == jnp.int8}}
    same(make(mesh)(on_mesh, PROMPTS, KEY), make(None)(params, PROMPTS, KEY))


def test_int8_travels_to_its_layout():
    mesh = make_mesh({"fsdp": 8})
    generator = Generator(speaker(tiny.MODEL, mesh=mesh, weights="replicated", int8=True), Shape(8, 12, 8, 8, 5), stop_ids=STOPS)
    text = generator.programs(parameters.abstract_params(tiny.MODEL, mesh))["lay"].compiled("cpu").as_text()
    moved = re.findall(r" = (\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    large = [(kind, math.prod(map(int, shape.split(",")))) for kind, shape in moved]
    large = [(kind, size) for kind, size in large if size > 1000]
    assert ("s8", 32 * 96) in large and [size for kind, size in large if kind != "s8"] == [96 * 32], "only the embedding is not in int8"


LLAMA = ModelConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip


@SLOW
@pytest.mark.parametrize("weights", ["tensor", pytest.param("train", marks=pytest.mark.long)])
def test_no_step_of_decode_on_a_tpu_slice_gathers_a_weight(weights, tpu_slice):
    """The control is the layout of training, whose steps gather whole matrices."""
    mesh = tpu_slice("v5e:4x4", {"fsdp": -1})
    generator = Generator(speaker(LLAMA, jnp.bfloat16, mesh=mesh, weights=weights), shape_for(64, 128, 128, mesh=mesh), stop_ids=(2,))
    program = generator.programs(parameters.abstract_params(LLAMA, mesh))["decode"]
    found = travels(program.compiled("tpu").as_text())
    smallest, layer = 2048 * 8 * 128 * 2, 2048 * 2 * (2 * 2048 + 2 * 1024 + 3 * 5632)  # bytes of k or v, and of all matrices of a layer
    print(weights, found)
    assert found, "a program without any collective is not the one that is meant"
    if weights == "train":
        assert sum(size for _, size in found) > layer
    else:
        assert max(size for _, size in found) < smallest / 4 and sum(size for _, size in found) < layer / 20
        # The one thing gathered are the embeddings of the rows' last tokens, of which a shard has some columns: they took an all-reduce.
        assert [size for name, size in found if name == "all-gather"] == [64 * 2048 * 2]
        assert {name for name, _ in found} <= {"all-gather", "all-reduce", "all-to-all", "reduce-scatter"}


# --- rows ---


def test_rows_are_those_that_fit_into_free_memory(monkeypatch):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    own = speaker(tiny.MODEL, mesh=mesh)
    assert room_for(own, 20, 1 << 30) == 64, "a CPU has 64 rows"
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(MEMORY, kind, 16 << 30)
    monkeypatch.setattr("alignax.generate.generator.platform", lambda mesh: "tpu")
    row = 2 * 2 * 1 * 20 * 8 * 4 + 16 * 96  # keys and values of 2 layers and one of 2 heads, and the logits of 96 tokens
    assert room_for(own, 20, 200 * row) == 100 * 4 and room_for(own, 20, -5) == 4 and room_for(own, 20) == 4 * ((6 << 30) // row)


def test_memory_of_a_layout():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    size = {name: device_bytes(parameters.abstract_params(tiny.MODEL, mesh, name)) for name in ("train", "replicated", "tensor")}
    whole = device_bytes(parameters.abstract_params(tiny.MODEL))
    norms = 4 * 32 * 5
    assert size["replicated"] == (whole - norms) / 2 + norms and size["tensor"] == (whole - norms) / 8 + norms
