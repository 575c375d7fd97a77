"""Hugging Face model folders in and out, without torch.

Weights are read slice by slice: each device shard reads only its own part of the files, so no process holds a model that its mesh
would not. Export writes one file's worth of tensors at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.data.files import one_line, short
from alignax.distributed import is_main, together
from alignax.models import families, reward, transformer
from alignax.models.families import Family
from alignax.models.layout import Place, Tensor, joined, leaf_name, leaf_shapes, places, tensors
from alignax.models.lora import Lora, split, with_norms
from alignax.models.transformer import ModelConfig
from alignax.types import Params

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 5 * 10**9  # of an exported file, as transformers has it
GENERATION = "generation_config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
LayerReader = Callable[[str, Sequence[range]], Iterator[np.ndarray]]  # (leaf, ranges of its indices) -> its layers


class Stored(NamedTuple):
    """Where a tensor is, and its name there."""

    file: Path
    name: str


class Source(NamedTuple):
    """An opened model folder, or a soup of several, which has the first one's small files."""

    path: Path
    hf: dict[str, Any]  # its config.json
    family: Family
    stored: ModelConfig  # of the files
    config: ModelConfig  # of the model that is made of them: it may have another head, see `with_heads`
    soup: tuple[tuple["Source", float], ...] = ()  # folders and their shares of every weight; (): this folder alone


def open_folder(path: str | os.PathLike) -> Source:
    """Reads a folder's config.json; the weights stay on disk."""
    path = Path(path)
    file = path / "config.json"
    if not path.is_dir():
        raise ValueError(f"model folder {str(path)!r} does not exist; give the path of a Hugging Face model folder")
    if not file.is_file():
        raise ValueError(f"{str(path)!r} has no config.json; give the path of a Hugging Face model folder")
    hf = read_object(file, "fetch the model folder again")
    kind, config = families.read(hf, str(file))
    config = dataclasses.replace(config, num_labels=reward.labels(hf, str(file)))
    return Source(path, hf, kind, config, config)


def make_soup(parts: Sequence[tuple[Source, float]]) -> Source:
    """The mean of several folders' weights (Wortsman et al. 2022, arXiv:2203.05482), as a source like any other.

    theta = sum_i share_i theta_i, of every parameter, norms and embeddings included

    Raises:
      ValueError: for folders that are not alike, and for shares that do not sum to 1.
    """
    shares = [share for _, share in parts]
    if not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the shares {', '.join(map(str, shares))} of averaged weights sum to {math.fsum(shares):g}; make them sum to 1")
    check_alike([source for source, _ in parts])
    return parts[0][0]._replace(soup=tuple(parts))


def ingredients(source: Source) -> tuple[tuple[Source, float], ...]:
    """The folders that weights are read from, and the share that each has."""
    return source.soup or ((source, 1.0),)


def check_alike(sources: Sequence[Source]) -> None:
    """Refuses folders of different shapes, vocabularies or tokenizers."""
    first = sources[0]
    for source in sources[1:]:
        differs = "shape or vocabulary" if source.stored != first.stored else "tokenizer"
        if source.stored != first.stored or _tokenizer(source.path) != _tokenizer(first.path):
            raise ValueError(f"{str(source.path)!r} has another {differs} than {str(first.path)!r}; all must have the same")


def _tokenizer(folder: Path) -> bytes:
    """What tells the folder's tokenizer from another."""
    file = folder / "tokenizer.json"
    return file.read_bytes() if file.is_file() else b""


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not a JSON object ({one_line(e)}); {remedy}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object but {short(found)}; {remedy}")
    return found


def with_heads(source: Source, num_labels: int, values: int = 0) -> Source:
    """The same trunk with that many scores (0: as the folder is) and values; a head that the folder has not begins anew."""
    config = dataclasses.replace(source.config, num_labels=num_labels or source.config.num_labels, critic_heads=values)
    return source._replace(config=config)


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of the parameters; nothing is computed."""
    boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        return shapes
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(described, shapes, meshes.param_shardings(mesh, boxed))


def abstract_adapters(config: ModelConfig, lora: Lora, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of the adapters alone."""
    return split(abstract_params(dataclasses.replace(config, lora=lora), mesh))[1]


