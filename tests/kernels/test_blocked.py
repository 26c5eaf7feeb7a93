"""The operators of a region as torch.library sees them: schemas, fake implementations, compiled as eager."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from sparsefx.kernels import blocked, norm, ops
from sparsefx.kernels.cpu import Pool
from sparsefx.kernels.runtime import Runtime
from sparsefx.kernels.sparse_cpu import SparseCpu
from sparsefx.kernels.spec import ConvSpec
from tests.kernels.cpu.helpers import error

OPS = torch.ops.sparsefx
SPEC = ConvSpec([1, 1], [1, 1], [1, 1], False, [0, 0], 1, 16)
X = torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))
STATS = torch.rand(3) + 0.5, torch.randn(3), torch.randn(3), torch.rand(3) + 0.5


def test_operators_pass_opcheck():
    x = blocked.enter(X)
    weight, bias, mean, var = STATS
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.to_blocked, (X,), test_utils=checks)
    torch.library.opcheck(OPS.to_blocked, (X.contiguous(memory_format=torch.channels_last),), test_utils=checks)
    torch.library.opcheck(OPS.from_blocked, (x, 5, True), test_utils=checks)
    torch.library.opcheck(
        OPS.blocked_norm, (x, x.clone(), weight, bias, None, None, True, 1e-5, 5, True), test_utils=checks
    )
    torch.library.opcheck(OPS.blocked_norm, (x, None, None, None, mean, var, False, 1e-5, 5, False), test_utils=checks)
    backward = (x, x.clone(), None, weight, bias, mean, var, True, 5, True, False, x.clone(), None)
    torch.library.opcheck(OPS.blocked_norm_backward, backward, test_utils=checks)
    window = ([6, 7], [3, 2], [2, 2], [1, 0])
    torch.library.opcheck(OPS.blocked_max_pool, (x, *window), test_utils=checks)
    y, taps = OPS.blocked_max_pool(x, *window)
    torch.library.opcheck(OPS.blocked_max_pool_backward, (y, taps, *window), test_utils=checks)


def chain(x, weight, bias):
    """A region by hand: borders, a norm with a residual, a pooling."""
    y, residual = blocked.enter(x), blocked.enter(x)
    z, mean, var, *_ = norm.batch_norm(
        y, residual, weight, bias, None, None, training=True, eps=1e-5, images=x.shape[0], relu=True
    )
    pooled = blocked.max_pool(z, Pool((x.shape[2], x.shape[3]), (2, 2), (2, 2), (0, 0)))
    return blocked.leave(pooled, x.shape[0], True), mean, var


def expected(x, weight, bias):
    y = torch.relu(F.batch_norm(x, None, None, weight, bias, True) + x)
    return F.max_pool2d(y, 2), x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_chain_equals_torch(compiled):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(chain, backend=counter, fullgraph=True, dynamic=True) if compiled else chain
    for images in (20, 37):  # one block of images or several are two graphs
        given = [torch.randn(images, 3, 6, 7), *STATS[:2]]
        ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
        out, wanted = call(*ours), expected(*theirs)
        for a, b in zip(out, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        out[0].square().sum().backward()
        wanted[0].square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == int(compiled)


def test_channels_last_comes_back_as_asked():
    assert blocked.leave(blocked.enter(X), 5, True).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(blocked.leave(blocked.enter(X), 5, False), X)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("wide", [False, True])
def test_a_residual_joins_the_convolution(sparse, wide):
    """Whichever backend runs, and where the residual is wider than what the layer computes."""
    runtime = Runtime("layer")
    mask = torch.rand(6, 4, 3, 3) < 0.3
    if sparse:
        backend = SparseCpu(mask, SPEC)
        runtime.choose = lambda *_: backend
    dtype = torch.bfloat16 if wide else torch.float32
    x, weight = torch.randn(1, 4, 5, 5, 16).to(dtype), (torch.randn(mask.shape) * mask).to(dtype)
    residual = torch.randn(1, 6, 5, 5, 16)
    grad = torch.randn(residual.shape).to(dtype)
    results = []
    for joined in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
        if joined:
            out = ops.conv(*leaves[:2], None, mask, runtime.handle, SPEC, residual=leaves[2])
        else:
            out = ops.conv(*leaves[:2], None, mask, runtime.handle, SPEC).add(leaves[2].to(dtype))
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert error(one, other.double()) < (1e-2 if wide else 1e-6)
