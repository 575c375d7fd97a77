"""The log of a run: JSONL files, TensorBoard, and a line on the console."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignax import output
from alignax.config import BadInput
from alignax.paths import remote
from alignax.run.mirror import Mirror
from alignax.run.tensorboard import TensorBoard
from alignax.text import short

MOST = 1 << 24  # largest size of rollouts.jsonl, in bytes
TEXT = 1 << 16  # most characters of a text in samples.jsonl
LARGE = 1e300  # larger than any number that a run writes
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot encode
ROW = {"step": int, str: (float,)}  # shape of a row of metrics.jsonl, see `misfit`
SAMPLE = {"step": int, "prompt": str, "completion": str} | dict.fromkeys(("reward", "gold", "log_ratio"), (float,))  # row of samples.jsonl
SHOWN = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin", "reward": "reward", "kl": "kl", "grad_norm": "grad"}


class Log:
    """The log of one run in its workdir; only the log of process 0 writes."""

    def __init__(self, workdir: Path, *, steps: int, start: int, every: int, tensorboard: bool, writes: bool = True, turn: int = 1):
        """Opens the log after step `start`; removes rows of later steps, which a killed run left and this run makes again.

        A notice on the console counts the rows that the log lacks: it has one for the last of every `turn` steps.
        """
        self.steps, self.every, self.writes = steps, every, writes
        self._last = time.monotonic()  # end of the previous step, moved on by the time of pauses
        self._began, self._tokens = self._last, 0.0
        self._shown = start
        self._first: int | None = None  # first step of this process; it compiles, so speed and time left exclude it
        self._bar: Any = None
        self._tensorboard: TensorBoard | None = None
        self._mirror: Mirror | None = None
        self.folder = workdir  # where the files of the log grow
        self.evaluated = False  # whether the log has an evaluation of the state at `start`
        if not writes:
            return
        metrics, samples, rollouts = names = [f"{name}.jsonl" for name in ("metrics", "samples", "rollouts")]
        kept = _keep_rows(workdir / metrics, start)
        self.evaluated = any(row["step"] == start and _is_evaluation(row) for row in kept)
        _keep_rows(workdir / samples, start, SAMPLE)
        _keep_rows(workdir / rollouts, start, {"step": int})
        if there := remote(workdir):
            self._mirror = Mirror(there, names)
            self.folder = self._mirror.folder
        self._metrics, self._samples, self._rollouts = (self.folder / name for name in names)
        if lost := sorted({*range(turn, start + 1, turn)} - {row["step"] for row in kept if not _is_evaluation(row)}):
            self.line(
                f"notice: {workdir / metrics} has no row of step {lost[0]}"
                f"{f' and of {len(lost) - 1} further steps up to step {lost[-1]}' if lost[1:] else ''}, after which this run goes on: "
                "what they logged is lost"
            )
        if tensorboard:
            self._tensorboard = TensorBoard(self.folder / "tensorboard", purge=start + 1)
        if sys.stderr.isatty():
            from tqdm import tqdm

            shape = "step {n_fmt}/{total_fmt} |{bar:20}| {desc}"
            self._bar = tqdm(total=steps, initial=start, bar_format=shape, dynamic_ncols=True, leave=True)

    def step(self, step: int, metrics: Mapping[str, float], tokens: float, ended: float | None = None) -> None:
        """Logs a training step.

        The metric `tokens_per_second` is of this step, from the end of the previous step; in the first step of a process it includes
        compilation.

        Args:
          step: number of the step, from 1 on.
          metrics: metrics by name.
          tokens: tokens of the batch, without padding.
          ended: when the step ended, by `time.monotonic`; None: now.
        """
        now = time.monotonic() if ended is None else ended
        own, self._last = tokens / max(now - self._last, 1e-9), now
        if self._first is None:
            self._began, self._first = now, step
        else:
            self._tokens += tokens
        seconds = max(now - self._began, 1e-9)
        rate = self._tokens / seconds
        left = (self.steps - step) * seconds / max(step - self._first, 1)
        self.row({"step": step} | dict(metrics) | {"tokens": tokens, "tokens_per_second": own})
        shown = "  ".join(f"{short} {metrics[name]:.4g}" for name, short in SHOWN.items() if name in metrics)
        pace = f"  {_si(rate)} tok/s  {_clock(left)} left" if step > self._first else ""
        if self._bar is not None:
            with self._console():
                self._bar.set_description_str(shown + pace, refresh=False)
                self._bar.update(step - self._bar.n)
        elif self.writes and (step // self.every > self._shown // self.every or step in (self._first, self.steps)):
            self.line(f"step {step}/{self.steps}  {shown}{pace}")
            self._shown = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the context, for evaluation or saving, from the speed of training."""
        began = time.monotonic()
        yield
        away = time.monotonic() - began
        self._began, self._last = self._began + away, self._last + away

    def row(self, values: Mapping[str, float]) -> None:
        """Writes one row to metrics.jsonl and its points to TensorBoard; numbers that are not finite become null in JSON."""
        if not self.writes:
            return
        step = int(values["step"])
        _append(self._metrics, step, [values])
        if self._tensorboard is not None:
            self._tensorboard.add(step, {name: value for name, value in values.items() if name != "step"}, {})
        if self._mirror is not None:
            self._mirror.send()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes sampled completions to samples.jsonl and as TensorBoard text; of a text beyond `TEXT` characters, both ends."""
        if not self.writes:
            return
        rows = [{name: _ends(x) if isinstance(x, str) else x for name, x in row.items()} for row in rows]
        _append(self._samples, step, rows)
        if self._tensorboard is not None:
            text = "\n\n".join(f"**{row['prompt']}**{row['completion']}" for row in rows)
            self._tensorboard.add(step, {}, {"samples": text})

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes the responses that a step was trained on to rollouts.jsonl; beyond `MOST` bytes, the older half is dropped."""
        if not self.writes or not rows:
            return
        _append(self._rollouts, step, rows)
        if self._rollouts.stat().st_size > MOST:
            newer = self._rollouts.read_bytes()[-MOST // 2 :].split(b"\n", 1)[1]  # begins with a whole row
            output.write_text(self._rollouts, newer.decode())

    def publish(self) -> None:
        """Brings all files of the log to a workdir on a bucket, as before a checkpoint, so that no checkpoint has steps that the log lacks.

        Raises:
          OSError: if the bucket cannot be written.
        """
        if self._mirror is not None:
            self._mirror.finish()

    def line(self, text: str) -> None:
        """Prints a line on the console, above the progress line if there is one."""
        with self._console():
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            elif self.writes:
                print(text, file=sys.stderr, flush=True)

    @contextmanager
    def _console(self) -> Iterator[None]:
        """Stops console output if the console has gone, as after `| head` or the end of a terminal; the files have the metrics."""
        try:
            yield
        except OSError:
            self._bar, sys.stderr = None, open(os.devnull, "w")  # noqa: SIM115

    def close(self) -> None:
        """Closes the progress line and the way to a bucket."""
        if self._bar is not None:
            self._bar.close()
        if self._mirror is not None:
            self._mirror.close()


def read_rows(file: Path, shape: Any = ROW) -> list[dict[str, Any]]:
    """The rows of a JSONL log, without a last line that a killed run cut short.

    Raises:
      BadInput: for a line that is no row of this shape, see `misfit`, or whose step lies before the step of an earlier row.
    """
    rows = []
    for number, row, wrong in _lines(file, shape):
        if row is None:
            raise BadInput(f"{file}, line {number} is not a row of a log: {wrong}; delete that line")
        rows.append(row)
    return rows


def misfit(value: Any, shape: Any) -> str:
    """The first part of a JSON value that does not fit a shape, as "curves.gold is 3"; empty if the value fits.

    Shapes are `str`; `int` and `float`, for finite numbers; `(shape,)`, for a value that may be null or missing; `[shape]`, for a list;
    and `{key: shape}`, for an object with these keys, where the key `str` stands for all keys of the object.

    >>> misfit({"curves": {"gold": 3}}, {"curves": {"gold": str}})
    'curves.gold is 3'
    """
    if isinstance(shape, tuple):
        return "" if value is None else misfit(value, shape[0])
    if isinstance(shape, dict) and isinstance(value, dict):
        inner = [(key, value.get(key), own) for key, own in shape.items() if key is not str]
        inner += [(key, own, shape[str]) for key, own in value.items()] if str in shape else []
    elif isinstance(shape, list) and isinstance(value, list):
        inner = [(i, own, shape[0]) for i, own in enumerate(value)]
    else:
        if shape is str:
            fits = isinstance(value, str) and not SURROGATE.search(value)
        else:
            fits = shape in (int, float) and type(value) in (int, shape) and abs(value) < LARGE
        return "" if fits else f"is {short(value)}"
    wrong = next(((key, found) for key, own, of in inner if (found := misfit(own, of))), None)
    return f"{wrong[0]}{' ' if wrong[1].startswith('is ') else '.'}{wrong[1]}" if wrong else ""


def _lines(file: Path, shape: Any, last: float = math.inf) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Number and row of each complete line of a log; for a damaged line None in place of the row, and what is wrong with it.

    Rows of steps after `last` are left out.
    """
    before = 0  # step of the last row
    # Not splitlines(), which also splits at characters such as U+2028 that a sample may hold.
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            yield number, None, short(line)
        elif row["step"] > last:
            continue
        elif wrong := misfit(row, shape):
            yield number, None, f"its {wrong}"
        elif row["step"] < before:
            yield number, None, f"its step {row['step']} stands after step {before}"
        else:
            before = row["step"]
            yield number, row, ""


def _is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a row of metrics.jsonl is an evaluation, even one without metrics."""
    return all(name == "step" or name.startswith("eval/") for name in row)


def _keep_rows(file: Path, last: int, shape: Any = ROW) -> list[dict[str, Any]]:
    """Removes rows of steps after `last` from a log, atomically, and damaged lines, with a notice; returns the rows left.

    A run that begins, with a `last` of 0, keeps none.
    """
    kept, damaged = [], []
    for number, row, wrong in _lines(file, shape, last):
        if row is None:
            damaged.append(f"{number} ({wrong})")
        elif last:
            kept.append(row)
    if damaged:
        print(
            f"notice: {file} is damaged in line {', '.join(damaged[:3])}: {len(damaged)} damaged lines removed, the rest is kept",
            file=sys.stderr,
        )
    if file.is_file():
        output.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def _append(file: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps({"step": step} | _plain(row), ensure_ascii=False) + "\n" for row in rows)
    output.append(file, lines.encode(), output.AGAIN)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON: numbers that are not finite become None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _ends(text: str) -> str:
    """A text, of a long one its beginning and its end."""
    left = len(text) - TEXT
    return text if left <= 0 else f"{text[: TEXT // 2]} [{left:,} characters are left out] {text[-TEXT // 2 :]}"


def _si(x: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
