"""A plain data-parallel loop: `torchrun --nproc-per-node 2 examples/ddp.py`.

Saves a checkpoint at each epoch and goes on from it, on any number of processes.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sparsefx


def digits() -> TensorDataset:
    """1797 images `[1, 8, 8]` of handwritten digits, scikit-learn's own."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--until", type=int, help="stop before this epoch; a later run goes on")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--checkpoint", type=Path, default=Path("ddp.pt"))
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    sampler = DistributedSampler(data := digits())
    loader = DataLoader(data, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)

    model = sparsefx.sparsify(network().to(device), density=options.density)
    parallel = DistributedDataParallel(model)
    sparsefx.distributed.sparse_all_reduce(parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.scheduler.attach(optimizer, steps_per_update=len(loader), total_steps=options.epochs * len(loader))

    first = 0
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        model.scheduler.load_state_dict(saved["scheduler"])
        first = saved["epoch"] + 1

    for epoch in range(first, options.until or options.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for x, y in loader:
            loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        if dist.get_rank() == 0:
            print(f"epoch {epoch} loss {total.item() / len(loader):.4f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scheduler": model.scheduler.state_dict(), "epoch": epoch}
            torch.save(state, part := options.checkpoint.with_suffix(".part"))
            part.replace(options.checkpoint)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
