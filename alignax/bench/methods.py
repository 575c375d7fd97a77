"""The built-in cases of `alignax bench`: experiments on random weights and invented words, which need no file.

Rows have `prompt` tokens of a prompt, and `seq` tokens in all; with `mean` the lengths of completions are geometric with that mean.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignax.config import Experiment
from alignax.config.defaults import default_config
from alignax.config.overrides import set_field


class Method(NamedTuple):
    """A built-in case: fields of the config, a loss and an experience."""

    fields: dict[str, Any]
    loss: Callable[[Any], Any]
    experience: Callable[..., Any] | None = None


def get_config() -> Any:
    """The config of all built-in cases: a Llama of 5 million parameters."""
    config = default_config()
    config.dim, config.layers, config.heads, config.kv_heads, config.vocab = 256, 4, 8, 8, 8192
    config.seq, config.prompt, config.mean = 256, 64, 0
    config.responses = 2  # of a row; more than 2 are ranked
    config.members = 3  # reward models of `ensemble`, and judges of `grpo`
    config.batch_size = 8
    config.workdir = "bench"
    config.model.init = "random"
    config.reference.cache = "off"  # a step has the reference's forward pass, as in the first epoch of a run
    config.optimizer.learning_rate = 1e-6
    return config


def referenced(config: Any, reference: Any) -> Any:
    """The experience: log-probs of the reference."""
    from alignax import chain, logps

    return chain(logps("ref_logps", reference, config.microbatches))


def grouped(config: Any, reference: Any, ensemble: Any) -> Any:
    """The experience of GRPO: log-probs of the reference, and each response's mean score compared with its group."""
    from alignax import chain, group_relative, logps, mean, score

    judged = score(ensemble, config.microbatches)
    return chain(logps("ref_logps", reference, config.microbatches), judged, mean, group_relative())


def loss(config: Any) -> Any:
    """The loss of the case that the config names."""
    return METHODS[config.method].loss(config)


def _sft(config: Any) -> Any:
    from alignax import sft

    return sft()


def _dpo(config: Any) -> Any:
    from alignax import dpo

    return dpo(0.1)


def _rpo(config: Any) -> Any:
    from alignax.losses import summed_sft

    return _dpo(config) + 0.0005 * summed_sft()


def _rm(config: Any) -> Any:
    from alignax.losses import bradley_terry

    return bradley_terry()


def _grpo(config: Any) -> Any:
    from alignax import grpo
    from alignax.losses import kl_k3

    return grpo() + 0.04 * kl_k3()


ROLLOUTS = {"data.kind": "prompt", "rollout.samples": 8, "log.rollouts": 0}
METHODS = {
    "sft": Method({"data.kind": "sft"}, _sft),
    "dpo": Method({}, _dpo, referenced),
    "rpo": Method({}, _rpo, referenced),
    "rm": Method({"model.num_labels": 1}, _rm),
    "ensemble": Method({"model.num_labels": 1, "ensemble.members": 0}, _rm),
    "grpo": Method(ROLLOUTS, _grpo, grouped),
    "generate": Method(ROLLOUTS, _sft),  # whose sampler alone is timed
}


def experiment(method: str, overrides: Sequence[str], folder: Path) -> Experiment:
    """The experiment of a built-in case; its files are to be in `folder`, see `write`.

    Raises:
      ValueError: for an unknown field or a value of another type.
    """
    own, config = METHODS[method], get_config()
    config.method = method
    for name, value in own.fields.items():
        set_field(config, f"{name}={value}")
    config.model.path, config.data.train = str(folder / "model"), str(folder / "rows.jsonl")
    for override in overrides:
        set_field(config, override)
    check(config)
    config.data.max_length = config.seq
    config.eval.samples = 0
    if config.responses > 2:
        config.data.kind = "ranked"
    if method == "ensemble":
        config.ensemble.members = config.ensemble.members or config.members
    if method == "grpo":
        config.reward.path = config.reward.path or ",".join(str(folder / f"judge_{k}") for k in range(config.members))
    return Experiment(Path(__file__), config, own.loss, own.experience, None, None, None, None)


def check(config: Any) -> None:
    """Refuses sizes that no model or row can have."""
    for name in ("dim", "layers", "heads", "kv_heads", "prompt", "members", "batch_size"):
        if config[name] < 1:
            raise ValueError(f"config field {name!r} is {config[name]}; use 1 or more")
    if config.vocab < 8:
        raise ValueError(f"config field 'vocab' is {config.vocab}; use 8 tokens or more")
    if config.seq < config.prompt + 2:
        raise ValueError(f"seq {config.seq} leaves no completion after a prompt of {config.prompt}; use {config.prompt + 2} or more")
    if config.dim % config.heads or config.heads % config.kv_heads:
        raise ValueError(f"dim {config.dim}, heads {config.heads} and kv_heads {config.kv_heads} do not divide one another; use multiples")
    if config.mean < 0 or config.responses < 2:
        raise ValueError(f"mean is {config.mean} and responses {config.responses}; use 0 or more, and 2 or more")


def write(config: Any, folder: Path) -> None:
    """Writes the files of a built-in case, if they are missing: a model folder without weights, rows, and judges with random weights."""
    if (folder / "rows.jsonl").is_file():
        return
    write_model(config, folder / "model")
    write_rows(config, folder / "rows.jsonl")
    for seed, judge in enumerate(config.reward.path.split(",") if config.method == "grpo" else ()):
        if Path(judge).parent == folder:
            write_judge(folder / "model", Path(judge), seed)


def write_model(config: Any, folder: Path) -> None:
    """Writes a model folder of the Llama family without weights: a config, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, config.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    room = max(2048, config.seq, config.prompt + config.rollout.max_new_tokens)
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab, "hidden_size": config.dim,
        "intermediate_size": -(-(8 * config.dim // 3) // 64) * 64, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.dim // config.heads,
        "max_position_embeddings": room, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(description))


def write_rows(config: Any, file: Path) -> None:
    """Writes rows of random words, four batches of them; a completion's last token is the EOS that the run adds."""
    import numpy as np

    draw, lengths = random.Random(0), np.random.default_rng(0)
    room = config.seq - config.prompt - 1
    text = lambda count: "".join(f"t{draw.randrange(3, config.vocab)} " for _ in range(count))
    answer = lambda: text(min(room, int(lengths.geometric(1 / config.mean))) if config.mean else room)
    with open(file, "w", encoding="utf-8") as f:
        for _ in range(4 * config.batch_size):
            completions = [answer() for _ in range(config.responses)]
            pair = {"chosen": completions[0], "rejected": completions[1]}
            own = {"completions": completions} if config.responses > 2 else pair
            f.write(json.dumps({"prompt": text(config.prompt)} | own) + "\n")


def write_judge(model: Path, folder: Path, seed: int) -> None:
    """Writes a reward model of the shape of a policy's folder, with random weights of a seed."""
    import jax

    from alignax.mesh import make_mesh
    from alignax.models import hf, parameters

    shutil.copytree(model, folder)
    description = json.loads((folder / "config.json").read_text())
    reward = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (folder / "config.json").write_text(json.dumps(description | reward))
    source = hf.open_folder(folder)
    hf.export(parameters.init_params(source.config, make_mesh({}, jax.devices()[:1]), jax.random.key(seed)), source, folder)
