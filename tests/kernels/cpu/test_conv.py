"""ConvPlan against the dense convolution in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.cpu import ConvPlan, Tiling
from sparsefx.kernels.cpu.norm import apply_prologue
from sparsefx.kernels.spec import Prologue
from tests.kernels.cpu.helpers import blocked, error, images_of

# images, in, out, (H, W), (R, S), stride, padding, dilation, groups, density
CASES = {
    "plain": (32, 16, 24, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1),
    "one_image": (1, 3, 7, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.3),
    "primes": (37, 13, 17, (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
    "stride2": (19, 12, 20, (17, 15), (3, 3), (2, 2), (1, 1), (1, 1), 1, 0.2),
    "stride3_even_kernel": (5, 6, 9, (16, 13), (2, 4), (3, 2), (0, 3), (1, 1), 1, 0.4),
    "stride_without_all_inputs": (16, 8, 8, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1, 0.3),
    "stride_above_kernel": (3, 4, 4, (13, 13), (2, 2), (4, 3), (0, 0), (1, 1), 1, 0.5),
    "dilation2": (16, 10, 11, (12, 10), (3, 3), (1, 1), (2, 2), (2, 2), 1, 0.2),
    "padding_above_kernel": (4, 5, 6, (6, 6), (3, 3), (1, 1), (4, 3), (1, 1), 1, 0.3),
    "no_padding": (20, 8, 8, (9, 9), (5, 3), (1, 1), (0, 0), (1, 1), 1, 0.2),
    "asymmetric_stride": (8, 6, 6, (10, 21), (3, 5), (1, 2), (1, 2), (2, 1), 1, 0.3),
    "groups": (16, 12, 18, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 3, 0.3),
    "depthwise": (16, 8, 8, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), 8, 0.5),
    "pointwise": (33, 40, 24, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.1),
    "one_pixel": (64, 40, 24, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.1),
    "tiny_map": (130, 16, 16, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
    "wide": (2, 3, 4, (5, 70), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5),
    "empty_mask": (16, 4, 5, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.0),
    "full_mask": (16, 9, 10, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1.0),
}


def _layer(case, dtype=torch.float32, bias=True):
    images, inputs, outputs, hw, kernel, stride, padding, dilation, groups, density = case
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(outputs, inputs // groups, *kernel, generator=generator) < density
    if density < 1 and outputs > 4:
        mask[2] = False  # an output channel, and an input channel, without weights
        mask[:, 1 % mask.shape[1]] = False
    w = (torch.randn(mask.shape, generator=generator) * mask).to(dtype)
    x = torch.randn(images, inputs, *hw, generator=generator).to(dtype)
    b = torch.randn(outputs, generator=generator) if bias else None
    plan = lambda isa: ConvPlan(mask, stride, padding, dilation, groups, isa)  # noqa: E731
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    y = F.conv2d(xd, wd, None if b is None else b.double(), stride, padding, dilation, groups)
    g = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(g.double())
    return plan, mask, w, x, b, g, y.detach(), xd.grad, wd.grad * mask


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """`torch.empty` gives NaN, so that an output that is not written shows."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.numel() < 2**24 else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_passes_equal_dense(case, isa):
    plan, _, w, x, b, g, y, dx, dw = _layer(case)
    p, n = plan(isa), x.shape[0]
    out = images_of(p.fprop(blocked(x), w, b, images=n))
    assert error(out[:n], y) < 1e-5
    assert not out[n:].any()
    grad_x = images_of(p.dgrad(blocked(g), w, tuple(x.shape[2:]), images=n))
    assert error(grad_x[:n], dx) < 1e-5
    assert not grad_x[n:].any()
    assert error(p.wgrad(blocked(g), blocked(x), images=n), dw) < 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inference_over_pixels_equals_dense(case, isa):
    plan, _, w, x, b, _, y, _, _ = _layer(case)
    assert error(plan(isa).infer(x[:3], w, b), y[:3]) < 1e-5


