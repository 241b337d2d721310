"""Small calls of every kernel, for tools that slow a program down or count what its kernels do.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.small
"""

from __future__ import annotations

import argparse
import sys

import torch

from sface_kernels import sface_loss

from .problems import FAST_EPS, dense, leaves, random


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--large", action="store_true", help="one call of a size that fills the GPU")
    if parser.parse_args().large:
        calls = [(random(1024, 200_000, 512), FAST_EPS, 80.0)]
    else:
        calls = [
            (inputs, filter_eps, k_inter)
            for inputs in (
                random(33, 1009, 100),
                random(130, 389, 64, torch.float32),
                # more classes than a list holds, nearly all of them active
                dense(257, 20_011, 16, 0.9),
            )
            for filter_eps, k_inter in ((FAST_EPS, 80.0), (FAST_EPS, 20.0), (0.0, 80.0))
        ]
    for inputs, filter_eps, k_inter in calls:
        x, w, y = leaves(inputs)
        loss, stats = sface_loss(x, w, y, backend="triton", filter_eps=filter_eps, k_inter=k_inter, return_stats=True)
        loss.backward()
        print(
            tuple(x.shape), len(w), filter_eps, float(loss.detach()), int(stats.active_pairs), float(stats.dense_share)
        )
        assert x.grad is not None and w.grad is not None
        assert torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
