"""New special tokens for a model folder: control tokens that prompts may hold, and that the model never predicts."""

import dataclasses
import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from alignax import output, paths
from alignax.distributed import is_main, together
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.transformer import ModelConfig
from alignax.types import Params


def with_tokens(
    folder: str | os.PathLike, out: str | os.PathLike, tokens: Sequence[str], seed: int = 0, dtype: str = "float32"
) -> list[int]:
    """Writes a copy of a model folder with new special tokens, and returns the ids of these tokens in order.

    Transformers loads the new folder too. New embedding rows are drawn from a normal distribution with the mean and the standard
    deviation, in each dimension, of the old rows, as in Quark (Lu et al. 2022, arXiv:2205.13636). An untied output layer gets new
    rows in the same way.

    The model reads the new tokens and never predicts them: `predicted_tokens` in config.json leaves them out of every distribution, for
    samples and for log-probs. `suppress_tokens` in the generation config keeps transformers from sampling them.

    Every process must call this; process 0 writes.

    Args:
      folder: a Hugging Face model folder with a tokenizer.
      out: the new folder, which must not exist. It appears whole or not at all.
      tokens: texts, none of which is a token of the tokenizer.
      seed: the random seed of the new rows.
      dtype: the dtype of the written weights: "float32", "bfloat16" or "float16".

    Raises:
      ValueError: for an `out` that exists, for tokens that the tokenizer has or that are equal to each other, and for a tokenizer with
        unused ids between its tokens or with more tokens than the embedding has rows.
    """
    from transformers import AutoTokenizer

    out, source = paths.of(out), hf.open_folder(folder)
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; choose another place for the model with added tokens, or remove it")
    with paths.small_copy(source.path) as small:
        tokenizer = AutoTokenizer.from_pretrained(str(small), local_files_only=True, trust_remote_code=False)
    if known := sorted(set(tokens) & tokenizer.get_vocab().keys()):
        raise ValueError(f"the tokenizer in {str(source.path)!r} has a token {known[0]!r}; choose other texts")
    first = len(tokenizer)
    if max(tokenizer.get_vocab().values()) >= first:
        raise ValueError(f"the ids of the {first} tokens of the tokenizer in {str(source.path)!r} have gaps, so alignax adds no token")
    if first > (rows := source.config.vocab_size):
        raise ValueError(
            f"the tokenizer in {str(source.path)!r} has {first} tokens, but the embedding has {rows} rows; resize the embedding first "
            "(resize_token_embeddings of transformers)"
        )
    if tokenizer.add_tokens(list(tokens), special_tokens=True) < len(tokens):
        raise ValueError(f"the tokens {list(tokens)} are not all different; give each a text of its own")
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    params = grown(hf.load_params(source, make_mesh({"fsdp": -1})), source.config, first, len(ids), jax.random.key(seed))
    new = {"vocab_size": params["embed"].shape[0], "predicted_tokens": source.config.predicted_tokens or first}
    shaped = {name: dataclasses.replace(getattr(source, name), **new) for name in ("config", "stored")}
    with output.folder(out, "added tokens") as half:
        hf.export(params, source._replace(hf=source.hf | new, **shaped), half, dtype)
        with together():
            if is_main():
                tokenizer.save_pretrained(half)
                fields = hf.generation_config(source)
                quiet = sorted({*(fields.get("suppress_tokens") or ()), *ids})
                (half / hf.GENERATION).write_text(json.dumps(fields | {"suppress_tokens": quiet}, indent=2) + "\n")
    return ids


def grown(params: Params, config: ModelConfig, first: int, count: int, key: jax.Array) -> Params:
    """Parameters with `count` new tokens from id `first` on: rows of the embedding [V, D], columns of an untied output layer [D, V].

    The new rows overwrite padding rows of the old embedding. V grows only if these are too few.
    """

    def rows(weight: jax.Array, key: jax.Array) -> jax.Array:  # [V, D]
        there = weight[:first]
        drawn = there.mean(0)[None] + there.std(0)[None] * jax.random.normal(key, (count, weight.shape[1]))
        return jnp.concatenate([there, drawn, weight[first + count :]])

    embed, head = jax.random.split(key)
    out = params | {"embed": rows(params["embed"], embed)}
    return out | ({} if config.tie_word_embeddings or config.num_labels else {"lm_head": rows(params["lm_head"].T, head).T})
