"""More classes for a weight that an optimizer already holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .pending import pending_of, wait_no_longer


def _has_rows(name: str, state: Tensor, parameter: nn.Parameter) -> bool:
    """Whether an optimizer's state has its parameter's shape, or a number for each row. Adafactor's numbers for each
    column have the shape of a weight of one row."""
    return state.shape in (parameter.shape, (len(parameter), 1)) and name != "col_var"


def replace_parameter(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, grow: Callable[[Tensor], Tensor]
) -> None:
    """Put `new` in the place of `old`, with the state of `old`: what has its shape, or a number for each row, goes
    through `grow`. `new` has no gradient, and none that waits.

    Raises:
        ValueError: the optimizer does not hold `old`.
    """
    places = [
        (group, index)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
        if parameter is old
    ]
    if not places:
        raise ValueError("optimizer: expected one that holds the head's weight")
    for group, index in places:
        group["params"][index] = new
    pending = pending_of(old)
    if pending is not None:
        pending.clear()
        wait_no_longer(old)
        pending.watch(new)
    if old in optimizer.state:
        optimizer.state[new] = {
            name: grow(value) if isinstance(value, Tensor) and _has_rows(name, value, old) else value
            for name, value in optimizer.state.pop(old).items()
        }
