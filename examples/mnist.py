"""Reproduce the paper's MNIST table: LeNet 300-100 and LeNet-5 Caffe, dense and sparse.

The setup of Dettmers & Zettlemoyer 2019, section 5.1: 100 epochs, batches of 100, SGD with Nesterov momentum 0.9,
learning rate 0.1 divided by 10 every 25,000 steps, weight decay 5e-4, 10% of the training set held out,
prune rate 0.5 with cosine decay, one update an epoch.

    python examples/mnist.py --model lenet300 --density 0.05 --seeds 5
    python examples/mnist.py --report

Every finished run is a row of the results file, so that an interrupted series goes on where it stopped.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import MNIST
from tqdm import tqdm

import sparsefx
from sparsefx.models import LeNet5Caffe, LeNet300

MODELS: dict[str, type[nn.Module]] = {"lenet300": LeNet300, "lenet5": LeNet5Caffe}
CHANCE, PATIENCE = 80.0, 3
"""A run whose validation error (in percent) is above `CHANCE` for so many epochs on end has diverged."""
KEY = ("model", "density", "window", "granularity", "clip", "epochs", "seed")


def load(root: Path, download: bool, train: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST into memory: images float `[N, 1, 28, 28]`, normalized, and labels `[N]`."""
    data = MNIST(str(root), train=train, download=download)
    images = (data.data.float().div(255) - 0.1307) / 0.3081
    return images.unsqueeze(1), data.targets


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Error in percent."""
    model.eval()
    with torch.no_grad():
        wrong = sum(
            int((model(x).argmax(1) != y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        )
    model.train()
    return 100 * wrong / len(labels)


def train(args: argparse.Namespace, seed: int, data: tuple[Tensor, ...]) -> dict:
    """Train one network and return its row of the results file; a run that has diverged stops there."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model = MODELS[args.model]().to(memory_format=torch.channels_last)
    held_out = len(images) // 10
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    valid, kept = order[:held_out], order[held_out:]
    steps_per_epoch = len(kept) // args.batch
    total_steps = args.epochs * steps_per_epoch
    if args.density < 1:
        sparsefx.sparsify(
            model,
            args.density,
            example_inputs=(images[: args.batch],),
            granularity=parse_granularity(args.granularity),
            scheduler=sparsefx.SparseMomentum(dense_grad_window=args.window),
            seed=seed,
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    if args.density < 1:
        model.scheduler.attach(optimizer, steps_per_update=steps_per_epoch, total_steps=total_steps)
    lr_steps = 25_000 * args.epochs // 100
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, lr_steps, gamma=0.1)

    best_valid, best_valid_test = 100.0, 100.0
    seconds = 0.0
    bar = tqdm(range(args.epochs), desc=f"{args.model} {args.density:g} seed {seed}", disable=args.quiet)
    diverged, lost = None, 0
    for epoch in bar:
        start = time.perf_counter()
        for index in kept[torch.randperm(len(kept))].split(args.batch)[:steps_per_epoch]:
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss.backward()
            if args.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds += time.perf_counter() - start
        error = evaluate(model, images[valid], labels[valid])
        if error < best_valid:
            best_valid, best_valid_test = error, evaluate(model, test_images, test_labels)
        bar.set_postfix(valid=f"{error:.2f}%")
        lost = lost + 1 if error > CHANCE else 0
        if lost == PATIENCE or not math.isfinite(loss.item()):  # pyright: ignore[reportPossiblyUnboundVariable]
            diverged = epoch + 1
            break
    if args.save:
        torch.save({"model": args.model, "state_dict": model.state_dict()}, args.save)
    return {
        "model": args.model,
        "density": args.density,
        "window": args.window if args.density < 1 else None,
        "granularity": args.granularity if args.density < 1 else None,
        "clip": args.clip,
        "epochs": args.epochs,
        "seed": seed,
        "test_error": evaluate(model, test_images, test_labels),
        "test_error_at_best_valid": best_valid_test,
        "valid_error": best_valid,
        "diverged_in_epoch": diverged,
        "train_seconds": round(seconds, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }


def parse_granularity(text: str) -> str | tuple:
    """`weight`, `channel`, or `column:16`, `block:4:4`."""
    name, *numbers = text.split(":")
    return (name, *(int(n) if n.isdigit() else n for n in numbers)) if numbers else name


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let several processes fill one results file."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def save(path: Path, row: dict, names: Sequence[str] = KEY) -> None:
    """Add a row, or replace the one of the same names, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        rows = [r for r in read(path) if key(r, names) != key(row, names)] + [row]
        rows.sort(key=lambda r: [str(value) for value in key(r, names)])
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1))
        os.replace(temporary, path)


def key(row: dict, names: Sequence[str] = KEY) -> list:
    """What tells runs apart; rows from before an option was there have its default, None."""
    return [row.get(name) for name in names]


def report(rows: list[dict]) -> str:
    """Mean test error and its standard error for each setting, over the runs that did not diverge."""
    lines = [f"| {' | '.join(KEY[:-1])} | runs | diverged | test error % | at best validation % |"]
    lines.append("|" + "---|" * (len(KEY) + 3))
    for setting in sorted({tuple(str(value) for value in key(r)[:-1]) for r in rows}):
        runs = [r for r in rows if tuple(str(value) for value in key(r)[:-1]) == setting]
        mine = [r for r in runs if r.get("diverged_in_epoch") is None]
        cells = [str(len(runs)), str(len(runs) - len(mine))]
        for field in ("test_error", "test_error_at_best_valid"):
            errors = np.array([r[field] for r in mine])
            spread = errors.std(ddof=1) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
            cells.append(f"{errors.mean():.2f} +- {spread:.2f}" if len(errors) else "")
        lines.append("| " + " | ".join([*setting, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="lenet300")
    parser.add_argument("--density", type=float, default=0.05, help="fraction of weights that exist; 1 trains dense")
    parser.add_argument("--granularity", default="weight", help="weight, channel, column:16, block:4:4")
    parser.add_argument("--window", default="auto", help="dense_grad_window: auto, always, or a number of steps")
    parser.add_argument("--clip", type=float, help="clip the gradient's norm; the paper does not")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's MNIST")
    parser.add_argument("--no-download", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/mnist.json"))
    parser.add_argument("--save", type=Path, help="write the last seed's weights and masks here, for `bench --trained`")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--report", action="store_true", help="print the table of the results file and stop")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.out)))
        return
    args.window = int(args.window) if args.window.isdigit() else args.window
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    data = (*load(args.data, not args.no_download, True), *load(args.data, not args.no_download, False))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        wanted = {**vars(args), "seed": seed}
        if args.density == 1:
            wanted["window"] = wanted["granularity"] = None
        if any(key(r) == key(wanted) for r in read(args.out)):
            continue
        row = train(args, seed, data)
        save(args.out, row)
        print(f"{args.model} density {args.density:g} seed {seed}: {row['test_error']:.2f}% test error", flush=True)
    print(report(read(args.out)))


if __name__ == "__main__":
    main()
