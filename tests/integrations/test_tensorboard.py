"""Updates in TensorBoard's own files."""

from pathlib import Path

import pytest
from torch import nn

import sparsefx
from tests.masked_dense import MOMENTUM, batches, net, train_step


@pytest.mark.filterwarnings("ignore")
def test_each_update_is_written_once_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from sparsefx.integrations.tensorboard import UpdateLog

    model = sparsefx.sparsify(net(), 0.2)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=4, total_steps=40)
    with SummaryWriter(tmp_path) as writer:
        log = UpdateLog(writer, nn.Sequential(model))
        for batch in batches(9):
            train_step(model, optimizer, batch)
            log.write()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sparsefx/nnz")] == [(4, 347.0), (8, 347.0)]
    for name, mask in sparsefx.masks(model).items():
        assert events.Scalars(f"sparsefx/nnz/{name}")[-1].value == int(mask.sum())
        density = events.Scalars(f"sparsefx/density/{name}")[-1].value
        assert density == pytest.approx(int(mask.sum()) / mask.numel())
    assert all(e.value > 0 for e in events.Scalars("sparsefx/update_seconds"))
