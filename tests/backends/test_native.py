"""What only the C++ backend does: instruction sets, a bounded list of active pairs, operators that check, 64-bit offsets."""

from __future__ import annotations

import ast
import contextlib
import mmap
import os
import shutil
import subprocess
import sys

import pytest
import torch

from sface_kernels import SFaceLoss, ops, sface_loss, types
from sface_kernels.backends import native as backend
from sface_kernels.types import Request
from sface_kernels.validation import LABEL_DTYPES
from tests.support.cases import ROOT, f32
from tests.support.checks import Judge, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem, trained_problem


def test_it_is_built_where_a_compiler_is():
    """Its cases skip where it is missing, so a broken build must fail here or nobody sees it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    reason = backend.unavailable(Request(torch.device("cpu"), f32, f32))
    assert reason is None, f"{compiler} is here, yet {reason}"


@pytest.mark.parametrize("content, reason", [(None, "is not built"), (b"no library", "does not load")])
def test_what_is_wrong_with_the_extension(tmp_path, content, reason):
    """A package without its library, or with one that is none: it imports, runs chunked and says why."""
    shutil.copytree(ROOT / "sface_kernels", tmp_path / "sface_kernels", ignore=shutil.ignore_patterns("*.so"))
    if content is not None:
        (tmp_path / "sface_kernels" / "_C.so").write_bytes(content)
    code = "import sface_kernels; print(sface_kernels.__file__); print(sface_kernels.explain())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stdout + done.stderr
    assert "-> chunked" in done.stdout and reason in done.stdout and "_C.so" in done.stdout


def test_the_extension_uses_the_stable_abi_alone(native):
    """One build for every PyTorch from 2.11 on and every Python: no C++ symbol of PyTorch, none of Python."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listed = subprocess.run(
        ["nm", "-DC", "--undefined-only", backend.LIBRARY], capture_output=True, text=True, check=True
    )
    names = [line.split(" U ", 1)[1] for line in listed.stdout.splitlines() if " U " in line]
    assert any(name.startswith("aoti_torch_") for name in names)
    foreign = [name for name in names if name.startswith(("c10::", "at::", "torch::", "caffe2::", "Py", "_Py", "GOMP"))]
    assert not foreign, foreign


