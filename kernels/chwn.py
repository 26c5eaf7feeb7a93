"""Batch-innermost activations on CUDA, `[C, H, W, N]`: the borders of a region.

Rows that a gather of input channels picks are contiguous there, and every shift by a tap stays aligned. CPU tensors are
converted by torch, so that regions of this layout can be checked on any machine.
"""

from typing import Any

import torch
from torch import Tensor

from sparsefx.kernels.spec import is_channels_last


def enter(x: Tensor) -> Tensor:
    """Convert `[N, C, H, W]`, contiguous or channels_last, to `[C, H, W, N]`."""
    return _Enter.apply(x)


def leave(x: Tensor, channels_last: bool) -> Tensor:
    """Convert `[C, H, W, N]` to `[N, C, H, W]`, contiguous or channels_last."""
    return _Leave.apply(x, channels_last)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.last = is_channels_last(x)
        return torch.ops.sparsefx.to_chwn(x) if torch.compiler.is_compiling() else _to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return leave(grad, ctx.last)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, last: bool) -> Tensor:
        return torch.ops.sparsefx.from_chwn(x, last) if torch.compiler.is_compiling() else _from(x, last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return enter(grad), None


_FORMATS = (torch.contiguous_format, torch.channels_last)


def _to(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.detach().permute(1, 2, 3, 0).contiguous()
    from sparsefx.kernels.gpu.layout import to_chwn

    return to_chwn(x.detach())


def _from(x: Tensor, last: bool) -> Tensor:
    if not x.is_cuda:
        return x.detach().permute(3, 0, 1, 2).contiguous(memory_format=_FORMATS[last])
    from sparsefx.kernels.gpu.layout import from_chwn

    return from_chwn(x.detach(), _FORMATS[last])


@torch.library.custom_op("sparsefx::to_chwn", mutates_args=())
def _to_op(x: Tensor) -> Tensor:
    return _to(x)


@_to_op.register_fake
def _(x):
    return x.new_empty((*x.shape[1:], x.shape[0]))


@torch.library.custom_op("sparsefx::from_chwn", mutates_args=())
def _from_op(x: Tensor, channels_last: bool) -> Tensor:
    return _from(x, channels_last)


@_from_op.register_fake
def _(x, channels_last):
    return x.new_empty((x.shape[3], *x.shape[:3])).contiguous(memory_format=_FORMATS[channels_last])
