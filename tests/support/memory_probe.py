"""Peak memory of one forward and backward beyond inputs and returned gradients, run as a program by test_memory.

For each configuration a forked child prints `backend N C filter_eps extra_bytes`. The parent has never run a kernel, so each
child starts without thread pools, scratch memory or free lists of an earlier one.
"""

from __future__ import annotations

import os
import sys

import torch

import sface_kernels


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def extra_bytes(backend: str, n: int, c: int, d: int, filter_eps: float) -> int:
    x = torch.randn(n, d).requires_grad_()
    w = torch.randn(c, d).requires_grad_()
    labels = torch.randint(0, c, (n,))
    small = torch.randn(
        100, d
    ).requires_grad_()  # loads libraries and starts threads, whose stacks are no part of the loss
    sface_kernels.sface_loss(x[:2], small, labels[:2] % 100, backend=backend, filter_eps=filter_eps).backward()
    x.grad = small.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = status("VmRSS")
    sface_kernels.sface_loss(x, w, labels, backend=backend, filter_eps=filter_eps).backward()
    peak, after = status("VmHWM"), status("VmRSS")
    x.grad = w.grad = None
    if backend == "native":
        torch.ops.sface.native_release_memory()  # it keeps the memory of ∂w for the next step
    gradients = after - status("VmRSS")  # pages of ∂w that nothing was added to may never have been made
    return peak - before - gradients


if __name__ == "__main__":
    features = int(sys.argv[1])
    for configuration in sys.argv[2:]:
        backend, n, c, filter_eps = configuration.split(",")
        child = os.fork()
        if child == 0:
            print(
                backend, n, c, filter_eps, extra_bytes(backend, int(n), int(c), features, float(filter_eps)), flush=True
            )
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{configuration} failed")
