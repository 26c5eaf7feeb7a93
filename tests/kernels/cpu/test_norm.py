"""Fused BatchNorm (+ residual) (+ ReLU) against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.cpu import batch_norm_backward, batch_norm_forward
from tests.kernels.cpu.helpers import blocked, error, images_of


def _run(x, residual, relu, training, affine=True, dtype=torch.float32):
    n, c = x.shape[:2]
    weight, bias = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    mean, var = torch.randn(c), torch.rand(c) + 0.5
    xd = x.to(dtype).double().requires_grad_()
    rd = residual.to(dtype).double().requires_grad_() if residual is not None else None
    wd, bd = (t.double().requires_grad_() if t is not None else None for t in (weight, bias))
    mean64, var64 = mean.double(), var.double()
    want = F.batch_norm(xd, mean64, var64, wd, bd, training, 0.1)
    want = want if rd is None else want + rd
    want = want.relu() if relu else want
    g = torch.randn(x.shape).to(dtype)
    xb, rb, gb = blocked(x.to(dtype)), None if residual is None else blocked(residual.to(dtype)), blocked(g)
    out = batch_norm_forward(xb, weight, bias, mean, var, training=training, images=n, residual=rb, relu=relu)
    if training:
        count = x.numel() // c
        mean.lerp_(out.mean, 0.1)
        var.lerp_(out.var * count / (count - 1), 0.1)
    want.backward(g.double())
    grads = batch_norm_backward(
        gb, xb, out.y if residual is not None else None, weight, bias, out.mean, out.rstd,
        training=training, images=n, relu=relu, residual=residual is not None,
    )  # fmt: skip
    return want, out, grads, (xd, rd, wd, bd), (mean, mean64), (var, var64)


@pytest.mark.parametrize("shape", [(32, 5, 4, 4), (37, 3, 7, 5), (1, 4, 9, 9), (200, 2, 1, 1), (17, 9, 64, 64)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_equals_torch(shape, relu, with_residual, training):
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 1
    residual = torch.randn(shape) if with_residual else None
    want, out, grads, (xd, rd, wd, bd), (mean, mean64), (var, var64) = _run(x, residual, relu, training)
    n = shape[0]
    assert error(images_of(out.y)[:n], want.detach()) < 1e-5
    assert not images_of(out.y)[n:].any()
    assert error(images_of(grads.dx)[:n], xd.grad) < 1e-5
    assert not images_of(grads.dx)[n:].any()
    assert error(grads.dweight, wd.grad) < 1e-5
    assert error(grads.dbias, bd.grad) < 1e-5
    assert error(mean, mean64) < 1e-6
    assert error(var, var64) < 1e-6
    if rd is not None:
        assert error(images_of(grads.dresidual)[:n], rd.grad) < 1e-5


def test_bf16_equals_torch():
    torch.manual_seed(0)
    want, out, grads, (xd, _, wd, _), *_ = _run(torch.randn(32, 6, 8, 8), None, False, True, dtype=torch.bfloat16)
    assert error(images_of(out.y), want.detach()) < 1e-2
    assert error(images_of(grads.dx), xd.grad) < 1e-2
    assert error(grads.dweight, wd.grad) < 1e-2


def test_large_mean_keeps_its_variance():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8) * 0.5 + 1000
    want, out, _, _, _, (var, var64) = _run(x, None, False, True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert error(images_of(batch_norm_forward(blocked(x), None, None, None, None, training=True).y), exact) < 1e-4
    assert error(images_of(out.y), want.detach()) < 1e-4
    assert error(var, var64) < 1e-5


def test_means_that_differ_between_blocks_keep_the_variance():
    torch.manual_seed(0)
    x = torch.randn(80, 3, 13, 13)
    x += torch.tensor([0.0, 30.0, -1000.0, 5.0, 5.0]).repeat_interleave(16).view(80, 1, 1, 1)
    x[:, 1] = torch.randn(80, 13, 13) * 1e-3 + 7  # hardly any deviation, far from zero
    out = batch_norm_forward(blocked(x), None, None, None, None, training=True)
    exact = x.double().transpose(0, 1).flatten(1)
    assert error(out.mean, exact.mean(1)) < 1e-6
    for channel in range(3):
        assert error(out.var[channel], exact[channel].var(unbiased=False)) < 1e-5


def test_constant_channel_gives_its_bias():
    x = torch.full((48, 2, 5, 5), 1234.567)
    bias = torch.tensor([0.25, -3.0])
    out = batch_norm_forward(blocked(x), torch.ones(2), bias, None, None, training=True)
    assert torch.allclose(images_of(out.y), bias.view(1, 2, 1, 1).expand(48, 2, 5, 5), atol=1e-6, rtol=0)
    assert torch.isfinite(out.rstd).all()


def test_nan_stays_visible_through_relu():
    x = torch.randn(16, 1, 2, 2)
    x[3, 0, 1, 1] = float("nan")
    out = batch_norm_forward(blocked(x), None, None, torch.zeros(1), torch.ones(1), training=False, relu=True)
    assert out.y.isnan().sum() == 1


def test_single_value_per_channel_raises_in_training():
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm_forward(blocked(torch.zeros(1, 2, 1, 1)), None, None, None, None, training=True, images=1)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_and_prologue_are_torchs(training):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(20, 3, 5, 5) * 2 + 1, torch.randn(3), torch.randn(3)
    layer = torch.nn.BatchNorm2d(3).train(training)
    with torch.no_grad():
        for tensor, value in ((layer.weight, weight), (layer.bias, bias), (layer.running_mean, torch.randn(3))):
            tensor.copy_(value)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    versions = mean._version, var._version
    factor = 0.1 if training else None
    out = batch_norm_forward(
        blocked(x), weight, bias, mean, var, training=training, images=20, write=False, factor=factor
    )
    want = layer(x)
    torch.testing.assert_close(mean, layer.running_mean)
    torch.testing.assert_close(var, layer.running_var)
    assert (mean._version > versions[0], var._version > versions[1]) == (training, training)
    assert out.y is None
    assert out.prologue is not None
    used, scale, shift, _ = out.prologue
    torch.testing.assert_close((x - used.view(3, 1, 1)) * scale.view(3, 1, 1) + shift.view(3, 1, 1), want.detach())
