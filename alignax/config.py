"""Configuration is Python: an experiment file builds a ConfigDict and names its loss; the command line overrides fields.

An experiment file has `get_config() -> ConfigDict` and `loss(config) -> Loss` (or a function of the step), and may have
`experience(config, reference)`, `reward(prompts, completions)`, `gold(..)` likewise, `averages(config)`, `row(row)` and
`main(experiment)`; see `Experiment`.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from alignax.data.files import one_line, short

OFFERED = ("config", "reference", "policy", "ensemble", "prompts")  # what an experience may ask for, by the names of its parameters
HEAD = "head"  # what `model.critic` is of a critic on the policy's trunk
ROLLOUTS, PRETRAIN = "rollouts", "pretrain"  # the batches that losses of online training may be of, by name
MARK = "# --- the effective config of this run; alignax wrote this part ---"


class BadInput(ValueError):
    """Input that was refused, told apart from the failure of a run."""


class Experiment(NamedTuple):
    """What an experiment file says."""

    file: Path
    config: Any  # ConfigDict
    loss: Callable[[Any], Any]  # config -> Loss, or step -> Loss; online also {"rollouts": .., "pretrain": ..} of these
    experience: Callable[..., Any] | None  # of any of config, reference, policy, ensemble (Models), prompts (how many) -> experience
    gold: Callable[..., Sequence[float]] | None  # (prompts, completions, and by name: columns of prompts, config) -> gold rewards
    reward: Callable[..., Sequence[float]] | None  # likewise -> the rewards that rollouts are trained on
    averages: Callable[[Any], dict[str, Any]] | None  # config -> averages of the parameters, by name (see alignax.averages)
    main: Callable[["Experiment"], Any] | None  # replaces the single run: several stages, a sweep
    row: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None  # a raw row of data -> the row to read; None: it is left out


def default_config() -> Any:
    """All fields there are, with their defaults; an experiment changes those that it is about."""
    from ml_collections import ConfigDict

    c = ConfigDict()
    c.seed = 0
    c.workdir = ""  # checkpoints, logs, samples, and the effective config
    c.steps = 0  # training steps; 0: as many as `epochs` take
    c.epochs = 1.0
    c.batch_size = 32  # examples (prompts) of a step, over all devices
    c.microbatches = 1  # parts of a batch, one forward and backward each
    c.max_skipped = 5  # so many non-finite steps in a row stop the run

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder: config, tokenizer, weights; or the mean of several's weights, A@0.5,B@0.5
    c.model.init = "pretrained"  # or "random": start without weights
    c.model.num_labels = 0  # 1: a reward model, which gives a score in place of logits; more: so many attributes; 0: as the folder is
    c.model.critic = ""  # of PPO: "head" on the policy's trunk, or a folder, whose trunk is trained beside it; empty: none
    c.model.critic_heads = 1  # values that it gives of a token: of the KL first, then of each reward model; 1: of all together
    c.model.freeze = False  # train a reward model's head alone
    c.model.dtype = "auto"  # of activations: "auto" is bfloat16 on accelerators, float32 on CPU
    c.model.remat = "full"  # or "dots", "none"
    c.model.logps_chunk = 256  # positions whose logits exist at a time

    c.lora = ConfigDict()
    c.lora.rank = 0  # of low-rank adapters; 0: all parameters are trained
    c.lora.alpha = 16.0
    c.lora.targets = "all-linear"  # or names of matrices and shell patterns of them, "q_proj,v_proj" say
    c.lora.rslora = False  # scale alpha / sqrt(rank) rather than alpha / rank
    c.lora.dora = False
    c.lora.int8 = False  # hold the frozen base in int8
    c.lora.path = ""  # a PEFT folder to go on from, which then says all of the above

    c.ensemble = ConfigDict()
    c.ensemble.members = 0  # of an ensemble of reward models, member k as a run of its own with the seed `seed` + k; 0: one model
    c.ensemble.bootstrap = False  # each member has a sample of the pairs, drawn with replacement
    c.ensemble.own_noise = False  # each has label noise of its own; otherwise the same pairs are wrong for all

    c.reference = ConfigDict()
    c.reference.path = ""  # Hugging Face folder, or A@0.5,B@0.5; empty: the policy that the run starts from, of adapters their base
    c.reference.cache = ""  # folder for its log-probs of the data, computed once; empty: computed in every step
    c.reference.token_kl = False  # its KL from the policy in every token, over the whole vocabulary: TDPO and Quark read it

    c.reward = ConfigDict()
    c.reward.path = ""  # Hugging Face folders of reward models, commas between them: what experience calls `ensemble`

    c.rollout = ConfigDict()
    c.rollout.samples = 0  # completions of each prompt, which the policy samples as it is trained; 0: the data's completions
    c.rollout.max_new_tokens = 64
    c.rollout.minibatches = 1  # steps on a rollout, of batch_size prompts each
    c.rollout.epochs = 1  # times that a rollout is gone through
    c.rollout.ahead = False  # sample the next rollout before the steps on this one: rewards are waited for while the device trains
    c.rollout.slots = 0  # completions that are sampled side by side; 0: all, at most 64
    c.rollout.timeout = 600.0  # seconds for reward(..) on a rollout, and for gold(..)
    c.rollout.bad_rewards = "error"  # or "drop" (counted): where reward(..) raises, hangs, or gives no number

    c.data = ConfigDict()
    c.data.train = ""  # a file of rows, a folder of them, FOLDER:split, a pattern DIR/*.jsonl, hf://org/name:split, or A@0.7,B@0.3
    c.data.eval = ""  # the same, without weights
    c.data.pretrain = ""  # online, for the loss called "pretrain": rows of kind "sft", sources as of `train`
    c.data.ood = ""  # the same, from elsewhere: out of distribution, for `alignax eval-rm`
    c.data.kind = "preference"  # or "sft", "unpaired" (labelled completions, or pairs taken apart), "ranked" (k completions), "prompt"
    c.data.format = ""  # the name of a well-known set, "helpsteer3" say, whose rows are then read as its card describes them
    c.data.columns = ConfigDict()
    c.data.columns.prompt = "prompt"  # text or messages; where the file has no such column, the sides hold their prompt
    c.data.columns.chosen = "chosen"
    c.data.columns.rejected = "rejected"
    c.data.columns.completion = "completion"  # of "sft" and "unpaired"; "sft" of pairs takes the chosen side
    c.data.columns.messages = "messages"  # of "sft": a whole conversation
    c.data.columns.completions = "completions"  # of "ranked": a list, best first
    c.data.columns.label = "label"  # of "unpaired": true or false
    c.data.columns.margin = ""  # of "preference": a number, for losses that read the field `margin`; empty: none
    c.data.columns.attributes = ""  # of "sft": columns of numbers, or lists of numbers, "helpfulness,verbosity" say; empty: none
    c.data.columns.tools = "tools"  # of conversations: what the chat template is told of tools, where there is such a column
    c.data.columns.system = ""  # a text that becomes the system message of a conversation; texts beside it become its turns
    c.data.prompt_separator = ""  # for texts without a prompt column: the text that ends a prompt
    c.data.turns = "last"  # or "all": the assistant turns of a conversation that are scored
    c.data.max_length = 512  # tokens of prompt and completion
    c.data.max_prompt_length = 0  # keep the last so many prompt tokens; 0: all
    c.data.bad_rows = "error"  # or "drop" (counted)
    c.data.label_noise = 0.0  # share of the training pairs whose sides change places
    c.data.order = ""  # of training rows: shuffled; "file": as they stand; a column of numbers: the first epoch by it, "-column": downwards
    c.data.limit = 0  # the first so many rows of each source; 0: all

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-7
    c.optimizer.schedule = "cosine"  # or "linear", "constant"
    c.optimizer.warmup = 0.1  # share of the steps
    c.optimizer.final = 0.0  # share of the peak at the end
    c.optimizer.clip = 1.0  # global norm; 0: none
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0

    c.mesh = ConfigDict({"member": 1, "data": 1, "fsdp": -1, "tensor": 1})

    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0: only before and after training
    c.eval.batch_size = 0  # examples; 0: as in training
    c.eval.samples = 4  # completions written to the log; 0: none
    c.eval.sample_prompts = 0  # prompts sampled for gold reward and KL; 0: as many as `samples`
    c.eval.max_new_tokens = 64
    c.eval.temperature = 1.0  # 0: greedy
    c.eval.params = "policy"  # or the name of an average

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps; the last one is always saved
    c.checkpoint.keep = 2  # the newest so many
    c.checkpoint.best = ""  # also keep the one with the best evaluation metric, "loss" say (lowest) or "-rewards/margins" (highest)

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of a plain console
    c.log.tensorboard = True

    c.export = ConfigDict()
    c.export.final = True  # write WORKDIR/export, a Hugging Face folder, at the end
    c.export.dtype = "float32"
    c.export.params = "policy"  # or the name of an average
    for group in c.values():
        if isinstance(group, ConfigDict):
            group.lock()  # a misspelt field in an experiment file is an error; the top level takes its own fields, such as beta
    return c


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file and applies overrides such as `data.max_length=160`."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"experiment file {str(file)!r} does not exist; give the path of a Python file such as experiments/dpo_hh.py")
    spec = importlib.util.spec_from_file_location("alignax_experiment_" + file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with blaming(file):
        spec.loader.exec_module(module)
    for name in ("get_config", "loss"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"{file} has no function {name}(); see experiments/dpo_hh.py")
    with blaming(file):
        config = module.get_config()
    check_config(config, file)
    for override in overrides:
        set_field(config, override)
    for name in asked(getattr(module, "experience", None)):
        if name not in OFFERED:
            raise ValueError(f"experience() in {file} asks for {name!r}; its parameters are any of {', '.join(OFFERED)}")
    optional = (getattr(module, name, None) for name in ("experience", "gold", "reward", "averages", "main", "row"))
    return Experiment(file, config, module.loss, *optional)


@contextmanager
def blaming(file: Path, always: bool = True) -> Iterator[None]:
    """Turns an error in the code of an experiment file into one line that says where; with `always` also one that has no line there."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).resolve() == file.resolve()]
        if isinstance(e, SyntaxError) and e.filename and Path(e.filename).resolve() == file.resolve():
            lines = [e.lineno]
        if not lines and not always:
            raise
        what = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        place = f"{file}, line {lines[-1]}" if lines else str(file)
        raise BadInput(f"{place}: {what}{one_line(e, 500)}") from e


