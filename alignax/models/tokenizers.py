"""Tokenizers of model folders: opened without their code, whole, and the same for models that read one another's tokens."""

from pathlib import Path
from typing import Any

from alignax.models import hf
from alignax.text import one_line, short


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The tokenizer of a model folder, from local files only; `vocab_size`: rows of the model's embedding."""
    from transformers import AutoTokenizer

    bare = next((name for name in ("tokenizer.model", "tekken.json") if (path / name).is_file()), "")
    if bare and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{str(path)!r} has {bare} and no tokenizer.json, and what transformers makes of that alone has other ids in places; "
            "fetch the model's tokenizer.json too"
        )
    try:
        # A text is what its tokens say: some folders, Llama 3's among them, ask for its spaces before punctuation to be taken out.
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), clean_up_tokenization_spaces=False, local_files_only=True, trust_remote_code=False
        )
        eos, _, _ = tokenizer.eos_token_id, max(tokenizer.get_vocab().values()), tokenizer("a")  # some damage shows only in use
    except BaseException as e:  # a damaged tokenizer.json raises a bare Exception, or a panic of Rust, which is none
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{str(path)!r} has no tokenizer that transformers reads ({one_line(e)})") from e
    if eos is None:
        raise ValueError(f"the tokenizer in {str(path)!r} has no EOS token; set eos_token in its tokenizer_config.json")
    check_token("EOS", path, eos, vocab_size)
    check_token("BOS", path, tokenizer.bos_token_id, vocab_size)
    return tokenizer


def check_tokenizer(path: Path, vocab_size: int, what: str, source: hf.Source, tokenizer: Any, first: str = "the policy") -> None:
    """Refuses a model that reads other tokens than the first, or fewer; it may have further ones."""
    own = {i: token for token, i in tokenizer.get_vocab().items() if i < source.config.vocab_size}
    theirs = {i: token for token, i in load_tokenizer(path, vocab_size).get_vocab().items() if i < vocab_size}
    odd = min((i for i, token in own.items() if i >= vocab_size or theirs.get(i, token) != token), default=None)
    if odd is not None:
        there = short(theirs[odd]) if odd in theirs else "none"
        raise ValueError(
            f"{what} has another tokenizer than {first}; they must share one (id {odd} is {there} there, {short(own[odd])} here)"
        )


def check_token(name: str, path: Path, token: int | None, vocab_size: int) -> None:
    """Refuses a special token that the embedding has no row for."""
    if token is not None and token >= vocab_size:
        raise ValueError(
            f"the {name} of the tokenizer in {str(path)!r} has id {token}, and the embedding has {vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
