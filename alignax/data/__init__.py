"""Files to batches: rows of text, tokenised examples, batches that are a function of the step."""

from alignax.data.batches import Batches, assemble, decode_example, evaluation_batch, padded_length
from alignax.data.rows import Prompted, preference_rows, read_rows, sft_rows
from alignax.data.tokens import Examples, Report, load_examples, tokenize

__all__ = [
    "Batches",
    "Examples",
    "Prompted",
    "Report",
    "assemble",
    "decode_example",
    "evaluation_batch",
    "load_examples",
    "padded_length",
    "preference_rows",
    "read_rows",
    "sft_rows",
    "tokenize",
]
