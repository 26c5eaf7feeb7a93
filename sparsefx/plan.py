"""What one layer runs with one mask, and whether a mask is still that one."""

import math

import torch
from torch import Tensor

from sparsefx.kernels.masking import MaskBits
from sparsefx.kernels.runtime import Backend
from sparsefx.kernels.spec import is_channels_last

_WORTH_TRYING = 0.9
"""Compaction is a candidate below this share of live weights in the matrix; above it only adds copies."""
Key = tuple


class Plan:
    """What one layer runs with its present mask.

    Attributes:
        mask: A copy of the mask that the plan was built for.
        backends: Those built so far, by name and geometry; "dense" needs none.
        choices: Name of the backend by call: pass, shape, type and memory format.
        ready: The chosen backend by call and geometry.
        running: The latest call of each pass.
        bits: Those of the mask; None where they cannot be read in one go.
        nnz: Number of weights that exist.
        live_in, live_out: Numbers of channels that have a weight; `empty_in`, `empty_out`: of those that have none.
    """

    def __init__(self, mask: Tensor, transposed: bool, groups: int) -> None:
        self.mask = mask.clone()
        self._seen(mask)
        matrix = mask.transpose(0, 1) if transposed else mask
        bytes_ = matrix.view(torch.uint8).flatten(2) if matrix.dim() > 2 else matrix.view(torch.uint8).unsqueeze(2)
        self.nnz = int(torch.count_nonzero(mask))
        self.live_out = int(torch.count_nonzero(bytes_.amax((1, 2))))
        self.live_in = int(torch.count_nonzero(bytes_.amax(0).amax(1)))
        self.empty_out, self.empty_in = matrix.shape[0] - self.live_out, matrix.shape[1] - self.live_in
        share = self.live_out * self.live_in / max(1, matrix.shape[0] * matrix.shape[1])
        self.compacts = groups == 1 and share <= _WORTH_TRYING
        self.backends: dict[tuple, Backend] = {}
        self.choices: dict[Key, str] = {}
        self.ready: dict[tuple, Backend] = {}
        self.running: dict[str, Key] = {}

    def keep(self, backends: dict[tuple, Backend]) -> None:
        """Take over those of an earlier plan that change in place, as captured CUDA graphs hold their addresses."""
        for key, backend in backends.items():
            update = getattr(backend, "update_", None)
            if update is not None:
                update(self.mask)
                self.backends[key] = backend

    def stale(self, mask: Tensor, look: bool = True) -> bool:
        """Whether `mask` differs from the plan's.

        Args:
            look: Compare the contents even where version and storage have not moved: a write through `.data` or a
                broadcast moves neither.
        """
        at = _stamp(mask)
        if at == self._stamp and (not look or (self.bits is not None and self.bits.same(mask))):
            return False
        if self.mask.device == mask.device and torch.equal(self.mask, mask):
            self._seen(mask)
            return False
        return True

    @property
    def full(self) -> bool:
        """Whether no weight is missing."""
        return self.nnz == self.mask.numel()

    def _seen(self, mask: Tensor) -> None:
        """Remember where `mask` lies, which equals the plan's, and its bits where they can be read in one go."""
        self._stamp = _stamp(mask)
        plain = type(mask) is Tensor and mask.is_cpu and (mask.is_contiguous() or is_channels_last(mask))
        self.bits = MaskBits(mask) if plain else None


def buckets(plan: Plan) -> tuple[int, int, int]:
    """What a choice depends on of a mask: live channels in sixteenths, density in half powers of two."""
    widest = max(plan.mask.shape[0], plan.mask.shape[1])
    density = max(plan.nnz, 1) / plan.mask.numel()
    return -(-plan.live_in * 16 // widest), -(-plan.live_out * 16 // widest), round(2 * math.log2(density))


def _stamp(mask: Tensor) -> tuple[int, int]:
    return mask.data_ptr(), 0 if mask.is_inference() else mask._version
