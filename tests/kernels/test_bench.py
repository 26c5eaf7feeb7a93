"""The layer benchmark counts and compares what it says."""

import json

import pytest
import torch

from sparsefx.kernels.bench import PASSES, bench_layers
from sparsefx.kernels.layer import Layer


@pytest.mark.parametrize("layer", [Layer("conv", 12, 8, 3, 6, 20, 2, 0.5), Layer("linear", 12, 8, 1, 0, 20, 1, 0.5)])
def test_rows_are_right(layer, tmp_path):
    shape = (12, 8, 3, 3) if layer.size else (12, 8)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, :2] = True  # a quarter of the weights, a quarter of the columns
    rows = bench_layers([layer], {layer.name: mask}, rounds=3, threads=1, json_path=tmp_path / "rows.json")
    assert [row.kind for row in rows] == list(PASSES)
    positions = 20 * (9 if layer.size else 1)
    for row in rows:
        assert row.error < 1e-5
        assert row.density == row.live_columns == 0.25
        assert row.ratio == pytest.approx(row.dense_ms / row.sparse_ms)
        assert row.dense_gflops * row.dense_ms == pytest.approx(2 * mask.numel() * positions / 1e6)
        assert row.useful_gflops == pytest.approx(row.dense_equivalent_gflops * 0.25)
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(PASSES)


def test_mask_of_another_shape_raises():
    with pytest.raises(ValueError, match="this layer's mask"):
        bench_layers([Layer("conv", 4, 4, 3, 6, 2)], {"conv": torch.ones(4, 4, 1, 1, dtype=torch.bool)}, threads=1)
