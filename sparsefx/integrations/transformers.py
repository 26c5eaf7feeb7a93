"""Sparse training with the Trainer of Hugging Face transformers."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsefx.integrations.rows import scalars, scheduler_of

FILE = "sparsefx.json"


class SparseCallback(TrainerCallback):
    """Attaches the scheduler of a sparsified model, saves and restores it with the checkpoints, and logs updates.

    Args:
        steps_per_update: Optimizer steps between updates; None is one epoch.
        writer: A `torch.utils.tensorboard.SummaryWriter` for densities, counts and cost; they are in
            `trainer.state.log_history` without it too.
        resume_from_checkpoint: Folder of the checkpoint, where it is not in the trainer's `output_dir`.
    Example:
        >>> trainer = Trainer(sparsefx.sparsify(model), arguments, callbacks=[SparseCallback()], train_dataset=data)
    """

    def __init__(
        self,
        steps_per_update: int | None = None,
        writer: Any = None,
        resume_from_checkpoint: str | Path | None = None,
    ) -> None:
        self.steps_per_update = steps_per_update
        self.writer = writer
        self.folder = resume_from_checkpoint
        self._logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the scheduler, and resume it where the trainer resumes."""
        scheduler = scheduler_of(kwargs["model"])
        scheduler.detach()
        optimizer = kwargs["optimizer"]
        epoch = max(1, round(state.max_steps / max(1, state.num_train_epochs)))
        scheduler.attach(
            getattr(optimizer, "optimizer", optimizer),
            steps_per_update=self.steps_per_update or epoch,
            total_steps=state.max_steps,
        )
        if state.global_step:
            folder = Path(self.folder or Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")
            scheduler.load_state_dict(json.loads((folder / FILE).read_text()))
        self._logged = len(scheduler.history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log an update, and let the ranks agree before a checkpoint."""
        scheduler = scheduler_of(kwargs["model"])
        for row in scheduler.history[self._logged :]:
            values = scalars(row)
            state.log_history.append({**values, "step": state.global_step})
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, state.global_step)
        self._logged = len(scheduler.history)
        if control.should_save:
            scheduler.synchronize()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the scheduler's state into the checkpoint that has just been written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            (folder / FILE).write_text(json.dumps(scheduler_of(kwargs["model"]).state_dict()))
