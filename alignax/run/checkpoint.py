"""Saving and restoring of checkpoints with orbax: asynchronous, atomic, exact.

A checkpoint of step s holds the state after s steps. Parameters, each of their averages and the rest of the state are separate items, so
that each can be read alone. A JSON item says which run wrote the checkpoint, at which step, and holds a digest of every array. Restored
arrays must have these digests, so a flipped bit is detected. The data position is not saved: a batch is a function of the step.
"""

import dataclasses
import datetime
import importlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from alignax import paths
from alignax.distributed import link
from alignax.mesh import gathered
from alignax.output import FULL, reason, require_space
from alignax.text import one_line, short
from alignax.train import leaf_digests
from alignax.types import TrainState

FORMAT = 2  # version of the checkpoint layout
TRIES = 20  # attempts to read a checkpoint of a live run, which removes older ones
AVERAGE = "average_"  # prefix of the items that hold averages of the parameters


class Checkpoints:
    """The checkpoints of one run in `WORKDIR/checkpoints`: the newest `keep`, and the best one by a metric if `best` names it."""

    def __init__(self, workdir: str | Path, keep: int = 2, best: str = "", writes: bool = True):
        """Opens the checkpoints of a run; without `writes`, for reading only.

        `best` names an evaluation metric. Lower is better; with a leading "-", higher.

        Raises:
          ValueError: for a damaged checkpoint folder.
        """
        import orbax.checkpoint as ocp  # not before a run needs it: the import takes a while

        self.path, self._writes, self._args = paths.of(workdir).absolute() / "checkpoints", writes, ocp.args
        # Errors in the background are raised when we wait for them; this hides the traceback that orbax prints of every thread.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._best = name = best.removeprefix("-")
        self._failed: BaseException | None = None  # why a save failed in the background
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if best:
            sign = -1.0 if best.startswith("-") else 1.0
            rank: Callable[[Any], float] = lambda metrics: sign * metrics[name]
            best_one = ocp.checkpoint_managers.BestN(get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False)
            policies.append(best_one)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet) if link() else None,
            create=writes,
            cleanup_tmp_directories=writes,  # half-written folders of a killed run
            read_only=not writes,
        )
        try:
            self._manager = ocp.CheckpointManager(str(self.path), options=options)
        except (ValueError, TypeError, RecursionError) as e:  # errors of orbax for JSON in another form
            bad = next((file.parent for file in sorted(self.path.glob("*/_CHECKPOINT_METADATA")) if not _is_object(file)), self.path)
            raise ValueError(f"checkpoint {bad} is damaged ({one_line(e)}); delete that folder, or choose another workdir") from e

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def newest(self, read: Callable[[int], Any]) -> tuple[int, Any]:
        """The step of the newest checkpoint, and the result of `read(step)`.

        If a live run removes the checkpoint during the reading, the next newer one is read.

        Raises:
          ValueError: if there is no checkpoint, and errors of `read`.
        """
        for _ in range(TRIES):
            step = self.latest()
            if step is None:
                raise ValueError(f"{str(self.path)!r} holds no complete checkpoint yet")
            try:
                return step, read(step)
            except ValueError:
                if self.latest() == step:
                    raise
        raise ValueError(f"the run in {str(self.path.parent)!r} removes its checkpoints faster than they are read; raise checkpoint.keep")

    def save(self, state: TrainState, about: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts to save a state; returns as soon as the state has been copied. Half-written checkpoints are never listed.

        Raises:
          OSError: if the disk has no room for the checkpoint; then nothing is written.
        """
        require_space(self.path, nbytes(state), "a checkpoint", "make room, or choose another workdir")
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        own = {"format": FORMAT, "step": step, "skipped": int(state.skipped.max()), "digests": digests(items)}
        saved = {name: self._args.StandardSave(tree) for name, tree in items.items()}
        args = self._args.Composite(**saved, about=self._args.JsonSave(dict(about) | own))
        with _saving(self.path):
            ranked = not self._best or self._best in metrics  # an evaluation lacks it if no reward was known
            self._manager.save(step, args=args, metrics=dict(metrics) or None if ranked else None)

    def check(self) -> None:
        """Raises the error of a save that has failed in the background, long before the next save or the end would.

        Raises:
          OSError: as `close` does.
        """
        with _saving(self.path):
            if self._failed:
                raise self._failed
            self._manager.check_for_errors()

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, for orbax; a process whose save has failed does not, as the others wait elsewhere: it says so."""
        if (error := sys.exception()) is not None:
            self._failed = error
        elif own := link():
            own.gather("", key)

    def about(self, step: int) -> dict[str, Any]:
        """The JSON item of a checkpoint: its run, step, number of skipped steps, and digests.

        Raises:
          ValueError: if the checkpoint is damaged, of another format, or in a renamed folder.
        """
        with self._reading(step):
            about = dict(self._manager.restore(step, args=self._args.Composite(about=self._args.JsonRestore()))["about"])
        if about.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {self.path / str(step)} has format {short(about.get('format'))}, but this version of alignax reads {FORMAT}"
            )
        with self._reading(step):
            if about["step"] != step:
                raise ValueError(f"it was saved at step {short(about['step'])}, but its folder was renamed")
        return about

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The training state of a checkpoint, with the shapes, dtypes and shardings of `like`, whose leaves may be abstract.

        The mesh and the number of processes may differ from those that saved it.

        Raises:
          ValueError: if the checkpoint is damaged, even in a single bit, or is of another model.
        """
        restored = self._restore(step, _items(like))
        with self._reading(step):
            if int(restored["train"]["step"]) != step:
                raise ValueError(f"its state is of step {int(restored['train']['step'])}")
        averages = {name: restored[AVERAGE + name] for name in like.averages}
        carry = restored["carry"] if like.carry else {}
        return dataclasses.replace(like, params=restored["params"], averages=averages, carry=carry, **restored["train"])

    def restore_params(self, step: int, like: Any, name: str = "policy") -> Any:
        """Restores the parameters alone: of the policy, or of the average `name`.

        Raises:
          ValueError: if there is no such average, and as `restore` does.
        """
        item = "params" if name == "policy" else AVERAGE + name
        about = self.about(step)
        with self._reading(step):
            kept = {leaf.partition("/")[0] for leaf in about["digests"]}
        if item not in kept:
            known = ["policy", *sorted(x.removeprefix(AVERAGE) for x in kept if x.startswith(AVERAGE))]
            raise ValueError(
                f"checkpoint {self.path / str(step)} has no average {short(name)}; export.params (for generate, eval.params) must be one "
                f"of {', '.join(known)}"
            )
        return self._restore(step, {item: like})[item]

    def _restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restores items of a checkpoint and checks the digest of every array."""
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        about = self.about(step)
        with self._reading(step):
            args = self._args.Composite(**{name: self._args.StandardRestore(tree) for name, tree in described.items()})
            restored = dict(self._manager.restore(step, args=args))
            for leaf, found in digests(restored).items():
                if about["digests"].get(leaf) != found:
                    raise ValueError(f"{leaf} differs from what was saved")
        return restored

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns errors of a damaged or foreign checkpoint into one ValueError with the remedy."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as e:
            if "RESOURCE_EXHAUSTED" in str(e):  # the checkpoint is whole; this machine has too little memory
                raise
            cause = (str(e).strip().splitlines() or [""])[0][:200]
            if not self._writes:
                self._manager.reload()
                if (self.latest() or 0) > step:
                    raise ValueError(
                        f"checkpoint {self.path / str(step)} was removed while it was read, because newer checkpoints exist"
                    ) from e
            before = [there for there in self._manager.all_steps() if there < step]
            goes_on = (
                f"the run goes on from step {max(before)}" if before else "the run begins again, because there is no earlier checkpoint"
            )
            raise ValueError(
                f"checkpoint {self.path / str(step)} is damaged, or of another model ({type(e).__name__}: {cause}); "
                f"delete that folder, and {goes_on}, or choose another workdir"
            ) from e

    def close(self) -> None:
        """Waits until all saved checkpoints are complete on disk, and closes the directory.

        Raises:
          OSError: if saving failed; earlier checkpoints are whole.
        """
        with _saving(self.path):
            self._manager.close()


