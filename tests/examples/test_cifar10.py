import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import sparsefx
from examples import cifar10, loss_curves
from sparsefx.bench import SETTINGS, Masks, Setting, trainers
from sparsefx.models import WideResNet


def digits() -> tuple[Tensor, Tensor]:
    """Real digits as small color images `[1797, 3, 8, 8]`."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1).expand(-1, 3, -1, -1)
    return ((images - images.mean()) / images.std()).contiguous(), torch.from_numpy(data.target)


def test_images_are_read_and_normalized(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "train_10k.npz", images=images, labels=np.arange(20, dtype=np.uint8) % 10)
    found, labels = cifar10.load(tmp_path, train=True)
    assert labels.tolist() == list(range(10)) * 2
    assert found[3, 1, 4, 5].item() == pytest.approx((images[3, 1, 4, 5] / 255 - 0.4822) / 0.2435, rel=1e-5)


def test_real_images(data_root: Path) -> None:
    if not (data_root / "cifar10" / "train_10k.npz").exists():
        pytest.skip(f"no CIFAR-10 images in {data_root / 'cifar10'}")
    images, labels = cifar10.load(data_root / "cifar10", train=True)
    assert images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().min() > 900
    assert images.mean().abs() < 0.05


def test_augmented_images_are_crops_of_the_padded_ones() -> None:
    x = torch.arange(3 * 8 * 8.0).view(1, 3, 8, 8)
    for found in cifar10.augment(x.expand(50, -1, -1, -1)):
        assert found.shape == (3, 8, 8)
        step = found[0, 4, 4] - found[0, 4, 3]
        assert torch.equal(found[1] - found[0], torch.full((8, 8), 64.0))
        assert abs(step) in (0, 1)


def test_a_checkpoint_serves_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("tiny", lambda: WideResNet(10, 1), (3, 8, 8), 32)
    monkeypatch.setitem(SETTINGS, "tiny", setting)
    args = argparse.Namespace(model="tiny", density=0.3, epochs=2, batch=64, lr=0.1, seed=0, quiet=True)
    images, labels = digits()
    model, error = cifar10.train(args, (images[:512], labels[:512]), (images[1280:1780], labels[1280:1780]))
    assert 0 <= error < 100
    assert len(model.scheduler.history) == 1
    path = tmp_path / "tiny.pt"
    torch.save({"model": "tiny", "state_dict": model.state_dict()}, path)
    again = trainers.sparse_model(setting, 0.05, Masks(checkpoint=path), images[:2])
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(sparsefx.masks(again)[name], mask)


def curves(update: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    data = loss_curves.endless(*digits(), 64)
    return loss_curves.summary(loss_curves.curves(WideResNet(10, 1), 0.3, data, 12, update), 2)


@pytest.mark.parametrize("update", [0, 5])
def test_the_loss_curve_is_that_of_the_masked_dense_network(update: int) -> None:
    """To fp32 noise: where two gradients nearly tie an update regrows one or the other, and dense ones in two memory
    formats come to lie 6e-4 apart."""
    for row in curves(update):
        assert row["sparse_to_dense"] < 5e-4 * row["loss"]


def test_a_network_that_is_not_masked_has_another_loss_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_curves, "project_", lambda *_: None)
    assert curves(0)[1]["sparse_to_dense"] > 1e-2


def test_differences_are_counted_by_part() -> None:
    losses = {
        "sparse": [1.0, 1.0, 3.0, 3.0],
        "dense": [1.0, 2.0, 3.0, 5.0],
        "dense, channels_last": [1.0, 2.0, 3.0, 4.0],
    }
    first, second = loss_curves.summary(losses, 2)
    assert first == {"first": 1, "last": 2, "loss": 1.5, "sparse_to_dense": 0.5, "dense_to_dense": 0.0}
    assert second == {"first": 3, "last": 4, "loss": 4.0, "sparse_to_dense": 1.0, "dense_to_dense": 0.5}
