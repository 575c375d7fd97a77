"""The reference's log-probs of the data, computed once into a cache that later steps, runs and hosts read.

A cache is a folder of parts, named by a key. The key is a fingerprint of all that the log-probs depend on (weights, config and dtype of
the reference, tokens and masks of the data) and of nothing else, so a run with another learning rate, loss, batch size, mesh or workdir
finds the same cache. A part is written whole or not at all, so an interrupted computation goes on with the missing parts.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax import mesh as meshes
from alignax import output
from alignax.config import eval_batch_size
from alignax.data import Examples, assemble
from alignax.distributed import together
from alignax.models.tensorfiles import opened
from alignax.program import Program
from alignax.run.prepare import Run
from alignax.run.roles import REFERENCE, STORED
from alignax.text import one_line
from alignax.types import Params

CACHE = "reference.cache"  # the program that scores data
FORMAT = 1  # version of the parts and of the key
ROWS = 1024  # examples in a part
AGREE = {"float32": 1e-3, "bfloat16": 0.1}  # nats by which a token's log-prob may differ between meshes and batch sizes


def with_stored(run: Run, params: Params, digest: str, program: Program, say: Any) -> Run:
    """The run with the reference's log-probs in its data, read from the cache or computed into it. Every process calls this function.

    Args:
      run: a run with a cache.
      params: the reference's parameters, as the forward pass reads them.
      digest: the digest of the reference's weights.
      program: the program that scores a batch of the data with the reference, see `alignax.run.programs`.
      say: a function that takes lines for the console.

    Raises:
      ValueError: for a part that is damaged, or whose log-probs are not those of the reference.
      OSError: if the folder cannot be written.
    """
    data = run.data
    train = dataclasses.replace(data.train, examples=stored(run, data.train.examples, params, digest, "train", program, say))
    evaluation = data.evaluation and stored(run, data.evaluation, params, digest, "eval", program, say)
    return run._replace(data=data._replace(train=train, evaluation=evaluation))


def key(run: Run, examples: Examples, digest: str) -> str:
    """The key of a cache, 16 hexadecimal digits: a fingerprint of all that the log-probs depend on.

    Mesh, packing, attention kernel and chunks are not in it: they change the rounding alone, and `check` compares a batch before use.
    """
    role = run.roles[REFERENCE]
    model = repr((FORMAT, digest, role.source.config, role.dtype.name)).encode()
    return f"{zlib.crc32(model):08x}{examples.token_digest():08x}"


def stored(run: Run, examples: Examples, params: Params, digest: str, split: str, program: Program, say: Any) -> Examples:
    """The examples of a split, with the reference's log-prob of every scored token."""
    assert run.cache is not None
    folder = run.cache / key(run, examples, digest)
    with together():
        folder.mkdir(parents=True, exist_ok=True)
        output.sweep(folder)
        found = [read(folder, i, examples) for i in range(-(-len(examples) // ROWS))]
    # If one process lacks a part, all compute it: a sharded program needs every process.
    have = np.array([part is not None for part in found])
    if jax.process_count() > 1:
        have = multihost_utils.process_allgather(have).all(axis=0)
    say(f"{split} data: reference log-probs of {len(examples):,} rows, {have.sum()} of {len(have)} parts in {folder}")
    score, values = program.call, np.zeros(len(examples.tokens), np.float32)
    for i in range(len(have)):
        part = found[i]
        if part is None or not have[i]:
            part = np.concatenate(list(computed(run, examples, params, score, i * ROWS, (i + 1) * ROWS)))
            with together():
                write(folder, i, part)
            say(f"{split} data: reference log-probs, part {i + 1} of {len(have)} computed")
        side = slice(*examples.offsets[[i * ROWS * examples.N, min((i + 1) * ROWS, len(examples)) * examples.N]])
        values[side][examples.scored[side]] = part
    if have.any():
        check(run, examples, params, score, values, folder, int(np.flatnonzero(have)[0]) * ROWS)
    return dataclasses.replace(examples, token_fields={STORED: values})


def computed(run: Run, examples: Examples, params: Params, score: Any, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yields the reference's log-probs of the scored tokens of rows start .. stop - 1, in the order of the tokens, batch by batch."""
    size = eval_batch_size(run.config)
    for first in range(start, min(stop, len(examples)), size):
        rows = np.arange(first, first + size)
        rows[rows >= min(stop, len(examples))] = len(examples)  # padding rows
        make = lambda part, rows=rows: assemble(examples, rows[part], run.data.train.length)
        batch = meshes.put_batch(run.mesh, make, size)
        mask = assemble(examples, rows, run.data.train.length)["completion_mask"]
        yield meshes.gathered(score(params, batch))[mask]


def check(run: Run, examples: Examples, params: Params, score: Any, values: np.ndarray, folder: Path, row: int) -> None:
    """Refuses a cache whose log-probs, in one batch from `row` on, differ from those that the reference gives now."""
    stop = min(row + eval_batch_size(run.config), len(examples))
    now = np.concatenate(list(computed(run, examples, params, score, row, stop)))
    side = slice(*examples.offsets[[row * examples.N, stop * examples.N]])
    worst = np.abs(values[side][examples.scored[side]] - now).max(initial=0.0)
    if not worst < AGREE[run.policy.dtype.name]:
        raise ValueError(f"the log-probs in {folder} differ from those of the reference by {worst:.3g} nats; delete that folder")


def read(folder: Path, index: int, examples: Examples) -> np.ndarray | None:
    """Reads the log-probs of a part of the cache; None if the part does not exist."""
    from safetensors import SafetensorError

    file = folder / f"{index:06d}.safetensors"
    if not file.is_file():
        return None
    try:
        with opened(file) as f:
            values, crc = f.get_tensor("logps"), f.metadata()["crc"]
    except (SafetensorError, KeyError, TypeError, OSError) as e:
        raise ValueError(f"{file} is damaged or cut short ({one_line(e)}); delete the file, and the same command computes it again") from e
    side = slice(*examples.offsets[[index * ROWS * examples.N, min((index + 1) * ROWS, len(examples)) * examples.N]])
    whole = values.dtype == np.float32 and values.shape == (examples.scored[side].sum(),)
    if not whole or crc != f"{zlib.crc32(values.tobytes()):08x}":
        raise ValueError(
            f"{file} is damaged: its content does not match its checksum or size; delete the file, and the same command computes it again"
        )
    return values


def write(folder: Path, index: int, values: np.ndarray) -> None:
    """Writes a part of the cache in one move; two processes may write the same part."""
    from safetensors.numpy import save_file

    with output.file(folder / f"{index:06d}.safetensors", shared=True) as tmp:
        save_file({"logps": values}, tmp, metadata={"crc": f"{zlib.crc32(values.tobytes()):08x}"})
