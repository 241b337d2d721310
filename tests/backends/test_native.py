"""What only the C++ backend does: instruction sets, a bounded list of active pairs, recycled memory, 64-bit offsets."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys

import pytest
import torch

from sface_kernels import sface_loss
from sface_kernels.backends import native as backend
from sface_kernels.types import Request
from tests.support.cases import ROOT, f32
from tests.support.checks import Judge, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem, trained_problem


def test_it_is_built_where_a_compiler_is():
    """Its cases skip where it is missing, so a broken build must fail here or nobody sees it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    assert importlib.util.find_spec("sface_kernels._C"), f"{compiler} is here, yet sface_kernels._C is not built"
    assert backend.unavailable(Request(torch.device("cpu"), f32, f32)) is None


class TestInstructionSets:
    def test_best_first(self, native):
        names = torch.ops.sface.native_instruction_sets()
        assert names[-1] == "baseline" and len(set(names)) == len(names)

    @pytest.mark.parametrize("isa", ["avx512_vnni", "avx2", "baseline"])
    def test_parity_with_each(self, isa, native):
        """An older CPU's kernels, whatever this one runs by itself: the parity and filter tests again in a process of its own."""
        if isa not in torch.ops.sface.native_instruction_sets():
            pytest.skip(f"this CPU or build has no {isa}, only {torch.ops.sface.native_instruction_sets()}")
        if isa == os.environ.get("SFACE_CPU_ISA", torch.ops.sface.native_instruction_sets()[0]):
            pytest.skip(f"this whole run is on {isa}")
        shapes = "over or strip or prime or usual or odd"
        selection = f"native-cpu-float32 and ((test_loss_and_gradients and ({shapes})) or test_active_set or one_call)"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
        files = [str(ROOT / "tests" / "loss" / name) for name in ("test_parity.py", "test_filter.py")]
        environment = {**os.environ, "SFACE_CPU_ISA": isa}
        done = subprocess.run([*command, *files], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

    def test_unknown_name(self, native):
        code = "import torch, sface_kernels as s; s.sface_loss(torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0]))"
        environment = {**os.environ, "SFACE_CPU_ISA": "sse9", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and "SFACE_CPU_ISA: expected one of" in done.stderr and "sse9" in done.stderr


class TestListOfActivePairs:
    """The arena holds active pairs and dense tiles; what does not fit is computed again in the backward."""

    @pytest.mark.parametrize("words", [1, 50, 1000, 20_000])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-12])
    def test_any_capacity(self, native, monkeypatch, geometry, filter_eps, words):
        problem = GEOMETRIES[geometry](300, 331, 96)
        roomy = run(native, problem, filter_eps=filter_eps)
        monkeypatch.setattr(backend, "ARENA_WORDS", words)
        tight = run(native, problem, filter_eps=filter_eps)
        assert torch.equal(tight.row_loss, roomy.row_loss) and torch.equal(tight.grad_x, roomy.grad_x)
        assert tight.stats._replace(dense_share=0) == roomy.stats._replace(dense_share=0)
        Judge(problem, filter_eps=filter_eps).check(tight, "native")

    @pytest.mark.parametrize("words", [0, 1])
    def test_an_overflowing_arena_is_what_was_tested(self, native, words):
        """Without room every block with an active pair must be marked for recomputation (−2)."""
        problem = GEOMETRIES["collapsed"](300, 331, 96)
        arguments = (problem.x, problem.w, problem.labels, 64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-12, True, True)
        segments = torch.ops.sface.native_forward(*arguments, words)[-1]
        assert (segments[..., 1] == -2).all()

    def test_target_out_of_range(self, native):
        """The operator itself reads nothing out of bounds, whoever calls it."""
        x, w, _, _ = trained_problem(3, 10, 8)
        for code in (10, 2**40):
            with pytest.raises(RuntimeError, match=f"target: expected classes below 10, got {code}"):
                torch.ops.sface.native_forward(
                    x, w, torch.tensor([0, code, 1]), 64.0, 80.0, 80.0, 0.8, 1.23, 0.0, True, True, 30
                )


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
        """The storage may be resized, shared and viewed like any other."""
        grad = run(native, trained_problem(*self.SHAPE)).grad_w
        view, total = grad[5:10], float(grad.double().sum())
        grad.add_(1).sub_(1)
        assert float(grad.double().sum()) == pytest.approx(total, abs=1e-2)
        del grad
        torch.ops.sface.native_release_memory()
        assert torch.isfinite(view).all()


