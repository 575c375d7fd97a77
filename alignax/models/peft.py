"""PEFT's adapter folders in and out: adapter_config.json and adapter_model.safetensors.

PEFT adapts the modules of the files, we the matrices that they hold. Where a module holds several side by side (GPT-2's c_attn: q, k
and v), a folder's A is each one's A, and its B is cut as the weight is; written back, their As stand side by side and B is block
diagonal, so the rank is the sum of theirs.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output
from alignax.data.files import short
from alignax.distributed import is_main, together
from alignax.models import adapter_config, hf, lora, parameters, reward
from alignax.models.layout import Place, joined, places
from alignax.models.lora import MARK, Lora
from alignax.models.tensorfiles import check_finite
from alignax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULTS = {"r": 8, "lora_alpha": 8}  # of PEFT
SCORE = PREFIX + "score.weight"  # a reward model's head, which is trained and stored whole


class Adapted:
    """Which leaves stand in which module of a folder, for one model."""

    def __init__(self, source: hf.Source):
        """`source`: the base model's folder."""
        c = source.config
        shapes = hf.stored_shapes(c)
        self.layers, self.shapes = c.num_hidden_layers, shapes
        self.places = places(source.family.weights, shapes, c.num_attention_heads)
        experts = ("gate", "up", "down") if c.num_experts else ()
        leaves = [leaf for leaf in shapes if leaf.startswith("layers.") and leaf.removeprefix("layers.") not in experts]
        self.names = lora.modules(dict(source.family.weights), leaves)  # matrix -> module
        self.modules: dict[str, list[str]] = {}  # module -> its matrices, in the file's order
        for leaf in source.family.weights:
            if (matrix := leaf.removeprefix("layers.")) in self.names:
                self.modules.setdefault(self.names[matrix], []).append(matrix)

        named = {w.name.rpartition(".")[0].format(i, 0) for w in source.family.weights.values() for i in range(self.layers)}
        self.others = sorted(named - set(self.every()))  # modules with weights that are not adapted here

    def every(self) -> list[str]:
        """The whole names of the modules that can be adapted, layer by layer."""
        return [module.format(i) for i in range(self.layers) for module in self.modules]

    def width(self, matrix: str) -> int:
        """Outputs of a matrix."""
        return self.shapes["layers." + matrix][-1]

    def place(self, matrix: str) -> Place:
        """Where its columns lie in the module's weight."""
        return self.places["layers." + matrix]


def write_adapter(adapters: Params, spec: Lora, source: hf.Source, base: str, out: Path, origin: str = "") -> None:
    """Writes a PEFT folder, whole or not at all. Every process calls it; process 0 writes.

    Args:
      adapters: the trained tree.
      spec: how they adapt.
      source: the base model's folder.
      base: where PEFT is to look for the base.
      out: a folder that does not exist yet, or is an earlier one.
      origin: what the folder says of its writer, see `alignax.output.claim`.
    """
    if out.exists() and not (out / CONFIG).is_file() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} exists and is not an adapter folder; choose another place")
    check_finite(adapters, "float32", f"the adapter for {str(out)!r}")
    layers = {name: meshes.gathered(x) for name, x in adapters["layers"].items()}
    adapted = Adapted(source)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, matrices in adapted.modules.items():
        chosen = [n for n in matrices if n in spec.targets]
        if not chosen:
            continue
        ranks[module] = spec.rank * len(chosen)
        for i in range(adapted.layers):
            at = PREFIX + module.format(i)
            a = np.concatenate([layers[f"{n}{MARK}a"][i] for n in chosen], axis=1)  # [in, ranks]
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
            content = _config(spec, adapted, ranks, base, kept, head)
            (tmp / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _columns(blocks: list[np.ndarray], place: Place) -> np.ndarray:
    """Matrices of a module side by side as its weight has them, outputs first: [out, rows]."""
    whole = joined(blocks, place)
    return whole if place.turned(2) else np.ascontiguousarray(whole.T)


def _config(spec: Lora, adapted: Adapted, ranks: dict[str, int], base: str, fan_in_fan_out: bool, head: dict[str, Any]) -> dict[str, Any]:
    """The content of adapter_config.json; `head`: what it says of a reward model's.

    Where a module's rank is larger its alpha is too, so that the scale is the same.
    """
    own = {module: rank for module, rank in ranks.items() if rank != spec.rank}
    name = lambda module: module.rpartition(".{}.")[2]
    alpha = lambda rank: spec.scale * (math.sqrt(rank) if spec.rslora else rank)
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM", **head,
        "base_model_name_or_path": base, "r": spec.rank, "lora_alpha": spec.alpha,
        "target_modules": sorted({name(module) for module in ranks}), "use_rslora": spec.rslora, "use_dora": spec.dora,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
        "rank_pattern": {name(module): rank for module, rank in own.items()},
        "alpha_pattern": {name(module): alpha(rank) for module, rank in own.items()},
    }  # fmt: skip


