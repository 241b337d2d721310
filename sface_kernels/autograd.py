"""The one autograd Function behind every backend, and the function that calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import verify
from .dispatch import BACKENDS
from .ops import prepare_labels
from .pending import PendingGradient, WeightGradient, pending_of
from .tracing import traced
from .types import IGNORED, HyperParameters


class RaiseOnSecondBackward(torch.autograd.Function):
    """Identity on a gradient, whose own backward raises. What the gradient was computed from comes along, so that there
    is a graph to walk where the upstream gradient is a constant too; once_differentiable has none there."""

    generate_vmap_rule = True  # jacrev batches the upstream gradient

    @staticmethod
    def forward(grad: Tensor, *computed_from: Tensor | None) -> Tensor:
        return grad.detach()  # sparse ones have no views

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError("sface_loss: differentiable once, its gradient was differentiated again")


class _LetWait(torch.autograd.Function):
    """Identity on a weight. Autograd runs its backward only where the weight's gradient is asked for: what `_RowLoss`
    found joins the gradients that wait then. No tensor passes through it backwards."""

    @staticmethod
    def forward(weight: Tensor, pending: PendingGradient, found: list[WeightGradient]) -> Tensor:
        return weight.detach()  # no view that autograd would track: steps change the weight in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.pending, ctx.found = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        while ctx.found:
            ctx.pending.add(ctx.found.pop())
        return None, None, None


class Labels(NamedTuple):
    """How `ops.prepare_labels` is to take labels, where the backend does not take them as they are."""

    ignore_index: int
    check: bool


class _Options(NamedTuple):
    """What `_RowLoss` is given beside tensors; one argument, as PyTorch looks at each of them in every call."""

    backend: str
    hp: HyperParameters
    need_x: bool
    need_w: bool
    sparse: bool
    found: list[WeightGradient] | None
    strict: bool
    reduction: str
    labels: Labels | None  # what the target is made of; None where it is given
    made: list[Any] | None  # where a forward may leave what it has made of ∂w, for the first backward


RETURNED = 7  # of the outputs of `_forward`; the others are saved alone


def _forward(embeddings: Tensor, weight: Tensor, target: Tensor, options: _Options) -> tuple[Tensor, ...]:
    """A backend's `types.Forward` as a flat tuple: reduced row losses, which have a gradient, and the rest as it is."""
    backend, hp, need_x, need_w, *_, reduction, labels, made = options
    raw: dict[str, Any] = {}
    if labels is not None:
        if BACKENDS[backend].takes_labels and not labels.check:
            target, raw = target.flatten().contiguous(), {"ignore_index": labels.ignore_index}
        else:
            target = prepare_labels(target, weight.shape[0], *labels)
    if made is not None and BACKENDS[backend].finish is not None:
        raw["reduction"] = reduction
    result = verify.forward(backend, embeddings, weight, target, hp, need_x, need_w, **raw)
    loss, *others, saved, counted, prepared, of_weight, _ = result
    if made is not None and of_weight is not None:
        made.append(of_weight)
    if prepared is not None:
        target = prepared
    elif labels is None:
        target = target.view_as(target)  # an output that is no input
    if counted is None:
        counted = (target != IGNORED).sum().clamp_min(1)  # 1 avoids 0/0 where all are ignored
    if reduction != "none":
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / counted
    return (loss, counted, target, *others, *saved)


