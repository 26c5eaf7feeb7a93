"""The things that are timed: one network with its optimizer and a fixed batch, dense or sparse."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.algorithms import SparseMomentum
from sparsefx.api import sparsify
from sparsefx.bench.settings import INTERVAL, Setting
from sparsefx.errors import CheckpointError
from sparsefx.layers import MASK
from sparsefx.scheduler import Scheduler

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DENSE = ("nchw", "nhwc", "nchw compiled", "nhwc compiled")
HALF = ("nchw bf16", "nhwc bf16")
"""Dense under bf16 autocast: what a user might pick instead."""


@dataclass(frozen=True)
class Masks:
    """Which weights exist: random ones, in columns of `rows` output channels, or those of a trained `checkpoint`."""

    rows: int = 1
    checkpoint: Path | None = None

    @property
    def kind(self) -> str:
        """For the report."""
        if self.checkpoint is not None:
            return f"trained ({self.checkpoint.name})"
        return "random" if self.rows == 1 else f"clustered in {self.rows} rows"


class Trainer:
    """A training step of one network on one batch: forward, backward, SGD with Nesterov momentum.

    Attributes:
        model: In train mode.
        optimizer: Torch's fused SGD, the fastest there is for dense weights.
    """

    def __init__(self, model: nn.Module, data: tuple[Tensor, Tensor], *, run: Any = None, half: bool = False) -> None:
        self.model, self.half = model, half
        self.images, self.labels = data
        self.run = model if run is None else run
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )

    def forward(self) -> Tensor:
        """The loss."""
        context = torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext()
        with context:
            return F.cross_entropy(self.run(self.images), self.labels)

    def step(self) -> None:
        """One step as in a training loop."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The updates so far; none for a dense network."""
        return self.scheduler.history if isinstance(getattr(self.model, "scheduler", None), Scheduler) else []

    @property
    def scheduler(self) -> Scheduler:
        """That of a sparse network."""
        scheduler = self.model.scheduler
        assert isinstance(scheduler, Scheduler)
        return scheduler


def dense(setting: Setting, batch: int, variant: str) -> Trainer:
    """A dense trainer; `variant` is one of `DENSE` or `HALF`."""
    torch.manual_seed(0)
    memory_format, *rest = variant.split()
    model = _stored(setting.make(), memory_format)
    images, labels = setting.data(batch)
    images = stored(images, memory_format)
    run = torch.compile(model) if "compiled" in rest else None
    return Trainer(model, (images, labels), run=run, half="bf16" in rest)


def stored(images: Tensor, memory_format: str) -> Tensor:
    """`images` in one of `FORMATS`; rows of features as they are."""
    return images.contiguous(memory_format=FORMATS[memory_format]) if images.dim() == 4 else images


def _stored(model: nn.Module, memory_format: str) -> nn.Module:
    return model.to(memory_format=FORMATS[memory_format])  # pyright: ignore[reportCallIssue]


def sparse_model(
    setting: Setting,
    density: float,
    masks: Masks,
    images: Tensor,
    window: int | None = None,
    memory_format: str = "nchw",
) -> nn.Module:
    """A sparsified network.

    Args:
        images: Stored in `memory_format`, one of `FORMATS`, as the weights are.
        window: Length of the window of the dense gradient; the momentum's memory if None.
    """
    torch.manual_seed(0)
    state = None
    if masks.checkpoint is not None:
        state = load(masks.checkpoint)["state_dict"]
        density = density_of(state, masks.checkpoint)
    model = sparsify(
        _stored(setting.make(), memory_format),
        density,
        example_inputs=images if state is None else None,
        scheduler=SparseMomentum(dense_grad_window=window or "auto"),
        granularity="weight" if masks.rows == 1 else ("column", masks.rows),
    )
    if state is not None:
        model.load_state_dict(state)
    return model


def sparse(
    setting: Setting,
    batch: int,
    density: float,
    masks: Masks,
    memory_format: str = "nchw",
    *,
    interval: int = INTERVAL,
    inside: bool = False,
) -> Trainer:
    """A sparse trainer.

    Args:
        memory_format: Of weights and images, one of `FORMATS`.
        interval: Steps between updates.
        inside: Train inside the window all the time, instead of in the last steps of an interval.
    """
    images, labels = setting.data(batch)
    images = stored(images, memory_format)
    window = interval if inside else None
    trainer = Trainer(sparse_model(setting, density, masks, images, window, memory_format), (images, labels))
    trainer.scheduler.attach(trainer.optimizer, steps_per_update=interval, total_steps=1000 * interval)
    return trainer


def load(path: Path) -> dict[str, Any]:
    """A checkpoint: `model`, a name of `SETTINGS`, and `state_dict`.

    Raises:
        CheckpointError: it is something else.
    """
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or not {"model", "state_dict"} <= saved.keys():
        raise CheckpointError(
            f"{path}: expected a dict with model and state_dict, got another; see examples/cifar10.py"
        )
    return saved


def density_of(state: dict[str, Tensor], path: Path) -> float:
    """The density of a checkpoint's masks.

    Raises:
        CheckpointError: it has no masks.
    """
    found = [value for key, value in state.items() if key.endswith(MASK)]
    if not found:
        raise CheckpointError(f"{path}: expected the state of a sparsified model, got one without masks")
    return sum(int(mask.sum()) for mask in found) / sum(mask.numel() for mask in found)
