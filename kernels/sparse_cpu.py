"""The CPU backend: C++ kernels that visit existing weights only, between torch's layouts and the blocked one."""

import torch
from torch import Tensor

from sparsefx.kernels.cpu.conv import ConvPlan
from sparsefx.kernels.cpu.layout import from_blocked, to_blocked
from sparsefx.kernels.cpu.linear import LinearPlan, column_sums
from sparsefx.kernels.spec import ConvSpec, Prologue, is_channels_last

FEW_IMAGES = 2
"""Up to here lanes over pixels beat lanes over images, of which a block has 16."""
_TYPES = (torch.float32, torch.bfloat16)


class SparseCpu:
    """The sparse backend for one mask: 2-D convolutions and linear layers in fp32 and bf16.

    Convolutions of plain activations convert them to blocks of 16 images and back at each call; a few images run
    without blocks.

    Raises:
        CompilerUnavailable: the kernels cannot be built.
    Attributes:
        collected: Values of the existing weights that the latest `fprop` ran with, until somebody takes them: `dgrad`
            takes them for its weight.
    """

    name = "sparse"
    fuses = True

    def __init__(self, mask: Tensor, spec: ConvSpec | None) -> None:
        self.collected: Tensor | None = None
        if spec is None:
            self.linear = LinearPlan(mask)
            return
        stride, padding, dilation = ((a, b) for a, b in (spec.stride, spec.padding, spec.dilation))
        self.conv = ConvPlan(mask, stride, padding, dilation, spec.groups)

    @staticmethod
    def supports(spec: ConvSpec | None, x: Tensor, mask: Tensor) -> bool:
        """Whether the kernels cover a call."""
        shape = spec is None or (not spec.transposed and mask.dim() == 4 and not (spec.images and x.dim() == 4))
        return shape and x.device.type == "cpu" and x.dtype in _TYPES and x.numel() > 0

    def fprop(
        self,
        spec: ConvSpec | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prologue: Prologue | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Output of the layer, plus `residual`; that and a prologue come with blocked activations alone."""
        wide_bias = bias if bias is None or bias.dtype == torch.float32 else bias.float()
        if spec is None:
            out, self.collected = self.linear.run("fprop", _rows(x), weight, wide_bias)
            return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)
        self.collected = values = self.conv.collect(weight)
        if spec.images:
            return self.conv.fprop(x, values, wide_bias, images=spec.images, prologue=prologue, residual=residual)
        images = x.shape[0]
        if images <= FEW_IMAGES:
            return self.conv.infer(x.detach().contiguous(), values, wide_bias).contiguous(memory_format=_format(x))
        return from_blocked(self.conv.fprop(to_blocked(x), values, wide_bias, images=images), images, _format(x))

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input; `weight` may be the values that `fprop` collected."""
        if spec is None:
            out = self.linear.dgrad(_rows(grad), weight)
            return out if x.dim() == 2 else out.view(x.shape)
        if spec.images:
            return self.conv.dgrad(grad.contiguous(), weight, (x.shape[2], x.shape[3]), images=spec.images)
        images, _, *space = x.shape
        blocked = self.conv.dgrad(to_blocked(grad), weight, (space[0], space[1]), images=images)
        return from_blocked(blocked, images, _format(x))

    def wgrad(
        self,
        spec: ConvSpec | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        prologue: Prologue | None = None,
    ) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        if spec is None:
            return self.linear.wgrad(_rows(grad), _rows(x), weight.dtype)
        if spec.images:
            values = self.conv.wgrad_values(grad.contiguous(), x, images=spec.images, prologue=prologue)
        else:
            values = self.conv.wgrad_values(to_blocked(grad), to_blocked(x), images=x.shape[0])
        return self.conv.scatter(values, weight.dtype, channels_last=is_channels_last(weight))

    def bias_grad(self, grad: Tensor) -> Tensor:
        """Gradient of a linear layer's bias."""
        return column_sums(_rows(grad).float()).to(grad.dtype)


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 2 and x.is_contiguous():
        return x
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