@pytest.mark.parametrize("name", ["plain", "primes", "stride2", "pointwise"])
def test_bf16_storage_equals_dense(name, isa):
    plan, _, w, x, b, g, y, dx, dw = _layer(CASES[name], torch.bfloat16)
    p, n = plan(isa), x.shape[0]
    out = p.fprop(blocked(x), w, b, images=n)
    assert out.dtype == torch.bfloat16
    assert error(images_of(out)[:n], y) < 1e-2
    assert error(images_of(p.dgrad(blocked(g), w, tuple(x.shape[2:]), images=n))[:n], dx) < 1e-2
    assert error(p.wgrad(blocked(g), blocked(x), images=n), dw) < 1e-2
    assert error(p.infer(x[:2], w, b), y[:2]) < 1e-2


def test_gradient_of_missing_weights_is_exactly_zero():
    plan, mask, _, x, _, g, *_ = _layer(CASES["primes"])
    p = plan(None)
    dense = p.wgrad(blocked(g), blocked(x), images=x.shape[0])
    assert not dense[~mask].any()
    assert torch.equal(dense[mask], p.wgrad_values(blocked(g), blocked(x), images=x.shape[0]))


def test_missing_weights_are_never_read():
    (
        plan,
        mask,
        w,
        x,
        b,
        *_,
    ) = _layer(CASES["plain"])
    poisoned = torch.where(mask, w, torch.nan)
    p = plan(None)
    assert torch.equal(p.fprop(blocked(x), poisoned, b), p.fprop(blocked(x), w, b))


def test_values_and_dense_weight_give_the_same_bits():
    plan, mask, w, x, *_ = _layer(CASES["plain"])
    p = plan(None)
    assert torch.equal(p.collect(w), w[mask])
    assert torch.equal(p.fprop(blocked(x), p.collect(w)), p.fprop(blocked(x), w))
    assert torch.equal(p.scatter(w[mask]), w)


