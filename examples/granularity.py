"""Measure what clustered masks cost in accuracy: test error against the density of tile columns.

Kernels for matrix units skip a column of a tile (one input channel and tap, for 64 output channels) only if none of its
weights exists. Single weights leave few such columns empty; `granularity=("column", h)` moves groups of h together.

    python -m examples.granularity --mnist data --cifar10 data/cifar10 --plot results/granularity.svg
    python -m examples.granularity --report --plot results/granularity.svg

Networks are LeNet-5 on MNIST and WRN-10-2 on 10,000 images of CIFAR-10, at 5%, for 5 epochs: SGD with Nesterov
momentum 0.9, learning rate 0.1 divided by 10 at half and at three quarters of the training, weight decay 5e-4, an
update each epoch. The classifier stays dense: of whole channels, 5% would leave it one class. LeNet-5, which has no
normalization, clips the gradient's norm at 1. Finished runs are rows of the results file; a series goes on.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparsefx
from examples import cifar10, mnist
from sparsefx.models import LeNet5Caffe, WideResNet

DENSITY = 0.05
GRANULARITIES = ("weight", "column:8", "column:16", "column:32", "column:64", "channel")
KEY = ("network", "granularity", "epochs", "seed")


def plain(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches in random order."""
    for index in torch.randperm(len(images)).split(size):
        if len(index) == size:
            yield images[index], labels[index]


@dataclass(frozen=True)
class Setup:
    """How a network is trained.

    Attributes:
        make: Builds it.
        dense: The layers that stay dense.
        batch, epochs: Of the training.
        clip: The norm that gradients are clipped at, or None.
        batches: Draws an epoch's batches.
    """

    make: Callable[[], nn.Module]
    dense: list[str]
    batch: int
    epochs: int
    clip: float | None
    batches: Callable[[Tensor, Tensor, int], Iterator[tuple[Tensor, Tensor]]]


NETWORKS = {
    "lenet5": Setup(LeNet5Caffe, ["fc4"], 100, 5, 1.0, plain),
    "wrn-10-2": Setup(lambda: WideResNet(10, 2), ["fc"], 128, 5, None, cifar10.batches),
}


def tile_columns(model: nn.Module) -> float:
    """Share of tile columns that hold a weight, over all sparse layers; tiles of 64 output channels."""
    rows = [row for row in sparsefx.summary(model).rows if row.status == "sparse"]
    sizes = [np.prod(row.shape) for row in rows]
    return float(np.average([row.tile_column_density for row in rows], weights=sizes))


def train(name: str, granularity: str, epochs: int, seed: int, data: tuple[Tensor, ...], quiet: bool = True) -> dict:
    """Train one network and return its row of the results."""
    setup = NETWORKS[name]
    images, labels, *test = data
    torch.manual_seed(seed)
    model = setup.make().to(memory_format=torch.channels_last)
    sparsefx.sparsify(
        model,
        DENSITY,
        example_inputs=images[: setup.batch],
        keep_dense=setup.dense,
        granularity=mnist.parse_granularity(granularity),
        seed=seed,
    )
    steps = len(images) // setup.batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    model.scheduler.attach(optimizer, steps_per_update=steps, total_steps=epochs * steps)
    milestones = [epochs * steps // 2, epochs * steps * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for _ in tqdm(range(epochs), f"{name} {granularity} seed {seed}", disable=quiet):
        for x, y in setup.batches(images, labels, setup.batch):
            F.cross_entropy(model(x), y).backward()
            if setup.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return {
        "network": name,
        "granularity": granularity,
        "epochs": epochs,
        "seed": seed,
        "test_error": cifar10.evaluate(model, *test),
        "tile_columns": tile_columns(model),
        "torch": torch.__version__,
    }


def table(rows: list[dict]) -> list[tuple[str, str, int, float, float, float]]:
    """Network, granularity, seeds, mean test error, its standard error, and mean density of tile columns."""
    found = []
    for name in NETWORKS:
        for granularity in GRANULARITIES:
            mine = [r for r in rows if (r["network"], r["granularity"]) == (name, granularity)]
            if mine:
                errors = np.array([r["test_error"] for r in mine])
                spread = errors.std(ddof=1) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
                columns = np.mean([r["tile_columns"] for r in mine])
                found.append((name, granularity, len(mine), float(errors.mean()), float(spread), float(columns)))
    return found


def report(rows: list[dict]) -> str:
    """The table in Markdown."""
    lines = ["| network | granularity | seeds | test error % | tile columns |", "|---|---|---|---|---|"]
    for name, granularity, seeds, error, spread, columns in table(rows):
        lines.append(f"| {name} | {granularity} | {seeds} | {error:.2f} +- {spread:.2f} | {columns:.0%} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw test error against the density of tile columns, a panel for each network."""
    from matplotlib import pyplot as plt

    found = table(rows)
    names = list(dict.fromkeys(row[0] for row in found))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [row for row in found if row[0] == name]
        columns, channels = ([r for r in mine if (r[1] == "channel") == apart] for apart in (False, True))
        for style, chosen in (("o-", columns), ("s", channels)):
            errors, spreads = [r[3] for r in chosen], [r[4] for r in chosen]
            axis.errorbar([100 * r[5] for r in chosen], errors, spreads, fmt=style, capsize=3, color="tab:blue")
        for _, granularity, _, error, _, share in mine:
            axis.annotate(granularity, (100 * share, error), xytext=(5, 6), textcoords="offset points", fontsize=8)
        axis.set(title=f"{name} at {DENSITY:.0%}", xlabel="tile columns with a weight, %", ylabel="test error, %")
        axis.set_xscale("log")
        axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axis.minorticks_off()
        axis.margins(0.18)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder of torchvision's MNIST; runs LeNet-5")
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10 (examples/cifar10.py); runs WRN-10-2")
    parser.add_argument("--epochs", type=int, help="of each network, where not its own number")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/granularity.json"))
    parser.add_argument("--plot", type=Path, help="draw the results here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    data = {}
    if args.mnist and not args.report:
        data["lenet5"] = (*mnist.load(args.mnist, False, True), *mnist.load(args.mnist, False, False))
    if args.cifar10 and not args.report:
        data["wrn-10-2"] = (*cifar10.load(args.cifar10, True), *cifar10.load(args.cifar10, False))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, tensors in data.items():
            epochs = args.epochs or NETWORKS[name].epochs
            for granularity in GRANULARITIES:
                wanted = [name, granularity, epochs, seed]
                if wanted not in [mnist.key(row, KEY) for row in mnist.read(args.out)]:
                    mnist.save(args.out, train(name, granularity, epochs, seed, tensors, args.quiet), KEY)
    rows = mnist.read(args.out)
    print(report(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
