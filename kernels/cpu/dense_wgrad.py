"""The dense weight gradient of a convolution on blocked activations."""

import ctypes

import torch

from sparsefx.kernels.spec import ConvSpec, is_channels_last

from .abi import BLOCK, check, load, pointer, require

FEW_OUTPUTS = 16
"""A group with fewer leaves lanes, which are output channels, empty."""


def outer_products_pay(weight: torch.Tensor, groups: int) -> bool:
    """Whether this kernel is the faster way for a weight `[O, I / groups, R, S]`, else the vendor's convolution."""
    return weight.shape[0] // groups >= FEW_OUTPUTS


def dense_wgrad(
    spec: ConvSpec,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    isa: str | None = None,
    amx: bool | None = None,
) -> torch.Tensor:
    """Gradient of all weights of a convolution, as if none were missing.

    Args:
        grad: `[B, O, H', W', 16]` fp32.
        x: `[B, I, H, W, 16]` fp32; lanes without an image are zero in one of the two.
        weight: `[O, I / groups, R, S]`, of which only the shape and memory format are read.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
        amx: Whether to multiply on matrix units, which is as exact; where that is faster if None.
    Returns:
        fp32, in the shape and memory format of `weight`.
    Raises:
        ValueError: the shapes do not fit each other, or `amx` is asked of a processor that has none.
    """
    require("grad", grad, dtype=torch.float32, dims=5)
    require("x", x, dtype=torch.float32, dims=5)
    outs, ins, *kernel = weight.shape
    expected = spec.innermost(x, weight)
    if x.shape[1] != ins * spec.groups or grad.shape != expected:
        raise ValueError(
            f"grad: expected {expected} for x {tuple(x.shape)} and a weight {tuple(weight.shape)} in {spec.groups} "
            f"groups, got {tuple(grad.shape)}; pass the layer's own tensors"
        )
    last = is_channels_last(weight)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(weight.shape, dtype=torch.float32, memory_format=memory_format)
    lib = load(isa)
    if amx and not lib.sfx_amx():
        raise ValueError("amx: expected a processor with AMX and a library for it, got one without; leave it at None")
    shape = (ctypes.c_int64 * 11)(
        outs, ins * spec.groups, *kernel, *spec.stride, *spec.padding, *spec.dilation, spec.groups
    )
    if amx is None:
        amx = uses_amx(lib, shape, x.shape[0])
    status = lib.sfx_conv_dense_wgrad(
        shape, pointer(grad), pointer(x), x.shape[0] * BLOCK, *x.shape[2:4], last, amx, pointer(out),
        torch.get_num_threads(),
    )  # fmt: skip
    check(lib, status)
    return out


def uses_amx(library: ctypes.CDLL, shape: ctypes.Array, blocks: int) -> bool:
    """Whether packing into matrix units pays, whose tiles take 16 channels and two blocks of images; not without any.

    Args:
        shape: Out, in, R, S, ..., groups, of the layer.
        blocks: Of images.
    """
    outs, ins, taps = shape[0] // shape[-1], shape[1] // shape[-1], shape[2] * shape[3]
    return bool(library.sfx_amx()) and min(outs, ins) >= 16 and blocks > 1 and (taps > 4 or ins >= 256)
