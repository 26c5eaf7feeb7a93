"""Training with fixed masks in plain torch, with the full dense gradient known: what contract 6 is measured against."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A small convolutional classifier of `[N, 3, 6, 6]` images in 5 classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    )
    return model.to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(5, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def first_moment(optimizer: Optimizer, weight: Tensor) -> Tensor:
    """The optimizer's first moment of a weight; zeros before its first step."""
    state: dict[str, Any] = optimizer.state.get(weight, {})
    moment = state.get("momentum_buffer", state.get("exp_avg"))
    return torch.zeros_like(weight) if moment is None else moment


class MaskedDense:
    """A dense model trained under fixed masks, whose optimizer is shown the gradient of missing weights too.

    Existing weights move exactly as under a masked gradient, because every rule is elementwise; the norm for clipping
    is that of existing weights alone, and missing weights are put back to zero after each step.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], make_optimizer: MakeOptimizer) -> None:
        self.model = model
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.project_()
        self.optimizer = make_optimizer(model.parameters())

    @torch.no_grad()
    def project_(self) -> None:
        for name, mask in self.masks.items():
            self.model.get_parameter(name).mul_(mask)

    def backward(self, *micro_batches: Batch) -> None:
        """Sum the dense gradients of the micro-batches' mean losses into `.grad`."""
        self.optimizer.zero_grad()
        for batch in micro_batches:
            (loss_of(self.model, batch) / len(micro_batches)).backward()

    @torch.no_grad()
    def clip_(self, max_norm: float) -> None:
        existing = [p.grad * self.masks.get(n, 1) for n, p in self.model.named_parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in existing]))
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    @torch.no_grad()
    def step(self, dense: bool = True) -> None:
        """Step; without `dense` the optimizer sees existing weights only, as outside the window."""
        if not dense:
            for name, mask in self.masks.items():
                grad = self.model.get_parameter(name).grad
                if grad is not None:
                    grad.mul_(mask)
        self.optimizer.step()
        self.project_()

    def moment(self, name: str) -> Tensor:
        return first_moment(self.optimizer, self.model.get_parameter(name))
