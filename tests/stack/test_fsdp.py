"""FSDP2: sharded weights and moments, one set of masks; updates are those of one process."""

import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Adam, Optimizer

import sparsefx
from sparsefx import exchange, moments, shards
from sparsefx.errors import TraceWarning
from tests.masked_dense import MOMENTUM, batches, loss_of, net
from tests.stack import ranks
from tests.stack.test_ddp import parts

SCHEDULE = {"steps_per_update": 4, "total_steps": 40}
OPTIMIZERS = {"sgd": MOMENTUM, "adam": partial(Adam, lr=1e-3)}


def blocks(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`net` in two blocks, each with uneven shards."""
    layers = list(net(dtype))
    return nn.Sequential(nn.Sequential(*layers[:4]), nn.Sequential(*layers[4:]))


def sharded(window: Any, dtype: torch.dtype = torch.float64, *, copies: int = 1, **options: Any) -> nn.Module:
    """The sparse model over all ranks; `copies` groups of them each hold all of it (HSDP)."""
    warnings.simplefilter("ignore", TraceWarning)
    config = sparsefx.SparseMomentum(dense_grad_window=window)
    model = sparsefx.sparsify(blocks(dtype), 0.2, scheduler=config)
    shape = (copies, dist.get_world_size() // copies) if copies > 1 else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


def steps(model: nn.Module, optimizer: Optimizer, data: list, micro: int, clip: float | None) -> None:
    for start in range(0, len(data), micro):
        for batch in data[start : start + micro]:
            (loss_of(model, batch) / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def train_rank(rank: int, name: str, window: Any, micro: int, clip: float | None, options: dict[str, Any]) -> tuple:
    model = sharded(window, **options)
    optimizer = OPTIMIZERS[name](model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    data = parts(batches(10 * micro), rank, dist.get_world_size())
    missing = []
    for start in range(0, len(data), micro):
        steps(model, optimizer, data[start : start + micro], micro, clip)
        missing += [
            bool(p.full_tensor()[~sparsefx.masks(model)[n]].any())
            for n, p in model.named_parameters()
            if n in sparsefx.masks(model)
        ]
    assert not any(missing)
    sizes = [p.to_local().numel() for p in model.parameters()]
    state = whole_state(model)
    return state, dict(sparsefx.masks(model)), [row["step"] for row in model.scheduler.history], sum(sizes)


@pytest.mark.parametrize(
    ("name", "window", "micro", "clip", "options"),
    [
        ("sgd", 2, 1, None, {}),
        ("adam", "always", 2, 0.05, {"reshard_after_forward": False}),
        ("sgd", "always", 2, 0.05, {}),
        ("sgd", 2, 1, 0.05, {"copies": 2}),
    ],
)
def test_sharded_runs_are_those_of_one_process(
    name: str, window: Any, micro: int, clip: float | None, options: dict[str, Any]
) -> None:
    copies = options.get("copies", 1)
    results = ranks.run(train_rank, name, window, micro, clip, options, ranks=2 * copies)
    model = sparsefx.sparsify(blocks(), 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window=window))
    optimizer = OPTIMIZERS[name](model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    steps(model, optimizer, batches(10 * micro), micro, clip)
    total = sum(p.numel() for p in model.parameters())
    assert sum(result[3] for result in results) == copies * total
    for state, masks, updates, held in results:
        assert updates == [4, 8]
        assert held < 0.7 * total
        assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * sum(m.numel() for m in masks.values()))
        for key, mask in sparsefx.masks(model).items():
            assert torch.equal(mask, masks[key]), key
        for key, value in state.items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-9, atol=1e-10, msg=key)


def mixed_rank(rank: int) -> tuple:
    """bf16 forward and gradients over fp32 masters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(2, torch.float32, mp_policy=policy)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    seen = []
    model[1][1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for batch in parts(batches(9, torch.float32), rank, 2):
        steps(model, optimizer, [batch], 1, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return whole_state(model), dict(sparsefx.masks(model)), set(seen), len(model.scheduler.history)


def test_bf16_over_fp32_masters_keeps_counts_and_zeros() -> None:
    one, other = ranks.run(mixed_rank)
    assert one[2] == {torch.bfloat16}
    assert one[3] == 2
    for key, value in one[0].items():
        assert torch.equal(value, other[0][key])
        assert value.float().isfinite().all()
    for key, mask in one[1].items():
        assert not one[0][key][~mask].any()
    assert sum(int(m.sum()) for m in one[1].values()) == round(0.2 * sum(m.numel() for m in one[1].values()))


def part_of_run(rank: int, folder: Path, first: int, last: int) -> dict[str, torch.Tensor]:
    model = sharded(3)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    if first:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer, "scheduler": model.scheduler.state_dict()}
        load(state, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        model.scheduler.load_state_dict(state["scheduler"])
    for batch in parts(batches(14), rank, dist.get_world_size())[first:last]:
        steps(model, optimizer, [batch], 1, None)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    for name in sparsefx.masks(model):
        weight, mask = of_model[name], of_model[f"{name}_mask"]
        assert mask.to_local().dtype == torch.bool
        assert mask.to_local().shape == weight.to_local().shape
        assert not weight.to_local()[~mask.to_local()].any()
    state = {"model": of_model, "optimizer": of_optimizer, "scheduler": model.scheduler.state_dict()}
    save(state, checkpoint_id=folder / str(last))
    return whole_state(model)


def test_a_sharded_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """The second stop, at step 7, is inside a window."""
    states = []
    for first, last, world in ((0, 4, 2), (4, 7, 4), (7, 14, 2)):
        states = ranks.run(part_of_run, tmp_path, first, last, ranks=world)
    model = sparsefx.sparsify(blocks(), 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window=3))
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    steps(model, optimizer, batches(14), 1, None)
    assert len(model.scheduler.history) == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-10, msg=name)


def accumulate(model: nn.Module, optimizer: Optimizer, data: list) -> None:
    """Train, one step for two micro-batches, whose gradients are sent at the second only."""
    for start in range(0, len(data), 2):
        for i, batch in enumerate(data[start : start + 2]):
            model.set_requires_gradient_sync(i == 1)
            (loss_of(model, batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def unsynchronized_rank(rank: int) -> tuple:
    """Accumulation that sends gradients at its last micro-batch only."""
    model = sharded("always")
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    accumulate(model, optimizer, parts(batches(20), rank, 2))
    return whole_state(model), dict(sparsefx.masks(model))


def test_accumulation_without_synchronization_is_that_of_one_process() -> None:
    results = ranks.run(unsynchronized_rank)
    model = sparsefx.sparsify(blocks(), 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    steps(model, optimizer, batches(20), 2, None)
    for state, masks in results:
        for key, mask in sparsefx.masks(model).items():
            assert torch.equal(mask, masks[key]), key
        for key, value in state.items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-9, atol=1e-10, msg=key)


def gathering_rank(rank: int) -> list[int]:
    """Sizes of what an update holds whole at any time: everything gathered and not yet let go."""
    model = sharded("always")
    optimizer = Adam(model.parameters(), lr=1e-3)
    model.scheduler.attach(optimizer, **SCHEDULE)
    steps(model, optimizer, parts(batches(3), rank, 2), 1, None)
    gathered: list[weakref.ref[torch.Tensor]] = []
    held = []

    def recorded(tensor: torch.Tensor) -> torch.Tensor:
        found = shards.whole(tensor)
        gathered.append(weakref.ref(found))
        held.append(sum(t.numel() for ref in gathered if (t := ref()) is not None))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "whole", recorded)
        patch.setattr(moments, "whole", recorded)
        model.scheduler.update()
    return held


def test_an_update_holds_one_layer_whole_at_a_time() -> None:
    """Its weight and the two moments of Adam at most."""
    largest = max(mask.numel() for mask in sparsefx.masks(sparsefx.sparsify(blocks(), 0.2)).values())
    for held in ranks.run(gathering_rank):
        assert len(held) >= 15
        assert max(held) <= 3 * largest


def reduced_rank(rank: int) -> tuple:
    """Accumulation without synchronization, reduced in another type than the parameters'."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(2, torch.float32, mp_policy=policy)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    accumulate(model, optimizer, parts(batches(18, torch.float32), rank, 2))
    return whole_state(model), dict(sparsefx.masks(model)), len(model.scheduler.history)


def test_accumulation_reduced_in_another_type_keeps_counts_and_zeros() -> None:
    one, other = ranks.run(reduced_rank)
    assert one[2] == 2
    for key, mask in one[1].items():
        assert torch.equal(mask, other[1][key])
        assert not one[0][key][~mask].any()
        assert one[0][key].isfinite().all()
    assert sum(int(m.sum()) for m in one[1].values()) == round(0.2 * sum(m.numel() for m in one[1].values()))