def defined(name: str) -> dict[str, float]:
    """The values of every module constant of this name in the package, by file; nothing is imported."""
    found = {}
    for path in sorted((ROOT / "sface_kernels").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value  # tl.constexpr(…)
                found[str(path.relative_to(ROOT))] = eval(ast.unparse(value), {"types": types})
    return found


def test_constants_are_those_of_python(native):
    """What two languages must know, compared: C++ says what it was built with."""
    there = torch.ops.sface.native_constants()
    names = [
        "CLASSES_PER_SEGMENT",
        "SAMPLES_PER_GROUP",
        "NO_TARGET",
        "IGNORED",
        "INVALID",
        "NORM_EPS",
        "CANDIDATE_SHARE",
    ]
    for name, value in zip(names, there, strict=True):
        here = defined(name)
        assert here, f"no file defines {name}"
        for file, expected in here.items():
            assert value == pytest.approx(expected, rel=1e-7, abs=0), f"{name} in {file}"


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("ignore_index", [-100, 3, 200, 2**40])
@pytest.mark.parametrize("part", [(0, 250), (0, 7), (5, 100), (249, 1)])
def test_codes_of_labels_are_those_of_pytorch(native, dtype, ignore_index, part):
    values = [7, 3, 0, 249, -100, 250, 5, 104, 105, -1, 200, 2**40, -(2**63), 2**63 - 1]
    for labels in (torch.tensor(values[start:]).to(dtype) for start in range(len(values) + 1)):
        expected = ops.prepare_labels_op(labels, 250, ignore_index, False, *part)
        code, first_invalid = torch.ops.sface.native_labels(labels, 250, ignore_index, *part)
        assert torch.equal(code, expected)
        assert first_invalid == next((i for i, c in enumerate(expected.tolist()) if c == types.INVALID), -1)


class TestInstructionSets:
    def test_best_first(self, native):
        names = torch.ops.sface.native_instruction_sets()
        assert names[-1] == "baseline" and len(set(names)) == len(names)

    @pytest.mark.parametrize("isa", ["avx512_amx", "avx512_vnni", "avx2", "baseline"])
    def test_parity_with_each(self, isa, native):
        """An older CPU's kernels, whatever this one runs by itself: tests of parity, filter and step again in a process of its own."""
        if isa not in torch.ops.sface.native_instruction_sets():
            pytest.skip(f"this CPU or build has no {isa}, only {torch.ops.sface.native_instruction_sets()}")
        if isa == os.environ.get("SFACE_CPU_ISA", torch.ops.sface.native_instruction_sets()[0]):
            pytest.skip(f"this whole run is on {isa}")
        shapes = "over or strip or prime or usual or odd"
        selection = f"native-cpu-float32 and ((test_loss_and_gradients and ({shapes})) or test_active_set or one_call)"
        selection = f"({selection}) or test_steps_of_odd_shapes"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
        files = [str(ROOT / "tests" / "loss" / name) for name in ("test_parity.py", "test_filter.py")]
        files.append(str(ROOT / "tests" / "optim" / "test_trajectory.py"))
        environment = {**os.environ, "SFACE_CPU_ISA": isa}
        done = subprocess.run([*command, *files], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

    def test_unknown_name(self, native):
        """It raises where `native` is asked for; "auto" says so and takes what runs, as where the library is missing."""
        environment = {**os.environ, "SFACE_CPU_ISA": "sse9", "PYTHONPATH": str(ROOT)}
        for name in ("native", "auto"):
            code = (
                "import torch, sface_kernels as s; print(s.available_backends()[0]); "
                f"s.sface_loss(torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0]), backend='{name}')"
            )
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert (done.returncode == 0) == (name == "auto") and done.stdout == "chunked\n"
            assert "SFACE_CPU_ISA: expected one of" in done.stderr and "got sse9" in done.stderr


class TestListOfActivePairs:
    """The arena holds active pairs and dense tiles; what does not fit is computed again in the backward."""

    @pytest.mark.parametrize("words", [1, 50, 1000, 20_000])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-12])
    @pytest.mark.parametrize("d", [96, 130])
    def test_any_capacity(self, native, monkeypatch, geometry, filter_eps, words, d):
        problem = GEOMETRIES[geometry](300, 331, d)
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
        segments = torch.ops.sface.native_forward(*arguments, words)[-2]
        assert (segments.view(-1, 2)[:, 1] == -2).all()


