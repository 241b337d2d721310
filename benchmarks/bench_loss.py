"""`python -m benchmarks.bench_loss`: the command `sface-kernels bench` in a checkout.

python -m benchmarks.bench_loss --n 128 --c 10000 --d 512 --geometry trained
python -m benchmarks.bench_loss --suite --out benchmarks/results/cpu.json
"""

from __future__ import annotations

import sys

from sface_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
