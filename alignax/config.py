"""Configuration is Python: an experiment file builds a ConfigDict and names its loss; the command line overrides fields.

An experiment file has `get_config() -> ConfigDict` and `loss(config) -> Loss` (or a function of the step), and may have
`experience(config, reference)`, `reward(prompts, completions)`, `gold(..)` likewise, `averages(config)`, `row(row)` and
`main(experiment)`; see `Experiment`.
"""

import ast
import difflib
import inspect
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from alignax.blame import BadInput, blaming, check_call, near, theirs
from alignax.data.files import check_local, one_line, short

OFFERED = ("config", "reference", "policy", "ensemble", "prompts")  # what an experience may ask for, by the names of its parameters
CALLED = {"get_config": (), "loss": ("config",), "averages": ("config",), "main": ("experiment",)}  # how a run calls functions of the file
HEAD = "head"  # what `model.critic` is of a critic on the policy's trunk
ROLLOUTS, PRETRAIN = "rollouts", "pretrain"  # the batches that losses of online training may be of, by name
MARK = "# --- the effective config of this run; alignax wrote this part ---"
PATHS = (
    "workdir", "model.path", "model.critic", "lora.path", "reference.path", "reference.cache", "reward.path",
    "data.train", "data.eval", "data.pretrain", "data.ood",
)  # fmt: skip


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
    c.reference.token_kl = False  # its KL from the policy in every token, over the whole vocabulary: TDPO, Quark and GKD read it
    c.reference.jsd_beta = 0.5  # of GKD's divergence: the reference's share of the mixture; 0: the forward KL, 1: the reverse
    c.reference.jsd_temperature = 1.0  # of GKD's divergence: what the logits of both are divided by

    c.reward = ConfigDict()
    c.reward.path = ""  # Hugging Face folders of reward models, commas between them: what experience calls `ensemble`

    c.rollout = ConfigDict()
    c.rollout.samples = 0  # completions of each prompt, which the policy samples as it is trained; 0: the data's completions
    c.rollout.max_new_tokens = 64
    c.rollout.temperature = 1.0  # of the policy and its reference, in samples and in all that scores them
    c.rollout.top_p = 1.0  # sample from the fewest tokens whose probabilities reach it; below 1 the loss must correct for it
    c.rollout.stop = ()  # strings that end a completion too, ('\n\n', 'User:') say
    c.rollout.minibatches = 1  # steps on a rollout, of batch_size prompts each
    c.rollout.epochs = 1  # times that a rollout is gone through
    c.rollout.ahead = False  # sample the next rollout before the steps on this one: rewards are waited for while the device trains
    c.rollout.slots = 0  # completions that are sampled side by side; 0: all, at most 64
    c.rollout.refill = 0  # times at most that groups whose rewards do not differ are replaced by those of further prompts (DAPO); 0: kept
    c.rollout.timeout = 600.0  # seconds for reward(..) on a rollout, and for gold(..)
    c.rollout.reward_workers = 1  # processes that these run in; each of several is given a share of the prompts
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
    c.data.template = ConfigDict()  # variables of the chat template: --config.data.template.enable_thinking=false, say
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
    c.eval.sample_prompts = 0  # prompts sampled for reward, gold reward and KL; 0: as many as `samples`
    c.eval.samples_per_prompt = 1  # completions of each of them; from 2 on with pass@k
    c.eval.pass_reward = 1.0  # a completion passes whose gold reward (where there is none, whose reward) is at least this, and is known
    c.eval.max_new_tokens = 64
    c.eval.temperature = 1.0  # 0: greedy
    c.eval.top_p = 1.0
    c.eval.stop = ()  # strings that end a completion too
    c.eval.params = "policy"  # or the name of an average

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps; the last one is always saved
    c.checkpoint.keep = 2  # the newest so many
    c.checkpoint.best = ""  # also keep the one with the best evaluation metric, "loss" say (lowest) or "-rewards/margins" (highest)

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of a plain console
    c.log.tensorboard = True
    c.log.rollouts = 8  # responses of each rollout that rollouts.jsonl has as they were trained on; 0: none

    c.export = ConfigDict()
    c.export.final = True  # write WORKDIR/export, a Hugging Face folder, at the end
    c.export.dtype = "float32"
    c.export.params = "policy"  # or the name of an average
    for group in c.values():
        if isinstance(group, ConfigDict):
            group.lock()  # a misspelt field in an experiment file is an error; the top level takes its own fields, such as beta
    c.data.template.unlock()
    return c


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file and applies overrides such as `data.max_length=160`."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"experiment file {str(file)!r} does not exist; give the path of a Python file such as experiments/dpo_hh.py")
    with blaming(file):
        module = load_module(file, file.read_bytes())
    check_hooks(module, file)
    with blaming(file):
        config = module.get_config()
    check_config(config, file)
    check_own_fields(config, module, file)
    for override in overrides:
        set_field(config, override)
    optional = (getattr(module, name, None) for name in ("experience", "gold", "reward", "averages", "main", "row"))
    return Experiment(file, config, module.loss, *optional)


