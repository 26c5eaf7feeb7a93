"""Random models, trained a few steps: exact counts and zeros (contract 4), results of the masked dense layers (5)."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam

import sparsefx
from sparsefx.errors import DensityError
from sparsefx.layers import SparseLayer
from tests.contract4 import assert_exact, assert_whole_units
from tests.test_update_oracle import Bank

OPTIMIZERS = [
    partial(SGD, lr=0.02, momentum=0.9),
    partial(SGD, lr=0.02, momentum=0.5, nesterov=True, weight_decay=1e-2),
    partial(Adam, lr=1e-2),
    partial(AdamW, lr=1e-2, fused=True),
    partial(NAdam, lr=1e-2),
]
CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
small = partial(st.integers, 1)


@st.composite
def layers(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer and the shape of its input."""
    batch, bias = draw(small(3)), draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        inputs = draw(small(40))
        return nn.Linear(inputs, draw(small(40)), bias=bias), (batch, inputs)
    space = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    inputs, outputs = groups * draw(small(12)), groups * draw(small(12))
    taps, stride, dilation = (tuple(draw(small(n)) for _ in range(space)) for n in (3, 2, 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    plain, transposed = CONVS[space]
    size = tuple(draw(st.integers(5, 7 if space < 3 else 5)) for _ in range(space))
    if draw(st.integers(0, 4)) == 0:
        return transposed(inputs, outputs, taps, **options), (batch, inputs, *size)
    padding = tuple(draw(st.integers(0, 2)) for _ in range(space))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
    return plain(inputs, outputs, taps, padding=padding, padding_mode=mode, **options), (batch, inputs, *size)


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    return {
        "layers": draw(st.lists(layers(), min_size=1, max_size=4)),
        "density": draw(st.one_of(st.sampled_from([0.05, 0.1, 0.5, 1.0]), st.floats(0.02, 0.99))),
        "granularity": draw(
            st.sampled_from(["weight"] * 4 + [("column", 2), "channel", ("channel", "in"), ("block", 2, 3)])
        ),
        "window": draw(st.sampled_from(["auto", "always", 1])),
        "every": draw(st.sampled_from([1, 2])),
        "prune_rate": draw(st.floats(0.0, 0.9)),
        "optimizer": draw(st.integers(0, len(OPTIMIZERS) - 1)),
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def check(run: dict[str, Any]) -> None:
    torch.manual_seed(run["seed"])
    bank = Bank(*(list(part) for part in zip(*copy.deepcopy(run["layers"]), strict=True)))
    for parameter in bank.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    config = sparsefx.SparseMomentum(prune_rate=run["prune_rate"], dense_grad_window=run["window"])
    try:
        sparsefx.sparsify(bank, run["density"], granularity=run["granularity"], scheduler=config, seed=run["seed"])
    except DensityError:
        assume(False)
    if run["channels_last"]:
        for module in bank.layers:
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[run["optimizer"]](bank.parameters())
    bank.scheduler.attach(optimizer, steps_per_update=run["every"], total_steps=100)
    for _ in range(3):
        x = torch.randn(bank.size, requires_grad=True)
        out = bank(x)
        coefficients = torch.randn(out.shape)
        (out * coefficients).sum().backward()
        compare(bank, x, out, coefficients)
        optimizer.step()
        optimizer.zero_grad()
        if run["granularity"] == "weight":
            assert_exact(bank, run["density"])
        elif run["density"] < 1:
            assert_whole_units_of_all(bank, run)


def assert_whole_units_of_all(bank: Bank, run: dict[str, Any]) -> None:
    if not any(isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose3d) for m in bank.layers):
        assert_whole_units(bank, run["granularity"], run["density"])


def compare(bank: Bank, x: Tensor, out: Tensor, coefficients: Tensor) -> None:
    """Output and gradients against torch's own layers in float64 with the same weights."""
    dense, inputs = copy.deepcopy(bank).double(), x.detach().double().requires_grad_()
    outputs, start = [], 0
    for layer, shape in zip(dense.layers, dense.shapes, strict=True):
        plain = layer.base if isinstance(layer, SparseLayer) else type(layer)
        size = math.prod(shape)
        outputs.append(plain.forward(layer, inputs[start : start + size].reshape(shape)).flatten())
        start += size
    expected = torch.cat(outputs)
    (expected * coefficients.double()).sum().backward()
    close("output", out, expected)
    close("input gradient", x.grad, inputs.grad)
    masks = sparsefx.masks(bank)
    for name, parameter in bank.named_parameters():
        close(name, parameter.grad, dense.get_parameter(name).grad * masks.get(name, 1))


def close(name: str, ours: Tensor, expected: Tensor) -> None:
    """Within 1e-5 by norm, or within fp32's rounding of terms around 1 where they cancel."""
    norm = torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(ours.double() - expected) <= 1e-5 * norm + 1e-6, name


@given(runs())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_25_random_models_keep_counts_zeros_and_results(run: dict[str, Any]) -> None:
    check(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(runs())
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_500_random_models_keep_counts_zeros_and_results(run: dict[str, Any]) -> None:
    check(run)
