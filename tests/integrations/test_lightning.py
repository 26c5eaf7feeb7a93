"""The Lightning callback in real, tiny runs."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsefx
from sparsefx.errors import LayerError
from sparsefx.integrations.lightning import SparseCallback
from tests.masked_dense import assert_equal_state, assert_zero_missing, batches, net
from tests.stack import ranks
from tests.stack.test_ddp import parts

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::sparsefx.errors.SparsefxWarning"),
]


class Classifier(LightningModule):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.body = sparsefx.sparsify(net(), 0.5) if sparse else net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The data follow the step: Lightning starts a loader anew when it resumes inside an epoch."""
        x, y = parts(batches(1, seed=self.global_step), self.global_rank, self.trainer.world_size)[0]
        return F.cross_entropy(self.body(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.3)


class Watch(Callback):
    """Checks the contract after every batch, and keeps what was logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert_zero_missing(pl_module.body)
        masks = sparsefx.masks(pl_module.body).values()
        assert sum(int(m.sum()) for m in masks) == round(0.5 * sum(m.numel() for m in masks))
        self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("sparsefx")})


def loader(world: int = 1) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(24 * world, 1)), batch_size=4)


def fit(folder: Path, resume: Path | None = None, **options: Any) -> tuple[Classifier, Watch, ModelCheckpoint]:
    torch.manual_seed(0)
    model, watch = Classifier(), Watch()
    saver = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        callbacks=[SparseCallback(), watch, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_train_batches=6,
        **options,
    )
    trainer.fit(model, loader(trainer.world_size), ckpt_path=resume)
    return model, watch, saver


def test_a_run_updates_each_epoch_logs_and_resumes_bit_exactly(tmp_path: Path) -> None:
    model, watch, _ = fit(tmp_path)
    rows = model.body.scheduler.history
    assert [row["step"] for row in rows] == [6, 12, 18]
    after = watch.logged[6]
    assert after["sparsefx/nnz"] == sum(layer["nnz"] for layer in rows[0]["layers"].values())
    assert after["sparsefx/density/5.weight"] == pytest.approx(rows[0]["layers"]["5.weight"]["density"])
    assert after["sparsefx/update_seconds"] == pytest.approx(rows[0]["seconds"], rel=1e-5)
    for step in (4, 8, 16):  # inside the first window, and beyond updates
        saved = next(tmp_path.glob(f"*step={step}.ckpt"))
        again, _, _ = fit(tmp_path / f"again{step}", saved)
        assert_equal_state(dict(again.state_dict()), dict(model.state_dict()))
        assert [row["layers"] for row in again.body.scheduler.history] == [row["layers"] for row in rows]


def fit_rank(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    """One rank of a run, and of another that goes on from inside a window of the first."""
    warnings.simplefilter("ignore")
    ranks.as_torchrun(rank)
    states = []
    for resume in (None, folder / "epoch=2-step=16.ckpt"):
        model, _, _ = fit(folder if resume is None else folder / "again", resume, strategy="ddp", devices=2)
        assert [row["step"] for row in model.body.scheduler.history] == [6, 12, 18]
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_ranks_train_as_one_process_and_resume_bit_exactly(tmp_path: Path) -> None:
    one, other = ranks.run(fit_rank, tmp_path / "ranks")
    model, _, _ = fit(tmp_path / "alone")
    for state in (one[1], *other):
        assert_equal_state(state, one[0])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[0][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_a_module_without_a_sparse_model_is_an_error() -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[SparseCallback()], barebones=False)
    with pytest.raises(LayerError, match="sparsify"):
        trainer.fit(Classifier(sparse=False), loader())


def test_masks_of_the_inner_model_are_not_broadcast() -> None:
    model = Classifier()
    SparseCallback().setup(Trainer(accelerator="cpu", logger=False), model, "fit")
    ignored = model._ddp_params_and_buffers_to_ignore
    assert sorted(ignored) == [f"body.{i}.weight_mask" for i in (0, 2, 5, 7)]
    assert isinstance(model.body, nn.Sequential)
