"""Reads and writes Hugging Face model folders, without torch.

Weights are read slice by slice: each device shard reads only its own part of the files, so no process holds more of a model than its
devices do. An export gathers the tensors of one file at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output, paths
from alignax.distributed import is_main, together
from alignax.models import families, reward
from alignax.models.families import Family
from alignax.models.layout import Place, Tensor, joined, leaf_name, leaf_shapes, places, tensors
from alignax.models.parameters import abstract_params as abstract_params
from alignax.models.parameters import fresh as fresh
from alignax.models.parameters import fresh_leaf
from alignax.models.parameters import init_params as init_params  # random parameters, beside `load_params`
from alignax.models.small_files import copy_small_files, tokenizer_parts
from alignax.models.tensorfiles import (
    DTYPES,
    WEIGHT_FILES,
    check_finite,
    check_type,
    header,
    named_files,
    opened,
    read_object,
    save_tensors,
)
from alignax.models.transformer import ModelConfig
from alignax.text import short
from alignax.types import Params

SHARD_BYTES = 5 * 10**9  # the most bytes of an exported file, as in transformers
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")  # fields of config.json that replace a missing generation config
LayerReader = Callable[[str, Sequence[range]], Iterator[np.ndarray]]  # (leaf, index ranges) -> that part of each layer, in turn


class Stored(NamedTuple):
    """The file that stores a tensor, and the tensor's name in that file."""

    file: Path
    name: str


class Source(NamedTuple):
    """An opened model folder, or a soup: several folders whose weights are averaged. A soup has the small files of its first folder."""

    path: Path
    hf: dict[str, Any]  # the content of config.json
    family: Family
    stored: ModelConfig  # the model that the files hold
    config: ModelConfig  # the model that is loaded; its heads may differ, see `with_heads`
    soup: tuple[tuple["Source", float], ...] = ()  # the folders of a soup with their shares; (): no soup
    adapters: Path | None = None  # a PEFT folder that turns this model into a reward model, see `peft.open_reward`


def open_folder(path: str | os.PathLike) -> Source:
    """Opens a Hugging Face model folder: reads and checks its config.json, and leaves the weights on disk."""
    path = paths.of(path)
    file = path / "config.json"
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file; give the path of a Hugging Face model folder, such as {str(path.parent)!r}")
    if not path.is_dir():
        raise ValueError(f"model folder {str(path)!r} does not exist; give the path of a Hugging Face model folder")
    if not file.is_file() and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(path)!r} holds adapters and no model; merge them into their base with peft (merge_and_unload) and give that, or, to "
            "train them on, give their base as model.path and the adapters as lora.path; those of a reward model can be a reward.path"
        )
    if (path / "adapter_config.json").is_file():  # transformers would apply these adapters to the model
        raise ValueError(
            f"{str(path)!r} holds a model and adapters; move the adapters into a folder of their own, to be given as lora.path, or, where "
            "they are merged already, delete adapter_config.json"
        )
    if not file.is_file():
        raise ValueError(f"{str(path)!r} has no config.json; give the path of a Hugging Face model folder")
    hf = read_object(file, "fetch the model folder again")
    kind, config = families.read(hf, str(file))
    labels = reward.labels(hf, str(file))
    config = dataclasses.replace(config, num_labels=labels, padding=reward.padding(hf, str(file)) if labels else None)
    source = Source(path, hf, kind, config, config)
    if config.tie_word_embeddings and not config.num_labels and _has_own_head(source):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return source._replace(stored=config, config=config)


def _has_own_head(source: Source) -> bool:
    """Whether the files hold an output layer that differs from the embedding. Transformers then ignores the tying in config.json."""
    if not any((source.path / name).is_file() for name in WEIGHT_FILES):
        return False
    files = tensor_files(source)
    pair = [files.get(source.family.weights[leaf].name) for leaf in ("embed", "lm_head")]
    if None in pair:
        return False
    (embed, _, rows), (head, _, _) = found = [(s, *header(s.file).get(s.name, ("absent", ()))) for s in pair if s is not None]
    for stored, dtype, _ in found:
        check_type(stored.name, dtype, stored.file)
    if found[0][2] != found[1][2]:
        return True
    with opened(embed.file) as a, opened(head.file) as b:
        cuts = [(slice(i, min(i + 4096, rows[0])),) for i in range(0, rows[0], 4096)]
        return any(not np.array_equal(read_slice(a, embed.name, i), read_slice(b, head.name, i), equal_nan=True) for i in cuts)


