"""Dense weights, gradients and moments under a mask, in one pass over memory each.

Every function takes any tensors; those on the CPU in fp32 that lie alike in memory run in C++, where torch's masked
operators take several times as long as the memory needs.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsefx.kernels.cpu.abi import empty, load, pointer
from sparsefx.kernels.cpu.build import CompilerUnavailable
from sparsefx.kernels.cpu.linear_dense import FEWEST_LANES, MOST_ROWS, linear_dense_wgrad
from sparsefx.kernels.spec import same_order


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of `x` that is zero where `mask` is False."""
    library = _library(x, mask)
    if library is None:
        return x.masked_fill(~mask, 0)
    out = empty(library, x.shape, x.dtype) if x.is_contiguous() else torch.empty_like(x)
    library.sfx_masked_copy(pointer(x), pointer(mask), pointer(out), x.numel(), torch.get_num_threads())
    return out


def masked_(x: Tensor, mask: Tensor) -> Tensor:
    """Zero `x` in place where `mask` is False."""
    library = _library(x, mask)
    if library is None:
        return x.masked_fill_(~mask, 0)
    library.sfx_masked_copy(pointer(x), pointer(mask), pointer(x), x.numel(), torch.get_num_threads())
    _bump(x)
    return x


class Fold(NamedTuple):
    """What is added to a first moment, and where.

    Attributes:
        moment: First moment, changed in place.
        collected: Gradient of missing weights; what it holds at existing ones is not read.
        weight: Changed in place.
        mask: Bool, True where a weight exists.
        seen: Factor from the gradient as collected to the one that the optimizer saw.
        alpha: Factor with which the optimizer's rule adds a gradient to the moment.
    """

    moment: Tensor
    collected: Tensor
    weight: Tensor
    mask: Tensor
    seen: float = 1.0
    alpha: float = 1.0