def _is_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: `params`, `train` (the rest of the state), one for each average, and `carry` of the experience."""
    rest = {name: getattr(state, name) for name in ("step", "opt_state", "key", "skipped", "skipped_in_a_row")}
    averages = {AVERAGE + name: tree for name, tree in state.averages.items()}
    return {"params": state.params, "train": rest} | averages | ({"carry": state.carry} if state.carry else {})


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array of a tree, by its path; all processes must call it.

    Digests do not depend on sharding or on the number of processes.
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    # One array after another. XLA for CPUs would otherwise hold the hashes of all arrays at once, which takes as much memory as the state.
    # Programs that reduce concurrently may also deadlock: some devices wait in one, some in another (seen with two processes of four
    # devices).
    found = gathered(jnp.concatenate([jax.block_until_ready(jax.jit(leaf_digests)([leaf])) for leaf in jax.tree.leaves(tree)]))
    return {name: f"{value:08x}" for name, value in zip(names, found.tolist(), strict=True)}


@contextmanager
def _saving(where: Path) -> Iterator[None]:
    """Turns errors of writing a checkpoint, now or in the background, into one OSError with the remedy."""
    try:
        yield
    except Exception as e:
        cause, full = reason(e), any(sign in str(e) for sign in FULL)
        remedy = "see that the bucket can be reached and written, and " if paths.remote(where) is not None else "make room, and " * full
        raise OSError(
            f"a checkpoint could not be written to {str(where)!r} ({type(e).__name__}: {cause}); earlier checkpoints are complete: "
            f"{remedy}run the same command again"
        ) from e


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint in a workdir, which need not be readable; 0 without one."""
    return max(abouts(workdir), default=0)


