"""Sparse linear layers on activations `[N, features]`."""

import torch

from .abi import DTYPES, check, empty, pointer, require
from .plan import PASSES, LayerPlan

FEW_ROWS = 4  # up to here a product of each row beats lanes over images, of which a block has 16


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
        return self._gather("fprop", x, weight, bias, relu)

    def dgrad(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Gradient of the input `[N, I]` from the output's `g` `[N, O]`."""
        return self._gather("dgrad", g, weight, None, False)

    def wgrad_values(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gradient of the existing weights, fp32 `[nnz]` in row-major order."""
        self._check("x", x, self.mask_shape[1])
        self._check("g", g, self.mask_shape[0])
        if g.shape[0] != x.shape[0] or g.dtype != x.dtype:
            raise ValueError(f"g: expected {x.shape[0]} rows of {x.dtype}, got {tuple(g.shape)} {g.dtype}")
        values = torch.empty(self.nnz, dtype=torch.float32)
        status = self._lib.sfx_linear_wgrad(
            self._handle, DTYPES[x.dtype], pointer(g), pointer(x), x.shape[0], pointer(values), torch.get_num_threads()
        )
        check(self._lib, status)
        return values

    def wgrad(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Dense gradient of the weight `[O, I]`, fp32, zero where no weight exists."""
        return self.scatter(self.wgrad_values(g, x))

    def _check(self, name: str, t: torch.Tensor, features: int) -> None:
        require(name, t, dims=2)
        if t.shape[1] != features:
            raise ValueError(f"{name}: expected [N, {features}], got {tuple(t.shape)}; flatten leading dimensions")

    def _gather(
        self, kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
    ) -> torch.Tensor:
        o, i = self.mask_shape
        features, outputs = (i, o) if kind == "fprop" else (o, i)
        self._check("x" if kind == "fprop" else "g", x, features)
        values, bias = self.collect(weight), self._bias(bias)
        out = empty(self._lib, (x.shape[0], outputs), x.dtype)
        if kind == "fprop" and x.shape[0] <= FEW_ROWS:
            status = self._lib.sfx_linear_rows(
                self._handle, DTYPES[x.dtype], pointer(x), x.shape[0], pointer(values), pointer(bias), relu,
                pointer(out), torch.get_num_threads(),
            )  # fmt: skip
            check(self._lib, status)
            return out
        status = self._lib.sfx_linear_gather(
            self._handle, PASSES[kind], DTYPES[x.dtype], pointer(x), x.shape[0], pointer(values), pointer(bias), relu,
            pointer(out), torch.get_num_threads(),
        )  # fmt: skip
        check(self._lib, status)
        return out