@pytest.mark.parametrize("name", ["plain", "groups", "asymmetric_stride", "pointwise", "empty_mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_channels_last_are_read_and_written_as_they_lie(name, dtype):
    plan, mask, w, *_ = _layer(CASES[name], dtype)
    p, last = plan(None), w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(p.collect(last), w[mask].float())
    dense = p.scatter(w[mask].float(), dtype, channels_last=True)
    assert torch.equal(dense, w)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="weight: expected a contiguous"):
        p.collect(last.double())


def test_relu_epilogue_clamps():
    plan, _, w, x, b, _, y, _, _ = _layer(CASES["primes"])
    out = plan(None).fprop(blocked(x), w, b, images=x.shape[0], relu=True)
    assert error(images_of(out)[: x.shape[0]], y.relu()) < 1e-5


@pytest.mark.parametrize("chunk", [3, 16])
@pytest.mark.parametrize(("rows", "columns", "batch"), [(2, 4, 1), (1, 4, 2), (3, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_residual_and_relu_follow_the_sum(dtype, rows, columns, batch, chunk):
    """In tiles that are written from registers and in those that stick out of the output."""
    case = (35, 16, 24, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1)
    plan, _, w, x, b, _, y, _, _ = _layer(case, dtype)
    p, n = plan(None), x.shape[0]
    p.tune("fprop", Tiling(rows, columns, batch, 1, 1, chunk, 9))
    residual = torch.randn(y.shape).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for relu in (False, True):
        exact = y + residual.double()
        out = images_of(p.fprop(blocked(x), w, b, images=n, residual=blocked(residual), relu=relu))
        assert error(out[:n], exact.relu() if relu else exact) < tolerance
        assert not out[n:].any()
        without_bias = images_of(p.fprop(blocked(x), w, images=n, residual=blocked(residual), relu=relu))
        exact = exact - b.double().view(-1, 1, 1)
        assert error(without_bias[:n], exact.relu() if relu else exact) < tolerance
        assert not without_bias[n:].any()


def test_outputs_too_large_for_caches_are_whole():
    case = (64, 4, 48, (36, 36), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2)
    plan, _, w, x, b, g, y, dx, _ = _layer(case)
    assert y.numel() * 4 > 12 << 20
    assert error(images_of(plan(None).fprop(blocked(x), w, b)), y) < 1e-5
    assert error(images_of(plan(None).dgrad(blocked(g), w, (36, 36))), dx) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_is_read_at_each_call(threads):
    plan, _, w, x, b, g, y, dx, dw = _layer(CASES["plain"])
    p = plan(None)
    torch.set_num_threads(threads)
    assert error(images_of(p.fprop(blocked(x), w, b)), y) < 1e-5
    assert error(images_of(p.dgrad(blocked(g), w, (8, 8))), dx) < 1e-5
    first = p.wgrad(blocked(g), blocked(x))
    assert error(first, dw) < 1e-5
    assert torch.equal(first, p.wgrad(blocked(g), blocked(x)))


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(1, 8, 2, 1, 1, 3, 7),
        Tiling(2, 4, 1, 2, 2, 5, 24),
        Tiling(4, 3, 1, 1, 1, 16, 5),
        Tiling(3, 5, 1, 3, 2, 16, 24),
    ],
)
def test_any_tiling_gives_the_same_result(tiling):
    plan, _, w, x, b, g, y, dx, dw = _layer(CASES["plain"])
    p = plan(None)
    for kind in ("fprop", "dgrad", "wgrad"):
        p.tune(kind, tiling)
        assert p.tiling(kind, 8, 8, 32)[0] == tiling
    assert error(images_of(p.fprop(blocked(x), w, b)), y) < 1e-5
    assert error(images_of(p.dgrad(blocked(g), w, (8, 8))), dx) < 1e-5
    assert error(p.wgrad(blocked(g), blocked(x)), dw) < 1e-5


def test_large_activations_are_addressed_in_64_bits():
    """The last of 2^31 bf16 elements, in a tensor whose other pages are never touched."""
    plan = ConvPlan(torch.ones(1, 1, 1, 1, dtype=torch.bool), stride=(4096, 4096))
    untouched = torch.from_numpy(np.zeros(12288 * 12288 * 16, dtype=np.int16))
    x = untouched.view(torch.bfloat16).view(1, 1, 12288, 12288, 16)
    assert x.numel() > 2**31
    x[0, 0, 8192, 8192] = 3
    out = plan.fprop(x, torch.ones(1, 1, 1, 1))
    assert out.shape == (1, 1, 3, 3, 16)
    assert (out[0, 0, 2, 2] == 3).all()
    assert out.float().sum() == 48


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x, w: p.fprop(x[..., :8], w), "call .contiguous"),
        (lambda p, x, w: p.fprop(x.double(), w), "fprop|float32"),
        (lambda p, x, w: p.fprop(x[:, :3].contiguous(), w), "to_blocked"),
        (lambda p, x, w: p.fprop(x, w[:3]), "this layer's mask"),
        (lambda p, x, w: p.fprop(x, w, torch.zeros(3)), "bias"),
        (lambda p, x, w: p.dgrad(x, w, (8, 8)), "expected"),
        (lambda p, x, w: p.fprop(x, w, images=40), "expected"),
        (lambda p, x, w: p.fprop(x, w, residual=x), "residual: expected .*24"),
        (lambda p, x, w: p.fprop(x, w, residual=x.bfloat16()), "residual: expected a contiguous"),
    ],
)
def test_wrong_arguments_raise(call, message):
    plan, _, w, x, *_ = _layer(CASES["plain"])
    with pytest.raises(ValueError, match=message):
        call(plan(None), blocked(x), w)


