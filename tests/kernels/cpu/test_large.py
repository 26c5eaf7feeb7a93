"""Positions beyond 2^31 elements. Most pages of these tensors are never touched, so that they take little memory."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.cpu import ConvPlan
from tests.kernels.cpu.helpers import error

SIDE, CHANNELS = 1464, 64
"""Elements of one block of 16 images: 64 * 1464^2 * 16 is 2.2e9, and the last channel lies beyond 2^31."""


def lazily_zero() -> torch.Tensor:
    """Bf16 `[1, 64, 1464, 1464, 16]`, zero but for the last channel; the system backs only what is written."""
    x = torch.from_numpy(np.zeros((1, CHANNELS, SIDE, SIDE, 16), np.int16)).view(torch.bfloat16)
    assert x[0, :-1].numel() > 2**31
    x[0, -1].normal_()
    return x


def images(blocked: torch.Tensor) -> torch.Tensor:
    """The last channel of every image, `[16, 1, SIDE, SIDE]`."""
    return blocked[0, -1].permute(2, 0, 1).unsqueeze(1)


@pytest.mark.slow
def test_reading_beyond_two_to_the_31_elements():
    x, weight = lazily_zero(), torch.zeros(1, CHANNELS, 3, 3)
    weight[0, -1] = torch.randn(3, 3)
    plan = ConvPlan(weight != 0, stride=61)
    small = images(x).float()
    out = plan.fprop(x, weight)
    expected = F.conv2d(small.double(), weight[:, -1:].double(), stride=61)
    assert error(out[0].permute(3, 0, 1, 2).float(), expected) < 1e-2
    grad = torch.randn_like(out)
    values = plan.wgrad_values(grad, x)
    wanted = torch.nn.grad.conv2d_weight(small.double(), (1, 1, 3, 3), grad[0].permute(3, 0, 1, 2).double(), stride=61)
    assert error(values, wanted.flatten()) < 1e-2


@pytest.mark.slow
def test_writing_beyond_two_to_the_31_elements():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of free memory, {free >> 30} GiB here")
    weight = torch.zeros(1, CHANNELS, 1, 1)
    weight[0, -1] = 2
    grad = torch.randn(1, 1, SIDE, SIDE, 16).bfloat16()
    out = ConvPlan(weight != 0).dgrad(grad, weight, (SIDE, SIDE))
    assert torch.equal(out[0, -1], 2 * grad[0, 0])
    assert not out[0, -2].any()
    assert not out[0, 0].any()
