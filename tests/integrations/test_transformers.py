"""The Trainer callback in real, tiny runs of a BERT."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import sparsefx
from sparsefx.errors import LayerError
from sparsefx.integrations.transformers import SparseCallback
from tests.masked_dense import assert_equal_state, assert_zero_missing
from tests.stack import ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::sparsefx.errors.BackendWarning"),
    pytest.mark.filterwarnings("error::sparsefx.errors.UpdateWarning"),
]


class Words(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(50, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids.sum() % 2}


class Watch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert_zero_missing(kwargs["model"])
        masks = sparsefx.masks(kwargs["model"]).values()
        assert sum(int(m.sum()) for m in masks) == round(0.5 * sum(m.numel() for m in masks))


def train(folder: Path, resume: Path | None = None, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = sparsefx.sparsify(BertForSequenceClassification(config).double(), 0.5)
    options = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
        **arguments,
    )
    callback = SparseCallback(resume_from_checkpoint=resume)
    trainer = Trainer(model, options, train_dataset=Words(), callbacks=[callback, Watch()])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_a_run_updates_each_epoch_logs_and_resumes_bit_exactly(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    rows = trainer.model.scheduler.history
    assert [row["step"] for row in rows] == [6, 12, 18]
    logged = [entry for entry in trainer.state.log_history if "sparsefx/nnz" in entry]
    assert [entry["step"] for entry in logged] == [6, 12, 18]
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert logged[1][f"sparsefx/density/{name}"] == rows[1]["layers"][name]["density"]
    assert logged[1]["sparsefx/update_seconds"] == rows[1]["seconds"]
    for step in (4, 16):
        again = train(tmp_path / f"again{step}", resume=tmp_path / f"checkpoint-{step}")
        assert_equal_state(dict(again.model.state_dict()), dict(trainer.model.state_dict()))
        assert [row["layers"] for row in again.model.scheduler.history] == [row["layers"] for row in rows]


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    trainer = train(tmp_path, gradient_accumulation_steps=2)
    assert [row["step"] for row in trainer.model.scheduler.history] == [3, 6, 9]


def train_rank(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """One rank of a run, and of another that goes on from inside a window of the first."""
    warnings.simplefilter("ignore")
    ranks.as_torchrun(rank)
    states = []
    for resume in (None, folder / "checkpoint-8"):
        trainer = train(folder if resume is None else folder / "again", resume, ddp_backend="gloo")
        assert trainer.args.world_size == 2
        assert [row["step"] for row in trainer.model.scheduler.history] == [3, 6, 9]
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    return states


def test_ranks_agree_and_resume_bit_exactly(tmp_path: Path) -> None:
    one, other = ranks.run(train_rank, tmp_path)
    for state in (one[1], *other):
        assert_equal_state(state, one[0])


def test_a_dense_model_is_an_error(tmp_path: Path) -> None:
    options = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    dense = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2))
    trainer = Trainer(dense, options, train_dataset=Words(), callbacks=[SparseCallback()])
    with pytest.raises(LayerError, match="sparsify"):
        trainer.train()
