import numpy as np
import pytest
import torch
from torch import Tensor

from examples import granularity, mnist
from tests.examples.test_mnist import synthetic

ROW = {"network": "lenet5", "epochs": 1, "torch": torch.__version__}


def data() -> tuple[Tensor, ...]:
    return (*synthetic(300), *synthetic(250))


def test_columns_leave_tile_columns_empty() -> None:
    weight, column = (granularity.train("lenet5", kind, 2, 0, data()) for kind in ("weight", "column:16"))
    assert mnist.key(weight, granularity.KEY) == ["lenet5", "weight", 2, 0]
    assert column["tile_columns"] < 0.5 * weight["tile_columns"]


def test_the_report_averages_seeds_and_the_plot_shows_each_network(tmp_path) -> None:
    rows = [
        {**ROW, "network": name, "granularity": kind, "seed": seed, "test_error": error + seed, "tile_columns": 0.25}
        for name, error in (("lenet5", 1.0), ("wrn-10-2", 50.0))
        for kind in ("weight", "column:8")
        for seed in (0, 1)
    ]
    lines = granularity.report(rows).splitlines()
    assert lines[2] == "| lenet5 | weight | 2 | 1.50 +- 0.50 | 25% |"
    assert len(lines) == 6
    pytest.importorskip("matplotlib")
    granularity.plot(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "lenet5 at 5%" in drawn or drawn.count('<g id="axes_') == 2
    assert np.isclose(granularity.table(rows)[2][3], 50.5)
