"""Prepared library calls: where buffers lie, and that each run reads and writes what it is given."""

import contextlib
import random
import threading

import pytest
import torch

from sparsefx.kernels.cpu import abi
from sparsefx.kernels.cpu.calls import ALIGNMENT, Buffer, Calls, Structure, plan
from sparsefx.kernels.cpu.norm import SfxNorm, channel_sums
from tests.kernels.cpu.helpers import blocked


@pytest.mark.parametrize("seed", range(30))
def test_buffers_that_live_at_one_time_lie_apart(seed):
    draw = random.Random(seed)
    lives = {}
    for _ in range(draw.randint(1, 40)):
        first = draw.randint(0, 30)
        lives[Buffer(draw.choice([0, 1, 64, 100, 4096, 5000]))] = (first, first + draw.randint(0, 8))
    kept = set(draw.sample(sorted(lives, key=id), len(lives) // 4))
    places, total = plan(lives, kept.__contains__)
    assert places.keys() == lives.keys()
    for one, (first, last) in lives.items():
        assert places[one] % ALIGNMENT == 0
        assert 0 <= places[one] <= total - one.size
        for other, (begins, ends) in lives.items():
            together = (first <= ends or other in kept) and (begins <= last or one in kept)
            if one is not other and together and one.size and other.size:
                apart = places[one] + one.size <= places[other] or places[other] + other.size <= places[one]
                assert apart


def test_memory_is_used_again():
    chain = {Buffer(1000): (i, i + 1) for i in range(50)}
    assert plan(chain, lambda _: False)[1] == 2 * 1024
    assert plan(chain, lambda _: True)[1] == 50 * 1024


def add_three() -> Calls:
    """`a + b + c` of 1000 numbers, by way of an arena."""
    calls = Calls(abi.load())
    given = [Buffer(4000, given=True) for _ in range(4)]
    between = Buffer(4000)
    calls.add("sfx_add", given[0], given[1], between, 1000)
    calls.add("sfx_add", between, given[2], given[3], 1000)
    calls.finish([*given[::-1], Buffer(64, given=True)])  # an order of its own, and one that no call names
    return calls


def run(calls: Calls, *tensors: torch.Tensor) -> torch.Tensor:
    arena = torch.empty(calls.arena // 4)
    calls.run(arena.data_ptr(), [*(t.data_ptr() for t in tensors[::-1]), 0])
    return tensors[-1]


def test_each_run_has_its_own_tensors():
    calls = add_three()
    for _ in range(3):
        a, b, c = torch.randn(3, 1000)
        assert torch.equal(run(calls, a, b, c, torch.empty(1000)), a + b + c)


def test_each_call_can_be_watched(monkeypatch):
    calls, seen = add_three(), []
    monkeypatch.setattr(Calls, "watch", lambda name: contextlib.nullcontext(seen.append(name)))
    a, b, c = torch.randn(3, 1000)
    assert torch.equal(run(calls, a, b, c, torch.empty(1000)), a + b + c)
    assert seen == ["sfx_add", "sfx_add"]


def test_threads_that_run_the_same_calls_do_not_mix():
    calls = add_three()
    wrong = []

    def work(seed: int) -> None:
        a = torch.full((1000,), float(seed))
        for _ in range(200):
            if not torch.equal(run(calls, a, a, a, torch.empty(1000)), a + a + a):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fields_of_structures_are_set_at_each_run():
    calls, x, y = Calls(abi.load()), Buffer(4 * 64, given=True), Buffer(4 * 64, given=True)
    mean, rstd = Buffer(16, given=True), Buffer(16, given=True)
    calls.add("sfx_norm", 0, 0, Structure(SfxNorm, x=x, y=y, mean=mean, rstd=rstd, relu=1), 16, 4, 1)
    calls.finish([x, y, mean, rstd])
    for _ in range(2):
        given, out = torch.randn(1, 4, 1, 1, 16), torch.empty(1, 4, 1, 1, 16)
        of = {x: given, y: out, mean: torch.randn(4), rstd: torch.rand(4)}
        calls.run(0, [of[b].data_ptr() for b in (x, y, mean, rstd)])
        wanted = ((given - of[mean].view(4, 1, 1, 1)) * of[rstd].view(4, 1, 1, 1)).relu()
        torch.testing.assert_close(out, wanted)


def test_a_call_that_fails_raises_what_it_says():
    calls = Calls(abi.load())
    layer = abi.load().sfx_layer_new((abi.ctypes.c_int64 * 11)(2, 2, 1, 1, 1, 1, 0, 0, 1, 1, 1), b"\1\1\1\1")
    abi.load().sfx_layer_tune(layer, 0, (abi.ctypes.c_int64 * 7)(9, 9, 9, 9, 9, 9, 9))  # a tiling that there is not
    x = Buffer(4 * 64, given=True)
    calls.add("sfx_conv_gather", layer, 0, 0, x, 16, 1, 1, None, x, None, None, False, x)
    calls.finish([x])
    tensor = torch.zeros(64)
    with pytest.raises(RuntimeError, match="no microkernel"):
        calls.run(0, [tensor.data_ptr()])
    abi.load().sfx_layer_free(layer)


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        ("sfx_advise", (1, 2), "expected a function that calls.cpp knows"),
        ("sfx_add", (1, 2, 3), "expected 4 arguments before the threads, got 3"),
        ("sfx_add", (1, 2, 3, 0.5), "float"),
    ],
)
def test_what_cannot_be_called_is_refused(function, arguments, problem):
    calls = Calls(abi.load())
    calls.add(function, *arguments)
    with pytest.raises(TypeError, match=problem):
        calls.finish([])


@pytest.mark.parametrize("images", [3, 16, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_sums(images, dtype):
    x = torch.randn(images, 5, 7, 9).to(dtype)
    torch.testing.assert_close(channel_sums(blocked(x), images), x.float().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


def test_relu_backward_passes_what_torch_passes():
    y, grad = torch.tensor([-1.0, 0.0, -0.0, 2.0, float("nan")] * 7), torch.randn(35)
    out = torch.empty(35)
    abi.load().sfx_relu_backward(grad.data_ptr(), y.data_ptr(), out.data_ptr(), 35, 2)
    assert torch.equal(out, torch.ops.aten.threshold_backward(grad, y, 0))
