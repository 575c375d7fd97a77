"""Reads and writes safetensors files: which files a model folder's weights are in, their headers and checks of their content."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.mesh import gathered
from alignax.text import one_line, short
from alignax.types import Params

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
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


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of a safetensors file: tensor name -> type, as safetensors names it, and shape; a damaged file is refused."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
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
    within = lambda x: jnp.all(jnp.abs(x) <= jnp.finfo(dtype).max)  # no cast: compilers may compute narrow types in wider ones
    fine = gathered(jax.jit(lambda tree: jnp.stack([within(x) for x in jax.tree.leaves(tree)]))(params))
    bad = [name for name, there in zip(names, fine, strict=True) if not there]
    if bad:
        wider = "" if dtype == "float32" else ", or set export.dtype=float32 if they are finite there"
        raise FloatingPointError(
            f"{what} holds values that are not finite in {dtype} ({', '.join(bad[:3])}); train again with a lower "
            f"optimizer.learning_rate{wider}"
        )


def umask() -> int:
    """The umask of the process. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
