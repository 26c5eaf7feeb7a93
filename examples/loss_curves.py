"""Compare loss curves: sparsefx against the same network trained dense and multiplied by the same masks.

All networks start from the same weights and see the same batches. The dense ones run in two memory formats: what
separates those two is the noise of fp32, and the sparse one should lie no further off.

    python -m examples.loss_curves --data ../shared/data/cifar10 --out results/loss_curves.json

`--update 78` lets the masks change every 78 steps, and gives the dense networks the new ones; the gradient of missing
weights is then collected at every step, as the dense networks have it.
"""

import argparse
import copy
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparsefx
from examples.cifar10 import MODELS, batches, load
from sparsefx.bench import SETTINGS

FORMATS = {"dense": torch.contiguous_format, "dense, channels_last": torch.channels_last}


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of all networks."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


@torch.no_grad()
def project_(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the missing weights of a dense network."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def curves(
    model: nn.Module,
    density: float,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    update: int = 0,
    quiet: bool = True,
) -> dict[str, list[float]]:
    """Train sparse and dense networks side by side.

    Args:
        model: Dense; becomes the sparse one.
        data: Batches.
        update: Steps between updates of the masks; 0 keeps them.
    Returns:
        The loss of each step, by network.
    """
    rules = sparsefx.SparseMomentum(dense_grad_window="always")
    twins = {name: copy.deepcopy(model).to(memory_format=form) for name, form in FORMATS.items()}  # pyright: ignore[reportCallIssue]
    sparsefx.sparsify(model, density, scheduler=rules)
    scheduler: Any = model.scheduler
    masks = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    for twin in twins.values():
        project_(twin, masks)
    networks = {"sparse": model, **twins}
    optimizers = {name: sgd(network) for name, network in networks.items()}
    if update:
        scheduler.attach(optimizers["sparse"], steps_per_update=update, total_steps=100 * steps)
    losses: dict[str, list[float]] = {name: [] for name in networks}
    updates = 0
    for _ in tqdm(range(steps), disable=quiet):
        x, y = next(data)
        for name, network in networks.items():
            own = x.contiguous(memory_format=FORMATS.get(name, torch.contiguous_format))
            loss = F.cross_entropy(network(own), y)
            losses[name].append(loss.item())
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        if update and len(scheduler.history) > updates:
            updates = len(scheduler.history)
            masks = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
            started = {name: model.get_parameter(name) != 0 for name in masks}  # a weight that was grown starts at zero
            for twin in twins.values():
                project_(twin, started)
        for twin in twins.values():
            project_(twin, masks)
    return losses


def summary(losses: dict[str, list[float]], parts: int = 4) -> list[dict[str, float]]:
    """Mean loss and mean absolute differences over equal parts of the training."""
    sparse, dense, other = (torch.tensor(losses[name], dtype=torch.float64) for name in ("sparse", *FORMATS))
    rows = []
    for part in torch.arange(len(sparse)).chunk(parts):
        rows.append(
            {
                "first": int(part[0]) + 1,
                "last": int(part[-1]) + 1,
                "loss": dense[part].mean().item(),
                "sparse_to_dense": (sparse - dense)[part].abs().mean().item(),
                "dense_to_dense": (other - dense)[part].abs().mean().item(),
            }
        )
    return rows


def endless(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch."""
    while True:
        yield from batches(images, labels, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--model", choices=MODELS, default="wrn-28-2")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--update", type=int, default=0, help="steps between updates of the masks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the curves here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = SETTINGS[args.model].make()
    data = endless(*load(args.data, True), args.batch)
    losses = curves(model, args.density, data, args.steps, args.update, args.quiet)
    rows = summary(losses)
    for row in rows:
        print(
            f"steps {row['first']:4d} to {row['last']:4d}: loss {row['loss']:.4f}, sparse to dense "
            f"{row['sparse_to_dense']:.1e}, dense to dense {row['dense_to_dense']:.1e}"
        )
    if args.out:
        settings: dict[str, Any] = {
            key: getattr(args, key) for key in ("model", "density", "batch", "update", "threads")
        }
        settings |= {"torch": torch.__version__, "machine": platform.machine()}
        args.out.write_text(json.dumps({**settings, "summary": rows, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
