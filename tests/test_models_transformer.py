"""The decoder: transformers' logits, causality, padding, rematerialisation, precision, the key-value cache, sharding."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import torch
import torch_llama

from alignax import mesh as meshes
from alignax.models import hf, parameters, transformer
from alignax.models.families import rope_options
from alignax.models.lora import Lora
from alignax.models.rope import rope_angles
from alignax.models.transformer import Decoder

# head_dim 16 and theta 100 put the frequencies on all parts of every ramp, within 48 tokens.
ROPE = {"head_dim": 16, "max_position_embeddings": 128}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0]


def rope(kind: str, **options) -> dict:
    return ROPE | {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0} | options}


def yarn(**options) -> dict:
    return rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.5, **options)


LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
VARIANTS = {
    "tied, grouped": {},
    "untied, multi-head": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "theta": rope("default"),
    "linear": rope("linear", factor=3.0),
    "dynamic": rope("dynamic", factor=3.0) | {"max_position_embeddings": 32},
    "yarn": yarn(),
    "yarn, attention_factor": yarn(attention_factor=1.3),
    "yarn, mscale": yarn(mscale=1.0, mscale_all_dim=0.5),
    "yarn, mscale alone": yarn(mscale=0.7),
    "yarn, not truncated": yarn(truncate=False),
    "yarn, defaults": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "longrope": rope("longrope", **LONGROPE),
    "longrope, factor": rope("longrope", factor=2.0, **LONGROPE),
    "longrope, attention_factor": rope("longrope", attention_factor=1.3, **LONGROPE),
    "llama3": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
}


def config(variant: str = "", **changes) -> transformer.ModelConfig:
    """tiny.MODEL with the rotary options of a variant."""
    hf = VARIANTS.get(variant, {})
    rotary = {k: hf[k] for k in ROPE} | rope_options(hf) if variant else {}
    return dataclasses.replace(tiny.MODEL, **rotary | changes)


@functools.cache
def initializer(c: transformer.ModelConfig):
    return jax.jit(lambda key: nn.unbox(transformer.init(c, key)))


def init(c: transformer.ModelConfig, seed: int = 0):
    return initializer(dataclasses.replace(c, rope_scaling=()))(jax.random.key(seed))


def make_batch(tokens: np.ndarray, mask: np.ndarray, prompt: int = 3) -> dict[str, jax.Array]:
    """Rows [R, T] as a batch [R, 1, T]; all but the first `prompt` real tokens are scored."""
    scored = mask & (np.cumsum(mask, axis=1) > prompt)
    fields = {"tokens": tokens, "mask": mask, "completion_mask": scored}
    return {name: jnp.asarray(x)[:, None] for name, x in fields.items()}


@functools.cache
def forward(c: transformer.ModelConfig):
    return jax.jit(transformer.forward(c, remat="none"))


def log_probs(c: transformer.ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The log-probs of the tokens: [R, T]."""
    return np.asarray(forward(c)(init(c), make_batch(tokens, mask)).logps[:, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, tmp_path):
    model = torch_llama.write(tmp_path, **VARIANTS[variant])
    by_length = "dynamic" in variant or "longrope" in variant
    for T in (24, 48) if by_length else (48,):  # within and beyond the original context
        tokens, mask = torch_llama.rows([T, T], T)
        theirs, ours = torch_llama.torch_logits(model, tokens, mask), torch_llama.our_logits(tmp_path, tokens, mask)
        assert np.abs(theirs).max() > 2  # differences would show
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_every_variant_has_other_angles():
    place, length = jnp.arange(48)[None], jnp.array([[48]])
    angles = {v: np.stack(rope_angles(config(v), place, length)) for v in VARIANTS if "rope_parameters" in VARIANTS[v]}
    same = [(a, b) for a in angles for b in angles if a < b and np.abs(angles[a] - angles[b]).max() < 1e-2]
    assert same == [("yarn", "yarn, mscale alone")]  # one coefficient alone means nothing, to transformers either


def test_older_rope_fields_mean_the_same():
    options = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new = rope_options({"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0} | options})
    for name in ("rope_type", "type"):
        assert rope_options({"rope_scaling": {name: "llama3"} | options, "rope_theta": 100.0}) == new
    moved = {k: v for k, v in options.items() if k != "original_max_position_embeddings"} | {"rope_type": "llama3"}
    assert rope_options({"rope_scaling": moved, "rope_theta": 100.0, "original_max_position_embeddings": 32}) == new
    assert rope_options({}) == {"rope_theta": 10000.0, "rope_scaling": (("rope_type", "default"),)}


def test_yarn_without_factor_takes_the_ratio_of_contexts():
    with_factor, without = (
        config("yarn"),
        config("yarn", rope_scaling=tuple(x for x in config("yarn").rope_scaling if x[0] != "factor")),
    )
    at = (jnp.arange(48)[None], jnp.array([[48]]))
    np.testing.assert_array_equal(rope_angles(without, *at), rope_angles(with_factor, *at))


def test_logits_of_a_row_longer_than_an_attention_block(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = torch_llama.write(tmp_path, **small, max_position_embeddings=512)
    tokens, mask = torch_llama.rows([300, 280, 270], 300, left=(1,))  # padding before and after a block's end
    theirs, ours = torch_llama.torch_logits(model, tokens, mask), torch_llama.our_logits(tmp_path, tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)


def test_logits_of_padded_rows_and_their_log_probs(tmp_path):
    model = torch_llama.write(tmp_path, attention_bias=True)
    tokens, mask = torch_llama.rows([20, 13, 9, 20], 20, left=(2,))
    theirs, ours = torch_llama.torch_logits(model, tokens, mask), torch_llama.our_logits(tmp_path, tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)
    source = hf.open_folder(tmp_path)
    batch = make_batch(tokens, mask)
    out = transformer.forward(source.config)(hf.load_params(source, meshes.make_mesh({"fsdp": -1})), batch)
    distribution = torch.log_softmax(torch.tensor(theirs), -1)  # position t - 1 predicts token t
    expected = distribution[:, :-1].gather(-1, torch.tensor(tokens[:, 1:, None]))[..., 0].numpy()
    entropy = -(distribution.exp() * distribution).sum(-1)[:, :-1].numpy()
    scored = np.asarray(batch["completion_mask"][:, 0])
    assert scored.sum() == 20 + 13 + 9 + 20 - 4 * 3
    for ours, theirs in ((out.logps, expected), (out.entropy, entropy)):
        np.testing.assert_allclose(ours[:, 0, 1:], np.where(scored[:, 1:], theirs, 0), atol=1e-4, rtol=0)
        assert not np.asarray(ours)[:, 0][~scored].any()


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_scaling_by_length_goes_by_each_rows_own(variant, tmp_path):
    model = torch_llama.write(tmp_path, **VARIANTS[variant])
    tokens, mask = torch_llama.rows([48, 24], 48)
    ours = torch_llama.our_logits(tmp_path, tokens, mask)
    alone = torch_llama.torch_logits(model, tokens[1:, :24], mask[1:, :24])
    np.testing.assert_allclose(ours[1:, :24], alone, atol=1e-4, rtol=0)
    together = torch_llama.torch_logits(model, tokens, mask)
    assert np.abs(together[1:, :24] - alone).max() > 1e-2  # transformers scales all rows by the longest


def test_no_state_depends_on_a_later_token():
    c, T = config(tie_word_embeddings=False), 12
    tokens = jnp.arange(T)[None]  # all different, so a row of the embedding is the input of one position
    projection = jax.random.normal(jax.random.key(1), (c.hidden_size,))

    def states(embed: jax.Array) -> jax.Array:  # [T]
        out, _ = Decoder(c, remat="none").apply({"params": init(c) | {"embed": embed}}, tokens, tokens >= 0)
        return out[0] @ projection

    influence = np.abs(jax.jit(jax.jacobian(states))(init(c)["embed"])[:, :T]).sum(-1)  # [T states, T inputs]
    assert (influence[np.triu_indices(T, 1)] == 0).all()
    assert (influence[np.tril_indices(T)] > 1e-6).all()


@pytest.mark.parametrize("variant", runs.slow_but(["", "dynamic", "longrope"], "dynamic"))
def test_log_probs_of_a_row_do_not_depend_on_padding_or_neighbours(variant):
    c = config(variant)
    tokens, mask = torch_llama.rows([40], 40)
    alone = log_probs(c, tokens, mask)[0]
    assert (alone[3:] < 0).all()
    neighbour, full = torch_llama.rows([53], 53)
    for pad in (0, 2, 95):
        for before, after in ((0, 13), (13, 0), (6, 7)):
            around = ((0, 0), (before, after))
            padded = np.pad(tokens, around, constant_values=pad)
            both = np.concatenate([padded, neighbour]), np.concatenate([np.pad(mask, around), full])
            out = log_probs(c, *both)[0]
            np.testing.assert_allclose(out[before : before + 40], alone, atol=1e-5, rtol=0)
            assert not out[:before].any() and not out[before + 40 :].any()


KINDS = {
    "dense": {},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2},
    "adapters": {"lora": Lora(2, 4.0, ("q", "v", "down"))},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("experts", "adapters"))])
def test_rematerialisation_changes_memory_not_gradients(kind):
    """Also on a mesh, where "offload" says of every device where its inputs are."""
    c, batch = config(num_hidden_layers=4, **KINDS[kind]), tiny.batch(B=4, T=64)
    mesh, params = meshes.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4]), init(c)
    gradients, memory = {}, {}
    for remat in transformer.REMAT:
        apply = transformer.forward(c, remat=remat, mesh=mesh if remat == "offload" else None)
        gradient = jax.jit(jax.grad(lambda params, apply=apply: apply(params, batch).logps.sum()))
        compiled = gradient.lower(params).compile()
        gradients[remat], memory[remat] = jax.device_get(compiled(params)), compiled.memory_analysis().temp_size_in_bytes
    print(memory)
    assert memory["full"] < memory["attention"] < memory["dots"] < memory["none"]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients["none"]))
    assert scale > 1
    for found in gradients.values():  # within rounding: a mesh sums in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-6 * scale, rtol=0), found, gradients["none"])


