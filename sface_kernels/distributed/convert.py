"""Class weights from one kind of checkpoint to another: `python -m sface_kernels.distributed.convert SOURCE TARGET`.

Kinds, told by what is there (SOURCE) or by the name (TARGET):

- a file: `torch.save` of a state dict with the whole `weight` `[C, D]`, as `SFaceLoss` and the published module have it
- a directory of `checkpoint_gpu_{rank}.pt`: insightface's Partial FC, each with the rows of its rank under
  `state_dict_softmax_fc`; as a TARGET with `--processes`
- a directory of torch.distributed.checkpoint, which any number of processes loads

Only the weight is converted, no optimizer state and no backbone. One process, and the whole weight in its memory.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .layout import partial_fc_range

PARTIAL_FC_KEY = "state_dict_softmax_fc"


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises what its zip and pickle readers do
        raise ValueError(f"{path}: expected a file of torch.save; torch.load raised {type(error).__name__}") from None


def _take(state: Any, key: str, where: Path) -> Tensor:
    """The matrix under `key` of a state dict."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: expected a state dict, got {type(state).__name__}")
    value = state.get(key)
    if not isinstance(value, Tensor) or value.dim() != 2:
        matrices = [name for name, t in state.items() if isinstance(t, Tensor) and t.dim() == 2]
        raise ValueError(f"{where}: expected a matrix under {key!r}; it has matrices under {matrices}")
    return value


def load_plain(path: Path, key: str = "weight") -> Tensor:
    """The whole weight `[C, D]` of a saved state dict."""
    return _take(_load(path), key, path)


def load_partial_fc(directory: Path) -> Tensor:
    """The whole weight `[C, D]` from the files of all ranks.

    Raises:
        ValueError: files are missing, or their numbers of rows are not those of Partial FC.
    """
    found = {
        int(m[1]): path for path in directory.iterdir() if (m := re.fullmatch(r"checkpoint_gpu_(\d+)\.pt", path.name))
    }
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise ValueError(f"{directory}: expected checkpoint_gpu_{{rank}}.pt of every rank, missing ranks {missing}")
    parts = []
    for rank in range(len(found)):
        state = _load(found[rank])
        if not isinstance(state, Mapping) or PARTIAL_FC_KEY not in state:
            raise ValueError(f"{found[rank]}: expected the key {PARTIAL_FC_KEY!r}")
        parts.append(_take(state[PARTIAL_FC_KEY], "weight", found[rank]))
    total = sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        _, count = partial_fc_range(total, len(parts), rank)
        if len(part) != count or part.shape[1] != parts[0].shape[1] or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{found[rank]}: expected {[count, parts[0].shape[1]]} {parts[0].dtype} as rank {rank} of {len(parts)} "
                f"has with {total} classes, got {list(part.shape)} {part.dtype}; is a rank's file missing?"
            )
    return torch.cat(parts)


def load_dcp(directory: Path, key: str = "weight") -> Tensor:
    """The whole weight `[C, D]` of a checkpoint of torch.distributed.checkpoint."""
    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    matrices = {k: m for k, m in known.items() if isinstance(m, TensorStorageMetadata) and len(m.size) == 2}
    if key not in matrices:
        raise ValueError(f"{directory}: expected a matrix under {key!r}; it has matrices under {list(matrices)}")
    weight = torch.empty(matrices[key].size, dtype=matrices[key].properties.dtype, device="cpu")
    dcp.load({key: weight}, checkpoint_id=directory, no_dist=True)
    return weight


def load_weight(source: Path, key: str = "weight") -> Tensor:
    """The whole weight `[C, D]` of any kind of checkpoint."""
    if source.is_file():
        return load_plain(source, key)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or directory")
    if (source / ".metadata").exists():
        return load_dcp(source, key)
    if any(source.glob("checkpoint_gpu_*.pt")):
        return load_partial_fc(source)
    raise ValueError(f"{source}: expected checkpoint_gpu_{{rank}}.pt files or a torch.distributed.checkpoint directory")


def save_weight(weight: Tensor, target: Path, key: str = "weight", processes: int | None = None) -> str:
    """Write the whole weight `[C, D]`; returns what was written, in words."""
    if processes is not None:
        if processes < 1:
            raise ValueError(f"processes: expected an int > 0, got {processes}")
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise ValueError(f"{target}: expected an empty directory")
        for rank in range(processes):
            first, count = partial_fc_range(len(weight), processes, rank)
            rows = weight[first : first + count].clone()  # a slice would save the whole
            torch.save({PARTIAL_FC_KEY: {"weight": rows}}, target / f"checkpoint_gpu_{rank}.pt")
        return f"Partial FC files of {processes} ranks"
    if target.suffix in (".pt", ".pth"):
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: weight.clone()}, target)
        return f"a state dict with {key!r}"
    dcp.save({key: weight}, checkpoint_id=target, no_dist=True)
    return f"a torch.distributed.checkpoint directory with {key!r}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sface_kernels.distributed.convert",
        description="Convert class weights: plain state dicts, Partial FC's files, torch.distributed.checkpoint.",
    )
    parser.add_argument("source", type=Path, help="a .pt file, or a directory of either kind")
    parser.add_argument("target", type=Path, help="a .pt file, or a directory for torch.distributed.checkpoint")
    parser.add_argument("--key", default="weight", help="name of the weight in the source (default: %(default)s)")
    parser.add_argument("--target-key", default="weight", help="its name in the target (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="write Partial FC files for that many ranks into the target")
    options = parser.parse_args(arguments)
    try:
        weight = load_weight(options.source, options.key)
        written = save_weight(weight, options.target, options.target_key, options.processes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # torch.save hides the system's error in one of several lines
        print(f"error: cannot write {options.target}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{list(weight.shape)} {weight.dtype}: wrote {options.target}, {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
