"""The `alignax` command: train, plan, eval, eval-rm, anchor, ridge, generate, export, check-data, overopt, report, bench.

Library modules are imported inside functions only: the import of jax takes a second, and Ctrl-C must end the command then, too.
"""

import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from alignax.interrupts import install, leave, leave_process, link, number_of, told

if TYPE_CHECKING:
    from alignax.generate.console import Request

USAGE = """usage: alignax train  --config FILE.py [--config.FIELD=VALUE ...] [--dry-run] [--plan FILE]
       alignax plan   --config FILE.py --topology KIND:XxY [--slices N] [--search] [--config.FIELD=VALUE ...] [--json OUT]
       alignax eval   WORKDIR [--config.FIELD=VALUE ...] [--json OUT]
       alignax eval-rm MODELS [--config FILE.py] [--config.FIELD=VALUE ...] [--json OUT]
       alignax anchor MODELS FOLDER --samples FILE [--scale] [--config FILE.py] [--config.FIELD=VALUE ...]
       alignax ridge  FOLDER --config FILE.py [--penalty X] [--config.FIELD=VALUE ...]
       alignax generate MODEL [--prompts FILE] [--out FILE] [--n N] [--max-new-tokens N] [--temperature T] [--top-k K] [--top-p P]
                        [--min-p P] [--repetition-penalty R] [--stop TEXT ...] [--seed N] [--slots N] [--cache DTYPE]
                        [--combine MODEL@C,...] [--raw] [--config.FIELD=VALUE ...]
       alignax export WORKDIR FOLDER [--config.FIELD=VALUE ...]
       alignax check-data --config FILE.py [--config.FIELD=VALUE ...] [--json OUT]
       alignax overopt --config FILE.py [--config.FIELD=VALUE ...]
       alignax report WORKDIR ...
       alignax bench  [METHOD ... | growth | --config FILE.py [generate]] [--config.FIELD=VALUE ...] [--steps N] [--json OUT]
                      [--against COMMAND [--rounds N]]
       --force with plan, eval, eval-rm, anchor, ridge, generate, export, check-data, report, bench: replaces what others wrote

train       runs an experiment, or resumes a stopped run; --dry-run shows what the run would do and writes nothing; --plan FILE, with the
            file of `alignax plan --json FILE`: warns of all that is not as it was planned
plan        compiles every program of a run for TPU slices that need not be at hand (v5e:16x16, v5p:4x4x8, v6e:4x4, v4:2x2x4), and says of
            each whether it fits, what bounds it and how long it takes at least; needs no weights; --slices: several slices; --search: also
            tries other meshes, remats and microbatches; --json FILE also writes all figures to a file, --json - prints them instead; the
            exit code is 2 if the run does not fit: docs/pods.md
eval        evaluates the newest checkpoint of a run on the evaluation data of the run; --json FILE also writes the metrics to a file, with
            the run and step that they belong to; --json - prints them instead
eval-rm     evaluates a reward model or an ensemble on the pairs of data.eval, and on the out-of-distribution pairs of data.ood: accuracy,
            margin, calibration, score against length, disagreement; MODELS: a run's workdir, or model folders separated by commas (with
            --config for the settings of the data)
anchor      writes reward models with scores of mean 0 on samples of the initial policy, with --scale also of standard deviation 1; MODELS
            as for eval-rm; FILE: rows with a prompt and a completion, as written by `alignax generate --out`
ridge       writes a reward model with a head fitted in closed form to data.train, which holds pairs or attributes; the trunk is unchanged
generate    completes prompts; MODEL is a Hugging Face folder, or the WORKDIR of a run. FILE has one prompt per line, or rows (.jsonl, .csv,
            .parquet) with a column "prompt", text or messages; without FILE, prompts are typed. Lines go through the chat template of the
            model if there is one; --raw leaves lines unchanged. --out writes JSONL with tokens and log-probs, --out - prints it;
            --temperature 0 is greedy; --stop may be given several times; --combine adds the logits of further models, each times a
            coefficient, to the logits of MODEL: --combine TUNED@1,UNTUNED@-1 is proxy-tuning
export      writes the newest checkpoint of a run as a Hugging Face folder, for an ensemble one folder per member; WORKDIR may also be a
            mean of model folders, A@0.5,B@0.5, which model.path, reference.path and generate accept too
check-data  reads and tokenises the data (train, eval, pretrain, ood) and reports on the data, with a count of bad rows; needs the tokenizer
            of the model folder, but no weights; --json FILE also writes the report to a file, --json - prints it instead; the exit code is
            2 if a run would refuse the data
overopt     measures reward overoptimisation: best-of-n and direct alignment against a gold reward; resumes a stopped measurement
report      writes WORKDIR/report.html again, for a laboratory or a training run; for several workdirs also comparison.html in the first
bench       measures speed and memory: built-in methods (sft, dpo, rpo, rm, ensemble, grpo, generate; default: all) on random weights and
            invented words, the run of an experiment file, or with "generate" only the sampler of that run; --steps: timed steps, default 6;
            "growth" measures how cost grows with layers, tokens, responses, members, vocabulary and batch; --against alternates another
            command with one case, --rounds times (default 3), and prints ratios; --json FILE (default in runs/bench) gets all figures, with
            the printed page and a roofline beside it, --json - prints them instead: docs/performance.md
FIELD       any field of the config, such as data.max_length; `alignax train --config FILE.py --dry-run` lists all fields
            The value of an option may follow an =, as in --json=OUT; a value that begins with -- must"""
