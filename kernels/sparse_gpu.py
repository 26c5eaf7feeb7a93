"""The CUDA backend: Triton kernels that visit live columns only, between torch's layouts and `[C, H, W, N]`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from sparsefx.kernels.patterns import aligned_rows, forward_matrix, transposed_matrix
from sparsefx.kernels.spec import ConvSpec, is_channels_last

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SAMPLED_ROWS = 64


class SparseGpu:
    """The sparse backend for one mask: ungrouped 2-D convolutions and linear layers in fp32, fp16 and bf16.

    Lists are built for a type at its first call, and rewritten in place by `update_`, so that captured CUDA graphs
    stay valid. On CPU tensors the kernels run in Triton's interpreter, slowly: for tests.
    """

    name = "sparse-gpu"

    def __init__(self, mask: Tensor, spec: ConvSpec | None) -> None:
        from sparsefx.kernels.gpu.plan import Geometry

        self.mask = mask
        self.geometry = Geometry.of(mask, spec)
        self.unit = aligned_rows(forward_matrix(mask))
        self._plans: dict[torch.dtype, object] = {}

    @staticmethod
    def supports(spec: ConvSpec | None, x: Tensor, mask: Tensor) -> bool:
        """Whether the kernels cover a call."""
        shape = spec is None or (not spec.transposed and spec.groups == 1 and mask.dim() == 4)
        return shape and x.is_cuda and x.dtype in _TYPES and x.numel() > 0 and find_spec("triton") is not None
