"""Kept memory is used again only when nothing refers to it any more."""

import gc

import pytest
import torch

from sparsefx.kernels.cpu import buffers
from sparsefx.kernels.cpu.abi import empty, load

SHAPE = (2, 1024, 1024)


@pytest.fixture(autouse=True)
def _clean():
    gc.collect()
    buffers.release()
    yield
    buffers.release()


def make(shape=SHAPE, dtype=torch.float32):
    return empty(load(), shape, dtype)


def test_memory_comes_back_when_the_last_view_is_gone():
    first = make()
    where, view = first.data_ptr(), first[1, 3:5]
    first.fill_(1)
    del first
    other = make()
    assert other.data_ptr() != where
    other.fill_(2)
    assert torch.equal(view, torch.ones(2, 1024))
    del view
    assert make().data_ptr() == where


def test_a_graph_keeps_what_backward_reads():
    weight = torch.ones(1024, requires_grad=True)
    x = make().fill_(3)
    loss = (x * weight).sum()
    del x
    make().fill_(5)
    loss.backward()
    assert torch.equal(weight.grad, torch.full((1024,), 3.0 * 2048))


def test_tensors_are_ordinary():
    for dtype in (torch.float32, torch.bfloat16):
        x = make(dtype=dtype)
        assert type(x) is torch.Tensor
        assert x.dtype == dtype
        assert x.shape == SHAPE
        assert x.is_contiguous()
        assert not x._is_view()
        assert x.data_ptr() % 64 == 0
        assert x.requires_grad_().is_leaf


class Lent(torch.autograd.Function):
    """The identity, whose gradient lies in lent memory; `places` gets where."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.places = places
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        dx = make().copy_(grad)
        ctx.places.append(dx.data_ptr())
        return dx, None


def test_autograd_adds_gradients_of_branches_in_place():
    x = torch.ones(SHAPE, requires_grad=True)
    y, places, sums = x * 1, [], []
    y.register_hook(lambda grad: sums.append((grad.data_ptr(), grad.unique().tolist())))
    (Lent.apply(y, places) + 2 * Lent.apply(y, places)).sum().backward()
    ((where, values),) = sums
    assert where in places
    assert values == [3.0]


def test_small_tensors_are_left_to_the_allocator():
    make((8, 8))
    assert buffers.kept() == 0


def test_little_more_is_kept_than_was_lent_at_once():
    for rows in range(1, 9):
        make((rows, 1024, 1024))
        assert buffers.kept() <= 1.5 * rows * (4 << 20)
    held = [make() for _ in range(4)]
    size = held[0].nbytes
    del held
    assert buffers.kept() == 4 * size
    buffers.release()
    assert buffers.kept() == 0
