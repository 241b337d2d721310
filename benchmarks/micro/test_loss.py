"""Microbenchmarks of the public loss: forward, backward and both, on each backend, with the default filter.

Work of one run: 2·N·C·D flop forward, 4·N·C·D backward where all pairs count; w is read once (4·C·D bytes), ∂w is
written once.
"""

from __future__ import annotations

from sface_kernels import sface_loss


def leaves(work):
    return work.x.detach().requires_grad_(), work.w.detach().requires_grad_()


def test_forward(measure, trained, backend):
    x, w = leaves(trained)
    measure("forward", lambda: sface_loss(x, w, trained.y, backend=backend))


def test_backward(measure, trained, backend):
    def setup():
        x, w = leaves(trained)
        return (sface_loss(x, w, trained.y, backend=backend),)

    measure("backward", lambda loss: loss.backward(), setup)


def test_both(measure, trained, backend):
    x, w = leaves(trained)

    def run():
        x.grad = w.grad = None
        sface_loss(x, w, trained.y, backend=backend).backward()

    measure("both", run)
