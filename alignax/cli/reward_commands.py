"""The commands on reward models: eval-rm, anchor, ridge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignax import distributed, output, paths, rewards
from alignax.config import eval_batch_size, load_experiment
from alignax.config.blame import refusing
from alignax.data import Examples, load, load_examples, padded_length
from alignax.distributed import is_main
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.tokenizers import load_tokenizer
from alignax.rewards.ridge import fit_ridge
from alignax.run.export import members_of
from alignax.run.opening import compute_dtype, open_model
from alignax.run.prepare import origin
from alignax.run.saved import is_workdir, names_of, reward_models

# Overrides for reading samples of a policy, whatever data the reward model was trained on.
SAMPLES = (
    "data.kind=sft", "data.bad_rows=drop", "data.limit=0", "data.columns.prompt=prompt", "data.columns.completion=completion",
    "data.columns.margin=", "data.columns.attributes=", "data.columns.system=", "data.format=", "data.order=",
)  # fmt: skip


def eval_rm(place: str, file: str, overrides: Sequence[str], out: str, force: bool = False) -> None:
    """`alignax eval-rm`: judges a reward model or an ensemble on the pairs of `data.eval` and `data.ood`.

    Args:
      place: workdir of a run, or folders of reward models, separated by commas.
      file: for folders, an experiment file, which says how the data are read; else empty.
      overrides: overrides of the config, as `FIELD=VALUE`.
      out: a file for JSON too, "-" for JSON only, or empty.
      force: whether to replace an existing file.
    """
    with refusing():
        distributed.initialize()
        if out not in ("", "-"):
            output.claim_on_all(paths.of(out), force=force)
        if not file and not is_workdir(place):
            raise ValueError(
                f"{place!r} is not the workdir of a run; for model folders also give --config FILE.py, for example experiments/rm_hh.py"
            )
        config, source, mesh, params = reward_models(place, file, overrides)
        rewards.check_one_score(source)
        row = load_experiment(paths.of(place) / "config.py" if is_workdir(place) else file).row
        loaded = pairs_of(config, source, row)
    result = {}
    model = rewards.ensemble_model(source.config, params, mesh)
    for split, examples in loaded.items():
        length, size = padded_length(examples), eval_batch_size(config)
        with refusing():
            scores = rewards.score_examples(model.apply, model.params, examples, mesh, size, length)
        lengths = np.add.reduceat(examples.scored, examples.offsets[:-1]).reshape(-1, 2)
        result[split] = rewards.assess(scores, lengths)
    if is_main():
        if out != "-":
            print("\n".join(rewards.described(result)))
        if out:
            output.write_json(result, out)


def anchor(place: str, folder: Path, file: str, overrides: Sequence[str], samples: str, scale: bool, force: bool = False) -> None:
    """`alignax anchor`: writes reward models whose scores on samples have mean 0, with `scale` standard deviation 1.

    Args:
      place: workdir of a run, or folders of reward models, separated by commas.
      folder: output folder; for several members it holds a folder each.
      file: for folders, an experiment file, which says how long rows may be; may be empty.
      overrides: overrides of the config, as `FIELD=VALUE`.
      samples: rows with a prompt and a completion of the initial policy, as `alignax generate --out` writes them.
      scale: whether to divide by the standard deviation.
      force: whether to replace files of another run or program.
    """
    by = f"anchor {place} by {samples}"
    with refusing():
        distributed.initialize()
        config, source, mesh, params = reward_models(place, file, [*SAMPLES, *overrides])
        tokenizer = load_tokenizer(source.path, source.config.vocab_size)
        ends = hf.end_ids(source, tokenizer)
        examples, report = load_examples(samples, config.data, tokenizer, source.config.vocab_size, ends, whole=True)
        dtype, members = config.export.dtype, len(jax.tree.leaves(params)[0])
        for name in names_of(members if members > 1 else 0):
            output.claim_on_all(folder / name, by, force)
        params = rewards.rounded(params, dtype)
        model = rewards.ensemble_model(source.config, params, mesh)
        scores = rewards.score_examples(model.apply, params, examples, mesh, eval_batch_size(config), padded_length(examples))
        found = rewards.anchored(params, scores, scale)
        for name, one in members_of(found.params, members):
            hf.export(one, source, folder / name if members > 1 else folder, dtype, origin=by)
    if is_main():
        print("\n".join(f"samples: {line}" if i == 0 else line for i, line in enumerate(report.lines())))
        for k, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
            print(f"member {k}: mean {numbers(mean)} becomes 0, standard deviation {numbers(std)}{' becomes 1' if scale else ''}")
        print(f"anchored reward models are in {folder}, in {dtype}")


def ridge(folder: Path, file: str, overrides: Sequence[str], penalty: float, force: bool = False) -> None:
    """`alignax ridge`: writes a reward model with the unchanged trunk of `model.path` and a head fitted in closed form to `data.train`."""
    with refusing():
        distributed.initialize()
        experiment = load_experiment(file, overrides)
        config, by = experiment.config, f"ridge {origin(experiment)}"
        output.claim_on_all(folder, by, force)
        if not config.data.train:
            raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
        if config.data.label_noise:
            raise ValueError(f"data.label_noise is {config.data.label_noise}, but ridge takes every label as it is; set it to 0")
        source = hf.with_heads(open_model(config.model.path, "pretrained", "model.path"), config.model.num_labels)
        if not source.config.num_labels:
            raise ValueError(f"{config.model.path!r} is a language model; set model.num_labels to 1, or to the number of attributes")
        tokenizer = load_tokenizer(source.path, source.config.vocab_size)
        ends = hf.end_ids(source, tokenizer)
        examples, reports, mixture = load("train", config.data, tokenizer, source.config.vocab_size, ends, experiment.row, whole=True)
        if mixture is not None:
            raise ValueError(f"data.train {config.data.train!r} has weights, but ridge uses every row once; leave the weights out")
        mesh = make_mesh(config.mesh)
        how = {"penalty": penalty, "batch_size": eval_batch_size(config), "dtype": compute_dtype(config, mesh)}
        params = fit_ridge(source.config, hf.load_params(source, mesh), examples, mesh, **how)
        hf.export(params, source, folder, config.export.dtype, eos=tokenizer.eos_token_id, origin=by)
    if is_main():
        for path, report in reports.items():
            print("\n".join([f"train data: {path}", *(f"  {line}" for line in report.lines())]))
        print(f"a head of {source.config.num_labels} scores, fitted to {len(examples)} examples, is in {folder}, in {config.export.dtype}")


def numbers(values: np.ndarray) -> str:
    """Numbers as text, separated by commas."""
    return ", ".join(f"{x:.4g}" for x in values)


def pairs_of(config: Any, source: hf.Source, row: Callable[[dict], Any] | None) -> dict[str, Examples]:
    """The tokenised pairs of `data.eval` and, if set, `data.ood`; `row` is that of the experiment.

    Raises:
      ValueError: for an empty `data.eval`, and for data other than pairs.
    """
    if not config.data.eval:
        raise ValueError("config field 'data.eval' is empty; set --config.data.eval=FILE")
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    splits = [split for split in ("eval", "ood") if config.data[split]]
    ends = hf.end_ids(source, tokenizer)
    read = lambda split: load(split, config.data, tokenizer, source.config.vocab_size, ends, row, whole=True).examples
    loaded = {split: read(split) for split in splits}
    for split, examples in loaded.items():
        if examples.N != 2:
            raise ValueError(f"data.{split} has {examples.N} responses per prompt, but eval-rm takes pairs; set data.kind to preference")
    return loaded
