"""Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sface_kernels import SFaceLoss, available_backends, dispatch, explain, sface_loss
from sface_kernels.dispatch import BACKENDS
from tests.support.cases import f16, f32, f64


def call(**changes):
    arguments = {"embeddings": torch.randn(4, 8), "weight": torch.randn(6, 8), "labels": torch.tensor([0, 1, 2, 5])}
    return sface_loss(**{**arguments, **changes})


T = torch.zeros
ARGUMENTS = [
    (dict(embeddings=[[1.0]]), TypeError, r"embeddings: expected a torch\.Tensor, got list"),
    (dict(weight=None), TypeError, r"weight: expected a torch\.Tensor, got NoneType"),
    (dict(labels=[0, 1, 2, 3]), TypeError, r"labels: expected a torch\.Tensor, got list"),
    (dict(embeddings=T(8)), ValueError, r"embeddings: expected shape \[N, D\], got \[8\]"),
    (dict(embeddings=T(4, 8, 1)), ValueError, r"embeddings: expected shape \[N, D\], got \[4, 8, 1\]"),
    (dict(weight=T(8)), ValueError, r"weight: expected shape \[C, D\], got \[8\]"),
    (dict(weight=T(6, 8, 1)), ValueError, r"weight: expected shape \[C, D\], got \[6, 8, 1\]"),
    (dict(embeddings=T(4, 8).long()), TypeError, r"embeddings: expected a dtype of float32, .*got torch\.int64"),
    (dict(embeddings=T(4, 8).cfloat()), TypeError, r"embeddings: expected a dtype of float32, .*got torch\.complex64"),
    (
        dict(weight=T(6, 8).double()),
        TypeError,
        r"weight: expected float32 or the dtype of the embeddings .*got torch\.float64",
    ),
    (dict(weight=T(6, 8).half()), TypeError, r"weight: expected float32 .*\(torch\.float32\), got torch\.float16"),
    (
        dict(weight=T(6, 8).bfloat16(), embeddings=T(4, 8).half()),
        TypeError,
        r"weight: expected .*float16\), got torch\.bfloat16",
    ),
    (dict(weight=T(6, 7)), ValueError, r"weight: expected \[C, 8\] to match embeddings \[4, 8\], got \[6, 7\]"),
    (dict(weight=T(8, 6)), ValueError, r"weight: expected \[C, 8\] to match embeddings \[4, 8\], got \[8, 6\]"),
    (dict(weight=T(0, 8)), ValueError, r"weight: expected at least one class and one feature, got shape \[0, 8\]"),
    (
        dict(weight=T(6, 0), embeddings=T(4, 0)),
        ValueError,
        r"weight: expected at least one class and one feature, got .*\[6, 0\]",
    ),
    (dict(embeddings=T(4, 8).to_sparse()), TypeError, r"embeddings: expected a dense tensor, got .*torch\.sparse_coo"),
    (dict(weight=T(6, 8).to_sparse()), TypeError, r"weight: expected a dense tensor, got .*torch\.sparse_coo"),
    (dict(labels=T(4).long().to_sparse()), TypeError, r"labels: expected a dense tensor, got .*torch\.sparse_coo"),
    (
        dict(embeddings=torch.nested.nested_tensor([T(8), T(8)], layout=torch.jagged)),
        TypeError,
        r"embeddings: expected a dense tensor, got .*torch\.jagged",
    ),
    *[
        (
            {name: torch.nested.nested_tensor([T(8), T(8)]).to(dtype)},
            TypeError,
            rf"{name}: expected a dense tensor, got .*nested",
        )
        for name, dtype in (("embeddings", f32), ("weight", f32), ("labels", torch.int64), ("sample_weight", f32))
    ],
    (dict(labels=T(4)), TypeError, r"labels: expected an integer dtype .*got torch\.float32"),
    (dict(labels=T(4).bool()), TypeError, r"labels: expected an integer dtype .*got torch\.bool"),
    (dict(labels=T(3).long()), ValueError, r"labels: expected shape \[4\] or \[4, 1\], got \[3\]"),
    (dict(labels=T(4, 6).long()), ValueError, r"labels: expected shape \[4\] or \[4, 1\], got \[4, 6\]"),
    (dict(labels=T(1, 4).long()), ValueError, r"labels: expected shape \[4\] or \[4, 1\], got \[1, 4\]"),
    (dict(labels=T(()).long()), ValueError, r"labels: expected shape \[4\] or \[4, 1\], got \[\]"),
    *[
        ({"return_stats": bad}, ValueError, r"return_stats: expected False, True or 'rows', got ")
        for bad in (1, "row", T(()), None)
    ],
    (dict(sample_weight=[1.0] * 4), TypeError, r"sample_weight: expected a torch\.Tensor, got list"),
    (dict(sample_weight=T(4).long()), TypeError, r"sample_weight: expected a dtype of float32, .*got torch\.int64"),
    (dict(sample_weight=T(3)), ValueError, r"sample_weight: expected shape \[4\] or \[4, 1\], got \[3\]"),
    (dict(sample_weight=T(())), ValueError, r"sample_weight: expected shape \[4\] or \[4, 1\], got \[\]"),
    (
        dict(sample_weight=T(4, device="meta")),
        ValueError,
        r"sample_weight: expected device cpu \(that of embeddings\), got meta",
    ),
    (dict(weight=T(6, 8, device="meta")), ValueError, r"weight: expected device cpu \(that of embeddings\), got meta"),
    (
        dict(labels=T(4, device="meta").long()),
        ValueError,
        r"labels: expected device cpu \(that of embeddings\), got meta",
    ),
    (dict(reduction="avg"), ValueError, r"reduction: expected one of .*'mean', 'sum', 'none'.*got 'avg'"),
    (dict(reduction=None), ValueError, r"reduction: expected one of .*got None"),
    (dict(ignore_index=1.0), TypeError, r"ignore_index: expected an int, got 1\.0"),
    (dict(ignore_index=True), TypeError, r"ignore_index: expected an int, got True"),
    (dict(ignore_index=None), TypeError, r"ignore_index: expected an int, got None"),
    (dict(ignore_index=2**63), ValueError, r"ignore_index: expected an int of 64 bits, got 9223372036854775808"),
    (dict(ignore_index=-(2**70)), ValueError, r"ignore_index: expected an int of 64 bits, got -1180591620717411303424"),
    *[
        ({"sparse_grad": bad}, TypeError, rf"sparse_grad: expected True or False, got {bad!r}")
        for bad in ("False", None, 1)
    ],
    (dict(backend="cuda"), ValueError, r"backend: expected one of \['auto'.*got 'cuda'"),
    (dict(backend=["native"]), ValueError, r"backend: expected one of \['auto'.*got \['native'\]"),
    (dict(backend=None), ValueError, r"backend: expected one of \['auto'.*got None"),
]
NUMBERS = [
    *[({name: 1e39}, ValueError, rf"{name}: expected a number that float32 can hold, got 1e\+39") for name in ("s", "k", "k_inter", "a", "b")],
    *[({name: bad}, TypeError, rf"{name}: expected a number, got ") for name in ("s", "k", "a", "b") for bad in ("1", None, True)],
    *[({name: bad}, TypeError, rf"{name}: expected a number, got ") for name in ("k_inter", "filter_eps") for bad in ("1", False)],
    ({"s": torch.tensor(64.0)}, TypeError, r"s: expected a number, got tensor\(64\.\)"),
    ({"s": np.array([64.0, 32.0])}, TypeError, r"s: expected a number that a float can hold, got array\("),
    ({"filter_eps": 10**400}, TypeError, r"filter_eps: expected a number that a float can hold, got 1000"),
    *[
        ({name: bad}, ValueError, rf"{name}: expected a finite number, got {bad!r}")
        for name in ("s", "k", "a", "b", "k_inter", "filter_eps")
        for bad in (math.nan, math.inf, -math.inf)
    ],
    *[({name: bad}, ValueError, rf"{name}: expected a number > 0, got {bad!r}") for name in ("s", "k", "k_inter") for bad in (0, -1.5)],
    *[({"filter_eps": bad}, ValueError, rf"filter_eps: expected None or a number in \[0, 1\), got {bad!r}") for bad in (-1e-9, 1, 2.0)],
]  # fmt: skip


def describe(value) -> str:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"{value.dtype} {list(value.shape)} {value.device}"
    return repr(value)


def name_of(change: dict) -> str:
    return ", ".join(f"{name}={describe(value)}" for name, value in change.items())


@pytest.mark.parametrize(
    "change, error, text", ARGUMENTS + NUMBERS, ids=[name_of(c) for c, _, _ in ARGUMENTS + NUMBERS]
)
def test_function(change, error, text):
    with pytest.raises(error, match="^" + text):
        call(**change)


CONSTRUCTOR = [
    ({"in_features": 0}, ValueError, r"in_features: expected an int > 0, got 0"),
    ({"in_features": -3}, ValueError, r"in_features: expected an int > 0, got -3"),
    ({"in_features": 8.0}, TypeError, r"in_features: expected an int, got 8\.0"),
    ({"in_features": True}, TypeError, r"in_features: expected an int, got True"),
    ({"out_features": 0}, ValueError, r"out_features: expected an int > 0, got 0"),
    ({"out_features": "6"}, TypeError, r"out_features: expected an int, got '6'"),
    *[
        ({"dtype": bad}, TypeError, r"dtype: expected a dtype of float32, float16, bfloat16, float64, got ")
        for bad in (torch.int32, torch.complex64, torch.float8_e4m3fn, "float32")
    ],
    *[
        (c, e, t)
        for c, e, t in ARGUMENTS
        if not {"embeddings", "weight", "labels", "backend", "sample_weight", "return_stats"} & set(c)
    ],
    ({"init_std": 1e300}, ValueError, r"init_std: expected a number of at most 1e30, got 1e\+300"),
    ({"angle_histogram": "no"}, TypeError, r"angle_histogram: expected True or False, got 'no'"),
    *NUMBERS,
]


@pytest.mark.parametrize("change, error, text", CONSTRUCTOR, ids=[name_of(change) for change, _, _ in CONSTRUCTOR])
def test_constructor(change, error, text):
    """What is wrong from the start is said at the start, not at the first batch."""
    with pytest.raises(error, match="^" + text):
        SFaceLoss(**{"in_features": 8, "out_features": 6, **change})


def test_one_size_by_two_names():
    for sizes, text in (
        ({"in_features": 8}, "out_features: expected one of out_features and num_classes .*got none"),
        ({"num_classes": 6}, "in_features: expected one of in_features and embedding_size .*got none"),
        (
            {"in_features": 8, "out_features": 6, "num_classes": 6},
            "out_features: expected one of .*got out_features and num_classes",
        ),
        (
            {"in_features": 8, "embedding_size": 8, "num_classes": 6},
            "in_features: expected one of .*got in_features and embedding_size",
        ),
    ):
        with pytest.raises(TypeError, match="^" + text):
            SFaceLoss(**sizes)
    with pytest.raises(ValueError, match=r"^num_classes: expected an int > 0, got 0"):
        SFaceLoss(8, num_classes=0)


def test_constructor_knows_the_backends():
    """A misspelt backend is a misspelt argument, like any other."""
    with pytest.raises(ValueError, match=r"^backend: expected one of \['auto'.*got 'natve'"):
        SFaceLoss(8, 6, backend="natve")


def test_options_are_keywords():
    """Positional options would tie users to their order."""
    with pytest.raises(TypeError, match="positional"):
        sface_loss(T(4, 8), T(6, 8), T(4).long(), 64.0)
    with pytest.raises(TypeError, match="positional"):
        SFaceLoss(8, 6, 64.0)


class TestLabels:
    @pytest.mark.parametrize("label", [-1, -2, -3, 6, 7, -100, 2**31, -(2**31) - 1, 2**62])
    def test_out_of_range(self, case32, label):
        """−1, −2 and −3 stand for something inside the library and must not get there from outside."""
        labels = torch.tensor([0, 5, label, 1], device=case32.device)
        if case32.device == "cuda":
            rows = call(
                embeddings=torch.randn(4, 8, device="cuda"),
                weight=torch.randn(6, 8, device="cuda"),
                labels=labels,
                reduction="none",
                backend=case32.backend,
                ignore_index=-50,
            )
            assert torch.isnan(rows).tolist() == [False, False, True, False]
            return
        text = rf"^labels: expected values in \[0, 6\) or ignore_index=-50, got {label} in row 2 \(1 such rows\)"
        with pytest.raises(ValueError, match=text):
            call(labels=labels, ignore_index=-50, backend=case32.backend)

    def test_first_of_many(self, case32):
        if case32.device != "cpu":
            pytest.skip("labels are checked on the CPU only")
        with pytest.raises(ValueError, match=r"got 9 in row 1 \(3 such rows\)"):
            call(labels=torch.tensor([[0], [9], [-7], [6]]), backend=case32.backend)

    def test_ignore_index_wins_over_a_class(self, case32):
        """ignore_index=0 takes class 0 out of the batch, though 0 is in range."""
        device = case32.device
        rows = call(
            embeddings=torch.randn(4, 8, device=device),
            weight=torch.randn(6, 8, device=device),
            labels=torch.tensor([0, 1, 2, 5], device=device),
            ignore_index=0,
            reduction="none",
            backend=case32.backend,
        )
        assert rows[0] == 0 and rows[1:].all()


class TestBackends:
    def test_an_explicit_name_never_falls_back(self):
        """Native computes in float32: asked for with fp64 it refuses with the reason, however well chunked could serve."""
        x, w = torch.randn(4, 8, dtype=f64), torch.randn(6, 8, dtype=f64)
        with pytest.raises(RuntimeError, match=r"^backend: 'native' cannot run here: .+float64"):
            call(embeddings=x, weight=w, backend="native")
        assert call(embeddings=x, weight=w).dtype == f64
        with pytest.raises(RuntimeError, match=r"^backend: 'native' cannot run here: .+float64"):
            explain("cpu", f64, backend="native")

    def test_fp64_embeddings_with_fp32_weights_are_fp64(self):
        with pytest.raises(RuntimeError, match=r"^backend: 'native' cannot run here: .+float64"):
            call(embeddings=torch.randn(4, 8, dtype=f64), backend="native")
        assert call(embeddings=torch.randn(4, 8, dtype=f64)).dtype == f64

    def test_native_refuses_another_device(self):
        with pytest.raises(RuntimeError, match=r"^backend: 'native' cannot run here: .+cuda"):
            explain("cuda", f32, backend="native")

    def test_explain(self):
        """One line per backend, the chosen one marked, reasons for those that cannot."""
        text = explain("cpu", f64)
        assert "-> chunked" in text and text.count("->") == 1
        assert all(name in text for name in BACKENDS)
        assert "not available" in next(line for line in text.splitlines() if "native" in line)
        assert explain("cpu", backend="reference").count("-> reference") == 1

    @pytest.mark.parametrize("ask", [explain, available_backends])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float32"])
    def test_no_backend_takes_what_the_loss_refuses(self, ask, dtype):
        with pytest.raises(TypeError, match=r"^dtype: expected a dtype of float32"):
            ask("cpu", dtype)
        with pytest.raises(TypeError, match=r"^weight_dtype: expected a dtype of float32"):
            ask("cpu", f32, dtype)

    @pytest.mark.parametrize("ask", [explain, available_backends])
    def test_no_backend_takes_a_pair_that_the_loss_refuses(self, ask):
        for dtype, weight_dtype in ((f32, f64), (torch.bfloat16, f16), (f32, f16)):
            with pytest.raises(TypeError, match=r"^weight_dtype: expected float32 or the dtype of the embeddings"):
                ask("cpu", dtype, weight_dtype)
        with torch.autocast("cpu"):
            ask("cpu", f32, f16)

    def test_explain_checks_the_features(self):
        with pytest.raises(ValueError, match=r"^features: expected an int > 0, got -1"):
            explain(features=-1)

    def test_available_backends(self):
        assert set(available_backends()) <= set(BACKENDS) and {"chunked", "reference"} <= set(available_backends())
        assert "native" not in available_backends("cpu", f64)
        assert available_backends("cpu", f16, f32) == available_backends("cpu", f32)

    def test_auto_takes_the_first_available(self):
        for dtype in (f32, f64, f16):
            assert f"-> {available_backends('cpu', dtype)[0]}" in explain("cpu", dtype)

    @pytest.mark.parametrize("reason", ["interpreter", "distrusted"])
    def test_auto_takes_the_first_available_of_several(self, monkeypatch, reason):
        """Triton can run on a CPU in its interpreter, and where its results were wrong; "auto" passes it by."""
        able = BACKENDS["triton"]._replace(unavailable=lambda _: None)
        monkeypatch.setitem(BACKENDS, "triton", able)
        monkeypatch.setitem(BACKENDS, "native", BACKENDS["native"]._replace(unavailable=lambda _: "not built"))
        device = "cpu" if reason == "interpreter" else "cuda"
        if reason == "distrusted":
            monkeypatch.setitem(dispatch.distrusted, "triton", "wrong")
        assert available_backends(device) == ["chunked", "triton", "reference"]
        assert "-> chunked" in explain(device)
