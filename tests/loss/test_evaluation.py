"""topk, topk_correct, logits and cosine of the head: against every cosine in float64, and without a tensor of all pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import SFaceLoss
from tests.support.cases import DEVICES, bf16, f16, f32, f64
from tests.support.held import Held
from tests.support.oracle import worst_cosine_roundings
from tests.support.problems import trained_problem

N, C, D = 13, 2500, 48  # more than one block of classes
DTYPES = [(f32, f32), (f64, f64), (f64, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)]


def make(dtype=f32, weight_dtype=f32, device="cpu", **options):
    """A head, embeddings, labels, and the cosines in float64 of what they hold."""
    problem = trained_problem(N, C, D).to(device, dtype, weight_dtype)
    head = SFaceLoss(D, C, device=device, dtype=weight_dtype, **options)
    head.load_state_dict({"weight": problem.w})
    cos = F.normalize(problem.x.double()) @ F.normalize(problem.w.double()).t()
    return head, problem.x, problem.labels, cos.clamp(-1, 1)


def rounding(dtype: torch.dtype) -> float:
    unit = torch.finfo(torch.promote_types(dtype, f32)).eps / 2
    return worst_cosine_roundings(D) * unit + 2.0**-50  # in fp64 the truth rounds as well


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
class TestValues:
    @pytest.mark.parametrize("k", [1, 5, 300, C])
    def test_topk(self, dtypes, device, k):
        """The true cosines of the classes found are the k largest, in order, as far as roundings tell them apart."""
        head, x, _, cos = make(*dtypes, device)
        values, classes = found = head.topk(x, k)
        assert isinstance(found, torch.return_types.topk) and classes.dtype == torch.int64
        assert values.dtype == torch.promote_types(dtypes[0], f32) and not values.requires_grad
        assert values.shape == classes.shape == (N, k)
        at_classes, tolerance = cos.gather(1, classes), rounding(dtypes[0])
        assert (values - at_classes).abs().max() <= tolerance
        assert (at_classes - cos.topk(k).values).abs().max() <= 2 * tolerance
        assert (values.diff(dim=1) <= 0).all()
        assert all(len(set(row)) == k for row in classes.tolist())

    def test_logits(self, dtypes, device):
        head, x, _, cos = make(*dtypes, device, s=30.0)
        logits = head.logits(x)
        assert logits.requires_grad and logits.dtype == torch.promote_types(dtypes[0], f32)
        with torch.no_grad():
            streamed = head.logits(x)
        for ours in (logits.detach(), streamed):
            assert ours.shape == (N, C) and (ours / 30 - cos).abs().max() <= 2 * rounding(dtypes[0])

    def test_cosine(self, dtypes, device):
        head, x, labels, cos = make(*dtypes, device)
        own = head.cosine(x, labels)
        some = torch.randint(0, C, (N, 3), dtype=torch.int32, device=device)
        three = head.cosine(x, some)
        for ours, exact in ((own, cos.gather(1, labels[:, None])[:, 0]), (three, cos.gather(1, some.long()))):
            assert ours.shape == exact.shape and ours.dtype == torch.promote_types(dtypes[0], f32)
            assert ours.requires_grad and (ours.detach() - exact).abs().max() <= rounding(dtypes[0])

    def test_topk_correct(self, dtypes, device):
        head, x, labels, cos = make(*dtypes, device)
        labels[3] = -100
        x[:2] = -x[:2]  # these two have their class among the last
        ours = head.topk_correct(x, labels, topk=(1, 3, C))
        rank = (cos > cos.gather(1, labels.clamp_min(0)[:, None])).sum(1)  # distinct by far more than roundings
        rank[:2] = C
        expected = [int((rank[labels >= 0] < k).sum()) for k in (1, 3)]
        assert ours.tolist() == [*expected, N - 1] and 0 < expected[0] < N - 1
        assert ours.dtype == torch.int64 and ours.device == x.device


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_classes_of_a_dtype_that_holds_no_number_of_classes(dtype):
    """A uint8 beside C = 2500 must not be compared with 2500 modulo 256, which is 196."""
    head, x, *_ = make()
    classes = torch.arange(N) + (240 if dtype == torch.uint8 else 110)
    assert torch.equal(head.cosine(x, classes.to(dtype)), head.cosine(x, classes))


def test_gradients():
    """Those of plain autograd: of the logits, of cosines to chosen classes; none of topk."""
    head, x, labels, _ = make(f64, f64)
    for ours, plain in (
        (lambda x, w: head.logits(x), lambda x, w: 64 * F.linear(F.normalize(x), F.normalize(w))),
        (
            lambda x, w: head.cosine(x, labels),
            lambda x, w: F.cosine_similarity(x, w[labels]),
        ),
    ):
        leaf = x.clone().requires_grad_()
        other = head.weight.detach().clone().requires_grad_()
        result, expected = ours(leaf, head.weight), plain(leaf, other)
        upstream = torch.randn_like(result)
        grads = torch.autograd.grad(result, (leaf, head.weight), upstream)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, (leaf, other), upstream))
    assert not any(t.requires_grad for t in head.topk(x.requires_grad_(), 3))


def test_a_sample_at_a_centre_has_an_angle():
    """A third of normalised vectors have a product with themselves above 1, whose arccos is NaN."""
    head = SFaceLoss(512, 300)
    x = head.weight.detach() * 3
    unit = F.normalize(x)
    assert ((unit @ unit.t()).diagonal() > 1).any()
    with torch.no_grad():
        streamed = head.logits(x)
    for cosines in (head.cosine(x, torch.arange(300)), head.topk(x, 1).values, head.logits(x) / 64, streamed / 64):
        assert torch.isfinite(cosines.acos()).all()


@pytest.mark.parametrize("call", ["topk", "logits", "cosine"])
def test_precision_is_not_the_surroundings(call):
    """Autocast and a process that allows TF32 or bf16 products change no bit."""
    head, x, labels, _ = make()
    arguments = {"topk": (x, 5), "logits": (x,), "cosine": (x, labels)}[call]

    def result():
        with torch.no_grad():
            found = getattr(head, call)(*arguments)
        return found if isinstance(found, torch.Tensor) else torch.cat(list(found), 1)

    plain = result()
    with torch.autocast("cpu", bf16):
        assert torch.equal(result(), plain)
    torch.set_float32_matmul_precision("medium")  # put back by a fixture
    assert torch.equal(result(), plain)


def test_memory():
    """Beyond what is returned: a block of cosines, one of unit rows, and what normalising that takes. N·C is 164 MB here,
    C·D 41 MB."""
    n, c, d = 1024, 40_000, 256
    head, x, labels = SFaceLoss(d, c), torch.randn(n, d), torch.arange(n)
    allowed = 32 << 20
    for call, returned in (
        (lambda: head.topk(x, 5), n * 5 * 12),
        (lambda: head.topk_correct(x, labels), 16),
        (lambda: head.logits(x), n * c * 4),
        (lambda: head.cosine(x, labels), n * 4),
    ):
        with torch.no_grad(), Held() as held:
            result = call()
        extra = held.peak - returned
        assert extra <= allowed, f"{extra / 2**20:.0f} MiB held at once: {held.at_peak}"
        del result
    with Held() as held:
        F.linear(F.normalize(x), F.normalize(head.weight.detach())).topk(5)
    assert held.peak > n * c * 4, "the probe does not see a tensor of all pairs"


def test_no_rows():
    head, x, labels, _ = make()
    assert head.topk(x[:0], 4).values.shape == (0, 4) and head.logits(x[:0]).shape == (0, C)
    assert head.cosine(x[:0], labels[:0]).shape == (0,) and head.topk_correct(x[:0], labels[:0]).tolist() == [0, 0]


REFUSED = [
    (lambda h, x, y: h.topk(x, 0), ValueError, r"k: expected an int > 0, got 0"),
    (lambda h, x, y: h.topk(x, 2.0), TypeError, r"k: expected an int, got 2\.0"),
    (lambda h, x, y: h.topk(x, C + 1), ValueError, rf"k: expected at most {C} \(the number of classes\), got {C + 1}"),
    (lambda h, x, y: h.topk(x[0], 1), ValueError, rf"embeddings: expected shape \[N, D\], got \[{D}\]"),
    (lambda h, x, y: h.topk(x[:, 1:], 1), ValueError, rf"weight: expected \[C, {D - 1}\] to match embeddings"),
    (lambda h, x, y: h.topk(x.tolist(), 1), TypeError, r"embeddings: expected a torch\.Tensor, got list"),
    (lambda h, x, y: h.logits(x.long()), TypeError, r"embeddings: expected a dtype of float32"),
    (lambda h, x, y: h.cosine(x, y.float()), TypeError, r"classes: expected an integer dtype .*got torch\.float32"),
    (
        lambda h, x, y: h.cosine(x, y[1:]),
        ValueError,
        rf"classes: expected shape \[{N}\] or \[{N}, M\], got \[{N - 1}\]",
    ),
    (lambda h, x, y: h.cosine(x, y + C), ValueError, rf"classes: expected values in \[0, {C}\), got \d+"),
    (lambda h, x, y: h.cosine(x, y - C), ValueError, rf"classes: expected values in \[0, {C}\), got -\d+"),
    (lambda h, x, y: h.topk_correct(x, y + C), ValueError, rf"labels: expected values in \[0, {C}\)"),
    (lambda h, x, y: h.topk_correct(x, y, topk=()), ValueError, r"topk: expected at least one number, got none"),
    (lambda h, x, y: h.topk_correct(x, y, topk=(1, 0)), ValueError, r"topk: expected an int > 0, got 0"),
    (lambda h, x, y: h.topk_correct(x, y, topk=(1, C + 1)), ValueError, rf"topk: expected at most {C}"),
    (lambda h, x, y: h.topk_correct(x, y, topk=5), TypeError, r"topk: expected a sequence of ints, got 5"),
    (lambda h, x, y: h.topk(x.to_sparse(), 1), TypeError, r"embeddings: expected a dense tensor, got .*sparse_coo"),
]


@pytest.mark.parametrize("call, error, text", REFUSED, ids=[text for *_, text in REFUSED])
def test_refusals(call, error, text):
    head, x, labels, _ = make()
    with pytest.raises(error, match="^" + text):
        call(head, x, labels)


def test_classes_out_of_range_without_the_check(monkeypatch):
    """Where looking would synchronise, as on a GPU: NaN, and nothing is read out of bounds."""
    monkeypatch.setattr("sface_kernels.validation.checks_labels", lambda device: False)
    head, x, labels, cos = make()
    classes = torch.stack([labels, labels + C, labels - C], 1)
    found = head.cosine(x, classes).detach()
    assert found[:, 1:].isnan().all() and not found[:, 0].isnan().any()
    assert math.isclose(float(found[0, 0]), float(cos[0, labels[0]]), abs_tol=1e-5)


def test_topk_correct_with_another_ignore_index():
    head, labels = SFaceLoss(16, 40, ignore_index=7), torch.tensor([3, 7, 5])
    assert head.topk_correct(head.weight.detach()[labels], labels).tolist() == [2, 2]
