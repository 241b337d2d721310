"""The logits of `sface_kernels.compat.official`: read as the published script reads them, and without N×C memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from sface_kernels import cosines
from sface_kernels.compat.official import LazyLogits
from tests.support.published_script import (
    UNIT,
    small,
    train_accuracy,
)

COSINE_ERROR = 2 * (24 + 4) * UNIT  # two inner products of 24 terms in two orders, unit rows


def test_logits_true_is_the_differentiable_tensor(case32):
    head, x, y = small(case32, logits=True)
    outputs, loss, *_ = head(x, y)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, head.weight))
    expected = 64 * F.normalize(x64) @ F.normalize(w64).t()
    assert (outputs - expected).abs().max() <= 64 * COSINE_ERROR
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad((outputs * upstream.float()).sum(), (x, head.weight))
    want = torch.autograd.grad((expected * upstream.float()).sum(), (x64, w64))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()

    lazy, lazy_loss, *_ = small(case32)[0](x, y)
    assert torch.equal(loss, lazy_loss)
    assert (lazy.dense() - expected).abs().max() <= 64 * COSINE_ERROR


# With BLOCK_ELEMENTS = 1 a block has 256 classes: 770 leaves a last block of 2, fewer than k; 256 fill one.
@pytest.mark.parametrize("classes", [770, 1023, 256, 5])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("k", [1, 5])
def test_topk_in_blocks_is_the_topk_of_the_tensor(monkeypatch, classes, largest, k):
    monkeypatch.setattr(cosines, "BLOCK_ELEMENTS", 1)
    head, x, y = small(classes=classes)
    lazy = head(x, y)[0]
    dense = 64 * (F.normalize(x.double()) @ F.normalize(head.weight.double()).t()).detach()
    values, indices = lazy.topk(k, 1, largest, True)
    expected = dense.topk(k, 1, largest, True)
    assert torch.equal(indices, expected.indices)
    assert (values - expected.values).abs().max() <= 64 * COSINE_ERROR
    assert values.dtype == lazy.dtype and indices.dtype == torch.int64
    if largest:
        best = lazy.max(1)
        assert torch.equal(best.indices, expected.indices[:, 0]) and torch.equal(best.values, values[:, 0])
        assert torch.equal(lazy.argmax(1), best.indices) and lazy.argmax(-1, keepdim=True).shape == (7, 1)
        assert torch.equal(torch.topk(lazy, k).indices, indices)
        assert torch.equal(torch.topk(input=lazy, k=k, dim=1).indices, indices)
        assert torch.equal(torch.max(lazy, 1).indices, best.indices)
        assert torch.equal(torch.argmax(lazy, dim=1), best.indices)


def test_lazy_logits_look_like_the_tensor():
    head, x, y = small()
    lazy = head(x, y)[0]
    assert isinstance(lazy, LazyLogits) and "770" in repr(lazy)
    assert lazy.shape == lazy.size() == (7, 770) and (lazy.size(0), lazy.size(-1), len(lazy)) == (7, 770, 7)
    assert (lazy.dim(), lazy.ndim, lazy.dtype, lazy.device.type) == (2, 2, torch.float32, "cpu")
    assert lazy.data is lazy.detach() is lazy
    values, indices = lazy.topk(2)
    indices.zero_(), values.zero_()
    assert lazy.topk(2).values.abs().min() > 0  # what is remembered is not what was handed out
    assert lazy.topk(0).indices.shape == (7, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("logits", [False, True], ids=["lazy", "logits"])
def test_logits_are_at_least_fp32(dtype, logits):
    head, x, y = small(logits=logits)
    x = x.detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(x, y)[0]
        got = outputs if logits else outputs.dense()
    expected = 64 * (F.normalize(x.double()) @ F.normalize(head.weight.double()).t())
    assert outputs.dtype == got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - expected).abs().max() <= 64 * COSINE_ERROR


def test_no_rows_no_gradient_and_nan():
    head, x, y = small()
    assert head(x[:0], y[:0])[0].topk(3).indices.shape == (0, 3)
    with torch.no_grad():
        assert torch.equal(head(x, y)[0].argmax(1), head(x, y)[0].dense().argmax(1))
    with torch.inference_mode():
        assert head(x + 0, y)[0].topk(5).indices.shape == (7, 5)
    with torch.no_grad():
        x[2, 0] = torch.nan
        head.weight[y[0], 0] = torch.nan
    assert torch.equal(head(x, y)[0].max(1).values.isnan(), torch.ones(7, dtype=torch.bool))


@pytest.mark.parametrize("fused", [False, True], ids=["sgd", "fused sgd"])
def test_logits_asked_after_the_step_are_those_of_the_forward_or_an_error(fused):
    """A fused optimizer leaves no trace in the version counters."""
    head, x, y = small()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, fused=fused)
    outputs, loss, *_ = head(x, y)
    before = outputs.topk(3)
    loss.backward()
    optimizer.step()
    assert torch.equal(outputs.topk(3).values, before.values)
    assert torch.equal(outputs.argmax(1), before.indices[:, 0])
    for question in (lambda: outputs.topk(5), lambda: outputs.topk(1, largest=False), outputs.dense):
        with pytest.raises(RuntimeError, match="logits=True"):
            question()
    outputs = head(x, y)[0]
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified since the forward"):
        outputs.argmax(1)


def test_whatever_else_is_done_with_the_logits_says_what_to_do():
    head, x, y = small()
    outputs = head(x, y)[0]
    for use, error in (
        (lambda: outputs.softmax(1), AttributeError),
        (lambda: outputs.cpu(), AttributeError),
        (lambda: outputs.requires_grad, AttributeError),
        (lambda: F.cross_entropy(outputs, y), TypeError),
        (lambda: torch.softmax(outputs, 1), TypeError),
        (lambda: outputs * 2, TypeError),
        (lambda: torch.ones(7, 770) + outputs, TypeError),
        (lambda: outputs[0], TypeError),
        (lambda: list(outputs), TypeError),
        (lambda: outputs == 1, TypeError),
        (lambda: bool(outputs), TypeError),
        (lambda: outputs.topk(1, 0), ValueError),
        (lambda: outputs.max(0), ValueError),
        (lambda: outputs.max(), ValueError),  # of all rows, in PyTorch
        (lambda: torch.argmax(outputs), ValueError),
    ):
        with pytest.raises(error, match="logits=True"):
            use()
    with pytest.raises(ValueError, match="k: expected 0 to 770"):
        outputs.topk(771)
    assert not hasattr(outputs, "grad_fn")


def allocations(step) -> tuple[int, int]:
    """The largest allocation of `step()` and the most it held at once, in bytes, inner operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    sizes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
    return max(sizes), int(held.max())


def step_of(head, x, y):
    def step():
        outputs, loss, *_ = head(x, y)
        train_accuracy(outputs.data, y, topk=(5,))
        loss.backward()

    return step


def test_a_step_allocates_nothing_the_size_of_n_by_c(case32):
    """Not even a byte per pair. At this size N×C (256 MB as fp32) exceeds every table of a backend."""
    if case32.backend == "reference":
        pytest.skip("reference: materialises N×C by design")
    rows, classes = 256, 250_000
    head, x, y = small(case32, rows=rows, classes=classes, features=8)
    largest, held = allocations(step_of(head, x, y))
    assert largest < rows * classes
    assert held < 4 * rows * classes / 2


def test_the_memory_check_sees_n_by_c_where_it_is():
    head, x, y = small(rows=64, classes=10_000, logits=True)
    largest, _ = allocations(step_of(head, x, y))
    assert largest >= 4 * 64 * 10_000