@pytest.mark.parametrize("remat", ["attention", "dots"])
def test_what_is_kept_is_not_computed_again(remat):
    """Under "full" 2 products of attention run again, and 6 with weights: the output of the last one is not needed."""
    batch, params = tiny.batch(), init(tiny.MODEL)

    def count(remat):
        apply = transformer.forward(tiny.MODEL, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda params: apply(params, batch).logps.sum()))(params)).count("dot_general")

    kept = {"attention": 2, "dots": 6}[remat]
    assert count("full") - count(remat) == kept
    assert count("none") < count(remat)


@pytest.mark.slow
def test_a_teacher_gives_its_kl():
    """The oracle is the KL of whole next-token distributions, from all logits; the KL of a model from itself is 0."""
    model = dataclasses.replace(tiny.MODEL, num_hidden_layers=1)
    batch, params, other = tiny.batch(B=2, T=12), tiny.params(model, seed=0), tiny.params(model, seed=1)
    forward = jax.jit(lambda params, teacher, batch: transformer.forward(model, teacher=(model, teacher))(params, batch))

    @jax.jit
    def distribution(p):
        tokens, mask = (batch[name].reshape(4, 12) for name in ("tokens", "mask"))
        hidden, _ = transformer.Decoder(model).apply({"params": p}, tokens, mask)
        return jax.nn.log_softmax(hidden @ transformer.head_weight(model, p))

    t, p = distribution(other), distribution(params)
    kl = jnp.pad((jnp.exp(t) * (t - p)).sum(-1)[:, :-1], ((0, 0), (1, 0))).reshape(2, 2, 12)
    out = forward(params, other, batch)
    np.testing.assert_allclose(out.ref_kl, jnp.where(batch["completion_mask"], kl, 0.0), atol=1e-5)
    assert np.asarray(out.ref_kl).max() > 0.1
    np.testing.assert_allclose(forward(params, params, batch).ref_kl, 0.0, atol=1e-6)


