import argparse
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsefx
from examples import mnist
from sparsefx.bench import SETTINGS as BENCHED
from sparsefx.bench import Masks
from sparsefx.bench.trainers import sparse_model

SETTINGS = {
    "model": "lenet300",
    "density": 0.2,
    "granularity": "weight",
    "window": "auto",
    "clip": None,
    "batch": 20,
    "save": None,
    "quiet": True,
}


def synthetic(count: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Ten classes, each a fixed random image plus noise: learnable in two epochs."""
    prototypes = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(10, (count,))
    return prototypes[labels] + noise * torch.randn(count, 1, 28, 28), labels


def settings(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**SETTINGS, "epochs": 2, **changes})


@pytest.mark.parametrize(("model", "density"), [("lenet300", 0.2), ("lenet300", 1.0), ("lenet5", 0.2)])
def test_two_epochs_learn_the_synthetic_digits(model: str, density: float) -> None:
    row = mnist.train(settings(model=model, density=density), 0, (*synthetic(800), *synthetic(200)))
    assert row["test_error"] < 5
    assert row["density"] == density


def test_a_saved_network_can_be_timed(tmp_path: Path) -> None:
    path = tmp_path / "lenet300.pt"
    mnist.train(settings(epochs=1, save=path), 0, (*synthetic(400), *synthetic(100)))
    setting, masks = BENCHED["lenet300"], Masks(checkpoint=path)
    model = sparse_model(setting, 1.0, masks, setting.data(4)[0])
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(mask, saved[f"{name}_mask"])
        assert torch.equal(model.get_parameter(name), saved[name])


def test_same_seed_same_result() -> None:
    data = (*synthetic(500), *synthetic(100, noise=3.0))
    first, second = (mnist.train(settings(epochs=1), 3, data) for _ in range(2))
    for field in ("test_error", "valid_error", "test_error_at_best_valid"):
        assert first[field] == second[field]


def test_real_mnist(data_root: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    archives = sorted((data_root / "mnist").glob("*.gz"))
    if len(archives) != 4:
        pytest.skip(f"expected the four files of MNIST in {data_root / 'mnist'}, found {len(archives)}")
    for archive in archives:
        with gzip.open(archive) as source, open(raw / archive.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    images, labels = mnist.load(tmp_path, download=False, train=True)
    test = mnist.load(tmp_path, download=False, train=False)
    assert images.shape == (60_000, 1, 28, 28)
    assert test[0].shape == (10_000, 1, 28, 28)
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3
    row = mnist.train(settings(batch=50), 0, (images[:5000], labels[:5000], test[0][:2000], test[1][:2000]))
    assert row["test_error"] < 20


def test_an_interrupted_series_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, trained = tmp_path / "mnist.json", []
    monkeypatch.setattr(mnist, "load", lambda *_: synthetic(500))
    train = mnist.train

    def counted(args: argparse.Namespace, seed: int, data: tuple[Tensor, ...]) -> dict:
        trained.append(seed)
        return train(args, seed, data)

    monkeypatch.setattr(mnist, "train", counted)
    for seeds in ("1", "2"):
        options = ["--seeds", seeds, "--epochs", "1", "--density", "1", "--out", str(out), "--quiet"]
        monkeypatch.setattr("sys.argv", ["mnist.py", *options])
        mnist.main()
    assert trained == [0, 1]
    assert [row["seed"] for row in json.loads(out.read_text())] == [0, 1]


def test_report_has_mean_and_standard_error() -> None:
    common = {"model": "lenet300", "density": 0.05, "window": "auto", "granularity": "weight", "epochs": 1}
    rows = [{**common, "seed": i, "test_error": e, "test_error_at_best_valid": 2.0} for i, e in enumerate((1.0, 2.0))]
    assert mnist.report(rows).splitlines()[-1].endswith("| 2 | 0 | 1.50 +- 0.50 | 2.00 +- 0.00 |")
    rows.append({**rows[0], "seed": 2, "test_error": 90.2, "diverged_in_epoch": 1})
    assert mnist.report(rows).splitlines()[-1].endswith("| 3 | 1 | 1.50 +- 0.50 | 2.00 +- 0.00 |")


def test_a_run_that_diverges_stops_and_says_when() -> None:
    images, labels = synthetic(300)
    row = mnist.train(settings(epochs=3, density=1.0), 0, (images * torch.inf, labels, images[:50], labels[:50]))
    assert row["diverged_in_epoch"] == 1


def test_clipping_is_another_setting() -> None:
    data = (*synthetic(500), *synthetic(100, noise=3.0))
    plain, clipped = (mnist.train(settings(epochs=1, clip=clip), 3, data) for clip in (None, 0.01))
    assert mnist.key(plain) != mnist.key(clipped)
    assert clipped["test_error"] > plain["test_error"]


def test_granularity_from_text() -> None:
    assert mnist.parse_granularity("weight") == "weight"
    assert mnist.parse_granularity("column:16") == ("column", 16)
    assert mnist.parse_granularity("block:4:4") == ("block", 4, 4)
    assert mnist.parse_granularity("channel:in") == ("channel", "in")


def test_a_run_that_stays_at_chance_has_diverged() -> None:
    images, _ = synthetic(200)
    labels = torch.randint(10, (200,))
    row = mnist.train(settings(epochs=9), 0, (images, labels, images[:50], labels[:50]))
    assert row["diverged_in_epoch"] == mnist.PATIENCE
