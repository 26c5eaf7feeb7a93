"""Training with fixed masks in plain torch, with the full dense gradient known: what contract 6 is measured against."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

import sparsefx

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


MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": MOMENTUM,
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "dampening": partial(SGD, lr=0.05, momentum=0.8, dampening=0.3),
    "sgd-maximize": partial(SGD, lr=0.01, momentum=0.9, maximize=True, weight_decay=1e-3),
    "sgd-foreach": partial(SGD, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=1e-3),
    "adam-decay": partial(Adam, lr=1e-3, weight_decay=0.01, betas=(0.8, 0.99)),
    "adam-amsgrad": partial(Adam, lr=1e-3, amsgrad=True),
    "adam-maximize": partial(Adam, lr=1e-3, maximize=True),
    "adam-fused": partial(Adam, lr=1e-3, fused=True),
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.1),
    "adamw-fused": partial(AdamW, lr=1e-3, fused=True),
    "nadam": partial(NAdam, lr=1e-3),
    "radam": partial(RAdam, lr=1e-3),
}
NEVER = {"steps_per_update": 10**6, "total_steps": 10**7}


def pair(
    make_optimizer: MakeOptimizer = MOMENTUM,
    window: Any = "always",
    dtype: torch.dtype = torch.float64,
    density: float = 0.2,
    steps_per_update: int = 10**6,
    total_steps: int = 10**7,
    **config: Any,
) -> tuple[nn.Module, Optimizer, MaskedDense]:
    """A sparse model with its optimizer attached, and the masked dense reference with the same masks."""
    model = net(dtype)
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, density, scheduler=sparsefx.SparseMomentum(dense_grad_window=window, **config))
    reference = MaskedDense(dense, sparsefx.masks(model), make_optimizer)
    optimizer = make_optimizer(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=steps_per_update, total_steps=total_steps)
    return model, optimizer, reference


def assert_same(model: nn.Module, optimizer: Optimizer, reference: MaskedDense, rtol: float = 1e-9) -> None:
    """Weights and first moments agree with the reference, at existing and at missing weights, layer by layer."""
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter,
            reference.model.get_parameter(name),
            rtol=rtol,
            atol=rtol * 0.1,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, mask in sparsefx.masks(model).items():
        assert_moment(name, first_moment(optimizer, model.get_parameter(name)), reference.moment(name), mask, rtol)


def assert_moment(name: str, ours: Tensor, expected: Tensor, mask: Tensor, rtol: float = 1e-9) -> None:
    for where, at in (("existing", mask), ("missing", ~mask)):
        off, norm = (torch.linalg.vector_norm(t[at]).item() for t in (ours - expected, expected))
        assert off <= rtol * norm, f"{name}: first moment at {where} weights of norm {norm:.2e} is off by {off:.2e}"


def assert_zero_missing(model: nn.Module) -> None:
    for name, mask in sparsefx.masks(model).items():
        assert not model.get_parameter(name)[~mask].any(), name


def train_step(model: nn.Module, optimizer: Optimizer, batch: Batch, set_to_none: bool = True) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


def assert_equal_state(a: Any, b: Any) -> None:
    """Two nested states are equal to the bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_state(x, y)
    else:
        assert a == b