class _RowLoss(torch.autograd.Function):
    """`_forward` and its gradient.

    A backend's forward leaves ∂l_i/∂x_i complete, as the coefficients of (6) are constants; the upstream gradient
    u_i enters only in the backward, per row, so any reduction and any number of backward calls are right. The mean is
    taken here: on a GPU every operation, and every one of its gradient, is a launch.

    Of ∂w of a mean or a sum a forward may make a part, or all but for the one u. That is no saved tensor: the first
    backward takes it, to finish it in place and give it away, and any other computes ∂w from what is saved.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _forward(*inputs)
        _RowLoss._keep(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*outputs[1:RETURNED])
        return outputs[:RETURNED]

    @staticmethod
    def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        embeddings, weight, _, options = inputs
        _, counted, target, _, _, _, row_grad_x, *saved = output
        for_weight = (weight, *saved) if options.need_w else (None,)
        for_embeddings = row_grad_x if options.need_x and ctx.needs_input_grad[0] else None
        ctx.options = options
        ctx.save_for_backward(target, counted, embeddings, for_embeddings, *for_weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        if not torch.is_grad_enabled():
            return *_RowLoss._gradients(ctx, upstream, *ctx.saved_tensors), None, None
        _, _, embeddings, _, weight, *_ = saved = ctx.saved_tensors  # create_graph=True
        with torch.no_grad():
            grads = _RowLoss._gradients(ctx, upstream, *saved)
        made = (g if g is None else RaiseOnSecondBackward.apply(g, embeddings, weight, upstream) for g in grads)
        return *made, None, None

    @staticmethod
    def _gradients(
        ctx: Any,
        upstream: Tensor,
        target: Tensor,
        counted: Tensor,
        embeddings: Tensor,
        row_grad_x: Tensor | None,
        weight: Tensor | None,
        *saved: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        backend, hp, _, need_w, sparse, found, strict, reduction, _, made = ctx.options
        early = made.pop() if made and not traced() else None
        # compiled, or a batch: the backward may not look at it
        one = upstream if made is not None and not verify.is_batched(upstream) else None
        if found is not None and reduction == "sum":
            upstream = upstream.clone()  # its owner may write to it before the step; other reductions compute a new one
        grad_row = (upstream / counted if reduction == "mean" else upstream).expand(target.shape)  # [N]
        # 0 · NaN is NaN: an ignored row's upstream gradient must not be multiplied by its zeros
        counting = grad_row.masked_fill(target == IGNORED, 0)
        if reduction == "none":
            grad_row = counting  # else one element of memory, which backends make use of
        grad_x = grad_w = None
        if row_grad_x is not None:
            factor = counting.unsqueeze(1)  # [N, 1]
            if row_grad_x.dtype == embeddings.dtype or verify.is_batched(counting):
                grad_x = (row_grad_x * factor).to(embeddings.dtype)  # [N, D], (7)
            else:  # in one operation
                grad_x = torch.mul(row_grad_x, factor, out=torch.empty_like(row_grad_x, dtype=embeddings.dtype))
        if need_w and ctx.needs_input_grad[1]:
            assert weight is not None
            gradient = WeightGradient(backend, hp, embeddings, weight, target, grad_row, saved, strict)
            if found is not None:  # what waits must not keep the graph
                found[:] = [gradient._replace(x=embeddings.detach(), w=weight.detach())]
            else:
                grad_w = gradient.sparse() if sparse else gradient.dense(early, one)  # [C, D], (8)
        return grad_x, grad_w

    @staticmethod
    def vmap(info: Any, in_dims: Any, *_: Any) -> Any:
        raise RuntimeError(
            "sface_loss: torch.func.vmap cannot batch it; the rows of one call are independent, so give it all of them "
            'as embeddings [N, D] with reduction="none"'
        )


class _Transformable(_RowLoss):
    """The same for compilers and torch.func, which want forward without a context. For each call of such a Function
    PyTorch looks its signature up, a twentieth of the host's time of a small step."""

    forward = staticmethod(_forward)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _RowLoss._keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])


