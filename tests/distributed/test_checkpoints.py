"""Checkpoints that another number of processes loads, and what other projects' checkpoints become."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from sface_kernels import SFaceLoss
from sface_kernels.distributed import ClassParallelSFaceLoss
from sface_kernels.distributed.convert import load_weight, main, save_weight
from sface_kernels.distributed.layout import partial_fc_range
from tests.distributed.batches import make_head, single
from tests.distributed.test_training import CLASSES, FEATURES, OPTIMIZERS, ROWS, bounds
from tests.support.cases import ROOT, f64
from tests.support.problems import trained_problem

STEPS = 3  # between two checkpoints


def start_weight():
    return trained_problem(ROWS, CLASSES, FEATURES).w.double()


def batch(step):
    g = torch.Generator().manual_seed(500 + step)
    return torch.randn(ROWS, FEATURES, generator=g, dtype=f64), torch.randint(0, CLASSES, (ROWS,), generator=g)


def go_on(optimizer_name, first_step, load, save):
    """STEPS steps from a checkpoint to the next, on this number of processes; the losses."""
    head = make_head(start_weight() if load is None else torch.zeros(CLASSES, FEATURES, dtype=f64))
    optimizer = OPTIMIZERS[optimizer_name](head.parameters())
    if load is not None:
        # a fresh optimizer has no state to load into; get_state_dict makes it
        weights, states = get_state_dict(head, optimizer)
        dcp.load({"head": weights, "optimizer": states}, checkpoint_id=load)
        set_state_dict(head, optimizer, model_state_dict=weights, optim_state_dict=states)
    losses = []
    for step in range(first_step, first_step + STEPS):
        x, labels = batch(step)
        mine = bounds("uneven")
        loss = head(x[mine], labels[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights, states = get_state_dict(head, optimizer)
    dcp.save({"head": weights, "optimizer": states}, checkpoint_id=save)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_on_other_numbers_of_processes(pool, tmp_path, optimizer):
    """4 → 1 → 3 → 2 processes continue the curve of one process that never stopped, optimizer state included."""
    curve, source = [], None
    for index, processes in enumerate((4, 1, 3, 2)):
        target = tmp_path / f"after{index}"
        results = pool.run(processes, go_on, optimizer, index * STEPS, source, target)
        curve += results[0]
        source = target

    head = single(start_weight())
    whole, steps = OPTIMIZERS[optimizer](head.parameters()), []
    for step in range(4 * STEPS):
        loss = head(*batch(step))
        loss.backward()
        whole.step()
        whole.zero_grad()
        steps.append(float(loss.detach()))
    assert curve == pytest.approx(steps, rel=1e-9)
    assert max(abs(a - b) for a, b in itertools.pairwise(steps)) > 0.1, "nothing was learnt"
    exported = load_weight(source, "head.weight")
    torch.testing.assert_close(exported, head.weight.detach(), rtol=1e-9, atol=1e-11)
    SFaceLoss(FEATURES, CLASSES, dtype=f64).load_state_dict({"weight": exported})


def other_classes(directory):
    head = make_head(torch.zeros(CLASSES + 1, FEATURES, dtype=f64))
    with pytest.raises(dcp.api.CheckpointException, match=r"(?s)Size mismatch.*\[13, 8\].*\[14, 8\]"):
        dcp.load({"weight": head.weight}, checkpoint_id=directory)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*\[13, 8\].*\[14, 8\]"):
        head.load_state_dict({"weight": start_weight()})


def test_another_number_of_classes(pool, tmp_path):
    save_weight(start_weight(), tmp_path / "dcp")
    pool.run(2, other_classes, tmp_path / "dcp")


def whole_state(directory):
    """The full state on rank 0 alone, and what a plain file gives every rank, mapped rather than read."""
    w = start_weight()
    head = make_head(w)
    state, _ = get_state_dict(head, [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert torch.equal(state["weight"], w)
        torch.save(state, directory / "head.pt")
    dist.barrier()
    for load in (
        lambda h: h.load_state_dict(torch.load(directory / "head.pt", weights_only=True, mmap=True)),
        lambda h: set_model_state_dict(
            h,
            state if dist.get_rank() == 0 else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        ),
    ):
        other = ClassParallelSFaceLoss(FEATURES, CLASSES, dtype=f64)
        load(other)
        assert torch.equal(other.full_weight(), w)


def test_plain_files(pool, tmp_path):
    pool.run(4, whole_state, tmp_path)


def partial_fc_files(directory, counts, d=4):
    """As insightface's trainer writes them, other contents included."""
    whole = torch.randn(sum(counts), d)
    directory.mkdir()
    for rank, part in enumerate(whole.split(counts)):
        content = {"epoch": 3, "global_step": 70, "state_dict_backbone": {"a": torch.ones(2, 2)}}
        torch.save(
            content | {"state_dict_softmax_fc": {"weight": part.clone()}}, directory / f"checkpoint_gpu_{rank}.pt"
        )
    return whole


