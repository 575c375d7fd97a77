"""Training data: reads files into rows, tokenises rows into examples, and draws batches as a function of the step."""

from alignax.data.batches import Batches, assemble, decode_example, evaluation_batch, padded_length
from alignax.data.counts import Report
from alignax.data.examples import Examples, concatenate, unpair
from alignax.data.files import read_rows
from alignax.data.kinds import prompted_rows
from alignax.data.mixture import Mixture, load, schedule
from alignax.data.rows import Prompted, Rejected
from alignax.data.tokens import load_examples, tokenize

__all__ = [
    "Batches",
    "Examples",
    "Mixture",
    "Prompted",
    "Rejected",
    "Report",
    "assemble",
    "concatenate",
    "decode_example",
    "evaluation_batch",
    "load",
    "load_examples",
    "padded_length",
    "prompted_rows",
    "read_rows",
    "schedule",
    "tokenize",
    "unpair",
]
