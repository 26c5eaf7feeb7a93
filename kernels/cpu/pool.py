"""Max pooling on blocked activations `[B, C, H, W, 16]`."""

import ctypes
from typing import NamedTuple

import torch

from sparsefx.kernels.spec import Prologue

from .abi import BLOCK, DTYPES, empty, load, pointer, prologue_argument, require


class Pool(NamedTuple):
    """The geometry of a pooling; windows have at most 256 positions, and each covers at least one pixel."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Output height and width."""
        sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(*self, strict=True)]
        return sizes[0], sizes[1]

    def argument(self) -> ctypes.Array:
        """`SfxPool` of the library."""
        sizes = (*self.size, *self.out, *self.kernel, *self.stride, *self.padding)
        return (ctypes.c_int64 * 10)(*sizes)


def max_pool_forward(
    x: torch.Tensor, pool: Pool, *, images: int | None = None, prologue: Prologue | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool.

    Args:
        images: How many images `x` holds; all of its lanes if None.
        prologue: What is done to `x` first.
    Returns:
        The maxima `[B, C, H', W', 16]`, and the tap of its window that each came from, uint8 of that shape.
    """
    require("x", x, dims=5)
    lib, shape = load(), (*x.shape[:2], *pool.out, x.shape[4])
    y, taps = empty(lib, shape, x.dtype), torch.empty(shape, dtype=torch.uint8)
    lib.sfx_max_pool(
        0, DTYPES[x.dtype], pool.argument(), prologue_argument(prologue, x.shape[1]), images or x.shape[0] * BLOCK,
        x.shape[1], pointer(x), pointer(y), pointer(taps), torch.get_num_threads(),
    )  # fmt: skip
    return y, taps


def max_pool_backward(grad: torch.Tensor, taps: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Return the gradient `[B, C, H, W, 16]` of the input from that of the maxima."""
    require("grad", grad, dims=5)
    lib = load()
    dx = empty(lib, (*grad.shape[:2], *pool.size, grad.shape[4]), grad.dtype)
    lib.sfx_max_pool(
        1, DTYPES[grad.dtype], pool.argument(), None, grad.shape[0] * BLOCK, grad.shape[1], pointer(grad), pointer(dx),
        pointer(taps), torch.get_num_threads(),
    )  # fmt: skip
    return dx
