"""Models of the end-to-end case: a ResNet-18 for small images, and diffusers' `UNet2DModel` in two widths.

Plain torch.nn throughout, as a user would have them; nothing here knows of sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. Source: He et al., "Deep Residual Learning", CVPR 2016, figure 5 left."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == channels
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet18(nn.Sequential):
    """`[N, 3, H, W]` to `[N, classes]`; the form for small images: no pooling, no stride in the first layer."""

    def __init__(self, classes: int = 10, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        channels = widths[0]
        for level, width in enumerate(widths):
            layers += [BasicBlock(channels, width, stride=1 if level == 0 else 2), BasicBlock(width, width, stride=1)]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def unet(widths: Sequence[int], size: int) -> Any:
    """diffusers' `UNet2DModel` as Latent Diffusion has it: attention at all levels but the first, heads of 32."""
    from diffusers import UNet2DModel

    return UNet2DModel(sample_size=size, in_channels=3, out_channels=3, attention_head_dim=32,
                       block_out_channels=tuple(widths))  # fmt: skip
