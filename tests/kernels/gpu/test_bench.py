"""The GPU benchmark and the tuner, run through the interpreter on toy sizes."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from sparsefx.kernels.gpu.bench import _break_even, bench
from sparsefx.kernels.gpu.cases import TOYS, draw
from sparsefx.kernels.gpu.config import NARROWEST, Table, key
from sparsefx.kernels.gpu.plot import scatter
from sparsefx.kernels.gpu.tune import candidates, tune
from sparsefx.kernels.layer import Layer

LINEAR = TOYS[-1]


def test_rows_hold_right_results_and_what_the_model_predicts(tmp_path, capsys):
    path = tmp_path / "rows.json"
    rows = bench(
        torch.device("cpu"), layers=[LINEAR], masks=["h8"], density=0.3, precisions=["fp32"], rounds=1, json_path=path
    )
    assert [row.kind for row in rows] == ["fprop", "dgrad", "wgrad"]
    assert all(row.error < 1e-5 for row in rows)
    assert rows[0].column_density == pytest.approx(rows[0].density)
    assert all(row.predicted_ms > 0 for row in rows)
    document = json.loads(path.read_text())
    assert "interpreter" in document["device"]
    assert len(document["rows"]) == 3
    printed = capsys.readouterr().out
    assert " ms" not in printed.split("\n", 1)[1]


def test_trained_masks_are_a_further_kind():
    mask = torch.rand(LINEAR.shape) < 0.2
    shape = "x".join(map(str, LINEAR.shape))
    rows = bench(torch.device("cpu"), layers=[LINEAR], masks=[], trained={shape: mask}, precisions=["fp32"], rounds=1)
    assert {row.masks for row in rows} == {"trained"}
    assert rows[0].density == pytest.approx(mask.float().mean().item())


def test_masks_in_columns_of_h_repeat_h_times():
    mask = draw(Layer("", 20, 6, 3, 4, 1), "h8", 0.5, torch.device("cpu"))
    assert mask.shape == (20, 6, 3, 3)
    assert torch.equal(mask[:8], mask[:1].expand(8, -1, -1, -1))
    assert torch.equal(mask[16:], mask[16:17].expand(4, -1, -1, -1))


def test_break_even_is_where_a_line_through_two_times_meets_dense():
    assert _break_even((0.1, 2.0), (0.2, 3.0), 4.0) == pytest.approx(0.3)
    assert _break_even((0.1, 2.0), (0.2, 3.0), 0.5) == 0
    assert _break_even((0.1, 2.0), (0.2, 3.0), 99.0) == 1


def test_the_tuner_keeps_the_fastest_candidate():
    chosen = list(candidates("fprop", torch.float32, NARROWEST))[2]
    seen = []

    def clock(calls, device, rounds):
        (call,) = calls.values()
        seen.append(call)
        config = call.func.__self__.configs[call.func.__name__]
        return {"": 0.5 if config == chosen else 1.0}

    table = tune(
        [LINEAR],
        torch.device("cpu"),
        dtypes=[torch.float32],
        rows=[NARROWEST],
        clock=clock,
        say=lambda line: None,
    )
    assert len(seen) > 10
    density = next(iter(seen)).func.__self__.forward.column_density.item()
    name = key("fprop", LINEAR.shape, (1, 1, 1, 8), torch.float32, NARROWEST, density)
    assert table.get("cpu", name) == chosen
    assert Table.load(table.dump()).entries == table.entries


def test_the_plot_shows_every_point(tmp_path):
    path = tmp_path / "plot.svg"
    scatter(path, "a & b", "x", "y", {"one": [(0.1, 4.0), (0.5, 0.5)], "two": [(1.0, 1.0)], "none": []})
    circles = ElementTree.parse(path).getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 + 3