def fold_missing_(folds: Sequence[Fold]) -> None:
    """Where `mask` is False: add `alpha * seen * collected` to `moment`, and zero `weight`; of all folds at once."""
    arrays: list[int] = []
    factors: list[float] = []
    changed: list[Tensor] = []
    for moment, collected, weight, mask, seen, alpha in folds:
        if _library(moment, mask, collected, weight) is None:
            missing = collected.masked_fill(mask, 0).mul_(seen)
            moment.add_(missing.to(moment.dtype), alpha=alpha)
            weight.detach().masked_fill_(~mask, 0)
            continue
        arrays += [t.data_ptr() for t in (moment, collected, weight, mask)]
        arrays.append(moment.numel())
        factors += seen, alpha
        changed += moment, weight
    if changed:
        words, numbers = (ctypes.c_int64 * len(arrays))(*arrays), (ctypes.c_float * len(factors))(*factors)
        load().sfx_masked_fold(words, numbers, len(factors) // 2, torch.get_num_threads())
        _bump(*changed)


def masked_product(grad: Tensor, x: Tensor, mask: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """`grad.T @ x`, the weight gradient of a linear layer, zero where `mask` is False; and, if `keep`, as it is.

    Args:
        grad: `[..., O]`.
        x: `[..., I]`.
        mask: `[O, I]` bool.
    """
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if _multiplies(grad, x, mask):
        return linear_dense_wgrad(grad.contiguous(), x.contiguous(), mask, keep=keep)
    dense = grad.T @ x
    return (masked(dense, mask), dense) if keep else (masked_(dense, mask), None)


def products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """`<a, b>` and `<b, b>` of each pair, summed alike: they are equal where `a` is `b` wherever `b` is not zero."""
    found: list[tuple[float, float]] = []
    arrays: list[int] = []
    places: list[int] = []
    for a, b in pairs:
        if _library(a, None, b) is None:
            left, right = a.reshape(-1), b.reshape(-1).to(a.dtype)
            found.append((float(torch.dot(left, right)), float(torch.dot(right, right))))
            continue
        places.append(len(found))
        found.append((0.0, 0.0))
        arrays += a.data_ptr(), b.data_ptr(), a.numel()
    if places:
        words, sums = (ctypes.c_int64 * len(arrays))(*arrays), (ctypes.c_double * (2 * len(places)))()
        load().sfx_products(words, len(places), sums, torch.get_num_threads())
        for k, place in enumerate(places):
            found[place] = sums[2 * k], sums[2 * k + 1]
    return found


class MaskBits:
    """A mask's bits, an eighth of it, with which another is compared in one pass over its memory.

    Args:
        mask: Bool, on the CPU, contiguous or in channels_last.
    """

    def __init__(self, mask: Tensor) -> None:
        self._library, self._bytes = _loaded(), mask.numel()
        if self._library is None:
            self._mask = mask.clone()
            return
        self._bits = torch.empty(-(-self._bytes // 64), dtype=torch.int64)
        self._library.sfx_mask_pack(pointer(mask), pointer(self._bits), self._bytes, torch.get_num_threads())

    def same(self, mask: Tensor) -> bool:
        """Whether a mask of the same shape and strides has the same elements."""
        return torch.equal(self._mask, mask) if self._library is None else Masks([(self, mask)]).same()

    def row(self, mask: Tensor) -> tuple[int, int, int]:
        """The comparison as `sfx_masks_same` takes it; where there is a library."""
        return mask.data_ptr(), self._bits.data_ptr(), self._bytes


class Masks:
    """Masks that are compared with the bits of others in one call.

    Args:
        pairs: Bits, and a mask of their shape and strides that stays where it lies. The C++ library must be there.
    """

    def __init__(self, pairs: Sequence[tuple[MaskBits, Tensor]]) -> None:
        rows = [word for bits, mask in pairs for word in bits.row(mask)]
        library = _loaded()
        assert library is not None
        self._library, self._pairs = library, pairs
        self._arguments = (ctypes.c_int64 * len(rows))(*rows), len(pairs)

    def same(self) -> bool:
        """Whether all of them have the same elements."""
        return bool(self._library.sfx_masks_same(*self._arguments, torch.get_num_threads()))


def any_nonzero(x: Tensor) -> bool:
    """Whether an element of `x` is not zero."""
    return bool(x.any()) if _library(x, None) is None else products([(x, x)])[0][1] != 0


def _library(x: Tensor, mask: Tensor | None, *others: Tensor) -> ctypes.CDLL | None:
    """The C++ library where all tensors can be walked as one array each; only `others` may be leaves of a graph."""
    if x.requires_grad or not (x.is_contiguous() or _dense(x)):
        return None
    shape = x.shape
    for tensor in (x, *others):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype == torch.float32
        if not plain or tensor.shape != shape or not same_order(tensor, x):
            return None
    if mask is not None and (type(mask) is not Tensor or mask.shape != shape or not same_order(mask, x)):
        return None
    return _loaded()


def _multiplies(grad: Tensor, x: Tensor, mask: Tensor) -> bool:
    """Whether a product in C++ that masks as it writes beats the vendor's and a pass that masks."""
    if torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad):
        return False
    plain = all(type(t) is Tensor and t.is_cpu and t.dtype == torch.float32 for t in (grad, x)) and mask.is_contiguous()
    return plain and multiplies(x.shape[0])


def multiplies(rows: int) -> bool:
    """Whether sums over so many rows are taken in C++."""
    library = _loaded() if rows <= MOST_ROWS else None
    return library is not None and library.sfx_lanes() >= FEWEST_LANES


def _loaded() -> ctypes.CDLL | None:
    try:
        return load()
    except CompilerUnavailable:
        return None


def compiles() -> bool:
    """Whether the C++ library is there."""
    return _loaded() is not None


def _bump(*tensors: Tensor) -> None:
    """Let autograd notice a write through a pointer."""
    versioned = [x for x in tensors if not x.is_inference()]
    if versioned:
        torch.autograd.graph.increment_version(versioned)


def _dense(x: Tensor) -> bool:
    return x.dim() in (4, 5) and x.is_contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    )