def test_unknown_rematerialisation():
    with pytest.raises(ValueError, match=r"remat 'half' is unknown; use none, full, attention, dots, offload"):
        transformer.forward(tiny.MODEL, remat="half")


def test_offload_needs_the_memory_of_the_host():
    both = [SimpleNamespace(kind=kind) for kind in ("device", "pinned_host")]
    device = lambda kinds: SimpleNamespace(device_kind="Toy", addressable_memories=lambda: kinds)
    mesh: Any = lambda kinds: SimpleNamespace(devices=np.array([device(kinds)]))
    transformer.check_remat("offload", mesh(both))
    with pytest.raises(ValueError, match="Toy reaches no pinned_host memory, only device; use model.remat=full"):
        transformer.check_remat("offload", mesh(both[:1]))


@pytest.mark.slow
def test_bfloat16_log_probs_are_float32_and_near():
    batch, params = tiny.batch(), init(tiny.MODEL)
    scored = np.asarray(batch["completion_mask"])
    full = transformer.forward(tiny.MODEL)(params, batch)
    half = transformer.forward(tiny.MODEL, dtype=jnp.bfloat16)(params, batch)
    assert half.logps.dtype == half.entropy.dtype == jnp.float32
    gap = np.abs(half.logps - full.logps)[scored]
    # bfloat16 keeps 8 bits: logits of about 5 through two layers are off by some hundredths.
    assert 1e-4 < gap.mean() < 0.05 and gap.max() < 0.25