def check_hooks(module: ModuleType, file: Path) -> None:
    """Refuses an experiment file without what a run needs, with a function that nothing calls, or with one that cannot be called."""
    for name in ("get_config", "loss"):
        if getattr(module, name, None) is None:
            raise BadInput(f"{file} has no function {name}(){near(name, list(vars(module)))}; see experiments/dpo_hh.py")
    for name in ("experience", "gold", "reward"):
        given = getattr(module, name, None)
        if given is not None and not callable(given) and not isinstance(given, Sequence):
            raise BadInput(f"{name} of {file} is {given!r}; it must be a function")
    for name, parameters in CALLED.items():
        if getattr(module, name, None) is not None:
            check_call(getattr(module, name), f"{name}() of {file}", *parameters)
    for name in asked(getattr(module, "experience", None)):
        if name not in OFFERED:
            raise BadInput(
                f"experience() of {file} asks for {name!r}{near(name, OFFERED, 0.5)}; its parameters are any of {', '.join(OFFERED)}"
            )
    hooks = ("get_config", *Experiment._fields[2:])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list else []
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            if name not in (*hooks, *used) and not name.startswith("_") and (nearest := near(name.lower(), hooks, 0.8)):
                raise BadInput(f"{file} has a function {name}(), which nothing calls{nearest}; a run calls {', '.join(hooks)}")


def load_module(file: Path, source: bytes) -> ModuleType:
    """The module of an experiment's source, which may be that of a file that has changed since.

    It imports modules that lie beside the file, behind all others; and it is one of `sys.modules`, where data classes and the processes
    that it starts look for what it defines.
    """
    module = ModuleType("alignax_experiment_" + file.stem)
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    return module


def check_config(config: Any, file: Path) -> None:
    """Refuses what is no config, and a field of its own that is one of ours misspelt."""
    if not hasattr(config, "lock"):
        raise ValueError(f"get_config() of {file} returns {config!r}; it must return a ConfigDict, such as default_config() changed")
    known = list(default_config())
    for name in config:
        if name not in known and (likely := near(name, known, 0.8)):
            raise ValueError(f"config field {name!r} of {file} is unknown{likely}")
    fields = flat(config)
    for name, default in flat(default_config()).items():
        if type(value := fields.get(name)) is not type(default):
            raise ValueError(f"config field {name!r} of {file} is {value!r}; it must be {_a(default)}, such as {default!r}")
    for name, value in fields.items():
        _in_range(name, value)
        check_path(name, value)