def row_losses(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    hp: HyperParameters,
    strict: bool = True,
    pending: PendingGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses `[N]` of equation (5), differentiable in the embeddings `[N, D]` and the weight `[C, D]`; beside them
    row statistics `[6, N]` (`types.RowStats`), the hardest other class `[N]` and counts `[2]` (`types.Forward`).

    `target` `[N]` is what `ops.prepare_labels` makes of labels. Where `verify` finds the backend wrong, `strict`
    raises, and otherwise `chunked` takes over. The gradient of the weight waits in `pending`, or in
    `pending.pending_of(weight)`, where there is one, and is else a dense one.
    """
    need_x = torch.is_grad_enabled() and embeddings.requires_grad
    outputs = _apply(embeddings, weight, target, backend, hp, need_x, strict, pending=pending)
    row_loss, _, _, row_stats, hardest_class, counts, *_ = outputs
    return row_loss, row_stats, hardest_class, counts


def reduced_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    how: Labels,
    backend: str,
    hp: HyperParameters,
    reduction: str,
    strict: bool = True,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`row_losses` of labels `[N]`, `[N, 1]` or 0-d, reduced by "mean" over the rows that are not ignored, "sum" or
    "none"; how many those rows are, at least 1, as int64; the target `[N]`; then the statistics."""
    need_x = torch.is_grad_enabled() and embeddings.requires_grad
    outputs = _apply(embeddings, weight, labels, backend, hp, need_x, strict, sparse, reduction, how)
    return outputs[:6]  # type: ignore[return-value]


def row_losses_and_grad_x(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    hp: HyperParameters,
    strict: bool,
    pending: PendingGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`row_losses`, differentiable in the weight alone, and beside them ∂l_i/∂x_i `[N, D]`, at least float32."""
    outputs = _apply(embeddings.detach(), weight, target, backend, hp, True, strict, pending=pending)
    row_loss, _, _, row_stats, hardest_class, counts, row_grad_x, *_ = outputs
    return row_loss, row_stats, hardest_class, counts, row_grad_x


def weight_without_rows(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    hp: HyperParameters,
    pending: PendingGradient | None = None,
) -> Tensor:
    """A weight `[0, D]` whose gradient waits as that of `row_losses`: it has no rows, but an optimizer has to know that
    there was a backward."""
    pending = _where_to_wait(weight, pending)
    if pending is None:
        return weight
    x = embeddings.detach()
    return _LetWait.apply(
        weight, pending, [WeightGradient(backend, hp, x, weight.detach(), target, x.new_zeros(len(x)), ())]
    )


def _where_to_wait(weight: Tensor, pending: PendingGradient | None) -> PendingGradient | None:
    # a compiled backward cannot leave anything but gradients: an optimizer takes the dense one then
    if traced() or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    return pending_of(weight) if pending is None else pending


def _apply(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    hp: HyperParameters,
    need_x: bool,
    strict: bool,
    sparse: bool = False,
    reduction: str = "none",
    labels: Labels | None = None,
    pending: PendingGradient | None = None,
) -> tuple[Tensor, ...]:
    in_transform = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and in_transform:
        # PyTorch issue 193279: the compiler would differentiate what is in its forward, which gives zeros
        raise RuntimeError(
            "sface_loss: torch.compile loses its gradient inside torch.func.grad, vjp and other transforms; leave out "
            "the compiler there, or use autograd (loss.backward(), torch.autograd.grad) with it"
        )
    need_w = torch.is_grad_enabled() and weight.requires_grad
    pending = _where_to_wait(weight, pending)
    found: list[WeightGradient] | None = None
    if pending is not None:
        found = []
        weight = _LetWait.apply(weight, pending, found)
    eager = not (in_transform or traced())
    function = _RowLoss if eager else _Transformable
    may_make = need_w and pending is None and not sparse and reduction != "none"
    # compilers and transforms would not see what is kept in a list
    made: list[Any] | None = [] if may_make and eager else None
    options = _Options(backend, hp, need_x, need_w, sparse, found, strict, reduction, labels, made)
    try:
        return function.apply(embeddings, weight, target, options)
    except verify.WrongResult as error:
        if strict:
            raise
        verify.distrust(backend, error)
        return function.apply(embeddings, weight, target, options._replace(backend="chunked"))
