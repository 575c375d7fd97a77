"""Starts a checked run: loads its models onto the mesh, makes or restores the training state, and holds the frozen parameters."""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import output, paths
from alignax.config import asked, code, effective, flat, prompts_of_rollout
from alignax.config.blame import blaming, explained
from alignax.data import Examples
from alignax.distributed import check_alike, is_main, link, together
from alignax.experience import advance, first_carry
from alignax.host.calls import METRICS
from alignax.host.functions import reward_fields
from alignax.models import hf, parameters, peft, reward
from alignax.models.reward import CRITIC
from alignax.models.statistics import Statistic
from alignax.program import Program
from alignax.rewards import members
from alignax.run.checkpoint import Checkpoints, nbytes, newest
from alignax.run.evaluation import SAMPLED, tries
from alignax.run.host_rewards import check_metrics, check_reward
from alignax.run.prepare import Run, check_workdir
from alignax.run.programs import programs
from alignax.run.reference_cache import CACHE, with_stored
from alignax.run.roles import BASE, ENSEMBLE, REFERENCE, Role, abstract_trained, freeze, load
from alignax.run.state import abstract_state
from alignax.run.stored import FOLDER, OFF
from alignax.train import Apply, digest
from alignax.types import Batch, Model, Outputs, Params, TrainState

UNSAID = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # fields of config.json that change no computation
BLOCK = 1 << 16  # bytes of a block in the CRC of a file


class Started(NamedTuple):
    """A run with its arrays on the mesh, at step 0 or where it was stopped."""

    run: Run
    state: TrainState
    step: int  # steps taken
    held: dict[str, Params]  # frozen parameter trees by name
    programs: dict[str, Program]
    about: dict[str, str]  # digests of the models and data that the run started from
    checkpoints: Checkpoints
    lock: output.Lock


def start(run: Run, write: bool = True) -> Started:
    """Loads the models of a run, and its newest checkpoint if there is one. Nothing is trained; the workdir is touched only with `write`.

    Raises:
      ValueError: for the workdir of another run, for weights that are not finite, and for a checkpoint that is damaged or belongs to
        another run.
      OSError: if the disk has no room for a checkpoint.
    """
    config = run.config
    with together():
        if write:
            check_workdir(run)
        own = given(run) if link() else {}
        if own and write:
            own["checkpoint"] = f"step {newest(run.workdir)}"
    check_alike(own)
    with together():
        table = check_step(run)
        params = load(run.policy, run.mesh, jax.random.key(config.seed))
    about = described(run.policy.source, run.words.tokenizer)
    about |= {"policy": f"{int(table['fingerprint'].call(params)):08x}", "reference": "", "data": data_digest(run)}
    check_alike(about)  # of weights that every process holds; a process reads only the others that it holds
    held: dict[str, Params] = {}
    lock = output.Lock(None)
    if write and run.cache == run.workdir / FOLDER:  # it is written before the run has begun
        lock = open_workdir(run)
    for name, role in run.roles.items():
        if name != REFERENCE and role.tree == name:
            held[name] = hold(run, role, params, about)
    if REFERENCE in run.roles:
        run = with_reference(run, params, held, about, table)
    params = begin(run, params, held, about)
    check_alike(about)
    if write and run.cache != run.workdir / FOLDER:
        lock = open_workdir(run)
    checkpoints = Checkpoints(run.workdir, config.checkpoint.keep, config.checkpoint.best, write)
    compared = about if write else {name: x for name, x in about.items() if name != "data"}  # evaluation may use other data
    about = about | {"day": run.day.isoformat()}  # the day that templates read, kept when the run goes on tomorrow

    def restored(step: int) -> TrainState:
        check_same(run.workdir, step, checkpoints.about(step), compared)
        return checkpoints.restore(step, abstract_state(run))

    step = checkpoints.latest() or 0
    if step:
        del params  # memory may hold only one training state
        step, state = checkpoints.newest(restored)
    else:
        state = table["begin"].call(params, jax.random.key(config.seed), held)
    return Started(run, state, step, held, table, about, checkpoints, lock)


def hold(run: Run, role: Role, params: Params, about: dict[str, str]) -> Params:
    """The frozen parameters of a role. Adds their digest to `about`. A role with the policy's folder shares the policy's parameters."""
    own = params
    if (role.sources, role.init, role.adapters) != (run.policy.sources, run.policy.init, ""):
        with together():
            own = load(role, run.mesh)
    if role.name != BASE:
        about[role.name] = about["policy"] if own is params else fingerprint(own)
    return freeze(role, own)


def with_reference(run: Run, params: Params, held: dict[str, Params], about: dict[str, str], table: Mapping[str, Program]) -> Run:
    """The run with what it needs of the reference: parameters, added to `held`, or log-probs of the data in its place."""
    role = run.roles[REFERENCE]
    about[REFERENCE] = about["policy"]  # if the reference is the policy at step 0; else `hold` replaces it
    own = held[BASE] if role.tree == BASE else hold(run, role, params, about)
    if role.tree == REFERENCE:
        held[REFERENCE] = own
    if run.cache is None:
        return run
    say = lambda line: print(line, file=sys.stderr, flush=True) if is_main() else None
    if not run.config.reference.cache:
        epochs = run.steps * run.config.batch_size / len(run.data.train.examples)
        say(f"the log-probs of the reference are computed once, for {epochs:.3g} epochs; reference.cache={OFF} computes them in every step")
    return with_stored(run, own, about[REFERENCE], table[CACHE], say)


def begin(run: Run, params: Params, held: dict[str, Params], about: dict[str, str]) -> Params:
    """The trained parameters at step 0: those of the policy, of its adapters, or of all members of an ensemble, and a critic's."""
    policy = run.policy
    if policy.members:
        params = spread(run, params, held.get(BASE))
        about["members"] = fingerprint(params)
    elif policy.lora is not None:
        params = initial_adapters(run, params, held[BASE])
        about["adapters"] = fingerprint(params)
    if CRITIC in run.roles:
        with together():
            params = params | {CRITIC: load(run.roles[CRITIC], run.mesh)}
        about[CRITIC] = fingerprint(params[CRITIC])
    return params


def given(run: Run) -> dict[str, str]:
    """The inputs that must be equal in all processes of a run, by name, as text."""
    fields = "\n".join(f"{name} = {value!r}" for name, value in sorted(flat(run.config).items()))
    package = Path(__file__).parents[1]
    ours = "\n".join(f"{file.relative_to(package)} {zlib.crc32(file.read_bytes()):08x}" for file in sorted(package.rglob("*.py")))
    streams = {"data.train": run.data.train, "data.pretrain": run.data.pretrain, "data.eval": run.data.evaluation}
    data = {name: f"{x.digest():08x}" for name, x in streams.items() if x is not None}
    columns = {name: (x if isinstance(x, Examples) else x.examples).columns for name, x in streams.items() if x is not None}
    models = {str(x.path) for role in run.roles.values() for source in role.sources for x, _ in hf.ingredients(source)}
    adapters = {run.config.lora.path, *(role.adapters for role in run.roles.values())} - {""}
    adapters |= {str(source.adapters) for role in run.roles.values() for source in role.sources if source.adapters}
    return {
        "config": fields,
        "experiment": code(run.experiment),
        "alignax": f"jax {jax.__version__}\n{ours}",
        "data": "\n".join(f"{name} {value} {zlib.crc32(repr(columns[name]).encode()):08x}" for name, value in data.items()),
        "model": "\n".join(sketch(paths.of(folder)) for folder in sorted(models | adapters)),
    }


def sketch(folder: Path) -> str:
    """The files of a model folder, one line each, with size and CRC; the CRC of a large file covers 64 blocks spread over it."""
    lines = []
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors")):
        size, crc = file.stat().st_size, 0
        for at in range(0, size, max(size // 64, BLOCK)):
            crc = zlib.crc32(paths.read_range(file, at, min(at + BLOCK, size)), crc)
        lines.append(f"{file}: {size} bytes, {crc:08x}")
    return "\n".join(lines)


def check_step(run: Run) -> dict[str, Program]:
    """Traces the programs of a run on shapes alone and returns them; refuses losses that do not fit their data before writing any file."""
    functions = [name for name in ("gold", "reward", METRICS) if getattr(run.experiment, name) is not None]
    if functions and is_main():
        run.workers.start()  # workers load the experiment while programs are traced
    try:
        with blaming(run.experiment.file, always=False):
            table = programs(run)
            given = {name: program.shapes() for name, program in table.items()}
            metrics = given["judge" if "judge" in given else "evaluate"]
    except KeyError as e:
        raise ValueError(
            f"{explained(e, run.experiment.file)}. The loss or the experience reads this field: let the experience write it, or provide "
            "it with the data (data.kind, data.columns)"
        ) from e
    check_advantages(run)
    for name in functions if is_main() else ():
        if name != METRICS:
            check_reward(run, name)
    seen = [f"{METRICS}/{name}" for name in check_metrics(run)] if is_main() else []
    best = run.config.checkpoint.best.removeprefix("-")
    names = {
        "loss",
        *SAMPLED,
        *(f"pass@{k}" for k in tries(run.config.eval.samples_per_prompt)),
        *(name for name in metrics if not name.startswith("loss:")),
        *seen,
    }
    if best and best not in names and is_main():
        raise ValueError(f"checkpoint.best {best!r} is not a metric of the evaluation; use one of {', '.join(sorted(names))}")
    return table


def check_advantages(run: Run) -> None:
    """Refuses groups of one response if the experience compares each response with its group.

    The experience is called on a small random rollout, where functions of the tokens stand in for models that are not loaded yet.
    """
    make, B = run.experiment.experience, prompts_of_rollout(run.config)
    if run.config.rollout.samples != 1 or make is None:
        return
    rng, shape = np.random.default_rng(0), (B, 1, 8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    every = jnp.ones(shape, bool)
    said = {"tokens": jnp.asarray(rng.integers(0, 9, shape), jnp.int32), "mask": every, "completion_mask": every.at[..., :2].set(False)}
    batch = said | {"prompt_id": jnp.arange(B), "truncated": jnp.zeros((B, 1), bool), "gold": draw(B, 1), "rewards": draw(B, 1)}
    batch |= {name: draw(B, 1, *more) for name, more in reward_fields(run.experiment).items()}
    batch |= {"sampled_logps": -(draw(*shape) ** 2), "old_logps": -(draw(*shape) ** 2)}
    if run.config.model.critic:
        batch["values"] = draw(*shape, *((run.config.model.critic_heads,) if run.config.model.critic_heads > 1 else ()))

    def apply(_: Params, batch: Batch) -> Outputs:
        x = jnp.where(batch["completion_mask"], 0.1 * batch["tokens"], 0.0)
        scores = x.sum(axis=-1)[..., None] * jnp.arange(1, 1 + members)[None, None]
        return Outputs(-x, x, -x, x, x, scores)

    def giving(statistics: tuple[Statistic, ...]) -> Apply:
        return lambda params, batch: apply(params, batch)._replace(statistics={s.name: apply(params, batch).logps for s in statistics})

    members = run.roles[ENSEMBLE].members if ENSEMBLE in run.roles else 1
    given: dict[str, Any] = {name: Model(apply, {}, giving) for name in (REFERENCE, *run.roles)}
    given |= {"config": run.config, "prompts": len(run.data.train.examples)}
    try:
        experience = make(**{name: given[name] for name in asked(make)})
        written = advance(experience, first_carry(experience), batch)[1]
    except Exception:  # an experience may need fields that this rollout lacks
        return
    if not np.any(np.asarray(written.get("advantages", written["completion_mask"]))):  # best_and_worst() leaves no scored token instead
        if B == 1:
            raise ValueError(
                f"a rollout is of one response (batch_size, rollout.minibatches and rollout.samples are 1), and experience() of "
                f"{run.experiment.file} compares responses: every advantage is 0, and no reward is learnt from. Set rollout.samples or "
                "batch_size to 2 or more"
            )
        raise ValueError(
            f"rollout.samples is 1, and experience() of {run.experiment.file} compares a response with the others of its group: every "
            "advantage is 0, and no reward is learnt from. Set it to 2 or more, or use another estimator: reinforce_plus_plus(), or "
            "gae() with a critic"
        )


def spread(run: Run, params: Params, base: Params | None) -> Params:
    """The trained parameters of an ensemble's members at step 0, [K, ...]: all parameters, or adapters of the base, with a head each.

    The seed of a member initialises its head, unless the folder has a head: then all members start from that one.
    """
    config, lora = run.policy.source.config, run.policy.lora
    own = run.policy.source.stored.num_labels != config.num_labels
    layout = jax.tree.map(lambda x: x.sharding, abstract_trained(run.roles, run.mesh))

    def member(params: Params, base: Params, key: jax.Array) -> Params:
        trained = params if lora is None else parameters.fresh_adapters(config, lora, base, key)
        fresh = parameters.fresh(config, key) if own else params
        return trained | {name: fresh[name] for name in reward.HEAD if name in fresh}

    every = members.over_members(member, (None, None, 0), 0)
    return jax.jit(every, out_shardings=layout)(params, base, members.keys(run.config.seed, run.policy.members))


def initial_adapters(run: Run, params: Params, base: Params) -> Params:
    """The adapters at step 0, with the head of a reward model or a critic; adapters of `lora.path` have a reward model's head already."""
    source, lora = run.policy.source, run.policy.lora
    assert lora is not None
    head = {name: params[name] for name in reward.HEAD if name in params}
    if path := run.config.lora.path:
        with together():
            return peft.read_adapter(paths.of(path), source, run.mesh)[1] | {name: x for name, x in head.items() if name == reward.VALUE}
    return parameters.init_adapters(source.config, lora, run.mesh, base, jax.random.key(run.config.seed)) | head


def fingerprint(params: Params | None) -> str:
    """The digest of parameters, as text; the empty text for None."""
    return "" if params is None else f"{int(jax.jit(digest)(params)):08x}"


def described(source: hf.Source, tokenizer: Any) -> dict[str, str]:
    """The digests of a model folder's config.json, without names and versions, and of its tokenizer's vocabulary."""
    said = {name: value for name, value in source.hf.items() if name not in UNSAID}
    digest = lambda x: f"{zlib.crc32(json.dumps(x, sort_keys=True).encode()):08x}"
    return {"config.json": digest(said), "tokenizer": digest(tokenizer.get_vocab())}


def data_digest(run: Run) -> str:
    """The digest of the training and pretraining data, as text."""
    return "+".join(f"{stream.digest():08x}" for stream in (run.data.train, run.data.pretrain) if stream is not None)


def open_workdir(run: Run) -> output.Lock:
    """Makes the workdir, locks it, and writes the effective config into it; only process 0 does this, and every process calls it."""
    lock = output.Lock(None)
    with together():
        output.require_space(run.workdir, nbytes(abstract_state(run)), "a checkpoint", "make room, or choose another workdir")
        if is_main():
            run.workdir.mkdir(parents=True, exist_ok=True)
            lock = output.Lock(run.workdir / output.LOCK)
            output.write_text(run.workdir / "config.py", effective(run.experiment))
    return lock


def check_same(workdir: Path, step: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses a checkpoint of a run that started from other models or data."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"checkpoint {step} in {str(workdir)!r} comes from another {name} ({saved.get(name)}, but now {value}); give the same "
                "models and data, or choose another workdir"
            )
