"""torch.compile without graph breaks, and operators that tell the compiler the truth about themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from functorch.compile import aot_module, nop
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from sface_kernels import SFaceLoss, sface_loss
from sface_kernels.backends import chunked
from sface_kernels.backends import native as native_backend
from tests.support.cases import BACKENDS, Case, f16, f32, f64
from tests.support.checks import assert_rows_within
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES

HYPER = (64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-16)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# aot_eager traces, checks the fakes and splits forward from backward, all that can go wrong with opaque operators, in a
# tenth of the time; inductor is what users run, so it compiles one function for each of their backends as well.
@pytest.mark.parametrize(
    "backend, compiler",
    [(backend, "aot_eager") for backend in BACKENDS]
    + [(backend, "inductor") for backend in BACKENDS if backend != "reference"],
)
def test_function(backend, compiler):
    """fullgraph, hyper-parameters as Python floats, forward and backward; the opaque backends give eager's very bits."""
    case = Case(backend, "cpu", f32, f32)
    if case.reason_to_skip():
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    x, w, labels, upstream = GEOMETRIES["trained"](*(9, 70, 32) if case.emulated else (33, 301, 64))
    labels[4] = -100

    def step(x, w, labels, s, k, a, b):
        rows, stats = sface_loss(
            x, w, labels, s=s, k=k, a=a, b=b, reduction="none", backend=backend, return_stats=True, filter_eps=2.0**-16
        )
        return rows, stats.active_pairs, stats.inter

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for hyper in ((64.0, 80.0, 0.8, 1.23), (32.0, 40.0, 0.9, 1.1)):
        results = []
        for f in (step, compiled):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            rows, active, inter = f(*leaves, labels, *hyper)
            assert rows.dtype == f32 and inter.dtype == f32
            results.append((rows.detach(), active, inter.detach(), *torch.autograd.grad(rows, leaves, upstream)))
        eager, ours = results
        if backend != "reference":
            for name, a, b in zip(("row_loss", "active", "inter", "grad_x", "grad_w"), ours, eager, strict=True):
                assert torch.equal(a, b) or (name == "inter" and torch.allclose(a, b, rtol=1e-6)), name
        else:
            t = truth(x, w, labels, upstream, s=hyper[0], k=hyper[1], a=hyper[2], b=hyper[3], filter_eps=2.0**-16)
            assert abs(int(ours[1]) - int(eager[1])) <= int(t.borderline.sum())
            assert_rows_within("row_loss", ours[0].double() - t.row_loss, t.worst.loss)
            assert_rows_within("grad_x", ours[3].double() - t.grad_x, t.worst.x + t.flip_x)
            assert_rows_within("grad_w", ours[4].double() - t.grad_w, t.worst.w + t.flip_w)


@pytest.mark.parametrize("dtype", [f32, torch.bfloat16])
def test_module_with_batches_of_any_size(case32, dtype):
    """A head in a compiled training step, under autocast or not, with a last batch that is smaller."""
    classes, *sizes = (70, 8, 5, 17) if case32.emulated else (301, 32, 17, 64)
    head = SFaceLoss(64, classes, backend=case32.backend, filter_eps=2.0**-16).to(case32.device)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in sizes:
        x, _, labels, _ = GEOMETRIES["trained"](n, classes, 64).to(case32.device, dtype, f32)
        results = []
        for f in (head, compiled):
            leaf = x.clone().requires_grad_()
            loss = f(leaf, labels)
            results.append((loss.detach(), *torch.autograd.grad(loss, (leaf, head.weight))))
        for ours, eager in zip(results[1], results[0], strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6 * float(eager.abs().max()))


def test_one_graph_serves_every_size(case32):
    """With dynamic=True a new batch size must not compile again, or the last batch of every epoch costs a compilation."""
    head = SFaceLoss(64, 301, backend=case32.backend).to(case32.device)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (31, 17, 5, 9):
            x = torch.randn(n, 64, device=case32.device, requires_grad=True)
            compiled(x, torch.arange(n, device=case32.device)).backward()


@pytest.mark.parametrize("maker", ["make_fx", "aot_module"])
def test_graphs_made_without_dynamo(case32, maker):
    """By what works below torch.compile: the same bits as eager's, for other rows than the graph was made of, also where
    earlier steps have left something to go on with."""
    n, classes = (5, 70) if case32.emulated else (16, 301)
    head = SFaceLoss(64, classes, backend=case32.backend, filter_eps=2.0**-16).to(case32.device)
    batches = [GEOMETRIES["trained"](n, classes, 64).to(case32.device, f32, f32) for _ in range(2)]

    def step(x, labels):
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(head(leaf, labels), (leaf, head.weight))

    for _ in range(3):
        expected = [step(x, labels) for x, _, labels, _ in batches]
    compiled = aot_module(head, fw_compiler=nop, bw_compiler=nop)

    def compiled_step(x, labels):
        leaf = x.detach().clone().requires_grad_()
        compiled(leaf, labels).backward()
        weight_grad, head.weight.grad = head.weight.grad, None
        return leaf.grad, weight_grad

    graph = compiled_step if maker == "aot_module" else make_fx(step)(batches[0].x, batches[0].labels)

    for (x, _, labels, _), eager in zip(batches, expected, strict=True):
        for ours, theirs in zip(graph(x, labels), eager, strict=True):
            if case32.backend == "reference":  # traced, operation by operation
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
            else:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("what", ["module", "function"])
def test_one_recompilation_for_other_sizes(case32, what):
    """As users call it, without `dynamic`: the first batch is compiled for its size, the second size for every one, and
    the results are eager's to the bit."""
    head = SFaceLoss(64, 301, backend=case32.backend, filter_eps=2.0**-16).to(case32.device)

    def function(x, labels, weight=None):
        loss, rows = sface_loss(
            x,
            head.weight,
            labels,
            sample_weight=weight,
            backend=case32.backend,
            filter_eps=2.0**-16,
            return_stats="rows",
        )
        return loss, rows.angle, rows.hardest_class

    eager = head if what == "module" else function
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for n in (8, 8, 5, 9) if case32.emulated else (32, 32, 17, 64, 5, 32):
        x, _, labels, weight = GEOMETRIES["trained"](n, 301, 64).to(case32.device, f32, f32)
        arguments = (labels,) if what == "module" else (labels, weight.abs())
        results = []
        for f in (eager, compiled):
            leaf = x.clone().requires_grad_()
            loss, *others = f(leaf, *arguments) if what == "function" else (f(leaf, *arguments),)
            results.append((loss.detach(), *others, *torch.autograd.grad(loss, (leaf, head.weight))))
        for theirs, ours in zip(*results, strict=True):
            if case32.backend == "reference":  # traced, operation by operation
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
            else:
                assert torch.equal(ours, theirs)
    assert counter.frame_count == 2, "one size, then any"


def test_compiled_training(case32):
    """Backbone, head and optimizer over steps with a smaller last batch: the same parameters as without the compiler."""

    classes, *sizes = (70, 6, 6, 4) if case32.emulated else (301, 16, 16, 16, 7)

    def train(compiled):
        torch.manual_seed(2)
        backbone = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.PReLU(), torch.nn.Linear(64, 64))
        head = SFaceLoss(64, classes, backend=case32.backend)
        both = torch.nn.ModuleList([backbone, head]).to(case32.device)
        optimizer = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

        def step(x, labels):
            return head(backbone(x), labels)

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        for n in sizes:
            x, labels = torch.randn(n, 20, device=case32.device), torch.randint(0, classes, (n,), device=case32.device)
            optimizer.zero_grad()
            run(x, labels).backward()
            optimizer.step()
        return list(both.parameters())

    for ours, theirs in zip(train(True), train(False), strict=True):
        if case32.backend == "reference":
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)


