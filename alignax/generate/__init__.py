"""Generation: samples completions of prompts, with their log-probs, from the parameters and shardings of training."""

from alignax.generate.batch import Answers, sampled_batch, sampler_gap, token_batch
from alignax.generate.engine import Shape
from alignax.generate.generator import Completions, Generator, shape_for
from alignax.generate.policy import policy_config, policy_sampling, sampler
from alignax.generate.sampling import Sampling
from alignax.generate.speakers import Speaker, combined, processed, speaker
from alignax.generate.stops import LENGTH, STOP_ID, STOP_STRING, Stops, stops_of, text_of

__all__ = [
    "LENGTH", "STOP_ID", "STOP_STRING", "Answers", "Completions", "Generator", "Sampling", "Shape", "Speaker", "Stops", "combined",
    "policy_config", "policy_sampling", "processed", "sampled_batch", "sampler", "sampler_gap", "shape_for", "speaker", "stops_of",
    "text_of", "token_batch",
]  # fmt: skip
