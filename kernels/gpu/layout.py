"""Fast transposes between torch's layouts and `[C, H, W, N]`."""

import torch
import triton.language as tl
from torch import Tensor

from sparsefx.kernels.gpu.launch import kernel
from sparsefx.kernels.spec import is_channels_last

_TILE = 64


@kernel(lambda constants: "transpose_kernel")
def transpose_kernel(x_ptr, y_ptr, outer, middle, inner, BLOCK: tl.constexpr):
    """Reverse the dimensions of `[outer, middle, inner]`; both sides are read and written along their rows."""
    inner_blocks = (inner + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    b = pid // inner_blocks % middle
    a = pid // inner_blocks // middle * BLOCK + tl.arange(0, BLOCK)
    c = pid % inner_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (a < outer)[:, None] & (c < inner)[None, :]
    source = (a.to(tl.int64)[:, None] * middle + b) * inner + c[None, :]
    x_AC = tl.load(x_ptr + source, mask=inside, other=0)
    target = (c.to(tl.int64)[:, None] * middle + b) * outer + a[None, :]
    tl.store(y_ptr + target, tl.trans(x_AC), mask=tl.trans(inside))


def reverse(x: Tensor, outer: int, middle: int, inner: int) -> Tensor:
    """Contiguous memory `[outer, middle, inner]` as `[inner, middle, outer]`, flat."""
    out = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    blocks = -(-outer // _TILE) * middle * -(-inner // _TILE)
    if blocks:
        transpose_kernel.launch(
            blocks, cuda=x.is_cuda, x_ptr=x, y_ptr=out, outer=outer, middle=middle, inner=inner, BLOCK=_TILE
        )
    return out


def to_chwn(x: Tensor) -> Tensor:
    """Convert `[N, C, H, W]`, contiguous or channels_last, to `[C, H, W, N]`."""
    n, c, h, w = x.shape
    if is_channels_last(x):
        return reverse(x.permute(0, 2, 3, 1), n, h * w, c).view(c, h, w, n)
    return reverse(x.contiguous(), n, 1, c * h * w).view(c, h, w, n)


def from_chwn(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Convert `[C, H, W, N]` to `[N, C, H, W]`, contiguous or channels_last."""
    c, h, w, n = x.shape
    if memory_format == torch.channels_last:
        return reverse(x.contiguous(), c, h * w, n).view(n, h, w, c).permute(0, 3, 1, 2)
    return reverse(x.contiguous(), c * h * w, 1, n).view(n, c, h, w)


def transpose(x: Tensor) -> Tensor:
    """Convert `[A, B]` to a contiguous `[B, A]`."""
    a, b = x.shape
    return reverse(x.contiguous(), a, 1, b).view(b, a)
