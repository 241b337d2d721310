"""Peak memory of one forward and backward: the most during two runs, less what was there before them (code and inputs),
less the gradients that are returned; with an optimizer of the head that of a whole step, less the optimizer's state.

On a GPU that is what PyTorch's allocator handed out. On a CPU it is the resident memory of a process of its own, where
the kernel's high-water mark can be reset before the runs (Linux, `/proc/self/clear_refs`), so that short peaks count.
Gradients count by what giving them back frees: pages of ∂w that nothing was added to may never have been made. Before
that the provider runs once on a small problem, so that libraries are loaded and threads started; a compiled one in full
size, because a compiler's memory is not the loss's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..testing.failure import failure_text, out_of_memory
from ..testing.workloads import Case, Shape, make_workload
from .providers import Provider, build
from .timing import TimedLoss, run_once, settle

SECONDS = 600  # that one process may take
# a server that has loaded PyTorch and run nothing forks in no time
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def measure(provider: Provider, case: Case, threads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """With embeddings of `dtype` on a CPU, in a process of its own with so many threads.

    Returns `peak_extra_bytes` and `method`, or `error` and `out_of_memory`.
    """
    context: Any = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, provider, case, threads, dtype))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else {"error": f"took more than {SECONDS} s", "out_of_memory": False}
    except EOFError:
        process.join()
        return {"error": f"ended with status {process.exitcode}, most likely out of memory", "out_of_memory": True}
    finally:
        process.kill()
        process.join()


def _child(pipe: Connection, *arguments: Any) -> None:
    try:
        pipe.send(_measure_here(*arguments))
    except Exception as error:
        pipe.send({"error": failure_text(error), "out_of_memory": out_of_memory(error)})


def _measure_here(provider: Provider, case: Case, threads: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.set_num_threads(threads)
    function = build(provider, torch.device("cpu"), dtype)
    mode = "step" if provider.optimizer.startswith("head-") else "both"

    def timed(shape: Shape) -> TimedLoss:
        return TimedLoss(provider, make_workload(case._replace(shape=shape), "cpu", dtype), mode, function)

    n, c, d = case.shape
    run_once(timed(case.shape if provider.compiled else Shape(min(n, 64), min(c, 512), d)))
    whole = timed(case.shape)
    x, w = whole.leaves[0]
    if mode == "step":
        run_once(whole)  # makes the optimizer's state
        x.grad = None
    peak = resident_peak(lambda: run_once(whole), x, w)
    return {"peak_extra_bytes": peak, "method": "VmHWM reset before two runs"}


def resident_peak(step: Callable[[], object], *leaves: Tensor) -> int:
    """Bytes of this process's memory at the peak of two steps, beyond what was there and the gradients of `leaves`."""
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(), step()
    peak, after = _status_bytes("VmHWM"), _resident_bytes()
    for leaf in leaves:
        leaf.grad = None
    torch.ops.sface.native_release_memory()  # it keeps the memory of ∂w for the next step
    gradients = after - _resident_bytes()
    return max(0, peak - before - gradients)


def cuda_peak(timed: TimedLoss) -> dict[str, Any]:
    """The same on a GPU, in this process: PyTorch's allocator counts exactly."""
    settle(timed)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(timed), run_once(timed)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    states = (t for optimizer in timed.optimizers for state in optimizer.state.values() for t in state.values())
    left = [t for t in (timed.x.grad, timed.w.grad, *states) if isinstance(t, Tensor)]
    extra = peak - sum(t.nbytes for t in left)
    timed.rest()
    return {"peak_extra_bytes": max(0, extra), "method": "max_memory_allocated over two runs"}


def _resident_bytes() -> int:
    """Without what glibc keeps of freed memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