WANTED = {
    "train": [], "plan": [], "eval": ["WORKDIR"], "eval-rm": ["MODELS"], "anchor": ["MODELS", "FOLDER"], "ridge": ["FOLDER"],
    "generate": ["MODEL"], "export": ["WORKDIR", "FOLDER"], "check-data": [], "overopt": [], "report": ["WORKDIR ..."],
    "bench": ["METHOD ..."],
}  # fmt: skip
CONFIGURED = (
    "train",
    "plan",
    "eval-rm",
    "anchor",
    "ridge",
    "check-data",
    "overopt",
    "bench",
)  # commands that take an experiment file (--config)
WRITING = (
    "plan",
    "eval",
    "eval-rm",
    "anchor",
    "ridge",
    "generate",
    "export",
    "check-data",
    "report",
    "bench",
)  # commands that take --force
VALUED = {
    "--config": CONFIGURED, "--json": ("plan", "eval", "eval-rm", "check-data", "bench"), "--samples": ("anchor",), "--penalty": ("ridge",),
    "--topology": ("plan",), "--slices": ("plan",), "--steps": ("bench",), "--against": ("bench",), "--rounds": ("bench",),
    "--plan": ("train",),
}  # fmt: skip
COUNTS = {"--steps": "6", "--rounds": "3", "--slices": "0"}  # options with a whole number, and their defaults
VALUES = {
    "--penalty": "X",
    "--topology": "KIND:XxY",
    "--slices": "N",
    "--steps": "N",
    "--against": "COMMAND",
    "--rounds": "N",
}  # what stands for a value in messages; others: FILE


class Arguments(NamedTuple):
    """The words of a command line."""

    command: str
    words: list[str]  # positional words: MODELS, FOLDER ..
    overrides: list[str]  # FIELD=VALUE
    file: str  # --config: the experiment file
    dry: bool  # --dry-run
    plan: str  # --plan of train: a file of `alignax plan --json`
    json: str  # --json: where plan, check-data, eval, eval-rm and bench write JSON; "-": to the console; empty: nowhere
    samples: str  # --samples of anchor
    scale: bool  # --scale of anchor
    penalty: float  # --penalty of ridge
    request: "Request"  # options of generate
    force: bool  # --force: replace what is there
    steps: int  # --steps of bench
    against: str  # --against of bench
    rounds: int  # --rounds of bench
    topology: str  # --topology of plan
    slices: int  # --slices of plan
    search: bool  # --search of plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `alignax` command; returns its exit code.

    The code is 0, 2 for bad input, 1 for a run that had to stop, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if the reader
    of the output has gone.
    """
    if argv is not None:
        return run(argv)
    try:
        code = run(sys.argv[1:])
    except SystemExit as e:  # of a run that a signal has stopped
        code = e.code if isinstance(e.code, int) else 1
        leave_process(code)
        raise
    leave_process(code)
    return code


def run(argv: Sequence[str]) -> int:
    """Runs the command of these words; returns its exit code."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115  (after `>&-`)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a console that cannot encode a character, an arrow for example
    install()
    try:
        code = command(list(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output that is flushed at exit
        return 141
    except KeyboardInterrupt as e:  # where no run is prepared or trained, which end with a line of their own
        return leave(told(number_of(e)), number_of(e))
    except Exception as e:
        if (own := link()) is None:
            raise
        own.settle()  # a collective fails where another process has ended
        traceback.print_exc()
        return stopped(f"{type(e).__name__}: {e}", 1)


def command(args: list[str]) -> int:
    """Runs a command line of words and returns its exit code."""
    if not args or args[0] == "help" or {"-h", "--help"} & set(args):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "plan":  # before jax is imported: a plan asks for no TPU, which another process may use
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        given = parse(args)
    except ValueError as e:
        return fail(e)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # for example that PyTorch is missing
    from alignax import paths
    from alignax.cli import bench_commands, commands, plan_commands, reward_commands
    from alignax.compiled import keep
    from alignax.config.blame import BadInput
    from alignax.run.external import SamplerFailed
    from alignax.run.host_rewards import RewardFailed

    try:
        if given.command != "plan":  # which keeps its figures, not programs for chips that are not here
            keep()
    except ValueError as e:
        return fail(e)
    try:
        if given.command == "train":
            commands.train(given.file, given.overrides, given.dry, given.plan)
        elif given.command == "plan":
            plan_commands.plan(given.file, given.overrides, given.topology, given.slices, given.search, given.json, given.force)
        elif given.command == "eval":
            commands.evaluate(paths.of(given.words[0]), given.overrides, given.json, given.force)
        elif given.command == "eval-rm":
            reward_commands.eval_rm(given.words[0], given.file, given.overrides, given.json, given.force)
        elif given.command == "anchor":
            models, folder = given.words
            reward_commands.anchor(models, paths.of(folder), given.file, given.overrides, given.samples, given.scale, given.force)
        elif given.command == "ridge":
            reward_commands.ridge(paths.of(given.words[0]), given.file, given.overrides, given.penalty, given.force)
        elif given.command == "generate":
            commands.generate(paths.of(given.words[0]), given.request, given.overrides, given.force)
        elif given.command == "export":
            commands.export(paths.of(given.words[0]), paths.of(given.words[1]), given.overrides, given.force)
        elif given.command == "overopt":
            commands.overopt(given.file, given.overrides)
        elif given.command == "report":
            commands.report([paths.of(word) for word in given.words], given.force)
        elif given.command == "bench":
            bench_commands.bench(
                given.words, given.file, given.overrides, given.steps, given.json, given.against, given.rounds, given.force
            )
        else:
            commands.check_data(given.file, given.overrides, given.json, given.force)
    except BrokenPipeError:
        raise
    except BadInput as e:
        return fail(e)
    except OSError as e:  # a full disk in the middle of a run, for example
        if (own := link()) is not None:
            own.settle()  # what cannot be written may be what another process, which has ended, should have sent
        return fail(e)
    except (FloatingPointError, RewardFailed, SamplerFailed) as e:
        print(f"alignax: stopped: {e}", file=sys.stderr)
        return stopped(f"stopped: {e}", 1)
    return 0


def stopped(line: str, code: int) -> int:
    """The exit code of a command that has ended with an error; one of several processes tells the others and ends here.

    At its regular end, jax would wait for the others, which may wait for this one.
    """
    if (own := link()) is not None:
        sys.stdout.flush()
        own.tell(" ".join(line.split()), code)
        os._exit(code)
    return code


def parse(args: Sequence[str]) -> Arguments:
    """Parses a command line.

    Raises:
      ValueError: for an unknown command or option, and for missing or superfluous words and values.
    """
    from alignax import paths
    from alignax.generate.console import Request
    from alignax.text import short

    command, *rest = args
    if command not in WANTED:
        raise ValueError(f"command {short(command)} is unknown; use {', '.join(WANTED)}")
    words, overrides, dry, scale, search, request, force = [], [], False, False, False, Request(), False
    values: dict[str, str] = {}
    rest = iter(rest)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if command in VALUED.get(name, ()):
            value = value if equals else following(rest)
            if not value:
                raise ValueError(f"{name} has no value; write {name}={VALUES.get(name, 'FILE')}")
            if name in values:
                raise ValueError(f"{name} is given twice, as {short(values[name])} and {short(value)}; leave one out")
            values[name] = value
        elif name.startswith("--config.") and command != "report":
            value = value if equals else following(rest)
            if value is None:
                raise ValueError(f"{name} has no value; write {name}=VALUE")
            overrides.append(f"{name.removeprefix('--config.')}={value}")
        elif arg == "--dry-run" and command == "train":
            dry = True
        elif arg == "--force" and command in WRITING:
            force = True
        elif arg == "--scale" and command == "anchor":
            scale = True
        elif arg == "--search" and command == "plan":
            search = True
        elif arg == "--raw" and command == "generate":
            request = dataclasses.replace(request, raw=True)
        elif command == "generate" and arg.startswith("--") and not arg.startswith("--config"):
            request = with_option(request, name, value if equals else following(rest))
        elif arg.startswith("-"):
            raise ValueError(f"option {short(arg)} is unknown to `alignax {command}`; `alignax --help` lists the options of each command")
        else:
            words.append(arg)
    file, json, samples = (values.get(name, "") for name in ("--config", "--json", "--samples"))
    penalty = number("--penalty", values.get("--penalty", "1.0"))
    steps, rounds, slices = (whole(name, values.get(name, default)) for name, default in COUNTS.items())
    if len(words) != len(WANTED[command]) and not (command == "report" and words) and command != "bench":
        raise ValueError(f"`alignax {command}` takes {' and '.join(WANTED[command]) or 'no positional arguments'}, not {short(words)}")
    topology = values.get("--topology", "")
    if command in ("train", "plan", "ridge", "check-data", "overopt") and not file:
        example = {"overopt": "overoptimization", "ridge": "rm_hh"}.get(command, "dpo_hh")
        raise ValueError(f"`alignax {command}` needs --config FILE.py, such as experiments/{example}.py")
    if command == "plan" and not topology:
        raise ValueError("`alignax plan` needs --topology KIND:XxY, such as v5e:4x4 or v5p:4x4x8")
    if slices < 0 or ("--slices" in values and not slices):
        raise ValueError(f"--slices is {slices}; use 1 or more")
    if command == "anchor" and not samples:
        raise ValueError(
            "`alignax anchor` needs --samples FILE, with samples of the initial policy from `alignax generate MODEL --out FILE`"
        )
    beside = [("a model of --combine", path) for path, _ in request.combination()]
    named = {
        "--config": file,
        "--plan": values.get("--plan", ""),
        "--json": json,
        "--out": request.out,
        "--samples": samples,
        "--prompts": request.prompts,
    }
    for name, text in [*named.items(), *beside, *((f"an argument of `alignax {command}`", word) for word in words)]:
        paths.check(text, name, hub=name in ("--samples", "--prompts"))
    against = values.get("--against", "")
    return Arguments(
        command,
        words,
        overrides,
        file,
        dry,
        values.get("--plan", ""),
        json,
        samples,
        scale,
        penalty,
        request,
        force,
        steps,
        against,
        rounds,
        topology,
        slices,
        search,
    )


def following(rest: Iterator[str]) -> str | None:
    """The value after an option: the next word; None if that is an option or missing."""
    word = next(rest, None)
    return None if word is None or word.startswith("--") else word


def number(option: str, value: str) -> float:
    """The value of an option as a number."""
    from alignax.text import short

    try:
        return float(value)
    except ValueError as e:
        raise ValueError(f"{option} is {short(value)}; it must be a number") from e


def whole(option: str, value: str) -> int:
    """The value of an option as a whole number."""
    from alignax.text import short

    try:
        return int(value)
    except ValueError as e:
        raise ValueError(f"{option} is {short(value)}; it must be a whole number") from e


def with_option(request: "Request", option: str, value: str | None) -> "Request":
    """The request with one option of `alignax generate` set; each `--stop` adds a string."""
    from alignax.text import short

    name = option.removeprefix("--").replace("-", "_")
    if name not in (f.name for f in dataclasses.fields(request)):
        raise ValueError(f"option {short(option)} is unknown; `alignax --help` lists all options")
    if value is None:
        raise ValueError(f"{option} has no value; write {option}=VALUE")
    old = getattr(request, name)
    if isinstance(old, bool):
        raise ValueError(f"{option} takes no value; write {option} alone, or leave it out")
    if isinstance(old, tuple):
        return dataclasses.replace(request, **{name: (*old, value)})
    try:
        new = type(old)(value)
    except ValueError as e:
        raise ValueError(f"{option} is {short(value)}; it must be {'a whole number' if isinstance(old, int) else 'a number'}") from e
    return dataclasses.replace(request, **{name: new})


def fail(error: BaseException) -> int:
    """Prints an error in one line to stderr; returns exit code 2."""
    line = f"error: {' '.join(str(error).splitlines())}"
    print(f"alignax: {line}", file=sys.stderr)
    return stopped(line, 2)
