"""The shared library's functions, typed for ctypes."""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch

from sparsefx.kernels.spec import Prologue

from . import buffers
from .build import CompilerUnavailable, default_isa, library

_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sfx_error": (ctypes.c_char_p, []),
    "sfx_lanes": (_INT, []),
    "sfx_amx": (_INT, []),
    "sfx_layer_new": (_P, [_P, _P]),
    "sfx_layer_free": (None, [_P]),
    "sfx_layer_nnz": (_I64, [_P]),
    "sfx_layer_tune": (_INT, [_P, _INT, _P]),
    "sfx_layer_tiling": (_INT, [_P, _INT, _I64, _I64, _I64, _INT, _P, _P]),
    "sfx_layer_collect": (_INT, [_P, _INT, _INT, _P, _P, _INT]),
    "sfx_layer_scatter": (_INT, [_P, _INT, _INT, _P, _P, _INT]),
    "sfx_conv_gather": (_INT, [_P, _INT, _INT, _P, _I64, _I64, _I64, _P, _P, _P, _P, _INT, _P, _INT]),
    "sfx_conv_wgrad": (_INT, [_P, _INT, _P, _P, _I64, _I64, _I64, _P, _P, _INT]),
    "sfx_conv_dense_wgrad": (_INT, [_P, _P, _P, _I64, _I64, _I64, _INT, _INT, _P, _INT]),
    "sfx_linear_dense_wgrad": (_INT, [_P, _P, _I64, _I64, _I64, _P, _P, _P, _INT]),
    "sfx_linear_dense_fprop": (_INT, [_P, _P, _I64, _I64, _I64, _P, _INT, _P, _INT]),
    "sfx_linear_dense_dgrad": (_INT, [_P, _P, _I64, _I64, _I64, _P, _INT]),
    "sfx_linear_gather": (_INT, [_P, _INT, _INT, _P, _I64, _P, _P, _P, _INT, _P, _INT]),
    "sfx_linear_wgrad": (_INT, [_P, _INT, _P, _P, _I64, _INT, _P, _INT]),
    "sfx_conv_pixels": (_INT, [_P, _INT, _P, _I64, _I64, _I64, _P, _P, _INT, _P, _INT]),
    "sfx_linear_rows": (_INT, [_P, _INT, _P, _I64, _P, _P, _P, _INT, _P, _INT]),
    "sfx_convert": (None, [_INT, _INT, _P, _P, _I64, _I64, _I64, _INT, _INT]),
    "sfx_norm": (None, [_INT, _INT, _P, _I64, _I64, _I64, _INT]),
    "sfx_channel_sums": (None, [_INT, _P, _I64, _I64, _I64, _P, _INT]),
    "sfx_column_sums": (None, [_P, _I64, _I64, _P, _INT]),
    "sfx_add": (None, [_P, _P, _P, _I64, _INT]),
    "sfx_relu_backward": (None, [_P, _P, _P, _I64, _INT]),
    "sfx_masked_copy": (None, [_P, _P, _P, _I64, _INT]),
    "sfx_masked_fold": (None, [_P, _P, _I64, _INT]),
    "sfx_mask_pack": (None, [_P, _P, _I64, _INT]),
    "sfx_masks_same": (_INT, [_P, _I64, _INT]),
    "sfx_products": (None, [_P, _I64, _P, _INT]),
    "sfx_max_pool": (None, [_INT, _INT, _P, _P, _I64, _I64, _P, _P, _P, _INT]),
    "sfx_caller": (_P, [ctypes.c_char_p]),
    "sfx_run": (_INT, [_P, _P, _I64, _P, _P, _I64, _INT]),
    "sfx_advise": (None, [_P, _I64]),
    "sfx_peak": (ctypes.c_double, [_INT]),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
BLOCK = 16


@functools.cache
def _attempt(isa: str | None) -> ctypes.CDLL | str:
    """The library, or why it cannot be built."""
    if isa is None:
        return _attempt(default_isa())
    try:
        lib = ctypes.CDLL(str(library(isa)))
    except CompilerUnavailable as error:
        return str(error)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def load(isa: str | None = None) -> ctypes.CDLL:
    """The library for `isa`, or for the best instruction set of this processor; built and loaded, or not, once.

    Raises:
        CompilerUnavailable: if it cannot be built.
    """
    found = _attempt(isa)
    if isinstance(found, str):
        raise CompilerUnavailable(found)
    return found


def arguments_of(function: str) -> int:
    """How many arguments a function of the library takes."""
    return len(_SIGNATURES[function][1])


def check(lib: ctypes.CDLL, status: int) -> None:
    """Raise what a kernel reported.

    Raises:
        RuntimeError: if `status` is not zero.
    """
    if status:
        raise RuntimeError(f"CPU kernel: {lib.sfx_error().decode()}")


def empty(lib: ctypes.CDLL, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor; a large one lies in memory that an earlier step has used and freed."""
    if math.prod(shape) * dtype.itemsize < buffers.SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return buffers.take(shape, dtype, lib.sfx_advise)


def empty_weight(lib: ctypes.CDLL, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool) -> torch.Tensor:
    """`empty` of a weight's shape `[O, I, *taps]`, contiguous or in channels_last."""
    dense = empty(lib, shape, dtype)
    return dense.view(*(shape[k] for k in (0, 2, 3, 1))).permute(0, 3, 1, 2) if channels_last else dense


class SfxPrologue(ctypes.Structure):
    """`SfxPrologue` of the library."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("mean", "scale", "shift")), ("relu", ctypes.c_int32))


def prologue_argument(prologue: Prologue | None, channels: int) -> object:
    """A prologue of an input of so many channels as the library takes it."""
    if prologue is None:
        return None
    for name, tensor in zip(("mean", "scale", "shift"), prologue[:3], strict=True):
        require(name, tensor, dtype=torch.float32, dims=1)
        if tensor.numel() != channels:
            raise ValueError(f"{name}: expected {channels} values, got {tensor.numel()}; pass one a channel of x")
    return ctypes.byref(SfxPrologue(*(pointer(tensor) for tensor in prologue[:3]), prologue.relu))


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's data, None for None."""
    return None if tensor is None else tensor.data_ptr()


def require(name: str, tensor: torch.Tensor, *, dtype: torch.dtype | None = None, dims: int | None = None) -> None:
    """Check that a kernel can read `tensor` through its pointer.

    Raises:
        ValueError: if it is not a contiguous CPU tensor of the dtype (fp32 or bf16 if None) and dimension.
    """
    wanted = (dtype,) if dtype else tuple(DTYPES)
    sound = tensor.is_cpu and tensor.dtype in wanted and tensor.is_contiguous()
    if not sound or (dims is not None and tensor.dim() != dims):
        raise ValueError(
            f"{name}: expected a contiguous CPU tensor of {list(wanted)}"
            + (f" with {dims} dimensions" if dims else "")
            + ", "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; call .contiguous() or convert it"
        )