def check_config(config: Any, file: Path) -> None:
    """Refuses what is no config, and a field of its own that is one of ours misspelt."""
    if not hasattr(config, "lock"):
        raise ValueError(f"get_config() of {file} returns {config!r}; it must return a ConfigDict, such as default_config() changed")
    known = list(default_config())
    for name in config:
        if name not in known and (near := difflib.get_close_matches(name, known, 1, 0.8)):
            raise ValueError(f"config field {name!r} of {file} is unknown; the nearest is {near[0]!r}")
    fields = flat(config)
    for name, default in flat(default_config()).items():
        if type(value := fields.get(name)) is not type(default):
            raise ValueError(f"config field {name!r} of {file} is {value!r}; it must be {_a(default)}, such as {default!r}")
    for name, value in fields.items():
        _in_range(name, value)


def asked(experience: Callable | None) -> tuple[str, ...]:
    """The names of an experience's parameters; it gets what it asks for, and no reference is held that it does not ask for."""
    return () if experience is None else tuple(inspect.signature(experience).parameters)


def set_field(config: Any, override: str) -> None:
    """Applies one `a.b=value`; the value is a Python literal, or a plain string for a text field.

    Raises:
      ValueError: for an unknown field (naming the nearest) and for a value of another type.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"config field {override!r} has no value; write --config.FIELD=VALUE")
    node, parts = config, path.split(".")
    for part in parts[:-1]:
        node = node[_known(node, part, path, config)]
        if not hasattr(node, "items"):
            raise ValueError(f"config field {path!r} is unknown: {part!r} has no fields")
    name = _known(node, parts[-1], path, config)
    old = node[name]
    if hasattr(old, "items"):
        raise ValueError(f"config field {path!r} is a group; set one of its fields: {', '.join(sorted(old))}")
    if isinstance(old, str):
        node[name] = text
        return
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(old, bool) else text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that a text which is no literal makes of it
        value = text
    _in_range(path, value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not type(old):
        raise ValueError(f"config field {path!r} is {short(text)}; it must be {_a(old)}, such as {old!r}")
    node[name] = value


def _known(node: Any, part: str, path: str, config: Any) -> str:
    if part in node:
        return part
    raise ValueError(f"config field {path!r} is unknown; the nearest is {nearest(path, list(flat(config)))!r}")


def nearest(path: str, fields: Sequence[str]) -> str:
    """The field that a misspelt one most likely means: of its own group, by its initials (`lr`) or its spelling."""
    group, _, name = path.rpartition(".")
    own = [field for field in fields if field.rpartition(".")[0] == group] if group else []

    def likeness(field: str) -> float:
        initials = "".join(word[0] for word in field.rpartition(".")[2].split("_"))
        return (name == initials) + difflib.SequenceMatcher(None, path, field).ratio()

    return max(own or fields, key=likeness)


def _in_range(name: str, value: Any) -> None:
    if type(value) is int and abs(value) >= 2**31 or type(value) is float and not math.isfinite(value):
        raise ValueError(f"config field {name!r} is {short(value)}; use a finite number, a whole one of less than 2^31")


def _a(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Field path -> value: {"data.max_length": 512, ...}."""
    out = {}
    for name, value in config.items():
        out |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return out


