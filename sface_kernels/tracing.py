"""Whether a graph is being made of what is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MODES = [getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("PROXY", "FUNCTIONAL", "FAKE")]


def traced(*tensors: Tensor) -> bool:
    """By torch.compile or export, by what works without their front end (AOTAutograd, make_fx), or of fake
    tensors. Then no data may be read or waited for, and nothing carried from call to call."""
    if torch.compiler.is_compiling():
        return True
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES):
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)
