"""The built-in cases of `alignax bench`: experiments on random weights and invented words, which need no file.

Rows have `prompt` tokens of a prompt, and `seq` tokens in all. With `mean` the lengths of completions are geometric with that mean: those
of the rows, and those that a policy samples, since one token in `mean` is then an end of the random model.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignax import output
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
    config.members = 3  # reward models of `ensemble`, and judges of `grpo`
    config.batch_size = 8
    config.workdir = "bench"
    config.model.init = "random"
    config.eval.samples = 0
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


METHODS = {
    "sft": Method({"data.kind": "sft"}, _sft),
    "dpo": Method({}, _dpo, referenced),
    "rpo": Method({}, _rpo, referenced),
    "rm": Method({"model.num_labels": 1}, _rm),
    "ensemble": Method({"model.num_labels": 1, "ensemble.members": 0}, _rm),
    "grpo": Method({"data.kind": "prompt", "rollout.samples": 8, "log.rollouts": 0}, _grpo, grouped),
    "generate": Method({"data.kind": "sft", "eval.sample_prompts": 64}, _sft),  # whose sampler alone is timed
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
    given = [override.partition("=")[0] for override in overrides]
    check(config, given)
    if "data.max_length" not in given:
        config.data.max_length = config.seq
    if method == "ensemble":
        config.ensemble.members = config.ensemble.members or config.members
    if method == "grpo":
        config.reward.path = config.reward.path or ",".join(str(folder / f"judge_{k}") for k in range(config.members))
    return Experiment(Path(__file__), config, own.loss, own.experience, None, None, None, None)


def check(config: Any, given: Sequence[str]) -> None:
    """Refuses sizes that no model or row can have, and sizes of an invented model or invented rows beside those `given`."""
    for path, sizes in (("model.path", ("dim", "layers", "heads", "kv_heads", "vocab")), ("data.train", ("prompt", "mean"))):
        if path in given and (odd := [name for name in sizes if name in given]):
            raise ValueError(f"config field {odd[0]!r} is of what the bench invents, and {path} is {config[path]!r}; leave one of them out")
    if "model.path" in given and "data.train" not in given:
        raise ValueError(
            f"the invented rows have words that the model of {config.model.path!r} does not know; give --config.data.train too"
        )
    for name in ("dim", "layers", "heads", "kv_heads", "prompt", "members", "batch_size"):
        if config[name] < 1:
            raise ValueError(f"config field {name!r} is {config[name]}; use 1 or more")
    if config.vocab < 8:
        raise ValueError(f"config field 'vocab' is {config.vocab}; use 8 tokens or more")
    if config.seq < config.prompt + 2:
        raise ValueError(f"seq {config.seq} leaves no completion after a prompt of {config.prompt}; use {config.prompt + 2} or more")
    if config.dim % config.heads or config.heads % config.kv_heads:
        raise ValueError(f"dim {config.dim}, heads {config.heads} and kv_heads {config.kv_heads} do not divide one another; use multiples")
    if config.mean and not 2 <= config.mean <= config.vocab:
        raise ValueError(f"config field 'mean' is {config.mean}; use 0 for full rows, or 2 to vocab ({config.vocab})")


def write(config: Any, folder: Path) -> None:
    """Writes the files of a built-in case, if they are missing: a model folder without weights, rows, and judges with random weights."""
    if (folder / "rows.jsonl").is_file():
        return
    with output.folder(folder / "model") as tmp:
        write_model(config, tmp)
    for seed, judge in enumerate(config.reward.path.split(",") if config.method == "grpo" else ()):
        if Path(judge).parent == folder:
            with output.folder(Path(judge)) as tmp:
                write_judge(folder / "model", tmp, seed)
    with output.file(folder / "rows.jsonl") as tmp:
        write_rows(config, tmp)


def write_model(config: Any, folder: Path) -> None:
    """Writes a model folder of the Llama family without weights: a config, a tokenizer of whole words, and with `mean` many ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, config.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    room = max(2048, config.seq, *(config.prompt + c.max_new_tokens for c in (config.rollout, config.eval)))
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab, "hidden_size": config.dim,
        "intermediate_size": -(-(8 * config.dim // 3) // 64) * 64, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.dim // config.heads,
        "max_position_embeddings": room, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(description))
    ends = [2, *range(config.vocab - extra_ends(config), config.vocab)]
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0}))


def extra_ends(config: Any) -> int:
    """The number of words that end a completion beside the EOS, the last ones: together one token in `mean`."""
    return max(round(config.vocab / config.mean) - 1, 0) if config.mean else 0


def write_rows(config: Any, file: Path) -> None:
    """Writes rows of random words, at least four batches; a completion's last token is the EOS that the run adds."""
    import numpy as np

    draw, lengths = random.Random(0), np.random.default_rng(0)
    room = config.seq - config.prompt - 1
    words = config.vocab - extra_ends(config)
    text = lambda count: "".join(f"t{draw.randrange(3, words)} " for _ in range(count))
    answer = lambda: text(min(room, int(lengths.geometric(1 / config.mean))) if config.mean else room)
    with open(file, "w", encoding="utf-8") as f:
        for _ in range(max(4 * config.batch_size, config.eval.sample_prompts)):
            f.write(json.dumps({"prompt": text(config.prompt), "chosen": answer(), "rejected": answer()}) + "\n")


def write_judge(model: Path, folder: Path, seed: int) -> None:
    """Writes a reward model of the shape of a policy's folder, with random weights of a seed."""
    import jax

    from alignax.mesh import make_mesh
    from alignax.models import hf, parameters

    shutil.copytree(model, folder, dirs_exist_ok=True)
    description = json.loads((folder / "config.json").read_text())
    reward = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (folder / "config.json").write_text(json.dumps(description | reward))
    source = hf.open_folder(folder)
    hf.export(parameters.init_params(source.config, make_mesh({}, jax.devices()[:1]), jax.random.key(seed)), source, folder)
