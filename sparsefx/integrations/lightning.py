"""Sparse training in Lightning."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sparsefx.distributed import ignore_masks
from sparsefx.integrations.rows import scalars, scheduler_of


class SparseCallback(Callback):
    """Attaches the scheduler of the sparsified model in a LightningModule, saves and restores it, and logs updates.

    Args:
        steps_per_update: Optimizer steps between updates; None is one epoch.
        total_steps: Optimizer steps of the whole training; None is what the trainer will take.
    Example:
        >>> trainer = Trainer(callbacks=[SparseCallback()])
    """

    def __init__(self, steps_per_update: int | None = None, total_steps: int | None = None) -> None:
        self.steps_per_update = steps_per_update
        self.total_steps = total_steps
        self._module: LightningModule | None = None
        self._saved: dict[str, Any] | None = None
        self._logged = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the model, before a strategy wraps it."""
        scheduler_of(pl_module)
        ignore_masks(pl_module)
        self._module = pl_module

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the scheduler to the trainer's optimizers, whose state is loaded by now."""
        scheduler = scheduler_of(pl_module)
        scheduler.detach()
        total = self.total_steps or int(trainer.estimated_stepping_batches)
        epochs = max(1, trainer.max_epochs or 1)
        scheduler.attach(
            trainer.optimizers,
            steps_per_update=self.steps_per_update or max(1, total // epochs),
            total_steps=total,
        )
        if self._saved is not None:
            scheduler.load_state_dict(self._saved)
            self._saved = None
        self._logged = len(scheduler.history)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log updates."""
        history = scheduler_of(pl_module).history
        for row in history[self._logged :]:
            pl_module.log_dict(scalars(row))
        self._logged = len(history)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state; Lightning asks every rank."""
        if self._module is None:
            return {}
        scheduler = scheduler_of(self._module)
        scheduler.synchronize()
        return {"scheduler": scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the scheduler is attached."""
        self._saved = state_dict.get("scheduler")