def init_adapters(source: "Source", lora: Lora, mesh: Mesh, base: Params, key: jax.Array) -> Params:
    """Fresh adapters, with which the model is its base."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(source.config, lora, mesh))
    return jax.jit(functools.partial(fresh_adapters, source.config, lora), out_shardings=shardings)(base, key)


def fresh_adapters(config: ModelConfig, lora: Lora, base: Params, key: jax.Array) -> Params:
    """The adapters that a key gives; pure."""
    return with_norms(lora, base, split(fresh(dataclasses.replace(config, lora=lora), key))[1])


def fresh(config: ModelConfig, key: jax.Array) -> Params:
    """The parameters that a key gives; pure, and under jit only those that are used are made."""
    return nn.unbox(transformer.init(config, key))


def init_params(config: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Random parameters, made where they live: no device holds more than its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(functools.partial(fresh, config), out_shardings=shardings)(key)


def load_params(source: Source, mesh: Mesh, key: jax.Array | None = None) -> Params:
    """A folder's weights as sharded float32 parameters; a score head that it has not is drawn from the key (default: 0).

    Of a soup they are averaged as they are read, a layer at a time.

    Raises:
      ValueError: for missing, extra or misshapen tensors and damaged files, before any weight is read.
    """
    from safetensors import safe_open

    abstract = abstract_params(source.config, mesh)
    kept = source.config.num_labels == source.stored.num_labels
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda file: stack.enter_context(safe_open(file, framework="np")))
        layers = soup_reader(source.soup, opened) if source.soup else layer_reader(source, opened)

        def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = leaf_name(path)
            if name == reward.VALUE or (name in reward.HEAD and not kept):
                return fresh_leaf(source.config, name, leaf.sharding, key)

            def read(index: tuple[slice, ...]) -> np.ndarray:
                ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
                found = list(layers(name, ranges))
                return (np.stack(found) if len(found) > 1 else found[0]).reshape([len(r) for r in ranges])

            parts: dict[str, np.ndarray] = {}  # devices that hold copies of a shard share one reading of it

            def once(index: Any) -> np.ndarray:
                if str(index) not in parts:
                    parts[str(index)] = read(index)
                return parts[str(index)]

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, once)

        return jax.tree_util.tree_map_with_path(load, abstract)


def layer_reader(source: Source, opened: Callable[[Path], Any]) -> LayerReader:
    """(leaf, ranges of its indices) -> that part of each of its layers, one after another, as float32 in our layout."""
    files = tensor_files(source)
    check_tensors(source, files)
    where = places(source.family.weights, stored_shapes(source.stored), source.stored.num_attention_heads)

    def layers(name: str, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        if name == reward.OFFSET:
            offsets = reward.offsets(source.hf, source.stored.num_labels, source.path / "config.json")
            yield offsets[ranges[0].start : ranges[0].stop]
            return
        place = where[name]
        for at in itertools.product(*ranges[: place.stacked]):
            stored = files[place.weight.name.format(*at)]
            yield read_part(opened(stored.file), stored, place, ranges[place.stacked :])

    return layers


def soup_reader(parts: Sequence[tuple[Source, float]], opened: Callable[[Path], Any]) -> LayerReader:
    """The same of a soup: the mean of its folders' layers, which are read together."""
    readers = [layer_reader(source, opened) for source, _ in parts]

    def layers(name: str, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for found in zip(*(read(name, ranges) for read in readers), strict=True):
            yield functools.reduce(np.add, (np.float32(share) * x for (_, share), x in zip(parts, found, strict=True)))

    return layers


def fresh_leaf(config: ModelConfig, name: str, sharding: Any, key: jax.Array | None) -> jax.Array:
    """One leaf of the parameters that the key gives, made where it lives."""
    make = jax.jit(lambda key: fresh(config, key)[name], out_shardings=sharding)
    return make(jax.random.key(0) if key is None else key)


def read_part(opened: Any, stored: Stored, place: Place, ranges: Sequence[range]) -> np.ndarray:
    """Rows and columns of a leaf's layer as float32, in our layout."""
    turned = place.turned(len(ranges))
    part = np.concatenate([read_slice(opened, stored.name, i) for i in place.indices(ranges)], axis=0 if turned else -1)
    if not np.isfinite(part).all():
        raise ValueError(f"{stored.name} in {stored.file} holds values that are not finite; fetch the folder again, or train it again")
    return part.T if turned else part


def read_slice(opened: Any, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Part of a tensor of an opened file, as float32."""
    return np.asarray(opened.get_slice(name)[index], np.float32)


def tensor_files(source: Source) -> dict[str, Stored]:
    """Tensor name -> where it is stored; files of a bare model (GPT-2's own, say) leave the first word of every name out."""
    found = _named_files(source.path)
    first = source.family.weights["embed"].name.split(".")[0] + "."
    bare = not any(name.startswith(first) for name in found)
    return {first + name if bare else name: Stored(file, name) for name, file in found.items()}


def _named_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single file or an index of shards."""
    single, index = (path / name for name in WEIGHT_FILES)
    if index.is_file():
        weight_map = read_object(index, "fetch it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
            raise ValueError(f"{index} is not an index of tensors: weight_map is {short(weight_map)}, not names and files; fetch it again")
        if absent := sorted(set(weight_map.values()) - {p.name for p in path.iterdir() if p.is_file()}):
            raise ValueError(f"{index} names {len(absent)} files that are not there: {short(absent[0])} first; fetch them")
        return {name: path / file for name, file in weight_map.items()}
    if single.is_file():
        return dict.fromkeys(header(single), single)
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


def check_tensors(source: Source, files: Mapping[str, Stored]) -> None:
    """Compares names, shapes and types of a folder's tensors with what its config says."""
    wanted = {t.name: t.shape for t in plan(source, source.stored)}
    tied = {source.family.weights["lm_head"].name} if source.config.tie_word_embeddings else set()
    names = {n for n in files if not n.endswith(source.family.ignored)} - tied
    where = f"{str(source.path)!r}"
    if missing := sorted(set(wanted) - names):
        raise ValueError(f"{where} lacks {len(missing)} tensors, {missing[0]} first; fetch the folder again")
    if extra := sorted(names - set(wanted)):
        raise ValueError(
            f"{where} has {len(extra)} tensors that config.json does not describe, {short(extra[0])} first; is it this model's config?"
        )
    headers = {file: header(file) for file in sorted({s.file for s in files.values()})}
    for name, shape in wanted.items():
        if files[name].name not in headers[files[name].file]:
            raise ValueError(f"{files[name].file} does not hold {name}, which its index places there; fetch it again")
        dtype, found = headers[files[name].file][files[name].name]
        check_type(name, dtype, files[name].file)
        if found != shape:
            raise ValueError(f"{name} in {where} has shape {found}, config.json says {shape}; is it this model's config?")
    placed = {s.name: s.file for s in files.values()}
    for file, there in headers.items():
        if twice := sorted(name for name in there if placed.get(name, file) != file):
            raise ValueError(f"{file} and {placed[twice[0]]} both hold {twice[0]}; fetch the folder again")


def plan(source: Source, config: ModelConfig) -> list[Tensor]:
    """All tensors of a folder that holds such a model."""
    return tensors(source.family.weights, stored_shapes(config), config.num_attention_heads)


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape, of those that the weight files hold; the offset of scores is in config.json, and a critic nowhere."""
    return {name: shape for name, shape in leaf_shapes(abstract_params(config)).items() if name not in (reward.OFFSET, reward.VALUE)}


def export(
    params: Params,
    source: Source,
    out: str | os.PathLike,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    eos: int | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers loads: weights, config, and the source's tokenizer and generation config.

    The folder appears whole or not at all. Every process calls it; process 0 writes.

    Args:
      params: policy parameters, sharded as they are.
      source: the folder that training started from; its config.json and all its small files are carried over.
      out: a folder that does not exist yet, or is an earlier export.
      dtype: "float32", "bfloat16" or "float16".
      shard_bytes: the most that one file holds.
      eos: the token that completions were trained to end with; the generation config then stops at it too.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    out = Path(out)
    main = is_main()
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} exists and is not a model folder; choose another place")
    tmp = out.with_name(out.name + ".tmp")
    with together():
        if main:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
    leaves = {leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    where = places(source.family.weights, stored_shapes(source.config), source.config.num_attention_heads)
    offset = meshes.gathered(leaves[reward.OFFSET]).tolist() if reward.OFFSET in leaves else None
    shards = _shards(plan(source, source.config), jnp.dtype(dtype).itemsize, shard_bytes)
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for tensor in shard:
            parts = [meshes.gathered(leaves[name][tensor.at]) for name in tensor.leaves]
            if main:
                content[tensor.name] = joined(parts, where[tensor.leaves[0]]).astype(jnp.dtype(dtype))
        index |= dict.fromkeys(content, file)
        with together():
            if main:
                from safetensors.numpy import save_file

                save_file(content, tmp / file, metadata={"format": "pt"})
                os.chmod(tmp / file, 0o666 & ~umask())  # which safetensors leaves at 0600
    with together():
        if main:
            if len(shards) > 1:
                total = sum(math.prod(t.shape) for shard in shards for t in shard) * jnp.dtype(dtype).itemsize
                content = {"metadata": {"total_size": total}, "weight_map": index}
                (tmp / WEIGHT_FILES[1]).write_text(json.dumps(content, indent=2))
            _copy_small_files(source, tmp)
            changes = {"dtype": dtype} | ({} if offset is None else reward.fields(source.hf, offset, reward.pad_token(tmp)))
            hf = {k: v for k, v in source.hf.items() if k != "torch_dtype"} | changes
            (tmp / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
            if eos is not None and eos not in (ids := stop_ids(source)):
                fields = generation_config(source) | {"eos_token_id": [*ids, eos] if ids else eos}
                (tmp / GENERATION).write_text(json.dumps(fields, indent=2) + "\n")
            replace(out, tmp)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def replace(out: Path, new: Path) -> None:
    """Puts a finished folder in the place of an earlier one."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _shards(all_tensors: list[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Tensors cut into files of at most `limit` bytes (or one tensor)."""
    shards, size = [[]], 0
    for tensor in all_tensors:
        n = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n
    return shards


def generation_config(source: Source) -> dict[str, Any]:
    """What a folder says of generation; where it has no file for that, what transformers takes from its config.json."""
    file = source.path / GENERATION
    if not file.is_file():
        return {name: source.hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if source.hf.get(name) is not None}
    return read_object(file, "fetch the model folder again")


def stop_ids(source: Source) -> list[int]:
    """The tokens that a folder's generation stops at."""
    ids = generation_config(source).get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _copy_small_files(source: Source, out: Path) -> None:
    """Tokenizer, chat templates and generation config as they were."""
    for file in [*source.path.iterdir(), *source.path.glob("additional_chat_templates/*.jinja")]:
        small = file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
        if file.is_file() and small and file.name != "config.json" and not file.name.endswith(".index.json"):
            copy = out / file.relative_to(source.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
