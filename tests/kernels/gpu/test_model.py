"""The performance model against facts about the work it describes."""

from dataclasses import replace

import pytest
import torch

from sparsefx.kernels.gpu.choose import choose, work_of
from sparsefx.kernels.gpu.config import default
from sparsefx.kernels.gpu.model import H100, Work, narrow_share, predict, predict_transpose
from sparsefx.kernels.gpu.plan import Geometry
from sparsefx.kernels.gpu.timing import fp32_precision

BIG = Work(640, 5760, 9, 8192, 8192, 8192, 0.05, "bf16")


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_executed_work_is_the_share_of_live_columns(kind):
    config = default(kind, torch.bfloat16, 64)
    said = predict(kind, BIG, config)
    assert said.dense_flops == 2 * 640 * 5760 * 8192
    assert said.executed_flops == pytest.approx(0.05 * said.dense_flops)
    assert predict(kind, replace(BIG, column_density=1.0), config).seconds > 5 * said.seconds


def test_no_prediction_beats_the_ceilings():
    for kind in ("fprop", "dgrad", "wgrad"):
        said = predict(kind, BIG, default(kind, torch.bfloat16, 64))
        assert said.seconds >= said.executed_flops / H100.flops["bf16"]
        assert said.seconds >= said.dram_bytes / H100.dram
        assert said.bound in ("products", "dram", "l2", "launch")


def test_rows_on_the_m_side_are_padded_to_64_and_on_the_n_side_are_not():
    first, last = (replace(default("fprop", torch.bfloat16, 16), rows_first=side) for side in (True, False))
    assert predict("fprop", BIG, first).executed_flops == 4 * predict("fprop", BIG, last).executed_flops


def test_a_narrow_product_reaches_less_of_the_peak():
    assert narrow_share(8) < narrow_share(16) < narrow_share(32) < narrow_share(64) == narrow_share(128) == 1


def test_a_transpose_moves_every_byte_twice():
    assert predict_transpose(1 << 30, 2) == pytest.approx(2 * 2 * (1 << 30) / H100.dram, rel=0.01)


def test_half_types_and_tf32_follow_torchs_switches():
    mask, geometry = torch.ones(8, 4, 3, 3, dtype=torch.bool), Geometry("conv", (3, 3), (2, 2), (1, 1), (1, 1))
    assert work_of("fprop", mask, geometry, (8, 8), 2, torch.bfloat16, 0.5).precision == "bf16"
    for switch in ("ieee", "tf32"):
        with fp32_precision(switch):
            work = work_of("dgrad", mask, geometry, (8, 8), 2, torch.float32, 0.5)
        assert work == Work(4, 72, 9, 32, 128, 32, 0.5, switch)


def test_rows_that_share_columns_64_by_64_get_large_tiles_and_16_by_16_small_ones():
    geometry = Geometry("linear", (1, 1), (1, 1), (0, 0), (1, 1))
    chosen = []
    for alike in (64, 16):
        mask = (torch.rand(1024 // alike, 512) < 0.05).repeat(alike, 1)
        chosen.append(choose(mask, geometry, (1, 1), 4096, torch.float32, None)["fprop"].rows)
    assert chosen == [64, 16]
