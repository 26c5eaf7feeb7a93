"""The CUDA backend: Triton kernels that visit live columns only, between torch's layouts and `[C, H, W, N]`.

Importing this needs Triton, which exists on Linux only.
"""

import torch
from torch import Tensor

from sparsefx.kernels.gpu.choose import choose, precision_of, unit_rows
from sparsefx.kernels.gpu.layout import from_chwn, to_chwn, transpose
from sparsefx.kernels.gpu.plan import Geometry, LayerPlan
from sparsefx.kernels.spec import ConvSpec, is_channels_last

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class SparseGpu:
    """The sparse backend for one mask: ungrouped 2-D convolutions and linear layers in fp32, fp16 and bf16.

    Plain activations are converted to `[C, H, W, N]` and back at each call, those of a region are not.

    Lists are built at the first call with a size and type, and rewritten in place by `update_`, so that captured CUDA
    graphs stay valid. On CPU tensors the kernels run in Triton's interpreter, slowly: for tests.
    """

    name = "sparse"

    def __init__(self, mask: Tensor, spec: ConvSpec | None) -> None:
        self.mask = mask
        self.geometry = Geometry.of(mask, spec)
        self.unit = unit_rows(mask)
        self._plans: dict[tuple, LayerPlan] = {}

    @staticmethod
    def supports(spec: ConvSpec | None, x: Tensor, mask: Tensor) -> bool:
        """Whether the kernels cover a call."""
        shape = spec is None or not (spec.transposed or spec.groups != 1 or mask.dim() != 4)
        return shape and x.dtype in _TYPES and x.numel() > 0

    def update_(self, mask: Tensor) -> None:
        """Take a new mask in place: tile sizes, buffers and launches stay."""
        self.mask = mask
        for plan in self._plans.values():
            plan.update_(mask)

    def plan(self, dtype: torch.dtype, hw: tuple[int, int], images: int) -> LayerPlan:
        """The plan for inputs `[I, *hw, images]`."""
        key = (dtype, hw, images)
        if key not in self._plans:
            configs = choose(self.mask, self.geometry, hw, images, dtype, self.unit)
            self._plans[key] = LayerPlan(self.mask, self.geometry, configs, self.unit)
        return self._plans[key]

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer."""
        source = self._enter(spec, x)
        plan = self._plan_of(spec, x)
        out = plan.fprop(source, weight.detach(), bias, precision=precision_of(x.dtype, spec is None))
        return self._leave(spec, out, x)

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input."""
        precision = precision_of(x.dtype, spec is None)
        source, (hw, _) = self._enter(spec, grad), self._size(spec, x)
        out = self._plan_of(spec, x).dgrad(source, weight.detach(), hw, precision=precision)
        return self._leave(spec, out, x)

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        precision = precision_of(x.dtype, spec is None)
        source, grads = self._enter(spec, x), self._enter(spec, grad)
        return self._plan_of(spec, x).wgrad(grads, source, weight.detach(), precision=precision)

    def _size(self, spec: ConvSpec | None, x: Tensor) -> tuple[tuple[int, int], int]:
        """Height and width, and the number of images."""
        if spec is None:
            return (1, 1), x.numel() // x.shape[-1]
        if spec.images:
            return (x.shape[1], x.shape[2]), x.shape[3]
        return (x.shape[2], x.shape[3]), x.shape[0]

    def _plan_of(self, spec: ConvSpec | None, x: Tensor) -> LayerPlan:
        return self.plan(x.dtype, *self._size(spec, x))

    def _enter(self, spec: ConvSpec | None, x: Tensor) -> Tensor:
        """`x` as `[C, H, W, N]`; inside a region it is."""
        x = x.detach()
        if spec is not None:
            return x.contiguous() if spec.images else to_chwn(x)
        rows = x.reshape(-1, x.shape[-1])
        return transpose(rows).view(x.shape[-1], 1, 1, len(rows))

    def _leave(self, spec: ConvSpec | None, out: Tensor, x: Tensor) -> Tensor:
        """`[C, H, W, N]` in the layout of `x`."""
        if spec is not None and spec.images:
            return out
        if spec is None:
            return transpose(out.flatten(1)).view(*x.shape[:-1], len(out))
        return from_chwn(out, torch.channels_last if is_channels_last(x) else torch.contiguous_format)
