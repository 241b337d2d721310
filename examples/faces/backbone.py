"""A small residual network for small grey faces."""

from __future__ import annotations

from torch import Tensor, nn

from .cartoon import HEIGHT, WIDTH


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the first of stride 2, beside a strided 1×1 one."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, 2, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu_()


class FaceNet(nn.Module):
    """Embeddings of faces: `[N, 1, HEIGHT, WIDTH]` float → `[N, embedding_size]`, not normalised.

    Args:
        embedding_size: D.
        width: channels after the first convolution; they double with each of the two residual blocks.
    """

    def __init__(self, embedding_size: int, width: int = 16) -> None:
        super().__init__()
        cells = -(-HEIGHT // 8) * -(-WIDTH // 8)  # three strides of 2, each rounding up
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            ResidualBlock(width, 2 * width),
            ResidualBlock(2 * width, 4 * width),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(
            nn.Linear(4 * width * cells, embedding_size, bias=False), nn.BatchNorm1d(embedding_size)
        )

    def forward(self, faces: Tensor) -> Tensor:
        return self.embed(self.features(faces))
