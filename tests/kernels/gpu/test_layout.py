"""The transposes between torch's layouts and `[C, H, W, N]`."""

import pytest
import torch

from sparsefx.kernels.gpu.layout import from_chwn, to_chwn, transpose

SHAPES = [(1, 1, 1, 1), (3, 5, 4, 7), (70, 3, 2, 2), (2, 70, 1, 3), (0, 3, 4, 4)]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layouts_go_there_and_back(shape, memory_format, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    inner = to_chwn(x)
    assert inner.is_contiguous()
    assert torch.equal(inner, x.permute(1, 2, 3, 0))
    back = from_chwn(inner, memory_format)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=memory_format)


def test_strided_input_is_read_through_its_strides():
    x = torch.randn(4, 6, 5, 5)[:, ::2]
    assert torch.equal(to_chwn(x), x.permute(1, 2, 3, 0))


@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (65, 64)])
def test_transpose_equals_torchs(shape):
    x = torch.randn(shape)
    assert torch.equal(transpose(x), x.T)