def make_soup(parts: Sequence[tuple[Source, float]]) -> Source:
    """Makes a model soup: a source whose weights are a weighted mean of several folders' (Wortsman et al. 2022, arXiv:2203.05482).

    theta = sum_i share_i theta_i, for every parameter, norms and embeddings included

    Raises:
      ValueError: for folders that differ in shape, vocabulary or tokenizer, and for shares that do not sum to 1.
    """
    shares = [share for _, share in parts]
    if not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the shares {', '.join(map(str, shares))} of averaged weights sum to {math.fsum(shares):g}; make them sum to 1")
    check_alike([source for source, _ in parts])
    return parts[0][0]._replace(soup=tuple(parts))


def ingredients(source: Source) -> tuple[tuple[Source, float], ...]:
    """The folders of a source with the share of each: the parts of a soup, or one folder with share 1."""
    return source.soup or ((source, 1.0),)


def check_alike(sources: Sequence[Source]) -> None:
    """Refuses model folders that differ in shape, vocabulary or tokenizer."""
    first = sources[0]
    for source in sources[1:]:
        differs = "shape or vocabulary" if source.config != first.config else "tokenizer"
        if source.config != first.config or tokenizer_parts(source.path) != tokenizer_parts(first.path):
            raise ValueError(f"{str(source.path)!r} has another {differs} than {str(first.path)!r}; give models that share one")


def with_heads(source: Source, num_labels: int, values: int = 0, language: bool = False) -> Source:
    """The source with other heads on its trunk; `load_params` initialises a head that the folder does not have.

    Args:
      source: an opened folder.
      num_labels: scores of a reward model; 0: as many as the folder has.
      values: heads of a critic.
      language: keeps the output layer beside the scores, see `ModelConfig.language_head`.
    """
    heads: Any = {"num_labels": num_labels or source.config.num_labels, "critic_heads": values, "language_head": language}
    config = dataclasses.replace(source.config, **heads)
    return source._replace(config=config)


def load_params(source: Source, mesh: Mesh, key: jax.Array | None = None) -> Params:
    """Loads a folder's weights as float32 parameters, sharded over the mesh.

    The weights of a soup are averaged while they are read, one layer at a time. Every process must call this.

    Args:
      source: an opened folder or a soup.
      mesh: the mesh to shard over.
      key: initialises the heads that the folder does not have; default: `jax.random.key(0)`.

    Raises:
      ValueError: for missing, extra or misshapen tensors and damaged files, before any weight is read.
    """
    abstract = abstract_params(source.config, mesh)
    kept = source.config.num_labels == source.stored.num_labels
    with together():
        if is_main():  # the check reads every byte, so one process does it
            for part, _ in ingredients(source):
                output.check(part.path)
    with contextlib.ExitStack() as stack:
        kept_open = functools.cache(lambda file: stack.enter_context(opened(file)))
        layers = soup_reader(source.soup, kept_open) if source.soup else layer_reader(source, kept_open)

        def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = leaf_name(path)
            if name == reward.VALUE or (name in reward.HEAD and not kept):
                return fresh_leaf(source.config, name, leaf.sharding, key)

            def read(index: tuple[slice, ...]) -> np.ndarray:
                ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
                found = list(layers(name, ranges))
                return (np.stack(found) if len(found) > 1 else found[0]).reshape([len(r) for r in ranges])

            parts: dict[str, np.ndarray] = {}  # devices with copies of one shard share one read of it

            def once(index: Any) -> np.ndarray:
                if str(index) not in parts:
                    parts[str(index)] = read(index)
                return parts[str(index)]

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, once)

        return jax.tree_util.tree_map_with_path(load, abstract)