@pytest.mark.parametrize("counts", [(7,), (3, 3, 3), (4, 4, 3), (3, 2, 2, 2, 2), (1, 1, 0)])
def test_partial_fc_files(tmp_path, counts):
    whole = partial_fc_files(tmp_path / "theirs", counts)
    assert torch.equal(load_weight(tmp_path / "theirs"), whole)
    assert main([str(tmp_path / "theirs"), str(tmp_path / "plain.pt")]) == 0
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert list(plain) == ["weight"] and torch.equal(plain["weight"], whole)
    assert main([str(tmp_path / "plain.pt"), str(tmp_path / "back"), "--processes", str(len(counts))]) == 0
    for rank, part in enumerate(whole.split(counts)):
        file = tmp_path / "back" / f"checkpoint_gpu_{rank}.pt"
        ours = torch.load(file, weights_only=True)["state_dict_softmax_fc"]
        assert list(ours) == ["weight"] and torch.equal(ours["weight"], part)
        assert ours["weight"].untyped_storage().nbytes() == part.numel() * 4, "the whole weight was saved"


def loads_dcp(directory, whole):
    head = ClassParallelSFaceLoss(whole.shape[1], len(whole))
    dcp.load({"head.weight": head.weight}, checkpoint_id=directory)
    assert torch.equal(head.full_weight(), whole)


def test_partial_fc_to_any_number_of_processes(pool, tmp_path):
    """By the command: per-rank files of three processes, loaded by two."""
    whole = partial_fc_files(tmp_path / "theirs", (4, 4, 3))
    command = [
        sys.executable,
        "-m",
        "sface_kernels.distributed.convert",
        "theirs",
        "dcp",
        "--target-key",
        "head.weight",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and "[11, 4] torch.float32: wrote dcp" in done.stdout, done.stderr
    pool.run(2, loads_dcp, tmp_path / "dcp", whole)
    assert torch.equal(load_weight(tmp_path / "dcp", "head.weight"), whole)


def test_what_cannot_be_converted(tmp_path, capsys):
    def error(*arguments):
        assert main([*map(str, arguments)]) == 1
        return capsys.readouterr().err

    whole = partial_fc_files(tmp_path / "theirs", (4, 4, 3))
    assert "no such file or directory" in error(tmp_path / "none", tmp_path / "x.pt")
    assert "expected checkpoint_gpu_{rank}.pt files" in error(tmp_path, tmp_path / "x.pt")
    file = tmp_path / "theirs" / "checkpoint_gpu_1.pt"
    state = torch.load(file, weights_only=True)
    half = {"weight": state["state_dict_softmax_fc"]["weight"].half()}
    torch.save(state | {"state_dict_softmax_fc": half}, file)
    assert "float32 as rank 1" in error(tmp_path / "theirs", tmp_path / "x.pt")
    file.unlink()
    assert "missing ranks [1]" in error(tmp_path / "theirs", tmp_path / "x.pt")
    partial_fc_files(tmp_path / "odd", (5, 3, 3))
    assert "expected [4, 4]" in error(tmp_path / "odd", tmp_path / "x.pt")
    torch.save({"epoch": 1}, tmp_path / "odd" / "checkpoint_gpu_0.pt")
    assert "expected the key 'state_dict_softmax_fc'" in error(tmp_path / "odd", tmp_path / "x.pt")
    torch.save({"head.weight": whole}, tmp_path / "other.pt")
    assert "under 'weight'; it has matrices under ['head.weight']" in error(tmp_path / "other.pt", tmp_path / "x.pt")
    torch.save([1], tmp_path / "list.pt")
    assert "expected a state dict, got list" in error(tmp_path / "list.pt", tmp_path / "x.pt")
    save_weight(whole, tmp_path / "dcp")
    assert "under 'head.weight'; it has matrices under ['weight']" in error(
        tmp_path / "dcp", tmp_path / "x.pt", "--key", "head.weight"
    )
    (tmp_path / "text.pt").write_text("text")
    assert "text.pt: expected a file of torch.save" in error(tmp_path / "text.pt", tmp_path / "x.pt")
    (tmp_path / "folder.pt").mkdir()
    written = error(tmp_path / "other.pt", tmp_path / "folder.pt", "--key", "head.weight")
    assert "folder.pt" in written and written.count("\n") == 1
    assert "expected an empty directory" in error(
        tmp_path / "other.pt", tmp_path / "dcp", "--key", "head.weight", "--processes", 2
    )
    assert not (tmp_path / "x.pt").exists()


def test_ranges_of_partial_fc():
    for classes, processes in ((10, 4), (3, 4), (12, 4), (0, 3), (7, 1)):
        ranges = [partial_fc_range(classes, processes, rank) for rank in range(processes)]
        assert [c for first, count in ranges for c in range(first, first + count)] == list(range(classes))
        assert [count for _, count in ranges] == [
            classes // processes + (r < classes % processes) for r in range(processes)
        ]
