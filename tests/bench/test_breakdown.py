"""The kinds of work of a step, those of the kernels inside a segment among them."""

import pytest
from torch import nn

from sparsefx.bench import trainers
from sparsefx.bench.breakdown import breakdown
from sparsefx.bench.settings import Setting
from sparsefx.specialize import Specializer


def chain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.mark.parametrize(
    ("graph", "kind", "other"),
    [("sparse", "sparse kernels", "dense products"), ("joined dense", "dense products", "sparse kernels")],
)
def test_kernels_of_a_segment_are_seen(monkeypatch, graph, kind, other):
    monkeypatch.setattr(Specializer, "choose_graph", lambda self, key, calls: graph)
    trainer = trainers.sparse(Setting("chain", chain, (1, 8, 8), 16, 0.1), 16, 0.1, trainers.Masks())
    found = breakdown(trainer, steps=1)
    assert found[kind] > 0
    assert other not in found
    assert found["optimizer and masks"] > 0
