"""TensorBoard's event file, written in this thread: torch's SummaryWriter reports a full disk from another one, with a
traceback, and takes no folder whose name is not UTF-8."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar


class Events:
    """Scalars of a run, in a new file in `folder`.

    Args:
        folder: is there.
        steps: already recorded by other files there; what these hold beyond is not shown. 0: they are removed.

    Raises:
        OSError: here and in every method.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        if steps == 0:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if steps:
            self._write(Event(step=steps + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
