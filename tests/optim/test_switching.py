"""Changing over from torch.optim and back, what a waiting gradient allows, and what is refused with which words."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from sface_kernels import sface_loss
from sface_kernels.compat.official import SFaceLoss as OfficialHead
from sface_kernels.optim import HeadAdamW, HeadSGD
from tests.optim.trainings import OPTIONS, RULES, SHAPE, batch, make, make_head, train, waiting
from tests.support.problems import trained_problem


@pytest.fixture
def problem():
    return trained_problem(*SHAPE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_over_and_back(backend, rule):
    """Six steps by one optimizer, or two by one, two by the other and two by the one again: the same training."""
    kind, torch_kind = RULES[rule]

    def loop(head, optimizer, problem):
        switches = isinstance(optimizer, kind)
        for step in range(6):
            if switches and step == 2:  # through a file, as a checkpoint
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer.release()
                optimizer = torch_kind(head.parameters(), lr=7.0)
                optimizer.load_state_dict(torch.load(file))
            if switches and step == 4:
                state = optimizer.state_dict()
                optimizer = kind(head, lr=5.0)
                optimizer.load_state_dict(state)
            head(*batch(problem, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    train(loop, trained_problem(*SHAPE), rule, backend=backend)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_state_dict(rule, problem):
    """Keys and groups of torch.optim's, so that either loads the other's."""
    _, optimizer = waiting(problem, rule)
    optimizer.step()
    other = make_head(problem)
    theirs = RULES[rule][1](other.parameters(), **OPTIONS[rule])
    other(*batch(problem, 0)).backward()
    theirs.step()
    ours, theirs = optimizer.state_dict(), theirs.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() == {0}
    for name, value in theirs["state"][0].items():
        mine = ours["state"][0][name]
        assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
    assert ours["state"][0].keys() == theirs["state"][0].keys()
    assert isinstance(optimizer, RULES[rule][1])


def test_no_gradient_is_made(problem):
    head, optimizer = waiting(problem)
    with pytest.warns(UserWarning, match="head.weight.grad is None, and is not the gradient"):
        assert head.weight.grad is None
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing waits: no warning either
        assert head.weight.grad is None


def test_the_function_leaves_it_too(problem):
    """Whoever uses the weight: the switch belongs to it, not to the module."""
    head, optimizer = waiting(problem)
    optimizer.zero_grad()
    before = head.weight.detach().clone()
    x, labels = batch(problem, 0)
    sface_loss(x, head.weight, labels).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_zero_grad_drops(problem):
    head, optimizer = waiting(problem)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, problem.w) and not optimizer.state


def test_a_step_takes_what_waits(problem):
    """Nothing is left for the next one, with or without zero_grad in between."""
    head, optimizer = waiting(problem)
    optimizer.step()
    after = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, after)


def test_a_gradient_that_is_not_asked_for_does_not_wait(problem):
    head, optimizer = waiting(problem)
    optimizer.zero_grad()
    x, labels = batch(problem, 0)
    x.requires_grad_()
    torch.autograd.grad(head(x, labels), x)
    with torch.no_grad():
        head(x, labels)
    optimizer.step()
    assert torch.equal(head.weight, problem.w)


class TestChanges:
    """Of the weight, or of what its gradient is made of, between a backward and the step."""

    @pytest.mark.parametrize("rule", RULES)
    def test_in_place(self, problem, rule):
        head, optimizer = waiting(problem, rule)
        with torch.no_grad():
            head.weight[0, 0] += 1
        with pytest.raises(RuntimeError, match=r"weight: modified by an in-place operation between backward\(\) and"):
            optimizer.step()

    @pytest.mark.parametrize("rule", RULES)
    def test_embeddings_in_place(self, problem, rule):
        """As where every batch is written into the same tensor."""
        head = make_head(problem)
        optimizer = RULES[rule][0](head, **OPTIONS[rule])
        x, labels = batch(problem, 0)
        head(x, labels).backward()
        x.copy_(batch(problem, 1)[0])
        head(x, labels).backward()
        with pytest.raises(RuntimeError, match=r"embeddings: modified by an in-place operation between backward\(\)"):
            optimizer.step()
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_upstream_gradient_and_labels_in_place(self, problem, rule, reduction):
        """They are the caller's, who has no use for them after the backward."""
        weights = []
        for changed in (False, True):
            head = make_head(problem, reduction=reduction)
            optimizer = RULES[rule][0](head, **OPTIONS[rule])
            x, labels = batch(problem, 0)
            loss = head(x, labels)
            upstream = torch.full_like(loss, 0.5)
            loss.backward(upstream)
            if changed:
                upstream.zero_()
                labels.zero_()
            optimizer.step()
            weights.append(head.weight.detach())
        assert torch.equal(*weights)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("backend", ["native", "chunked"])
    def test_a_step_before_the_backward(self, problem, rule, backend):
        """The graph of a forward knows the weight of before, which a step changes in place: autograd raises."""
        head = make_head(problem, backend=backend)
        optimizer = RULES[rule][0](head, **OPTIONS[rule])
        first, second = (head(*batch(problem, step)) for step in range(2))
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("backend", ["native", "chunked"])
    def test_exchanged(self, problem, rule, backend):
        """`weight.data = …` after the backward: as in torch.optim, the gradient is that of the weight of before."""
        results = []
        for ours in (True, False):
            head, optimizer = make(problem, rule, ours, {}, backend=backend)
            head(*batch(problem, 0)).backward()
            head.weight.data = problem.w.flip(0)
            optimizer.step()
            results.append(head.weight.detach())
        torch.testing.assert_close(*results)
        assert not torch.equal(results[0], problem.w.flip(0))

    @pytest.mark.parametrize("backend", ["native", "chunked"])
    def test_a_state_of_other_classes(self, problem, backend):
        _, larger = waiting(problem._replace(w=problem.w.repeat(2, 1)))
        larger.step()
        head = make_head(problem, backend=backend)
        optimizer = HeadSGD(head, **OPTIONS["SGD"])
        optimizer.load_state_dict(larger.state_dict())
        head(*batch(problem, 0)).backward()
        with pytest.raises(ValueError, match=r"state_dict: expected momentum_buffer \[205, 17\], .* got \[410, 17\]"):
            optimizer.step()

    def test_another_dtype_by_swapped_tensors(self, problem):
        head, optimizer = waiting(problem)
        optimizer.step()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            head.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        before = head.weight.detach().clone()
        x, labels = batch(problem, 1)
        head(x.double(), labels).backward()
        assert len(optimizer._pending) == 1
        optimizer.step()
        assert before.dtype == torch.float64 and not torch.equal(head.weight, before)

    def test_more_classes(self, problem):
        head, optimizer = waiting(problem)
        optimizer.step()
        head(*batch(problem, 1)).backward()
        head.add_classes(10, optimizer)  # the new Parameter has no gradient, as with any optimizer
        moved = head.weight.detach().clone()
        optimizer.step()
        assert torch.equal(head.weight, moved)
        head(*batch(problem, 2)).backward()
        optimizer.step()
        assert len(head.weight) == SHAPE[1] + 10 and (head.weight != moved).any(1).all()
        assert optimizer.state[head.weight]["momentum_buffer"].shape == head.weight.shape

    def test_the_old_parameter_is_one_like_any_other(self, problem):
        head, optimizer = waiting(problem)
        optimizer.step()
        old = head.weight
        head.add_classes(10, optimizer)
        sface_loss(*batch(problem, 1)[:1], old, batch(problem, 1)[1]).backward()
        moved = head.weight.detach().clone()
        optimizer.step()
        assert old.grad is not None and torch.equal(head.weight, moved)

    def test_another_parameter(self, problem):
        head, optimizer = waiting(problem)
        head.add_classes(10)
        with pytest.raises(RuntimeError, match=r"head.weight: expected the Parameter .* give add_classes\(\)"):
            optimizer.step()

    def test_release(self, problem):
        head, optimizer = waiting(problem)
        with pytest.raises(RuntimeError, match="release: a gradient waits"):
            optimizer.release()
        optimizer.step()
        optimizer.release()
        assert type(head.weight) is nn.Parameter
        head(*batch(problem, 1)).backward()
        assert head.weight.grad is not None
        with pytest.raises(RuntimeError, match="released, or succeeded"):
            optimizer.step()

    def test_succeeded_by_another(self, problem):
        head, first = waiting(problem)
        second = HeadSGD(head, lr=0.1)
        with pytest.raises(RuntimeError, match="released, or succeeded"):
            first.step()
        head(*batch(problem, 1)).backward()
        second.step()
        assert not torch.equal(head.weight, problem.w)

    def test_an_optimizer_that_is_gone_gives_the_head_back(self, problem):
        head, optimizer = waiting(problem)
        del optimizer
        gc.collect()
        head(*batch(problem, 1)).backward()
        assert head.weight.grad is not None