def check_own_fields(config: Any, module: ModuleType, file: Path) -> None:
    """Refuses a top-level field of an experiment's own that no code of its user reads and that is called as one of ours in a group is."""
    known = flat(default_config())
    leaves = {path.rpartition(".")[2]: path for path in reversed(known)}
    initials = {"".join(word[0] for word in leaf.split("_")): leaf for leaf in leaves if "_" in leaf}
    names = sorted(set(map(str, config)) - set(default_config()))
    own = {name: difflib.get_close_matches(initials.get(name, name), leaves, 1, 0.8) for name in names}
    if not any(own.values()) or hasattr(module, "main"):  # which may give the config to other code
        return
    code = [x.__code__.co_filename for x in vars(module).values() if inspect.isfunction(x)]
    code += [vars(x).get("__file__") or "" for x in vars(module).values() if inspect.ismodule(x)]
    files = {path for path in map(Path, code) if theirs(path.resolve(), file)} | {file}
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for name, likely in own.items():
        if likely and name not in read:
            raise BadInput(f"config field {name!r} of {file} is unknown, and nothing there reads it; the nearest is {leaves[likely[0]]!r}")


def asked(experience: Callable | None) -> tuple[str, ...]:
    """The names of an experience's parameters, but defaults of its own; no reference is held that it does not ask for."""
    parameters = () if experience is None else inspect.signature(experience).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(p.name for p in named if p.default is p.empty or p.name in OFFERED)


def set_field(config: Any, override: str) -> None:
    """Applies one `a.b=value`; the value is a Python literal, or a plain string for a text field.

    Raises:
      ValueError: for an unknown field (naming the nearest) and for a value of another type.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"config field {override!r} has no value; write --config.FIELD=VALUE")
    node, parts = config, path.split(".")
    if parts[:-1] == ["data", "template"]:
        config.data.template[parts[-1]] = _literal(text)
        return
    for part in parts[:-1]:
        node = node[_known(node, part, path, config)]
        if not hasattr(node, "items"):
            raise ValueError(f"config field {path!r} is unknown: {part!r} has no fields")
    name = _known(node, parts[-1], path, config)
    old = node[name]
    if hasattr(old, "items"):
        there = ", ".join(sorted(old)) or f"--config.{path}.NAME=VALUE"
        raise ValueError(f"config field {path!r} is a group; set one of its fields: {there}")
    if isinstance(old, str):
        check_path(path, text)
        node[name] = text
        return
    value = _literal(text.capitalize() if isinstance(old, bool) else text)
    _in_range(path, value)
    if isinstance(old, tuple):
        value = tuple(value) if isinstance(value, (tuple, list)) else (text,)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not type(old):
        raise ValueError(f"config field {path!r} is {short(text)}; it must be {_a(old)}, such as {old!r}")
    node[name] = value


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text itself; true and false are literals too."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that a text which is no literal makes of it
        return text


def _known(node: Any, part: str, path: str, config: Any) -> str:
    if part in node:
        return part
    raise ValueError(f"config field {path!r} is unknown; the nearest is {nearest(path, list(flat(config)))!r}")


def refusal(group: Any, name: str, place: str) -> str:
    """Why code may not read or set a field of a ConfigDict in this way; `place` is where it is in the config."""
    path = ".".join(filter(None, (place, name)))
    if name not in group:
        likely = difflib.get_close_matches(name, group, 1, 0.8) or [nearest(name, list(flat(group)))]
        return f"config field {path!r} is unknown; the nearest is {'.'.join(filter(None, (place, *likely)))!r}"
    if hasattr(group[name], "items"):
        return f"config field {path!r} is a group; set one of its fields: {', '.join(sorted(group[name]))}"
    return f"config field {path!r} must be {_a(group[name])}, such as {group[name]!r}"


def nearest(path: str, fields: Sequence[str]) -> str:
    """The field that a misspelt one most likely means: of its own group, by its initials (`lr`) or its spelling."""
    group, _, name = path.rpartition(".")
    own = [field for field in fields if field.rpartition(".")[0] == group] if group else []

    def likeness(field: str) -> float:
        initials = "".join(word[0] for word in field.rpartition(".")[2].split("_"))
        return (name == initials) + difflib.SequenceMatcher(None, path, field).ratio()

    return max(own or fields, key=likeness)


def check_path(name: str, value: str) -> None:
    """Refuses a URL in a field of paths."""
    if name in PATHS:
        check_local(value, f"config field {name!r}", hub=name.startswith("data."))


def _in_range(name: str, value: Any) -> None:
    if type(value) is int and abs(value) >= 2**31 or type(value) is float and not math.isfinite(value):
        raise ValueError(f"config field {name!r} is {short(value)}; use a finite number, a whole one of less than 2^31")


def _a(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}
    return names.get(type(value), f"a {type(value).__name__}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Field path -> value: {"data.max_length": 512, ...}.

    Raises:
      ValueError: for a name that no path can have.
    """
    out = {}
    for name, value in config.items():
        if not isinstance(name, str) or "." in name:
            raise ValueError(f"config field {f'{prefix}{name}'!r} is called {name!r}; names of fields are text without a dot")
        out |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return out


