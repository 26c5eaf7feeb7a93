"""What is timed: the paper's networks at its densities and batch sizes."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.kernels.cpu.build import cpu_name, default_isa
from sparsefx.models import VGG16, AlexNet, LeNet5Caffe, LeNet300, WideResNet

INTERVAL = 390
"""Steps between updates: an epoch of CIFAR-10's 50,000 images at batch 128, as in the paper."""


@dataclass(frozen=True)
class Setting:
    """A network and how it is trained.

    Attributes:
        image: Shape of one input.
        at_least: Speedup of the whole step that this project promises; None where it promises none.
    """

    name: str
    make: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch: int
    density: float = 0.05
    at_least: float | None = None
    classes: int = 10

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random images `[batch, *image]` and labels `[batch]`, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, *self.image, generator=generator)
        return images, torch.randint(self.classes, (batch,), generator=generator)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


_CIFAR, _MNIST = (3, 32, 32), (1, 28, 28)
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("wrn-16-10", lambda: WideResNet(16, 10), _CIFAR, 32, at_least=4.5),
        Setting("vgg16-d", lambda: VGG16("D"), _CIFAR, 128, at_least=4.5),
        Setting("wrn-28-2", lambda: WideResNet(28, 2), _CIFAR, 128, at_least=3.0),
        Setting("alexnet-s", lambda: AlexNet("s"), _CIFAR, 128, 0.1, at_least=2.5),
        Setting("lenet300", LeNet300, _MNIST, 100, at_least=1.2),
        Setting("resnet50", _resnet50, (3, 224, 224), 16, 0.1, at_least=1.8, classes=1000),
        Setting("wrn-16-8", lambda: WideResNet(16, 8), _CIFAR, 128),
        Setting("wrn-22-8", lambda: WideResNet(22, 8), _CIFAR, 128),
        Setting("vgg16-c", lambda: VGG16("C"), _CIFAR, 128),
        Setting("vgg16-like", lambda: VGG16("like"), _CIFAR, 128, 0.03),
        Setting("alexnet-b", lambda: AlexNet("b"), _CIFAR, 128, 0.1),
        Setting("lenet5", LeNet5Caffe, _MNIST, 100),
    )
}
PROMISED = [name for name, setting in SETTINGS.items() if setting.at_least is not None]


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": default_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "THP_"))},
        "load": os.getloadavg()[0],
    }
