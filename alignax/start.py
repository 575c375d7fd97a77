"""From a checked run to its arrays on the mesh: models loaded, what is trained made or restored, what is frozen set apart."""

import json
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import ensemble, output, rewards
from alignax.blame import blaming, explained
from alignax.calls import METRICS
from alignax.checkpoint import Checkpoints, nbytes
from alignax.config import asked, code, effective, eval_batch_size, flat, prompts_of_rollout
from alignax.data import Examples
from alignax.data.files import short
from alignax.data.template import Today
from alignax.distributed import check_alike, is_main, together
from alignax.evaluate import SAMPLED, tries
from alignax.experience import advance, first_carry
from alignax.models import hf, parameters, peft, reward
from alignax.models.lora import quantise, split
from alignax.online import make_judge, training_program
from alignax.prepare import Run
from alignax.programs import (
    abstract_batch,
    abstract_frozen,
    abstract_rollout,
    abstract_state,
    abstract_trained,
    frozen_dtype,
    frozen_sources,
    make_programs,
    new_state,
    reference_name,
)
from alignax.reference import with_stored
from alignax.rollout import MOST, answer_of, behind_file
from alignax.train import digest
from alignax.types import Batch, Model, Outputs, Params, TrainState

UNSAID = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # what changes no computation
BLOCK = 1 << 16  # bytes of a block of which a CRC is taken


class Started(NamedTuple):
    """A run with its arrays on the mesh, at step 0 or where it was stopped."""

    run: Run
    state: TrainState
    step: int  # steps taken
    frozen: dict[str, Params]  # what it holds and does not train: "reference", if there is one
    about: dict[str, str]  # digests of the policy and the reference that it started from
    checkpoints: Checkpoints
    lock: output.Lock


def start(run: Run, write: bool = True) -> Started:
    """Loads models and the newest checkpoint, if there is one. Nothing is trained yet; only with `write` is the workdir touched.

    Raises:
      ValueError: for weights that are not finite, and for a checkpoint that is damaged or is not this run's.
      OSError: when the disk has no room for a checkpoint.
    """
    config = run.config
    with together():
        own = given(run) if jax.process_count() > 1 else {}
    check_alike(own)
    with together():
        check_step(run)
        params = initial_params(run)
        original = reference_params(run, params)
    about = described(run.source, run.tokenizer)
    about |= {"policy": fingerprint(params), "reference": fingerprint(original), "data": data_digest(run)}
    stored = {"base": split(params)[0], "reference": split(original)[0] if run.reference else None}
    frozen = {name: frozen_copy(run, name, stored[name]) for name in frozen_sources(run)}
    if run.judges:
        with together():
            judges = rewards.load_members(run.judges, run.mesh)
        about["ensemble"] = fingerprint(judges)
        frozen["ensemble"] = frozen_copy(run, "ensemble", judges)
        del judges
    if config.reference.cache:
        name = reference_name(run)
        scorer = frozen[name] if name in frozen else frozen_copy(run, name, original)
        say = lambda line: print(line, file=sys.stderr, flush=True) if is_main() else None
        run = with_stored(run, scorer, about["reference"], say)
        del scorer
    if run.members:
        params = original = spread(run, params, frozen.get("base"))
        about["members"] = fingerprint(params)
    elif run.lora is not None:
        params = original = initial_adapters(run, params, frozen["base"])
        about["adapters"] = fingerprint(params)
    del stored
    own = {} if original is params else {"reference": original}  # what is given away may not be an argument twice
    if run.critic is not None:
        with together():
            params = params | {reward.CRITIC: critic_params(run.critic, run.mesh)}
        about["critic"] = fingerprint(params[reward.CRITIC])
    lock = output.Lock(None)
    if write:
        with together():
            output.require_space(run.workdir, nbytes(abstract_state(run)), "a checkpoint", "make room, or choose another workdir")
            lock = open_workdir(run)
    checkpoints = Checkpoints(run.workdir, config.checkpoint.keep, config.checkpoint.best, write)
    compared = about if write else {name: x for name, x in about.items() if name != "data"}  # evaluation may have other data
    about = about | {"day": Today.day.isoformat()}  # what templates call today, also when the run goes on tomorrow

    def restored(step: int) -> TrainState:
        check_same(run.workdir, step, checkpoints.about(step), compared)
        return checkpoints.restore(step, abstract_state(run))

    step = checkpoints.latest() or 0
    if step:
        del params, original, own  # one training state at a time
        step, state = checkpoints.newest(restored)
    else:
        # A critic is the policy's alone, whatever an average starts from.
        averages = lambda p, own: {name: p | own.get(name, {}) for name in run.averages}
        fresh = lambda p, key, own, frozen: new_state(run, p, key, averages(p, own), frozen)
        layout = jax.tree.map(lambda x: x.sharding, abstract_state(run))
        state = jax.jit(fresh, out_shardings=layout, donate_argnums=0)(params, jax.random.key(config.seed), own, frozen)
    return Started(run, state, step, frozen, about, checkpoints, lock)


