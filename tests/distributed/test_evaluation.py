"""Nearest classes and row statistics over a group, against one process that holds every class."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed.batches import make_head, single, split
from tests.support.cases import f32, f64

PROCESSES = (1, 2, 3, 4)


def nearest(kind, classes, dtype):
    batch = split(kind, (23, classes, 16), dtype)
    batch = batch._replace(x=batch.x.nan_to_num(0.5))  # topk knows no ignored rows
    head, theirs = make_head(batch.w), single(batch.w)
    x, labels = batch.x[batch.mine], batch.labels[batch.mine]
    for k in sorted({1, min(3, classes), classes}):
        ours, whole = head.topk(x.requires_grad_(), k), theirs.topk(batch.x, k)
        assert isinstance(ours, torch.return_types.topk) and not ours.values.requires_grad
        torch.testing.assert_close(ours.values, whole.values[batch.mine])
        assert torch.equal(ours.indices, whole.indices[batch.mine])
    counts = head.topk_correct(x, labels, topk=(1, classes))
    if len(x):
        assert torch.equal(counts, theirs.topk_correct(x.detach(), labels, topk=(1, classes)))
    dist.all_reduce(counts)
    if len(batch.x):
        assert torch.equal(counts, theirs.topk_correct(batch.x, batch.labels, topk=(1, classes)))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("classes", [101, 5, 1])  # 5 leaves the fourth process without classes; 1 all but the first
def test_topk(pool, processes, classes):
    for kind in ("even", "uneven", "nothing"):
        for dtype in (f32, f64):
            pool.run(processes, nearest, kind, classes, dtype)


def rows_of(kind, classes, backend):
    batch = split(kind, (23, classes, 16), f64)
    if classes > 90 and len(batch.x):
        batch.w[[11, 40, 77, 90]] = batch.w[11].clone()  # on different processes: the lowest number counts
        batch.x[:2] = batch.w[11] * 3
        batch.labels[:2] = torch.tensor([0, 11])
    head, theirs = make_head(batch.w, backend=backend), single(batch.w, backend=backend, reduction="none")
    x, labels = batch.x[batch.mine], batch.labels[batch.mine]
    loss, ours = head(x.clone().requires_grad_(), labels, return_stats="rows")
    _, whole = theirs(batch.x, batch.labels, return_stats="rows")
    for name in ours._fields:
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name)[batch.mine], msg=f"{name} {ours} {whole}")
    assert loss.requires_grad and not any(t.requires_grad for t in ours)
    loss.backward()
    return [c for c, label in zip(ours.hardest_class.tolist(), labels.tolist(), strict=True) if label in (0, 11)]


@pytest.mark.parametrize("processes", PROCESSES)
def test_row_statistics(pool, processes):
    for backend in ("reference", "chunked"):
        for classes in (101, 5, 1):
            for kind in ("even", "uneven", "nothing"):
                results = pool.run(processes, rows_of, kind, classes, backend)
                if classes == 101 and kind != "nothing":
                    assert [c for found in results for c in found][:2] == [11, 40]


def rows_beside_a_class_that_is_not_a_number():
    """One shard's NaN is everybody's."""
    batch = split("uneven", (23, 9, 16), f64)
    batch.w[8] = torch.nan
    head, theirs = make_head(batch.w), single(batch.w)
    x, labels = batch.x[batch.mine], batch.labels[batch.mine]
    _, rows = head(x, labels, return_stats="rows")
    _, whole = theirs(batch.x, batch.labels, return_stats="rows")
    assert whole.cos_hardest.isnan().any()
    for name in rows._fields:
        torch.testing.assert_close(getattr(rows, name), getattr(whole, name)[batch.mine], equal_nan=True)
    accuracy = [of(*rows, return_stats=True)[1].accuracy for of, rows in ((head, (x, labels)), (theirs, batch[:3:2]))]
    assert torch.equal(*accuracy)


def test_not_a_number(pool):
    for processes in (2, 3):
        pool.run(processes, rows_beside_a_class_that_is_not_a_number)


def refusals():
    batch = split("even", (24, 9, 16), f64)
    head, (x, labels) = make_head(batch.w), (batch.x[batch.mine], batch.labels[batch.mine])
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match=r"^k: expected at most 9"):
        head.topk(x, 10)
    with pytest.raises((ValueError, RuntimeError), match=r"weight: expected|rank 2 raised an error"):
        head.topk(x[:, 1:] if last else x, 2)
    for ask in (head.topk, lambda rows, k: head.topk_correct(rows, labels, topk=(k,))):
        for wrong in (x.tolist(), None):
            with pytest.raises((TypeError, RuntimeError), match=r"^embeddings: expected a torch.Tensor|rank 2 raised"):
                ask(wrong if last else x, 2)
    with pytest.raises(ValueError, match=r"^embeddings, k: expected the same dtype and k on every process"):
        head.topk(x, 3 if last else 2)
    with pytest.raises(ValueError, match=r"^embeddings, k: expected the same dtype and k on every process"):
        make_head(batch.w.float()).topk(x.bfloat16() if last else x.float(), 2)
    for counts in (0, (), (10,), ("1",)):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"^topk: expected|rank 2 raised"):
            head.topk_correct(x, labels, topk=counts if last else (1, 2))
    if last:
        with pytest.raises(ValueError, match=r"^labels: expected values in \[0, 9\)"):
            head.topk_correct(x, labels + 50, topk=(1,))
    else:
        head.topk_correct(x, labels, topk=(1,))
    with pytest.raises(ValueError, match=r"^return_stats: expected False, True or 'rows'"):
        head(x, labels, return_stats="row")
    for call in (lambda: head.logits(x), lambda: head.cosine(x, labels)):
        with pytest.raises(
            NotImplementedError, match=r"no process holds all classes; give full_weight\(\) to SFaceLoss"
        ):
            call()
    with pytest.raises(TypeError, match="sample_weight"):
        head(x, labels, sample_weight=torch.ones(len(x)))


def test_refusals(pool):
    pool.run(3, refusals)
