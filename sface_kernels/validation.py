"""Metadata checks. Each error names the argument, what was expected and what came; nothing here reads tensor data."""

from __future__ import annotations

import math
import operator
import os
from typing import Any

import torch
from torch import Tensor

from .types import HyperParameters

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
REDUCTIONS = ("mean", "sum", "none")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensors(embeddings: Tensor, weight: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> None:
    """Shapes, dtypes and devices of the tensors."""
    check_pair(embeddings, weight)
    check_classes(labels, embeddings, "labels", one_a_row=True)
    if sample_weight is not None:
        _check_plain(sample_weight=sample_weight)
        check_dtype("sample_weight", sample_weight.dtype)
        _check_rows("sample_weight", sample_weight, embeddings)


def _check_plain(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested:
            layout = f"layout {value.layout}" + (", nested" if value.is_nested else "")
            raise TypeError(f"{name}: expected a dense tensor, got one of {layout}")
        if type(value).__name__ == "DTensor":  # by name, as torch.distributed need not be there
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor; a weight that is spread over processes belongs in "
                "sface_kernels.distributed.ClassParallelSFaceLoss"
            )


def check_parameter(weight: Tensor) -> None:
    """That it is the module's own Parameter, which another may replace."""
    _check_plain(weight=weight)
    if not isinstance(weight, torch.nn.Parameter):
        raise TypeError("weight: expected a Parameter, got what a parametrization computes; remove that first")


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a dtype of {_names(FLOAT_DTYPES)}, got {dtype!r}")


def check_weight_dtype(name: str, weight: torch.dtype, embeddings: torch.dtype, device: torch.device) -> None:
    """float32 or that of the embeddings; under autocast half weights with float32 embeddings too, which F.linear would
    cast, and which are taken as they are here."""
    if weight in (torch.float32, embeddings):
        return
    half = weight in (torch.float16, torch.bfloat16)
    if not (half and embeddings == torch.float32 and torch.is_autocast_enabled(device.type)):
        raise TypeError(f"{name}: expected float32 or the dtype of the embeddings ({embeddings}), got {weight}")


def check_pair(embeddings: Tensor, weight: Tensor) -> None:
    """Shapes, dtypes and devices of embeddings and class centres."""
    _check_plain(embeddings=embeddings, weight=weight)
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings: expected shape [N, D], got {list(embeddings.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [C, D], got {list(weight.shape)}")
    check_dtype("embeddings", embeddings.dtype)
    check_weight_dtype("weight", weight.dtype, embeddings.dtype, embeddings.device)
    if weight.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"weight: expected [C, {embeddings.shape[1]}] to match embeddings {list(embeddings.shape)}, "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least one class and one feature, got shape {list(weight.shape)}")
    _check_device("weight", weight, embeddings)


def check_classes(classes: Tensor, embeddings: Tensor, name: str = "classes", one_a_row: bool = False) -> None:
    """Class numbers beside embeddings: one for each row, or any number of columns of them."""
    _check_plain(**{name: classes})
    if classes.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: expected an integer dtype ({_names(LABEL_DTYPES)}), got {classes.dtype}")
    if one_a_row:
        return _check_rows(name, classes, embeddings)
    rows = embeddings.shape[0]
    if classes.dim() not in (1, 2) or classes.shape[0] != rows:
        raise ValueError(f"{name}: expected shape [{rows}] or [{rows}, M], got {list(classes.shape)}")
    _check_device(name, classes, embeddings)


def _check_rows(name: str, value: Tensor, embeddings: Tensor) -> None:
    """A number for each row; for a single row a 0-d tensor will do."""
    rows = embeddings.shape[0]
    if list(value.shape) not in ([rows], [rows, 1]) and not (value.dim() == 0 and rows == 1):
        raise ValueError(f"{name}: expected shape [{rows}] or [{rows}, 1], got {list(value.shape)}")
    _check_device(name, value, embeddings)


def _check_device(name: str, value: Tensor, embeddings: Tensor) -> None:
    if value.device != embeddings.device:
        raise ValueError(f"{name}: expected device {embeddings.device} (that of embeddings), got {value.device}")


def checks_labels(device: torch.device) -> bool:
    """Whether class numbers out of range raise: on a GPU that synchronises, and is left to the environment."""
    return device.type == "cpu" or os.environ.get("SFACE_CHECK_LABELS") == "1"


def size(**names: Any) -> int:
    """The positive int of the one argument that is not None, of several names for the same thing."""
    given = [name for name, value in names.items() if value is not None]
    if len(given) != 1:
        first, *others = names
        got = "none" if not given else " and ".join(given)
        raise TypeError(f"{first}: expected one of {first} and {', '.join(others)} (its other name), got {got}")
    return integer(given[0], names[given[0]], positive=True)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def check_return_stats(return_stats: bool | str) -> None:
    if not (isinstance(return_stats, bool) or (isinstance(return_stats, str) and return_stats == "rows")):
        raise ValueError(f"return_stats: expected False, True or 'rows', got {return_stats!r}")


def boolean(name: str, value: Any) -> bool:
    """A bool, numpy's too: text such as "False" would count as true."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def integer(name: str, value: Any, positive: bool = False) -> int:
    """Whatever `operator.index` takes (numpy's integers too), but no bool and no tensor."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value!r}")
    if positive and number <= 0:
        raise ValueError(f"{name}: expected an int > 0, got {value!r}")
    return number


def finite(name: str, value: Any) -> float:
    """Whatever `float` takes (numpy's numbers too), but no bool, no text and no tensor: its gradient would be lost."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # what torch.compile can trace, first
        refused = isinstance(value, (bool, str, bytes, Tensor))
        if refused or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, OverflowError) as error:  # an array, an int past every float
        raise TypeError(f"{name}: expected a number that a float can hold, got {value!r}") from error
    if not -math.inf < number < math.inf:  # math.isfinite cannot be traced by torch.compile
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """As a float, what `float` takes and is finite and > 0."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def check_init_std(init_std: float | None) -> float | None:
    """Of a new weight; None for the one that follows from its size."""
    if init_std is None:
        return None
    std = positive("init_std", init_std)
    if std > 1e30:  # rows of more would leave float32
        raise ValueError(f"init_std: expected a number of at most 1e30, got {init_std!r}")
    return std


def default_filter_eps(dtype: torch.dtype, features: int) -> float:
    """The coefficient below which `dtype` arithmetic loses an entry beside one of size s.

    One entry, that is: many that share a direction add up to more than rounding. docs/accuracy.md says where the error
    stays within a small multiple of the same-dtype reference's, and where it does not.
    """
    if dtype == torch.float64:
        return 2.0**-53
    if dtype == torch.float32:
        return 2.0**-24
    return 2.0**-12 if features < 256 else 2.0**-16


def make_hyperparameters(
    s: float,
    k: float,
    a: float,
    b: float,
    k_inter: float | None,
    filter_eps: float | None,
    dtype: torch.dtype,
    features: int,
) -> HyperParameters:
    """Checked constants, with the two defaults that depend on something resolved."""
    if filter_eps is None:
        eps = default_filter_eps(dtype, features)
    else:
        eps = finite("filter_eps", filter_eps)
        if not 0 <= eps < 1:
            raise ValueError(f"filter_eps: expected None or a number in [0, 1), got {filter_eps!r}")
    hp = HyperParameters(
        s=positive("s", s),
        k_intra=positive("k", k),
        k_inter=positive("k" if k_inter is None else "k_inter", k if k_inter is None else k_inter),
        a=finite("a", a),
        b=finite("b", b),
        filter_eps=eps,
    )
    if dtype != torch.float64:
        for name, value in (("s", hp.s), ("k", hp.k_intra), ("k_inter", hp.k_inter), ("a", hp.a), ("b", hp.b)):
            if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:
                raise ValueError(f"{name}: expected a number that float32 can hold, got {value!r}")
    return hp
