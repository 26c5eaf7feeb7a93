"""VGG-16 for images of 32 x 32, in the three variants of Lee et al. 2019 that the paper compares on."""

import torch
from torch import nn

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 with BatchNorm and small classifiers.

    Variant `"D"` has 15.2 million parameters; `"C"` has 1x1 kernels in the last layer of its last three stages, 10.5
    million; `"like"` is D with one hidden linear layer instead of two, 15.0 million.

    Input `[N, 3, 32, 32]`, output logits `[N, classes]`.

    Source: Lee et al. 2019 (SNIP), arXiv:1810.02340, Table 2 and its code, whose convolutions keep the size; the code
        of Dettmers & Zettlemoyer 2019 pads the 1x1 kernels of variant C, which makes its first linear layer larger.
    """

    def __init__(self, variant: str = "D", classes: int = 10) -> None:
        super().__init__()
        if variant not in ("C", "D", "like"):
            raise ValueError(f'VGG16: expected variant "C", "D" or "like", got {variant!r}')
        layers: list[nn.Module] = []
        channels = 3
        for stage, widths in enumerate(_WIDTHS):
            for index, width in enumerate(widths):
                kernel = 1 if variant == "C" and stage >= 2 and index == 2 else 3
                layers += [
                    nn.Conv2d(channels, width, kernel, padding=kernel // 2),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden: list[nn.Module] = []
        for _ in range(1 if variant == "like" else 2):
            hidden += [nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))
