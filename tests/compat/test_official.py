"""`sface_kernels.compat.official` in the published script: its loop, checkpoints and helpers."""

from __future__ import annotations

import io
import math
from unittest import mock

import pytest
import torch

from sface_kernels import dispatch, sface_loss, validation
from sface_kernels.compat.official import SFaceLoss
from tests.support.problems import trained_problem
from tests.support.published_script import (
    CLASSES,
    FEATURES,
    RECIPE,
    UNIT,
    PlainHead,
    Run,
    assert_same_curve,
    batches,
    small,
    split_parameters,
    train,
    train_accuracy,
    weight_init,
)


@pytest.fixture(scope="module")
def truth() -> Run:
    return train(PlainHead(FEATURES, CLASSES, [], **RECIPE), torch.float64)


@pytest.fixture(scope="module")
def plain() -> Run:
    return train(PlainHead(FEATURES, CLASSES, [], **RECIPE))


@pytest.mark.parametrize("logits", [False, True], ids=["lazy", "logits"])
def test_the_loop_gives_the_same_curves_and_the_same_accuracy(case32, logits, truth, plain):
    head = SFaceLoss(FEATURES, CLASSES, device_id=[0], **RECIPE, backend=case32.backend, logits=logits)
    ours = train(head, device=case32.device)
    # Triton's mean cosine to the others is of unit rows in fp16, each off by 2⁻¹¹ of its length at most
    of_fp16 = torch.tensor([0, 0, 0, 0, 2.0**-10]) if case32.backend == "triton" else 0.0
    assert_same_curve(ours.curves, plain.curves, truth.curves, screened=of_fp16)
    assert truth.curves[:, 0].min() < 0 < truth.curves[0, 0]  # the run did something

    # accuracies are equal because no row is near a tie with the first or the fifth of the other classes
    drift = max((a - b).abs().max() for a, b in zip(plain.logits, truth.logits, strict=True))
    for logits_of_step, (_, labels) in zip(truth.logits, batches(), strict=True):
        own = logits_of_step.gather(1, labels.unsqueeze(1))
        others = logits_of_step.scatter(1, labels.unsqueeze(1), -torch.inf).topk(5).values[:, [0, 4]]
        assert (others - own).abs().min() > 2 * 4 * drift, "choose another seed for the data"
    assert ours.prec1 == plain.prec1 == truth.prec1
    assert ours.prec5 == plain.prec5 == truth.prec5
    assert truth.prec1[0] < 20 and truth.prec1[-1] > 70


def test_stats_hold_the_accuracy_of_the_forward(case32):
    head, x, y = small(case32)
    outputs, loss, intra, inter, *_ = head(x, y)
    assert 100 * outputs.stats.accuracy.item() == pytest.approx(train_accuracy(outputs.data, y).item())
    assert loss.item() == pytest.approx((intra + inter).item(), rel=4 * UNIT, abs=1e-5)
    assert all(value.requires_grad for value in (loss, intra, inter))


def test_ignored_rows_are_in_none_of_the_parts():
    torch.manual_seed(3)
    head, x, y = SFaceLoss(16, 30, None), torch.randn(8, 16, requires_grad=True), torch.randint(0, 30, (8,))
    y[2] = -100
    with torch.no_grad():
        x[2] = torch.nan
    _, _, intra, inter, *_ = head(x, y)
    kept = [i for i in range(8) if i != 2]
    _, _, intra_of_kept, inter_of_kept, *_ = head(x[kept], y[kept])
    for part, expected in ((intra, intra_of_kept), (inter, inter_of_kept)):
        torch.testing.assert_close(part, expected)
        ours, theirs = (torch.autograd.grad(p, (x, head.weight), retain_graph=True) for p in (part, expected))
        torch.testing.assert_close(ours[0][kept], theirs[0][kept])
        torch.testing.assert_close(ours[1], theirs[1])
        assert not ours[0][2].any()


