"""Whether a graph is being made of what is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MODES = [getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("PROXY", "FUNCTIONAL", "FAKE")]


def traced(tensor: Tensor | None = None) -> bool:
    """By torch.compile or export, by what works without their front end (AOTAutograd, make_fx), or of a fake
    tensor. Then no data may be read or waited for, and nothing carried from call to call."""
    if torch.compiler.is_compiling():
        return True
    # none of any kind, as nearly always: several calls of each step ask
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES):
        return True
    return isinstance(tensor, FakeTensor)
