"""Contract 4 as checks: exact counts, whole units, exact zeros."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sparsefx
from tests.masked_dense import net
from tests.test_update_oracle import Bank, random_layer


def counts(model: nn.Module) -> tuple[int, int]:
    masks = sparsefx.masks(model).values()
    return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)


def assert_exact(model: nn.Module, density: float) -> None:
    existing, total = counts(model)
    assert existing == round(density * total)
    assert_zero_missing(model)


def assert_zero_missing(model: nn.Module) -> None:
    for name, mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name)
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert not weight[~mask].any(), name


def attach(model: nn.Module, steps_per_update: int = 2, total_steps: int = 1000, **optimizer: Any) -> SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = SGD(parameters, **{"lr": 0.05, "momentum": 0.5, **optimizer})
    model.scheduler.attach(made, steps_per_update=steps_per_update, total_steps=total_steps)
    return made


def train(model: nn.Module, optimizer: SGD, size: int, steps: int, seed: int = 0) -> Iterator[int]:
    """Take steps with random gradients, handing over after each."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        out = model(torch.randn(size, generator=generator))
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def bank(seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layers, shapes = zip(*(random_layer(rng) for _ in range(rng.integers(2, 6))), strict=True)
    return Bank([nn.Linear(30, 20), *layers], [(3, 30), *shapes])


def unit_ids(weight: Tensor, granularity: Any, transposed: bool) -> Tensor:
    """Number the units of a weight from the definition in design section 1: one id per weight, weight-shaped."""
    matrix = weight.transpose(0, 1) if transposed else weight
    out, inputs, taps = matrix.shape[0], matrix.shape[1], math.prod(matrix.shape[2:])
    o = torch.arange(out)[:, None, None]
    i = torch.arange(inputs)[None, :, None]
    tap = torch.arange(taps)[None, None, :]
    column = i * taps + tap
    match granularity:
        case "weight":
            ids = o * 10**6 + column
        case ("column", h):
            ids = (o // h) * 10**6 + column
        case "channel":
            ids = o + 0 * column
        case ("channel", "in"):
            ids = i + 0 * o + 0 * tap
        case ("block", r, c):
            ids = (o // r) * 10**6 + column // c
        case _:
            raise AssertionError(granularity)
    ids = ids.reshape(matrix.shape)
    return ids.transpose(0, 1) if transposed else ids


def layer_units(model: nn.Module, granularity: Any) -> dict[str, Tensor]:
    return {
        name: unit_ids(mask, granularity, isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d))
        for name, mask in sparsefx.masks(model).items()
    }


def assert_whole_units(model: nn.Module, granularity: Any, density: float) -> None:
    """Masks consist of whole units, one a layer at least, and no missing unit would still fit under the target."""
    smallest_missing = math.inf
    for name, ids in layer_units(model, granularity).items():
        mask = sparsefx.masks(model)[name]
        assert mask.any(), name
        _, unit, size = ids.flatten().unique(return_inverse=True, return_counts=True)
        held = torch.zeros_like(size).index_add_(0, unit, mask.flatten().to(size.dtype))
        assert bool(((held == 0) | (held == size)).all()), f"{name}: a unit is broken"
        smallest_missing = min([smallest_missing, *size[held == 0].tolist()])
    existing, total = counts(model)
    target = round(density * total)
    assert existing <= target
    assert existing + smallest_missing > target
    assert_zero_missing(model)


def assert_untouched(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert type(model) is nn.Sequential
    assert [type(m) for m in model] == [type(m) for m in net()]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "scheduler")
