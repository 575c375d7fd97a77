"""The log of a run whose workdir is on a bucket: its files grow on this machine, and are sent to the bucket whole."""

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from alignax.output import unfinished
from alignax.paths import Remote

PERIOD = 30.0  # seconds between two sendings, beside those before each checkpoint and at the end


class Mirror:
    """A folder on this machine, whose files are written to a folder on a bucket each time they have changed.

    No object can grow, so a file is sent whole, and of a JSONL file only whole lines. A process that is killed loses what it wrote since
    the last sending; the bucket then holds the file as it was sent, never half a row.
    """

    def __init__(self, there: Remote, names: Sequence[str]):
        """Begins with the files `names` of the bucket, those that exist."""
        self.there, self._scratch = there, tempfile.TemporaryDirectory(prefix="alignax-")
        self.folder = Path(self._scratch.name)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._sender, self._next = ThreadPoolExecutor(1), time.monotonic()
        self._going: Future[None] | None = None
        for name in names:
            if (there / name).is_file():
                (self.folder / name).write_bytes((there / name).read_bytes())
                self._sent[self.folder / name] = _state(self.folder / name)

    def send(self) -> None:
        """Sends what has changed, in the background, if the last sending began `PERIOD` ago; a failure waits for the next one."""
        if time.monotonic() >= self._next and (self._going is None or self._going.done()):
            self._next = time.monotonic() + PERIOD
            self._going = self._sender.submit(self._send)

    def finish(self) -> None:
        """Sends what has changed, and returns when it is on the bucket.

        Raises:
          OSError: if it cannot be sent; the files stay on this machine.
        """
        self._next = time.monotonic() + PERIOD
        try:
            self._sender.submit(self._send).result()
        except OSError as e:
            raise OSError(
                f"the log could not be written to {str(self.there)!r} ({e}); run the same command again: it goes on from the newest "
                "checkpoint"
            ) from e

    def close(self) -> None:
        """Sends what has changed, and removes the folder on this machine."""
        try:
            self.finish()
        finally:
            self._sender.shutdown()
            self._scratch.cleanup()

    def _send(self) -> None:
        found = [p for p in self.folder.rglob("*") if not any(map(unfinished, (p, *p.relative_to(self.folder).parents)))]
        for file in sorted(p for p in found if p.is_file()):
            if (now := _state(file)) == self._sent.get(file):
                continue
            target = self.there / "/".join(file.relative_to(self.folder).parts)
            if file.suffix == ".jsonl":  # the last line may be only half written by now
                content = file.read_bytes()
                target.write_bytes(content[: content.rfind(b"\n") + 1])
            else:
                target.upload(file)
            self._sent[file] = now


def _state(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns
