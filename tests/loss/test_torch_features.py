"""The loss among PyTorch's other features: each gives what autograd gives, or says why not."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from sface_kernels import SFaceLoss, ops, sface_loss
from sface_kernels.precision import full_precision, kept
from sface_kernels.validation import default_filter_eps
from tests.support.cases import ROOT, bf16, f16, f32, f64
from tests.support.checks import Judge, assert_same, run
from tests.support.problems import trained_problem


def test_meta_tensors(case):
    """A dry run without data: shapes and dtypes of the real one."""
    x, w, labels, _ = trained_problem(9, 60, 24).to(case.device, case.dtype, case.weight_dtype)
    real, statistics = sface_loss(x, w, labels, return_stats=True, backend=case.backend)
    backend = case.backend if case.backend in ("chunked", "reference") else "auto"
    meta = [t.to("meta").requires_grad_(t.is_floating_point()) for t in (x, w, labels)]
    loss, meta_statistics = sface_loss(*meta, return_stats=True, backend=backend)
    assert loss.device.type == "meta" and (loss.shape, loss.dtype) == (real.shape, real.dtype)
    assert [s.dtype for s in meta_statistics] == [s.dtype for s in statistics]
    loss.backward()
    assert meta[1].grad.shape == w.shape and meta[1].grad.dtype == w.dtype


def test_numbers_are_numbers():
    head = SFaceLoss(np.int64(8), np.int32(5), s=np.float32(32), k=np.int64(40), ignore_index=np.int16(-1))
    assert type(head.in_features) is int and head.weight.shape == (5, 8)
    x, labels = torch.randn(3, 8), torch.tensor([0, 4, -1])
    plain = sface_loss(x, head.weight, labels, s=32.0, k=40.0, ignore_index=-1)
    assert torch.equal(head(x, labels), plain)
    wrong: Any
    for wrong in ("64", True, None, [64.0]):
        with pytest.raises(TypeError, match="s: expected a number, got"):
            sface_loss(x, head.weight, labels, s=wrong)
    for wrong in (5.0, "5", True, np.float64(5)):
        with pytest.raises(TypeError, match="out_features: expected an int"):
            SFaceLoss(8, wrong)


SWITCHES = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


def follow_the_wider_switch() -> None:
    torch.set_float32_matmul_precision("highest")
    for switch in SWITCHES:
        switch.fp32_precision = "none"


DEFAULTS = {
    "default dtype float64": (lambda: torch.set_default_dtype(f64), lambda: torch.set_default_dtype(f32)),
    "default dtype float16": (lambda: torch.set_default_dtype(f16), lambda: torch.set_default_dtype(f32)),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        follow_the_wider_switch,
    ),
    "fp32_precision": (
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends, "fp32_precision", "none"),
    ),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
def test_process_wide_defaults_change_nothing(case, default, filter_eps):
    """The same bits in the same dtypes: results follow the inputs alone."""
    problem = trained_problem(33, 300, 256).to(case.device, case.dtype, case.weight_dtype)
    plain = run(case, problem, filter_eps=filter_eps)
    on, off = DEFAULTS[default]
    before = [switch.fp32_precision for switch in SWITCHES]
    on()
    try:
        changed = run(case, problem, filter_eps=filter_eps)
        assert default != "fp32_precision" or all(switch.fp32_precision == "tf32" for switch in SWITCHES)
    finally:
        off()
    assert [switch.fp32_precision for switch in SWITCHES] == before, "a switch of the process stays turned"
    assert_same(changed, plain)
    assert [s.dtype for s in changed.stats] == [s.dtype for s in plain.stats]


def test_default_filters():
    assert [default_filter_eps(dtype, 1) for dtype in (f64, f32)] == [2.0**-53, 2.0**-24]
    for dtype in (f16, bf16):
        assert [default_filter_eps(dtype, features) for features in (255, 256)] == [2.0**-12, 2.0**-16]


def test_switches_are_put_back():
    """The older switch too, which PyTorch answers for only as long as the newer ones agree with it."""

    def settings():
        return [torch.get_float32_matmul_precision(), *(switch.fp32_precision for switch in SWITCHES)]

    for name in ("high", "highest"):
        torch.set_float32_matmul_precision(name)
        before = settings()
        with kept():
            torch.set_float32_matmul_precision("medium")
            SWITCHES[0].fp32_precision = "ieee"
        assert settings() == before


def test_switches_wait_for_the_last_thread():
    """They are the process's: the first to leave must not turn them back while another multiplies."""
    torch.set_float32_matmul_precision("medium")  # put back by a fixture
    inside, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    seen = []

    @full_precision
    def product(_: torch.Tensor, which: int) -> None:
        inside[which].set()
        leave[which].wait(60)
        seen.append(SWITCHES[0].fp32_precision)

    threads = [threading.Thread(target=product, args=(torch.zeros(1), which)) for which in range(2)]
    for which in range(2):
        threads[which].start()
        assert inside[which].wait(60)
    for which in range(2):
        leave[which].set()
        threads[which].join(60)
    assert seen == ["ieee", "ieee"] and SWITCHES[0].fp32_precision == "bf16"


def test_importing_anew():
    """A notebook reloads a module, a test runner purges them all: the operators are there and work."""
    code = """
import importlib, sys, torch, sface_kernels
x, w, y = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True), torch.arange(3)
first = sface_kernels.sface_loss(x, w, y)
for module in ("types", "ops", "backends.chunked", "backends.native", "dispatch", "autograd", "loss"):
    importlib.reload(sys.modules[f"sface_kernels.{module}"])
for name in [name for name in sys.modules if name.startswith("sface_kernels")]:
    del sys.modules[name]
import gc; gc.collect()
import sface_kernels as again
assert again is not sface_kernels
for backend in ("native", "chunked", "reference"):
    if backend in again.available_backends():
        loss = again.sface_loss(x, w, y, backend=backend)
        loss.backward()
        assert torch.allclose(loss, first)
first.backward()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    importlib.reload(ops)


class Trained(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.head = SFaceLoss(16, 30, backend=backend)

    def forward(self, x, labels):
        return self.head(x, labels)


def test_export_with_a_dynamic_batch(case32):
    if case32.backend == "triton":
        pytest.skip("export leaves the launches as operators whose sizes follow the batch")
    model = Trained(case32.backend).to(case32.device).eval()
    batch = torch.export.Dim("batch", min=2, max=5000)
    x, labels = torch.randn(6, 16, device=case32.device), torch.randint(0, 30, (6,), device=case32.device)
    program = torch.export.export(model, (x, labels), dynamic_shapes=({0: batch}, {0: batch})).module()
    for n in (6, 2, 300, 4999):
        x, labels = torch.randn(n, 16, device=case32.device), torch.randint(0, 30, (n,), device=case32.device)
        assert torch.equal(program(x, labels), model(x, labels))


class Classifier(torch.nn.Module):
    """A trained backbone with its head, which serves the logits."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(8, 16), SFaceLoss(16, 3000)

    def forward(self, x, labels=None):
        embeddings = self.backbone(x)
        return self.head(embeddings, labels) if self.training else self.head.logits(embeddings)


@pytest.mark.parametrize("with_grad", [True, False])
def test_export_of_a_model_that_holds_the_head(with_grad):
    model, batch = Classifier().eval(), torch.export.Dim("batch", min=2, max=5000)
    with torch.set_grad_enabled(with_grad):
        exported = torch.export.export(model, (torch.randn(6, 8),), dynamic_shapes=({0: batch},))
        for n in (6, 2, 4999):
            x = torch.randn(n, 8)
            torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-4)


def test_saved_tensors_follow_the_problem(case32):
    """What is packed for the backward is no larger than what a small problem needs, or offloading it would cost more than
    the step."""
    x, w, labels, _ = trained_problem(16, 200, 32).to(case32.device, f32, f32)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.untyped_storage().nbytes()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    ):
        loss = sface_loss(x.requires_grad_(), w.requires_grad_(), labels, backend=case32.backend)
    loss.backward()
    pairs = 16 * 200
    assert 0 < sum(packed) < 64 * pairs + 64 * (x.numel() + w.numel())


def test_gradients_resize_like_any_tensor(case32):
    """FSDP-like code frees a gradient's storage and gives it back."""
    if case32.backend == "triton":
        pytest.skip("an ordinary tensor of PyTorch's allocator")
    w = torch.randn(
        90_000, 128, requires_grad=True
    )  # 44 MiB: past the sizes from which the memory is treated specially
    sface_loss(torch.randn(4, 128), w, torch.arange(4), backend=case32.backend).backward()
    storage = w.grad.untyped_storage()
    storage.resize_(0)
    storage.resize_(w.numel() * 4)
    w.grad.fill_(1.5)
    assert w.grad.sum() == 1.5 * w.numel()
    w.grad.resize_(95_000, 128).zero_()
    assert w.grad.shape == (95_000, 128)


@pytest.mark.parametrize("half", [f16, bf16], ids=["float16", "bfloat16"])
def test_half_weights_with_float32_embeddings_under_autocast(case32, half):
    """F.linear would cast there; the weight is taken at its stored values, and its gradient has its dtype."""
    problem = trained_problem(17, 90, 48).to(case32.device, f32, half)
    with pytest.raises(TypeError, match="weight: expected float32 or the dtype of the embeddings"):
        run(case32, problem)
    with torch.autocast(case32.device, torch.bfloat16):
        result = run(case32, problem)
    assert result.grad_w.dtype == half and result.grad_x.dtype == f32
    same = problem.to(case32.device, f32, f32)  # the same values
    plain = run(case32, same)
    if case32.backend == "triton":  # compiled, it adds up a row of another dtype in another order
        judge = Judge(same.to("cpu", f32, f32), filter_eps=default_filter_eps(f32, 48))
        judge.check(result._replace(grad_w=plain.grad_w), "triton")
        limits = torch.finfo(half)
        largest = float(plain.grad_w.abs().max())
        torch.testing.assert_close(
            result.grad_w.float(), plain.grad_w, rtol=limits.eps, atol=limits.tiny + 1e-6 * largest
        )
        return
    assert_same(result._replace(grad_w=plain.grad_w), plain)
    assert torch.equal(result.grad_w, plain.grad_w.to(half))


def test_statistics_are_asked_for_by_name():
    """A miner's third positional argument must not turn the loss into a pair."""
    head = SFaceLoss(8, 5)
    with pytest.raises(TypeError, match="positional"):
        head(torch.randn(3, 8), torch.arange(3), (torch.arange(3),))


def test_a_dimension_of_size_1_has_no_stride(case32):
    x, labels = torch.randn(6, 1, device=case32.device), torch.randint(0, 5, (6,), device=case32.device)
    for w in (torch.randn(1, 5, device=case32.device).t(), torch.randn(5, 3, device=case32.device)[:, 1:2]):
        ours = sface_loss(x, w, labels, backend=case32.backend, reduction="none")
        assert torch.equal(
            ours, sface_loss(x, w.contiguous().clone(), labels, backend=case32.backend, reduction="none")
        )
    x, w = torch.randn(4, 1, device=case32.device).t(), torch.randn(4, 1, device=case32.device).t()  # [1, 4]
    labels = labels[:1] * 0
    ours = sface_loss(x, w, labels, backend=case32.backend)
    assert torch.equal(ours, sface_loss(x.contiguous().clone(), w.contiguous().clone(), labels, backend=case32.backend))


def test_judge_of_the_problem_used_here(case32):
    """The problem of these tests has gradients that its budget resolves: equality of zeros would prove nothing."""
    problem = trained_problem(9, 60, 24).to(case32.device, f32, f32)
    result = run(case32, problem, filter_eps=0.0)
    Judge(problem.to("cpu", f32, f32), filter_eps=0.0).check(result, case32.backend)
    assert result.grad_x.norm() > 1e-3 and result.grad_w.norm() > 1e-3
