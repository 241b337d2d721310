"""`sface_kernels.compat.official` in the reference project's script: its loop, checkpoints and helpers.

The helpers below do what the reference's training script does with a head, in words of our own.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sface_kernels.compat import official
from sface_kernels.compat.official import LazyLogits, SFaceLoss

STEPS, ROWS, PIXELS, FEATURES, CLASSES = 50, 32, 24, 32, 53  # classes prime, so that no block divides them
RECIPE = {"s": 64.0, "k": 80.0, "a": 0.87, "b": 1.2}
CURVES = ("loss", "intra", "inter", "WyiX", "WjX")
UNIT = 2.0**-24  # one fp32 rounding


# What a training script does with a head


class PlainHead(nn.Module):
    """The same interface in plain autograd, N×C everywhere: what the curves are compared with."""

    def __init__(self, in_features, out_features, device_id, s=64.0, k=80.0, a=0.80, b=1.23):
        super().__init__()
        self.s, self.k, self.a, self.b = s, k, a, b
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        xavier_normal_fan_out(self.weight.data)

    def forward(self, x, label):
        cos = F.normalize(x) @ F.normalize(self.weight).t()
        own = F.one_hot(label, cos.shape[1]).to(cos.dtype)
        theta = cos.detach().acos()
        p = torch.sigmoid(self.k * (theta - self.a))
        q = torch.sigmoid(-self.k * (theta - self.b))
        intra = -(own * p * self.s * cos).sum(1)
        inter = ((1 - own) * q * self.s * cos).sum(1)
        cos_own, cos_other = (own * cos).sum(1), (1 - own) * cos
        loss = intra.mean() + inter.mean()
        return self.s * cos, loss, intra.mean(), inter.mean(), cos_own.mean(), cos_other.mean()


def xavier_normal_fan_out(tensor: Tensor) -> None:
    tensor.normal_(0, 2 * math.sqrt(2 / tensor.shape[0]))


def weight_init(module: nn.Module) -> None:
    """For `apply`: ones into normalisations and PReLU, everything else that has a weight is drawn again."""
    if isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
        module.weight.data.fill_(1)
    elif getattr(module, "weight", None) is not None:
        xavier_normal_fan_out(module.weight.data)
    if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()


def split_parameters(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of batch normalisations, and the rest, told apart by words in the class of each layer."""
    of_norms, others = [], []
    for layer in module.modules():
        name = str(layer.__class__)
        if "model" in name or "container" in name or "mobilefacenet" in name:
            continue
        (of_norms if "batchnorm" in name else others).extend(layer.parameters())
    return of_norms, others


def train_accuracy(output, target: Tensor, topk: tuple[int, ...] = (1,)) -> Tensor:
    """Percent of rows with their class among the first k, by the calls that the reference's own makes."""
    _, pred = output.topk(max(topk), 1, True, True)
    pred = pred.t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return correct[: topk[0]].reshape(-1).float().sum(0).mul_(100.0 / target.size(0))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(9)
    centres = torch.randn(CLASSES, PIXELS, generator=g)
    out = []
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (ROWS,), generator=g)
        out.append((centres[labels] + 0.8 * torch.randn(ROWS, PIXELS, generator=g), labels))
    return out


class Run(NamedTuple):
    curves: Tensor  # [STEPS, 5] fp64, the columns of CURVES
    prec1: list[float]
    prec5: list[float]
    logits: list[Tensor]  # [N, C] fp64 of each step, where they are tensors


def train(head: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Run:
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(PIXELS, 48), nn.BatchNorm1d(48), nn.PReLU(), nn.Linear(48, FEATURES))
    for module in (net, head):
        module.apply(weight_init).to(device, dtype)  # drawn in fp32, so that every run starts at the same numbers
    norms, others = split_parameters(net)
    _, head_others = split_parameters(head)
    groups = [{"params": others + head_others, "weight_decay": 5e-4}, {"params": norms}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    curves, prec1, prec5, logits = [], [], [], []
    for inputs, labels in batches():
        inputs, labels = inputs.to(device, dtype), labels.to(device).long()
        features = net(inputs)
        outputs, loss, intra_loss, inter_loss, WyiX, WjX = head(features, labels)
        prec1.append(train_accuracy(outputs.data, labels, topk=(1,)).data.item())
        prec5.append(train_accuracy(outputs.data, labels, topk=(5,)).data.item())
        curves.append([v.data.item() for v in (loss, intra_loss, inter_loss, WyiX, WjX)])
        if isinstance(outputs, Tensor):
            logits.append(outputs.detach().double().cpu())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Run(torch.tensor(curves, dtype=torch.float64), prec1, prec5, logits)


@pytest.fixture(scope="module")
def truth() -> Run:
    return train(PlainHead(FEATURES, CLASSES, [], **RECIPE), torch.float64)


@pytest.fixture(scope="module")
def plain() -> Run:
    return train(PlainHead(FEATURES, CLASSES, [], **RECIPE))


# The loop


@pytest.mark.parametrize("logits", [False, True], ids=["lazy", "logits"])
def test_the_loop_gives_the_same_curves_and_the_same_accuracy(case32, logits, truth, plain):
    """Beside fp64, our run strays like the plain fp32 run does.

    Both start at the same numbers, add roundings of the same size in each step, and the same training
    amplifies them. So the largest error of the plain run so far measures what is due to rounding; four times
    that, as each run draws its own roundings, plus one rounding of the curve, as the plain run may be lucky
    in its first steps.
    """
    head = SFaceLoss(FEATURES, CLASSES, device_id=[0], **RECIPE, backend=case32.backend, logits=logits)
    ours = train(head, device=case32.device)
    noise = (plain.curves - truth.curves).abs().cummax(0).values
    rounding = UNIT * truth.curves.abs().amax(0).clamp_min(1)  # cosines of single rows go up to 1
    excess = (ours.curves - truth.curves).abs() / (4 * (noise + rounding))
    assert excess.max() <= 1, dict(zip(CURVES, excess.amax(0).tolist(), strict=True))
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
    assert loss.requires_grad and not intra.requires_grad


# The module


def small(case=None, rows: int = 7, classes: int = 770, features: int = 24, **kwargs) -> tuple:
    """A head, embeddings and labels; half of the rows lie near their class centre."""
    torch.manual_seed(3)
    device = case.device if case else "cpu"
    head = SFaceLoss(features, classes, None, **kwargs, backend=case.backend if case else "auto").to(device)
    y = torch.randint(0, classes, (rows,), device=device)
    x = head.weight.detach()[y] * (torch.arange(rows, device=device) % 2).unsqueeze(1) + torch.randn(
        rows, features, device=device
    ).mul(0.02)
    return head, x.requires_grad_(), y


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


# The logits

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
    monkeypatch.setattr(official, "BLOCK_ELEMENTS", 1)
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
    ):
        with pytest.raises(error, match="logits=True"):
            use()
    with pytest.raises(ValueError, match="k: expected 0 to 770"):
        outputs.topk(771)
    assert not hasattr(outputs, "grad_fn")


# The memory


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
