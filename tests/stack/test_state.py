"""Checkpoints through torch.save, torch.distributed.checkpoint and safetensors, on any number of ranks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

import sparsefx
from sparsefx.errors import CheckpointError, UpdateWarning
from tests.masked_dense import OPTIMIZERS, assert_equal_state, batches, first_moment, net
from tests.stack import ranks
from tests.stack.test_ddp import make, parts, steps, wrap

SCHEDULE = {"steps_per_update": 6, "total_steps": 40}


def start(name: str = "sgd", window: Any = 4) -> tuple[nn.Module, Optimizer]:
    model = make(window, density=0.5)  # every channel is live: no backend is chosen by timing
    optimizer = OPTIMIZERS[name](model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    return model, optimizer


def save_all(how: str, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Save what a user would, with the tools of one way of doing it."""
    scheduler = model.scheduler.state_dict()
    if how == "torch":
        torch.save((model.state_dict(), optimizer.state_dict(), scheduler), folder / "all.pt")
    elif how == "dcp":
        of_model, of_optimizer = get_state_dict(model, optimizer)
        save({"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler}, checkpoint_id=folder / "dcp")
    else:
        save_file(model.state_dict(), folder / "model.safetensors", {"scheduler": json.dumps(scheduler)})
        moments = {n: first_moment(optimizer, p).contiguous() for n, p in model.named_parameters()}
        save_file(moments, folder / "optimizer.safetensors")


def load_all(how: str, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    if how == "torch":
        of_model, of_optimizer, scheduler = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
    elif how == "dcp":
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer, "scheduler": model.scheduler.state_dict()}
        load(state, checkpoint_id=folder / "dcp")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        scheduler = state["scheduler"]
    else:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        for name, moment in load_file(folder / "optimizer.safetensors").items():
            optimizer.state[model.get_parameter(name)]["momentum_buffer"] = moment
        with safe_open(folder / "model.safetensors", "pt") as file:
            scheduler = json.loads(file.metadata()["scheduler"])
    model.scheduler.load_state_dict(scheduler)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("at", [3, 6, 16])
@pytest.mark.parametrize("how", ["torch", "dcp", "safetensors"])
def test_a_run_goes_on_bit_exactly_from_each_kind_of_checkpoint(how: str, at: int, tmp_path: Path) -> None:
    data = batches(20)
    model, optimizer = start()
    steps(model, optimizer, data[:at])
    save_all(how, tmp_path, model, optimizer)
    steps(model, optimizer, data[at:])
    again, optimizer_again = start()
    again.scheduler.specializer.table["of this process"] = "dense"
    load_all(how, tmp_path, again, optimizer_again)
    assert [row["step"] for row in again.scheduler.history] == [6, 12][: at // 6]
    assert "of this process" not in again.scheduler.specializer.table
    steps(again, optimizer_again, data[at:])
    assert_equal_state(again.state_dict(), model.state_dict())
    assert [row["layers"] for row in again.scheduler.history] == [row["layers"] for row in model.scheduler.history]


def part_of_run(rank: int, folder: Path, how: str, first: int, last: int, count: int) -> dict[str, torch.Tensor]:
    """Steps `first` to `last` of a run of `count` batches, from the checkpoint of step `first`, saving at `last`."""
    model, optimizer = start()
    call = wrap(model, sparse_reduce=True)
    if first:
        load_all(how, folder / str(first), model, optimizer)
    data = parts(batches(count), rank, dist.get_world_size())
    steps(call, optimizer, data[first:last])
    model.scheduler.synchronize()
    if rank == 0:
        (folder / str(last)).mkdir()
    dist.barrier()
    if how == "dcp" or rank == 0:
        save_all(how, folder / str(last), model, optimizer)
    dist.barrier()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["torch", "dcp"])
def test_a_run_goes_on_with_another_number_of_ranks(how: str, tmp_path: Path) -> None:
    """The second stop, at step 10, is inside a window."""
    bounds = [0, 6, 10, 16]
    states = []
    for first, last, world in zip(bounds[:-1], bounds[1:], (2, 4, 1), strict=True):
        states = ranks.run(part_of_run, tmp_path, how, first, last, 16, ranks=world)
    model, optimizer = start()
    steps(model, optimizer, batches(16))
    assert len(model.scheduler.history) == 2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-10, msg=name)


def unsynchronized_rank(rank: int) -> tuple:
    model, optimizer = start()
    call = wrap(model)
    data = parts(batches(6), rank, 2)
    steps(call, optimizer, data[:4])
    with pytest.warns(UpdateWarning, match="synchronize"):
        model.scheduler.state_dict()
    moments = [first_moment(optimizer, p).clone() for p in model.parameters()]
    model.scheduler.synchronize()
    means = [first_moment(optimizer, p).clone() for p in model.parameters()]
    model.scheduler.state_dict()
    steps(call, optimizer, data[4:])
    model.scheduler.state_dict()
    return (
        moments,
        means,
        [first_moment(optimizer, p)[~model.get_parameter(n).bool()] for n, p in list(model.named_parameters())],
    )


def test_a_state_inside_a_window_is_that_of_all_ranks_once_synchronized() -> None:
    one, other = ranks.run(unsynchronized_rank)
    assert any(not torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for a, b, mean, same in zip(one[0], other[0], one[1], other[1], strict=True):
        assert torch.equal(mean, same)
        torch.testing.assert_close(mean, (a + b) / 2, rtol=1e-14, atol=0)


def test_a_deepcopy_keeps_masks_and_its_own_future() -> None:
    model, optimizer = start()
    steps(model, optimizer, batches(7))
    other = copy.deepcopy(model)
    kept = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    assert_equal_state(dict(sparsefx.masks(other)), kept)
    steps(model, optimizer, batches(6, seed=1))
    assert any(not torch.equal(mask, kept[name]) for name, mask in sparsefx.masks(model).items())
    assert_equal_state(dict(sparsefx.masks(other)), kept)
    x = batches(1)[0][0]
    dense = net()
    dense.load_state_dict({k: v for k, v in other.state_dict().items() if "mask" not in k})
    torch.testing.assert_close(other(x), dense(x))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("how", ["torch", "dcp", "safetensors"])
def test_a_checkpoint_of_another_density_says_so(how: str, tmp_path: Path) -> None:
    model, optimizer = start()
    steps(model, optimizer, batches(2))
    save_all(how, tmp_path, model, optimizer)
    other = make(4, density=0.3)
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"0\.30.*density 0\.5\)"):
        load_all(how, tmp_path, other, optimizer)
    if how != "dcp":  # which reads into the tensors that it was given
        assert_equal_state(dict(other.state_dict()), dict(before))