def test_a_label_out_of_range_on_a_gpu_is_nan(monkeypatch):
    """Where labels are not checked: the loss is NaN, and nothing is indexed by them, which would end the process."""
    monkeypatch.setattr(validation, "checks_labels", lambda device: False)
    head, x = SFaceLoss(16, 30, None), torch.randn(3, 16)
    for label in (30, -1):
        _, loss, *_ = head(x, torch.tensor([0, label, 29]))
        assert loss.isnan()


def test_the_signature_is_the_references():
    head = SFaceLoss(32, 50, [0, 1], 32.0, 70.0, 0.9, 1.2)
    assert (head.in_features, head.out_features, head.device_id) == (32, 50, [0, 1])
    assert (head.s, head.k, head.a, head.b) == (32.0, 70.0, 0.9, 1.2)
    head = SFaceLoss(in_features=32, out_features=50, device_id=None)
    assert (head.s, head.k, head.a, head.b, head.device_id) == (64.0, 80.0, 0.80, 1.23, None)


@pytest.mark.parametrize("device_id", [None, [], [0], [0, 1]], ids=str)
def test_device_id_changes_nothing(device_id):
    torch.manual_seed(0)
    head = SFaceLoss(16, 30, device_id=device_id)
    x, y = torch.randn(8, 16), torch.randint(0, 30, (8,))
    outputs, *values = head(x, y)
    torch.manual_seed(0)
    expected_outputs, *expected = PlainHead(16, 30, [])(x, y)
    assert head.device_id is device_id
    torch.testing.assert_close(outputs.dense(), expected_outputs.detach(), rtol=0, atol=64 * 20 * UNIT)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_the_weight_starts_at_the_references_random_numbers():
    torch.manual_seed(21)
    head = SFaceLoss(16, 30, [])
    torch.manual_seed(21)
    assert torch.equal(head.weight, torch.empty(30, 16).normal_(0, 2 * math.sqrt(2 / 30)))


def test_weight_init_of_the_script_reaches_the_weight():
    head = SFaceLoss(16, 30, [0])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    torch.manual_seed(22)
    head.apply(weight_init)
    torch.manual_seed(22)
    assert torch.equal(head.weight, torch.empty(30, 16).normal_(0, 2 * math.sqrt(2 / 30)))
    assert optimizer.param_groups[0]["params"][0] is head.weight


def test_the_script_finds_the_weight_by_class_name():
    head = SFaceLoss(16, 30, [0])
    of_norms, others = split_parameters(head)
    assert of_norms == [] and len(others) == 1 and others[0] is head.weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]  # its other split reads parameter names
    for word in ("model", "container", "batchnorm", "mobilefacenet"):
        assert word not in str(head.__class__)


def test_checkpoints_go_both_ways():
    def through_a_file(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file)

    torch.manual_seed(1)
    theirs, ours, back = PlainHead(16, 30, []), SFaceLoss(16, 30, []), PlainHead(16, 30, [])
    x, y = torch.randn(8, 16), torch.randint(0, 30, (8,))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert torch.equal(ours.weight, theirs.weight)
    state = ours.state_dict()
    assert list(state) == ["weight"] and state["weight"].shape == (30, 16) and state["weight"].dtype == torch.float32
    back.load_state_dict(through_a_file(state))
    torch.testing.assert_close(ours(x, y)[1], back(x, y)[1], rtol=1e-5, atol=1e-5)


def test_a_host_weight_is_copied_to_the_input_with_a_warning():
    head = SFaceLoss(16, 30, [0])
    with pytest.warns(UserWarning, match=r"head\.to\(device\)"):
        beside = head._weight_beside(torch.empty(2, 16, device="meta"))
    assert beside.device.type == "meta" and beside.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
