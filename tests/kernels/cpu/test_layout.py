"""Conversions between plain and blocked activations."""

import pytest
import torch

from sparsefx.kernels.cpu import as_channels_last, from_blocked, from_channels_last, to_blocked
from tests.kernels.cpu.helpers import blocked


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 16, 4, 4), (33, 5, 7, 3), (130, 3, 1, 1), (20, 40, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_exact(shape, dtype, memory_format):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    there = to_blocked(x)
    assert torch.equal(there, blocked(x))
    back = from_blocked(there, shape[0], memory_format)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=memory_format)


def test_any_strides_convert():
    x = torch.randn(20, 6, 8, 5).transpose(2, 3)[:, ::2]
    assert torch.equal(to_blocked(x), blocked(x))


def test_pooling_on_the_channels_last_view():
    x = torch.randn(32, 6, 8, 8)
    pool = torch.nn.MaxPool2d(3, 2, 1)
    pooled = from_channels_last(pool(as_channels_last(to_blocked(x))), 6)
    assert torch.equal(from_blocked(pooled), pool(x))


def test_wrong_number_of_images_raises():
    with pytest.raises(ValueError, match="batch size"):
        from_blocked(torch.zeros(2, 3, 4, 4, 16), 40)
