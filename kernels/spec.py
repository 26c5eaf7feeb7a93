"""The geometry of a layer, as every backend reads it."""

from typing import NamedTuple

import torch
from torch import Tensor


class ConvSpec(NamedTuple):
    """Arguments of `aten.convolution` beside its tensors.

    Weights are `[O, I / groups, *taps]`, or `[I, O / groups, *taps]` where `transposed`.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @property
    def key(self) -> tuple:
        """A hashable form."""
        return tuple(tuple(v) if isinstance(v, list) else v for v in self)


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is stored `[N, H, W, C]` and not also `[N, C, H, W]`."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def bias_grad(grad: Tensor, spec: ConvSpec | None) -> Tensor:
    """Sum `grad`, `[N, O, *space]` for a convolution or `[..., O]` for a linear layer, to `[O]`."""
    if spec is None:
        return grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad.sum([d for d in range(grad.dim()) if d != 1])
