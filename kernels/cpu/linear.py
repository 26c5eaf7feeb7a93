"""Sparse linear layers on activations `[N, features]`."""

import torch

from .abi import DTYPES, check, empty, load, pointer, require
from .plan import PASSES, LayerPlan

FEW_ROWS = 4  # up to here a product of each row beats lanes over images, of which a block has 16


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of `x` `[N, features]` fp32, `[features]`."""
    require("x", x, dtype=torch.float32, dims=2)
    sums = torch.empty(x.shape[1])
    load().sfx_column_sums(pointer(x), *x.shape, pointer(sums), torch.get_num_threads())
    return sums


class LinearPlan(LayerPlan):
    """Forward and gradients of one masked linear layer; missing weights cost nothing.

    Args:
        mask: `[O, I]` bool, True where a weight exists.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
    Raises:
        CompilerUnavailable: if the kernels cannot be built.
        ValueError: if the mask is not a 2-dimensional bool tensor on the CPU.
    """

    def __init__(self, mask: torch.Tensor, isa: str | None = None) -> None:
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.device.type != "cpu":
            raise ValueError(
                f"mask: expected a bool [O, I] on the CPU, got {tuple(mask.shape)} {mask.dtype} on {mask.device}; "
                "pass the layer's own mask"
            )
        super().__init__(mask, (*mask.shape, 1, 1, 1, 1, 0, 0, 1, 1, 1), isa)

    def fprop(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = False
    ) -> torch.Tensor:
        """`x @ weight.T + bias` for `x` `[N, I]`, `weight` `[O, I]` or values `[nnz]`, `bias` fp32 `[O]`."""
        return self.run("fprop", x, weight, bias, relu=relu)[0]

    def dgrad(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Gradient of the input `[N, I]` from the output's `g` `[N, O]`."""
        return self.run("dgrad", g, weight)[0]

    def run(
        self, kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Result of pass "fprop" or "dgrad", and the values `[nnz]` that it ran with, which the other pass may take."""
        o, i = self.mask_shape
        features, outputs = (i, o) if kind == "fprop" else (o, i)
        self._check("x" if kind == "fprop" else "g", x, features)
        if weight.shape == self.mask_shape and weight.dtype == x.dtype and weight.is_contiguous() and weight.is_cpu:
            dense, values = weight, torch.empty(self.nnz)
        else:
            dense, values = None, self.collect(weight)
        bias = self._bias(bias)
        out = empty(self._lib, (x.shape[0], outputs), x.dtype)
        arguments = (
            DTYPES[x.dtype], pointer(x), x.shape[0], pointer(dense), pointer(values), pointer(bias), relu, pointer(out),
            torch.get_num_threads(),
        )  # fmt: skip
        if kind == "fprop" and x.shape[0] <= FEW_ROWS:
            status = self._lib.sfx_linear_rows(self.handle, *arguments)
        else:
            status = self._lib.sfx_linear_gather(self.handle, PASSES[kind], *arguments)
        check(self._lib, status)
        return out, values

    def wgrad(self, g: torch.Tensor, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense gradient of the weight `[O, I]`, zero where no weight exists."""
        self._check("x", x, self.mask_shape[1])
        self._check("g", g, self.mask_shape[0])
        if g.shape[0] != x.shape[0] or g.dtype != x.dtype:
            raise ValueError(f"g: expected {x.shape[0]} rows of {x.dtype}, got {tuple(g.shape)} {g.dtype}")
        dense = empty(self._lib, self.mask_shape, dtype)
        status = self._lib.sfx_linear_wgrad(
            self.handle, DTYPES[x.dtype], pointer(g), pointer(x), x.shape[0], DTYPES[dtype], pointer(dense),
            torch.get_num_threads(),
        )  # fmt: skip
        check(self._lib, status)
        return dense

    def _check(self, name: str, t: torch.Tensor, features: int) -> None:
        require(name, t, dims=2)
        if t.shape[1] != features:
            raise ValueError(f"{name}: expected [N, {features}], got {tuple(t.shape)}; flatten leading dimensions")