@pytest.mark.filterwarnings("ignore:SFaceLoss. the weight is on the CPU")
def test_a_loop_that_leaves_the_head_on_the_host():
    head, x, y = small()
    expected = head(x, y)[1]
    outputs, loss, *_ = head(x.detach().cuda(), y.cuda())
    loss.backward()
    assert head.weight.grad.device.type == "cpu" and outputs.device.type == "cuda"
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [(1, 0.5, 0), (0, 0.5, 1), (0, 1, 0), (0, 0, 1), (1, -1, 2)], ids=str)
def test_any_combination_of_loss_and_parts_is_differentiable(case32, parts):
    """Of loss, intra and inter, as in the published module: the same gradients as its arithmetic in fp64."""
    torch.manual_seed(0)
    x, w, y = torch.randn(9, 32), torch.randn(40, 32), torch.randint(0, 40, (9,))
    x[0] = w[y[0]] + 0.1 * torch.randn(32)
    gradients = []
    for head, dtype in (
        (PlainHead(32, 40, [], **RECIPE), torch.float64),
        (PlainHead(32, 40, [], **RECIPE), torch.float32),
        (SFaceLoss(32, 40, [], **RECIPE, backend=case32.backend, filter_eps=0.0), torch.float32),
    ):
        head = head.to(case32.device, dtype)
        rows = x.to(case32.device, dtype, copy=True).requires_grad_()
        with torch.no_grad():
            head.weight.copy_(w)
        outputs = head(rows, y.to(case32.device))
        assert torch.allclose(outputs[1], outputs[2] + outputs[3], rtol=1e-5)
        sum(share * value for share, value in zip(parts, outputs[1:4], strict=True) if share).backward()
        gradients.append([t.double().cpu() for t in (rows.grad, head.weight.grad)])
    for truth, plain, ours in zip(*gradients, strict=True):
        limit = 2 * ((plain - truth).norm() + UNIT * 80 * truth.norm())  # k = 80 times one rounding of an angle
        assert (ours - truth).norm() <= limit


def test_the_own_pull_is_a_constant_where_its_slope_is_steep():
    """Rows at θ = a: through p the gradient would be some thirty times as long."""
    unit = torch.nn.functional.normalize
    w, labels, x = torch.randn(20, 16, dtype=torch.float64), torch.arange(8), torch.randn(8, 16, dtype=torch.float64)
    own = unit(w[labels])
    side = unit(x - (x * own).sum(1, keepdim=True) * own)
    x = (math.cos(0.8) * own + math.sin(0.8) * side).requires_grad_()
    head = SFaceLoss(16, 20, None)
    head.weight.data = w.float()
    head(x, labels)[2].backward()
    plain = x.detach().clone().requires_grad_()
    cos = (unit(plain) * unit(w.float().double()[labels])).sum(1)
    (-(64 * torch.sigmoid(80 * (cos.detach().acos() - 0.8)) * cos).mean()).backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-3, atol=1e-5)


OTHER = [("s", 32.0), ("k", 20.0), ("a", 1.4), ("b", 0.9), ("filter_eps", 0.2)]


@pytest.mark.parametrize("option, value", OTHER)
def test_every_option_reaches_the_loss(option, value):
    x, w, labels, _ = trained_problem(9, 40, 16)
    head = SFaceLoss(16, 40, None, backend="chunked", **{option: value})
    head.weight.data.copy_(w)
    head(x, labels)[1].backward()
    w.requires_grad_()
    (ours,) = torch.autograd.grad(sface_loss(x, w, labels, backend="chunked", **{option: value}), w)
    (default,) = torch.autograd.grad(sface_loss(x, w, labels, backend="chunked"), w)
    assert torch.equal(head.weight.grad, ours) and not torch.equal(ours, default)


def test_the_backend_is_the_one_asked_for(monkeypatch):
    entry = dispatch.BACKENDS["reference"]
    forward = mock.Mock(wraps=entry.forward)
    monkeypatch.setitem(dispatch.BACKENDS, "reference", entry._replace(forward=forward))
    SFaceLoss(16, 40, None, backend="reference")(torch.randn(9, 16), torch.arange(9))
    forward.assert_called_once()
