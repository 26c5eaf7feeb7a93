"""The dense weight gradient of a convolution on blocked activations."""

import ctypes

import torch

from sparsefx.kernels.spec import is_channels_last

from .abi import BLOCK, check, load, pointer, require

FEW_OUTPUTS = 16
"""A group with fewer leaves lanes, which are output channels, empty."""


def outer_products_pay(weight: torch.Tensor, groups: int) -> bool:
    """Whether this kernel is the faster way for a weight `[O, I / groups, R, S]`, else the vendor's convolution."""
    return weight.shape[0] // groups >= FEW_OUTPUTS


def dense_wgrad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int = 1,
    isa: str | None = None,
) -> torch.Tensor:
    """Gradient of all weights of a convolution, as if none were missing.

    Args:
        grad: `[B, O, H', W', 16]` fp32.
        x: `[B, I, H, W, 16]` fp32; lanes without an image are zero in one of the two.
        weight: `[O, I / groups, R, S]`, of which only the shape and memory format are read.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
    Returns:
        fp32, in the shape and memory format of `weight`.
    Raises:
        ValueError: the shapes do not fit each other.
    """
    require("grad", grad, dtype=torch.float32, dims=5)
    require("x", x, dtype=torch.float32, dims=5)
    h, w = x.shape[2:4]
    outs, ins, *kernel = weight.shape
    sizes = zip((h, w), kernel, stride, padding, dilation, strict=True)
    out_hw = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if x.shape[1] != ins * groups or grad.shape != (x.shape[0], outs, *out_hw, BLOCK):
        raise ValueError(
            f"grad: expected {(x.shape[0], outs, *out_hw, BLOCK)} for x {tuple(x.shape)} and a weight "
            f"{tuple(weight.shape)} in {groups} groups, got {tuple(grad.shape)}; pass the layer's own tensors"
        )
    last = is_channels_last(weight)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(weight.shape, dtype=torch.float32, memory_format=memory_format)
    lib = load(isa)
    shape = (ctypes.c_int64 * 11)(outs, ins * groups, *kernel, *stride, *padding, *dilation, groups)
    status = lib.sfx_conv_dense_wgrad(
        shape, pointer(grad), pointer(x), x.shape[0] * BLOCK, h, w, last, pointer(out), torch.get_num_threads()
    )
    check(lib, status)
    return out
