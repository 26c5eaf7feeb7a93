"""Mixed precision: autocast, loss scaling with real overflows, 16-bit parameters, every optimizer of torch."""

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import sparsefx
from sparsefx.errors import SchedulerError
from tests.masked_dense import (
    NEVER,
    MaskedDense,
    assert_moment,
    assert_zero_missing,
    batches,
    first_moment,
    loss_of,
    net,
    pair,
)

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_runs_sparse_layers_in_its_type_and_grads_in_the_parameters(dtype: torch.dtype) -> None:
    model = sparsefx.sparsify(net(torch.float32), 0.2)
    seen = []
    model[5].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    dense = net(torch.float32)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "mask" not in k})
    batch = batches(1, torch.float32)[0]
    grads = []
    for each in (model, dense):
        with torch.autocast("cpu", dtype):
            loss_of(each, batch).backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    assert set(seen) == {dtype}
    masks = sparsefx.masks(model)
    for name, grad in grads[0].items():
        expected = grads[1][name] * masks.get(name, 1)
        assert grad.dtype == torch.float32
        assert torch.linalg.vector_norm(grad - expected) <= 1e-2 * torch.linalg.vector_norm(expected), name


@pytest.mark.parametrize("make", [partial(SGD, lr=0.05, momentum=0.9), partial(AdamW, lr=1e-3)])
def test_a_step_that_overflows_where_an_update_is_due_moves_the_update_to_the_next(make: Any) -> None:
    """In fp16, with a loss scale that overflows by itself; stale momentum never decides."""
    model = sparsefx.sparsify(net(torch.float32), 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window=2))
    optimizer = make(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=4, total_steps=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    taken = 0
    for step, batch in enumerate(batches(14, torch.float32)):
        if step in (3, 4, 8):
            scaler.update(2.0**40)
        before = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
        updates = len(model.scheduler.history)
        moments = [first_moment(optimizer, p).clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        assert finite == (step not in (3, 4, 8))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update(2.0**8)
        optimizer.zero_grad()
        taken += finite
        assert model.scheduler.step == taken
        assert len(model.scheduler.history) == taken // 4
        if not finite:
            assert updates == len(model.scheduler.history)
            assert all(torch.equal(mask, before[name]) for name, mask in sparsefx.masks(model).items())
            for moment, parameter in zip(moments, model.parameters(), strict=True):
                assert torch.equal(moment, first_moment(optimizer, parameter))
        assert_zero_missing(model)
    assert [row["skipped"] for row in model.scheduler.history] == [None, None]


@pytest.mark.parametrize(
    "make",
    [partial(SGD, lr=0.05, momentum=0.9), partial(SGD, lr=0.05, momentum=0.9, foreach=True), partial(Adam, lr=1e-3)],
    ids=["sgd", "sgd-foreach", "adam"],
)
def test_16_bit_parameters_train_as_the_masked_dense_model_does(make: Any) -> None:
    model, optimizer, reference = pair(make, dtype=torch.bfloat16)
    for batch in batches(6, torch.bfloat16):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(batch)
        reference.step()
        assert_zero_missing(model)
        for name, mask in sparsefx.masks(model).items():
            ours = first_moment(optimizer, model.get_parameter(name))
            assert ours.dtype == torch.bfloat16
            assert_moment(name, ours.float(), reference.moment(name).float(), mask, rtol=3e-2)


def test_16_bit_parameters_keep_exact_counts_through_updates() -> None:
    model = sparsefx.sparsify(net(torch.bfloat16), 0.2)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.scheduler.attach(optimizer, steps_per_update=3, total_steps=100)
    for batch in batches(9, torch.bfloat16):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks = sparsefx.masks(model).values()
        assert sum(int(m.sum()) for m in masks) == round(0.2 * sum(m.numel() for m in masks))
        assert_zero_missing(model)
    assert sum(row["grown"] for row in model.scheduler.history[-1]["layers"].values()) > 0


def test_masters_kept_beside_a_16_bit_model_are_refused_with_the_remedy() -> None:
    model = sparsefx.sparsify(net(torch.bfloat16), 0.2)
    masters = [p.detach().float() for p in model.parameters()]
    with pytest.raises(SchedulerError, match="SGD.*autocast"):
        model.scheduler.attach(SGD(masters, lr=0.1, momentum=0.9), steps_per_update=3, total_steps=9)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore::sparsefx.errors.TraceWarning")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [partial(SGD, lr=0.05, momentum=0.9, nesterov=True), partial(AdamW, lr=1e-3)])
def test_everything_at_once_is_the_masked_dense_model(make: Any, set_to_none: bool) -> None:
    """Autocast, loss scale, accumulation, clipping and activation checkpoints together."""
    model = Checkpointed()
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    reference = MaskedDense(dense, sparsefx.masks(model), make)
    optimizer = make(model.parameters())
    model.scheduler.attach(optimizer, **NEVER)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    data = batches(8, torch.float32)
    for micro in (data[:2], data[2:4], data[4:6], data[6:]):
        for batch in micro:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(batch[0]), batch[1])
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
        with torch.autocast("cpu", torch.bfloat16):
            reference.backward(*micro)
        reference.clip_(0.05)
        reference.step()
        assert_zero_missing(model)
    for name, mask in sparsefx.masks(model).items():
        ours = first_moment(optimizer, model.get_parameter(name))
        assert_moment(name, ours, reference.moment(name), mask, rtol=5e-2)


def others() -> list[type[Optimizer]]:
    """Every optimizer of torch that takes plain parameters, but for the families that sparsefx knows."""
    known = {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Optimizer", "SparseAdam"}
    found = [c for _, c in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(c, Optimizer)]
    return [c for c in found if c.__name__ not in known]


@pytest.mark.parametrize("kind", others(), ids=lambda kind: kind.__name__)
def test_another_optimizer_is_refused_by_name_with_a_remedy_that_works(kind: type[Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    sparsefx.sparsify(model, 0.25)
    optimizer = kind(model.parameters(), lr=0.01)
    with pytest.raises(SchedulerError, match=rf"{kind.__name__}: expected SGD with momentum.*grow=.random") as caught:
        model.scheduler.attach(optimizer, steps_per_update=2, total_steps=20)
    assert "use one of these" in str(caught.value)

    other = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    sparsefx.sparsify(other, 0.25, scheduler=sparsefx.SparseMomentum(redistribute="nonzero", grow="random"))
    optimizer = kind(other.parameters(), lr=0.01)
    other.scheduler.attach(optimizer, steps_per_update=2, total_steps=20)
    x, y = torch.randn(8, 12), torch.randn(8, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(other(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        assert_zero_missing(other)
        assert sum(int(m.sum()) for m in sparsefx.masks(other).values()) == 64
    assert len(other.scheduler.history) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_and_scaler_on_cuda_follow_the_masked_dense_model(dtype: torch.dtype) -> None:
    model = net(torch.float32).cuda()
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    make = partial(SGD, lr=0.05, momentum=0.9)
    reference = MaskedDense(dense, sparsefx.masks(model), make)
    optimizer = make(model.parameters())
    model.scheduler.attach(optimizer, **NEVER)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    for x, y in batches(4, torch.float32):
        batch = x.cuda(), y.cuda()
        with torch.autocast("cuda", dtype):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            reference.backward(batch)
        reference.step()
    for name, mask in sparsefx.masks(model).items():
        ours = first_moment(optimizer, model.get_parameter(name))
        assert_moment(name, ours, reference.moment(name), mask, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_capturable_steps_are_those_of_the_plain_optimizer(kind: type[Optimizer]) -> None:
    results = []
    for capturable in (False, True):
        model = sparsefx.sparsify(net(torch.float32).cuda(), 0.2)
        optimizer = kind(model.parameters(), lr=1e-3, capturable=capturable)
        model.scheduler.attach(optimizer, steps_per_update=3, total_steps=50)
        for x, y in batches(7, torch.float32):
            loss_of(model, (x.cuda(), y.cuda())).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
