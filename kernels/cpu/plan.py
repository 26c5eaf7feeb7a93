"""What convolution and linear plans share: existing weights, lists, tilings."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsefx.kernels.spec import is_channels_last

from .abi import DTYPES, check, empty_weight, load, pointer, require

PASSES = {"fprop": 0, "dgrad": 1, "wgrad": 2, "infer": 3}


@dataclass(frozen=True)
class Tiling:
    """How a pass is cut up: a tile is rows x cols output positions x batch blocks of 16 images."""

    rows: int
    cols: int
    batch: int
    strip_rows: int
    strip_cols: int
    chunk: int
    block: int


class LayerPlan:
    """The existing weights of one layer and the lists that kernels walk, built from a mask and kept per input size.

    Args:
        mask: `[O, I / groups, R, S]` bool, True where a weight exists.
        shape: The layer: out, in, R, S, stride (2), padding (2), dilation (2), groups.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
    Raises:
        CompilerUnavailable: if the kernels cannot be built.
    Attributes:
        handle: The layer in the library; freed with the plan.
    """

    def __init__(self, mask: torch.Tensor, shape: Sequence[int], isa: str | None = None) -> None:
        self._lib = load(isa)
        self.mask_shape = tuple(mask.shape)
        mask = mask.detach().contiguous()
        self.shape = (ctypes.c_int64 * 11)(*shape)
        handle = self._lib.sfx_layer_new(self.shape, pointer(mask))
        if not handle:
            raise RuntimeError(f"CPU kernel: {self._lib.sfx_error().decode()}")
        self.handle = handle
        weakref.finalize(self, self._lib.sfx_layer_free, handle)
        self.nnz: int = self._lib.sfx_layer_nnz(handle)

    @property
    def density(self) -> float:
        """Fraction of weights that exist."""
        return self.nnz / max(1, torch.Size(self.mask_shape).numel())

    def collect(self, weight: torch.Tensor) -> torch.Tensor:
        """Existing weights as fp32 values `[nnz]` in row-major order; `[nnz]` values pass through."""
        if weight.dim() == 1:
            require("values", weight, dtype=torch.float32)
            if weight.numel() != self.nnz:
                raise ValueError(f"values: expected {self.nnz}, got {weight.numel()}; collect them with this plan")
            return weight
        weight, last = weight.detach(), is_channels_last(weight)
        weight = weight if last else weight.contiguous()
        require("weight", weight.permute(0, 2, 3, 1) if last else weight)
        if weight.numel() != torch.Size(self.mask_shape).numel():
            raise ValueError(
                f"weight: expected {self.mask_shape}, got {tuple(weight.shape)}; make a plan from this layer's mask"
            )
        values = torch.empty(self.nnz, dtype=torch.float32)
        status = self._lib.sfx_layer_collect(
            self.handle, DTYPES[weight.dtype], last, pointer(weight), pointer(values), torch.get_num_threads()
        )
        check(self._lib, status)
        return values

    def scatter(
        self, values: torch.Tensor, dtype: torch.dtype = torch.float32, *, channels_last: bool = False
    ) -> torch.Tensor:
        """A dense tensor of the mask's shape holding `values` `[nnz]` where weights exist and zero elsewhere."""
        require("values", values, dtype=torch.float32, dims=1)
        dense = empty_weight(self._lib, self.mask_shape, dtype, channels_last=channels_last)
        status = self._lib.sfx_layer_scatter(
            self.handle, DTYPES[dtype], channels_last, pointer(values), pointer(dense), torch.get_num_threads()
        )
        check(self._lib, status)
        return dense

    def _bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        if bias is None:
            return None
        bias = bias.detach()
        require("bias", bias, dtype=torch.float32, dims=1)
        if bias.numel() != self.mask_shape[0]:
            raise ValueError(f"bias: expected {self.mask_shape[0]} values, got {bias.numel()}; pass this layer's bias")
        return bias

    def tune(self, kind: str, tiling: Tiling | None) -> None:
        """Fix the tiling of pass "fprop", "dgrad", "wgrad" or "infer", or let the cost model choose (None)."""
        values = tiling and (ctypes.c_int64 * 7)(
            tiling.rows, tiling.cols, tiling.batch, tiling.strip_rows, tiling.strip_cols, tiling.chunk, tiling.block
        )
        check(self._lib, self._lib.sfx_layer_tune(self.handle, PASSES[kind], values))

    def tiling(self, kind: str, h: int, w: int, images: int) -> tuple[Tiling, float]:
        """The tiling of a pass at `images` inputs of `h` x `w`, and the milliseconds that its lists took to build."""
        values, build_ms = (ctypes.c_int64 * 7)(), ctypes.c_double()
        status = self._lib.sfx_layer_tiling(
            self.handle, PASSES[kind], h, w, images, torch.get_num_threads(), values, ctypes.byref(build_ms)
        )
        check(self._lib, status)
        return Tiling(*values), build_ms.value
