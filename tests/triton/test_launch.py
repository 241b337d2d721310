"""The host side of the Triton backend: which launches, with which arguments, how many compiled variants.

Launches are recorded, not made; what only a GPU has is stood in for.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import types
import weakref

import pytest
import torch

from sface_kernels import SFaceLoss, sface_loss, validation
from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import device, tiles
from sface_kernels.optim import HeadSGD
from sface_kernels.types import HyperParameters
from tests.support.cases import bf16, f32

FAST = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-16)
needs_triton = pytest.mark.skipif(backend.TRITON_VERSION is None, reason="Triton is not installed")
# of PyTorch's operations, those that launch nothing
FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "flatten",
    "reshape",
    "to",
    "unsqueeze",
    "view",
}
compiles = pytest.mark.skipif(
    backend.TRITON_VERSION is None or os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled here"
)


def reachable(held: object) -> list[object]:
    """What containers hold, at any depth."""
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return [held, *(each for one in inside for each in reachable(one))]


@needs_triton
class TestLaunches:
    def launches(self, shape, dense, target="sm_90", dtype=bf16, reduction=""):
        from sface_kernels.backends.triton.tools import compile_report

        hp = FAST._replace(filter_eps=0.0) if dense else FAST
        return compile_report.recorded(target, shape, dtype, f32, hp, dense, reduction=reduction)

    @pytest.mark.parametrize("reduction, launches", [("lists", 5), ("", 7), ("mean", 6), ("sum", 6)])
    def test_a_small_step_has_few(self, reduction, launches):
        """There the host decides, at some microseconds a launch."""
        dense = reduction != "lists"
        assert len(self.launches((128, 10_575, 512), dense, reduction=reduction if dense else "")) == launches

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_the_coefficients_of_a_mean_are_computed_once(self, monkeypatch, reduction):
        """A dense forward has made ∂w; the first backward only scales it, another computes it again."""
        monkeypatch.setenv("SFACE_VERIFY", "0")
        monkeypatch.setattr(validation, "checks_labels", lambda _: False)
        y, made = torch.arange(128), []
        x, w = (torch.zeros(size, 512, dtype=t, requires_grad=True) for size, t in ((128, bf16), (10_575, f32)))
        with device.pretend((9, 0), run=lambda kernel, *_: made.append(kernel.fn.__name__)):
            loss = sface_loss(x, w, y, reduction=reduction, backend="triton", filter_eps=0.0).sum()
            forward, again = set(made), ["prepare", "coefficients", "class_gradient"]
            assert ("class_gradient" in forward) == (reduction != "none") and made.count("coefficients") == 1
            for expected in (again if reduction == "none" else ["scale"], again):
                made.clear()
                loss.backward(retain_graph=True)
                assert made == expected

    @pytest.mark.parametrize("used", ["all", "only x", "never"])
    def test_what_a_forward_made_is_given_away_once(self, monkeypatch, used):
        """Its memory is the gradient's, and nobody's where that is not asked for or the graph is dropped."""
        monkeypatch.setenv("SFACE_VERIFY", "0")
        x, w = (torch.zeros(size, 16, requires_grad=True) for size in (5, 40))
        with device.pretend((9, 0), run=lambda *_: None):
            loss = sface_loss(x, w, torch.arange(5), backend="triton", filter_eps=0.0)
            (made,) = loss.grad_fn.options.made
            address, kept = made.data_ptr(), weakref.ref(made)
            del made
            if used == "all":
                loss.backward()
                assert w.grad.data_ptr() == address and not loss.grad_fn.options.made
            elif used == "only x":
                torch.autograd.grad(loss, x)
                assert kept() is None
            else:
                del loss
                assert kept() is None

    def test_a_small_step_has_few_operations_of_pytorch(self, monkeypatch):
        """Each that is more than a view or an allocation is a launch too."""
        monkeypatch.setenv("SFACE_VERIFY", "0")
        monkeypatch.setattr(validation, "checks_labels", lambda _: False)  # as on a GPU
        y = torch.arange(128)
        x, w = (torch.zeros(size, 512, dtype=t, requires_grad=True) for size, t in ((128, bf16), (10_575, f32)))

        def outermost(event) -> list[str]:
            space, _, name = event.name.partition("::")
            if space == "aten" and name not in FREE:
                return [name]
            return [name for child in event.cpu_children for name in outermost(child)]

        with device.pretend((9, 0), run=lambda *_: None), torch.profiler.profile() as profile:
            sface_loss(x, w, y, backend="triton", filter_eps=FAST.filter_eps).backward()
        made = [name for event in profile.events() if event.cpu_parent is None for name in outermost(event)]
        # the sum of the row losses and its division; the gradient to begin with, its division and mask, ∂x
        assert len(made) <= 7, made

    def test_a_second_call_of_a_kind_works_nothing_out(self, monkeypatch):
        """What does not depend on the tensors' contents is kept, but no tensor is."""
        from sface_kernels.backends.triton import kinds

        self.launches((100, 1009, 100), dense=False)
        monkeypatch.setattr(tiles, "tile", lambda *_: pytest.fail("worked out again"))
        assert len(self.launches((100, 1009, 100), dense=False)) == 5
        kept = [value for held in gc.get_objects() if type(held) is kinds.Kind for value in vars(held).values()]
        kept += [value for held in kept if isinstance(held, dict) for value in held.values()]
        assert kept and not any(isinstance(value, torch.Tensor) for value in kept)

    def test_what_was_compiled_is_launched_without_asking_triton_again(self):
        """Until a tensor has another alignment, which is compiled otherwise. Triton would work it out at each launch."""
        from sface_kernels.backends.triton import kinds, launch

        made = []

        class Launched:  # as kernel[grid] and as what it compiles
            arg_names = ("n", "x_ptr", "BLOCK_D", "w_ptr", "sums_ptr", "unit_x_ptr", "part_ptr", "tiles")

            def __init__(self, compiles: bool):
                self.compiles, self.fn = compiles, types.SimpleNamespace(__name__="finish_samples")

            def __getitem__(self, grid):
                def run(*values, **named):
                    made.append((self.compiles, grid, values, named))
                    return Launched(compiles=False) if self.compiles else None

                return run

        def steps(call):
            call.make("sums_ptr", 3, 5)
            call.make("unit_x_ptr", 4, 8, dtype=torch.float16)
            call.also("part_ptr", "unit_x_ptr", call.own["unit_x_ptr"].view(-1).view(f32))
            call.launch(Launched(compiles=True), 7, tiles=2)

        x, w = torch.zeros(5, 16), torch.zeros(9, 16)
        odd = torch.zeros(81)[1:].view(5, 16)
        with device.pretend((9, 0)):
            kind = kinds.kind_of(x, w, FAST, False, False, 132)
            for tensor in (x, x, odd, odd, x):
                launch.Call(kind, x.device, {"DENSE": False}, {"x_ptr": tensor}).run(steps, [tensor])
        assert [compiles for compiles, *_ in made] == [True, False, True, False, False]
        (_, grid, values, named), (_, again, in_order, unnamed) = made[:2]
        assert grid == (7,) and not values and named.pop("enable_fp_fusion") and named.pop("num_warps") == 4
        fixed = {"n": 5, "x_ptr": x, "BLOCK_D": 64, "w_ptr": None, "tiles": 2}
        assert {name: value for name, value in named.items() if name in fixed} == fixed
        assert named["part_ptr"].data_ptr() == named["unit_x_ptr"].data_ptr() and named["sums_ptr"].shape == (3, 5)
        repeated = dict(zip(named, in_order, strict=True))
        assert again == (7, 1, 1) and not unnamed and {name: repeated[name] for name in fixed} == fixed
        # by address, in one piece of memory
        sums, unit, part = (repeated[name] for name in ("sums_ptr", "unit_x_ptr", "part_ptr"))
        assert unit == part == sums + launch.ALIGNMENT
        assert len(kind.steps) == 2 and not any(isinstance(held, torch.Tensor) for held in reachable(kind.steps))

    def test_a_small_step_allocates_little(self, monkeypatch):
        """Each allocation takes the host half as long as a launch."""
        from triton.runtime.jit import JITFunction

        class Compiled:
            def __getitem__(self, grid):
                return lambda *values: launched.append(values)

        monkeypatch.setenv("SFACE_VERIFY", "0")
        monkeypatch.setattr(validation, "checks_labels", lambda _: False)
        monkeypatch.setattr(JITFunction, "run", lambda *_, **__: Compiled())
        launched: list[tuple] = []
        made: list[torch.Tensor] = []

        def allocated(buffer):
            made.append(buffer)
            return buffer

        x, w = (torch.zeros(size, 512, dtype=t, requires_grad=True) for size, t in ((128, bf16), (10_575, f32)))
        with device.pretend((9, 0), allocated=allocated):
            for repeated in (False, True):
                made.clear()
                sface_loss(x, w, torch.arange(128), backend="triton", filter_eps=FAST.filter_eps).backward()
                assert len(launched) == (5 if repeated else 0)
        # 16 outputs, scratch, unit rows of samples and of classes, ∂w
        assert len(made) == 20, [list(buffer.shape) for buffer in made]

    def test_calls_that_share_compiled_kernels_have_the_same_constants(self, monkeypatch):
        """What was launched for one of them is launched for all, with their own tensors. Constants that are set after a
        call has begun were missed."""
        from sface_kernels.backends.triton import launch

        monkeypatch.setenv("SFACE_VERIFY", "0")
        monkeypatch.setattr(validation, "checks_labels", lambda _: False)
        run, shared = launch.Call.run, set()
        calls: list[tuple] = []
        seen: dict[tuple, tuple] = {}

        def noted(call, steps, given):
            calls.append((call, call.variant(steps, given), []))
            run(call, steps, given)

        def record(kernel, grid, arguments):
            if kernel.fn.__name__ == "scale":  # belongs to no call
                return
            call, variant, made = calls[-1]
            made.append(kernel)
            fixed = kernel, grid, {name: value for name, value in arguments.items() if name not in call.own}
            key = call.kind, variant, len(made)
            if key in seen:
                shared.add(key)
            assert seen.setdefault(key, fixed) == fixed

        monkeypatch.setattr(launch.Call, "run", noted)
        y, (x, w) = torch.arange(16), (torch.zeros(size, 16, requires_grad=True) for size in (16, 300))
        head = SFaceLoss(16, 300, backend="triton", filter_eps=FAST.filter_eps)
        stepped = HeadSGD(head)
        with device.pretend((9, 0), run=record):
            for filter_eps, reduction in itertools.product((0.0, FAST.filter_eps), ("none", "mean", "sum", "none")):
                for rows, weight in ((x, w), (x, w.detach()), (x.detach(), w)):
                    options = {"reduction": reduction, "backend": "triton", "filter_eps": filter_eps}
                    loss = sface_loss(rows, weight, y, **options).sum()
                    loss.backward(retain_graph=True)
                    loss.backward(torch.tensor(2.0))
            for _ in range(2):
                head(x, y).backward()
                stepped.step()
        assert len(seen) > 20 and len(shared) > 10

    @pytest.mark.parametrize("dense", [False, True], ids=["lists", "dense"])
    def test_every_launch_says_that_sums_and_products_fuse(self, dense):
        """Triton means to change its default."""
        found = self.launches((100, 1009, 100), dense)
        assert len(found) > 3 and all(arguments["enable_fp_fusion"] is True for _, arguments in found)

    @pytest.mark.parametrize("dense", [False, True], ids=["lists", "dense"])
    def test_nothing_is_worked_out_again_for_every_chunk(self, monkeypatch, dense):
        """At a million classes a call has hundreds of launches, which the host must make faster than the GPU runs them."""
        from sface_kernels.backends.triton import kinds

        asked = []
        tile = tiles.tile

        def counted(*key):
            asked.append(key)
            return tile(*key)

        monkeypatch.setattr(tiles, "tile", counted)
        counts = []
        for classes in (20_000, 1_000_000):
            asked.clear()
            kinds._kind.cache_clear()
            launches = len(self.launches((1024, classes, 512), dense))
            counts.append((launches, len(asked)))
        (few, asked_few), (many, asked_many) = counts
        assert many > 3 * few and asked_many == asked_few < 30

    @compiles
    @pytest.mark.parametrize("dtype", [bf16, f32], ids=["bf16", "fp32"])
    @pytest.mark.parametrize("dense", [False, True], ids=["lists", "dense"])
    def test_batch_sizes_share_their_kernels(self, dense, dtype):
        """The last batch of an epoch, a validation batch, gradient accumulation: no stall to compile."""
        from sface_kernels.backends.triton.tools import compile_report

        sizes = [
            1,
            2,
            15,
            16,
            17,
            31,
            32,
            33,
            64,
            65,
            100,
            127,
            128,
            129,
            200,
            256,
            257,
            300,
            384,
            385,
            448,
            500,
            511,
            512,
        ]
        variants = [entry for n in sizes for entry in self.launches((n, 85_742, 512), dense, dtype=dtype)]
        assert len(compile_report.distinct(variants)) <= 10

    @compiles
    @pytest.mark.parametrize("size, stride", [(1, 1), (16, 2**31), (17, 3)], ids=["ones", "sixteens", "odd"])
    def test_compiles_whatever_integers_it_is_given(self, monkeypatch, size, stride):
        """Triton makes a constant of an argument that is 1, which has no methods of a tensor, marks what 16 divides, and
        takes what is past 2³¹ as int64. All that are not multiples of 128 by construction take such values here, strides
        too, which are constants of a contiguous weight and others of a transposed one."""
        import triton

        from sface_kernels.backends.triton.tools import compile_report, machine_code

        small = {"block_n": 16, "block_c": 32, "block_k": 16, "warps": 4}  # compiles fast
        monkeypatch.setenv("SFACE_TILES", json.dumps(dict.fromkeys(tiles.TABLES, small)))
        found: list = []
        for dense, need_x, reduction, _ in compile_report.MODES:
            found += compile_report.recorded("sm_90", (1, 1, 1), bf16, f32, FAST, dense, need_x, "", reduction)
        assert {kernel.fn.__name__ for kernel, _ in found} >= {"prepare", "finish_samples", *tiles.TABLES}
        seen = 0
        for kernel, arguments in compile_report.distinct(found):
            given = dict(arguments)
            for name in kernel.arg_names:
                if type(arguments[name]) is int and not name.isupper() and not name.startswith("padded_"):
                    given[name] = stride if "_stride_" in name else size
            source, options = compile_report.specialised(kernel, given)
            compiled = triton.compile(source, target=compile_report.TARGETS["sm_90"].gpu, options=options)
            if stride == 3:
                seen += compiled.asm["ttir"].count("_stride_")
                assert not machine_code.narrow_strides(compiled.asm["ttir"]), kernel
        assert stride != 3 or seen > 20 or backend.TRITON_VERSION < (3, 6)
