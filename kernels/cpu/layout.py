"""Blocked activations `[ceil(N / 16), C, H, W, 16]` and back. Lanes beyond N are zero."""

import torch

from .abi import BLOCK, DTYPES, empty, load, pointer, require


def to_blocked(x: torch.Tensor) -> torch.Tensor:
    """Convert `[N, C, H, W]` fp32 or bf16, contiguous or channels_last, to `[ceil(N / 16), C, H, W, 16]`."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x = x.detach()
    plain = x.permute(0, 2, 3, 1) if last else x.contiguous()
    require("x", plain, dims=4)
    n, c, h, w = x.shape
    lib = load()
    out = empty(lib, (-(-n // BLOCK), c, h, w, BLOCK), x.dtype)
    lib.sfx_convert(1, DTYPES[x.dtype], pointer(plain), pointer(out), n, c, h * w, last, torch.get_num_threads())
    return out


def from_blocked(
    x: torch.Tensor, images: int | None = None, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """Convert `[B, C, H, W, 16]` to its first `images` images `[N, C, H, W]`, contiguous or channels_last."""
    x = x.detach()
    require("x", x, dims=5)
    b, c, h, w, _ = x.shape
    n = b * BLOCK if images is None else images
    if -(-n // BLOCK) != b:
        raise ValueError(f"images: expected {(b - 1) * BLOCK + 1} to {b * BLOCK}, got {n}; pass the batch size")
    last = memory_format == torch.channels_last
    lib = load()
    out = empty(lib, (n, h, w, c) if last else (n, c, h, w), x.dtype)
    lib.sfx_convert(0, DTYPES[x.dtype], pointer(x), pointer(out), n, c, h * w, last, torch.get_num_threads())
    return out.permute(0, 3, 1, 2) if last else out


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """View `[B, C, H, W, 16]` as `[B * C, 16, H, W]` in channels_last, on which torch's pooling runs natively."""
    b, c, h, w, lanes = x.shape
    return x.view(b * c, h, w, lanes).permute(0, 3, 1, 2)


def from_channels_last(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Undo `as_channels_last` after pooling: `[B * C, 16, H', W']` to `[B, C, H', W', 16]`."""
    _, lanes, h, w = x.shape
    return x.permute(0, 2, 3, 1).contiguous().view(-1, channels, h, w, lanes)
