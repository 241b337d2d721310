"""Runs the parts of a session one after another, each within its time, and keeps what they wrote whatever happens.

Every part is a process of its own: a hang or a fault on the GPU ends that part alone. A part appends its figures to
`results.jsonl` as it gets them and prints to `log.txt`. Time that a part leaves over goes to the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

RESULTS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.json"
GRACE = 5  # seconds between asking a process to end and ending it


class Part(NamedTuple):
    name: str
    command: Sequence[str]
    seconds: float  # what it may take when all parts before it took all of theirs
    required: bool = True  # whether the session is a failure without it
    environment: dict[str, str] | None = None


class Outcome(NamedTuple):
    part: str
    state: str  # "passed", "failed" or "unfinished"
    seconds: float
    required: bool
    detail: str

    @property
    def right(self) -> bool:
        return self.state == "passed" or not self.required


class Stopped(BaseException):
    """The session itself was asked to end."""


def _stop(*_: object) -> None:
    raise Stopped


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it started."""
    for signal_number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _run(part: Part, limit: float, folder: Path, log: TextIO) -> Outcome:
    log.write(f"\n===== {part.name}: {' '.join(part.command)} (at most {limit:.0f} s)\n")
    log.flush()
    began = time.monotonic()
    environment = {
        **os.environ,
        **(part.environment or {}),
        "GPU_RESULTS": str(folder / RESULTS),
        "GPU_PART": part.name,
    }
    environment["GPU_SECONDS"] = f"{max(limit - 2 * GRACE, limit / 2):.0f}"

    def outcome(state: str, detail: str) -> Outcome:
        return Outcome(part.name, state, round(time.monotonic() - began, 1), part.required, detail)

    try:
        process = subprocess.Popen(
            part.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        return outcome("failed", str(error))
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        _end(process)
        return outcome("unfinished", f"ended after {limit:.0f} s")
    except Stopped:
        _end(process)
        raise
    return outcome("passed" if status == 0 else "failed", "" if status == 0 else f"exit status {status}")


def record(**values: object) -> None:
    """Appends one result of the part that runs, for the summary and for whoever reads `results.jsonl`."""
    line = json.dumps({"part": os.environ.get("GPU_PART", ""), **values})
    path = os.environ.get("GPU_RESULTS")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")
    print(line, flush=True)


def results(folder: Path) -> list[dict[str, object]]:
    """Every complete line; the last one may have been cut."""
    found = []
    path = folder / RESULTS
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(parts: Sequence[Part], folder: Path, seconds: float) -> list[Outcome]:
    """Runs the parts until `seconds` are over; parts that did not start are "unfinished"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG, SUMMARY):
        (folder / name).unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    with open(folder / LOG, "a") as log:
        for index, part in enumerate(parts):
            left = deadline - time.monotonic()
            limit = min(left, part.seconds + max(0.0, left - sum(later.seconds for later in parts[index:])))
            if limit <= GRACE:
                outcomes.append(Outcome(part.name, "unfinished", 0.0, part.required, "no time was left"))
                continue
            print(f"{part.name} …", flush=True)
            try:
                outcomes.append(_run(part, limit, folder, log))
            except Stopped:
                outcomes.append(Outcome(part.name, "unfinished", 0.0, part.required, "the session was stopped"))
                deadline = 0.0
            last = outcomes[-1]
            print(f"{part.name}: {last.state} in {last.seconds} s {last.detail}", flush=True)
            (folder / SUMMARY).write_text(json.dumps([o._asdict() for o in outcomes], indent=1) + "\n")
    return outcomes
