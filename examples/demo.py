"""Train a small convolutional network twice from the same seed: dense, and with 5% of its weights.

The data are the 1797 handwritten digits of the UCI repository that scikit-learn ships: nothing is downloaded. Both
networks see the same batches in turn, step by step, so that whatever else the machine does slows both alike.

    python examples/demo.py
    python examples/demo.py --density 0.02 --seeds 5 --minutes 5

Prints a table and writes `demo.json` (every number) and `demo.png` (accuracy and densities over time).
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import sparsefx

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WARMUP = 3
EPOCHS_PER_UPDATE = 4  # an epoch has 21 steps only, too few to tell which of the new weights matter
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Digits:
    """Real digits, normalized: train images float `[1347, 1, 8, 8]`, their labels, 450 test images, their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(data.target)
    train, test = train_test_split(range(len(labels)), test_size=450, stratify=data.target, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


class DigitNet(nn.Module):
    """Three 3x3 convolutions with BatchNorm and a linear layer. Input `[N, 1, 8, 8]`, output logits `[N, 10]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
        return self.fc(torch.flatten(x, 1))


class Run:
    """One network in training: the ordinary loop, and a stopwatch around each step."""

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps)
        self.milliseconds: list[float] = []
        self.accuracy: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.milliseconds.append(round(1000 * (time.perf_counter() - start), 3))
        self.schedule.step()

    def test(self, x: Tensor, y: Tensor) -> None:
        """Append the accuracy in percent."""
        self.model.eval()
        with torch.no_grad():
            self.accuracy.append(100 * (self.model(x).argmax(1) == y).float().mean().item())
        self.model.train()


def fastest_dense(width: int, x: Tensor, y: Tensor, threads: set[int], rounds: int = 5) -> tuple[str, int, dict]:
    """In which memory format and with how many threads the dense network trains fastest.

    Returns:
        The format, the threads, and the median step of every choice in milliseconds.
    """
    medians = {}
    for count in sorted(threads):
        torch.set_num_threads(count)
        runs = {
            name: Run(DigitNet(width).to(memory_format=memory_format), rounds + WARMUP)
            for name, memory_format in LAYOUTS.items()
        }
        for _ in range(rounds + WARMUP):
            for run in runs.values():
                run.step(x, y)
        medians |= {(name, count): median(run.milliseconds[WARMUP:]) for name, run in runs.items()}
    layout, count = min(medians, key=medians.__getitem__)
    torch.set_num_threads(count)
    return layout, count, {f"{name} on {plural(n, 'thread')}": ms for (name, n), ms in medians.items()}


def update_interval(epochs: int, steps_per_epoch: int) -> int:
    """Steps between mask updates; short trainings have at least one update."""
    return min(EPOCHS_PER_UPDATE, max(1, epochs // 2)) * steps_per_epoch


def train(args: argparse.Namespace, seed: int, data: Digits, layout: str, bar: tqdm) -> tuple[dict, nn.Module]:
    """Train dense and sparse side by side; returns what was measured and the sparse model."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    steps_per_epoch = len(images) // args.batch
    total_steps = args.epochs * steps_per_epoch
    dense_model = DigitNet(args.width).to(memory_format=LAYOUTS[layout])
    sparse_model = copy.deepcopy(dense_model)

    bar.set_postfix_str("measuring kernels; the first time they are compiled")
    sparsefx.sparsify(sparse_model, args.density, example_inputs=(images[: args.batch],), seed=seed)
    dense, sparse = Run(dense_model, total_steps), Run(sparse_model, total_steps)
    updates = update_interval(args.epochs, steps_per_epoch)
    sparse_model.scheduler.attach(sparse.optimizer, steps_per_update=updates, total_steps=total_steps)

    first = {name: mask.float().mean().item() for name, mask in sparsefx.masks(sparse_model).items()}
    for _ in range(args.epochs):
        for index in torch.randperm(len(images)).split(args.batch)[:steps_per_epoch]:
            x, y = images[index], labels[index]
            dense.step(x, y)
            sparse.step(x, y)
            bar.update()
        dense.test(test_images, test_labels)
        sparse.test(test_images, test_labels)
        bar.set_postfix_str(f"test accuracy: dense {dense.accuracy[-1]:.1f}%, sparse {sparse.accuracy[-1]:.1f}%")

    masks = sparsefx.masks(sparse_model).values()
    history = sparse_model.scheduler.history
    return {
        "seed": seed,
        "dense_accuracy": dense.accuracy,
        "sparse_accuracy": sparse.accuracy,
        "dense_step_ms": dense.milliseconds,
        "sparse_step_ms": sparse.milliseconds,
        "weights": sum(mask.numel() for mask in masks),
        "existing_weights": sum(int(mask.sum()) for mask in masks),
        "densities": [
            {"step": 0, **first},
            *({"step": row["step"], **{n: layer["density"] for n, layer in row["layers"].items()}} for row in history),
        ],
        "updates": [{key: row[key] for key in ("step", "prune_rate", "seconds", "skipped")} for row in history],
    }, sparse_model


def machine() -> str:
    """Processor, threads and torch version: a timing means nothing without them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {plural(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"


def table(result: dict) -> str:
    runs, settings = result["runs"], result["settings"]

    def accuracy(kind: str) -> str:
        last = [run[f"{kind}_accuracy"][-1] for run in runs]
        spread = f" +- {stdev(last) / len(last) ** 0.5:.2f}" if len(last) > 1 else ""
        return f"{mean(last):.2f}%{spread}"

    step = result["step_ms"]
    ratio = step["dense"] / step["sparse"]
    length = f"{plural(len(runs), 'seed')}, {plural(settings['epochs'], 'epoch')}"
    updating = sum(row["seconds"] for run in runs for row in run["updates"])
    share = 1000 * updating / sum(sum(run["sparse_step_ms"]) for run in runs)
    updates = f"one every {settings['steps_per_update']} steps, {share:.1%} of all time"
    rows = [
        ("", "dense", "sparse", ""),
        ("test accuracy", accuracy("dense"), accuracy("sparse"), length),
        ("weights", f"{runs[0]['weights']:,}", f"{runs[0]['existing_weights']:,}", "convolutions and linear"),
        ("training step", f"{step['dense']:.2f} ms", f"{step['sparse']:.2f} ms", f"sparse is {ratio:.2f}x as fast"),
        ("mask update", "", f"{result['update_ms']:.2f} ms", updates),
    ]
    lines = [f"{label:<14}{dense:>18}{sparse:>18}   {note}".rstrip() for label, dense, sparse, note in rows]
    choices = ", ".join(f"{name}: {ms:.1f} ms" for name, ms in result["dense_choices_ms"].items())
    lines += [
        "",
        f"A step is forward, backward and optimizer on {settings['batch']} images, dense and sparse in turn: medians.",
        f"Both run as dense is fastest; a dense step in {choices}.",
        "Sparse steps include collecting the gradient of missing weights. One digit of the test set is 0.22%.",
        f"Measured on: {result['machine']}",
    ]
    return "\n".join(lines)


def picture(result: dict, path: Path) -> None:
    """Accuracy over the epochs and, for the first seed, each layer's density over the steps."""
    runs, settings = result["runs"], result["settings"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, color in (("dense", "0.35"), ("sparse", "tab:red")):
        curves = torch.tensor([run[f"{kind}_accuracy"] for run in runs])
        epochs = range(1, curves.shape[1] + 1)
        share = "every weight" if kind == "dense" else f"{100 * settings['density']:.3g}% of the weights"
        left.plot(epochs, curves.mean(0), color=color, label=f"{kind}, {share}: {curves[:, -1].mean():.1f}%")
        left.fill_between(epochs, curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(max(85, left.get_ylim()[0]), 100))
    left.set_title(f"Accuracy on 450 unseen digits, {plural(len(runs), 'seed')}")
    left.legend(loc="lower right", frameon=False)

    rows = runs[0]["densities"]
    steps = [row["step"] for row in rows]
    lowest = 0.0
    for name in sorted(list(rows[0])[1:], key=lambda name: rows[-1][name]):
        values = [100 * row[name] for row in rows]
        (line,) = right.step(steps, values, where="post")
        lowest = max(values[-1], 1.15 * lowest)  # labels one above the other
        label = f" {name.removesuffix('.weight')} {values[-1]:.3g}%"
        right.annotate(label, (steps[-1], lowest), color=line.get_color(), va="center")
    right.hlines(100 * settings["density"], 0, steps[-1], color="0.6", linestyle=":", linewidth=1)
    right.set(yscale="log", xlabel="step", ylabel="weights that exist, %", xlim=(0, steps[-1] * 1.25))
    right.set_xticks([tick for tick in right.get_xticks() if tick <= steps[-1]])
    right.set_title("Sparse momentum moves weights between layers")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05, help="fraction of weights that exist")
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2, help="at most this many seeds")
    parser.add_argument("--minutes", type=float, default=1.5, help="start no seed that would not end by then")
    parser.add_argument("--threads", type=int, help="default: 1 or all, where dense is faster")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of demo.json and demo.png")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    data = digits()
    counts = {args.threads} if args.threads else {1, torch.get_num_threads()}
    layout, threads, dense_ms = fastest_dense(args.width, data[0][: args.batch], data[1][: args.batch], counts)

    runs, summary = [], None
    for seed in range(args.seeds):
        if seed and (time.perf_counter() - start) * (seed + 1) / seed > 60 * args.minutes:
            print(f"{seed} of {args.seeds} seeds fit into {args.minutes:g} minutes")
            break
        steps_per_epoch = len(data[0]) // args.batch
        with tqdm(total=args.epochs * steps_per_epoch, desc=f"seed {seed}", ncols=100, disable=None) as bar:
            run, model = train(args, seed, data, layout, bar)
        print(f"seed {seed}: {run['dense_accuracy'][-1]:.2f}% dense, {run['sparse_accuracy'][-1]:.2f}% sparse")
        runs.append(run)
        summary = sparsefx.summary(model)

    seconds = [row["seconds"] for run in runs for row in run["updates"]]
    result = {
        "settings": {
            "density": args.density,
            "width": args.width,
            "epochs": args.epochs,
            "batch": args.batch,
            "steps_per_update": update_interval(args.epochs, steps_per_epoch),
            "memory_format": layout,
            "threads": threads,
        },
        "machine": machine(),
        "dense_choices_ms": dense_ms,
        "step_ms": {
            kind: median(ms for run in runs for ms in run[f"{kind}_step_ms"][WARMUP:]) for kind in ("dense", "sparse")
        },
        "update_ms": 1000 * median(seconds) if seconds else 0.0,
        "runs": runs,
    }
    result["seconds"] = time.perf_counter() - start
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(result, indent=1))
    picture(result, args.out / "demo.png")
    print(f"\n{summary}\n\n{table(result)}")
    print(f"{result['seconds']:.0f} s; every number in {args.out / 'demo.json'}, picture in {args.out / 'demo.png'}")
    return result


if __name__ == "__main__":
    main()
