"""Contract 4 with larger units: they stay whole, and the count never drifts."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import DensityError, SparsefxError
from tests.contract4 import (
    assert_untouched,
    assert_whole_units,
    assert_zero_missing,
    attach,
    train,
)
from tests.masked_dense import net
from tests.test_update_oracle import Bank

GRANULARITIES = ["weight", ("column", 2), ("column", 5), "channel", ("channel", "in"), ("block", 2, 3), ("block", 4, 4)]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_units_stay_whole_and_the_count_never_drifts(granularity: Any, density: float) -> None:
    torch.manual_seed(0)
    model = Bank(
        [nn.Linear(31, 17), nn.Conv2d(5, 11, 3, padding=1), nn.ConvTranspose2d(6, 7, 2), nn.Conv2d(4, 6, 3, groups=2)],
        [(3, 31), (2, 5, 4, 4), (2, 6, 3, 3), (2, 4, 3, 3)],
    )
    sparsefx.sparsify(model, density, granularity=granularity)
    assert_whole_units(model, granularity, density)
    optimizer = attach(model)
    moved = 0
    for step in train(model, optimizer, model.size, 16):
        assert_zero_missing(model)
        if step % 2 == 0:
            assert_whole_units(model, granularity, density)
            moved += sum(row["grown"] for row in model.scheduler.history[-1]["layers"].values())
    assert moved > 0


@pytest.mark.parametrize("granularity", ["channel", ("channel", "in"), ("column", 8), ("block", 8, 8)], ids=str)
def test_no_room_for_one_unit_a_layer_raises_and_leaves_the_model(granularity: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DensityError, match="density"):
        sparsefx.sparsify(model, 0.01, granularity=granularity)
    assert_untouched(model, state)


@pytest.mark.parametrize(
    "granularity",
    [
        "filter",
        "columns",
        ("column",),
        ("column", 0),
        ("column", 2.0),
        ("block", 2),
        ("block", -1, 2),
        ("channel", "x"),
        3,
    ],
    ids=str,
)
def test_an_unknown_granularity_raises_and_leaves_the_model(granularity: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsefxError, match="granularity"):
        sparsefx.sparsify(model, 0.2, granularity=granularity)
    assert_untouched(model, state)
