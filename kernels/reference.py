"""Masked dense: the vendor's dense kernels on the stored weight. Right everywhere, and the oracle of every backend.

The stored weight is zero wherever the mask is False, so that forward and input gradient need no mask; the weight
gradient is masked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.masking import masked_, masked_product
from sparsefx.kernels.spec import ConvSpec


class Dense:
    """The dense backend. Stateless; `spec` is None for a linear layer."""

    name = "dense"

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer."""
        if spec is None:
            return F.linear(x, weight, bias)
        return torch.ops.aten.convolution(x, weight, bias, *spec.geometry)

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input."""
        if spec is None:
            return grad @ weight
        return _backward(spec, grad, x, weight, [True, False, False])[0]

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        if spec is None:
            return masked_product(grad, x, mask)[0]
        return masked_(self.dense_wgrad(spec, grad, x, weight), mask)

    def dense_wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of all weights, as if none were missing."""
        if spec is None:
            return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return _backward(spec, grad, x, weight, [False, True, False])[1]

    def both(self, spec: ConvSpec, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input gradient and dense weight gradient of a convolution in one call, which shares their layout work."""
        for_input, for_weight, _ = _backward(spec, grad, x, weight, [True, True, False])
        return for_input, for_weight


def _backward(spec: ConvSpec, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *spec.geometry, wanted)


DENSE = Dense()
