"""BatchNorm with an optional residual and ReLU on blocked activations `[B, C, H, W, 16]`, one pass of memory each."""

import ctypes
from typing import NamedTuple

import torch

from sparsefx.kernels.spec import Prologue

from .abi import BLOCK, DTYPES, empty, load, pointer, require


class SfxNorm(ctypes.Structure):
    """`SfxNorm` of the library."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "grad", "grad2", "skip", "y", "dx", "dresidual")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "var", "rstd", "running_mean", "running_var")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "dweight", "dbias")),
        ("eps", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("training", ctypes.c_int32),
        ("relu", ctypes.c_int32),
    )


class Normalized(NamedTuple):
    """Result of the forward pass.

    Attributes:
        y: Blocked; None where it was not to be written.
        mean, var, rstd: That it used, `[C]` fp32; `var` is biased.
        prologue: What makes `y` of `x`; None where `y` is written.
    """

    y: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    rstd: torch.Tensor
    prologue: Prologue | None


class NormGrads(NamedTuple):
    """Result of the backward pass: `dx` and `dresidual` blocked, `dweight` and `dbias` `[C]` fp32."""

    dx: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor
    dresidual: torch.Tensor | None


def batch_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
    *,
    training: bool,
    eps: float = 1e-5,
    images: int | None = None,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    write: bool = True,
    factor: float | None = None,
) -> Normalized:
    """Normalize, add `residual`, clamp at zero.

    Args:
        x, residual: `[B, C, H, W, 16]` fp32 or bf16.
        weight, bias: `[C]` fp32 or None.
        mean, var: Running statistics, `[C]` fp32, to use outside of training.
        training: Use the statistics of the batch.
        images: How many images `x` holds; all of its lanes if None.
        write: Whether to compute `y`, not the statistics alone.
        factor: Share of this batch in `mean` and `var`, which training moves; None leaves them.
    Raises:
        ValueError: in training with a single value per channel, in eval without statistics.
    """
    require("x", x, dims=5)
    b, c, h, w, _ = x.shape
    n = images or b * BLOCK
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual: expected {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}")
    if training and n * h * w < 2:
        raise ValueError("batch norm: expected more than 1 value per channel in training, got 1; use eval mode")
    lib = load()
    y = empty(lib, x.shape, x.dtype) if write else None
    if not training and (mean is None or var is None):
        raise ValueError("batch norm: expected running statistics in eval mode, got None; use training mode")
    used_mean, used_var, rstd = (torch.empty(c) for _ in range(3))
    scale, shift = (None, None) if write else (torch.empty(c), torch.empty(c))
    reads = not training or factor is not None
    arguments = SfxNorm(
        x=pointer(x), residual=_channels_or_blocked(residual), y=pointer(y), weight=_channels_or_blocked(weight),
        bias=_channels_or_blocked(bias), mean=pointer(used_mean), var=pointer(used_var), rstd=pointer(rstd),
        running_mean=_channels_or_blocked(mean) if reads else None,
        running_var=_channels_or_blocked(var) if reads else None,
        scale=pointer(scale), shift=pointer(shift), eps=eps, factor=factor or 0.0, training=training, relu=relu,
    )  # fmt: skip
    lib.sfx_norm(0, DTYPES[x.dtype], ctypes.byref(arguments), n, c, h * w, torch.get_num_threads())
    if training and factor is not None and mean is not None and var is not None and not mean.is_inference():
        torch.autograd.graph.increment_version((mean, var))
    prologue = None if scale is None or shift is None else Prologue(used_mean, scale, shift, relu)
    return Normalized(y, used_mean, used_var, rstd, prologue)


def channel_sums(x: torch.Tensor, images: int) -> torch.Tensor:
    """Sums over all but the channels of `x` `[B, C, H, W, 16]` fp32 or bf16, of `images` images; `[C]` fp32."""
    require("x", x, dims=5)
    _, c, h, w, _ = x.shape
    sums = torch.empty(c)
    load().sfx_channel_sums(
        DTYPES[x.dtype], pointer(x), images, c, h * w, pointer(sums), torch.get_num_threads()
    )  # fmt: skip
    return sums


def apply_prologue(x: torch.Tensor, prologue: Prologue, images: int) -> torch.Tensor:
    """What a convolution with this prologue reads of `x` `[B, C, H, W, 16]`, to the last bit."""
    require("x", x, dims=5)
    _, c, h, w, _ = x.shape
    lib = load()
    y = empty(lib, x.shape, x.dtype)
    arguments = SfxNorm(
        x=pointer(x), y=pointer(y), mean=pointer(prologue.mean), rstd=pointer(prologue.scale),
        bias=pointer(prologue.shift), training=False, relu=prologue.relu,
    )  # fmt: skip
    lib.sfx_norm(0, DTYPES[x.dtype], ctypes.byref(arguments), images, c, h * w, torch.get_num_threads())
    return y


def batch_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    *,
    training: bool,
    images: int | None = None,
    relu: bool = False,
    residual: bool = False,
    grad2: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> NormGrads:
    """Gradients of `batch_norm_forward`.

    Args:
        grad: Of `y`.
        x: The forward's input.
        y: The forward's output; may be None without a residual, then the ReLU's sign is recomputed from `x`.
        mean, rstd: The forward's.
        residual: Whether the forward added one.
        grad2: Added to `grad`.
        skip: Added to the input's gradient.
    """
    require("x", x, dims=5)
    require("grad", grad, dtype=x.dtype, dims=5)
    if grad.shape != x.shape or (y is not None and (y.shape != x.shape or y.dtype != x.dtype)):
        raise ValueError(f"grad, y: expected {tuple(x.shape)} {x.dtype} like x, got {tuple(grad.shape)}")
    for name, more in (("grad2", grad2), ("skip", skip)):
        if more is not None:
            require(name, more, dtype=x.dtype, dims=5)
            if more.shape != x.shape:
                raise ValueError(f"{name}: expected {tuple(x.shape)} {x.dtype} like x, got {tuple(more.shape)}")
    if residual and relu and y is None:
        raise ValueError("y: expected the forward's output where a residual was added before the ReLU, got None")
    b, c, h, w, _ = x.shape
    lib = load()
    dx = empty(lib, x.shape, x.dtype)
    dresidual = empty(lib, x.shape, x.dtype) if residual else None
    dweight, dbias = torch.empty(c), torch.empty(c)
    arguments = SfxNorm(
        x=pointer(x), grad=pointer(grad), grad2=pointer(grad2), skip=pointer(skip), y=_channels_or_blocked(y),
        dx=pointer(dx), dresidual=pointer(dresidual), weight=_channels_or_blocked(weight),
        bias=_channels_or_blocked(bias), mean=pointer(mean), rstd=pointer(rstd), dweight=pointer(dweight),
        dbias=pointer(dbias), training=training, relu=relu,
    )  # fmt: skip
    n = images or b * BLOCK
    lib.sfx_norm(1, DTYPES[x.dtype], ctypes.byref(arguments), n, c, h * w, torch.get_num_threads())
    return NormGrads(dx, dweight, dbias, dresidual)


def _channels_or_blocked(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    require("batch norm argument", tensor, dtype=None if tensor.dim() == 5 else torch.float32)
    return pointer(tensor)
