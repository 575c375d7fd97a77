"""Reads and writes safetensors files: which files a model folder's weights are in, their headers and checks of their content."""

import functools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.mesh import gathered
from alignax.paths import Remote, remote
from alignax.text import one_line, short
from alignax.types import Params

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # types that are read from a bucket
HEADER = 10**8  # the most bytes of a header, as in safetensors
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """Reads the JSON object in a file; a file without one is refused, with `remedy` at the end of the error."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not a JSON object ({one_line(e)}); {remedy}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object but {short(found)}; {remedy}")
    return found


def named_files(path: Path) -> dict[str, Path]:
    """The file that holds each tensor of a folder, by the tensor's name; from model.safetensors or an index of shards."""
    single, index = (path / name for name in WEIGHT_FILES)
    if single.is_file():  # as in transformers, an index beside the single file is ignored
        return dict.fromkeys(header(single), single)
    if index.is_file():
        weight_map = read_object(index, "fetch it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
            raise ValueError(f"{index} is not an index of tensors: weight_map is {short(weight_map)}, not names and files; fetch it again")
        if absent := sorted(set(weight_map.values()) - {p.name for p in path.iterdir() if p.is_file()}):
            raise ValueError(f"{index} names {len(absent)} files that are not there, the first is {short(absent[0])}; fetch them")
        return {name: path / file for name, file in weight_map.items()}
    if other := sorted(p.name for p in path.iterdir() if p.suffix in OTHER_WEIGHTS):
        raise ValueError(
            f"{str(path)!r} has no model.safetensors but {short(other[0])}, which alignax does not read; if you trust the file, load "
            "the model with transformers, and save it with save_pretrained, which writes model.safetensors"
        )
    raise ValueError(f"{str(path)!r} has no model.safetensors; set model.init to 'random' to start without weights")


class _Ranges:
    """A safetensors file on a bucket, with those methods of `safe_open` that alignax uses; of a tensor only the rows asked for are read."""

    def __init__(self, file: Remote):
        from safetensors import SafetensorError

        self.file, size = file, file.stat().st_size
        start = 8 + int.from_bytes(file.read_range(0, 8), "little")
        if not 8 < start <= min(size, HEADER):
            raise SafetensorError("its header is cut short or no header")
        try:
            about = json.loads(file.read_range(8, start))
            self._metadata, self._start = about.pop("__metadata__", None), start
            self._tensors: dict[str, tuple[str, list[int], int, int]] = {}
            for name, x in about.items():
                begin, end = map(int, x["data_offsets"])
                self._tensors[name] = x["dtype"], [*map(int, x["shape"])], begin, end
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SafetensorError(f"its header is damaged: {one_line(e)}") from e
        if start + max((end for *_, end in self._tensors.values()), default=0) != size:
            raise SafetensorError(f"it has {size:,} bytes, which is not what its header says")

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return sorted(self._tensors)

    def metadata(self) -> dict[str, str] | None:
        """The texts that the writer added."""
        return self._metadata

    def get_slice(self, name: str) -> "_Slice":
        """A tensor, of which parts can be read."""
        from safetensors import SafetensorError

        if name not in self._tensors:
            raise SafetensorError(f"File does not contain tensor {name}")
        return _Slice(self.file, self._start, *self._tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        """A whole tensor."""
        return self.get_slice(name)[...]


class _Slice(NamedTuple):
    """A tensor of a safetensors file on a bucket."""

    file: Remote
    start: int  # of the data in the file
    dtype: str
    shape: list[int]
    begin: int  # of the tensor in the data
    end: int

    def get_dtype(self) -> str:
        """The type, as safetensors names it."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """The shape."""
        return self.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """Part of the tensor; its rows are read in one range."""
        from safetensors import SafetensorError

        if self.dtype not in NUMPY or math.prod(self.shape) * np.dtype(NUMPY[self.dtype]).itemsize != self.end - self.begin:
            raise SafetensorError(f"a tensor of type {self.dtype} and shape {self.shape} in {self.end - self.begin} bytes cannot be read")
        index = index if isinstance(index, tuple) else (index,)
        rows = range(self.shape[0])[index[0]] if self.shape and index and isinstance(index[0], slice) else None
        first, last = (0, 1) if rows is None else (rows.start, max(rows.stop, rows.start))
        row = (self.end - self.begin) // (1 if rows is None else max(self.shape[0], 1))
        content = self.file.read_range(self.start + self.begin + first * row, self.start + self.begin + last * row)
        found = np.frombuffer(content, NUMPY[self.dtype]).reshape(self.shape if rows is None else [last - first, *self.shape[1:]])
        return found[index] if rows is None else found[(slice(None), *index[1:])]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file, on this machine or on a bucket."""
    from safetensors import safe_open

    if far := remote(file):
        yield _Ranges(far)
        return
    with safe_open(file, framework="np") as f:
        yield f


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of a safetensors file: tensor name -> type, as safetensors names it, and shape; a damaged file is refused."""
    from safetensors import SafetensorError

    try:
        with opened(file) as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is damaged or cut short ({one_line(e)}); fetch it again") from e


def check_type(name: str, dtype: str, file: Path) -> None:
    """Refuses a tensor whose type is not float32, float16 or bfloat16."""
    if dtype not in DTYPES.values():
        raise ValueError(f"{short(name)} in {file} is stored as {dtype}; alignax reads {', '.join(DTYPES)}, so convert it")


def save_tensors(content: dict[str, np.ndarray], file: Path) -> None:
    """Writes arrays by name as a safetensors file."""
    from safetensors.numpy import save_file

    save_file(content, file, metadata={"format": "pt"})
    os.chmod(file, 0o666 & ~umask())  # safetensors creates the file with mode 0600


def check_finite(params: Params, dtype: str, what: str) -> None:
    """Refuses parameters with values that are not finite, or that overflow in the dtype of the file; every process must call this.

    Raises:
      FloatingPointError: names the first such leaves.
    """
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [name for name, there in zip(names, gathered(_finite(params, dtype)), strict=True) if not there]
    if bad:
        wider = "" if dtype == "float32" else ", or set export.dtype=float32 if they are finite there"
        raise FloatingPointError(
            f"{what} holds values that are not finite in {dtype} ({', '.join(bad[:3])}); train again with a lower "
            f"optimizer.learning_rate{wider}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _finite(params: Params, dtype: str) -> jax.Array:
    """Whether all values of each leaf are finite in a dtype, [leaves]; compiled once for all exports of a model."""
    within = lambda x: jnp.all(jnp.abs(x) <= jnp.finfo(dtype).max)  # no cast: compilers may compute narrow types in wider ones
    return jnp.stack([within(x) for x in jax.tree.leaves(params)])


def umask() -> int:
    """The umask of the process. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
