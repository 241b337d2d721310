"""Processes that stay, and run one function after another as a process group: importing torch takes seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = timedelta(seconds=20)  # of a collective that somebody misses
TASK_TIMEOUT = 90.0  # seconds


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the pool closed
            return
        function, args, rank, size, store = task
        torch.manual_seed(0)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=GROUP_TIMEOUT
            )
            answer = (True, function(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(Exception):
            if answer[0]:
                dist.barrier()  # who closes its sockets first takes subgroups of others down
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        pipe.send(answer)


class Failed(AssertionError):
    """A process raised, died or did not answer in time."""


class Pool:
    """Runs `function(*args)` in `size` processes that form the default group (gloo, one thread each)."""

    def __init__(self) -> None:
        self.members: list[tuple[Any, Any]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = 0

    def _grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.members) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def run(self, size: int, function: Any, *args: Any) -> list[Any]:
        """What each rank returned. `function` is one that a module defines."""
        answers = self.outcomes(size, function, *args)
        errors = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if errors:
            raise Failed("\n".join(errors))
        return [value for _, value in answers]

    def outcomes(self, size: int, function: Any, *args: Any, timeout: float = TASK_TIMEOUT) -> list[tuple[bool, Any]]:
        """For each rank (True, what it returned) or (False, the traceback or what became of it)."""
        self._grow(size)
        self.tasks += 1
        store = Path(self.folder.name) / f"store{self.tasks}"
        for rank, (_, pipe) in enumerate(self.members[:size]):
            pipe.send((function, args, rank, size, store))
        end, answers, lost = time.monotonic() + timeout, [], []
        for rank, (_, pipe) in enumerate(self.members[:size]):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    answers.append((False, f"rank {rank} did not answer within {timeout} s"))
                    lost.append(self.members[rank])
                    continue
                answers.append(pipe.recv())
            except (EOFError, OSError):
                answers.append((False, f"rank {rank} died"))
                lost.append(self.members[rank])
        self._end(lost)  # the others are as good as new
        return answers

    def close(self) -> None:
        self._end(list(self.members))

    def _end(self, members: list[tuple[Any, Any]]) -> None:
        for process, pipe in members:
            self.members.remove((process, pipe))
            pipe.close()
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()


os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes, which would fight for the cores