class TestSurroundings:
    @pytest.mark.parametrize("rule", RULES)
    def test_copies(self, problem, rule):
        """A copy of head and optimizer together trains on by itself, from a pickle too."""
        head, optimizer = waiting(problem, rule)
        optimizer.step()
        for other_head, other in (copy.deepcopy((head, optimizer)), pickle.loads(pickle.dumps((head, optimizer)))):
            before = head.weight.detach().clone()
            other_head(*batch(problem, 1)).backward()
            other.step()
            assert torch.equal(head.weight, before) and not torch.equal(other_head.weight, before)

    def test_a_head_alone_is_copied_as_any(self, problem):
        head, _ = waiting(problem)
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        other = copy.deepcopy(head)
        other(*batch(problem, 1)).backward()
        assert other.weight.grad is not None
        assert type(head.state_dict()["weight"]) is torch.Tensor

    def test_under_compile_the_gradient_is_dense(self, problem):
        head, optimizer = waiting(problem)
        optimizer.zero_grad()
        twin = make_head(problem)
        x, labels = batch(problem, 1)
        torch.compile(lambda: head(x, labels), fullgraph=True, backend="aot_eager")().backward()
        twin(x, labels).backward()
        torch.testing.assert_close(head.weight.grad, twin.weight.grad)
        optimizer.step()
        assert not torch.equal(head.weight, problem.w)

    def test_a_sparse_gradient_is_taken(self, problem):
        """As a compiled call with `sparse_grad=True` leaves it."""
        results = []
        for gradient in (torch.eye(*problem.w.shape), torch.eye(*problem.w.shape).to_sparse()):
            head = make_head(problem)
            optimizer = HeadSGD(head, lr=0.1)
            head.weight.grad = gradient
            optimizer.step()
            results.append(head.weight.detach())
        assert torch.equal(*results) and not torch.equal(results[0], problem.w)

    def test_the_published_interface(self, problem):
        head = OfficialHead(SHAPE[2], SHAPE[1], device_id=None)
        optimizer = HeadSGD(head, lr=0.1)
        x, labels = batch(problem, 0)
        before = head.weight.detach().clone()
        head(x, labels)[1].backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert head.weight.grad is None
        optimizer.step()
        assert not torch.equal(head.weight, before)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda head: HeadSGD(head.parameters(), lr=0.1),
            TypeError,
            r"head: expected a module with a Parameter weight",
        ),
        (lambda head: HeadSGD(nn.Linear(3, 4).bias), TypeError, r"head: expected .* \[C, D\], got Parameter"),
        (lambda head: HeadSGD(nn.LayerNorm(3)), TypeError, r"head: expected .* \[C, D\], got LayerNorm"),
        (lambda head: HeadSGD(head, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda head: HeadSGD(head, max_norm=0.0), ValueError, "max_norm: expected a number > 0, got 0.0"),
        (lambda head: HeadSGD(head, max_norm="1"), TypeError, "max_norm: expected a number, got '1'"),
        (lambda head: HeadAdamW(head, betas=(2.0, 0.9)), ValueError, "Invalid beta"),
        (lambda head: HeadAdamW(head, amsgrad=True), TypeError, "amsgrad"),
        (
            lambda head: HeadAdamW(head).load_state_dict(torch.optim.AdamW([head.weight], amsgrad=True).state_dict()),
            ValueError,
            "state_dict: expected one without amsgrad",
        ),
        (
            lambda head: HeadSGD(head).add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
            ValueError,
            "param_group: expected none beside the head's weight",
        ),
    ],
)
def test_refused(call, error, message, problem):
    with pytest.raises(error, match=message):
        call(make_head(problem))


def test_adamw_in_a_cuda_graph_is_refused(problem, monkeypatch):
    """Its count of steps is on the host, where a replay does not reach it."""
    head, optimizer = waiting(problem, "AdamW")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match="HeadAdamW: a CUDA graph would repeat"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.state[head.weight]["step"] == 1


def test_what_waits_keeps_no_graph():
    problem = trained_problem(*SHAPE)
    head = make_head(problem)
    optimizer = HeadSGD(head)
    x, labels = batch(problem, 0)
    head(x.requires_grad_() * 1, labels).backward()
    (gradient,) = optimizer._pending.gradients()
    assert gradient.x.grad_fn is None and not gradient.w.requires_grad


def test_a_copy_keeps_its_max_norm():
    head, optimizer = waiting(trained_problem(*SHAPE), max_norm=0.25)
    assert copy.deepcopy((head, optimizer))[1].max_norm == 0.25
