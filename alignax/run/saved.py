"""Models of past runs and of model folders, loaded for commands."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from alignax import paths, rewards
from alignax.config import Experiment, changed_modules, default_config, load_experiment, of_run, set_field, trunk_values
from alignax.distributed import is_main, together
from alignax.mesh import make_mesh
from alignax.models import hf, peft
from alignax.models.reward import CRITIC
from alignax.models.tensorfiles import check_finite
from alignax.models.tokenizers import load_tokenizer
from alignax.run.checkpoint import Checkpoints
from alignax.run.export import members_of
from alignax.run.opening import compute_dtype, make_lora, open_model, open_source, paths_of, trained_roles
from alignax.run.roles import abstract_trained
from alignax.run.start import check_same, described, fingerprint
from alignax.run.stored import OFF
from alignax.types import Params


def saved_experiment(workdir: Path, overrides: Sequence[str]) -> Experiment:
    """Loads the experiment of a past run, with a mesh of the devices at hand; a notice names its modules that have changed since.

    The file in the workdir holds the code of the experiment, and imports the user's modules from where they lie.

    Raises:
      ValueError: for a folder that is no workdir of a run.
    """
    file = workdir / "config.py"
    if not of_run(file):
        raise ValueError(f"{str(workdir)!r} is not the workdir of a run: it has no config.py{' that a run wrote' if file.exists() else ''}")
    here = [
        f"workdir={workdir}",
        f"reference.cache={OFF}",
        "mesh.member=1",
        "mesh.data=1",
        "mesh.fsdp=-1",
        "mesh.context=1",
        "mesh.tensor=1",
    ]
    experiment = load_experiment(file, [*here, *overrides])
    if (changed := changed_modules(experiment, experiment)) and is_main():
        print(
            f"notice: the code of {', '.join(changed)}, which the experiment of {str(workdir)!r} imports, has changed since the run began; "
            "what follows is computed with the code of now",
            file=sys.stderr,
        )
    return experiment


def is_workdir(place: str | Path) -> bool:
    """Whether a folder is the workdir of a run."""
    return of_run(paths.of(place) / "config.py")


def folder_config(folder: Path, overrides: Sequence[str]) -> Any:
    """The default config for a model folder, with overrides."""
    config = default_config()
    for override in [f"model.path={folder}", *overrides]:
        set_field(config, override)
    return config


def names_of(members: int) -> list[str]:
    """The folder names of an ensemble's members: member_0, ..; for a single model one empty name."""
    return [f"member_{k}" for k in range(members)] or [""]


class Saved(NamedTuple):
    """The trained models of a run, with adapters merged."""

    config: Any
    source: hf.Source
    mesh: Mesh
    step: int  # of the checkpoint
    models: Iterator[tuple[str, Params]]  # name and parameters of each member; a single model has an empty name


def saved_models(workdir: Path, config: Any) -> Saved:
    """Loads the models of a run's newest checkpoint, with adapters merged; the run's data are not needed.

    `config` is that of `saved_experiment`.
    """
    with together():
        source = hf.with_heads(
            open_source(config.model.path, "model.path"), config.model.num_labels, trunk_values(config), config.model.language_head
        )
    mesh = make_mesh(config.mesh)
    return Saved(config, source, mesh, *newest_models(workdir, config, source, mesh, config.export.params))


def newest_models(workdir: Path, config: Any, source: hf.Source, mesh: Mesh, name: str) -> tuple[int, Iterator[tuple[str, Params]]]:
    """Loads the step and the models of a run's newest checkpoint, see `Saved`; `name` is "policy" or that of an average.

    Raises:
      ValueError: for a run without a checkpoint or a finite step, and for other models than those of the run.
    """
    lora, members = make_lora(config, source), config.ensemble.members
    with closing(Checkpoints(workdir, writes=False)) as checkpoints:
        now = described(source, load_tokenizer(source.path, source.config.vocab_size))
        if lora is not None:  # the base is read from its folder, so check that it is the same
            now["policy"] = fingerprint(hf.load_params(source, mesh, jax.random.key(config.seed)))
        trained = abstract_trained(trained_roles(config, source, lora, compute_dtype(config, mesh), mesh), mesh)

        def read(step: int) -> tuple[dict[str, Any], Params]:
            about = checkpoints.about(step)
            check_same(workdir, step, about, now)
            return about, checkpoints.restore_params(step, trained, name)

        step, (about, params) = checkpoints.newest(read)
        if step and about.get("skipped") == step:
            raise ValueError(
                f"none of the {step} steps in {str(workdir)!r} was finite: the workdir holds only the model that the run began from"
            )
        check_finite(params, "float32", f"checkpoint {step} in {str(workdir)!r}")
        params.pop(CRITIC, None)
    return step, ((name, peft.merged(source, lora, one, mesh) if lora else one) for name, one in members_of(params, members))


def averaged_models(soup: Path, overrides: Sequence[str]) -> Saved:
    """Loads the mean of model folders (A@0.5,B@0.5) in the form of `saved_models`."""
    with together():
        config = folder_config(soup, overrides)
        source = open_model(config.model.path, config.model.init, "model.path")
    mesh = make_mesh(config.mesh)
    return Saved(config, source, mesh, 0, iter([("", hf.load_params(source, mesh))]))


def reward_models(place: str, file: str, overrides: Sequence[str]) -> tuple[Any, hf.Source, Mesh, Params]:
    """Loads K reward models from the workdir of a run, or from folders separated by commas.

    Args:
      place: the workdir, or the folders.
      file: for folders, the experiment file of the config; empty: the default config.
      overrides: overrides of the config, as `FIELD=VALUE`.

    Returns:
      Config, source of the first model, mesh, and parameters [K, ...].

    Raises:
      ValueError: for a workdir with an experiment file, and for a language model.
    """
    if is_workdir(place):
        if file:
            raise ValueError(f"{place!r} is the workdir of a run, which contains its own config; leave out --config {file}")
        with together():
            experiment = saved_experiment(paths.of(place), overrides)
        config, source, mesh, _, models = saved_models(paths.of(place), experiment.config)
        if not source.config.num_labels:
            raise ValueError(f"{place!r} is the run of a language model; give reward models (model.num_labels 1)")
        return config, source, mesh, rewards.stack([params for _, params in models], source.config, mesh)
    folders = paths_of(place)
    config = load_experiment(file, overrides).config if file else folder_config(paths.of(folders[0]), overrides)
    mesh = make_mesh(config.mesh)
    source, params = rewards.load_ensemble(folders, mesh)
    return config, source, mesh, params
