"""The two LeNets of the paper's MNIST experiments (section 5.1, Table 1)."""

import torch
from torch import nn


class LeNet300(nn.Module):
    """LeNet 300-100: three linear layers, 266,610 parameters.

    Input `[N, 1, 28, 28]` (or anything that flattens to `[N, 784]`), output logits `[N, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)


class LeNet5Caffe(nn.Module):
    """LeNet-5 as Caffe ships it: no padding, ReLU, max pooling, 431,080 parameters.

    Input `[N, 1, 28, 28]`, output logits `[N, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc3 = nn.Linear(50 * 4 * 4, 500)
        self.fc4 = nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.pool(self.conv1(x)))
        x = torch.relu(self.pool(self.conv2(x)))
        x = torch.relu(self.fc3(torch.flatten(x, 1)))
        return self.fc4(x)
