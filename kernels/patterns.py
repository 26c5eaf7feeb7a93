"""From a mask to the lists that GPU kernels walk, built on the mask's own device without waiting for it.

A weight is seen as a matrix `[R, K]`. For the forward pass R is the output channels and K the *columns*, the pairs of
input channel and tap; for the input gradient R is the input channels and K the pairs of output channel and tap. Rows
are grouped into tiles, and a kernel visits only the columns in which some row of its tile has a weight.

All buffers have a fixed size and are written in place, so that a captured CUDA graph sees a new mask at the same
addresses. Nothing here reads a value back to the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """How rows and columns are cut up.

    Attributes:
        block: Rows that a kernel's tile has room for, a power of two.
        unit: Rows that a tile holds, at most `block`; that of a `("column", h)` granularity is h.
        cluster: Whether rows with similar columns are brought together; else they keep their order, so that tile `i`
            holds rows `i * unit` to `(i + 1) * unit - 1`.
        work: Columns in a block of the weight gradient's work list.
    """

    block: int
    unit: int
    cluster: bool = True
    work: int = 64


class Pattern:
    """The live columns of each tile of rows, in buffers of constant address.

    Args:
        rows, columns: Size of the matrix.
        tiling: How it is cut up.
        device: Of the masks to come.
        phases: Phase of each column, int64 `[K]` ascending in value from 0, for strided input gradients; None is one
            phase. The columns of a tile are listed phase by phase.
        phase_count: Number of phases.
    Attributes:
        rows: int32 `[tiles, block]`, row of the matrix in each place, -1 where there is none.
        place: int32 `[R]`, the place `tile * block + i` of each row.
        columns: int32 `[tiles, capacity]`, live columns of each tile.
        starts: int32 `[tiles, phase_count + 1]`, where each phase begins in `columns`; the last is the count.
        slots: int32 `[tiles, K]`, index in `columns` of each column, -1 where it is not live.
        work_starts: int32 `[tiles + 1]`, first block of each tile in the work list, then the number of blocks.
        work_tiles: int32, the tile of each block.
        matrix: uint8 `[R, K]`, the mask.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        tiling: Tiling,
        device: torch.device | str,
        phases: Tensor | None = None,
        phase_count: int = 1,
    ) -> None:
        if not 0 < tiling.unit <= tiling.block or tiling.block & (tiling.block - 1):
            raise ValueError(f"tiling: expected 0 < unit <= block, block a power of two, got {tiling}; choose another")
        self.row_count, self.column_count, self.tiling, self.phase_count = rows, columns, tiling, phase_count
        self.tiles = -(-rows // tiling.unit)
        self.capacity = -(-columns // 16) * 16
        if phases is None:
            phases = torch.zeros(columns, dtype=torch.long)
        self.by_phase = torch.argsort(phases, stable=True).to(device)
        self.edges = (phases[:, None] <= torch.arange(phase_count)).sum(0).to(device)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.rows, self.place = ints(self.tiles, tiling.block), ints(rows)
        self.columns, self.slots = ints(self.tiles, self.capacity), ints(self.tiles, columns)
        self.starts = ints(self.tiles, phase_count + 1)
        self.work_starts = ints(self.tiles + 1)
        self.work_tiles = ints(self.tiles * -(-columns // tiling.work))
        self.matrix = torch.zeros(rows, columns, dtype=torch.uint8, device=device)

    @property
    def counts(self) -> Tensor:
        """Number of live columns of each tile, int32 `[tiles]`."""
        return self.starts[:, -1]

    @property
    def column_density(self) -> Tensor:
        """Tile column density: the share of (tile, column) pairs that are live, a scalar on the device."""
        return self.counts.sum() / (self.tiles * max(1, self.column_count))

    @torch.no_grad()
    def update_(self, matrix: Tensor) -> None:
        """Rebuild every list for a new mask `[R, K]`, in place."""
        self.matrix.copy_(matrix)
        tiles, unit = self.tiles, self.tiling.unit
        order = cluster_rows(matrix, unit) if self.tiling.cluster and tiles > 1 else None
        if order is None:
            order = torch.arange(self.row_count, device=matrix.device)
        padded = torch.nn.functional.pad(order, (0, tiles * unit - self.row_count), value=-1).view(tiles, unit)
        self.rows.fill_(-1)
        self.rows[:, :unit].copy_(padded)
        index = torch.arange(self.row_count, device=matrix.device)
        self.place.index_copy_(0, order, (index // unit * self.tiling.block + index % unit).int())
        sorted_rows = torch.nn.functional.pad(matrix.index_select(0, order), (0, 0, 0, tiles * unit - self.row_count))
        self._list(sorted_rows.view(tiles, unit, -1).any(1))

    def _list(self, live: Tensor) -> None:
        """Fill the lists from the live columns `[tiles, K]` of each tile."""
        live = live.index_select(1, self.by_phase)
        count = live.cumsum(1)
        slot = torch.where(live, count - 1, -1)
        self.slots.index_copy_(1, self.by_phase, slot.int())
        self.starts.zero_()
        ends = torch.nn.functional.pad(count, (1, 0)).index_select(1, self.edges)
        self.starts[:, 1:].copy_(ends)
        # Columns that are not live all go to one slot too many, which is cut off.
        listed = self.columns.new_zeros(self.tiles, self.capacity + 1)
        target = torch.where(live, slot, self.capacity)
        listed.scatter_(1, target, self.by_phase.int().expand(self.tiles, -1))
        self.columns.copy_(listed[:, :-1])
        blocks = (self.counts + self.tiling.work - 1) // self.tiling.work
        self.work_starts[1:].copy_(blocks.cumsum(0))
        item = torch.arange(self.work_tiles.numel(), dtype=torch.int32, device=live.device)
        found = torch.searchsorted(self.work_starts[1:].contiguous(), item, right=True)
        self.work_tiles.copy_(found.clamp_max(self.tiles - 1))


def cluster_rows(matrix: Tensor, size: int) -> Tensor:
    """Order rows so that runs of `size` have similar columns, and rows without any come last.

    Each run starts from the fullest row left and takes the rows most similar to it by the Jaccard index; among equal
    ones the first, so that rows that are alike stay in their order.

    Args:
        matrix: Bool `[R, K]`.
        size: Rows of a run.
    Returns:
        A permutation of the rows, int64 `[R]`.
    """
    wide = matrix.float()
    counts = wide.sum(1)
    free = torch.ones_like(counts, dtype=torch.bool)
    runs = []
    for start in range(0, len(matrix), size):
        seed = counts.masked_fill(~free, -1).argmax().view(1)
        overlap = (wide @ wide.index_select(0, seed).T).squeeze(1)
        union = (counts + counts.index_select(0, seed) - overlap).clamp_min(1)
        similarity = (overlap / union).masked_fill(~free, -1)
        best = similarity.sort(descending=True, stable=True).indices[: min(size, len(matrix) - start)]
        free.index_fill_(0, best, False)
        runs.append(best.sort().values)
    return torch.cat(runs)


def forward_matrix(mask: Tensor) -> Tensor:
    """A mask `[O, I, *taps]` as the forward pass sees it: `[O, I * taps]`."""
    return mask.flatten(1)


def transposed_matrix(mask: Tensor) -> Tensor:
    """A mask `[O, I, *taps]` as the input gradient sees it: `[I, O * taps]`."""
    return mask.transpose(0, 1).flatten(1)


def tap_phases(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Phase of each column of the input gradient, int64 `[channels * taps]`.

    Input position `i` and tap `r` meet an output position only if `i + padding - r * dilation` is a multiple of the
    stride, so that each tap serves one residue of `i` in each dimension.
    """
    r = (torch.arange(kernel[0]) * dilation[0] - padding[0]) % stride[0]
    s = (torch.arange(kernel[1]) * dilation[1] - padding[1]) % stride[1]
    return (r[:, None] * stride[1] + s[None, :]).flatten().repeat(channels)


def aligned_rows(matrix: Tensor, sizes: tuple[int, ...] = (128, 64, 32, 16, 8)) -> int:
    """The largest of `sizes` in which consecutive rows all have the same columns, 1 if there is none.

    Waits for the device, so call it once for a layer.
    """
    for size in sizes:
        whole = len(matrix) // size * size
        if whole == 0:
            continue
        groups = matrix[:whole].view(-1, size, matrix.shape[1])
        tail = matrix[whole:]
        if bool((groups == groups[:, :1]).all()) and bool((tail == tail[:1]).all()):
            return size
    return 1
