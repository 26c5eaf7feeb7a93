"""AlexNet for images of 32 x 32, as Lee et al. 2019 shrank it."""

import torch
from torch import nn

_CONVOLUTIONS = ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))


class AlexNet(nn.Module):
    """AlexNet with BatchNorm and a stride of 2 in every convolution.

    Variant `"s"` has linear layers of 1024, 5.1 million parameters; `"b"` of 2048, 8.5 million.

    Input `[N, 3, 32, 32]`, output logits `[N, classes]`.

    Source: Lee et al. 2019 (SNIP), arXiv:1810.02340, Table 2 and its code, where each convolution halves the size; the
        code of Dettmers & Zettlemoyer 2019 pads the first one by less, with the same parameters.
    """

    def __init__(self, variant: str = "s", classes: int = 10) -> None:
        super().__init__()
        if variant not in ("s", "b"):
            raise ValueError(f'AlexNet: expected variant "s" or "b", got {variant!r}')
        layers: list[nn.Module] = []
        channels = 3
        for width, kernel in _CONVOLUTIONS:
            layers += [
                nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        hidden: list[nn.Module] = []
        width = 1024 if variant == "s" else 2048
        for inputs in (channels, width):
            hidden += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))
