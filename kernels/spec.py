"""The geometry of a layer, as every backend reads it."""

from typing import NamedTuple

import torch
from torch import Tensor


class ConvSpec(NamedTuple):
    """Arguments of `aten.convolution` beside its tensors.

    Weights are `[O, I / groups, *taps]`, or `[I, O / groups, *taps]` where `transposed`. Activations are
    `[N, C, *space]`; where `images` is not 0 they are of so many images and batch-innermost: blocked,
    `[ceil(images / 16), C, H, W, 16]`, or `[C, H, W, images]`.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    images: int = 0

    @property
    def geometry(self) -> tuple:
        """The arguments of `aten.convolution`."""
        return self[:6]

    @property
    def key(self) -> tuple:
        """A hashable form of the geometry."""
        return tuple(tuple(v) if isinstance(v, list) else v for v in self.geometry)

    def innermost(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """The shape of the output of a convolution of batch-innermost activations."""
        *outer, height, width, lanes = x.shape
        sizes = zip((height, width), weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        space = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        return (*outer[:-1], weight.shape[0], *space, lanes)


class Prologue(NamedTuple):
    """What a layer does to each element of its input as it reads it: `(x - mean) * scale + shift`, then a ReLU.

    `mean`, `scale` and `shift` are `[I]` fp32 without gradients.
    """

    mean: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool


def channels(x: Tensor, spec: ConvSpec) -> int:
    """Number of channels of activations."""
    return x.shape[0] if spec.images and x.dim() == 4 else x.shape[1]


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have their elements in the same order: strides of dimensions of size 1 say nothing.

    A 1x1 convolution's weight has other ones in channels_last, and is contiguous all the same.
    """
    one, other = a.stride(), b.stride()
    return one == other or all(n == 1 or s == t for n, s, t in zip(a.shape, one, other, strict=True))


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is stored `[N, H, W, C]` and not also `[N, C, H, W]`."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
