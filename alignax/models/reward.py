"""What Hugging Face folders say of a reward model: a model for sequence classification, whose labels are scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLASSIFIER = "ForSequenceClassification"  # ends the name of its architecture
OFFSET = "score_offset"  # a leaf, and the field of config.json that holds it
HEAD = ("score", OFFSET)  # the leaves that a language model has not


def labels(hf: Mapping[str, Any]) -> int:
    """Scores that the model of a config.json gives, two being transformers' default; 0 of a language model."""
    if not (hf.get("architectures") or [""])[0].endswith(CLASSIFIER):
        return 0
    return hf.get("num_labels") or len(hf.get("id2label") or "12")


def fields(hf: Mapping[str, Any], offset: list[float], pad: int | None) -> dict[str, Any]:
    """What an exported config.json says of the head. The offset, which transformers does not take from the scores, is a field of ours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    own = {"architectures": [NAMES[hf["model_type"]]], OFFSET: offset, "pad_token_id": hf.get("pad_token_id") if pad is None else pad}
    if labels(hf) == len(offset):  # the names that the folder had
        return own
    names = [f"LABEL_{i}" for i in range(len(offset))]
    return own | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def pad_token(folder: Path) -> int | None:
    """The id that a reward model's tokenizer pads with: transformers reads the score at the last token that is not it.

    So it may not be the EOS. A tokenizer that pads with that, or not at all, pads with <unk> or <s> from here on.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # a folder of weights alone
        return None
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t not in (None, tokenizer.eos_token)]
        if not others:
            return None
        tokenizer.pad_token = others[0]
        tokenizer.save_pretrained(folder)
    return tokenizer.pad_token_id
