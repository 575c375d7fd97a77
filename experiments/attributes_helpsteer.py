"""A reward model of several attributes, trained by regression on human ratings (HelpSteer2, Wang et al. 2024, arXiv:2406.08673).

Command:
  alignax train --config experiments/attributes_helpsteer.py --config.workdir=runs/attributes \\
    --config.model.path=MODEL --config.data.train=train.jsonl --config.data.eval=validation.jsonl

MODEL is the folder of a language model. Its head is replaced by one score per attribute. Rows have a prompt, a response, and a number or
null (no rating) for each attribute. For other attributes set --config.data.columns.attributes=NAME,NAME and
--config.model.num_labels to their number.

Hardware: a pod for 7B, with --config.mesh.fsdp=-1; a model of a few 100k parameters runs on 2 CPU cores.

Expected: loss/NAME falls below the variance of that attribute; errors/NAME is the mean absolute error in its own units.
"""

from alignax import default_config
from alignax.losses import attribute_regression


def get_config():
    """The config: two epochs over the responses."""
    config = default_config()
    config.model.num_labels = 5
    config.data.kind = "sft"
    config.data.columns.completion = "response"
    config.data.columns.attributes = "helpfulness,correctness,coherence,complexity,verbosity"
    config.data.max_length = 1024
    config.batch_size = 64
    config.epochs = 2.0
    config.optimizer.learning_rate = 2e-6
    config.eval.every = 100
    config.eval.samples = 0
    return config


def loss(config):
    """The loss: the mean over attributes of the squared error."""
    return attribute_regression(config.data.columns.attributes.split(","))
