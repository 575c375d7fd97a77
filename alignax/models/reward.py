"""What Hugging Face folders say of a reward model: a model for sequence classification, whose labels are scores."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignax.text import short

CLASSIFIER, LANGUAGE = "ForSequenceClassification", "ForCausalLM"  # end the names of their architectures
OFFSET = "score_offset"  # a leaf, and the field of config.json that holds it
VALUE = "value"  # the leaf of a critic on the policy's trunk, which no folder holds
CRITIC = "critic"  # the name of a critic of its own tree, among the policy's leaves; no folder of a policy holds it either
HEAD = ("score", OFFSET, VALUE)  # the leaves that a language model has not


def labels(hf: Mapping[str, Any], where: str = "config.json") -> int:
    """Scores that the model of a config.json gives, two being transformers' default; 0 of a language model."""
    name = (hf.get("architectures") or [""])[0]
    if not name.endswith(CLASSIFIER):
        if "For" in name and not name.endswith(LANGUAGE):
            raise ValueError(f"architectures in {where} name {short(name)}, whose head is not known; only {LANGUAGE} and {CLASSIFIER} are")
        return 0
    named = hf.get("id2label") or {}
    count = hf.get("num_labels") or (len(named) if isinstance(named, dict) else 0) or 2
    if type(count) is not int or count < 1:
        raise ValueError(f"num_labels in {where} is {short(count)}; it must be a whole number above 0")
    return count


def padding(hf: Mapping[str, Any], where: str = "config.json") -> int | None:
    """The token that a config.json pads with, if it names one."""
    pad = hf.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        raise ValueError(f"pad_token_id in {where} is {short(pad)}; it must be a token's id, or null")
    return pad


def offsets(fields: Mapping[str, Any], count: int, where: Path) -> np.ndarray:
    """What is taken from the scores: [labels] float32, 0 where a config does not say."""
    given = fields.get(OFFSET, [0.0] * count)
    if not (isinstance(given, list) and len(given) == count and all(type(x) in (int, float) and math.isfinite(x) for x in given)):
        raise ValueError(f"{OFFSET} in {where} is {short(given)}; it must be a list of {count} finite numbers")
    return np.asarray(given, np.float32)


def fields(hf: Mapping[str, Any], offset: list[float], pad: int | None) -> dict[str, Any]:
    """What an exported config.json says of the head. The offset, which transformers does not take from the scores, is a field of ours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    own = {"architectures": [NAMES[hf["model_type"]]], OFFSET: offset, "pad_token_id": hf.get("pad_token_id") if pad is None else pad}
    if labels(hf) == len(offset):  # the names that the folder had
        return own
    own |= {"num_labels": len(offset)} if "num_labels" in hf else {}  # which goes before the names
    names = [f"LABEL_{i}" for i in range(len(offset))]
    return own | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def pad_token(folder: Path) -> int | None:
    """The id that a reward model's tokenizer pads with: transformers reads the score at the last token that is not it.

    So it may not be the EOS. A tokenizer that pads with that, or not at all, pads with <unk> or <s> from here on.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # a folder of weights alone
        return None
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t not in (None, tokenizer.eos_token)]
        if not others:
            return None
        tokenizer.pad_token = others[0]
        tokenizer.save_pretrained(folder)
    return tokenizer.pad_token_id
