"""Export of a run: the trained model as a Hugging Face folder, and its adapters as a PEFT folder."""

from collections.abc import Iterator

import jax

from alignax.models import hf, peft
from alignax.models.reward import CRITIC
from alignax.run.log import Log
from alignax.run.prepare import Run, origin
from alignax.types import Params, TrainState


def export(run: Run, state: TrainState, log: Log) -> None:
    """Writes the trained model to the Hugging Face folder `export`, with adapters merged, and the adapters to the PEFT folder `adapter`.

    Each member of an ensemble has a folder of its own: `export/member_0`, `adapter/member_0`.
    """
    c, params, by = run.config.export, state.params, origin(run.experiment)
    params = params if c.params == "policy" else state.averages[c.params]
    source, lora = run.policy.source, run.policy.lora
    for name, one in members_of({leaf: x for leaf, x in params.items() if leaf != CRITIC}, run.policy.members):
        if lora is not None and lora.targets:
            peft.write_adapter(one, lora, source, run.config.model.path, run.workdir / "adapter" / name, by)
            log.line(f"adapters written to {run.workdir / 'adapter' / name}")
        whole = peft.merged(source, lora, one, run.mesh) if lora is not None else one
        hf.export(whole, source, run.workdir / "export" / name, c.dtype, eos=run.words.tokenizer.eos_token_id, origin=by)
        log.line(f"exported to {run.workdir / 'export' / name}")


def members_of(params: Params, members: int) -> Iterator[tuple[str, Params]]:
    """Name and parameters of each member of an ensemble [K, ...]; a single model (`members` 0) has an empty name."""
    take = jax.jit(lambda tree, k: jax.tree.map(lambda x: x[k], tree), static_argnums=1)
    return ((f"member_{k}", take(params, k)) for k in range(members)) if members else iter([("", params)])
