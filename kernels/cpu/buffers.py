"""Memory of large tensors, used again once nothing refers to it, so that no step faults its pages in anew.

A tensor from here is an ordinary one. Its memory comes back when its storage is freed, which is when the last tensor,
view, graph or user lets go of it; until then it is nobody else's.
"""

import math
import sys
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

SMALLEST = 4 << 20
"""Bytes from which a tensor's memory is kept; below, the allocator of the process keeps it itself."""
_ALIGNMENT = 2 << 20
_SLACK = 1.5
"""Most that is lent and kept, over the most that was ever lent at once: sizes come and go within a step."""

_lock = threading.RLock()
_free: dict[int, list[np.ndarray]] = {}
_kept = 0
_lent = 0
_most_lent = 0


class _Lease(np.ndarray):
    """A view of kept memory; the tensor made of it holds it, and its end gives the memory back."""

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing() and self.base is not None:
            _give_back(self.base)


def take(shape: Sequence[int], dtype: torch.dtype, advise: Callable[[int, int], None]) -> torch.Tensor:
    """Lend memory as an uninitialized tensor.

    Args:
        advise: `(address, bytes)`, called for memory that is new.
    """
    global _kept, _lent, _most_lent
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        waiting = _free.get(size)
        memory = waiting.pop() if waiting else None
        if memory is not None:
            _kept -= size
        _lent += size
        _most_lent = max(_most_lent, _lent)
    if memory is None:
        whole = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        start = -whole.ctypes.data % _ALIGNMENT
        memory = whole[start : start + size]
        advise(memory.ctypes.data, size)
    if dtype == torch.float32:
        return torch.from_numpy(_Lease(shape, np.float32, memory))
    # A view could not be written in place where an autograd function returns it; and of a storage that Python has seen
    # autograd does not know that nobody else holds it, so it would not add gradients in place.
    bytes_ = torch.from_numpy(_Lease(size, np.uint8, memory))
    return torch.empty(0, dtype=dtype).set_(bytes_.view(dtype).view(tuple(shape)))  # pyright: ignore[reportArgumentType]


def _give_back(memory: np.ndarray) -> None:
    """Keep what was lent, as long as lent and kept memory together are little more than was ever lent at once."""
    global _kept, _lent
    with _lock:
        _lent -= memory.size
        _free.setdefault(memory.size, []).append(memory)
        _kept += memory.size
        for size in list(_free):
            while _kept + _lent > _SLACK * _most_lent and _free[size] and size != memory.size:
                _free[size].pop()
                _kept -= size


def kept() -> int:
    """Bytes that wait to be used again."""
    return _kept


def release() -> None:
    """Give all waiting memory back to the system."""
    global _kept, _most_lent
    with _lock:
        _free.clear()
        _kept, _most_lent = 0, _lent
