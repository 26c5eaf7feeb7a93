"""torch.compile in whole training runs: one compilation a mode and shape, whatever masks, windows and callers do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import sparsefx
from sparsefx.errors import TraceWarning
from tests.masked_dense import assert_zero_missing

UPDATES = 12


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def make(example: bool = True) -> nn.Module:
    return sparsefx.sparsify(make_dense(), 0.3, example_inputs=torch.randn(4, 3, 8, 8) if example else None)


def attach(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.1)
    model.scheduler.attach(optimizer, steps_per_update=4, total_steps=1000)
    return optimizer


def step(call: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    loss = F.cross_entropy(call(x), torch.arange(size) % 10)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if hasattr(model, "scheduler"):
        assert_zero_missing(model)
    return loss.item()


@pytest.mark.parametrize("when", ["compiled before attach", "compiled after attach"])
def test_twelve_updates_compile_once_a_mode_and_shape(when: str) -> None:
    model, counter = make(), CompileCounterWithBackend("aot_eager")
    optimizer = None if when == "compiled before attach" else attach(model)
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    if optimizer is None:
        call(torch.randn(4, 3, 8, 8)).sum().backward()
        model.zero_grad()
        optimizer = attach(model)
    windows = set()
    for i in range(4 * UPDATES + 1):
        windows.add(model.scheduler.window.open)
        step(call, model, optimizer, 4, i)
        if i % 12 == 0:
            call.eval()
            with torch.no_grad():
                torch.testing.assert_close(call(torch.ones(4, 3, 8, 8)), model(torch.ones(4, 3, 8, 8)))
            call.train()
    assert len(model.scheduler.history) == UPDATES
    assert windows == {True, False}
    assert counter.frame_count == 2  # one in training, one in eval


def test_compiled_steps_are_the_eager_ones_through_updates() -> None:
    losses, masks = [], []
    for compiled in (True, False):
        model = make()
        optimizer = attach(model)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses.append([step(call, model, optimizer, 4, i) for i in range(14)])
        masks.append({name: mask.clone() for name, mask in sparsefx.masks(model).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_that_change_compile_as_often_as_for_the_dense_model(dynamic: bool | None) -> None:
    """At most once for the first size and once for all others."""
    counts = []
    for dense in (True, False):
        torch._dynamo.reset()
        model, counter = (make_dense() if dense else make()), CompileCounterWithBackend("aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.1) if dense else attach(model)
        call = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        for i, size in enumerate((4, 6, 5, 4, 7, 6, 9, 3)):
            step(call, model, optimizer, size, i)
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] <= 2


def test_compiling_before_any_call_runs_the_same() -> None:
    """Without example inputs nothing has been traced or measured when Dynamo comes."""
    model, eager, counter = make(example=False), make(example=False), CompileCounterWithBackend("aot_eager")
    optimizers = attach(model), attach(eager)
    call = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(9):
        expected = step(eager, eager, optimizers[1], 4, i)
        assert step(call, model, optimizers[0], 4, i) == pytest.approx(expected, rel=1e-5)
    assert len(model.scheduler.history) == 2
    assert counter.frame_count == 1


class Broken(nn.Module):
    """A part in the middle that neither fx nor Dynamo can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 4)
        self.middle = Middle()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)).relu())


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.fc(x) * (1.0 if float(x.detach().sum()) > 0 else 0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_untraceable_part_compiles_as_far_as_the_dense_original_does() -> None:
    frames, ops = [], []
    x = torch.randn(5, 12)
    for sparse in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, counter = Broken(), CompileCounter()
        if sparse:
            with pytest.warns(TraceWarning, match="middle"):
                sparsefx.sparsify(model, 0.5, example_inputs=x)
        call = torch.compile(model, backend=counter)
        for _ in range(4):
            call(x).sum().backward()
        frames.append(counter.frame_count)
        ops.append(counter.op_count)
        torch.testing.assert_close(call(x), model(x))
    assert frames[1] <= frames[0]
    assert frames[1] >= 2


@pytest.mark.gpu
def test_reduce_overhead_follows_the_masks_without_a_recompilation() -> None:
    losses = []
    for compiled in (True, False):
        model = make(example=False).cuda()
        optimizer = attach(model)
        call = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
        rows = []
        for i in range(14):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(4, 3, 8, 8, generator=generator).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(call(x), torch.arange(4, device="cuda"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append(loss.item())
        losses.append(rows)
        assert len(model.scheduler.history) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
