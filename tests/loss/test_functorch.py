"""torch.func, Jacobians and second derivatives: what autograd gives, or an error that says why not."""

from __future__ import annotations

import functools

import pytest
import torch

from sface_kernels import SFaceLoss, sface_loss
from tests.support.problems import trained_problem


def gradients(loss, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


class TestFunctorch:
    def setup_method(self):
        self.x, self.w, self.labels, _ = trained_problem(9, 60, 24)

    def loss(self, case, reduction="mean"):
        labels = self.labels.to(case.device)
        return lambda x, w: sface_loss(x, w, labels, reduction=reduction, backend=case.backend)

    def test_grad_equals_autograd(self, case32):
        x, w, loss = self.x.to(case32.device), self.w.to(case32.device), self.loss(case32)
        expected = gradients(loss, x, w)
        assert all(map(torch.equal, torch.func.grad(loss, (0, 1))(x, w), expected))
        for which in (0, 1):  # the other one needs no gradient
            assert torch.equal(torch.func.grad(loss, which)(x, w), expected[which])

    def test_vjp_with_a_gradient_per_row(self, case32):
        x, w, loss = self.x.to(case32.device), self.w.to(case32.device), self.loss(case32, "none")
        upstream = torch.linspace(-1, 2, 9, device=case32.device)
        rows, pull = torch.func.vjp(loss, x, w)  # type: ignore[misc]
        assert torch.equal(rows, loss(x, w))
        for ours, theirs in zip(pull(upstream), gradients(lambda x, w: loss(x, w) @ upstream, x, w), strict=True):
            assert torch.equal(ours, theirs)

    def test_functional_call(self, case32):
        head = SFaceLoss(24, 60, backend=case32.backend, device=case32.device)
        x, labels = self.x.to(case32.device), self.labels.to(case32.device)

        def loss(weight):
            return torch.func.functional_call(head, {"weight": weight}, (x, labels))

        w = self.w.to(case32.device)
        assert torch.equal(torch.func.grad(loss)(w), gradients(loss, w)[0])

    def test_vmap_is_refused_with_the_way_round(self, case32):
        w = self.w.to(case32.device)

        def one_row(x, label):
            return sface_loss(x[None], w, label[None], backend=case32.backend)

        with pytest.raises(RuntimeError, match=r"vmap cannot batch it.*reduction=\"none\""):
            torch.func.vmap(one_row)(self.x.to(case32.device), self.labels.to(case32.device))

    def test_second_derivatives_raise(self, case32):
        x, w, loss = self.x.to(case32.device), self.w.to(case32.device), self.loss(case32)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x, w).square().sum())(x)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the operators one by one
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_jacobians_of_row_losses(self, case32, dtype):
        """Both ways that batch the upstream gradients, beside the one that takes them in turn."""
        if case32.backend == "triton":
            pytest.skip("a backward for each row is slow in Triton's interpreter")
        loss = self.loss(case32, "none")
        x, w = self.x.to(case32.device, dtype), self.w.to(case32.device)
        expected = torch.autograd.functional.jacobian(loss, (x, w))
        assert all(t.any() for t in expected)
        assert all(map(torch.equal, torch.func.jacrev(loss, (0, 1))(x, w), expected))
        assert all(map(torch.equal, torch.autograd.functional.jacobian(loss, (x, w), vectorize=True), expected))

    def test_a_sparse_gradient(self, case32):
        """With a graph behind it, as torch.func makes it, or a gradient penalty on the embeddings."""
        if case32.backend == "triton":
            pytest.skip("a forward for each range is slow in Triton's interpreter")
        x, w, labels = (t.to(case32.device) for t in (self.x, self.w, self.labels))
        dense = gradients(self.loss(case32), x, w)[1]

        def loss(w):
            return sface_loss(x, w, labels, sparse_grad=True, backend=case32.backend)

        leaf = w.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        for ours in (grad, torch.func.grad(loss)(w)):
            assert ours.is_sparse
            torch.testing.assert_close(ours.detach().to_dense(), dense)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.to_dense().sum().backward()

    @pytest.mark.parametrize("transform", ["grad", "vjp"])
    def test_compiled(self, case32, transform):
        """The compiler would differentiate the forward's own operations there: zeros, without a word."""
        torch._dynamo.reset()
        loss, w, x = self.loss(case32), self.w.to(case32.device), self.x.to(case32.device)

        def gradient(x):
            if transform == "grad":
                return torch.func.grad(loss)(x, w)
            rows, pull = torch.func.vjp(lambda x: loss(x, w), x)  # type: ignore[misc]
            return pull(torch.ones_like(rows))[0]

        compiled = functools.partial(torch.compile, gradient, backend="aot_eager")
        assert torch.equal(compiled()(x), gradient(x))  # outside the graph
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"sface_loss: torch\.compile loses its gradient inside torch\.func"):
            compiled(fullgraph=True)(x)
        torch._dynamo.reset()