def untouched(elements: int) -> torch.Tensor:
    """Zeros that take address space and no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * elements, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space of {4 * elements >> 30} GiB: {error}")
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)  # reading maps one shared page of zeros per 2 MiB, not per 4 KiB
    return torch.frombuffer(memory, dtype=f32)


class TestOffsetsPast32Bits:
    """Three products of sizes past 2³¹, each with what matters behind that mark, checked against fp64 on the rows that matter."""

    def test_row_stride(self, native):
        """Rows so far apart that j·stride passes 2³¹, in both inputs."""
        problem = trained_problem(20, 97, 64)
        spread = {}
        for name, rows in (("x", problem.x), ("w", problem.w)):
            stride = 2**31 // (len(rows) - 5)
            view = untouched(stride * len(rows)).as_strided(rows.shape, (stride, 1))
            spread[name] = view.copy_(rows)
        expected = run(native, problem)
        x, w = (spread[name].requires_grad_() for name in ("x", "w"))
        rows = sface_loss(x, w, problem.labels, reduction="none", backend="native")
        grads = torch.autograd.grad(rows, (x, w), problem.upstream)
        assert torch.equal(rows, expected.row_loss)
        assert torch.equal(grads[0], expected.grad_x) and torch.equal(grads[1], expected.grad_w)

    def test_weight_elements(self, native):
        """C·D past 2³¹ in one contiguous weight: zero rows but for some before, at and behind the mark."""
        d = 512
        c = 2**31 // d + 1000
        some = torch.tensor([0, 1000, 2**31 // d - 1, 2**31 // d, 2**31 // d + 1, c - 1])
        small = trained_problem(5, len(some), d)
        w = untouched(c * d).view(c, d)
        w[some] = small.w
        x = small.x.clone().requires_grad_()
        rows, stats = sface_loss(x, w, some[small.labels], reduction="none", backend="native", return_stats=True)
        rows.backward(small.upstream)
        # a zero row has cosine 0: neither loss nor, under the default filter, gradient
        t = truth(*small, filter_eps=2.0**-24)
        assert ((rows.double() - t.row_loss).abs() <= t.worst.loss + t.screen_loss["native"]).all()
        assert ((x.grad.double() - t.grad_x).norm(dim=1) <= t.worst.x + t.flip_x).all()
        assert int(stats.active_pairs) == int(t.active.sum())

    def test_pairs(self, native):
        """N·C past 2³¹: every class but a few, the last among them, is opposite to every sample and has no part in anything."""
        n, c, d = 4099, 2**31 // 4099 + 5000, 8
        g = torch.Generator().manual_seed(9)
        axis = torch.zeros(d)
        axis[0] = 1
        x = axis + 0.2 * torch.randn(n, d, generator=g)
        w = (-axis + 0.05 * torch.randn(1, d, generator=g)).repeat(c, 1)
        some = torch.tensor([0, 47, 300_000, 2**31 // n, 2**31 // n + 1, c - 2, c - 1])
        w[some] = torch.randn(len(some), d, generator=g)
        labels = some[torch.randint(0, len(some), (n,), generator=g)]
        rows_checked = torch.tensor([0, 1, 2048, n - 2, n - 1])
        upstream = torch.zeros(n)
        upstream[rows_checked] = torch.tensor([1.0, -2, 0.5, 3, -1])
        result = run(native, Problem(x, w, labels, upstream), filter_eps=2.0**-8)

        place = torch.searchsorted(some, labels[rows_checked])
        few = Problem(x[rows_checked], torch.cat([w[some], w[1:2]]), place, upstream[rows_checked])
        t = truth(*few, filter_eps=2.0**-8)
        assert t.q[:, -1].max() < 1e-20, "the other classes were to have no part"
        error = (result.row_loss[rows_checked].double() - t.row_loss).abs()
        assert (error <= t.worst.loss + t.screen_loss["native"]).all()
        assert ((result.grad_x[rows_checked].double() - t.grad_x).norm(dim=1) <= t.worst.x + t.flip_x).all()
        assert ((result.grad_w[some].double() - t.grad_w[:-1]).norm(dim=1) <= t.worst.w[:-1] + t.flip_w[:-1]).all()
        others = torch.ones(c, dtype=torch.bool)
        others[some] = False
        assert not result.grad_w[others].any()
