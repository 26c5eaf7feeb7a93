"""Operators on batch-innermost activations: the borders of a region, and what runs inside one.

On the CPU they are blocked, `[ceil(N / 16), C, H, W, 16]`, on CUDA `[C, H, W, N]`. Each operator is an autograd
function over a kernel that is opaque to torch.compile and called directly in eager mode. Lanes beyond the N images are
zero in every tensor.
"""

from typing import Any

import torch
from torch import Tensor

from sparsefx.kernels import chwn
from sparsefx.kernels.cpu.abi import BLOCK
from sparsefx.kernels.cpu.dense_wgrad import dense_wgrad, outer_products_pay
from sparsefx.kernels.cpu.layout import from_blocked, to_blocked
from sparsefx.kernels.cpu.pool import Pool, max_pool_backward, max_pool_forward
from sparsefx.kernels.masking import masked_
from sparsefx.kernels.reference import Dense
from sparsefx.kernels.spec import ConvSpec, Prologue, is_channels_last


def is_blocked(device: torch.device) -> bool:
    """Whether a device's batch-innermost activations are blocked; else they are `[C, H, W, N]`."""
    return device.type != "cuda"


def enter(x: Tensor) -> Tensor:
    """Convert `[N, C, H, W]` to the device's batch-innermost layout."""
    return _EnterRegion.apply(x) if is_blocked(x.device) else chwn.enter(x)


def leave(x: Tensor, images: int, channels_last: bool) -> Tensor:
    """Convert batch-innermost activations to `[images, C, H, W]`, contiguous or channels_last."""
    if x.dim() == 4:
        return chwn.leave(x, channels_last)
    return _LeaveRegion.apply(x, images, channels_last)


