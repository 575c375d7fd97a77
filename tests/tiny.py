"""Small things that several tests build: a Llama folder with a tokenizer, random batches, preference files."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alignax.models import parameters, transformer
from alignax.types import Batch, Outputs, Params

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
MODEL = transformer.ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip


def params(config: transformer.ModelConfig = MODEL, seed: int = 0):
    return nn.unbox(transformer.init(config, jax.random.key(seed)))


def batch(B: int = 4, N: int = 2, T: int = 24, V: int = 96, seed: int = 0) -> dict[str, jax.Array]:
    """Random ragged rows: prompts of 2 to 6 tokens, completions of 3 tokens up to the end."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(2, 7, (B, 1, 1))
    length = prompt + rng.integers(3, T - 6, (B, N, 1))
    t = np.arange(T)
    mask = t < length
    tokens = np.where(mask, rng.integers(3, V, (B, N, T)), 0)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "mask": jnp.asarray(mask),
        "completion_mask": jnp.asarray(mask & (t >= prompt)),
    }


def plain_params(V: int = 96, D: int = 8, seed: int = 0) -> Params:
    """Parameters of `plain_apply`."""
    embed, head, other = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal
    return {"embed": normal(embed, (V, D)), "head": normal(head, (D, V)), "bias": 0.1 * normal(other, (V,))}


def plain_apply(params: Params, batch: Batch, teacher: Params | None = None) -> Outputs:
    """A model as a user might write one, quick to compile: a token's predictor sees the token before it.

    A response's score is read off its last scored token, a critic's value off the token before; with a teacher, its KL to the model is
    there too.
    """
    before = batch["tokens"][:, :, :-1]
    predict = lambda params: jax.nn.log_softmax(jnp.tanh(params["embed"])[before] @ params["head"] + params["bias"][None, None, None])
    scored = lambda x: jnp.where(batch["completion_mask"], jnp.pad(x, ((0, 0), (0, 0), (1, 0))), 0.0)
    p = predict(params)  # [B, N, T - 1, V]
    logps = jnp.take_along_axis(p, batch["tokens"][:, :, 1:, None], axis=-1)[..., 0]
    mask = batch["completion_mask"]
    last = mask & ~jnp.pad(mask[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    scores = jnp.where(last, jnp.tanh(params["embed"])[batch["tokens"], 0], 0.0).sum(-1)
    q = None if teacher is None else predict(teacher)
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
    m = None if q is None else jnp.logaddexp(p, q) - jnp.log(2.0)
    return Outputs(
        scored(logps),
        scored(-jnp.sum(jnp.exp(p) * p, axis=-1)),
        scored(jax.lax.stop_gradient(jax.nn.logsumexp(2 * p, axis=-1))),
        None if q is None else scored(kl(q, p)),
        None if q is None else scored(kl(p, q)),
        scores,
        scored(jnp.tanh(params["embed"])[before, 1]),
        None if q is None else scored(0.5 * (kl(p, m) + kl(q, m))),
    )


def with_reference(batch: Batch, apply=plain_apply, params: Params | None = None) -> Batch:
    """The batch and another model's `ref_logps`."""
    return batch | {"ref_logps": apply(plain_params(seed=1) if params is None else params, batch).logps}


def tokenizer():
    """Characters of a small alphabet, with <s> put in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 123))])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def byte_tokenizer(template: str | None = None, eos: str = "<|im_end|>"):
    """Bytes and a few merges, perhaps with a chat template; <s> is put in front of plain text."""
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(["the assistant is a user of the system"], trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = template
    return tokenizer


def folder(path: Path, **changes) -> Path:
    """A Hugging Face folder: config, tokenizer, and random weights."""
    from alignax.mesh import make_mesh
    from alignax.models import hf

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    source = hf.open_folder(path)
    hf.export(parameters.init_params(source.config, make_mesh({"fsdp": -1}), jax.random.key(1)), source, path)
    return path


def pairs(path: Path, n: int = 40, seed: int = 0) -> Path:
    """A JSONL file of preference pairs: the chosen answer says yes, the rejected one no."""
    rng = np.random.default_rng(seed)
    word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(2, 6)))
    rows = [{"prompt": f"Is {word()} {i}?", "chosen": f" yes {word()}", "rejected": f" no {word()} {word()}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
