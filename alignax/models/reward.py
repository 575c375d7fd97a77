"""Reward models in Hugging Face folders: sequence classification models, whose labels are the scores."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignax.text import short

CLASSIFIER, LANGUAGE = "ForSequenceClassification", "ForCausalLM"  # endings of architecture names
OFFSET = "score_offset"  # name of a leaf of the parameters, and of the field of config.json that stores it
VALUE = "value"  # the leaf of a critic head on the policy's trunk; no folder stores it
CRITIC = "critic"  # the name, among the policy's leaves, of a critic with a tree of its own; no policy folder stores it
HEAD = ("score", OFFSET, VALUE)  # the leaves that a language model does not have


def labels(hf: Mapping[str, Any], where: str = "config.json") -> int:
    """The number of scores of the model in a config.json: 0 for a language model, else its labels (transformers' default is 2)."""
    name = (hf.get("architectures") or [""])[0]
    if not name.endswith(CLASSIFIER):
        if "For" in name and not name.endswith(LANGUAGE):
            raise ValueError(
                f"architectures in {where} name {short(name)}, a head that alignax does not know; give a model whose name ends in "
                f"{LANGUAGE} or {CLASSIFIER}"
            )
        return 0
    named = hf.get("id2label") or {}
    count = hf.get("num_labels") or (len(named) if isinstance(named, dict) else 0) or 2
    if type(count) is not int or count < 1:
        raise ValueError(f"num_labels in {where} is {short(count)}; it must be a whole number above 0; correct the field")
    return count


def padding(hf: Mapping[str, Any], where: str = "config.json") -> int | None:
    """The id of a config.json's padding token, or None."""
    pad = hf.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        raise ValueError(f"pad_token_id in {where} is {short(pad)}; it must be the id of a token, or null; correct the field")
    return pad


def offsets(fields: Mapping[str, Any], count: int, where: Path) -> np.ndarray:
    """The offsets that are subtracted from the scores: [labels] float32, from the field `score_offset`; zeros without the field."""
    given = fields.get(OFFSET, [0.0] * count)
    if not (isinstance(given, list) and len(given) == count and all(type(x) in (int, float) and math.isfinite(x) for x in given)):
        raise ValueError(
            f"{OFFSET} in {where} is {short(given)}; it must be a list of {count} finite numbers; correct it, or delete the field"
        )
    return np.asarray(given, np.float32)


def fields(hf: Mapping[str, Any], offset: list[float], pad: int | None) -> dict[str, Any]:
    """The fields of an exported config.json that describe a reward model's head.

    The offset is a field of alignax; transformers does not subtract it from the scores.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    own = {"architectures": [NAMES[hf["model_type"]]], OFFSET: offset, "pad_token_id": hf.get("pad_token_id") if pad is None else pad}
    if labels(hf) == len(offset):  # the folder's own label names stay
        return own
    own |= {"num_labels": len(offset)} if "num_labels" in hf else {}  # this field would override the names
    names = [f"LABEL_{i}" for i in range(len(offset))]
    return own | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def pad_token(folder: Path) -> int | None:
    """The id of the padding token of a reward model's tokenizer, which must not be the EOS.

    Transformers reads the score at the last token that is not padding. So if the tokenizer pads with the EOS, or has no padding token,
    this function sets <unk> or <s> as its padding token and saves the tokenizer. None without a tokenizer or a token to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # the folder may hold weights only
        return None
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t not in (None, tokenizer.eos_token)]
        if not others:
            return None
        tokenizer.pad_token = others[0]
        tokenizer.save_pretrained(folder)
    return tokenizer.pad_token_id
