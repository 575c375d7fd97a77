"""Files of tensors in and out: which of a folder's files are meant, what they hold, and whether it is what was written."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from alignax.data.files import one_line, short

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
DIGEST = "crc32"  # in the metadata of a file that we write: tensor name -> checksum


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not a JSON object ({one_line(e)}); {remedy}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object but {short(found)}; {remedy}")
    return found


def named_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single file or an index of shards."""
    single, index = (path / name for name in WEIGHT_FILES)
    if single.is_file():  # as transformers has it: an index beside it is of other files
        return dict.fromkeys(header(single), single)
    if index.is_file():
        weight_map = read_object(index, "fetch it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
            raise ValueError(f"{index} is not an index of tensors: weight_map is {short(weight_map)}, not names and files; fetch it again")
        if absent := sorted(set(weight_map.values()) - {p.name for p in path.iterdir() if p.is_file()}):
            raise ValueError(f"{index} names {len(absent)} files that are not there: {short(absent[0])} first; fetch them")
        return {name: path / file for name, file in weight_map.items()}
    if other := sorted(p.name for p in path.iterdir() if p.suffix in OTHER_WEIGHTS):
        raise ValueError(
            f"{str(path)!r} has no model.safetensors but {short(other[0])}, which is not read; load the model with transformers, where it "
            "is trusted, and save_pretrained writes model.safetensors"
        )
    raise ValueError(f"{str(path)!r} has no model.safetensors; set model.init to 'random' to start without weights")


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> type (as safetensors names it) and shape, of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is damaged or cut short ({one_line(e)}); fetch it again") from e


def check_type(name: str, dtype: str, file: Path) -> None:
    """Refuses a tensor that holds no floating-point numbers of the types that are read."""
    if dtype not in DTYPES.values():
        raise ValueError(f"{short(name)} in {file} is stored as {dtype}; only {', '.join(DTYPES)} are read")


def save_tensors(content: dict[str, np.ndarray], file: Path) -> None:
    """Writes a safetensors file, with a digest of each tensor in its metadata, which a file that others write anew has not."""
    from safetensors.numpy import save_file

    save_file(content, file, metadata={"format": "pt", DIGEST: json.dumps({name: digest(x) for name, x in content.items()})})
    os.chmod(file, 0o666 & ~umask())  # which safetensors leaves at 0600


def digest(x: np.ndarray) -> int:
    """A tensor's bytes as a checksum, which any one flipped bit changes."""
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def check_digests(opened: Any, file: Path) -> None:
    """Refuses an opened file of which a tensor is not what was written; one without digests is read as it is."""
    said = (opened.metadata() or {}).get(DIGEST)
    if said is None:
        return
    try:
        digests = {str(name): int(x) for name, x in json.loads(said).items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise ValueError(f"{file} has digests that cannot be read ({one_line(e)}); it is damaged, fetch or export it again") from e
    there = set(opened.keys())
    for name, expected in digests.items():
        if name not in there or digest(opened.get_tensor(name)) != expected:
            raise ValueError(f"{file} is damaged: {short(name)} is not what was written; fetch or export it again")


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