def test_wrong_mask_raises():
    with pytest.raises(ValueError, match="bool"):
        ConvPlan(torch.ones(4, 4, 3, 3))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_images_get_tiles_of_whole_images(size, isa):
    if isa != "avx512":
        pytest.skip("fewer registers hold only the smallest")
    mask = torch.rand(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.05
    p = ConvPlan(mask, 1, 1, isa=isa)
    for kind in ("fprop", "dgrad", "wgrad"):
        if (kind, size) == ("wgrad", 4):  # half of an image is as fast
            continue
        tiling, _ = p.tiling(kind, size, size, 128)
        assert (tiling.rows, tiling.cols) == (size, size)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((1, 3), 1), ((3, 1), 1), ((3, 3), 2)])
@pytest.mark.parametrize(("size", "batch"), [(2, 1), (2, 2), (2, 3), (2, 4), (2, 6), (3, 2), (4, 1), (5, 1)])
def test_tiles_of_whole_images_equal_dense(size, batch, kernel, dilation, stride):
    """Small images are cut without the zeros around them where each tap misses one row or column at most."""
    if dilation > 1 and size == 5:
        pytest.skip("taps miss two rows, and no other tile is this large")
    padding = tuple(k // 2 * dilation for k in kernel)
    case = (
        16 * batch + 5, 12, 20, (size * stride, size * stride), kernel, (stride, stride), padding,
        (dilation, dilation), 1, 0.3,
    )  # fmt: skip
    plan, _, w, x, b, g, y, dx, dw = _layer(case)
    p, n = plan(None), x.shape[0]
    for chunk, block in ((5, 7), (12, 20)):
        for kind in ("fprop", "dgrad", "wgrad"):
            p.tune(kind, Tiling(size, size, batch, 1, 1, chunk, block))
        out = images_of(p.fprop(blocked(x), w, b, images=n))
        assert error(out[:n], y) < 1e-5
        assert not out[n:].any()
        assert error(images_of(p.dgrad(blocked(g), w, tuple(x.shape[2:]), images=n))[:n], dx) < 1e-5
        assert error(p.wgrad(blocked(g), blocked(x), images=n), dw) < 1e-5


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_prologue_is_the_same_as_its_result(name, relu):
    """To the last bit, with zeros around images and in lanes without one."""
    images, inputs, outputs, hw, kernel, stride, padding, dilation, groups, density = CASES[name]
    mask = torch.rand(outputs, inputs // groups, *kernel) < density
    plan = ConvPlan(mask, stride, padding, dilation, groups)
    x, w = blocked(torch.randn(images, inputs, *hw)), torch.randn(mask.shape) * mask
    prologue = Prologue(torch.randn(inputs), torch.rand(inputs) + 0.5, torch.randn(inputs) + 1, relu)
    written = apply_prologue(x, prologue, images)
    plain = (images_of(x)[:images] - prologue.mean.view(-1, 1, 1)) * prologue.scale.view(-1, 1, 1)
    plain = plain + prologue.shift.view(-1, 1, 1)
    assert error(images_of(written)[:images], (plain.relu() if relu else plain).double()) < 1e-5
    assert not images_of(written)[images:].any()
    out = plan.fprop(x, w, images=images, prologue=prologue)
    assert torch.equal(out, plan.fprop(written, w, images=images))
    grad = torch.randn(out.shape)
    values = plan.wgrad_values(grad, x, images=images, prologue=prologue)
    assert torch.equal(values, plan.wgrad_values(grad, written, images=images))
    with pytest.raises(ValueError, match="one a channel"):
        plan.fprop(x, w, images=images, prologue=prologue._replace(mean=torch.zeros(inputs + 1)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(270, 432, 3, 3), (280, 433, 3, 3), (1030, 1024, 1, 1)], ids=str)
def test_a_large_gradient_is_that_of_its_values_and_zero_elsewhere(shape, channels_last, isa):
    assert torch.Size(shape).numel() * 4 > 4 << 20  # rows of whole cache lines are made in cache, others in place
    mask = torch.rand(shape) < 0.02
    plan = ConvPlan(mask, isa=isa)
    for _ in range(2):
        values = torch.randn(plan.nnz)
        want = torch.zeros(shape).masked_scatter(mask, values)
        assert torch.equal(plan.scatter(values, channels_last=channels_last), want)
