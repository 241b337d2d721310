"""How much memory tensors take at once, whatever device they are on."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations returned and that are still referred to, now and at most. A tensor of stride 0 counts as its one
    element."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes, self.at_peak = 0, 0, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:  # no view
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.sizes[id(tensor)] = (size, list(tensor.shape))
                weakref.finalize(tensor, self._gone, id(tensor))
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, sorted(self.sizes.values(), reverse=True)[:6]
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[0]
