"""Generation: one output whatever the rows, the refilling and the mesh; log-probs that the scorer confirms; transformers' greedy tokens."""

import dataclasses
import functools
import heapq
import itertools
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch_llama

from alignax.generate import (
    LENGTH,
    STOP_ID,
    STOP_STRING,
    Completions,
    Generator,
    Sampling,
    Shape,
    Stops,
    sampled_batch,
    sampler_gap,
    shape_for,
    speaker,
    text_of,
    token_batch,
)
from alignax.generate import generator as generators
from alignax.generate.engine import Engine
from alignax.mesh import make_mesh
from alignax.models import hf, parameters, transformer
from alignax.models.lora import MATRICES, Lora, join, quantise, split
from alignax.models.transformer import forward

SLOW = pytest.mark.slow
STOPS = (2, 5, 6, 7, 8, 9, 10)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(11, 96, size).tolist() for size in (8, 1, 5, 3, 8, 2, 6)]
PARAMS = tiny.params()
KEY = jax.random.key(0)
TRACED: list[str] = []


@functools.cache
def base() -> tuple[Generator, Completions]:
    """Three samples of each prompt, all at once, on one device. What it traces is noted in `TRACED`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "decode"):
            program = getattr(Engine, name)
            patch.setattr(Engine, name, lambda *args, name=name, program=program: TRACED.append(name) or program(*args))
        generator = Generator(tiny.MODEL, Shape(8, 12, 21, 7, 5), stop_ids=STOPS)
    return generator, generator(PARAMS, PROMPTS, KEY, n=3)


@functools.cache
def scored(config: transformer.ModelConfig):
    return jax.jit(forward(config, remat="none"))


def gap(config, params, prompts, completions) -> float:
    """max |logp(sampled) - logp(scored)|."""
    batch = sampled_batch(prompts, completions)
    return float(sampler_gap(scored(config)(params, batch).logps, batch))


def same(a: Completions, b: Completions) -> None:
    for x, y in ((a.tokens, b.tokens), (a.mask, b.mask), (a.ended, b.ended)):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


# --- what is sampled ---


def test_completions_end_where_they_must():
    _, out = base()
    lengths = out.mask.sum(-1)
    assert out.tokens.shape == (7, 3, 12) and (out.mask == (np.arange(12) < lengths[..., None])).all()
    assert not out.tokens[~out.mask].any() and not out.logps[~out.mask].any() and (out.logps[out.mask] < 0).all()
    stopped = np.isin(out.tokens, STOPS) & out.mask
    last = np.take_along_axis(stopped, lengths[..., None] - 1, -1)[..., 0]
    assert (stopped.sum(-1) == last).all(), "a stop id is the last token, and there is none before"
    np.testing.assert_array_equal(out.ended, np.where(last, STOP_ID, LENGTH))
    assert (lengths[out.ended == LENGTH] == 12).all() and 3 < (out.ended == STOP_ID).sum() < 21
    distinct = {tuple(row) for rows in out.rows() for row in map(np.ndarray.tolist, rows)}
    assert len(distinct) == 21, "samples of a prompt differ"


def test_the_scorer_confirms_the_samplers_log_probs():
    assert 0 < gap(tiny.MODEL, PARAMS, PROMPTS, base()[1]) < 1e-5


@pytest.mark.parametrize(
    "shape", [Shape(8, 12, 3, 2, 8), pytest.param(Shape(8, 12, 1, 1, 4), marks=SLOW), pytest.param(Shape(9, 12, 5, 7, 1), marks=SLOW)]
)
def test_rows_and_refilling_change_nothing(shape):
    out = Generator(tiny.MODEL, shape, stop_ids=STOPS)(PARAMS, PROMPTS, KEY, n=3)
    same(out, base()[1])
    assert out.prefills == math.ceil(7 / shape.prefill), "each prompt is read once, whatever its samples"
    if shape.slots == 1:
        assert out.steps == out.mask.sum(), "no step is wasted"


CUBE, ROW = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [(CUBE, "tensor"), *(pytest.param(CUBE, name, marks=SLOW) for name in ("train", "replicated"))]
    + [pytest.param(ROW, name, marks=SLOW) for name in ("train", "replicated", "tensor")],
)
def test_the_mesh_changes_nothing(sizes, weights, monkeypatch):
    mesh = make_mesh(sizes)
    own, shape = speaker(tiny.MODEL, mesh=mesh, weights=weights), shape_for(21, 8, 12, mesh=mesh, slots=8)
    params = jax.device_put(PARAMS, jax.tree.map(lambda x: x.sharding, parameters.abstract_params(tiny.MODEL, mesh)))
    generator = Generator(own, shape, stop_ids=STOPS)
    same(generator(params, PROMPTS, KEY, n=3), base()[1])
    # Processes whose devices have different speeds propose different numbers of steps: the least counts.
    differing = lambda steps: jax.make_array_from_callback(
        (8,), generators.every_device(mesh), lambda i: np.full(1, 2 + (i[0].start != 3), np.int32)
    )
    monkeypatch.setattr(generator, "proposed", differing)
    looks: list[None] = []
    again = generator(params, PROMPTS[:2], KEY, look=lambda: looks.append(None))
    assert len(looks) == -(-again.steps // 2)
    laid, wanted = generator.lay(params), own.laid(params)
    assert (laid is params) == (weights == "train")
    assert jax.tree.all(jax.tree.map(lambda x, w: w.sharding.is_equivalent_to(x.sharding, x.ndim), laid, wanted))


def test_a_prompts_samples_depend_on_its_number_and_the_key_alone():
    generator, out = base()
    same(generator(PARAMS, PROMPTS, KEY, n=3), out)
    fewer = generator(PARAMS, PROMPTS[:2], KEY, n=2)
    np.testing.assert_array_equal(fewer.tokens, out.tokens[:2, :2])
    assert (generator(PARAMS, PROMPTS, jax.random.key(1), n=3).tokens != out.tokens).any()
    twins = generator(PARAMS, [PROMPTS[0]] * 2, KEY)
    assert (twins.tokens[0] != twins.tokens[1]).any(), "equal prompts are sampled apart"


def test_nothing_is_compiled_again():
    generator, _ = base()
    for scale, count, n in ((1.0, 7, 3), (1.1, 2, 1), (1.2, 7, 6)):
        generator(jax.tree.map(lambda x, s=scale: s * x, PARAMS), PROMPTS[:count], jax.random.key(n), n=n)
    assert sorted(TRACED) == ["decode", "prefill"]


@pytest.mark.slow
def test_places_that_are_filled_again_waste_little():
    rng = np.random.default_rng(1)
    prompts = rng.integers(11, 96, (60, 4)).tolist()
    generator = Generator(tiny.MODEL, Shape(4, 24, 8, 8, 2), stop_ids=range(2, 18))
    out = generator(PARAMS, prompts, KEY)
    lengths = out.mask.sum(-1)[:, 0]
    static = sum(lengths[i : i + 8].max() for i in range(0, 60, 8))  # batches that wait for their longest row
    assert lengths.std() > 4 and out.steps < 0.7 * static
    free = [0] * 8  # the step at which each row is free
    for length in lengths.tolist():
        heapq.heapreplace(free, free[0] + length)
    assert out.steps == max(free), "a row begins the next completion in the step after its last one ended"


def test_a_call_takes_no_more_than_its_time(monkeypatch):
    """So that a signal is answered soon on any device: calls of 1/32 s have three times the steps of the last, those of 1/2 s have one."""
    (generator, out), proposed, steps = base(), Generator.proposed, []
    monkeypatch.setattr(Generator, "proposed", lambda self, n: steps.append(n) or proposed(self, n))
    for seconds, wanted in ((1 / 32, [1, 3, 5, 5]), (1 / 2, [1] * 12)):
        now = itertools.count(0.0, seconds)
        monkeypatch.setattr(generators, "time", SimpleNamespace(monotonic=now.__next__))
        steps.clear()
        same(generator(PARAMS, PROMPTS, KEY, n=3), out)
        assert steps == wanted


def test_samples_follow_the_distribution():
    """4,096 samples of one prompt against the probabilities of its next token, top-p applied: Pearson's statistic."""
    sampling, n = Sampling(temperature=1.5, top_p=0.9), 4096
    generator = Generator(tiny.MODEL, Shape(3, 1, 512, 1, 1), sampling)
    out = generator(PARAMS, [PROMPTS[3]], KEY, n=n)
    tokens, real = np.array([[[*PROMPTS[3], v]] for v in range(96)]), np.ones((96, 1, 4), bool)
    logps = scored(tiny.MODEL)(PARAMS, {"tokens": tokens, "mask": real, "completion_mask": real & (np.arange(4) == 3)}).logps[:, 0, 3]
    np.testing.assert_allclose(out.logps[..., 0], np.asarray(logps)[out.tokens[..., 0]], atol=1e-5)
    p = np.exp(np.asarray(logps, np.float64) / 1.5)
    order = np.argsort(-p)
    cut = np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.9) + 1
    kept = np.where(np.isin(np.arange(96), order[:cut]), p, 0.0)
    expected = n * kept / kept.sum()
    counts = np.bincount(out.tokens.ravel(), minlength=96)
    assert counts[expected == 0].sum() == 0 and 10 < cut < 90
    often = expected > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < often.sum() + 4 * np.sqrt(2 * often.sum())


