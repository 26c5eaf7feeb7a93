"""Dense kernels of our own for linear layers on the CPU, which segments can call: the vendor's cannot be."""

import torch
from torch import Tensor

from sparsefx.kernels.cpu.linear import column_sums
from sparsefx.kernels.cpu.linear_dense import linear_dense_dgrad, linear_dense_fprop
from sparsefx.kernels.masking import multiplies
from sparsefx.kernels.reference import Dense
from sparsefx.kernels.spec import ConvSpec


class DenseCpu(Dense):
    """The dense backend of linear layers that `takes` accepts. Stateless."""

    @staticmethod
    def takes(x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels cover a call: fp32 rows `[N, I]`, not too many for the weight gradient."""
        plain = all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (x, weight))
        return plain and x.dim() == 2 and x.numel() > 0 and multiplies(x.shape[0])

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer."""
        return linear_dense_fprop(x, weight, bias)

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input."""
        return linear_dense_dgrad(grad.contiguous(), weight)

    def bias_grad(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""
        return column_sums(grad.contiguous())


DENSE_CPU = DenseCpu()
