"""TensorBoard's event file, written in this thread: torch's SummaryWriter reports a full disk from another one, with a
traceback, and takes no folder whose name is not UTF-8. Tensorboard is imported when a file is opened."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Events:
    """Scalars and histograms of a run, in a new file in `folder`.

    Args:
        folder: is there.
        steps: already recorded by other files there; what these hold beyond is not shown.

    Raises:
        OSError: here and in every method.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = folder / name
        self._file = open(self.path, "wb")  # noqa: SIM115
        self._records, self._event = RecordWriter(self._file), Event
        self._write(Event(file_version="brain.Event:2"))
        if steps:
            self._write(Event(step=steps + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, name: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(self._event(step=step, summary=scalar(name, value)))

    def add_angles(self, name: str, counts: Tensor, step: int) -> None:
        """A histogram over 0 … π radians, `counts` `[BINS]` float64."""
        from torch.utils.tensorboard.summary import histogram_raw

        counts = counts.cpu()
        edges = [math.pi * (i + 1) / len(counts) for i in range(len(counts))]
        middle = torch.tensor(edges, dtype=torch.float64) - math.pi / (2 * len(counts))
        total, squares = (float((counts * middle**power).sum()) for power in (1, 2))
        about = {"min": 0.0, "max": math.pi, "num": float(counts.sum()), "sum": total, "sum_squares": squares}
        summary = histogram_raw(name, **about, bucket_limits=edges, bucket_counts=counts.tolist())
        self._write(self._event(step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
