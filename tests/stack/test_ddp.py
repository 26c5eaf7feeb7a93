"""DistributedDataParallel: ranks agree to the bit, and train as one process would on the whole batch."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import sparsefx
from sparsefx import ranks as collectives
from sparsefx.ranks import fingerprint
from sparsefx.specialize import Specializer
from tests.masked_dense import MOMENTUM, OPTIMIZERS, assert_zero_missing, batches, first_moment, loss_of, net
from tests.stack import ranks

SCHEDULE = {"steps_per_update": 5, "total_steps": 40}


def make(window: Any = 3, dtype: torch.dtype = torch.float64, density: float = 0.2) -> nn.Module:
    config = sparsefx.SparseMomentum(dense_grad_window=window)
    return sparsefx.sparsify(net(dtype), density, scheduler=config)


def wrap(model: nn.Module, sparse_reduce: bool = False, **options: Any) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, **options)
    if sparse_reduce:
        sparsefx.distributed.sparse_all_reduce(wrapped)
    return wrapped


def steps(call: nn.Module, optimizer: Any, data: list, micro: int = 1, clip: float | None = None) -> list[Any]:
    """Train, one step for `micro` batches; the states after each step."""
    states = []
    model = getattr(call, "module", call)
    for start in range(0, len(data), micro):
        for i, batch in enumerate(data[start : start + micro]):
            last = i == micro - 1
            with torch.enable_grad() if last or call is model else call.no_sync():
                (loss_of(call, batch) / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        assert_zero_missing(model)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def parts(data: list, rank: int, world: int) -> list:
    return [tuple(t.chunk(world)[rank] for t in batch) for batch in data]


def train_rank(rank: int, name: str, window: Any, sparse: bool, micro: int, clip: float | None) -> tuple:
    model = make(window)
    call = wrap(model, sparse)
    optimizer = OPTIMIZERS[name](model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    data = parts(batches(14 * micro), rank, dist.get_world_size())
    states = steps(call, optimizer, data, micro, clip)
    model.scheduler.window.reduce()
    moments = {n: first_moment(optimizer, model.get_parameter(n)).clone() for n in sparsefx.masks(model)}
    return states, moments, [row["step"] for row in model.scheduler.history]


@pytest.mark.parametrize(
    ("name", "window", "sparse", "micro", "clip"),
    [
        ("sgd", 3, False, 1, None),
        ("adam", "always", False, 2, 0.05),
        ("dampening", "auto", True, 1, 0.05),
        ("adamw", 3, True, 2, None),
    ],
)
def test_ranks_agree_to_the_bit_and_train_as_one_process(
    name: str, window: Any, sparse: bool, micro: int, clip: float | None
) -> None:
    results = ranks.run(train_rank, name, window, sparse, micro, clip)
    model = make(window)
    optimizer = OPTIMIZERS[name](model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    expected = steps(model, optimizer, batches(14 * micro), micro, clip)
    for step, (one, other) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        for key, value in one.items():
            assert torch.equal(value, other[key]), f"{key} at step {step}"
            torch.testing.assert_close(value, expected[step][key], rtol=1e-9, atol=1e-10, msg=f"{key} at step {step}")
    assert results[0][2] == results[1][2] == [5, 10]
    for key, moment in results[0][1].items():
        ours = first_moment(optimizer, model.get_parameter(key))
        torch.testing.assert_close(moment, ours, rtol=1e-9, atol=1e-12)
        assert torch.equal(moment, results[1][1][key])
        missing = ~sparsefx.masks(model)[key]
        assert moment[missing].any() or not missing.any()


def count_rank(rank: int, sparse: bool, wrapped_as: str) -> dict[str, Any]:
    """Steps with a network whose weights outnumber everything else."""
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300)).to(torch.float32)
    sparsefx.sparsify(model, 0.05, scheduler=sparsefx.SparseMomentum(dense_grad_window=2), keep_dense=())
    if wrapped_as == "part":
        model = nn.Sequential(model)
        sparsefx.distributed.ignore_masks(model)
    call = wrap(model, sparse)
    inner = model[0] if wrapped_as == "part" else model
    optimizer = MOMENTUM(model.parameters())
    inner.scheduler.attach(optimizer, steps_per_update=10, total_steps=40)
    reduced: list[int] = []
    mean = collectives.Ranks.mean

    def counted(self: Any, tensor: Tensor) -> Tensor:
        reduced.append(tensor.numel())
        return mean(self, tensor)

    collectives.Ranks.mean = counted
    result: dict[str, Any] = {"numbers": sum(p.numel() for p in model.parameters())}
    for step in range(1, 12):
        before = bytes_written()
        call(torch.randn(4, 300)).square().mean().backward()
        result[step] = bytes_written() - before
        optimizer.step()
        optimizer.zero_grad()
    result["reduced"] = reduced
    result["buffers"] = [name for _, name in call.named_module_buffers]
    return result


def bytes_written() -> int:
    """What the process has handed to write calls, sockets included."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "wchar" in line).split()[1])


@pytest.mark.parametrize("wrapped_as", ["whole", "part"])
def test_the_sparse_hook_sends_existing_weights_alone(wrapped_as: str) -> None:
    dense, sparse = (ranks.run(count_rank, on, wrapped_as) for on in (False, True))
    for rank in range(2):
        assert dense[rank]["buffers"] == sparse[rank]["buffers"] == []
        for step in (3, 5, 7, 11):
            full = dense[rank][step]
            assert full >= 4 * dense[rank]["numbers"]  # a ring over two ranks sends each number once
            assert sparse[rank][step] <= 0.056 * full + 2000, (step, sparse[rank][step], full)
        weights = 2 * 300 * 300
        # four numbers at each of the window's two steps, and the missing weights once
        assert dense[rank]["reduced"] == sparse[rank]["reduced"] == [4, 4, weights // 2, weights // 2]


def layout_rank(rank: int, sparse: bool) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 5))
    model = model.to(torch.float64, memory_format=torch.channels_last)  # with every channel live, no backend is timed
    sparsefx.sparsify(model, 0.5, keep_dense=["3"])
    call = wrap(model, sparse, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=3, total_steps=20)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(8):
        x = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
        call(x.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}, len(model.scheduler.history)


def test_the_sparse_hook_gives_the_plain_hooks_bits_in_channels_last() -> None:
    """Buckets keep the strides of their parameters."""
    plain, sparse = (ranks.run(layout_rank, on) for on in (False, True))
    for (one, updates), (other, _) in zip(plain, sparse, strict=True):
        assert updates == 2
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def compiled_rank(rank: int, how: str) -> tuple:
    """Fourteen steps, two updates and their windows; the states, the graphs compiled, and the updates."""
    Specializer._choose = lambda *_: "dense"  # growth leaves a channel empty, and timing would choose what sums how
    Specializer.choose_graph = lambda *_: "layers"
    model = make()
    if how == "inside":
        model.compile(backend="aot_eager")
    call = wrap(model)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **SCHEDULE)
    compiled = torch.compile(call, backend="aot_eager") if how == "outside" else call
    for batch in parts(batches(14), rank, 2):
        loss_of(compiled, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict()), counters["stats"]["unique_graphs"], len(model.scheduler.history)


@pytest.mark.parametrize("how", ["inside", "outside"])
def test_compiled_ranks_train_as_eager_ones_with_one_compilation(how: str) -> None:
    eager, compiled = (ranks.run(compiled_rank, each) for each in ("not at all", how))
    for (state, graphs, updates), (other, none, _) in zip(compiled, eager, strict=True):
        assert (graphs, none, updates) == (1, 0, 2)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def disagree_rank(rank: int, what: str) -> None:
    sparsefx.sparsify(model := net(torch.float32), 0.2, seed=rank if what == "seed" else None)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=2, total_steps=20)
    call = wrap(model)
    for step, batch in enumerate(parts(batches(4, torch.float32), rank, 2)):
        loss_of(call, batch).backward()
        optimizer.step()
        if rank == 1 and step == 2:
            with torch.no_grad():
                at = tuple(model[5].weight_mask.nonzero()[0])
                model[5].weight[at] += 1e-7
        optimizer.zero_grad()


@pytest.mark.parametrize(("what", "match"), [("seed", "attach: .*0.weight on ranks"), ("weight", "update at step 4")])
def test_ranks_that_disagree_are_named(what: str, match: str) -> None:
    for outcome in ranks.launch(disagree_rank, what):
        assert "DistributedError" in outcome.error
        message = outcome.error.strip().splitlines()[-1]
        assert re.search(match, message), message
        if what == "weight":
            assert "5.weight on ranks [1]" in message
            assert "0.weight" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_a_fingerprint_sees_every_bit_and_its_place(dtype: torch.dtype) -> None:
    one = torch.zeros(64, dtype=dtype)
    prints = {int(fingerprint(one))}
    for i in range(64):
        other = one.clone()
        other[i] = 1
        prints.add(int(fingerprint(other)))
    assert len(prints) == 65
    assert int(fingerprint(one.view(8, 8))) == int(fingerprint(one.view(8, 8).t().contiguous()))
