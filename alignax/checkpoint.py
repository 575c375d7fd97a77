"""Save and restore: orbax behind one module. Asynchronous, atomic, exact.

A checkpoint of step s holds the state after s steps: parameters and the rest of the state as separate items (so that either can be
read alone), and a JSON item that says which run wrote it. Data needs no position of its own: a batch is a function of the step.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from alignax.types import TrainState

FORMAT = 1  # of the checkpoint's layout


class Checkpoints:
    """The checkpoints of one run, in `WORKDIR/checkpoints`; the newest `keep`, and the best by a metric if there is one."""

    def __init__(self, workdir: str | Path, keep: int = 2, best: str = ""):
        """`best` names an evaluation metric, lower is better; a leading "-" turns that around."""
        self.path = Path(workdir).absolute() / "checkpoints"
        name = best.removeprefix("-")
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if best:
            sign = -1.0 if best.startswith("-") else 1.0
            rank: Callable[[Any], float] = lambda metrics: sign * metrics[name]
            policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=rank, reverse=True, n=1))
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
                create=True,
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, about: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts saving; returns when the state has been copied. Half-written checkpoints are never listed.

        Raises:
          OSError: when the disk has no room for it; nothing is written then.
        """
        require_space(self.path, nbytes(state))
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(_rest(state)),
            about=ocp.args.JsonSave(dict(about) | {"format": FORMAT}),
        )
        self._manager.save(step, args=items, metrics=dict(metrics) or None)

    def about(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of its run.

        Raises:
          ValueError: if it is damaged or is not one of ours.
        """
        with _clear_errors(self.path, step):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if about.get("format") != FORMAT:
            raise ValueError(f"checkpoint {self.path / str(step)} has format {about.get('format')}, this version reads {FORMAT}")
        return about

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, laid out as `like`, whose leaves may be abstract: any mesh, any number of processes."""
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(described.params), train=ocp.args.StandardRestore(_rest(described))
        )
        with _clear_errors(self.path, step):
            restored = self._manager.restore(step, args=items)
        return like.replace(params=restored["params"], **restored["train"])

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone."""
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        with _clear_errors(self.path, step):
            return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(described)))["params"]

    def wait(self) -> None:
        """Until what was saved is complete on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.close()


def _rest(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "opt_state", "key", "skipped", "skipped_in_a_row")}


class _clear_errors:
    """Turns whatever orbax raises over a damaged or foreign checkpoint into one error with the remedy."""

    def __init__(self, path: Path, step: int):
        self.where = path / str(step)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            cause = str(error).strip().splitlines()
            raise ValueError(
                f"checkpoint {self.where} is damaged, or of another model ({type(error).__name__}: {cause[0][:200] if cause else ''}); "
                f"delete that folder to go on from the one before, or choose another workdir"
            ) from error


def nbytes(tree: Any) -> int:
    """Bytes of the shards that this process holds."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.replica_id == 0)


def require_space(path: Path, need: int) -> None:
    """An error before anything is written, if the disk has no room for `need` bytes and a tenth."""
    place = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < 1.1 * need:
        raise OSError(
            f"a checkpoint takes {need / 1e9:.3f} GB and {str(path)!r} has {free / 1e9:.3f} GB free; make room, or choose another workdir"
        )
