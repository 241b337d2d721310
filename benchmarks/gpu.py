"""`make gpu`: everything that needs a GPU, in ten minutes; it installs nothing and needs no network.

    PYTHON=python3 OUT=runs/gpu make gpu
    PYTHON=python3 OUT=runs/gpu PARTS="dtypes large" LIMIT=120 make gpu     # these alone, in at most 120 s

Uses the PyTorch and Triton of the interpreter that runs it. Every part is a process of its own with a time limit, so that a
hang or a fault on the GPU ends that part alone; time that it leaves over goes to the next. In the folder are `log.txt`,
`summary.json` and the results of `sface-kernels bench`, each as soon as it is known. Exit status: 0 where all that is
required ran, finished and was right, 1 where not, 2 without a GPU that the Triton backend can use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sface_kernels.bench import report
from sface_kernels.bench.table import bench_table

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540.0
MOST_WORKERS = 12  # of pytest: each has a context of its own on the GPU, and compiles
LEAST = 5.0  # with less time left a part is not started
STOPPED = "the session was stopped"
FAILED = ("failed", "wrong", "unavailable")  # of a provider; what has no room on this GPU is no failure
FIND_GPU = """import sys, torch
from sface_kernels.testing.selfcheck import unavailable
if not torch.cuda.is_available(): sys.exit(f"PyTorch {torch.__version__} finds no GPU")
sys.exit(unavailable("triton", torch.device("cuda"), torch.bfloat16))"""
EVERYBODY = "triton,triton@0,reference,reference-bf16,careful-bf16,mm-bf16,mm3-bf16,read-w,write-w"
CHOSEN = "triton,triton@0,reference-bf16,careful-bf16,mm-bf16,mm3-bf16"
COMPILED = "triton,careful-compiled-bf16,reference-compiled-bf16,mm-bf16"
FEW = "triton,triton@0,reference-bf16,mm-bf16"
STEPS = "reference+sgd,triton+sgd,triton+head-sgd,triton+adamw,triton+head-adamw,mm-bf16"
LARGE = "--n 1024 --c 1000000"
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it PyTorch before 2.10 has no deterministic products
# freed memory goes back to the driver at once, so that an access past a buffer hits nothing that exists
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Part(NamedTuple):
    name: str
    seconds: float  # what it may take when all parts before it took all of theirs
    command: Sequence[str]
    needs: Sequence[str] = ()  # programs and modules
    required: bool = True  # whether the session is a failure without it
    environment: dict[str, str] = CUBLAS


def session_parts(out: Path) -> list[Part]:
    """In the order of what would be missed most."""
    workers = max(2, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 2))
    python, spread = sys.executable, ["-n", str(workers)] if has("xdist") else []

    def bench(name: str, seconds: float, options: str, required: bool = True) -> Part:
        words = f"{options} --device cuda --dtype bfloat16 --budget-seconds 1".split()
        command = [python, "-m", "sface_kernels", "bench", *words, "--out", str(out / f"{name}.json")]
        return Part(name, seconds, command, ("typer", "rich"), required, {})

    def pytest(name: str, seconds: float, where: str, which: str, *needs: str) -> Part:
        options = ["-v", "-rP", "--tb=short", "-p", "no:cacheprovider", *spread, where, "-k", which]
        return Part(name, seconds, [python, "-m", "pytest", *options], ("pytest", *needs))

    def sanitizer(tool: str, seconds: float, required: bool) -> Part:
        run = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu", "-k", "every_kernel"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *run]
        return Part(tool, seconds, command, ("compute-sanitizer", "pytest"), required, NO_CACHE)

    tune = "sface_kernels.backends.triton.tools.tune"
    train = ["examples/train_faces.py", "--head", "both", "--device", "cuda", "--no-tensorboard"]
    training = [python, *train, "--out", str(out / "training")]
    return [
        Part("facts", 10, [python, "-m", "sface_kernels", "info", "--json"], ("typer", "rich")),
        pytest("dtypes", 70, "tests/gpu", "float64"),
        pytest("checks", 70, "tests/gpu", "test_triton_gpu and not float64 and not every_kernel"),
        bench("large", 70, f"{LARGE} --mode both,graph --kernels --providers {EVERYBODY}"),
        bench("small", 50, f"--n 128,512 --c 10575,85742 --mode both,graph --kernels --providers {EVERYBODY}"),
        bench("steps", 30, f"{LARGE} --mode step --no-memory --providers {STEPS}"),
        bench("trained", 20, f"{LARGE} --geometry trained --mode both,graph --kernels --providers {CHOSEN}"),
        bench("dense", 20, f"{LARGE} --geometry dense --mode both,graph --kernels --providers {CHOSEN}"),
        bench("classes", 25, "--n 1024 --c 4000000,8000000,16000000 --mode both,graph --providers triton,mm-bf16"),
        sanitizer("memcheck", 40, required=True),
        pytest(
            "suite",
            80,
            "tests",
            "(triton and cuda or test_triton.py or test_ways.py or test_int8_screen.py or test_specialised.py or "
            "test_head_step.py)"
            " and not test_triton_gpu",
            "hypothesis",
        ),
        # alone, as compiling may take any time
        bench("compiled", 25, f"{LARGE} --mode both,graph --providers {COMPILED}", required=False),
        Part("tiles", 10, [python, "-m", tune, "--shape", "1024,1000000,512", "--ways", "lists"], required=False),
        sanitizer("racecheck", 15, required=False),
        # in what time is left, or asked for by PARTS
        Part("check", 1, [python, "-m", "sface_kernels", "check", "--device", "cuda"], ("typer", "rich"), False),
        bench(
            "samples", 1, f"--n 64,256,1024,4096 --c 10000,300000 --mode both,graph --providers {FEW}", required=False
        ),
        bench("features", 1, f"{LARGE} --d 128,1024 --mode both,graph --providers {FEW}", required=False),
        Part("training", 1, training, ("typer", "rich", "matplotlib"), False),
    ]


def has(name: str) -> bool:
    """A program or a module."""
    return bool(shutil.which(name) or importlib.util.find_spec(name))


def _run(part: Part, limit: float, log: Path) -> tuple[str, str]:
    """State and detail. However it ends, nothing that the part started goes on."""
    if missing := [name for name in part.needs if not has(name)]:
        return "not run", f"{', '.join(missing)} not found"
    with log.open("a") as file:
        print(f"\n===== {part.name}: {' '.join(part.command)} (at most {limit:.0f} s)", file=file, flush=True)
        streams: Any = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **part.environment}}
        process = subprocess.Popen(part.command, cwd=ROOT, start_new_session=True, **streams)
        try:
            status = process.wait(limit)
            return ("passed", "") if status == 0 else ("failed", f"exit status {status}")
        except subprocess.TimeoutExpired:
            return "unfinished", f"ended after {limit:.0f} s"
        except KeyboardInterrupt:
            return "unfinished", STOPPED
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(parts: Sequence[Part], out: Path, seconds: float = SECONDS) -> int:
    """Runs the parts until `seconds` are over, and says how each ended and what was measured. Exit status."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes, tables, right, deadline = [], [], bool(parts), time.monotonic() + seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, too
    for index, part in enumerate(parts):
        began = time.monotonic()
        left = deadline - began
        limit = min(left, part.seconds + max(0.0, left - sum(later.seconds for later in parts[index:])))
        print(f"{part.name} …", flush=True)
        state, detail, path = "unfinished", "no time was left", out / f"{part.name}.json"
        runs = limit > LEAST
        if runs:  # else what a run before has measured stays, as that of other parts; the log goes on
            path.unlink(missing_ok=True)
            state, detail = _run(part, limit, out / "log.txt")
        if runs and path.exists():
            rows = report.load(path)["rows"]
            tables.append(bench_table(rows, part.name).markdown())
            if failed := {f"{row['provider']}: {row['reason']}" for row in rows if row["status"] in FAILED}:
                state, detail = "failed", "; ".join([detail, *sorted(failed)])
        taken = round(time.monotonic() - began, 1)
        outcomes.append({"part": part.name, "state": state, "seconds": taken, "detail": detail})
        (out / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        right &= state == "passed" or not part.required
        deadline = 0.0 if detail == STOPPED else deadline
    print(*tables, *("{part:<10} {state:<10} {seconds:>6} s  {detail}".format(**one) for one in outcomes), sep="\n\n")
    print(f"\n{'all required parts passed' if right else 'NOT all required parts passed'}; written to {out}")
    return 0 if right else 1


def main() -> int:
    out = Path(os.environ.get("OUT", "runs/gpu")).resolve()
    parts = session_parts(out)
    if chosen := os.environ.get("PARTS", "").split():
        if unknown := set(chosen) - {part.name for part in parts}:
            expected = ", ".join(part.name for part in parts)
            print(f"make gpu: PARTS: expected some of {expected}, got {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        parts = [part for part in parts if part.name in chosen]
    try:
        limit = float(os.environ.get("LIMIT", SECONDS))
    except ValueError:
        print(f"make gpu: LIMIT: expected a number of seconds, got {os.environ['LIMIT']!r}", file=sys.stderr)
        return 2
    # in another process, as this one must not hold memory of the GPU
    found = subprocess.run([sys.executable, "-c", FIND_GPU], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        print(f"make gpu: {found.stderr.strip()}. Set PYTHON to an interpreter that finds one.", file=sys.stderr)
        return 2
    return run(parts, out, limit)


if __name__ == "__main__":
    sys.exit(main())
