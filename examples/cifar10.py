"""Train one of the paper's CIFAR-10 networks, dense or sparse, and save its weights and masks.

The setup of Dettmers & Zettlemoyer 2019, section 5.2: SGD with Nesterov momentum 0.9 and weight decay 5e-4, learning
rate 0.1, batches of 128, random flips and reflected crops, an update of the masks each epoch.

    python examples/cifar10.py --data ../shared/data/cifar10 --model wrn-28-2 --epochs 3 --save wrn-28-2.pt
    python -m sparsefx bench --models wrn-28-2 --trained wrn-28-2.pt

`--data` is a folder with `train_10k.npz` and `test_10k.npz` (`images` uint8 `[N, 3, 32, 32]` and `labels`), or
torchvision's CIFAR-10.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparsefx
from sparsefx.bench import SETTINGS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MODELS = [name for name, setting in SETTINGS.items() if setting.image == (3, 32, 32)]


def load(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read images float `[N, 3, 32, 32]`, normalized, and labels `[N]`."""
    path = folder / f"{'train' if train else 'test'}_10k.npz"
    if path.exists():
        with np.load(path) as data:
            images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long()
    else:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(str(folder), train=train)
        images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float().div(255) - mean) / std, labels


def augment(images: Tensor) -> Tensor:
    """Flip half of the images, and crop each at random after padding it by 4 reflected pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    height, width = images.shape[2:]
    tops, lefts = torch.randint(9, (2, len(images))).tolist()
    return torch.stack([p[:, t : t + height, s : s + width] for p, t, s in zip(padded, tops, lefts, strict=True)])


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches in random order, augmented."""
    for index in torch.randperm(len(images)).split(size):
        if len(index) == size:
            yield augment(images[index]), labels[index]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Error in percent."""
    model.eval()
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    model.train()
    return 100 * wrong / len(labels)


def train(
    args: argparse.Namespace, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[nn.Module, float]:
    """Train one network; returns it and its test error in percent."""
    torch.manual_seed(args.seed)
    model = SETTINGS[args.model].make()
    steps = len(data[0]) // args.batch
    if args.density < 1:
        sparsefx.sparsify(model, args.density, example_inputs=data[0][: args.batch], seed=args.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    if args.density < 1:
        model.scheduler.attach(optimizer, steps_per_update=steps, total_steps=args.epochs * steps)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [args.epochs * steps // 3, args.epochs * steps * 2 // 3], gamma=0.1
    )
    for epoch in range(args.epochs):
        bar = tqdm(batches(*data, args.batch), f"epoch {epoch + 1}", steps, disable=args.quiet)
        for x, y in bar:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model, evaluate(model, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--model", choices=MODELS, default="wrn-28-2")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="write model, weights and masks here, for `sparsefx bench --trained`")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, error = train(args, load(args.data, True), load(args.data, False))
    print(f"{args.model} at density {args.density:g}: {error:.2f}% test error after {args.epochs} epochs")
    if args.density < 1:
        print(sparsefx.summary(model))
    if args.save:
        torch.save({"model": args.model, "state_dict": model.state_dict()}, args.save)


if __name__ == "__main__":
    main()