class _EnterRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.images, ctx.last = x.shape[0], is_channels_last(x)
        return torch.ops.sparsefx.to_blocked(x) if torch.compiler.is_compiling() else to_blocked(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return leave(grad, ctx.images, ctx.last)


class _LeaveRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, images: int, last: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.sparsefx.from_blocked(x, images, last)
        return from_blocked(x.contiguous(), images, _FORMATS[last])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return enter(grad), None, None


_FORMATS = (torch.contiguous_format, torch.channels_last)


@torch.library.custom_op("sparsefx::to_blocked", mutates_args=())
def _to_blocked_op(x: Tensor) -> Tensor:
    return to_blocked(x)


@_to_blocked_op.register_fake
def _(x):
    return x.new_empty((-(-x.shape[0] // BLOCK), *x.shape[1:], BLOCK))


@torch.library.custom_op("sparsefx::from_blocked", mutates_args=())
def _from_blocked_op(x: Tensor, images: int, channels_last: bool) -> Tensor:
    return from_blocked(x.contiguous(), images, _FORMATS[channels_last])


@_from_blocked_op.register_fake
def _(x, images, channels_last):
    return x.new_empty((images, *x.shape[1:4])).contiguous(memory_format=_FORMATS[channels_last])


def max_pool(x: Tensor, pool: Pool, images: int | None = None, prologue: Prologue | None = None) -> Tensor:
    """Maxima over windows, `[B, C, H, W, 16]` to `[B, C, H', W', 16]`.

    Args:
        images: How many images `x` holds; only a prologue needs it.
        prologue: What is done to `x` first; the gradient of `x` is that of its result. Not in a compiled graph.
    """
    return _MaxPool.apply(x, pool, images, prologue)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool, images: int | None, prologue: Prologue | None) -> Tensor:
        if torch.compiler.is_compiling():
            y, taps = torch.ops.sparsefx.blocked_max_pool(x, *pool)
        else:
            y, taps = max_pool_forward(x.contiguous(), pool, images=images, prologue=prologue)
        ctx.save_for_backward(taps)
        ctx.pool = pool
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _MaxPoolBackward.apply(grad, ctx.saved_tensors[0], ctx.pool), None, None, None


class _MaxPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, taps: Tensor, pool: Pool) -> Tensor:
        ctx.save_for_backward(taps)
        ctx.pool = pool
        if torch.compiler.is_compiling():
            return torch.ops.sparsefx.blocked_max_pool_backward(grad, taps, *pool)
        return max_pool_backward(grad.contiguous(), taps, pool)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the gradient of the input, what stands where each maximum came from."""
        (taps,), (size, kernel, stride, padding) = ctx.saved_tensors, ctx.pool
        where = taps.long()
        y, x = torch.arange(taps.shape[2]).view(-1, 1, 1), torch.arange(taps.shape[3]).view(-1, 1)
        y = y * stride[0] - padding[0] + where.div(kernel[1], rounding_mode="floor")
        x = x * stride[1] - padding[1] + where % kernel[1]
        return grad.flatten(2, 3).gather(2, (y * size[1] + x).flatten(2, 3)).view(taps.shape), None, None


@torch.library.custom_op("sparsefx::blocked_max_pool", mutates_args=())
def _max_pool_op(
    x: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    return max_pool_forward(x.contiguous(), _pool(size, kernel, stride, padding))


@_max_pool_op.register_fake
def _(x, size, kernel, stride, padding):
    shape = (*x.shape[:2], *Pool(size, kernel, stride, padding).out, x.shape[4])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("sparsefx::blocked_max_pool_backward", mutates_args=())
def _max_pool_backward_op(
    grad: Tensor, taps: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return max_pool_backward(grad.contiguous(), taps, _pool(size, kernel, stride, padding))


@_max_pool_backward_op.register_fake
def _(grad, taps, size, kernel, stride, padding):
    return grad.new_empty((*grad.shape[:2], *size, grad.shape[4]))


def _pool(*pairs: list[int]) -> Pool:
    size, kernel, stride, padding = ((a, b) for a, b in pairs)
    return Pool(size, kernel, stride, padding)


class Converted:
    """A backend of plain activations inside a region: converts at each call. Its layer's `spec.images` is not 0."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.name = backend, backend.name

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer."""
        return enter(self.backend.fprop(_plain(spec), _leave(spec, x), weight, bias))

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input."""
        return enter(self.backend.dgrad(_plain(spec), _leave(spec, grad), _shaped(spec, x), weight))

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        return self.backend.wgrad(_plain(spec), _leave(spec, grad), _leave(spec, x), weight, mask)


class ConvertedDense(Converted):
    """Masked dense inside a region."""

    def __init__(self) -> None:
        super().__init__(Dense())

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        return masked_(self.dense_wgrad(spec, grad, x, weight), mask)

    def dense_wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of all weights, as if none were missing."""
        if _as_outer_products(spec, x, weight):
            return _dense_wgrad(spec, grad, x, weight)
        return self.backend.dense_wgrad(_plain(spec), _leave(spec, grad), _leave(spec, x), weight)

    def both(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input gradient and dense weight gradient in one call."""
        if _as_outer_products(spec, x, weight):
            return self.dgrad(spec, grad, x, weight), _dense_wgrad(spec, grad, x, weight)
        for_input, for_weight = self.backend.both(_plain(spec), _leave(spec, grad), _leave(spec, x), weight)
        return enter(for_input), for_weight


CONVERTED_DENSE = ConvertedDense()


def _as_outer_products(spec: ConvSpec | None, x: Tensor, weight: Tensor) -> bool:
    """Whether the dense weight gradient is taken on the blocked activations themselves."""
    blocked = is_blocked(x.device) and x.dim() == 5 and x.dtype == torch.float32
    return blocked and not torch.is_grad_enabled() and outer_products_pay(weight, _plain(spec).groups)


def _dense_wgrad(spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return dense_wgrad(_plain(spec), grad.contiguous(), x.contiguous(), weight)


def _plain(spec: ConvSpec | None) -> ConvSpec:
    assert spec is not None
    return spec._replace(images=0)


def _leave(spec: ConvSpec | None, x: Tensor) -> Tensor:
    assert spec is not None
    return leave(x, spec.images, False)  # the vendor's weight gradient then has the weight's own strides


def _shaped(spec: ConvSpec | None, x: Tensor) -> Tensor:
    """A plain tensor of the shape of `x`, whose contents nobody reads."""
    assert spec is not None
    return x.new_empty((spec.images, *x.shape[-4:-1]))