def test_inside_a_compiled_backbone(case32):
    """Backbone, head and loss in one graph."""
    backbone, head = torch.nn.Linear(20, 64), SFaceLoss(64, 301, backend=case32.backend)
    step = torch.nn.Sequential(backbone, torch.nn.ReLU()).to(case32.device)
    head = head.to(case32.device)
    x, labels = torch.randn(16, 20, device=case32.device), torch.arange(16, device=case32.device)
    results = []
    for f in (
        lambda: head(step(x), labels),
        torch.compile(lambda: head(step(x), labels), fullgraph=True, backend="aot_eager"),
    ):
        loss = f()
        results.append(torch.autograd.grad(loss, (backbone.weight, head.weight)))
    for ours, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(case32, where):
    """Around the compiled step or within it, with both gradients: eager's bits."""
    x, w, labels, _ = GEOMETRIES["trained"](9, 70, 32).to(case32.device, f32, f32)
    linear = torch.nn.Linear(32, 32, device=case32.device)

    def plain(x, w):
        return sface_loss(linear(x), w, labels, backend=case32.backend)

    def step(x, w):
        if where == "outside":
            return plain(x, w)
        with torch.autocast(case32.device, torch.bfloat16):
            return plain(x, w)

    def result(f):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast(case32.device, torch.bfloat16, enabled=where == "outside"):
            loss = f(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(result(compiled), result(step), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_numpy_numbers(case32):
    """Of the constructor, which the compiler would take for arrays."""
    numbers = dict(s=np.float32(32), k=np.int64(40), k_inter=np.float64(30), filter_eps=np.float64(0))
    head = SFaceLoss(32, 70, **numbers, ignore_index=np.int64(3), backend=case32.backend, device=case32.device)
    x, labels = torch.randn(9, 32, device=case32.device), torch.arange(9, device=case32.device)
    ours = torch.compile(head, fullgraph=True, backend="aot_eager")(x, labels)
    torch.testing.assert_close(ours, head(x, labels), rtol=1e-5, atol=1e-5)


def test_without_gradients(case32):
    x, w, labels, _ = GEOMETRIES["trained"](33, 301, 64).to(case32.device, f32, f32)
    compiled = torch.compile(sface_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(x, w, labels, backend=case32.backend)
        torch.testing.assert_close(ours, sface_loss(x, w, labels, backend=case32.backend), rtol=1e-5, atol=1e-5)


# No sample, one of each, a remainder of every tile; each with an ignored row.
OP_SHAPES = [(0, 7, 3), (1, 1, 1), (17, 101, 33)]
# Lists of active pairs are allocated at their capacity and filled as far as needed, so two runs differ past the end and
# test_aot_dispatch_dynamic, which compares everything, cannot hold; test_function compares what is used.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(name: str, arguments: tuple, checks: tuple[str, ...] = CHECKS) -> None:
    torch.library.opcheck(getattr(torch.ops.sface, name).default, arguments, test_utils=checks)


def operands(n: int, c: int, d: int, dtype=f32, weight_dtype=f32):
    x, w, labels, upstream = GEOMETRIES["trained"](max(n, 1), c, d).to("cpu", dtype, weight_dtype)
    labels[:1] = -2
    return x[:n], w, labels[:n], upstream[:n]


@pytest.mark.parametrize("shape", [(0,), (5,), (5, 1), ()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_opcheck_prepare_labels(shape, dtype):
    labels = torch.zeros(shape, dtype=dtype)
    opcheck("prepare_labels", (labels, 7, -100, True, 0, 7), (*CHECKS, "test_aot_dispatch_dynamic"))


def test_opcheck_native_labels(native):
    opcheck("native_labels", (torch.zeros(5, dtype=torch.uint8), 7, -100, 0, 7))


@pytest.mark.parametrize("shape", OP_SHAPES)
@pytest.mark.parametrize("dtypes", [(f32, f32), (f16, f32), (f64, f64)], ids=["fp32", "fp16 and fp32", "fp64"])
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
def test_opcheck_chunked(shape, dtypes, filter_eps):
    x, w, target, upstream = operands(*shape, *dtypes)
    hyper, chunk = (*HYPER[:5], filter_eps), chunked.chunk_size(shape[0])
    for need_x, need_w in itertools.product((True, False), repeat=2):
        opcheck("chunked_forward", (x, w, target, *hyper, need_x, need_w, chunk))
    saved = torch.ops.sface.chunked_forward(x, w, target, *hyper, True, True, chunk)[5:]
    opcheck("chunked_grad_weight", (x, w, target, upstream.to(saved[1].dtype), *hyper, chunk, *saved))


@pytest.mark.parametrize("shape", OP_SHAPES)
@pytest.mark.parametrize("weight_dtype", [f32, f16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
def test_opcheck_native(shape, weight_dtype, filter_eps, native):
    x, w, target, upstream = operands(*shape, f32, weight_dtype)
    hyper, words = (*HYPER[:5], filter_eps), min(shape[0] * shape[1], native_backend.ARENA_WORDS)
    for need_x, need_w in itertools.product((True, False), repeat=2):
        opcheck("native_forward", (x, w, target, *hyper, need_x, need_w, words))
    saved = torch.ops.sface.native_forward(x, w, target, *hyper, True, True, words)[5:-1]
    opcheck("native_grad_weight", (x, w, target, upstream, *hyper, *saved))
    if weight_dtype == f32:
        made = torch.zeros_like(w), torch.zeros(len(w), dtype=torch.uint8)
        opcheck("native_forward_early", (x, w, target, *hyper, True, words, 1.0, True, *made))
        opcheck("native_grad_weight_rest", (x, w, target, upstream, *hyper, *saved, *made))
        backwards, state = [x, target, upstream, *saved], torch.zeros_like(w)
        opcheck("native_sgd_step", (w, state, backwards, hyper, 0.1, 0.9, 0.0, 1e-3, False, False))
        opcheck("native_adamw_step", (w, state, state + 1, backwards, hyper, 0.1, 0.9, 0.99, 1e-8, 0.1, 1.0, False))
    opcheck("native_empty_gradient", (w,))


@pytest.mark.parametrize("shape", OP_SHAPES)
@pytest.mark.parametrize("weight_dtype", [f32, f16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dense", [False, True], ids=["lists", "dense"])
def test_opcheck_triton(shape, weight_dtype, dense):
    case = Case("triton", "cpu", weight_dtype, weight_dtype)
    if case.reason_to_skip():
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    x, w, target, upstream = operands(*shape, weight_dtype, weight_dtype)
    for need_x, need_w in ((True, True), (False, False)):
        opcheck("triton_forward", (x, w, target, -2, -1, HYPER, need_x, need_w, dense, 132))
    if dense and weight_dtype == f32:
        opcheck("triton_forward", (x, w, target, -2, -1, HYPER, True, True, True, 132, False, "mean"))
        opcheck("triton_scale", (torch.ones_like(w), torch.tensor(2.0)))
    saved = torch.ops.sface.triton_forward(x, w, target, -2, -1, HYPER, True, True, dense, 132)[5:-3]
    opcheck("triton_grad_weight", (x, w, target, upstream, HYPER, dense, saved))


def test_every_operator_is_checked():
    """An operator on tensors that is added to the schemas needs an opcheck here, and a line below."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sface::")}
    on_tensors = {n for n in names if "Tensor" in str(torch._C._get_schema(n, ""))}
    assert {name.removeprefix("sface::") for name in on_tensors} == {
        "prepare_labels",
        "native_labels",
        "chunked_forward",
        "chunked_grad_weight",
        "native_forward",
        "native_forward_early",
        "native_grad_weight",
        "native_grad_weight_rest",
        "native_empty_gradient",
        "native_sgd_step",
        "native_adamw_step",
        "triton_forward",
        "triton_grad_weight",
        "triton_scale",
    }
