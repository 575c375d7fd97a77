"""Reads and writes PEFT's adapter folders: adapter_config.json and adapter_model.safetensors.

PEFT adapts the modules of the files; we adapt the matrices that a module holds. A fused module holds several matrices side by side
(GPT-2's c_attn: q, k and v). When such a module is read, each matrix gets the module's A, and B is cut into columns as the weight is.
When it is written, the As of its matrices stand side by side and B is block diagonal, so the module's rank is the sum of their ranks.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output, paths
from alignax.distributed import is_main, together
from alignax.models import adapter_config, hf, lora, parameters, reward
from alignax.models.layout import Place, joined, places
from alignax.models.lora import MARK, Lora
from alignax.models.small_files import chat_template, tokenizer_parts
from alignax.models.tensorfiles import check_finite
from alignax.text import short
from alignax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's own
SCORE = PREFIX + "score.weight"  # a reward model's head; it is trained and stored whole, not as an adapter


class Adapted:
    """The modules of one model that PEFT can adapt, and the matrices that each module holds."""

    def __init__(self, source: hf.Source):
        """Finds the modules of a base model's folder."""
        c = source.config
        shapes = hf.stored_shapes(c)
        self.layers, self.shapes = c.num_hidden_layers, shapes
        self.places = places(source.family.weights, shapes, c.num_attention_heads)
        experts = ("gate", "up", "down") if c.num_experts else ()
        leaves = [leaf for leaf in shapes if leaf.startswith("layers.") and leaf.removeprefix("layers.") not in experts]
        self.names = lora.modules(dict(source.family.weights), leaves)  # matrix -> module
        self.modules: dict[str, list[str]] = {}  # module -> its matrices, in the order of the file
        for leaf in source.family.weights:
            if (matrix := leaf.removeprefix("layers.")) in self.names:
                self.modules.setdefault(self.names[matrix], []).append(matrix)

        named = {w.name.rpartition(".")[0].format(i, 0) for w in source.family.weights.values() for i in range(self.layers)}
        self.others = sorted(named - set(self.every()))  # modules with weights that cannot be adapted here

    def every(self) -> list[str]:
        """The full names of all modules that can be adapted, layer by layer."""
        return [module.format(i) for i in range(self.layers) for module in self.modules]

    def width(self, matrix: str) -> int:
        """The number of outputs of a matrix."""
        return self.shapes["layers." + matrix][-1]

    def place(self, matrix: str) -> Place:
        """The place of a matrix's columns in its module's weight."""
        return self.places["layers." + matrix]


