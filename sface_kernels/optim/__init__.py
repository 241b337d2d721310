"""Optimizers of a head's weight that need no ∂w `[C, D]`: they take the lists of active pairs that say what it is.

    head = SFaceLoss(512, 85_742)
    optimizer = HeadSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)

From here on a backward through the head leaves its lists with the optimizer, and `head.weight.grad` None. `step()` goes
through the classes once, block by block: it adds up a block's gradient and moves the block's rows and their state. The
update is torch.optim's on the dense gradient up to rounding, and so are arguments, `param_groups` and `state_dict()`:
load one's state into the other to change over at any step (`release()` before the change back).

- Several backwards before a step add up, each keeping its embeddings and lists until then. A step takes them all;
  nothing waits after it. `zero_grad()` of this optimizer drops what waits, `zero_grad()` of a module cannot.
- Clip by `max_norm`, or by `grad_norm()` and `scale_grad()` where the norm has to count other parameters too.
  `torch.nn.utils.clip_grad_norm_` sees no gradient; a weight that is a plain parameter warns it.
- `GradScaler.step` works. `GradScaler.unscale_` has nothing to divide, and the step after it raises: leave it out.
- Hooks on the weight's gradient are not called, and `torch.autograd.grad` of the weight finds none: what its backward
  came by waits all the same.
- The gradient is made at the step, of the weight and the embeddings as they are then. An in-place operation on either
  in between makes the step raise; writes that PyTorch does not count, to `.data` or to a NumPy array, must come after
  the step.
- What waits is in no state dict: save after a step.
- Of a compiled `SFaceLoss`, with class sampling, or where the weight has other losses too, gradients come as `.grad`,
  dense; the step counts them.
- On `native` the step is one C++ pass; on `triton` it is one kernel where a single backward waits and its forward went
  by lists. Everything else, half weights and a `.grad` beside what waits among it, goes through ∂w in ranges of about
  4 MiB and PyTorch's own update.
"""

from .rules import HeadAdamW, HeadSGD

__all__ = ["HeadAdamW", "HeadSGD"]
