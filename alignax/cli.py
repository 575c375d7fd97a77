"""The `alignax` command: train, eval, export."""

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: alignax train  --config FILE.py [--config.FIELD=VALUE ...] [--dry-run]
       alignax eval   WORKDIR [--config.FIELD=VALUE ...]
       alignax export WORKDIR FOLDER [--config.FIELD=VALUE ...]

train   runs an experiment, or goes on where it was stopped; --dry-run shows what it would do and writes nothing
eval    evaluates the newest checkpoint of a run on its evaluation data
export  writes the newest checkpoint of a run as a Hugging Face folder
FIELD   any field of the config, such as data.max_length; `alignax train --config FILE.py --dry-run` lists them"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for bad input, 1 for a run that had to stop."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    try:
        command, words, overrides, file, dry = parse(args)
    except ValueError as e:
        return fail(e)
    from alignax import commands

    try:
        if command == "train":
            commands.train(file, overrides, dry)
        elif command == "eval":
            commands.evaluate(Path(words[0]), overrides)
        else:
            commands.export(Path(words[0]), Path(words[1]), overrides)
    except (commands.BadInput, OSError) as e:  # OSError: a full disk, say, in the middle of a run
        return fail(e)
    except FloatingPointError as e:
        print(f"alignax: stopped: {e}", file=sys.stderr)
        return 1
    return 0


def parse(args: Sequence[str]) -> tuple[str, list[str], list[str], str, bool]:
    """Command, positional words, overrides, experiment file, and whether it is a dry run."""
    command, *rest = args
    wanted = {"train": [], "eval": ["WORKDIR"], "export": ["WORKDIR", "FOLDER"]}
    if command not in wanted:
        raise ValueError(f"command {command!r} is unknown; use train, eval or export")
    words, overrides, file, dry = [], [], "", False
    rest = iter(rest)
    for arg in rest:
        if arg == "--config":
            file = next(rest, "")
        elif arg.startswith("--config="):
            file = arg.removeprefix("--config=")
        elif arg.startswith("--config."):
            override = arg.removeprefix("--config.")
            overrides.append(override if "=" in override else f"{override}={next(rest, '')}")
        elif arg == "--dry-run" and command == "train":
            dry = True
        elif arg.startswith("-"):
            raise ValueError(f"option {arg!r} is unknown; `alignax --help` lists them")
        else:
            words.append(arg)
    if len(words) != len(wanted[command]):
        raise ValueError(f"`alignax {command}` takes {' and '.join(wanted[command]) or 'no further words'}, not {words}")
    if command == "train" and not file:
        raise ValueError("`alignax train` needs --config FILE.py, such as experiments/dpo_hh.py")
    return command, words, overrides, file, dry


def fail(error: BaseException) -> int:
    """One line on the console for bad input."""
    print(f"alignax: error: {error}", file=sys.stderr)
    return 2