def given(run: Run) -> dict[str, str]:
    """All that the processes of a run must have been given alike, by name, as text."""
    fields = "\n".join(f"{name} = {value!r}" for name, value in sorted(flat(run.config).items()))
    package = sorted(Path(__file__).parent.rglob("*.py"))
    ours = "\n".join(f"{file.relative_to(Path(__file__).parent)} {zlib.crc32(file.read_bytes()):08x}" for file in package)
    streams = {"data.train": run.train, "data.pretrain": run.pretrain, "data.eval": run.evaluation}
    data = {name: f"{x.digest():08x}" for name, x in streams.items() if x is not None}
    columns = {name: (x if isinstance(x, Examples) else x.examples).columns for name, x in streams.items() if x is not None}
    models = {str(x.path) for source in (run.source, run.reference, run.critic, *run.judges) if source for x, _ in hf.ingredients(source)}
    return {
        "config": fields,
        "experiment": code(run.experiment),
        "alignax": f"jax {jax.__version__}\n{ours}",
        "data": "\n".join(f"{name} {value} {zlib.crc32(repr(columns[name]).encode()):08x}" for name, value in data.items()),
        "model": "\n".join(sketch(Path(folder)) for folder in sorted(models | ({run.config.lora.path} - {""}))),
    }


def sketch(folder: Path) -> str:
    """Every file of a model folder with its size and a CRC, of large ones of 64 blocks between start and end: a file a line."""
    lines = []
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors")):
        size, crc = file.stat().st_size, 0
        with open(file, "rb") as f:
            for at in range(0, size, max(size // 64, BLOCK)):
                f.seek(at)
                crc = zlib.crc32(f.read(BLOCK), crc)
        lines.append(f"{file}: {size} bytes, {crc:08x}")
    return "\n".join(lines)


def check_step(run: Run) -> None:
    """Traces the training step on shapes alone, so that a loss that does not fit its data is refused before anything is written."""
    online = run.config.rollout.samples > 0
    functions = [name for name in ("gold", "reward", METRICS) if getattr(run.experiment, name) is not None]
    if functions and is_main():
        run.workers.start()  # they load the experiment meanwhile
    try:
        with blaming(run.experiment.file, always=False):
            state, frozen, (step, batch) = abstract_state(run), abstract_frozen(run), training_program(run)
            jax.eval_shape(step, state, frozen, batch)
            if online:
                metrics = jax.eval_shape(
                    make_judge(run), state, frozen, abstract_rollout(run, eval_batch_size(run.config), run.config.eval.samples_per_prompt)
                )
            else:
                metrics = jax.eval_shape(make_programs(run)[1], state, frozen, abstract_batch(run, evaluation=True))
    except KeyError as e:
        raise ValueError(
            f"{explained(e, run.experiment.file)}. The loss or the experience reads it: let an experience write it, or bring it with the "
            "data (data.kind, data.columns)"
        ) from e
    check_advantages(run)
    seen = [f"{METRICS}/{own}" for name in functions if is_main() for own in check_reward(run, name)]
    best = run.config.checkpoint.best.removeprefix("-")
    names = {
        "loss",
        *SAMPLED,
        *(f"pass@{k}" for k in tries(run.config.eval.samples_per_prompt)),
        *(name for name in metrics if not name.startswith("loss:")),
        *seen,
    }
    if best and best not in names and is_main():
        raise ValueError(f"checkpoint.best {best!r} is no metric of the evaluation; use one of {', '.join(sorted(names))}")


def check_advantages(run: Run) -> None:
    """Refuses groups of one response where the experience compares a response with its group.

    The experience is asked what it makes of a small rollout, models that are not loaded yet replaced by functions of the tokens.
    """
    make, B = run.experiment.experience, prompts_of_rollout(run.config)
    if run.config.rollout.samples != 1 or make is None:
        return
    rng, shape = np.random.default_rng(0), (B, 1, 8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    every = jnp.ones(shape, bool)
    said = {"tokens": jnp.asarray(rng.integers(0, 9, shape), jnp.int32), "mask": every, "completion_mask": every.at[..., :2].set(False)}
    batch = said | {"prompt_id": jnp.arange(B), "truncated": jnp.zeros((B, 1), bool), "gold": draw(B, 1), "rewards": draw(B, 1)}
    batch |= {"sampled_logps": -(draw(*shape) ** 2), "old_logps": -(draw(*shape) ** 2)}
    if run.config.model.critic:
        batch["values"] = draw(*shape, *((run.config.model.critic_heads,) if run.config.model.critic_heads > 1 else ()))

    def apply(_: Params, batch: Batch) -> Outputs:
        x = jnp.where(batch["completion_mask"], 0.1 * batch["tokens"], 0.0)
        scores = x.sum(axis=-1)[..., None] * jnp.arange(1, 1 + max(len(run.judges), 1))[None, None]
        return Outputs(-x, x, -x, x, x, scores)

    given = {name: Model(apply, {}) for name in ("policy", "reference", "ensemble")}
    given |= {"config": run.config, "prompts": len(run.train.examples)}
    try:
        experience = make(**{name: given[name] for name in asked(make)})
        written = advance(experience, first_carry(experience), batch)[1]
    except Exception:  # an experience may ask for more than this knows of
        return
    if not np.any(np.asarray(written.get("advantages", written["completion_mask"]))):  # best_and_worst() leaves no token
        if B == 1:
            raise ValueError(
                f"a rollout is of one response (batch_size, rollout.minibatches and rollout.samples are 1), and experience() of "
                f"{run.experiment.file} compares responses: every advantage is 0, and no reward is learnt from. Set rollout.samples or "
                "batch_size to 2 or more"
            )
        raise ValueError(
            f"rollout.samples is 1, and experience() of {run.experiment.file} compares a response with the others of its group: every "
            "advantage is 0, and no reward is learnt from. Set it to 2 or more, or compare otherwise: reinforce_plus_plus(), or gae() with "
            "a critic"
        )


def check_reward(run: Run, name: str) -> list[str]:
    """Asks a function of the experiment once, as a rollout does, of a prompt of the data and the answer that stands there.

    What would stop the run is refused. With `rollout.bad_rewards` "drop" no reward is an answer, and a failure is told, since it may be of
    that answer alone. Returns the names of metrics, where it is these that it gives.
    """
    examples, file = run.evaluation or run.train.examples, run.experiment.file
    answer = examples.tokens[: examples.offsets[1]][examples.scored[: examples.offsets[1]]]
    text = run.tokenizer.decode(answer, skip_special_tokens=True)
    found = answer_of(run, name, examples, [0], [text], [answer], 1)
    if found.problem:
        what = f"{name}() of {file}{behind_file(found.problem)}, asked of a prompt of the data and the completion {short(text)}"
        if found.final or run.config.rollout.bad_rewards == "error":
            numbers = "numbers by name, a list for each with" if name == METRICS else "a list with"
            raise ValueError(f"{what}; it must take any completion, an empty one too, and return {numbers} a number or None for each")
        run.workers.say(what)
    elif name == METRICS:
        return list(found.rewards[0])
    elif run.config.rollout.bad_rewards == "error" and not abs(found.rewards[0]) <= MOST:
        raise ValueError(
            f"{name}() of {file} returns {found.rewards} for one prompt and its completion {short(text)}; it must return a finite number "
            f"up to {MOST:g} for each, or set rollout.bad_rewards=drop, which leaves out those without"
        )
    return []


def initial_params(run: Run) -> Params:
    """The policy's parameters at step 0."""
    if run.config.model.init == "random":
        return parameters.init_params(run.source.config, run.mesh, jax.random.key(run.config.seed))
    return hf.load_params(run.source, run.mesh, jax.random.key(run.config.seed))


def critic_params(source: hf.Source, mesh: Mesh) -> Params:
    """The parameters of a critic at step 0: its folder's, with a head of 0 unless that scores as many labels as there are values."""
    params = hf.load_params(source, mesh)
    kept = source.stored.num_labels == source.config.num_labels
    return params if kept else params | {"score": jnp.zeros_like(params["score"])}


def spread(run: Run, params: Params, base: Params | None) -> Params:
    """What the members of an ensemble train, at step 0 [K, ...]: all parameters, or adapters of the base, and each its own head.

    The head is what each member's seed gives, unless the folder has one: then all begin with that.
    """
    config, lora = run.source.config, run.lora
    own = run.source.stored.num_labels != config.num_labels
    layout = jax.tree.map(lambda x: x.sharding, abstract_trained(run, run.mesh))

    def member(params: Params, base: Params, key: jax.Array) -> Params:
        trained = params if lora is None else parameters.fresh_adapters(config, lora, base, key)
        fresh = parameters.fresh(config, key) if own else params
        return trained | {name: fresh[name] for name in reward.HEAD if name in fresh}

    every = ensemble.over_members(member, (None, None, 0), 0)
    return jax.jit(every, out_shardings=layout)(params, base, ensemble.keys(run.config.seed, run.members))


def initial_adapters(run: Run, params: Params, base: Params) -> Params:
    """The adapters at step 0, with a reward model's head."""
    assert run.lora is not None
    head = {name: params[name] for name in reward.HEAD if name in params}
    if path := run.config.lora.path:
        with together():
            return peft.read_adapter(Path(path), run.source, run.mesh)[1] | {name: x for name, x in head.items() if name == reward.VALUE}
    return parameters.init_adapters(run.source.config, run.lora, run.mesh, base, jax.random.key(run.config.seed)) | head


def reference_params(run: Run, params: Params) -> Params | None:
    """The reference's parameters as they were stored: those that the run starts from unless `reference.path` is another folder's."""
    if run.reference is None or run.reference is run.source:
        return params if run.reference else None
    return hf.load_params(run.reference, run.mesh)


def fingerprint(params: Params | None) -> str:
    """The digest of parameters, as text; none of none."""
    return "" if params is None else f"{int(jax.jit(digest)(params)):08x}"


def frozen_copy(run: Run, name: str, params: Params) -> Params:
    """Parameters that are only read, "base" or "reference", in the types that `frozen_dtype` says."""
    if name == "base" and run.lora is not None and run.lora.int8:
        params = jax.jit(quantise)(params)
    # Copies, never aliases: the training step gives the policy's own buffers away.
    freeze = lambda path, x: jnp.array(x, frozen_dtype(path, run, name), copy=True)
    return jax.tree_util.tree_map_with_path(freeze, params)


def described(source: hf.Source, tokenizer: Any) -> dict[str, str]:
    """Digests of what a model folder says of its weights: its config.json, names and versions left out, and its tokens."""
    said = {name: value for name, value in source.hf.items() if name not in UNSAID}
    digest = lambda x: f"{zlib.crc32(json.dumps(x, sort_keys=True).encode()):08x}"
    return {"config.json": digest(said), "tokenizer": digest(tokenizer.get_vocab())}


def data_digest(run: Run) -> str:
    """The digest of all that batches are made of, as text."""
    return "+".join(f"{stream.digest():08x}" for stream in (run.train, run.pretrain) if stream is not None)


def open_workdir(run: Run) -> output.Lock:
    """Makes the workdir, holds it, and writes the effective config into it; process 0 does."""
    lock = output.Lock(None)
    if is_main():
        run.workdir.mkdir(parents=True, exist_ok=True)
        lock = output.Lock(run.workdir / output.LOCK)
        output.write_text(run.workdir / "config.py", effective(run.experiment))
    return lock


def check_same(workdir: Path, step: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses a checkpoint that grew from other models."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"checkpoint {step} in {str(workdir)!r} grew from another {name} ({saved.get(name)}, given now: {value}); "
                "give the same models and data, or choose another workdir"
            )
