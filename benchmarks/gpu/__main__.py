"""Everything that needs a GPU, in one command that ends inside ten minutes and installs nothing.

    PYTHON=python3 OUT=runs/gpu make gpu

Uses the PyTorch and Triton of the interpreter that runs it. Writes `results.jsonl` (a line per figure or check),
`log.txt` and `summary.json` to the folder as it goes, and prints a summary last. Exit status: 0 where all that is
required finished and was right, 1 where not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from .session import Outcome, Part, results, run

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 540.0
SUITE = "(triton and cuda or test_triton.py) and not test_triton_gpu"  # what is in `checks` runs there
FIND_GPU = (
    "import torch, sys; sys.exit(0 if torch.cuda.is_available() else f'PyTorch {torch.__version__} finds no GPU')"
)


def without_gpu() -> str | None:
    """Why nothing can run here. Asked in another process, as this one must not hold memory of the GPU."""
    done = subprocess.run([sys.executable, "-c", FIND_GPU], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def session_parts() -> list[Part]:
    """In the order of what would be missed most."""

    def module(name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.gpu.{name}", *options]

    parts = [Part("facts", module("facts"), 15)]
    if has("setuptools"):
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        parts.append(Part("build", build, 50, required=False))
    parts.append(Part("checks", module("checks"), 100))
    if has("pytest") and has("hypothesis"):
        spread = ["-n", "12"] if has("xdist") else []
        pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *spread]
        parts.append(Part("suite", [*pytest, "-k", SUITE, "tests"], 165, environment={"PYTHONPATH": str(ROOT)}))
    sanitizer = shutil.which("compute-sanitizer")
    # freed memory goes back to the driver at once, so that an access past a buffer hits nothing that exists
    plain_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitized(tool: str, seconds: float, required: bool) -> Part:
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *module("small")]
        return Part(tool, command, seconds, required, plain_memory)

    if sanitizer:
        parts.append(sanitized("memcheck", 50, required=True))
    parts.append(Part("speed", module("speed"), 130))
    if sanitizer:
        parts.append(sanitized("racecheck", 20, required=False))
    if shutil.which("ncu"):
        ncu = ["ncu", "--clock-control", "none", "--set", "basic", "-k", "regex:^screen$", "-c", "3"]
        parts.append(Part("profile", [*ncu, *module("small", "--large")], 10, required=False))
    return parts


def table(folder: Path) -> list[str]:
    """Figures of the benchmark as lines, and the checks that failed."""
    lines = []
    for row in results(folder):
        if row.get("error"):
            lines.append(f"  {row['part']}: {row.get('name', '')}: {row['error']}")
        elif row["part"] == "speed":
            figures = ", ".join(f"{key} {row[key]}" for key in row if key not in ("part", "name", "shape", "geometry"))
            lines.append(
                f"  {row.get('shape', ''):<22} {row.get('geometry', ''):<8} {row.get('name', ''):<26} {figures}"
            )
        elif row["part"] == "facts":
            lines += [f"  {key}: {value}" for key, value in row.items() if key != "part"]
    return lines


def summary(outcomes: list[Outcome], folder: Path) -> int:
    print("\n" + "\n".join(table(folder)))
    for outcome in outcomes:
        print(f"{outcome.part:<10} {outcome.state:<10} {outcome.seconds:>6} s  {outcome.detail}")
    right = all(outcome.right for outcome in outcomes)
    print(f"\n{'all required parts passed' if right else 'NOT all required parts passed'}; written to {folder}")
    return 0 if right else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for what is found, made if missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when to stop")
    parser.add_argument("--only", default="", help="parts to run, by name, separated by commas")
    options = parser.parse_args()
    reason = without_gpu()
    if reason:
        print(f"make gpu: {reason}. Set PYTHON to an interpreter whose PyTorch sees one.", file=sys.stderr)
        return 2
    parts = session_parts()
    if options.only:
        wanted = options.only.split(",")
        unknown = set(wanted) - {part.name for part in parts}
        if unknown:
            parser.error(f"--only: {sorted(unknown)} not among the parts here: {[part.name for part in parts]}")
        parts = [part for part in parts if part.name in wanted]
    return summary(run(parts, options.out, options.seconds), options.out)


if __name__ == "__main__":
    sys.exit(main())