def source(experiment: Experiment) -> str:
    """The experiment's own source, without the part that a run has written."""
    try:
        text = experiment.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{experiment.file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e
    return text.split(MARK)[0].rstrip() + "\n"


def effective(experiment: Experiment) -> str:
    """A Python file that runs the same again: the experiment's source, with every field of its config pinned.

    Raises:
      ValueError: for a value that has no literal in Python.
    """
    fields = "".join(f"        {name!r}: {literal(name, value)},\n" for name, value in sorted(flat(experiment.config).items()))
    # An experiment of several stages leaves the experience out of those that need no reference.
    without = "" if experiment.experience else "\nexperience = None\n"
    return f"""{source(experiment)}

{MARK}
_get_config = get_config


def get_config():  # noqa: D103, F811
    config = _get_config()
    pinned = {{
{fields}    }}
    for _path, _value in pinned.items():
        *_groups, _name = _path.split(".")
        _node = config
        for _group in _groups:
            _node = _node[_group]
        _node[_name] = _value
    return config
{without}"""


def literal(name: str, value: Any) -> str:
    """A field's value as Python text that gives an equal one."""
    text = repr(value)
    try:
        if ast.literal_eval(text) == value:
            return text
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that a text which is no literal makes of it
        pass
    raise ValueError(
        f"config field {name!r} is {short(value)} of type {type(value).__name__}, which the config of a run cannot hold; "
        "use text, true, false, None, finite numbers of Python, and tuples, lists and dictionaries of these"
    )


def identity(experiment: Experiment, free: Sequence[str]) -> str:
    """A digest of all that makes two experiments one by `difference`."""
    fields = [(name, value) for name, value in sorted(flat(experiment.config).items()) if not name.startswith(tuple(free))]
    return f"{zlib.crc32(repr((fields, code(experiment))).encode()):08x}"


def check_kept(experiment: Experiment) -> None:
    """Refuses an experiment that a run could not go on from: the file of its workdir is read back as a later run would."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.py"
        file.write_text(effective(experiment), encoding="utf-8")
        try:
            lines = difference(experiment, load_experiment(file), ())
        except ValueError as e:
            lines = [one_line(e, 300)]
    if lines:
        raise ValueError(f"this run could not be resumed: config.py of its workdir would not give it again ({'; '.join(lines[:4])})")


def difference(old: Experiment, new: Experiment, free: Sequence[str]) -> list[str]:
    """How two experiments differ, as lines; fields that start with one of `free` may."""
    a, b = flat(old.config), flat(new.config)
    names = sorted(n for n in a.keys() | b.keys() if not n.startswith(tuple(free)))
    lines = [f"{n}: {a.get(n)!r} there, {b.get(n)!r} now" for n in names if a.get(n) != b.get(n)]
    if code(old) != code(new):
        lines.append(f"the code of {new.file.name} has changed")
    return lines


def code(experiment: Experiment) -> str:
    """The code of an experiment, without comments and the docstring."""
    tree = ast.parse(source(experiment))
    if tree.body and isinstance(tree.body[0], ast.Expr):
        tree.body = tree.body[1:]
    return ast.unparse(tree)


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
