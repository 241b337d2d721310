"""Faces in memory: the identity split, what the backbone sees of an image, and the augmentation of training."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DataError(ValueError):
    """The data cannot be trained on. One line: what was expected and what came."""


class FaceSet(NamedTuple):
    """Images with their people."""

    images: Tensor  # [M, H, W] uint8 grey levels
    labels: Tensor  # [M] int64, 0 … number of people − 1
    source: str  # where they come from, for people to read


class Split(NamedTuple):
    """Two face sets without a common identity. Labels of each count from 0."""

    train: FaceSet
    unseen: FaceSet

    @property
    def classes(self) -> int:
        return int(self.train.labels.max()) + 1

    def as_json(self) -> dict[str, int | str]:
        """Where the faces come from, and numbers that tell whether another split is the same."""
        return {
            "source": self.train.source,
            "training_identities": self.classes,
            "training_images": len(self.train.images),
            "unseen_identities": int(self.unseen.labels.max()) + 1,
            "unseen_images": len(self.unseen.images),
            "checksum_of_images": zlib.crc32(self.unseen.images.numpy(), zlib.crc32(self.train.images.numpy())),
            "checksum_of_labels": zlib.crc32(self.unseen.labels.numpy(), zlib.crc32(self.train.labels.numpy())),
        }


def split_identities(faces: FaceSet, val_fraction: float, seed: int) -> Split:
    """Sets `val_fraction` of the identities aside, chosen at random by `seed`, for verification.

    Raises:
        DataError: fewer than two identities on either side, or no two images of one unseen person.
    """
    identities = int(faces.labels.max()) + 1 if len(faces.labels) else 0
    held_out = round(val_fraction * identities)
    for count, purpose in ((identities - held_out, "training"), (held_out, "verification")):
        if count < 2:
            raise DataError(
                f"{faces.source}: expected at least 2 identities for {purpose}, got {count} "
                f"(of {identities}, with --val-fraction {val_fraction:g})"
            )
    order = torch.randperm(identities, generator=torch.Generator().manual_seed(seed))
    unseen = _only(faces, order[:held_out])
    if unseen.labels.bincount().max() < 2:
        raise DataError(f"{faces.source}: expected 2 images of at least one person for verification, got 1 of each")
    return Split(_only(faces, order[held_out:]), unseen)


def _only(faces: FaceSet, identities: Tensor) -> FaceSet:
    identities = identities.sort().values
    rows = torch.isin(faces.labels, identities).nonzero().squeeze(1)
    return FaceSet(faces.images[rows], torch.searchsorted(identities, faces.labels[rows]), faces.source)


def standardise(images: Tensor) -> Tensor:
    """Zero mean and unit deviation per image, `[N, 1, H, W]` float: takes brightness and contrast out."""
    centred = images - images.mean((2, 3), keepdim=True)
    return centred / (images.std((2, 3), keepdim=True) + 0.05)  # 0.05: a blank image stays blank


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Grey levels `[N, H, W]` uint8 → the backbone's input `[N, 1, H, W]` float32, without augmentation."""
    return standardise(images.to(device).float().div(255).unsqueeze(1))


def augment(images: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """The backbone's input with random mirroring, rotation, zoom, shift, contrast, brightness, light and noise.

    Args:
        images: `[N, H, W]` uint8 grey levels.
        device: of the result.
        generator: on the CPU whatever the device, so that a seed means the same images everywhere.

    Returns:
        `[N, 1, H, W]` float32, standardised.
    """
    n, height, width = images.shape

    def uniform(*shape: int, reach: float) -> Tensor:
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * reach

    mirror = torch.rand(n, generator=generator).lt(0.5) * -2.0 + 1  # [N], ±1
    angle, zoom, shift = uniform(reach=0.15), 1 + uniform(reach=0.10), uniform(2, 1, reach=0.10)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    linear = torch.stack((mirror * cos, -mirror * sin, sin, cos), 1).view(n, 2, 2)
    contrast, brightness = 1 + uniform(1, 1, 1, reach=0.2), uniform(1, 1, 1, reach=0.2)
    light_x, light_y = uniform(2, 1, 1, 1, reach=0.3).unbind(1)  # relative, from the middle to an edge
    noise = torch.randn(n, 1, height, width, generator=generator) * 0.03

    grid = F.affine_grid(torch.cat((linear, shift), 2).to(device), [n, 1, height, width], align_corners=False)
    pixels = images.to(device).float().div(255).unsqueeze(1)  # [N, 1, H, W]
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    pixels = pixels * contrast.to(device) + brightness.to(device)
    across = torch.linspace(-1, 1, width, device=device)
    down = torch.linspace(-1, 1, height, device=device).unsqueeze(1)
    pixels = pixels * (1 + light_x.to(device) * across + light_y.to(device) * down) + noise.to(device)
    return standardise(pixels)


def batches(images: int, batch_size: int, generator: torch.Generator, least: int = 2) -> list[Tensor]:
    """One epoch's rows in random order, a tensor of indices per step; the last may be smaller.

    A last batch of fewer than `least` rows is left out: batch normalisation has no variance in one row.
    """
    parts = torch.randperm(images, generator=generator).split(batch_size)
    return [part for part in parts if len(part) >= least]


def steps_per_epoch(images: int, batch_size: int, least: int = 2) -> int:
    """Length of `batches(images, batch_size, …, least)`, for a batch size of `least` or more."""
    return images // batch_size + (images % batch_size >= least)
