"""Gradient clipping over plain and sharded parameters together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..pending import pending_of


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a backbone and a class-parallel head together, by their common norm.

    PyTorch's own takes either plain parameters or those of one device mesh, not a mixture. Every process must call
    it; plain gradients must be the same on every process, as DistributedDataParallel leaves them.

    Returns:
        The norm before clipping, 0-d, the same on every process.

    Raises:
        RuntimeError: a gradient waits in an optimizer of `sface_kernels.optim`, which clips it itself.
    """
    kinds: dict[object, list[Tensor]] = {}
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if pending_of(parameter):
            raise RuntimeError(
                "parameters: expected gradients, got a head's weight whose gradient waits in its optimizer; give that "
                "optimizer max_norm, or its scale_grad the factor that its grad_norm() and the others' norm make"
            )
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            kinds.setdefault(mesh, []).append(parameter)
    norms = []
    for group in kinds.values():
        norm = torch.nn.utils.get_total_norm([_with_a_row(p.grad) for p in group if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.zeros((), device="cpu")
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    for group in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _with_a_row(grad: Tensor) -> Tensor:
    """A row of zeros where this process holds none: PyTorch has no largest entry of nothing, and raises on this process
    while the others wait for it."""
    if not isinstance(grad, DTensor) or len(grad.to_local()) > 0:
        return grad
    row = grad.to_local().new_zeros(1, *grad.shape[1:])
    return DTensor.from_local(
        row, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )
