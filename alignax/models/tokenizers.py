"""Tokenizers of model folders: loading them without remote code, and checking that models share one."""

from pathlib import Path
from typing import Any

from alignax.models import hf
from alignax.paths import small_copy
from alignax.text import one_line, short


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """Loads the tokenizer of a model folder from local files, without remote code; `vocab_size`: rows of the model's embedding.

    Raises:
      ValueError: for a tokenizer that is missing or damaged, without an EOS, or whose EOS or BOS has no row in the embedding.
    """
    from transformers import AutoTokenizer

    bare = next((name for name in ("tokenizer.model", "tekken.json") if (path / name).is_file()), "")
    if bare and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{str(path)!r} has {bare} but no tokenizer.json, without which transformers gives some texts other token ids; fetch the "
            "model's tokenizer.json too"
        )
    try:
        # No clean-up, so that a text is exactly its tokens: some folders (Llama 3's) ask to remove the spaces before punctuation.
        with small_copy(path) as folder:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), clean_up_tokenization_spaces=False, local_files_only=True, trust_remote_code=False
            )
        eos, _, _ = tokenizer.eos_token_id, max(tokenizer.get_vocab().values()), tokenizer("a")  # some damage shows only in use
    except BaseException as e:  # a damaged tokenizer.json raises a bare Exception or a Rust panic, which is no Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{str(path)!r} has no tokenizer that transformers reads ({one_line(e)}); fetch the model folder again") from e
    if eos is None:
        raise ValueError(f"the tokenizer in {str(path)!r} has no EOS token; set eos_token in its tokenizer_config.json")
    check_token("EOS", path, eos, vocab_size)
    check_token("BOS", path, tokenizer.bos_token_id, vocab_size)
    return tokenizer


def check_tokenizer(path: Path, vocab_size: int, what: str, source: hf.Source, tokenizer: Any, first: str = "the policy") -> None:
    """Refuses a model that reads a token id of another model as a different token, or not at all; it may have further tokens.

    `path`, `vocab_size` and `what` (its name in messages) are of the model; `source`, `tokenizer` and `first` of the other one.
    """
    own = {i: token for token, i in tokenizer.get_vocab().items() if i < source.config.vocab_size}
    theirs = {i: token for token, i in load_tokenizer(path, vocab_size).get_vocab().items() if i < vocab_size}
    odd = min((i for i, token in own.items() if i >= vocab_size or theirs.get(i, token) != token), default=None)
    if odd is not None:
        there = short(theirs[odd]) if odd in theirs else "no token"
        raise ValueError(
            f"{what} has another tokenizer than {first}: its id {odd} is {there}, not {short(own[odd])}; give models that share a tokenizer"
        )


def check_token(name: str, path: Path, token: int | None, vocab_size: int) -> None:
    """Refuses a special token whose id has no row in the embedding."""
    if token is not None and token >= vocab_size:
        raise ValueError(
            f"the {name} of the tokenizer in {str(path)!r} has id {token}, but the embedding has {vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