def source(experiment: Experiment) -> str:
    """The experiment's own source, without the part that a run has written."""
    return experiment.file.read_text(encoding="utf-8").split(MARK)[0].rstrip() + "\n"


def effective(experiment: Experiment) -> str:
    """A Python file that runs the same again: the experiment's source, with every field of its config pinned."""
    fields = json.dumps(flat(experiment.config), indent=4, sort_keys=True)
    # An experiment of several stages leaves the experience out of those that need no reference.
    without = "" if experiment.experience else "\nexperience = None\n"
    return f'''{source(experiment)}

{MARK}
import json as _json  # noqa: E402

_get_config = get_config


def get_config():  # noqa: D103, F811
    config = _get_config()
    for _path, _value in _json.loads(r"""{fields}""").items():
        *_groups, _name = _path.split(".")
        _node = config
        for _group in _groups:
            _node = _node[_group]
        _node[_name] = _value
    return config
{without}'''


def difference(old: Experiment, new: Experiment, free: Sequence[str]) -> list[str]:
    """How two experiments differ, as lines; fields that start with one of `free` may."""
    a, b = flat(old.config), flat(new.config)
    names = sorted(n for n in a.keys() | b.keys() if not n.startswith(tuple(free)))
    lines = [f"{n}: {a.get(n)!r} there, {b.get(n)!r} now" for n in names if a.get(n) != b.get(n)]
    if _code(old) != _code(new):
        lines.append(f"the code of {new.file.name} has changed")
    return lines


def _code(experiment: Experiment) -> str:
    tree = ast.parse(source(experiment))
    if tree.body and isinstance(tree.body[0], ast.Expr):
        tree.body = tree.body[1:]  # the docstring
    return ast.dump(tree)


def eval_batch_size(config: Any) -> int:
    """Examples of an evaluation batch."""
    return config.eval.batch_size or config.batch_size


def trunk_values(config: Any) -> int:
    """Values of a token that are read off the policy's own trunk."""
    return config.model.critic_heads if config.model.critic == HEAD else 0


def prompts_of_rollout(config: Any) -> int:
    """Prompts of a rollout: B."""
    return config.rollout.minibatches * config.batch_size


def steps_of_turn(config: Any) -> int:
    """Training steps between two rollouts; 1 where there are none."""
    return config.rollout.minibatches * config.rollout.epochs if config.rollout.samples else 1
