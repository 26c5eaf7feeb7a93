"""Wide residual networks for images of 32 x 32 (Zagoruyko & Komodakis 2016)."""

import torch
import torch.nn.functional as F
from torch import nn


class WideResNet(nn.Module):
    """WRN-depth-width: pre-activation residual blocks in three stages.

    Parameters, in millions: WRN-16-8 11.0, WRN-16-10 17.1, WRN-22-8 17.2, WRN-28-2 1.5, WRN-28-10 36.5.

    Input `[N, 3, 32, 32]` (or larger), output logits `[N, classes]`.

    Args:
        depth: 4 + 6 times the number of blocks in a stage.
        width: Factor on the channels 16, 32, 64 of the stages.
        dropout: Share of activations dropped between the two convolutions of a block; the paper trains with 0.3.
        classes: Number of outputs.
    Raises:
        ValueError: a depth that no whole number of blocks gives.
    Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146, section 2 and Table 4; WRN-28-2 as in Oliver et al. 2018,
        arXiv:1804.09170, section 4.1.
    """

    def __init__(self, depth: int, width: int, dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: expected a depth of 4 + 6n with n > 0 (16, 22, 28, ...), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        channels = 16
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = [_Block(channels, base * width, stride, dropout)]
            blocks += [_Block(base * width, base * width, 1, dropout) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = base * width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stages(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class _Block(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU; a 1x1 convolution on the way around where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(out)
        out = self.relu2(self.norm2(self.conv1(out)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, self.training)
        return self.conv2(out) + around
