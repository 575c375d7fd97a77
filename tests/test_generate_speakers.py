"""Speakers: combinations are those of whole forward passes, processors change what is sampled, and one of one's own is sampled from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax.generate import Completions, Generator, Sampling, Shape, Speaker, combined, processed, sampled_batch, speaker
from alignax.generate.sampling import penalised
from alignax.mesh import make_mesh
from alignax.models import parameters
from alignax.models.heads import NEVER
from alignax.models.transformer import Decoder, ModelConfig, head_weight

GREEDY = Sampling(temperature=0.0)
STOPS = (2, 5, 6, 7)
SHAPE = Shape(prompt=8, new=12, slots=8, prefill=8, chunk=5)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(11, 96, size).tolist() for size in (8, 1, 5, 3, 8, 2, 6)]
KEY = jax.random.key(0)
LARGE = dataclasses.replace(tiny.MODEL, hidden_size=48, num_hidden_layers=3, num_key_value_heads=4, tie_word_embeddings=False)
MODELS = (LARGE, tiny.MODEL, tiny.MODEL)
TREES = tuple(tiny.params(config, seed) for seed, config in enumerate(MODELS))


# --- combinations of models ---


@functools.cache
def whole(config: ModelConfig):
    """The jitted forward pass of whole rows: logits [R, T, V] behind every token."""

    def logits(params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return Decoder(config).apply({"params": params}, tokens, mask)[0] @ head_weight(config, params)

    return jax.jit(logits)


def mixed(coefficients: tuple[float, ...], batch: dict[str, np.ndarray]) -> np.ndarray:
    """log-probs [R, T, V] of the next token, by a forward pass of each model."""
    tokens, mask = batch["tokens"][:, 0], batch["mask"][:, 0]
    z = np.sum([c * np.float64(whole(own)(tree, tokens, mask)) for c, own, tree in zip(coefficients, MODELS, TREES, strict=True)], axis=0)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def differences(completions: Completions, coefficients: tuple[float, ...]) -> tuple[float, float]:
    """The differences of log-probs from whole forward passes, and the distance of tokens below the most probable one."""
    batch = sampled_batch(PROMPTS, completions)
    right, scored = mixed(coefficients, batch)[:, :-1], batch["completion_mask"][:, 0, 1:]
    own = np.take_along_axis(right, batch["tokens"][:, 0, 1:, None], -1)[..., 0]
    logps = np.zeros(scored.shape)
    logps[scored] = completions.logps[completions.mask]
    return np.abs(own - logps)[scored].max(), (right.max(-1) - own)[scored].max()


def proxy(sampling: Sampling, mesh=None) -> Completions:
    """Completions of the large model, steered by what the tuned small one says more than the untuned one."""
    large, small = speaker(LARGE, mesh=mesh), speaker(tiny.MODEL, mesh=mesh)
    generate = Generator(combined([large, small, small], [1.0, 1.0, -1.0]), SHAPE, sampling, stop_ids=STOPS)
    layout = lambda config: jax.tree.map(lambda x: x.sharding, parameters.abstract_params(config, mesh))
    trees = TREES if mesh is None else tuple(jax.device_put(tree, layout(own)) for tree, own in zip(TREES, MODELS, strict=True))
    return generate(trees, PROMPTS, KEY)


on_one_device = functools.cache(proxy)


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(Sampling(), marks=pytest.mark.slow)], ids=["greedy", "sampled"])
def test_proxy_tuning_is_the_combination_of_whole_forward_passes(sampling):
    out = on_one_device(sampling)
    gap, below = differences(out, (1.0, 1.0, -1.0))
    assert gap < 1e-5 and not out.exact
    assert below < 1e-5 if sampling == GREEDY else below > 0.1, "greedy tokens are the most probable ones of the combination"
    assert out.mask.sum() > 40 and len(set(out.tokens[out.mask].tolist())) > 8
    assert min(differences(out, (1.0, 0.0, 0.0))) > 0.1, "the large model alone says something else"


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_proxy_tuning_on_a_mesh(sampling):
    out, one = proxy(sampling, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})), on_one_device(sampling)
    np.testing.assert_array_equal(out.tokens, one.tokens)
    np.testing.assert_allclose(out.logps, one.logps, atol=1e-5)


# --- speakers of one's own: a table of bigrams, quick to compile ---

V = 12
TABLE = RNG.normal(size=(V, V)).astype(np.float32)
OTHER = RNG.normal(size=(V, V)).astype(np.float32)
FEW = Shape(prompt=2, new=6, slots=8, prefill=8, chunk=6)


def bigrams(size: int = V, mesh=None) -> Speaker:
    """Logits of the next token are a row of the table, which is its parameters; it needs no cache."""

    def logits(table, head, cache, tokens, at):
        return table[jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]], cache

    nothing = lambda *_: ()
    return Speaker(size, size, 64, True, mesh, nothing, nothing, nothing, nothing, logits)


def said(own: Speaker, params, sampling: Sampling = GREEDY) -> Completions:
    return Generator(own, FEW, sampling)(params, [[t] for t in range(V)], KEY)


def greedy(table: np.ndarray) -> list[list[int]]:
    """The greedy completions of a table of logits, one for each first token."""
    rows = []
    for t in range(V):
        row = [t]
        for _ in range(FEW.new):
            row.append(int(table[row[-1]].argmax()))
        rows.append(row[1:])
    return rows


def test_a_speaker_of_ones_own_is_sampled_from():
    out = said(bigrams(), TABLE)
    assert out.tokens[:, 0].tolist() == greedy(TABLE) and out.of_model and not out.exact
    drawn = said(bigrams(), TABLE, Sampling())
    logps = jax.nn.log_softmax(TABLE)
    before = np.concatenate([np.arange(V)[:, None], drawn.tokens[:, 0, :-1]], axis=1)
    np.testing.assert_allclose(drawn.logps[:, 0], logps[before, drawn.tokens[:, 0]], atol=1e-6)
    assert drawn.exact and drawn.tokens[:, 0].tolist() != greedy(TABLE)


def test_identities_of_a_combination():
    """The shift that tuning brings to a small model brings a large one to its own tuned self; without a shift nothing changes."""
    three = lambda a: combined([bigrams()] * 3, [1.0, a, -a])
    shift = RNG.normal(size=(V, V)).astype(np.float32)
    assert said(three(1.0), (TABLE, OTHER + shift, OTHER)).tokens[:, 0].tolist() == greedy(TABLE + shift) != greedy(TABLE)
    alone = said(bigrams(), TABLE)
    for coefficient, tuned in ((1.0, OTHER), (0.0, OTHER + shift)):
        out = said(three(coefficient), (TABLE, tuned, OTHER))
        np.testing.assert_array_equal(out.tokens, alone.tokens)
        np.testing.assert_allclose(out.logps, alone.logps, atol=1e-6)
    nested = combined([combined([bigrams()] * 2, [1.0, 2.0]), bigrams()], [0.5, -1.0])
    assert said(nested, ((TABLE, OTHER), shift)).tokens[:, 0].tolist() == greedy(0.5 * TABLE + OTHER - shift)


def test_a_token_that_one_of_them_never_predicts_is_never_sampled():
    """The token is excluded whatever the sign of that model's coefficient, and whether its logit is the smallest or -inf."""
    absent, coefficients = {4: NEVER, 7: -jnp.inf, 9: NEVER, 11: -jnp.inf}, [1.0, 0.5, -0.5, -1.0, 0.0]
    without = [processed(bigrams(), lambda z, t=t, x=x: z.at[:, t].set(x)) for t, x in absent.items()]
    own, trees = combined([bigrams(), *without], coefficients), (TABLE, *[OTHER] * 4)
    left = np.where(np.isin(np.arange(V), list(absent))[None], -np.inf, TABLE - OTHER)
    out, drawn = said(own, trees), said(own, trees, Sampling())
    assert out.tokens[:, 0].tolist() == greedy(left) != greedy(TABLE - OTHER)
    assert not np.isin(drawn.tokens, list(absent)).any() and np.isfinite(drawn.logps).all()


