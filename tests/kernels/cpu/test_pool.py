"""Max pooling on blocked activations against torch, NaN and ties included."""

import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.cpu import Pool, max_pool_backward, max_pool_forward
from sparsefx.kernels.cpu.norm import apply_prologue
from sparsefx.kernels.spec import Prologue
from tests.kernels.cpu.helpers import blocked, images_of

SHAPES = [
    ((5, 3, 7, 9), (3, 3), (2, 2), (1, 1)),
    ((16, 2, 8, 8), (2, 2), (2, 2), (0, 0)),
    ((17, 2, 9, 9), (2, 2), (2, 2), (0, 0)),
    ((3, 2, 6, 5), (3, 2), (1, 2), (1, 0)),
    ((1, 1, 4, 4), (4, 4), (4, 4), (0, 0)),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(shape, kernel, stride, padding, dtype):
    x = torch.randint(-4, 5, shape).to(dtype).requires_grad_()  # ties: the first of them takes the gradient
    want = F.max_pool2d(x, kernel, stride, padding)
    g = torch.randint(1, 4, want.shape).to(dtype)
    want.backward(g)
    pool = Pool((shape[2], shape[3]), kernel, stride, padding)
    y, taps = max_pool_forward(blocked(x.detach()), pool)
    dx = max_pool_backward(blocked(g), taps, pool)
    n = shape[0]
    assert torch.equal(images_of(y)[:n], want)
    assert torch.equal(images_of(dx)[:n], x.grad)
    assert not images_of(y)[n:].any()
    assert not images_of(dx)[n:].any()


def test_nan_wins_and_takes_the_gradient():
    x = torch.randn(16, 1, 4, 4)
    x[3, 0, 1, 0] = float("nan")
    pool = Pool((4, 4), (2, 2), (2, 2), (0, 0))
    y, taps = max_pool_forward(blocked(x), pool)
    want = F.max_pool2d(x, 2)
    torch.testing.assert_close(images_of(y), want, equal_nan=True)
    dx = images_of(max_pool_backward(torch.ones_like(y), taps, pool))
    assert dx[3, 0, :2, :2].tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), SHAPES)
def test_a_prologue_is_done_to_what_is_read(shape, kernel, stride, padding, relu):
    x, channels = blocked(torch.randn(shape)), shape[1]
    prologue = Prologue(torch.randn(channels), torch.randn(channels), torch.randn(channels), relu)
    pool = Pool((shape[2], shape[3]), kernel, stride, padding)
    y, taps = max_pool_forward(x, pool, images=shape[0], prologue=prologue)
    written, written_taps = max_pool_forward(apply_prologue(x, prologue, shape[0]), pool)
    assert torch.equal(y, written)
    assert torch.equal(images_of(taps)[: shape[0]], images_of(written_taps)[: shape[0]])
