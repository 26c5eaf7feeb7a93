"""A row of the model benchmark is consistent with itself, and says what was timed."""

import time

import pytest
import torch
from torch import nn

from sparsefx.bench import SETTINGS, Masks, Request, Setting, bench_model, trainers
from sparsefx.bench.layers import layers_of, trained_layers
from sparsefx.bench.report import markdown, text
from sparsefx.errors import CheckpointError


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


TINY = Setting("tiny", net, (3, 8, 8), 16, 0.1)


def test_a_row_is_consistent():
    said = []
    row = bench_model(TINY, Request(16, 0.1, rounds=3, compiled=False), said.append)
    assert set(row["dense"]) == {"nchw", "nhwc", "nchw bf16", "nhwc bf16"}
    fp32 = {name: one["ms"] for name, one in row["dense"].items() if "bf16" not in name}
    assert row["best_dense"] == min(fp32, key=fp32.__getitem__)
    assert row["ratio"] == pytest.approx(min(fp32.values()) / row["sparse"]["step"])
    assert row["ratio_without_window"] == pytest.approx(min(fp32.values()) / row["sparse"]["outside"])
    assert row["density"] == pytest.approx(0.1, abs=1e-3)
    assert row["sparse"]["window"] == 44
    assert set(row["breakdown"]) == {"dense", "sparse", "sparse in the window"}
    for kind in ("optimizer and masks", "dense convolutions", "normalization"):
        assert row["breakdown"]["dense"][kind] > 0
    assert 0 < row["optimizer_share"] < 1
    assert set(row["inference"]) == {"1", "128"}
    for one in row["inference"].values():
        assert set(one) - {"best_dense", "best_sparse", "ratio"} == {*row["dense"], "sparse nchw", "sparse nhwc"}
        assert one["best_sparse"] == min(("sparse nchw", "sparse nhwc"), key=lambda name: one[name]["ms"])
        assert one["ratio"] == pytest.approx(one[one["best_dense"]]["ms"] / one[one["best_sparse"]]["ms"])
    assert row["memory"]["sparse_activations"] > 0
    assert any("warming up nhwc" in line for line in said)
    row["threads"] = 1
    assert f"ratio   {row['ratio']:.2f}" in text(row)
    assert markdown([row, {"model": "x", "error": "y"}]).count("\n") == 2


def test_a_network_with_all_its_weights_has_no_window_and_no_update():
    row = bench_model(TINY, Request(16, 1.0, parts=("memory", "breakdown"), rounds=3, compiled=False), str)
    assert row["density"] == 1
    assert (row["sparse"]["window"], row["sparse"]["update"]) == (0, 0)
    assert row["ratio"] == row["ratio_without_window"]
    assert set(row["breakdown"]) == {"dense", "sparse"}


def test_a_baseline_that_fails_is_named_and_left_out(monkeypatch):
    real = trainers.dense

    def fail(setting, batch, variant):
        if variant == "nhwc":
            raise RuntimeError("no such kernel")
        return real(setting, batch, variant)

    monkeypatch.setattr("sparsefx.bench.model.dense", fail)
    request = Request(16, 0.1, rounds=3, parts=("step",), variants=("nchw", "nhwc"))
    row = bench_model(TINY, request, lambda _: None)
    assert row["failed"] == {"nhwc": "RuntimeError: no such kernel"}
    assert row["best_dense"] == "nchw"


@pytest.mark.parametrize("faster", ["nchw", "nhwc"])
def test_the_sparse_network_is_timed_in_its_faster_memory_format(faster, monkeypatch):
    made = []
    real = trainers.sparse

    def note(setting, batch, density, masks, memory_format, **options):
        trainer = real(setting, batch, density, masks, memory_format, **options)
        if memory_format != faster:
            step = trainer.step
            trainer.step = lambda: (time.sleep(0.2), step())
        made.append(trainer)
        return trainer

    monkeypatch.setattr("sparsefx.bench.model.sparse", note)
    request = Request(16, 0.1, rounds=3, parts=("step",), variants=("nchw", "nhwc"))
    row = bench_model(TINY, request, lambda _: None)
    assert row["memory_format"] == faster
    assert len(made) == 4  # in each format, in the window, and updating
    for trainer in (made[0 if faster == "nchw" else 1], *made[2:]):
        for tensor in (trainer.images, trainer.model[3].weight):
            assert tensor.is_contiguous(memory_format=trainers.FORMATS[faster])


def test_masks_of_columns_and_of_a_checkpoint(tmp_path, monkeypatch):
    images, _ = TINY.data(4)
    model = trainers.sparse_model(TINY, 0.2, Masks(rows=4), images)
    mask = model[3].weight_mask.view(4, 4, -1)
    assert bool((mask == mask[:, :1]).all())
    path = tmp_path / "trained.pt"
    torch.save({"model": "tiny", "state_dict": model.state_dict()}, path)
    again = trainers.sparse_model(TINY, 0.05, Masks(checkpoint=path), images)
    assert torch.equal(again[3].weight_mask, model[3].weight_mask)
    assert torch.equal(again[3].weight, model[3].weight)

    monkeypatch.setitem(SETTINGS, "tiny", TINY)
    layers, masks = trained_layers(path)
    assert [layer.name for layer in layers] == ["tiny 0", "tiny 3", "tiny 7"]
    assert torch.equal(masks["tiny 3"], model[3].weight_mask)
    torch.save({"model": "tiny", "state_dict": net().state_dict()}, path)
    with pytest.raises(CheckpointError, match="without masks"):
        trainers.sparse_model(TINY, 0.05, Masks(checkpoint=path), images)
    torch.save(net().state_dict(), path)
    with pytest.raises(CheckpointError, match="expected a dict with model"):
        trainers.load(path)


def test_layers_of_a_network():
    found = layers_of(TINY, 32, 0.1)
    assert {(one.out, one.inputs, one.kernel, one.size, one.batch) for one in found.values()} == {
        (16, 3, 3, 8, 32),
        (16, 16, 3, 8, 32),
        (10, 1024, 1, 0, 32),
    }