def test_contrastive_decoding_is_a_combination_with_a_processor():
    """log p - log q of an amateur q among the tokens with p >= 0.1 max p (Li et al. 2022, arXiv:2210.15097)."""
    plausible = lambda z: jnp.where(z >= z.max(-1, keepdims=True) + np.log(0.1), z, -jnp.inf)
    out = said(combined([processed(bigrams(), plausible), bigrams()], [1.0, -1.0]), (TABLE, OTHER))
    p = np.asarray(jax.nn.softmax(TABLE))
    score = np.where(p >= 0.1 * p.max(-1, keepdims=True), np.log(p) - jax.nn.log_softmax(OTHER), -np.inf)
    assert out.tokens[:, 0].tolist() == greedy(score) != greedy(TABLE - OTHER)


# --- processors ---


def test_a_processor_changes_logits():
    ban = jnp.isin(jnp.arange(V), jnp.arange(0, V, 2))
    out = said(processed(bigrams(), lambda logits: jnp.where(ban[None], -jnp.inf, logits)), TABLE, Sampling())
    assert (out.tokens % 2 == 1).all() and not out.exact and out.sampling.exact
    assert said(processed(bigrams(), jax.nn.log_softmax), TABLE).tokens[:, 0].tolist() == greedy(TABLE), "further parameters are its own"


