"""The dense weight gradient of a convolution on blocked activations, as matrix products of the vendor's library."""

import ctypes

import torch

from .abi import BLOCK, empty, load, pointer, require

DEPTH = 2048
"""Output positions times images that a product sums over, about."""
COLUMN_BYTES = 16 << 20
"""Of the input spread out by taps, at a time."""
FEW_CHANNELS = 160
"""With fewer, spreading the input out costs more than products gain over the vendor's convolution; 1x1 apart."""


class _Columns(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "h", "w", "out_w")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "pad", "dilation")),
        *((name, ctypes.c_int64) for name in ("channel", "n", "block", "blocks", "row", "rows")),
    ]


def products_pay(weight: torch.Tensor, groups: int) -> bool:
    """Whether products are the faster way for a weight `[O, I / groups, R, S]`."""
    return weight.shape[2:].numel() == 1 or min(weight.shape[0] // groups, weight.shape[1]) >= FEW_CHANNELS


def dense_wgrad(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int = 1,
) -> torch.Tensor:
    """Gradient of all weights of a convolution, as if none were missing.

    Args:
        grad: `[B, O, H', W', 16]` fp32.
        x: `[B, I, H, W, 16]` fp32; lanes without an image are zero in both.
    Returns:
        `[O, I / groups, *kernel]`.
    """
    require("grad", grad, dtype=torch.float32, dims=5)
    require("x", x, dtype=torch.float32, dims=5)
    lib, threads = load(), torch.get_num_threads()
    all_blocks, outs, out_h, out_w, _ = grad.shape
    channels, h, w = x.shape[1:4]
    taps, per_group = kernel[0] * kernel[1], channels // groups
    row_depth = out_w * BLOCK
    rows = max(1, min(out_h, DEPTH // row_depth))
    blocks = max(1, min(all_blocks, DEPTH // (out_h * row_depth)))
    width = max(1, min(per_group, COLUMN_BYTES // (4 * taps * blocks * rows * row_depth)))
    columns = empty(lib, (width * taps * blocks * rows * row_depth,), torch.float32)
    out = empty(lib, (outs, per_group, *kernel), torch.float32)
    matrices = out.view(groups, outs // groups, per_group * taps)
    for block in range(0, all_blocks, blocks):
        for row in range(0, out_h, rows):
            part = grad[block : block + blocks, :, row : row + rows]
            beta = 1 if block or row else 0
            for group, own in enumerate(part.split(outs // groups, 1)):
                left = own.transpose(0, 1).flatten(1)
                for channel in range(0, per_group, width):
                    n = min(width, per_group - channel)
                    what = _Columns(
                        channels, h, w, out_w, kernel, stride, padding, dilation,
                        group * per_group + channel, n, block, part.shape[0], row, part.shape[2],
                    )  # fmt: skip
                    lib.sfx_columns(ctypes.byref(what), pointer(x), pointer(columns), threads)
                    right = columns[: n * taps * left.shape[1]].view(n * taps, -1)
                    matrices[group, :, channel * taps : (channel + n) * taps].addmm_(left, right.T, beta=beta)
    return out
