"""Sparse momentum as the paper writes it, on LeNet-5 and MNIST, without sparsefx's kernels, window or scheduler.

A masked dense network, the dense gradient in every step, and the NumPy oracle's Algorithm 1 once an epoch. It shows
what the algorithm itself does to a network without normalization:

    python -m tests.lenet5_reference --seed 0 --data data
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import sparsefx
from examples.mnist import evaluate, load
from sparsefx.models import LeNet5Caffe
from tests import oracle

EPOCHS = 100
"""Of the paper's schedule, of which the first are run."""
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's MNIST")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    images, labels = load(args.data, download=False, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    valid, kept = order[: len(images) // 10], order[len(images) // 10 :]
    torch.manual_seed(args.seed)
    model = LeNet5Caffe().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    drawn = sparsefx.sparsify(LeNet5Caffe(), args.density, seed=args.seed)
    masks = {name: mask.clone() for name, mask in sparsefx.masks(drawn).items()}
    weights = {name: model.get_parameter(name) for name in masks}
    target = sum(int(mask.sum()) for mask in masks.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def mask_() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])

    mask_()
    steps = len(kept) // BATCH
    for epoch in range(args.epochs):
        losses = []
        for index in kept[torch.randperm(len(kept))].split(BATCH):
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mask_()
            losses.append(loss.item())
        layers = [
            oracle.Layer(w.detach().numpy(), masks[name].numpy(), optimizer.state[w]["momentum_buffer"].numpy())
            for name, w in weights.items()
        ]
        rate = oracle.prune_rate_at("cosine", 0.5, epoch * steps, EPOCHS * steps)
        for name, mask in zip(masks, oracle.update(layers, rate, target).masks, strict=True):
            masks[name] = torch.from_numpy(mask.copy())
        mask_()
        first = ", ".join(f"{value:.2f}" for value in losses[:8])
        error = evaluate(model, images[valid], labels[valid])
        print(f"epoch {epoch + 1}: losses {first}, ..., {losses[-1]:.2f}; validation error {error:.2f}%", flush=True)


if __name__ == "__main__":
    main()