def test_a_processor_sees_the_tokens_so_far():
    """The repetition penalty of `Sampling`, as a processor, gives its tokens; log-probs are then those of the penalised distribution."""
    penalty = processed(bigrams(), lambda logits, tokens, real: penalised(logits, tokens, real, 1.6))
    out, built_in = said(penalty, TABLE), said(bigrams(), TABLE, dataclasses.replace(GREEDY, repetition_penalty=1.6))
    np.testing.assert_array_equal(out.tokens, built_in.tokens)
    assert out.tokens[:, 0].tolist() != greedy(TABLE) and np.abs(out.logps - built_in.logps).max() > 0.01


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: combined([], []), "0 speakers have coefficients"),
        (lambda: combined([bigrams()], [1.0, 2.0]), r"1 speakers have coefficients \[1.0, 2.0\]; give each speaker a finite number"),
        (lambda: combined([bigrams()], [float("nan")]), r"coefficients \[nan\]"),
        (lambda: combined([bigrams(), bigrams(V + 1)], [1.0, 1.0]), "predict 12, 13 tokens; combine models with the same vocabulary"),
        (lambda: combined([bigrams(), bigrams(mesh=make_mesh({"fsdp": -1}))], [1.0, 1.0]), "on different meshes; give speaker"),
        (lambda: Generator(bigrams(), FEW, dtype=jnp.bfloat16), "a speaker already has a dtype, cache_dtype and mesh"),
        (lambda: Generator(bigrams(), FEW, cache_dtype="int8"), "a speaker already has a dtype, cache_dtype and mesh"),
        (lambda: Generator(bigrams(), FEW, stop_ids=[V]), r"stop ids \[12\] are not among the model's 12 tokens"),
        (lambda: speaker(tiny.MODEL, cache_dtype="int4"), "cache dtype 'int4' is unknown"),
        (lambda: said(processed(bigrams(), lambda z: z[:, :3]), TABLE), r"returns logits of shape \[8, 3\] for logits of shape \[8, 12\]"),
        (
            lambda: Generator(combined([speaker(LARGE), speaker(dataclasses.replace(LARGE, max_position_embeddings=16))], [1, 1]), SHAPE),
            "prompts of 8 tokens and max_new_tokens 12 exceed the model's 16 positions",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