# --- models and caches ---


def torch_greedy(model, prompts, new: int, **options) -> list[list[int]]:
    """Greedy completions by transformers, one prompt at a time, so that there is no padding."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
        out.append(whole[0, len(prompt) :].tolist())
    return out


FAMILIES = {
    "gemma2": {
        "query_pre_attn_scalar": 13, "sliding_window": 5, "attention_bias": True, "initializer_range": 0.3,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 13, "sliding_window": 5, "initializer_range": 0.3,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "gpt_neox": {
        "tie_word_embeddings": False, "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_moe": {
        "tie_word_embeddings": False, "num_experts_per_tok": 2, "initializer_range": 0.3, "num_experts": 8, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=SLOW) for name in ("gemma2", "gemma3_text", "gpt_neox", "qwen3_moe"))]
)
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    model = torch_llama.write(tmp_path, model_type=family, **FAMILIES[family])
    source = hf.open_folder(tmp_path)
    params = hf.load_params(source, make_mesh({}, jax.devices()[:1]))
    penalty = 1.3 if family == "gpt2" else 1.0
    greedy = Sampling(temperature=0.0, repetition_penalty=penalty)
    out = Generator(source.config, Shape(8, 16, 4, 4, 8), greedy, stop_ids=[2])(params, PROMPTS, KEY)
    theirs = torch_greedy(model, PROMPTS, 16, eos_token_id=2, repetition_penalty=penalty)
    assert [row.tolist() for (row,) in out.rows()] == theirs
    assert len({t for row in theirs for t in row}) > 4
    assert gap(source.config, params, PROMPTS, out._replace(drawn=out.logps)) < 1e-5


@pytest.mark.slow
def test_greedy_tokens_of_a_real_model(data_dir):
    folder = data_dir / "stories260k_hf"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(folder), hf.open_folder(folder)
    texts = ["Once upon a time, there was", "Lily and Tom", "The dog", "One day, a big red ball rolled down the hill and", ""]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    params = hf.load_params(source, make_mesh({}, jax.devices()[:1]))
    greedy = Sampling(temperature=0.0)
    out = Generator(source.config, Shape(max(map(len, prompts)), 96, 3, 3, 16), greedy, stop_ids=[2])(params, prompts, KEY)
    theirs = torch_greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts, 96, eos_token_id=2)
    assert [row.tolist() for (row,) in out.rows()] == theirs
    assert "Lily" in tokenizer.decode(theirs[-1])


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 1e-5, 0.03), ("int8", 1e-5, 0.1)])
@pytest.mark.slow
def test_a_smaller_cache_is_near(dtype, least, most):
    generator = Generator(tiny.MODEL, Shape(8, 12, 8, 7, 12), stop_ids=STOPS, cache_dtype=dtype)
    assert least < gap(tiny.MODEL, PARAMS, PROMPTS, generator(PARAMS, PROMPTS, KEY)) < most
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(generator.engine.empty).cache))
    whole = 2 * 2 * 8 * 2 * 20 * 8 * 4  # k and v, layers, rows, heads, places, head_dim, bytes
    assert size == (whole // 2 if dtype == "bfloat16" else whole // 4 + whole // 8)


@SLOW
def test_bfloat16_activations():
    generator = Generator(tiny.MODEL, Shape(8, 12, 8, 7, 12), stop_ids=STOPS, dtype=jnp.bfloat16)
    out = generator(PARAMS, PROMPTS, KEY)
    assert out.logps.dtype == np.float32 and 1e-4 < gap(tiny.MODEL, PARAMS, PROMPTS, out) < 0.3


@pytest.mark.slow
def test_adapters_on_an_int8_base():
    lora = Lora(rank=2, alpha=4.0, targets=MATRICES, dora=True, int8=True)
    config = dataclasses.replace(tiny.MODEL, lora=lora)
    whole = jax.jit(lambda key: nn.unbox(transformer.init(config, key)))(jax.random.key(3))
    adapters = jax.tree.map(lambda x: np.float32(x + 0.1 * RNG.normal(size=x.shape)), split(whole)[1])
    params = join(jax.jit(quantise)(PARAMS), adapters)
    out = Generator(config, Shape(8, 12, 8, 7, 12), stop_ids=STOPS)(params, PROMPTS, KEY)
    assert gap(config, params, PROMPTS, out) < 1e-5
    assert gap(tiny.MODEL, PARAMS, PROMPTS, out) > 0.1, "the adapters matter"


# --- stop strings ---


def test_stop_strings_end_a_completion_at_the_token_that_makes_them_whole():
    tokenizer = tiny.tokenizer()
    generator = Generator(tiny.MODEL, Shape(8, 12, 7, 7, 5))
    free = generator(PARAMS, PROMPTS, KEY, n=2)
    pieces = [[tokenizer.batch_decode(t[:, None]) for t in rows] for rows in free.rows()]
    wanted = ("".join(pieces[0][0][4:6]), "".join(pieces[1][1][9:12]), pieces[2][0][0])
    generator.stops = Stops(tokenizer, wanted)  # the host's alone
    out = generator(PARAMS, PROMPTS, KEY, n=2)
    for p, rows in enumerate(pieces):
        for s, row in enumerate(rows):
            ends = [i for i in range(1, 13) if any(w in "".join(row[:i]) for w in wanted)]
            end = min(ends, default=12)
            assert out.mask[p, s].sum() == end and out.ended[p, s] == (STOP_STRING if ends else LENGTH)
            np.testing.assert_array_equal(out.tokens[p, s, :end], free.tokens[p, s, :end])
    assert out.mask[0, 0].sum() <= 6 and out.mask[2, 0].sum() == 1 and (out.ended == LENGTH).any()


def test_stop_strings_across_pieces_of_a_character():
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("abc → d<|im_end|>", add_special_tokens=False)["input_ids"]
    for string, end in (("→", "abc →"), ("<|im_end|>", "abc → d<|im_end|>"), ("c →", "abc →"), ("→ d", "abc → d")):
        stops = Stops(tokenizer, (string, "zzz"))
        for seen in range(len(ids)):
            n = stops.end(np.asarray(ids), seen)
            if stops.first(stops.text(ids[:seen])) is None:
                assert n is not None and stops.text(ids[:n]) == end
    assert Stops(tokenizer, ("x",)).end(np.asarray(ids), 0) is None
    assert Stops(tokenizer, ("d", "→ d")).first("abc → d") == (4, "→ d")


@pytest.mark.parametrize(
    ("tokenizer", "text", "strings", "wanted"),
    [
        (tiny.tokenizer, "hello ab", ("ab", "a"), "hello "),
        (tiny.tokenizer, "hello a<s>b", ("a<s>",), "hello "),
        (tiny.tokenizer, "Us<s>er: x User:", ("User:",), "User: x "),  # the first of them is none: a token stands in it
        (tiny.byte_tokenizer, "hé the assistant<|im_start|>user", ("nt<|im_start|>u",), "hé the assista"),
        (tiny.byte_tokenizer, "hé→ the assistant", ("→ th",), "hé"),
    ],
)
def test_the_text_of_a_completion_ends_before_its_stop_string(tokenizer, text, strings, wanted):
    """The completion may hold special tokens, which its text leaves out."""
    tokens = np.asarray((own := tokenizer())(text, add_special_tokens=False)["input_ids"])
    stops = Stops(own, strings)
    assert text_of(tokens[: stops.end(tokens, 0)], STOP_STRING, own, stops) == wanted


def test_stop_strings_that_can_never_occur():
    with pytest.raises(ValueError, match="a stop string is empty"):
        Stops(tiny.tokenizer(), ("a", ""))
    with pytest.raises(ValueError, match=r"stop string 'aé' can never occur: the tokenizer writes 'é' as '<unk>'"):
        Stops(tiny.tokenizer(), ("aé",))
    Stops(tiny.byte_tokenizer(), ("aé\n",))


# --- batches ---


def test_a_batch_holds_prompt_and_completion_side_by_side():
    _, out = base()
    batch = sampled_batch(PROMPTS, out, 24)
    assert batch["tokens"].shape == (7, 3, 24) and {x.dtype.name for x in batch.values()} == {"int32", "bool", "float32"}
    for p, prompt in enumerate(PROMPTS):
        for s in range(3):
            row, real = out.tokens[p, s][out.mask[p, s]], batch["mask"][p, s]
            assert batch["tokens"][p, s][real].tolist() == prompt + row.tolist() and real[: len(prompt) + len(row)].all()
            np.testing.assert_array_equal(batch["tokens"][p, s][batch["completion_mask"][p, s]], row)
            np.testing.assert_array_equal(batch["sampled_logps"][p, s][batch["completion_mask"][p, s]], out.logps[p, s][out.mask[p, s]])
    assert not batch["sampled_logps"][~batch["completion_mask"]].any()
    assert token_batch(PROMPTS, out)["tokens"].shape == (7, 3, 20)
    with pytest.raises(ValueError, match="rows of 10 tokens are too short for a prompt and completion of 20 tokens; raise the length"):
        token_batch(PROMPTS, out, 10)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=0.0)])
def test_the_batch_has_the_log_probs_that_completions_were_drawn_with(sampling):
    """`sampled_logps` are those of the changed distribution; the completions also keep the model's own."""
    out = Generator(tiny.MODEL, Shape(8, 3, 7, 7, 3), sampling)(PARAMS, PROMPTS, KEY)
    logits = transformer.Decoder(tiny.MODEL).apply
    for i, prompt in enumerate(PROMPTS):
        row = np.asarray([[*prompt, *out.tokens[i, 0]]])
        hidden, _ = logits({"params": PARAMS}, row, np.ones(row.shape, bool))
        z = np.asarray(hidden[0] @ transformer.head_weight(tiny.MODEL, PARAMS), np.float64)[len(prompt) - 1 : -1]
        own = z - np.log(np.exp(z).sum(-1, keepdims=True))
        warped = own / (sampling.temperature or 1e-3)
        p = np.exp(warped - warped.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = -np.sort(-p, axis=-1)
        least = np.take_along_axis(order, (np.cumsum(order, -1) < sampling.top_p).sum(-1, keepdims=True).clip(0, 95), -1)
        p = np.where(p >= least, p, 0.0) if sampling.top_p < 1 else p
        at = lambda x, i=i: np.take_along_axis(x, out.tokens[i, 0][:, None], -1)[:, 0]
        np.testing.assert_allclose(out.drawn[i, 0], np.log(at(p / p.sum(-1, keepdims=True))), atol=2e-5)
        np.testing.assert_allclose(out.logps[i, 0], at(own), atol=2e-5)
    batch = sampled_batch(PROMPTS, out)
    np.testing.assert_array_equal(batch["sampled_logps"][batch["completion_mask"]], out.drawn[out.mask])
    np.testing.assert_array_equal(base()[1].drawn, base()[1].logps)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
def test_tokens_that_the_tokenizer_has_not_are_never_sampled(temperature):
    """A padded head and one with holes give such tokens the largest logits; scorer and sampler have the same distribution."""
    unused = ((0, 2), (20, 30), (90, 96))
    config = dataclasses.replace(tiny.MODEL, unused_tokens=unused, temperature=temperature)
    absent = np.concatenate([np.arange(*pair) for pair in unused])
    aside = PARAMS | {"embed": PARAMS["embed"].at[absent].mul(5.0)}  # which is the head too
    out = Generator(config, Shape(8, 12, 21, 7, 5))(aside, PROMPTS, KEY, n=3)
    free = Generator(dataclasses.replace(config, unused_tokens=()), Shape(8, 12, 21, 7, 5))(aside, PROMPTS, KEY, n=3)
    assert not np.isin(out.tokens[out.mask], absent).any() and np.isin(free.tokens[free.mask], absent).mean() > 0.3
    assert gap(config, aside, PROMPTS, out) < 2e-5  # at a temperature below 1 rounding of logits counts as much more
    greedy = Generator(config, Shape(8, 4, 7, 7, 4), Sampling(temperature=0.0))(aside, PROMPTS, KEY)
    assert not np.isin(greedy.tokens[greedy.mask], absent).any()


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(tiny.MODEL, Shape(8, 0, 4, 4, 4)), r"new is 0 in Shape.*1 or more"),
        (lambda: Generator(tiny.MODEL, Shape(8, 121, 4, 4, 4)), r"of 8 tokens and max_new_tokens 121.*128 positions; lower.* to 120"),
        (lambda: Generator(tiny.MODEL, Shape(128, 1, 4, 4, 4)), r"128 positions; shorten the prompts to less than 128"),
        (lambda: Generator(tiny.MODEL, Shape(8, 4, 4, 4, 4), stop_ids=[96]), r"stop ids \[96\] are not among the model's 96 tokens"),
        (lambda: Generator(tiny.MODEL, Shape(8, 4, 4, 4, 4), cache_dtype="int4"), r"cache dtype 'int4' is unknown; use float32, bf"),
        (lambda: Generator(tiny.MODEL, Shape(8, 4, 12, 8, 4), mesh=make_mesh({"fsdp": 8})), r"slots 12 do not divide into 8 batch shards"),
        (lambda: base()[0](PARAMS, PROMPTS, KEY, n=0), "n is 0; it must be 1 or more"),
        (lambda: base()[0](PARAMS, [], KEY), "there are no prompts"),
        (lambda: base()[0](PARAMS, [[3], []], KEY), "prompt 1 has 0 tokens"),
        (lambda: base()[0](PARAMS, [[3] * 9], KEY), "prompt 0 has 9 tokens; .* at most the 8 of the cache"),
        (lambda: base()[0](PARAMS, [[3, 96]], KEY), "prompt 0 holds token ids from 3 to 96; the model has 96 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_angles_that_change_with_the_length_are_refused():
    scaling = {"dynamic": (("factor", 2.0),), "longrope": (("original_max_position_embeddings", 16),)}
    for kind, options in scaling.items():
        most = 32 if kind == "dynamic" else 16
        config = dataclasses.replace(tiny.MODEL, max_position_embeddings=32, rope_scaling=(("rope_type", kind), *options))
        with pytest.raises(ValueError, match=f"exceed the model's {most} positions"):
            Generator(config, Shape(8, most - 7, 4, 4, 4))
        Generator(config, Shape(8, most - 8, 4, 4, 4))
