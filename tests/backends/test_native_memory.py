"""Memory of the C++ backend: ∂w recycled, what is saved for the backward, many steps, and running out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sface_kernels import SFaceLoss, sface_loss
from sface_kernels.backends.native import GradientMemory
from tests.support.cases import ROOT
from tests.support.checks import run
from tests.support.problems import trained_problem

MB = 1 << 20


def resident() -> int:
    """Bytes that this process holds in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])


class TestRecycledMemory:
    """A large ∂w takes the memory of one that was freed; never that of one still alive, and never with its content."""

    SHAPE = (16, 9001, 256)  # 9.2 MB, past the size from which memory is kept

    def test_gradients_of_two_steps_live_side_by_side(self, native):
        problems = [trained_problem(*self.SHAPE, seed=seed) for seed in (1, 2, 3)]
        grads = [run(native, problem).grad_w for problem in problems]
        copies = [grad.clone() for grad in grads]
        del grads[0]
        run(native, problems[0])
        assert torch.equal(grads[0], copies[1]) and torch.equal(grads[1], copies[2])

    def test_what_the_last_owner_left_is_gone(self, native):
        problem = trained_problem(*self.SHAPE)
        expected = run(native, problem).grad_w.clone()
        for _ in range(3):
            grad = run(native, problem).grad_w
            assert torch.equal(grad, expected)
            grad.fill_(torch.nan)
            del grad

    def test_other_sizes(self, native):
        for c in (9001, 9002, 8500, 30_000, 9001, 20):
            problem = trained_problem(16, c, 256)
            run(native, problem).grad_w.fill_(torch.nan)
            assert torch.isfinite(run(native, problem).grad_w).all()

    def test_release(self, native):
        """`native_release_memory` may be called at any time, and leaves live gradients alone."""
        problem = trained_problem(*self.SHAPE)
        grad = run(native, problem).grad_w
        copy = grad.clone()
        torch.ops.sface.native_release_memory()
        assert torch.equal(grad, copy)
        del grad
        torch.ops.sface.native_release_memory()
        assert torch.equal(run(native, problem).grad_w, copy)

    def test_a_gradient_outlives_its_tensors(self, native):
        grad = run(native, trained_problem(*self.SHAPE)).grad_w
        view, total = grad[5:10], float(grad.double().sum())
        grad.add_(1).sub_(1)
        assert float(grad.double().sum()) == pytest.approx(total, abs=1e-2)
        del grad
        torch.ops.sface.native_release_memory()
        assert torch.isfinite(view).all()

    def test_it_can_be_resized(self, native):
        """As code that shards gradients does: freed behind the tensor's back, grown again, shared."""
        problem = trained_problem(*self.SHAPE)
        grad = run(native, problem).grad_w
        expected = grad.clone()
        storage = grad.untyped_storage()
        storage.resize_(0)
        assert storage.nbytes() == 0
        storage.resize_(expected.nbytes)
        grad.copy_(expected)
        storage.resize_(2 * expected.nbytes)  # keeps what it holds
        assert torch.equal(grad, expected)
        grad.resize_(2 * len(expected), 256).fill_(torch.nan)
        assert torch.equal(run(native, problem).grad_w, expected)
        grad.resize_(0)
        shared = run(native, problem).grad_w.share_memory_()
        assert shared.is_shared() and torch.equal(shared, expected)

    def test_heads_that_take_turns_keep_their_blocks(self, native):
        """With one block kept, each would drop the other's; four heads find theirs again."""
        torch.ops.sface.native_release_memory()
        # partial sums of ∂x take a block as well
        problems = [trained_problem(128, c, 512) for c in (5001, 7000, 10_000, 14_000)]
        places = []
        for _ in range(3):
            places.append([run(native, problem).grad_w.data_ptr() for problem in problems])
        assert len(set(places[0])) == 4 and places[1] == places[0] and places[2] == places[0]

    def test_two_heads_alive_at_once_keep_their_blocks(self, native):
        """As in a training with two heads: both gradients live until the next step, of the same or another size."""
        torch.ops.sface.native_release_memory()
        for sizes in ((9001, 20_000), (9001, 9001)):
            problems, places = [trained_problem(16, c, 256) for c in sizes], []
            for _ in range(4):
                grads = [run(native, problem).grad_w for problem in problems]
                places.append({grad.data_ptr() for grad in grads})
                del grads
            assert len(places[0]) == 2 and all(place == places[0] for place in places)

    def test_few_blocks_are_kept(self, native, monkeypatch):
        """Sizes that never come again leave four blocks at most, and none once 16 other gradients were made."""
        memory = GradientMemory()
        sizes = [int(10_000 * 1.3**i) for i in range(8)]
        for c in sizes:
            memory.empty_like(torch.empty(c, 256))
        assert memory.held() == sum(1024 * c for c in sizes[-4:])
        for _ in range(20):
            memory.empty_like(torch.empty(9_000, 256))
        memory.empty_like(torch.empty(11_500, 256))  # none fits, so all that have waited go
        assert memory.held() == 1024 * (9_000 + 11_500)
        memory.release()
        assert memory.held() == 0

    @pytest.mark.parametrize("hold", [
        lambda t: t, lambda t: t[5:], lambda t: t.detach(), lambda t: t.untyped_storage(), lambda t: t.storage(),
        lambda t: t.numpy(), torch.utils.dlpack.to_dlpack, lambda t: t.requires_grad_().square(),
    ], ids=["itself", "a view", "detached", "storage", "typed storage", "numpy", "dlpack", "a graph"])  # fmt: skip
    def test_nothing_that_is_held_is_given_out(self, native, hold):
        """Whatever way somebody holds the memory: another block. Once let go: the same."""
        memory, w = GradientMemory(), torch.empty(9_000, 256)
        first = memory.empty_like(w)
        place, held = first.data_ptr(), hold(first)
        del first
        other = memory.empty_like(w)
        assert other.data_ptr() != place
        del held
        assert memory.empty_like(w).data_ptr() == place

    def test_threads_at_once_get_blocks_of_their_own(self, native, monkeypatch):
        """Also one that waits for the lock, and asks as soon as the one before it has let it go."""
        memory, w = GradientMemory(), torch.empty(9_000, 256)
        lock = memory._lock
        others: list[torch.Tensor] = []

        class CrowdedLock:
            def __enter__(self):
                lock.acquire()

            def __exit__(self, *_):
                lock.release()
                monkeypatch.undo()
                others.append(memory.empty_like(w))

        memory.empty_like(w)  # leaves a free block
        monkeypatch.setattr(memory, "_lock", CrowdedLock())
        assert memory.empty_like(w).data_ptr() != others[0].data_ptr()

    def test_shared_memory_is_not_given_out(self, native):
        """Another process may still have it."""
        memory, w = GradientMemory(), torch.empty(9_000, 256)
        shared = memory.empty_like(w).share_memory_()
        place = shared.data_ptr()
        del shared
        assert memory.empty_like(w).data_ptr() != place

    def test_without_a_count_of_holders_nothing_is_kept(self, native, monkeypatch):
        """It is no public function: another PyTorch may lack it, or count in another way."""
        for count in (None, lambda storage: 1):
            monkeypatch.setattr(torch._C, "_storage_Use_Count", count)
            memory = GradientMemory()
            memory.empty_like(torch.empty(9_000, 256))
            assert memory.held() == 0


