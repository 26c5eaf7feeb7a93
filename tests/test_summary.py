"""The summary tells the truth about every layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import sparsefx
from sparsefx.errors import LayerError
from sparsefx.summary import tile_column_density


class Odd(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.again = nn.Conv2d(3, 8, 3)
        self.again.weight = self.conv.weight
        self.odd = Odd(3, 8, 3)
        self.normed = weight_norm(nn.Conv2d(8, 8, 1))
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.kept = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.conv(x) + self.again(x) + self.odd(x)


def test_every_layer_has_its_row():
    model = sparsefx.sparsify(Net(), 0.25, keep_dense=["kept"])
    rows = {row.name: row for row in sparsefx.summary(model).rows}
    assert {name: row.status for name, row in rows.items()} == {
        "conv": "sparse",
        "again": "shared",
        "odd": "dense",
        "normed": "dense",
        "embed": "dense",
        "head": "dense",
        "attention": "dense",
        "attention.out_proj": "sparse",
        "kept": "dense",
    }
    assert "shares conv" in rows["again"].reason
    assert "forward of its own" in rows["odd"].reason
    assert "parametrized" in rows["normed"].reason
    assert "tied to embed.weight" in rows["head"].reason
    assert "packed attention" in rows["attention"].reason
    assert rows["kept"].reason == "keep_dense"


def test_counts_are_those_of_the_masks():
    model = sparsefx.sparsify(nn.Sequential(nn.Conv2d(3, 70, 3), nn.ReLU(), nn.Conv2d(70, 8, 1)), 0.25)
    mask = torch.zeros(70, 3, 3, 3, dtype=torch.bool)
    mask[:64, 0, 1, 1] = True
    mask[69, 2, 0] = True
    model[0].set_mask_(mask)
    row = next(r for r in sparsefx.summary(model).rows if r.name == "0")
    assert (row.nnz, row.shape) == (67, (70, 3, 3, 3))
    assert (row.empty_in, row.empty_out) == (1, 5)
    assert row.density == 67 / mask.numel()
    assert row.tile_column_density == (1 + 3) / (2 * 27)
    totals = sparsefx.summary(model).to_dict()
    assert totals["nnz"] == sum(int(m.sum()) for m in sparsefx.masks(model).values())
    assert f"{totals['nnz']:,} of {totals['total']:,} weights" in str(sparsefx.summary(model))


def test_tile_column_density_of_random_masks_is_the_known_share():
    mask = torch.rand(1024, 2000, generator=torch.Generator().manual_seed(0)) < 0.05
    assert tile_column_density(mask) == pytest.approx(1 - 0.95**64, abs=0.01)
    assert tile_column_density(mask, rows=16) == pytest.approx(1 - 0.95**16, abs=0.01)


def test_a_dense_model_is_an_error():
    with pytest.raises(LayerError, match="expected a sparsified model"):
        sparsefx.summary(nn.Linear(3, 3))
