"""Densities, counts and the cost of updates in TensorBoard."""

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from sparsefx.integrations.rows import scalars, scheduler_of


class UpdateLog:
    """Writes each mask update once.

    Args:
        writer: Where to.
        model: A sparsified model, or a module with one in it.
    Example:
        >>> log = UpdateLog(SummaryWriter("runs"), model)
        >>> optimizer.step(); log.write()
    """

    def __init__(self, writer: SummaryWriter, model: nn.Module) -> None:
        self.writer = writer
        self.scheduler = scheduler_of(model)
        self.written = len(self.scheduler.history)

    def write(self) -> None:
        """Write the updates since the last call, at the optimizer step of each."""
        for row in self.scheduler.history[self.written :]:
            for name, value in scalars(row).items():
                self.writer.add_scalar(name, value, row["step"])
        self.written = len(self.scheduler.history)