@pytest.mark.parametrize("variant", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dynamic", "longrope"))])
def test_cached_steps_are_the_whole_row(variant):
    # Within the original context: past it these two scalings change with the length, and cached keys keep the angles that they got.
    scaling = tuple((k, 64 if k.startswith("original") else v) for k, v in config(variant).rope_scaling)
    c = dataclasses.replace(config(variant), max_position_embeddings=64, rope_scaling=scaling)
    tokens, mask = map(jnp.asarray, torch_llama.rows([40, 33], 40))
    variables, decoder = {"params": init(c)}, Decoder(c, remat="none")
    whole, nothing = decoder.apply(variables, tokens, mask)
    assert nothing is None
    # Two prompts of 30 and 23 tokens are read at once, then ten tokens one by one, each row at its own place.
    prompts = jnp.arange(40)[None] < jnp.array([[30], [23]])
    states, cache = Decoder(c, remat="none", keep=jnp.float32).apply(variables, tokens, prompts)
    np.testing.assert_allclose(states[prompts], whole[prompts], atol=1e-5, rtol=0)
    step, row = jax.jit(decoder.apply), jnp.arange(2)
    for t in range(10):
        at = jnp.array([30, 23]) + t
        out, cache = step(variables, tokens[row, at][:, None], None, cache, at)
        np.testing.assert_allclose(out[:, 0], whole[row, at], atol=1e-5, rtol=0)


def test_initial_parameters_follow_the_seed():
    c = config(attention_bias=True, tie_word_embeddings=False)
    first, again, other = init(c), init(c), init(c, seed=1)
    for path, x in jax.tree_util.tree_leaves_with_path(first):
        name = jax.tree_util.keystr(path)
        y, z = (functools.reduce(lambda tree, k: tree[k.key], path, tree) for tree in (again, other))
        np.testing.assert_array_equal(x, y)
        if "norm" in name or "bias" in name:
            np.testing.assert_array_equal(x, np.ones_like(x) if "norm" in name else np.zeros_like(x))
        else:
            assert np.abs(x - z).max() > 0.1
            assert np.std(x) == pytest.approx(c.initializer_range, rel=0.1)
    layers = first["layers"]["q"]
    assert np.abs(layers[0] - layers[1]).max() > 0.1


def test_sharded_model_is_the_unsharded_one():
    batch, mesh = tiny.batch(), meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layout = jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh))

    def value(params, batch, mesh=None):
        out = transformer.forward(tiny.MODEL, mesh=mesh)(params, batch)
        return (out.logps + 0.1 * out.entropy).mean(), out

    gradient = jax.jit(jax.grad(value, has_aux=True), static_argnums=2)
    expected, out = gradient(init(tiny.MODEL), batch, None)
    sharded = {name: jax.device_put(x, meshes.batch_sharding(mesh)) for name, x in batch.items()}
    grads, sharded_out = gradient(jax.device_put(init(tiny.MODEL), layout), sharded, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), (grads, sharded_out), (expected, out))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("remat", runs.long_but(["full", "none"], "full"))
def test_hidden_states_of_the_layers_that_are_asked_for(remat):
    """They equal those of a model cut off after the layer, without the last norm; a loss on them reaches the layers before only."""
    c = dataclasses.replace(tiny.MODEL, num_hidden_layers=3)
    params, batch = tiny.params(c), tiny.batch(2)
    apply = transformer.forward(c, remat=remat, hidden=(0, 2))
    out, plain = jax.jit(apply)(params, batch), jax.jit(transformer.forward(c, remat=remat))(params, batch)
    np.testing.assert_array_equal(out.logps, plain.logps)
    assert list(out.hidden) == [0, 2] and out.hidden[0].shape == (*batch["tokens"].shape, c.hidden_size) and not plain.hidden
    rows = lambda x: x.reshape(-1, x.shape[-1])
    for layer in (0, 2):
        cut = dataclasses.replace(c, num_hidden_layers=layer + 1)
        own = params | {"layers": jax.tree.map(lambda x, n=layer + 1: x[:n], params["layers"])}
        normed, _ = transformer.Decoder(cut, remat="none").apply({"params": own}, rows(batch["tokens"]), rows(batch["mask"]))
        x = out.hidden[layer].reshape(normed.shape)
        scaled = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + c.rms_norm_eps) * params["norm"][None, None]
        np.testing.assert_allclose(scaled, normed, rtol=1e-5, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.square(apply(p, batch).hidden[0]).sum()))(params)
    reached = np.asarray(jnp.abs(grads["layers"]["q"]).sum(axis=(1, 2)) > 0)
    np.testing.assert_array_equal(reached, [True, False, False])