def test_what_is_saved_follows_the_problem(native):
    """Hooks that serialise or offload what is saved pack as much as the batch needs, not the largest list there may be."""
    packed = []

    def pack(t):
        packed.append(t.nbytes)
        return t

    x, w, labels, _ = trained_problem(16, 200, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sface_loss(x.requires_grad_(), w.requires_grad_(), labels, backend="native")
    inputs = sum(t.nbytes for t in (x, w, labels))
    assert sum(packed) <= 2 * inputs + 4 * 16 * 200 + 4 * (16 + 200) + 4096


def test_many_steps_leak_nothing(native):
    """Shapes that vary, gradients that live on a while, kept graphs, errors on the way. SFACE_SOAK=100 takes as many
    steps as a day of training, in minutes."""
    head = SFaceLoss(128, 3000, backend="native")
    kept: list[torch.Tensor] = []

    def steps(count: int) -> None:
        for i in range(count):
            x = torch.randn(1 + 37 * i % 300, 128, requires_grad=True)
            loss = head(x, torch.arange(len(x)))
            loss.backward(retain_graph=i % 3 == 0)
            kept.append(head.weight.grad)
            head.weight.grad = None
            del kept[:-3]
            if i % 10 == 0:
                with pytest.raises(RuntimeError):
                    torch.ops.sface.native_forward(
                        x, head.weight, torch.full((len(x),), 5000), *[1.0] * 6, True, True, 10
                    )

    steps(100)
    before = resident()
    after = []  # the allocator's share varies by 20 MB from one reading to the next
    for _ in range(4):
        steps(100 * int(os.environ.get("SFACE_SOAK", 1)))
        after.append(resident())
    assert min(after) - before < 12 * MB  # one leaked ∂w a step would be 150 MB by the first, one leaked list 25


def test_without_memory_it_raises(native):
    """Under any limit: a Python exception, and exact results as soon as there is memory again."""
    code = """
import resource, torch
from sface_kernels import sface_loss
from tests.support.problems import trained_problem

x, w, labels, _ = trained_problem(200, 20_000, 256)
def step():
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = sface_loss(*leaves, labels, backend="native", filter_eps=2.0**-12)
    return torch.autograd.grad(loss, leaves)
expected, failed = step(), 0
torch.ops.sface.native_release_memory()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for extra in range(0, 80 << 20, 8 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
    try:
        step()
    except (RuntimeError, MemoryError):
        failed += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert all(torch.equal(a, b) for a, b in zip(step(), expected))
    torch.ops.sface.native_release_memory()
print("failed", failed)
"""
    if not Path("/proc/self/statm").exists() or "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("no limit on memory here: no /proc, or a sanitizer, whose shadow takes terabytes")
    # or the C library keeps freed memory, and the limit is never met
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 3, "no limit was reached"
