"""The lists that GPU kernels walk, against the mask read the slow way."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparsefx.kernels.patterns import (
    Pattern,
    Tiling,
    aligned_rows,
    cluster_rows,
    forward_matrix,
    tap_phases,
    transposed_matrix,
)


def build(matrix, tiling, **phases):
    pattern = Pattern(*matrix.shape, tiling, "cpu", **phases)
    pattern.update_(matrix)
    return pattern


def columns_of(pattern, tile):
    return pattern.columns[tile, : pattern.counts[tile]].tolist()


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 30), (40, 7)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("cluster", [True, False])
def test_lists_hold_the_live_columns_of_each_tile(shape, density, cluster):
    matrix = torch.rand(shape) < density
    pattern = build(matrix, Tiling(16, 16, cluster))
    assert sorted(pattern.rows[pattern.rows >= 0].tolist()) == list(range(shape[0]))
    for tile, rows in enumerate(pattern.rows):
        live = matrix[rows[rows >= 0].long()].any(0)
        assert columns_of(pattern, tile) == live.nonzero().flatten().tolist()
        slots = pattern.slots[tile]
        assert torch.equal(slots >= 0, live)
        assert torch.equal(pattern.columns[tile][slots[live].long()].long(), live.nonzero().flatten())
    assert torch.equal(pattern.rows.flatten()[pattern.place.long()].long(), torch.arange(shape[0]))
    wanted = pattern.counts.sum() / (pattern.tiles * shape[1])
    assert pattern.column_density == wanted


@pytest.mark.parametrize(("h", "block"), [(8, 8), (16, 16), (10, 16), (64, 64)])
def test_column_units_map_to_tiles_one_to_one(h, block):
    """A unit of `("column", h)` is one (tile, column) pair: tile column density is the density itself."""
    units = torch.rand(4, 90) < 0.1
    matrix = units.repeat_interleave(h, 0)[: 3 * h + h // 2]
    pattern = build(matrix, Tiling(block, h, cluster=False))
    for tile, unit in enumerate(units):
        assert columns_of(pattern, tile) == unit.nonzero().flatten().tolist()
        rows = pattern.rows[tile]
        assert rows[rows >= 0].tolist() == list(range(tile * h, min(tile * h + h, len(matrix))))


def test_clustering_finds_rows_that_share_columns_and_packs_empty_rows_last():
    families = torch.rand(4, 200) < 0.1
    matrix = families.repeat(16, 1)
    matrix[torch.randperm(64)[:16]] = False
    shuffled = build(matrix, Tiling(16, 16, cluster=False))
    clustered = build(matrix, Tiling(16, 16))
    assert clustered.column_density < 0.55 * shuffled.column_density
    order = cluster_rows(matrix, 16)
    assert not matrix[order[48:]].any()
    assert clustered.counts[-1] == 0


def test_clustering_keeps_aligned_units_together():
    matrix = (torch.rand(8, 100) < 0.2).repeat_interleave(8, 0)
    runs = cluster_rows(matrix, 8).view(-1, 8)
    assert (runs - runs[:, :1]).eq(torch.arange(8)).all()
    assert (runs[:, 0] % 8 == 0).all()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
def test_phases_partition_the_columns_by_the_positions_they_serve(stride):
    mask = torch.rand(6, 5, 3, 4) < 0.4
    padding, dilation = (1, 2), (2, 1)
    phases = tap_phases(6, (3, 4), stride, padding, dilation)
    count = stride[0] * stride[1]
    pattern = build(transposed_matrix(mask), Tiling(8, 8), phases=phases, phase_count=count)
    listed = []
    for phase in range(count):
        begin, end = pattern.starts[0, phase : phase + 2]
        for column in pattern.columns[0, begin:end].tolist():
            tap = column % 12
            assert (phase // stride[1] + padding[0] - tap // 4 * dilation[0]) % stride[0] == 0
            assert (phase % stride[1] + padding[1] - tap % 4 * dilation[1]) % stride[1] == 0
            listed.append(column)
    assert sorted(listed) == transposed_matrix(mask).any(0).nonzero().flatten().tolist()


def test_work_list_names_every_block_of_live_columns_once():
    matrix = torch.rand(40, 70) < 0.2
    matrix[8:16] = False
    pattern = build(matrix, Tiling(8, 8, cluster=False, work=16))
    expected = [tile for tile, count in enumerate(pattern.counts.tolist()) for _ in range(-(-count // 16))]
    assert pattern.work_starts[-1] == len(expected)
    assert pattern.work_tiles[: len(expected)].tolist() == expected
    assert pattern.work_starts.tolist() == [0, *torch.bincount(torch.tensor(expected), minlength=5).cumsum(0).tolist()]


def test_an_update_keeps_every_address_and_leaves_nothing_of_the_old_mask():
    pattern = Pattern(20, 50, Tiling(16, 16), "cpu")
    buffers = {k: v.data_ptr() for k, v in vars(pattern).items() if isinstance(v, torch.Tensor)}
    last = torch.rand(20, 50) < 0.3
    for matrix in (torch.ones(20, 50, dtype=torch.bool), torch.zeros(20, 50, dtype=torch.bool), last):
        pattern.update_(matrix)
    assert buffers == {k: v.data_ptr() for k, v in vars(pattern).items() if isinstance(v, torch.Tensor)}
    fresh = build(last, Tiling(16, 16))
    for name, value in vars(fresh).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(pattern, name)), name


@pytest.mark.parametrize("cluster", [True, False])
def test_an_update_never_waits_for_the_device(cluster):
    """A tensor without contents raises as soon as a value is read back."""
    with FakeTensorMode():
        pattern = Pattern(70, 90, Tiling(16, 16, cluster), "cuda", torch.arange(90) % 4, 4)
        pattern.update_(torch.zeros(70, 90, dtype=torch.bool, device="cuda"))


def test_alignment_is_the_largest_group_of_equal_rows():
    units = torch.rand(6, 40) < 0.3
    assert aligned_rows(units.repeat_interleave(16, 0)) == 16
    assert aligned_rows(units.repeat_interleave(16, 0)[:-5]) == 16
    assert aligned_rows(torch.rand(64, 40) < 0.3) == 1
    assert aligned_rows(torch.ones(256, 40, dtype=torch.bool)) == 128


def test_matrices_list_columns_as_channel_and_tap():
    mask = torch.rand(3, 4, 2, 2) < 0.5
    assert torch.equal(forward_matrix(mask)[1, 2 * 4 + 3], mask[1, 2, 1, 1])
    assert torch.equal(transposed_matrix(mask)[2, 1 * 4 + 3], mask[1, 2, 1, 1])


def test_a_tile_that_does_not_fit_its_block_raises():
    with pytest.raises(ValueError, match="unit <= block"):
        Pattern(4, 4, Tiling(8, 10), "cpu")