def abouts(workdir: Path) -> dict[int, Path]:
    """The files that say which run wrote a checkpoint, by step."""
    return {int(file.parts[-3]): file for file in (workdir / "checkpoints").glob("*/about/metadata") if file.parts[-3].isdigit()}


def began(workdir: Path) -> datetime.date:
    """The day on which a run began, from its newest readable checkpoint; today for a run without one."""
    found = abouts(workdir)
    for step in sorted(found, reverse=True):
        with suppress(OSError, ValueError, TypeError, KeyError):  # damaged checkpoints are reported when they are restored
            return datetime.date.fromisoformat(json.loads(found[step].read_text(encoding="utf-8"))["day"])
    return datetime.date.today()


def unlisted(workdir: Path) -> str:
    """Why orbax cannot list checkpoints in a workdir on a bucket: it also asks for the bucket's own description; empty if it can."""
    try:
        storage: Any = importlib.import_module("google.cloud.storage")
        storage.Client().get_bucket(workdir.parts[1])
    except ImportError as e:
        return f"checkpoints on gs:// need the package google-cloud-storage ({one_line(e)}); pip install 'alignax[gcs]'"
    except Exception as e:  # of the library, its network and its credentials
        return (
            f"its bucket cannot be described ({type(e).__name__}: {one_line(e)}); checkpoints need that: get the role "
            "roles/storage.legacyBucketReader on the bucket beside roles/storage.objectUser, and set GOOGLE_CLOUD_PROJECT if no project is "
            "known"
        )
    return ""


def nbytes(tree: Any) -> int:
    """The size of a tree's arrays in bytes, over all processes; arrays may be abstract."""
    numeric = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in numeric)