class TestOperators:
    """Public as torch.ops.sface.*: whoever calls them reads nothing out of bounds."""

    HYPER = (64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-12)

    def forward(self, x, w, target, words=10_000, hyper=HYPER):
        return torch.ops.sface.native_forward(x, w, target, *hyper, True, True, words)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda x, w, y: (x, w[:0], y), "w: expected at least one class and one feature"),
            (lambda x, w, y: (x[:, :0], w[:, :0], y), "w: expected at least one class and one feature"),
            (lambda x, w, y: (x.double(), w, y), "x: expected contiguous Float"),
            (lambda x, w, y: (x[:, ::2], w[:, ::2], y), "x: expected contiguous Float"),
            (lambda x, w, y: (x[0], w, y), "x: expected two dimensions"),
            (lambda x, w, y: (x, w[0], y), "w: expected two dimensions"),
            (lambda x, w, y: (x, w.double(), y), "w: expected float32, float16 or bfloat16, got Double"),
            (lambda x, w, y: (x, w[:, :5], y), "w: expected .* with contiguous rows"),
            (lambda x, w, y: (x, w.t().contiguous().t(), y), "w: expected .* with contiguous rows"),
            (lambda x, w, y: (x, w, y.int()), "target: expected contiguous Long"),
            (lambda x, w, y: (x, w, y[:1]), "target: expected contiguous Long"),
            (lambda x, w, y: (x, w, y[:1].expand(3)), "target: expected contiguous Long"),
            (lambda x, w, y: (x, w, y, -1), "arena_words: expected a size, got -1"),
        ],
    )
    def test_forward_refuses(self, native, change, message):
        x, w, labels, _ = trained_problem(3, 10, 8)
        with pytest.raises(RuntimeError, match=message):
            self.forward(*change(x, w, labels))

    @pytest.mark.parametrize("labels", [torch.zeros(3, 1).long(), torch.zeros(6).int()[::2], torch.zeros(3)])
    def test_labels_refuses(self, native, labels):
        with pytest.raises(RuntimeError, match="labels: expected"):
            torch.ops.sface.native_labels(labels, 10, -100, 0, 10)

    def test_target_out_of_range(self, native):
        x, w, _, _ = trained_problem(3, 10, 8)
        for code in (10, 2**40):
            with pytest.raises(RuntimeError, match=f"target: expected classes below 10, got {code}"):
                self.forward(x, w, torch.tensor([0, code, 1]))

    def test_no_samples(self, native):
        x, w, labels, upstream = trained_problem(3, 10, 8)
        x, labels, upstream = x[:0], labels[:0], upstream[:0]
        row_loss, _, _, counts, row_grad_x, *saved, counted = self.forward(x, w, labels)
        assert row_loss.shape == (0,) and row_grad_x.shape == (0, 8) and counts.tolist() == [0, 0] and counted == 1
        grad = torch.ops.sface.native_grad_weight(x, w, labels, upstream, *self.HYPER, *saved)
        assert torch.equal(grad, torch.zeros(10, 8))

    @pytest.mark.parametrize("which", ["grad_row", "inv_norm", "target_weight", "arena", "segments"])
    def test_grad_weight_refuses(self, native, which):
        """What the forward saved, but short, of another dtype, with other strides, or another shape."""
        x, w, labels, upstream = trained_problem(300, 100, 16)
        names = ["grad_row", "inv_norm", "target_weight", "arena", "segments"]
        saved = dict(zip(names, (upstream, *self.forward(x, w, labels)[5:-1]), strict=True))

        def backward(value: torch.Tensor) -> torch.Tensor:
            grad_row, *rest = {**saved, which: value}.values()
            return torch.ops.sface.native_grad_weight(x, w, labels, grad_row, *self.HYPER, *rest)

        right = saved[which]
        assert torch.isfinite(backward(right)).all()
        bad = [right.double(), right.repeat_interleave(2)[::2], right[:1].expand(len(right)), right.unsqueeze(0)]
        for value in [*bad, right[: len(right) // 8]]:
            with pytest.raises(RuntimeError, match=f"{which if which != 'arena' else '(arena|segments)'}: expected"):
                backward(value)

    @pytest.mark.parametrize("record", [(-1, 1), (0, 2**62), (2**62, 1), (0, -4 - 30 * 48), (9_000, -3), (10_000, -1)])
    def test_records_that_point_out_of_the_arena(self, native, record):
        x, w, labels, upstream = trained_problem(30, 100, 16)
        inv_norm, target_weight, arena, segments = self.forward(x, w, labels)[5:-1]
        segments.view(-1, 2)[1] = torch.tensor(record)
        with pytest.raises(RuntimeError, match="segments: expected a part of an arena"):
            torch.ops.sface.native_grad_weight(
                x, w, labels, upstream, *self.HYPER, inv_norm, target_weight, arena, segments
            )

    @pytest.mark.parametrize("word", [-1, 48 << 16, 30, 0xFFFF])
    def test_pairs_outside_their_block(self, native, word):
        x, w, labels, upstream = trained_problem(30, 100, 16)
        inv_norm, target_weight, arena, segments = self.forward(x, w, labels)[5:-1]
        segments.view(-1, 2)[1] = torch.tensor([0, 1])
        arena[0] = word
        with pytest.raises(RuntimeError, match="arena: expected a pair of 48 classes and 30 samples"):
            torch.ops.sface.native_grad_weight(
                x, w, labels, upstream, *self.HYPER, inv_norm, target_weight, arena, segments
            )

    def test_a_stride_in_a_dimension_of_size_1_means_nothing(self, native):
        x, w = torch.randn(4, 1), torch.randn(1, 5).t()
        target = torch.arange(4)
        assert w.stride(1) == 5
        ours, plain = (self.forward(x, t, target)[0] for t in (w, w.clone(memory_format=torch.contiguous_format)))
        assert torch.equal(ours, plain)

    def test_export_with_any_number_of_samples(self, native):
        """A batch below 256 and one above it pass through one exported graph."""
        head = SFaceLoss(16, 40, backend="native")
        size = torch.export.Dim("n")
        for traced in (5, 300):
            example = torch.randn(traced, 16, requires_grad=True), torch.arange(traced) % 40
            exported = torch.export.export(head, example, dynamic_shapes=({0: size}, {0: size})).module()
            for n in (2, 256, 257, 600):
                x, labels = torch.randn(n, 16), torch.arange(n) % 40
                assert torch.equal(exported(x, labels), head(x, labels))


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
