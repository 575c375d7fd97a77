"""Random tiny models in torch, whose logits ours must reproduce; torch is a dependency of the tests alone."""

import copy
from pathlib import Path

import jax
import numpy as np
import tiny
import torch
import transformers

from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.heads import soft_cap
from alignax.models.transformer import Decoder, head_weight

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def write(
    path: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", auto=transformers.AutoModelForCausalLM, **changes
) -> transformers.PreTrainedModel:
    """A model of `model_type` (Llama if not given) with every weight random, norms and biases too, saved to `path`."""
    torch.manual_seed(0)
    fields = copy.deepcopy(tiny.CONFIG | changes)  # some configs write into what they are given
    config = transformers.AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "architectures"})
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return model


def positions(mask: np.ndarray) -> np.ndarray:
    """Position ids that count real tokens, as transformers wants them for padded rows."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def torch_logits(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of a torch model: [R, T, V]."""
    ids, attend, place = (torch.tensor(x, dtype=torch.long) for x in (tokens, mask, positions(mask)))
    with torch.no_grad():
        return model(ids, attention_mask=attend, position_ids=place).logits.float().numpy()


def our_logits(path: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of our forward pass with the folder's weights: [R, T, V]."""
    source = hf.open_folder(path)
    params = hf.load_params(source, make_mesh({}, jax.devices()[:1]))

    @jax.jit
    def logits(params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = Decoder(source.config, remat="none").apply({"params": params}, tokens, mask)
        return soft_cap(hidden @ head_weight(source.config, params), source.config.final_logit_softcapping)

    return np.asarray(logits(params, tokens, mask))


def rows(lengths: list[int], T: int, left: tuple[int, ...] = (), V: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [R, T] and their mask; rows in `left` are left padded, others right padded."""
    rng = np.random.default_rng(0)
    place = np.arange(T)
    mask = np.stack([place >= T - n if i in left else place < n for i, n in enumerate(lengths)])
    return np.where(mask, rng.integers(3, V, mask.shape), 0), mask
