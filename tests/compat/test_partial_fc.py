"""`PartialFCSFace` in a loop written as insightface's trainer is, on 1 and 2 processes, and without a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sface_kernels import SFaceLoss
from sface_kernels.compat import partial_fc
from sface_kernels.compat.partial_fc import PartialFCSFace
from sface_kernels.distributed.convert import load_partial_fc
from sface_kernels.distributed.layout import partial_fc_range

ROWS, CLASSES, FEATURES = 16, 7, 8
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}


class Backbone(nn.Module):
    """Ends as insightface's do: the last layer in float32 whatever autocast says."""

    def __init__(self, fp16):
        super().__init__()
        torch.manual_seed(3)
        self.fp16, self.body, self.fc = fp16, nn.Linear(12, 16), nn.Linear(16, FEATURES)

    def forward(self, x):
        with torch.autocast("cpu", torch.float16, enabled=self.fp16):
            x = torch.tanh(self.body(x))
        return self.fc(x.float())


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def loader(step, rank, world):
    """This rank's images and labels; the number of rows varies by step and rank, and is 0 on rank 1 in step 2."""
    g = torch.Generator().manual_seed(40 + step)
    images, labels = torch.randn(ROWS, 12, generator=g), torch.randint(0, CLASSES, (ROWS,), generator=g)
    if world == 1:
        return images, labels
    cut = (ROWS // 2, ROWS // 4, ROWS)[step % 3]
    return (images[:cut], labels[:cut]) if rank == 0 else (images[cut:], labels[cut:])


def trainer(optimizer, fp16, columns, weight, directory=None, steps=4):
    rank, world = rank_and_size()
    backbone: torch.nn.Module = Backbone(fp16)
    if world > 1:
        backbone = DistributedDataParallel(
            backbone, broadcast_buffers=False, bucket_cap_mb=16, find_unused_parameters=True
        )
    backbone.train()
    module_partial_fc = PartialFCSFace(FEATURES, CLASSES, 1.0, False)
    first, count = partial_fc_range(CLASSES, world, rank)
    module_partial_fc.load_state_dict({"weight": weight[first : first + count]})
    module_partial_fc.train()
    opt = OPTIMIZERS[optimizer]([{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}])
    amp = torch.amp.GradScaler("cpu", growth_interval=100, init_scale=1024.0, enabled=fp16)
    losses = []
    for step in range(steps):
        img, local_labels = loader(step, rank, world)
        if columns:
            local_labels = local_labels.unsqueeze(1)
        kept = local_labels.clone()
        loss = module_partial_fc(backbone(img), local_labels)
        assert loss.dim() == 0 and torch.equal(kept, local_labels)
        amp.scale(loss).backward()
        amp.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        amp.step(opt)
        amp.update()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    if directory is not None:
        checkpoint = {"epoch": 1, "state_dict_softmax_fc": module_partial_fc.state_dict()}
        torch.save(checkpoint, directory / f"checkpoint_gpu_{rank}.pt")
    return losses, amp.get_scale(), [p.detach() for p in backbone.parameters()]


def in_plain_words(optimizer, fp16, weight, steps=4):
    """The same training in one process with `SFaceLoss`."""
    backbone, head = Backbone(fp16), SFaceLoss(FEATURES, CLASSES)
    head.load_state_dict({"weight": weight})
    opt, losses = OPTIMIZERS[optimizer]([*backbone.parameters(), *head.parameters()]), []
    for step in range(steps):
        loss = head(backbone(loader(step, 0, 1)[0]), loader(step, 0, 1)[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses, [p.detach() for p in backbone.parameters()], head.weight.detach()


@pytest.fixture
def weight():
    return torch.randn(CLASSES, FEATURES)


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainer(pool, tmp_path, weight, optimizer, fp16):
    losses, backbone, trained = in_plain_words(optimizer, fp16, weight)
    # the half-precision body rounds scaled gradients where the plain loop rounds unscaled ones
    tolerance = dict(rtol=2e-2, atol=2e-3) if fp16 else dict(rtol=1e-4, atol=1e-5)
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        directory.mkdir()
        results = pool.run(processes, trainer, optimizer, fp16, processes == 2, weight, directory)
        for theirs, scale, parameters in results:
            assert theirs == results[0][0], "ranks report different losses"
            assert theirs == pytest.approx(losses, rel=1e-2 if fp16 else 1e-5)
            assert scale == (1024.0 if fp16 else 1.0)
            for ours, plain in zip(parameters, backbone, strict=True):
                torch.testing.assert_close(ours, plain, **tolerance)
        torch.testing.assert_close(load_partial_fc(directory), trained, **tolerance)


def test_without_a_process_group(weight):
    losses, _, _ = in_plain_words("SGD", False, weight)
    assert trainer("SGD", False, True, weight)[0] == pytest.approx(losses, rel=1e-5)


def overflow(weight):
    """One rank's embeddings overflow: every rank skips the step of backbone and head, and keeps the same scale."""
    rank, world = rank_and_size()
    backbone = DistributedDataParallel(Backbone(False))
    head = PartialFCSFace(FEATURES, CLASSES)
    opt = OPTIMIZERS["SGD"]([{"params": backbone.parameters()}, {"params": head.parameters()}])
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    img, labels = loader(0, rank, world)
    if rank == 1:
        img[0] = torch.inf
    before = [p.detach().clone() for p in (*backbone.parameters(), *head.parameters())]
    amp.scale(head(backbone(img), labels)).backward()
    amp.step(opt)
    amp.update()
    after = [*backbone.parameters(), *head.parameters()]
    return amp.get_scale(), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_overflow(pool, weight):
    assert pool.run(2, overflow, weight) == [(512.0, True)] * 2


def half_products(weight):
    rank, world = rank_and_size()
    first, count = partial_fc_range(CLASSES, world, rank)
    results = []
    for fp16 in (False, True):
        head = PartialFCSFace(FEATURES, CLASSES, fp16=fp16, filter_eps=0.0)
        head.load_state_dict({"weight": weight[first : first + count]})
        x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        loss = head(x, torch.arange(5))
        loss.backward()
        assert x.grad.dtype == head.weight.grad.dtype == torch.float32
        results.append((loss.detach(), x.grad, head.weight.grad))
    full, half = results
    assert not torch.equal(full[0], half[0])
    for a, b in zip(full, half, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(a.norm()))


def test_fp16_products(pool, weight):
    pool.run(2, half_products, weight)


def ranks_that_disagree():
    rank, _ = rank_and_size()
    with pytest.raises(ValueError, match=r"^fp16: expected the same on every process"):
        PartialFCSFace(FEATURES, CLASSES, fp16=rank == 1)
    with pytest.raises(
        ValueError, match=r"^s: expected the same on every process, got 64.0 on rank 0 and 32.0 on rank 1"
    ):
        PartialFCSFace(FEATURES, CLASSES, s=32.0 if rank == 1 else 64.0)
    head = PartialFCSFace(FEATURES, CLASSES)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):  # of another number of ranks or classes
        head.load_state_dict({"weight": torch.zeros(CLASSES, FEATURES)})
    labels = torch.tensor([0, CLASSES if rank == 1 else 0])
    with pytest.raises(
        ValueError if rank == 1 else RuntimeError, match=r"got 7 in row 1" if rank == 1 else "rank 1 raised"
    ):
        head(torch.randn(2, FEATURES), labels)


def a_rank_outside():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match="process_group: this process is not in it"):
            PartialFCSFace(8, 7, process_group=group)


def test_bad_input(pool):
    pool.run(2, ranks_that_disagree)
    pool.run(2, a_rank_outside)
    for arguments, error, text in (
        ((8, 0), ValueError, "num_classes: expected an int > 0"),
        ((8, 7, 0.0), ValueError, r"sample_rate: expected a number in \(0, 1\]"),
        ((8, 7, "all"), TypeError, "sample_rate: expected a number"),
    ):
        with pytest.raises(error, match=text):
            PartialFCSFace(*arguments)
    with pytest.raises(ValueError, match="backend: expected one of"):
        PartialFCSFace(8, 7, backend="fast")


def test_interface():
    head = PartialFCSFace(FEATURES, CLASSES, 1.0, False, s=32.0, a=0.87, b=1.2)
    assert list(head.state_dict()) == ["weight"] and head.weight.shape == (CLASSES, FEATURES)
    assert "num_local=7" in repr(head) and "a=0.87" in repr(head)
    assert PartialFCSFace(64, 500, init_std=0.125).weight.std().item() == pytest.approx(0.125, rel=0.03)


def sampled_in_two():
    """A sampled step: the batch's classes always get gradients, rows that were not drawn get exact zeros."""
    rank, world = rank_and_size()
    classes = 40
    head = PartialFCSFace(FEATURES, classes, 0.25, filter_eps=0.0)
    labels = torch.tensor([3, 39] if rank == 0 else [21, 3, 5])
    head(torch.randn(len(labels), FEATURES), labels).backward()
    moved = head.weight.grad.any(1).nonzero().squeeze(1) + head.class_start
    first, count = partial_fc_range(classes, world, rank)
    positives = [c for c in (3, 5, 21, 39) if first <= c < first + count]
    assert set(positives) <= set(moved.tolist())
    assert len(moved) == len(positives) + -(-(count - len(positives)) // 4)
    head.eval()
    head.zero_grad()
    head(torch.randn(len(labels), FEATURES), labels).backward()
    assert head.weight.grad.any(1).all(), "eval() compares with every class"


def test_sampling(pool):
    pool.run(2, sampled_in_two)


def test_the_initial_size_is_that_of_all_classes(monkeypatch):
    monkeypatch.setattr(partial_fc, "partial_fc_range", lambda classes, *_: (0, classes // 16))
    head = PartialFCSFace(64, 16_000)
    assert float(head.weight.detach().std()) == pytest.approx(2 * (2 / 16_000) ** 0.5, rel=0.05)


def test_fp16_leaves_float64_as_it_is():
    head = PartialFCSFace(8, 20, fp16=True).double()
    assert head(torch.randn(3, 8, dtype=torch.float64), torch.arange(3)).dtype == torch.float64


def disagreeing(option):
    values = {"sample_rate": (0.5, 0.6), "init_std": (0.1, 0.2), "fp16": (True, False)}[option]
    with pytest.raises(ValueError, match=f"{option}: expected the same on every process"):
        PartialFCSFace(8, 20, **{option: values[dist.get_rank()]})


@pytest.mark.parametrize("option", ["sample_rate", "init_std", "fp16"])
def test_processes_that_disagree(pool, option):
    pool.run(2, disagreeing, option)