def layer_reader(source: Source, opened: Callable[[Path], Any]) -> LayerReader:
    """Makes the reader of a folder's leaves: (leaf, index ranges) -> that part of each layer in turn, float32, in our layout.

    The folder's tensors are checked first, see `check_tensors`. `opened`: opens a safetensors file.
    """
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
    """The `layer_reader` of a soup: it reads a layer from every folder, and gives the weighted mean."""
    readers = [layer_reader(source, opened) for source, _ in parts]

    def layers(name: str, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for found in zip(*(read(name, ranges) for read in readers), strict=True):
            yield functools.reduce(np.add, (np.float32(share) * x for (_, share), x in zip(parts, found, strict=True)))

    return layers


def read_part(opened: Any, stored: Stored, place: Place, ranges: Sequence[range]) -> np.ndarray:
    """Reads part of one layer of a leaf as float32, in our layout; a vector or a matrix. Values that are not finite are refused."""
    turned = place.turned(len(ranges))
    part = np.concatenate([read_slice(opened, stored.name, i) for i in place.indices(ranges)], axis=0 if turned else -1)
    if not np.isfinite(part).all():
        raise ValueError(f"{stored.name} in {stored.file} holds values that are not finite; fetch the folder again, or train it again")
    return part.T if turned else part


def read_slice(opened: Any, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads part of a tensor from an opened safetensors file, as float32."""
    return np.asarray(opened.get_slice(name)[index], np.float32)


def tensor_files(source: Source) -> dict[str, Stored]:
    """Where each tensor of a folder is stored: full tensor name -> file and name there.

    The files of a bare model (GPT-2's own, say) leave out the first word of every name; the keys here have it. If a tied model's files
    hold the output layer and no embedding, the output layer serves as the embedding, as in transformers.
    """
    found = named_files(source.path)
    embed, head = (source.family.weights[leaf].name for leaf in ("embed", "lm_head"))
    first = embed.split(".")[0] + "."
    bare = not any(name.startswith(first) for name in found)
    files = {first + name if bare else name: Stored(file, name) for name, file in found.items()}
    return {embed: files[head]} | files if source.stored.tie_word_embeddings and head in files else files


def check_tensors(source: Source, files: Mapping[str, Stored]) -> None:
    """Refuses a folder whose tensors differ from its config in names, shapes or types, or are stored twice."""
    wanted = {t.name: t.shape for t in plan(source, source.stored)}
    tied = {source.family.weights["lm_head"].name} if source.config.tie_word_embeddings else set()
    names = {n for n in files if not n.endswith(source.family.ignored)} - tied
    where = f"{str(source.path)!r}"
    missing, extra = sorted(set(wanted) - names), sorted(files[n].name for n in names - set(wanted))
    if missing and not extra:
        raise ValueError(f"{where} lacks {len(missing)} tensors, {missing[0]} first; fetch the folder again")
    if extra:
        lacks = f"lacks {len(missing)} tensors, {missing[0]} first, and " if missing else ""
        asked = "check that config.json is this model's, and that the tensors have the names that transformers gives them"
        raise ValueError(f"{where} {lacks}has {len(extra)} tensors that config.json does not describe, {short(extra[0])} first; {asked}")
    headers = {file: header(file) for file in sorted({s.file for s in files.values()})}
    for name, shape in wanted.items():
        if files[name].name not in headers[files[name].file]:
            raise ValueError(f"{files[name].file} does not hold {name}, which its index places there; fetch the folder again")
        dtype, found = headers[files[name].file][files[name].name]
        check_type(name, dtype, files[name].file)
        if found != shape:
            raise ValueError(f"{name} in {where} has shape {found}, but config.json says {shape}; check that config.json is this model's")
    placed = {s.name: s.file for s in files.values()}
    for file, there in headers.items():
        if twice := sorted(name for name in there if placed.get(name, file) != file):
            raise ValueError(f"{file} and {placed[twice[0]]} both hold {twice[0]}; fetch the folder again")
        if unnamed := sorted(name for name in there if name not in placed and not name.endswith(source.family.ignored)):
            raise ValueError(f"{file} holds {short(unnamed[0])}, which its index does not name; fetch the folder again")


def plan(source: Source, config: ModelConfig) -> list[Tensor]:
    """All tensors that the folder of a model stores, by the model's config."""
    return tensors(source.family.weights, stored_shapes(config), config.num_attention_heads)


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The leaves that the weight files store: leaf name -> shape.

    Three leaves are not in these files. The offset of scores is a field of config.json. A critic's value head is not stored, and neither
    is an output layer beside scores, because transformers has no such model.
    """
    config = dataclasses.replace(config, language_head=False)
    return {name: shape for name, shape in leaf_shapes(abstract_params(config)).items() if name not in (reward.OFFSET, reward.VALUE)}


def export(
    params: Params,
    source: Source,
    out: str | os.PathLike,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    eos: int | None = None,
    origin: str = "",
) -> None:
    """Writes a Hugging Face folder that transformers loads: weights, config, and the source's tokenizer and generation config.

    The folder appears whole or not at all. Every process must call this; process 0 writes.

    Args:
      params: policy or reward model parameters, sharded in any way.
      source: the folder that training started from. Its small files are copied; its config.json is carried over.
      out: a folder that does not exist yet, is empty, or is an earlier export.
      dtype: "float32", "bfloat16" or "float16".
      shard_bytes: the most bytes of one file.
      eos: the token that ends completions in training; it is added to the stop tokens of the generation config.
      origin: who writes the folder, see `alignax.output.claim`.

    Raises:
      ValueError: for an unknown dtype, and for an `out` that holds something other than a model.
      OSError: if the disk has too little room; an earlier export stays whole.
      FloatingPointError: for values that are not finite in the dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    out = paths.of(out)
    if output.taken(out, "config.json"):
        raise ValueError(f"{str(out)!r} exists and is not a model folder; choose another place")
    with together():
        output.require_space(
            output.staged(out), sum(math.prod(t.shape) for t in plan(source, source.config)) * jnp.dtype(dtype).itemsize, "the model"
        )
    check_finite(params, dtype, f"the model for {str(out)!r}")
    with output.folder(out, origin) as tmp:
        _write(params, source, tmp, dtype, shard_bytes, eos)


def _write(params: Params, source: Source, tmp: Path, dtype: str, shard_bytes: int, eos: int | None) -> None:
    """Writes the files of an export into a temporary folder."""
    main = is_main()
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
                save_tensors(content, tmp / file)
    with together():
        if main:
            if len(shards) > 1:
                total = sum(math.prod(t.shape) for shard in shards for t in shard) * jnp.dtype(dtype).itemsize
                content = {"metadata": {"total_size": total}, "weight_map": index}
                (tmp / WEIGHT_FILES[1]).write_text(json.dumps(content, indent=2))
            copy_small_files(source.path, tmp)
            untied = {} if source.config.tie_word_embeddings or not source.hf.get("tie_word_embeddings") else {"tie_word_embeddings": False}
            pad = source.config.padding  # keeps the position that the score is read at
            pad = reward.pad_token(tmp) if offset is not None and pad is None else pad
            changes = {"dtype": dtype} | untied | ({} if offset is None else reward.fields(source.hf, offset, pad))
            hf = {k: v for k, v in source.hf.items() if k != "torch_dtype"} | changes
            (tmp / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
            if eos is not None and eos not in (ids := stop_ids(source)):
                fields = generation_config(source) | {"eos_token_id": [*ids, eos] if ids else eos}
                (tmp / GENERATION).write_text(json.dumps(fields, indent=2) + "\n")


def _shards(all_tensors: list[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Tensors grouped into files of at most `limit` bytes; a larger tensor has a file of its own."""
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
    """The generation config of a folder. Without its file: the special tokens of config.json, as in transformers."""
    file = source.path / GENERATION
    if not file.is_file():
        outer, inner = source.hf, source.hf.get("text_config") or {}
        found = {name: outer[name] if outer.get(name) is not None else inner.get(name) for name in SPECIAL}
        return {name: value for name, value in found.items() if value is not None}
    return read_object(file, "fetch the model folder again")


def unread(source: Source) -> str:
    """The options of a folder's generation config that alignax ignores, as text for a message; empty if there are none.

    Only the stop tokens of a generation config are used.
    """
    asked = generation_config(source)
    plain = {
        "do_sample": True,
        "use_cache": True,
        "temperature": 1,
        "top_p": 1,
        "repetition_penalty": 1,
        "length_penalty": 1,
        "num_beams": 1,
    }
    plain |= {"num_return_sequences": 1, "transformers_version": asked.get("transformers_version")}
    beyond = {
        name: x for name, x in asked.items() if x and not (name.startswith("_") or name.endswith("token_id")) and plain.get(name) != x
    }
    if source.config.predicted_tokens:  # already keeps these tokens out of every distribution
        beyond.pop("suppress_tokens", None)
    return ", ".join(f"{short(name)[1:-1]} {short(x)}" for name, x in sorted(beyond.items()))


def stop_ids(source: Source) -> list[int]:
    """The ids of the stop tokens in a folder's generation config, as transformers reads them.

    Raises:
      ValueError: for an id that is no token of the model.
    """
    found = generation_config(source).get("eos_token_id")
    ids = [] if found is None else list(found) if isinstance(found, list) else [found]
    if odd := [i for i in ids if type(i) is not int or not 0 <= i < source.config.vocab_size]:
        file = source.path / (GENERATION if (source.path / GENERATION).is_file() else "config.json")
        raise ValueError(f"eos_token_id {short(odd[0])} in {file} is none of the model's {source.config.vocab_size} tokens; correct the id")
    return ids


def end_ids(source: Source, tokenizer: Any) -> tuple[int, ...]:
    """The ids of the tokens that end a completion: the tokenizer's EOS and the stop tokens of the generation config.

    Samplers stop at these tokens, completion masks of conversations end with them, and a sample without one counts as truncated. Only
    the tokenizer's EOS is appended to a text that has no end token.
    """
    return tuple(sorted({tokenizer.eos_token_id, *stop_ids(source)}))


def with_vocabulary(source: Source, tokenizer: Any) -> Source:
    """The source with `unused_tokens` set: the model never predicts ids that its tokenizer does not have, of a padded vocabulary say."""
    there = np.zeros(source.config.vocab_size + 2, np.int8)
    ids = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    there[1 + ids[ids < source.config.vocab_size]] = 1  # the tokenizer may have ids beyond the head's
    there[[0, -1]] = 1
    edges = np.flatnonzero(np.diff(there)).tolist()  # alternately the first id of an unused range and the first id after it
    return source._replace(config=dataclasses.replace(source.config, unused_tokens=tuple(zip(edges[::2], edges[1::2], strict=True))))
