"""The C++ operators, public as torch.ops.sface.*: what they refuse, and that threads change no bit."""

from __future__ import annotations

import pytest
import torch

from sface_kernels.optim.base import native_arguments
from sface_kernels.pending import WeightGradient
from sface_kernels.types import Forward, HyperParameters
from tests.support.problems import trained_problem

HYPER = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-12)
SGD = (0.1, 0.9, 0.0, 1e-3, False, False)
ADAMW = (0.1, 0.9, 0.999, 1e-8, 1e-2, 1.0, False)


def backward(problem):
    x, w, labels, upstream = problem
    result = Forward.of(torch.ops.sface.native_forward(x, w, labels, *HYPER, True, True, 10_000)[:-1])
    return WeightGradient("native", HYPER, x, w, labels, upstream, result.saved)


def test_refuses(native):
    problem = trained_problem(30, 100, 16)
    saved, hyper = native_arguments([backward(problem)])
    w, state = problem.w, torch.zeros(100, 16)
    sgd, adamw = torch.ops.sface.native_sgd_step, torch.ops.sface.native_adamw_step
    for call, message in (
        (lambda: sgd(w, state[:50], saved, hyper, *SGD), "momentum_buffer: expected contiguous Float"),
        (lambda: sgd(w, state.double(), saved, hyper, *SGD), "momentum_buffer: expected contiguous Float"),
        (lambda: sgd(w.double(), None, saved, hyper, *SGD), "w: expected contiguous Float"),
        (lambda: sgd(w[:, ::2], None, saved, hyper, *SGD), "w: expected contiguous Float"),
        (lambda: sgd(w, None, saved[1:], hyper, *SGD), "saved, hyper: expected 7 tensors and 6 numbers"),
        (lambda: sgd(w, None, saved, hyper[1:], *SGD), "saved, hyper: expected 7 tensors and 6 numbers"),
        (lambda: sgd(w, None, [*saved[:2], saved[2][:3], *saved[3:]], hyper, *SGD), "grad_row: expected"),
        (lambda: sgd(w, None, [*saved[:6], saved[6][:2]], hyper, *SGD), "segments: expected"),
        (lambda: sgd(w[:60].contiguous(), None, saved, hyper, *SGD), "target: expected classes below 60|expected"),
        (lambda: adamw(w, state[0], state, saved, hyper, *ADAMW), "exp_avg: expected contiguous Float"),
        (lambda: adamw(w, state, state[:, :8], saved, hyper, *ADAMW), "exp_avg_sq: expected contiguous Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert torch.equal(w, trained_problem(30, 100, 16).w)


def test_the_number_of_threads_changes_no_bit(native):
    results = []
    for threads in (1, 3):
        problem = trained_problem(300, 3000, 64)
        arguments = native_arguments([backward(problem), backward(trained_problem(70, 3000, 64)._replace(w=problem.w))])
        state = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.ops.sface.native_sgd_step(problem.w, state, *arguments, *SGD)
        finally:
            torch.set_num_threads(before)
        results.append((problem.w, state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