def write_adapter(adapters: Params, spec: Lora, source: hf.Source, base: str, out: Path, origin: str = "") -> None:
    """Writes adapters as a PEFT folder, which appears whole or not at all. Every process must call this; process 0 writes.

    Args:
      adapters: the parameter tree of the adapters, with a reward model's head.
      spec: the settings of the adapters.
      source: the base model's folder.
      base: the path or name under which PEFT will look for the base.
      out: a folder that does not exist yet, is empty, or is an earlier adapter folder.
      origin: who writes the folder, see `alignax.output.claim`.

    Raises:
      ValueError: for an `out` that holds something other than adapters, and for DoRA on part of a fused module.
      FloatingPointError: for values that are not finite.
    """
    if output.taken(out, CONFIG):
        raise ValueError(f"{str(out)!r} exists and is not an adapter folder; choose another place")
    check_finite(adapters, "float32", f"the adapter for {str(out)!r}")
    layers = {name: meshes.gathered(x) for name, x in adapters["layers"].items()}
    adapted = Adapted(source)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    names: list[str] = []  # full names of the adapted modules
    for module, matrices in adapted.modules.items():
        chosen = [n for n in matrices if n in spec.targets]
        if not chosen:
            continue
        ranks[module] = spec.rank * len(chosen)
        for i in range(adapted.layers):
            at = PREFIX + module.format(i)
            a = np.concatenate([layers[f"{n}{MARK}a"][i] for n in chosen], axis=1)  # [in, ranks]
            if not a.any():  # not adapted in this layer
                continue
            names.append(module.format(i))
            tensors[f"{at}.lora_A.weight"] = np.ascontiguousarray(a.T)
            blocks = [np.zeros((a.shape[1], adapted.width(n)), np.float32) for n in matrices]
            for j, n in enumerate(chosen):
                blocks[matrices.index(n)][j * spec.rank : (j + 1) * spec.rank] = layers[f"{n}{MARK}b"][i]
            tensors[f"{at}.lora_B.weight"] = _columns(blocks, adapted.place(matrices[0]))  # [out, ranks]
            if spec.dora:
                if len(chosen) < len(matrices):
                    raise ValueError(f"PEFT's DoRA adapts all of {module}, not {', '.join(chosen)} alone; export the merged model")
                sizes = [layers[f"{n}{MARK}m"][i][None] for n in chosen]
                tensors[f"{at}.lora_magnitude_vector"] = _columns(sizes, adapted.place(matrices[0]))[:, 0]
    offset = []
    if "score" in adapters:
        tensors[SCORE] = np.ascontiguousarray(meshes.gathered(adapters["score"]).T)
        offset = meshes.gathered(adapters[reward.OFFSET]).tolist()
    with output.folder(out, origin) as tmp, together():
        if is_main():
            hf.save_tensors(tensors, tmp / WEIGHTS)
            kept = any(adapted.place(m[0]).weight.kept for m in adapted.modules.values())
            head = {"modules_to_save": ["score"], reward.OFFSET: offset} if offset else {}
            content = _config(spec, names, len(ranks) * adapted.layers, ranks, base, kept, head)
            (tmp / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _columns(blocks: list[np.ndarray], place: Place) -> np.ndarray:
    """The matrices [rows, out] of a module, side by side in the order of its weight, with outputs first: [out of all, rows]."""
    whole = joined(blocks, place)
    return whole if place.turned(2) else np.ascontiguousarray(whole.T)


def _config(
    spec: Lora, names: list[str], most: int, ranks: dict[str, int], base: str, fan_in_fan_out: bool, head: dict[str, Any]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    A module with a larger rank gets a larger alpha, so that all modules have the same scale.

    Args:
      spec: the settings of the adapters.
      names: full names of the adapted modules; fewer than `most` if a module is adapted in some layers only.
      most: the number of modules of these kinds in all layers.
      ranks: module -> rank.
      base: the path or name under which PEFT will look for the base.
      fan_in_fan_out: whether the base's files store matrices as [in, out].
      head: fields of a reward model's head; empty for a language model.
    """
    own = {module: rank for module, rank in ranks.items() if rank != spec.rank}
    name = lambda module: module.rpartition(".{}.")[2]
    alpha = lambda rank: spec.scale * (math.sqrt(rank) if spec.rslora else rank)
    targets = sorted({name(module) for module in ranks}) if len(names) == most else names
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM", **head,
        "base_model_name_or_path": base, "r": spec.rank, "lora_alpha": spec.alpha,
        "target_modules": targets, "use_rslora": spec.rslora, "use_dora": spec.dora,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
        "rank_pattern": {name(module): rank for module, rank in own.items()},
        "alpha_pattern": {name(module): alpha(rank) for module, rank in own.items()},
    }  # fmt: skip


def read_adapter(folder: Path, source: hf.Source, mesh: Mesh) -> tuple[Lora, Params]:
    """Reads the adapters of a PEFT folder: their settings, and their parameters sharded over the mesh.

    Raises:
      ValueError: for a damaged folder, for adapters of another base, and for options of PEFT that are not supported.
    """
    spec, modules = read_config(folder, source)
    adapted = Adapted(source)
    stored = _read_tensors(folder)
    head = _read_head(folder, stored, source, mesh)
    layers: dict[str, list[np.ndarray]] = {}
    for module, matrices in adapted.modules.items():
        for i in range(adapted.layers if matrices[0] in spec.targets else 0):
            at = module.format(i)
            for name, x in _read_module(stored, at, matrices, modules.get(at, (0, 0.0)), spec, adapted, folder).items():
                layers.setdefault(name, []).append(x)
    if stored:
        raise ValueError(
            f"{folder / WEIGHTS} has {len(stored)} tensors that its config does not describe, {short(min(stored))} first; save "
            "the adapter again with peft"
        )
    return spec, place_adapters({name: np.stack(parts) for name, parts in layers.items()}, spec, source, mesh) | head


def _read_module(
    stored: dict[str, np.ndarray],
    module: str,
    matrices: list[str],
    how: tuple[int, float],
    spec: Lora,
    adapted: Adapted,
    folder: Path,
) -> dict[str, np.ndarray]:
    """The adapter leaves of one module, from its stored tensors.

    A module of a smaller rank than `spec.rank` is padded with zeros, which stay zeros in training. `how`: the module's rank and scale;
    rank 0 for a module that is not adapted.
    """
    at, (rank, scale) = PREFIX + module, how
    place, inputs = adapted.place(matrices[0]), adapted.shapes["layers." + matrices[0]][-2]
    outputs, leaves = place.groups * place.stride, {}
    a, b, m = np.zeros((inputs, spec.rank), np.float32), np.zeros((spec.rank, outputs), np.float32), np.zeros(outputs, np.float32)
    if rank:
        a[:, :rank] = _take(stored, f"{at}.lora_A.weight", (rank, inputs), folder).T
        b[:rank] = _take(stored, f"{at}.lora_B.weight", (outputs, rank), folder).T * (scale / spec.scale)
        m = _take(stored, f"{at}.lora_magnitude_vector", (outputs,), folder) if spec.dora else m
    for n in matrices:
        columns = np.concatenate([np.arange(s.start, s.stop) for s in adapted.place(n).spans(range(adapted.width(n)))])
        leaves |= {f"{n}{MARK}a": a, f"{n}{MARK}b": b[:, columns]} | ({f"{n}{MARK}m": m[columns]} if spec.dora else {})
    return leaves


def _read_head(folder: Path, stored: dict[str, np.ndarray], source: hf.Source, mesh: Mesh) -> Params:
    """The head of a reward model, taken from the stored tensors; empty for a language model."""
    if not source.config.num_labels:
        return {}
    abstract = parameters.abstract_params(source.config, mesh)
    offset = reward.offsets(hf.read_object(folder / CONFIG, "fetch the adapter again"), source.config.num_labels, folder / CONFIG)
    found = {"score": _take(stored, SCORE, abstract["score"].shape[::-1], folder).T, reward.OFFSET: offset}
    return {name: jax.device_put(x, abstract[name].sharding) for name, x in found.items()}


def place_adapters(layers: dict[str, np.ndarray], spec: Lora, source: hf.Source, mesh: Mesh) -> Params:
    """Places host arrays of adapters [L, ...] on the mesh, as a sharded parameter tree in float32."""
    abstract = parameters.abstract_adapters(source.config, spec, mesh)["layers"]
    put = lambda x, like: jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(x[index], np.float32))
    return {"layers": {name: put(layers[name], like) for name, like in abstract.items()}}


def merged(source: hf.Source, spec: Lora, adapters: Params, mesh: Mesh) -> Params:
    """The parameters of an adapted model with its adapters folded in; the base is read from its folder again, in full precision."""
    return jax.jit(functools.partial(lora.merge, spec), donate_argnums=0)(hf.load_params(source, mesh), adapters)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def open_reward(folder: Path) -> hf.Source:
    """Opens a reward model that is stored as a PEFT folder, as TRL saves it: adapters and a head, over a base on this machine.

    The base is a language model as a rule.

    Raises:
      ValueError: for adapters without a head, for a base that is not on this machine, and for a folder whose tokenizer or chat template
        differs from the base's.
    """
    file = folder / CONFIG
    base = hf.read_object(file, "fetch the adapter again").get("base_model_name_or_path")
    if not isinstance(base, str) or not paths.of(base).is_dir():
        raise ValueError(f"{file} names the base {short(base)}, which is no folder here; write the path of the base there")
    head = hf.header(weights(folder)).get(SCORE)
    if head is None:
        raise ValueError(f"{str(folder)!r} holds adapters of a language model, without {SCORE}; give those of a reward model")
    source = hf.with_heads(hf.open_folder(base), head[1][0])._replace(adapters=folder)
    read_config(folder, source)
    own, theirs = ((tokenizer_parts(path)[-1], chat_template(path)) for path in (folder, source.path))
    if any(mine not in (None, other) for mine, other in zip(own, theirs, strict=True)):
        raise ValueError(
            f"the tokenizer or the chat template in {str(folder)!r} is not that of its base {str(source.path)!r}, which is the one that "
            "alignax reads; copy the adapter's chat_template.jinja and tokenizer_config.json into a copy of the base, and name this copy "
            "in base_model_name_or_path"
        )
    return source


def load_reward(source: hf.Source, mesh: Mesh) -> Params:
    """Loads a reward model's parameters, sharded; a source from `open_reward` gets its adapters folded in."""
    if source.adapters is None:
        return hf.load_params(source, mesh)
    return merged(source, *read_adapter(source.adapters, source, mesh), mesh)


def read_config(folder: Path, source: hf.Source) -> tuple[Lora, dict[str, tuple[int, float]]]:
    """Reads a PEFT folder's config: the settings of its adapters, and each adapted module's rank and scale by its full name.

    The settings have the rank and alpha of a module with the largest rank. Errors are those of `read_adapter`.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}; give the path of a PEFT adapter folder")
    config = DEFAULTS | hf.read_object(file, "fetch the adapter again")
    adapter_config.check(config, file)
    if adapter_config.is_reward(config) and not source.config.num_labels:
        raise ValueError(
            f"{file} is of a reward model (task_type {short(config.get('task_type'))}, modules_to_save "
            f"{short(config.get('modules_to_save'))}), and {str(source.path)!r} is a language model; give the adapters as reward.path, or "
            "set model.num_labels to train them on as a reward model"
        )
    adapted = Adapted(source)

    def match() -> tuple[list[str], dict[str, int], dict[str, float]]:
        chosen = adapter_config.chosen(config, adapted.every(), adapted.others, file)
        ranks = adapter_config.of_each(config, "rank_pattern", config["r"], chosen, file)
        return chosen, ranks, adapter_config.of_each(config, "alpha_pattern", config["lora_alpha"], chosen, file)

    chosen, ranks, alphas = adapter_config.in_time(match, file)
    largest = max(chosen, key=lambda m: ranks[m])
    some = {module for module in adapted.modules if any(module.format(i) in ranks for i in range(adapted.layers))}
    targets = tuple(n for n in lora.MATRICES if adapted.names.get(n) in some)
    spec = Lora(ranks[largest], alphas[largest], targets, bool(config.get("use_rslora")), bool(config.get("use_dora")))
    scales = {m: adapter_config.scale(config, ranks[m], alphas[m]) for m in chosen}
    if odd := next((m for m in chosen if not 1e-6 < scales[m] / spec.scale < 1e6), None):
        raise ValueError(
            f"{file} scales {odd} by {scales[odd]:g} and {largest} by {spec.scale:g}; float32 cannot hold both; correct lora_alpha or r"
        )
    return spec, {m: (ranks[m], scales[m]) for m in chosen}


def weights(folder: Path) -> Path:
    """The path of an adapter folder's tensor file.

    A file that is missing, damaged or of a type that is not read is refused.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{str(folder)!r} has its weights as adapter_model.bin, a format that can run code; load it with peft, where you trust it, "
                f"and save it as {WEIGHTS}"
            )
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS}; fetch the adapter again")
    for name, (dtype, _) in hf.header(file).items():
        hf.check_type(name, dtype, file)
    return file


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = weights(folder)
    output.check(folder)
    with hf.opened(file) as stored:
        return {name: np.asarray(stored.get_tensor(name), np.float32) for name in stored.keys()}  # noqa: SIM118


def _take(stored: dict[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if name not in stored:
        there = f" and holds {short(min(stored))}; check that it is of this model" if stored else "; fetch the adapter again"
        raise ValueError(f"{folder / WEIGHTS} lacks {name}{there}")
    x = stored.pop(name)
    if x.shape != shape:
        raise ValueError(f"{name} in {folder / WEIGHTS} has shape {x.shape}, not {shape}; check that the adapter belongs to this model")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} in {folder} holds values that are not finite; train the adapter again")
    return x