def read_adapter(folder: Path, source: hf.Source, mesh: Mesh) -> tuple[Lora, Params]:
    """A PEFT folder's adapters, sharded, and how they adapt.

    Raises:
      ValueError: for a damaged folder, another base, and options of PEFT that alignax has not.
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
        raise ValueError(f"{folder / WEIGHTS} has {len(stored)} tensors that its config does not describe, {short(min(stored))} first")
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
    """The leaves that a module's tensors hold, filled up to the rank of the whole with zeros, which training leaves zeros.

    `how`: its rank, 0 where it is not adapted, and scale.
    """
    at, (rank, scale) = PREFIX + module, how
    place, inputs = adapted.place(matrices[0]), adapted.shapes["layers." + matrices[0]][-2]
    outputs, leaves = place.groups * place.stride, {}
    a, b, m = np.zeros((inputs, spec.rank), np.float32), np.zeros((spec.rank, outputs), np.float32), None
    if rank:
        a[:, :rank] = _take(stored, f"{at}.lora_A.weight", (rank, inputs), folder).T
        b[:rank] = _take(stored, f"{at}.lora_B.weight", (outputs, rank), folder).T * (scale / spec.scale)
        m = _take(stored, f"{at}.lora_magnitude_vector", (outputs,), folder) if spec.dora else None
    for n in matrices:
        columns = np.concatenate([np.arange(s.start, s.stop) for s in adapted.place(n).spans(range(adapted.width(n)))])
        leaves |= {f"{n}{MARK}a": a, f"{n}{MARK}b": b[:, columns]} | ({} if m is None else {f"{n}{MARK}m": m[columns]})
    return leaves


def _read_head(folder: Path, stored: dict[str, np.ndarray], source: hf.Source, mesh: Mesh) -> Params:
    """A reward model's head, taken from the stored tensors; nothing, for a language model."""
    if not source.config.num_labels:
        return {}
    abstract = parameters.abstract_params(source.config, mesh)
    offset = reward.offsets(hf.read_object(folder / CONFIG, "fetch the adapter again"), source.config.num_labels, folder / CONFIG)
    found = {"score": _take(stored, SCORE, abstract["score"].shape[::-1], folder).T, reward.OFFSET: offset}
    return {name: jax.device_put(x, abstract[name].sharding) for name, x in found.items()}


def place_adapters(layers: dict[str, np.ndarray], spec: Lora, source: hf.Source, mesh: Mesh) -> Params:
    """Adapters from host arrays, laid out over the mesh."""
    abstract = parameters.abstract_adapters(source.config, spec, mesh)["layers"]
    put = lambda x, like: jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(x[index], np.float32))
    return {"layers": {name: put(layers[name], like) for name, like in abstract.items()}}


def read_config(folder: Path, source: hf.Source) -> tuple[Lora, dict[str, tuple[int, float]]]:
    """How a PEFT folder adapts, and the rank and the scale of each module, by its whole name; the rank of the whole is the largest."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}; give the path of a PEFT adapter folder")
    config = DEFAULTS | hf.read_object(file, "fetch the adapter again")
    adapter_config.check(config, file)
    adapted = Adapted(source)

    def match() -> tuple[list[str], dict[str, int], dict[str, float]]:
        chosen = adapter_config.chosen(config, adapted.every(), adapted.others, file)
        ranks = adapter_config.of_each(config, "rank_pattern", config["r"], chosen, file)
        return chosen, ranks, adapter_config.of_each(config, "alpha_pattern", config["lora_alpha"], chosen, file)

    chosen, ranks, alphas = adapter_config.in_time(match, file)
    largest = max(chosen, key=lambda m: ranks[m])
    own = {module: [m for m in map(module.format, range(adapted.layers)) if m in ranks] for module in adapted.modules}
    if config.get("use_dora") and (partly := next((m for m, there in own.items() if 0 < len(there) < adapted.layers), None)):
        raise ValueError(f"{file} adapts {partly} of some layers alone with use_dora, which is not supported; {adapter_config.REMEDY}")
    targets = tuple(n for n in lora.MATRICES if n in adapted.names and own[adapted.names[n]])
    spec = Lora(ranks[largest], alphas[largest], targets, bool(config.get("use_rslora")), bool(config.get("use_dora")))
    scales = {m: adapter_config.scale(config, ranks[m], alphas[m]) for m in chosen}
    if odd := next((m for m in chosen if not 1e-6 < scales[m] / spec.scale < 1e6), None):
        raise ValueError(f"{file} scales {odd} by {scales[odd]:g} and {largest} by {spec.scale:g}; float32 cannot hold both, correct it")
    return spec, {m: (ranks[m], scales[m]) for m in chosen}


def weights(folder: Path) -> Path:
    """The file of a folder's tensors, which are of types that are read.

    Raises:
      ValueError: where there is none, or one that is damaged.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{str(folder)!r} has its weights as adapter_model.bin, which could run code; save it as {WEIGHTS} with peft first"
            )
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS}; fetch the adapter again")
    for name, (dtype, _) in hf.header(file).items():
        hf.check_type(name, dtype, file)
    return file


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    file = weights(folder)
    output.check(folder)
    with safe_open(file, framework="np") as opened:
        return {name: np.asarray(opened.get_tensor(name), np.float32) for name in opened.keys()}  # noqa: SIM118


def _take(stored: dict[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if name not in stored:
        there = f" and holds {short(min(stored))}; is it of this model, under the names that PEFT saves?" if stored else "; fetch it again"
        raise ValueError(f"{folder / WEIGHTS} lacks {name}{there}")
    x = stored.pop(name)
    if x.shape != shape:
        raise ValueError(f"{name} in {folder / WEIGHTS} has shape {x.shape}, not {shape}; is it an adapter of this model?")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} in {folder} holds values that are not finite; train it again")
    return x
