"""What the launch code of the Triton backend allocates, run as a program by test_triton_memory: no GPU, no memory.

For each problem `N,C,D,way,dtype`, where the way is lists, dense, or made by a dense forward, prints a line of JSON: the most bytes that were held at once beyond the inputs and ∂w, in the forward
and in the backward, and the largest buffers then held. Tensors are on the meta device and nothing is launched.
"""

from __future__ import annotations

import json
import sys

import torch

from sface_kernels.backends.triton import plan, sequence
from sface_kernels.backends.triton.device import MULTIPROCESSORS, pretend
from sface_kernels.types import HyperParameters
from tests.support.held import Held


def measure(n: int, c: int, d: int, way: str, dtype: torch.dtype) -> dict[str, object]:
    dense, reduction = way != "lists", "mean" if way == "made" else ""
    x, w = torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(c, d, device="meta")
    target, grad_row = torch.empty(n, dtype=torch.int64, device="meta"), torch.empty(n, device="meta")
    hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, 0.0 if dense else 2.0**-16)
    with pretend((9, 0), run=lambda *_: None), Held() as held:
        int8 = not dense and plan.screens_int8(hp, d, "sm_90")
        outputs = sequence.forward(x, w, target, hp, True, True, dense, MULTIPROCESSORS, int8, reduction)
        forward, in_forward = held.peak - outputs[-1].nbytes, held.at_peak
        if reduction:
            return {"forward": forward, "backward": 0, "in_forward": in_forward, "in_backward": []}
        held.peak = 0
        grad = sequence.grad_weight(x, w, target, grad_row, hp, dense, list(outputs[5:-3]))
        backward = held.peak - grad.numel() * grad.element_size()
    return {"forward": forward, "backward": backward, "in_forward": in_forward, "in_backward": held.at_peak}


if __name__ == "__main__":
    for problem in sys.argv[1:]:
        *sizes, way, dtype = problem.split(",")
        n, c, d = map(int, sizes)
        print(json.dumps({"problem": problem, **measure(n, c, d, way, getattr(torch, dtype))}))
