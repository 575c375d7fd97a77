"""TensorBoard's event files, written at once: a disk without room is an error of the step that it meets.

The writer of tensorboardX is a thread behind a queue. On a full disk the thread ends with a traceback, and the run waits for ever for
room in the queue.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignax import output


class TensorBoard:
    """An event file in a folder, to which scalars and texts are added; TensorBoard hides what earlier files have from step `purge` on."""

    def __init__(self, folder: Path, purge: int):
        """Begins a file. Errors: OSError, as in `add`."""
        event, session = _messages("Event", "SessionLog")
        self.file = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        output.append(self.file, b"", output.AGAIN)
        self._add(
            event(file_version="brain.Event:2"),
            event(step=purge, file_version="brain.Event:2"),
            event(step=purge, session_log=session(status=session.START)),
        )

    def add(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Adds the scalars and texts of a step, all or none.

        Raises:
          OSError: if the file cannot be written.
        """
        from tensorboardX.summary import scalar, text

        summaries = [scalar(name, value) for name, value in values.items()] + [text(name, value) for name, value in texts.items()]
        (event,) = _messages("Event")
        self._add(*(event(step=step, summary=summary) for summary in summaries))

    def _add(self, *events: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        content = b""
        for event in events:
            event.wall_time = time.time()
            data = event.SerializeToString()
            size = struct.pack("<Q", len(data))
            content += size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))
        output.append(self.file, content, output.AGAIN)


def _messages(*names: str) -> list[Any]:
    """Classes of TensorBoard's messages, which the protocol's compiler makes at the import."""
    from tensorboardX.proto import event_pb2

    return [vars(event_pb2)[name] for name in names]
