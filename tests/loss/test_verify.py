"""Calls on a GPU are checked against `chunked`: here of a backend that is `chunked` itself, with something wrong added."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from sface_kernels import dispatch, explain, sface_loss, verify
from sface_kernels.backends import triton
from sface_kernels.backends.triton import buffers, device
from tests.support.problems import GEOMETRIES

PROBLEM = GEOMETRIES["trained"](64, 300, 32)


@pytest.fixture
def fake(monkeypatch):
    """A backend "triton", which "auto" takes on the CPU. `calls` are those of `chunked` made to check it."""
    chunked = dispatch.BACKENDS["chunked"]
    state = SimpleNamespace(spoil_forward=lambda r: r, spoil_backward=lambda g: g, calls=[])

    def counted(name):
        def call(*arguments):
            state.calls.append(name)
            return getattr(chunked, name)(*arguments)

        return call

    entry = chunked._replace(
        unavailable=lambda _: None,
        forward=lambda *given: state.spoil_forward(chunked.forward(*given)),
        grad_weight=lambda *given: state.spoil_backward(chunked.grad_weight(*given)),
        way=lambda x, saved: "lists",
    )
    spied = chunked._replace(forward=counted("forward"), grad_weight=counted("grad_weight"))
    monkeypatch.setitem(dispatch.BACKENDS, "triton", entry)
    monkeypatch.setitem(dispatch.BACKENDS, "chunked", spied)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "chunked"))
    monkeypatch.setattr(verify, "_calls", {})
    monkeypatch.setattr(dispatch, "distrusted", {})
    monkeypatch.setattr(verify, "distrusted", dispatch.distrusted)
    monkeypatch.delenv("SFACE_VERIFY", raising=False)
    return state


def step(backend: str = "auto", problem=PROBLEM, **options) -> tuple[torch.Tensor, ...]:
    x, w = problem.x.clone().requires_grad_(), problem.w.clone().requires_grad_()
    loss = sface_loss(x, w, problem.labels, backend=backend, **options)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def spoilt_loss(result):
    result.row_loss[PROBLEM.x.shape[0] // 2 :] *= 1.05
    return result


def spoilt_gradient(result):
    result.row_grad_x[:, 0] += 0.05 * result.row_grad_x.norm(dim=1)
    return result


def failing(_):
    raise RuntimeError("PassManager::run failed\nand more")


WRONG = {"row loss": spoilt_loss, "row of ∂x": spoilt_gradient, "PassManager": failing}


def test_what_is_right_is_checked_twice(fake):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step()
    # the forward; for ∂w one of some classes, and its own
    assert fake.calls == 2 * ["forward", "forward", "grad_weight"]


def test_a_coarser_screen_is_checked_by_itself(fake):
    """It comes some calls after the first."""
    for coarse in (False, False, False, True, True, True):
        fake.spoil_forward = lambda result, coarse=coarse: result._replace(coarse=coarse)
        step()
    assert fake.calls.count("grad_weight") == 4 and fake.calls.count("forward") == 8


def test_a_fault_in_the_backward_of_a_coarser_screen_is_found(fake):
    for _ in range(3):
        step("triton")
    fake.spoil_forward = lambda result: result._replace(coarse=True)
    fake.spoil_backward = lambda g: g * 1.02
    with pytest.raises(verify.WrongResult, match="∂w differs by"):
        step("triton")


@pytest.mark.parametrize("what", WRONG)
def test_auto_warns_once_with_figures_and_takes_chunked_from_then_on(fake, monkeypatch, what):
    fake.spoil_forward = WRONG[what]
    expected = step("chunked")
    with pytest.warns(UserWarning, match="'auto' takes 'chunked' from now on") as said:
        ours = [step() for _ in range(3)]
    assert len(said) == 1 and what in str(said[0].message)
    if what != "PassManager":
        assert "differs by" in str(said[0].message) and "allowed" in str(said[0].message)
    assert all(torch.equal(a, b) for result in ours for a, b in zip(result, expected, strict=True))
    assert what in explain("cpu") and "-> chunked" in explain("cpu")


@pytest.mark.parametrize("spoil", [lambda g: g * 1.02, failing], ids=["off", "failing"])
def test_a_wrong_gradient_of_the_weight_is_replaced(fake, spoil):
    fake.spoil_backward = spoil
    expected = step("chunked")
    with pytest.warns(UserWarning, match="from now on"):
        ours = step()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("what", WRONG)
def test_a_name_raises(fake, what):
    fake.spoil_forward = WRONG[what]
    with pytest.raises(verify.WrongResult, match=what):
        step("triton")
    assert not dispatch.distrusted


def test_a_name_raises_in_the_backward(fake):
    fake.spoil_backward = lambda g: g * torch.nan
    with pytest.raises(verify.WrongResult, match="∂w"):
        step("triton")


@pytest.mark.parametrize("setting, checked", [("0", 0), ("all", 7), ("3", 4), ("first", 2)])
def test_how_many_calls_are_checked(fake, monkeypatch, setting, checked):
    monkeypatch.setenv("SFACE_VERIFY", setting)
    for _ in range(7):
        step()
    assert fake.calls.count("grad_weight") == checked


def test_a_wrong_setting_says_what_was_expected(fake, monkeypatch):
    monkeypatch.setenv("SFACE_VERIFY", "sometimes")
    with pytest.raises(ValueError, match="SFACE_VERIFY: expected 0, all or a number of calls, got 'sometimes'"):
        step()


def test_a_fault_of_repeated_launches_is_found(fake):
    """The second call of a kind is the first whose launches come from a list."""
    step("triton")
    fake.spoil_forward = spoilt_loss
    with pytest.raises(verify.WrongResult):
        step("triton")


def test_corruption_later_is_found_where_every_call_is_checked(fake, monkeypatch):
    monkeypatch.setenv("SFACE_VERIFY", "all")
    for _ in range(3):
        step("triton")
    fake.spoil_forward = spoilt_loss
    with pytest.raises(verify.WrongResult):
        step("triton")


def test_memory_that_runs_out_says_nothing_of_the_backend(fake):
    def full(_):
        raise torch.OutOfMemoryError("full")

    fake.spoil_forward = full
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert not dispatch.distrusted


def test_a_later_failure_is_not_taken_for_the_compilers(fake):
    step()
    fake.spoil_forward = failing
    with pytest.raises(RuntimeError, match="PassManager"):
        step()
    assert not dispatch.distrusted


def test_what_is_no_number_in_both_is_no_difference(fake):
    problem = PROBLEM._replace(x=PROBLEM.x.clone(), labels=PROBLEM.labels.clone())
    problem.x[0, 3], problem.labels[7] = torch.nan, -100
    step("triton", problem)


@pytest.mark.parametrize("upstream", [0.0, 1e-30, -2.0, 1e19, 1e30, torch.nan, torch.inf])
def test_any_upstream_gradient_may_come_first(fake, upstream):
    """The first of a warm-up may be 0, that of an overflowed loss scale infinite."""
    x, w = PROBLEM.x.clone(), PROBLEM.w.clone().requires_grad_()
    rows = torch.ones(len(x))
    rows[1] = upstream
    for reduction, gradient in (("mean", torch.tensor(upstream)), ("sum", torch.tensor(upstream)), ("none", rows)):
        verify._calls.clear()
        sface_loss(x, w, PROBLEM.labels, reduction=reduction, filter_eps=2.0**-16, backend="triton").backward(gradient)
    if not upstream < 1e18:
        return
    fake.spoil_backward = lambda g: g * 1.05 + 1e-3
    verify._calls.clear()
    with pytest.raises(verify.WrongResult):
        sface_loss(x, w, PROBLEM.labels, backend="triton").backward(torch.tensor(upstream))


def test_what_is_checked_is_what_a_gpu_computed():
    x, saved = PROBLEM.x, tuple(torch.empty(1, 1) for _ in buffers.Saved._fields)
    assert triton.way(x, saved) is None
    with device.pretend((9, 0)):
        assert triton.way(x, saved) == "lists"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_no_difference(fake, reduction):
    problem = PROBLEM._replace(labels=PROBLEM.labels.clone())
    problem.labels[::2] = -100
    w = problem.w.clone().requires_grad_()
    sface_loss(problem.x, w, problem.labels, backend="triton", reduction=reduction).sum().backward()


def test_without_rows_there_is_nothing_to_check(fake):
    step("triton", PROBLEM._replace(x=PROBLEM.x[:0], labels=PROBLEM.labels[:0]))
    assert not fake.calls


def test_memory_that_runs_out_in_a_check_is_no_error(fake, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(verify, "_compare_forward", full)
    monkeypatch.setattr(verify, "_compare_backward", full)
    step("triton")


def test_a_setting_that_is_wrong_is_not_taken_for_the_compilers(fake):
    def wrong(_):
        raise ValueError("SFACE_TILES: expected")

    fake.spoil_forward = wrong
    with pytest.raises(ValueError, match=r"^SFACE_TILES: expected"):
        step()


@pytest.mark.parametrize("other", ["dtype", "need_x", "classes"])
def test_other_kernels_are_checked_by_themselves(fake, other):
    for _ in range(3):
        step("triton")
    x, w, before = PROBLEM.x, PROBLEM.w, len(fake.calls)
    if other == "dtype":
        x = x.half()
    elif other == "classes":
        w = torch.cat([w] * 3)
    x = x.clone().requires_grad_(other != "need_x")
    sface_loss(x, w.clone().requires_grad_(), PROBLEM.labels, backend="triton")
    assert len(fake.calls) == before + 1


@pytest.mark.parametrize("which", ["own", "last"])
def test_a_gradient_that_is_wrong_in_few_classes(fake, which):
    """Own classes are looked at, and others from the first to the last."""
    problem = PROBLEM._replace(labels=PROBLEM.labels.clone())
    spread = set(verify._spread(verify.CLASSES, len(PROBLEM.w), torch.device("cpu")).tolist())
    looked_at = set(verify._spread(verify.CLASSES, len(PROBLEM.x), torch.device("cpu")).tolist())
    sample = next(i for i in range(len(PROBLEM.x)) if i not in looked_at)
    problem.labels[sample] = len(PROBLEM.w) - 1  # which then has a gradient
    wrong = sorted(set(problem.labels.tolist()) - spread) if which == "own" else [len(PROBLEM.w) - 1]

    def spoil(grad):
        grad[wrong] *= 1.5
        return grad

    fake.spoil_backward = spoil
    with pytest.raises(verify.WrongResult, match="∂w differs by"):
        step("triton", problem)
