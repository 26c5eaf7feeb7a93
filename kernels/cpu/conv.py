"""Sparse 2-D convolution on blocked activations `[ceil(N / 16), C, H, W, 16]`."""

import torch

from sparsefx.kernels.spec import Prologue

from .abi import BLOCK, DTYPES, check, empty, pointer, prologue_argument, require
from .plan import PASSES, LayerPlan


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class ConvPlan(LayerPlan):
    """Forward and gradients of one masked convolution; missing weights cost nothing.

    Lanes beyond `images` in the last block are zero in every input, and are written as zero in every output.

    Args:
        mask: `[O, I / groups, R, S]` bool, True where a weight exists.
        stride, padding, dilation: As in `torch.nn.Conv2d`, padding with zeros.
        groups: Groups of channels.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
    Raises:
        CompilerUnavailable: if the kernels cannot be built.
        ValueError: if the mask is not a 4-dimensional bool tensor on the CPU or does not fit `groups`.
    """

    def __init__(
        self,
        mask: torch.Tensor,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        isa: str | None = None,
    ) -> None:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.device.type != "cpu" or mask.shape[0] % groups:
            raise ValueError(
                f"mask: expected a bool [O, I / {groups}, R, S] on the CPU, got {tuple(mask.shape)} {mask.dtype} "
                f"on {mask.device}; pass the layer's own mask and groups"
            )
        o, i, r, s = mask.shape
        self.stride, self.padding, self.dilation, self.groups = _pair(stride), _pair(padding), _pair(dilation), groups
        super().__init__(mask, (o, i * groups, r, s, *self.stride, *self.padding, *self.dilation, groups), isa)

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        """Output height and width for an input of `h` x `w`."""
        sizes = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip((h, w), self.padding, self.dilation, self.mask_shape[2:], self.stride, strict=True)
        )
        oh, ow = sizes
        if oh < 1 or ow < 1:
            raise ValueError(f"convolution: expected an input that the kernel fits in, got {h} x {w}; pad it")
        return oh, ow

    def fprop(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        images: int | None = None,
        prologue: Prologue | None = None,
        residual: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """Convolve, add `residual`, clamp at zero where `relu`.

        Args:
            x: `[B, I, H, W, 16]` fp32 or bf16.
            weight: `[O, I / groups, R, S]`, or its values `[nnz]` from `collect`.
            bias: `[O]` fp32.
            images: How many images `x` holds; all of its lanes if None.
            prologue: What is done to `x` first.
            residual: Of the result's shape and dtype.
        Returns:
            `[B, O, H', W', 16]` of x's dtype.
        """
        h, w = self._check("x", x, self.mask_shape[1] * self.groups, images)
        out = empty(self._lib, (x.shape[0], self.mask_shape[0], *self.out_hw(h, w), BLOCK), x.dtype)
        if residual is not None:
            require("residual", residual, dtype=x.dtype)
            if residual.shape != out.shape:
                raise ValueError(
                    f"residual: expected {tuple(out.shape)}, got {tuple(residual.shape)}; pass one of that shape"
                )
        self._gather("fprop", x, h, w, weight, bias, images, relu, out, prologue, residual)
        return out

    def infer(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = False
    ) -> torch.Tensor:
        """Convolve a few images `[N, I, H, W]` to `[N, O, H', W']`, with lanes over pixels instead of images."""
        require("x", x, dims=4)
        n, channels, h, w = x.shape
        if channels != self.mask_shape[1] * self.groups:
            raise ValueError(f"x: expected {self.mask_shape[1] * self.groups} channels, got {tuple(x.shape)}")
        values, bias = self.collect(weight), self._bias(bias)
        out = empty(self._lib, (n, self.mask_shape[0], *self.out_hw(h, w)), x.dtype)
        status = self._lib.sfx_conv_pixels(
            self.handle, DTYPES[x.dtype], pointer(x), n, h, w, pointer(values), pointer(bias), relu, pointer(out),
            torch.get_num_threads(),
        )  # fmt: skip
        check(self._lib, status)
        return out

    def dgrad(
        self, g: torch.Tensor, weight: torch.Tensor, input_hw: tuple[int, int], *, images: int | None = None
    ) -> torch.Tensor:
        """Gradient of the input `[B, I, H, W, 16]` from the output's `g` `[B, O, H', W', 16]`."""
        h, w = input_hw
        if self._check("g", g, self.mask_shape[0], images) != self.out_hw(h, w):
            raise ValueError(f"g: expected {self.out_hw(h, w)} positions for input {h} x {w}, got {tuple(g.shape)}")
        out = empty(self._lib, (g.shape[0], self.mask_shape[1] * self.groups, h, w, BLOCK), g.dtype)
        self._gather("dgrad", g, h, w, weight, None, images, False, out)
        return out

    def wgrad_values(
        self, g: torch.Tensor, x: torch.Tensor, *, images: int | None = None, prologue: Prologue | None = None
    ) -> torch.Tensor:
        """Gradient of the existing weights, fp32 `[nnz]` in row-major order; `prologue` is done to `x` first."""
        h, w = self._check("x", x, self.mask_shape[1] * self.groups, images)
        if self._check("g", g, self.mask_shape[0], images) != self.out_hw(h, w) or g.dtype != x.dtype:
            raise ValueError(f"g: expected {self.out_hw(h, w)} positions of {x.dtype}, got {tuple(g.shape)} {g.dtype}")
        values = torch.empty(self.nnz, dtype=torch.float32)
        status = self._lib.sfx_conv_wgrad(
            self.handle, DTYPES[x.dtype], pointer(g), pointer(x), images or x.shape[0] * BLOCK, h, w,
            self._prologue(prologue), pointer(values), torch.get_num_threads(),
        )  # fmt: skip
        check(self._lib, status)
        return values

    def wgrad(self, g: torch.Tensor, x: torch.Tensor, *, images: int | None = None) -> torch.Tensor:
        """Dense gradient of the weight `[O, I / groups, R, S]`, fp32, zero where no weight exists."""
        return self.scatter(self.wgrad_values(g, x, images=images))

    def _check(self, name: str, t: torch.Tensor, channels: int, images: int | None) -> tuple[int, int]:
        require(name, t, dims=5)
        blocks = t.shape[0] if images is None else -(-images // BLOCK)
        if t.shape[0] != blocks or t.shape[1] != channels or t.shape[4] != BLOCK:
            raise ValueError(
                f"{name}: expected [{blocks}, {channels}, H, W, {BLOCK}], got {tuple(t.shape)}; convert with to_blocked"
            )
        return t.shape[2], t.shape[3]

    def _prologue(self, prologue: Prologue | None) -> object:
        return prologue_argument(prologue, self.mask_shape[1] * self.groups)

    def _gather(
        self,
        kind: str,
        x: torch.Tensor,
        h: int,
        w: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        images: int | None,
        relu: bool,
        out: torch.Tensor,
        prologue: Prologue | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        values, bias = self.collect(weight), self._bias(bias)
        status = self._lib.sfx_conv_gather(
            self.handle, PASSES[kind], DTYPES[x.dtype], pointer(x), images or x.shape[0] * BLOCK, h, w,
            self._prologue(prologue), pointer(values), pointer(bias), pointer(residual), relu, pointer(out),
            torch.get_num_threads(),
        )  # fmt: skip
        check(self._lib, status)
