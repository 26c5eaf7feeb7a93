"""Dense weight gradients on blocked activations, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.blocked import CONVERTED_DENSE
from sparsefx.kernels.cpu import dense_wgrad as module
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.cpu.build import supported_isas
from sparsefx.kernels.cpu.dense_wgrad import dense_wgrad
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.spec import ConvSpec
from tests.kernels.cpu.helpers import blocked, error

# images, in, out, (H, W), (R, S), stride, padding, dilation, groups
CASES = {
    "plain": (32, 6, 5, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "primes": (37, 13, 7, (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride2": (19, 4, 6, (17, 15), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "asymmetric": (8, 6, 6, (10, 21), (3, 5), (1, 2), (1, 2), (2, 1), 1),
    "padding_above_kernel": (4, 5, 6, (6, 6), (3, 3), (1, 1), (4, 3), (1, 1), 1),
    "pointwise": (33, 9, 4, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "groups": (16, 12, 6, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "one_image": (1, 3, 7, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several_panels": (48, 27, 150, (5, 3), (3, 1), (2, 1), (1, 0), (1, 1), 1),
    "taps_that_never_read": (16, 3, 20, (2, 2), (5, 5), (1, 1), (4, 4), (2, 2), 1),
    "wide_rows": (17, 5, 17, (3, 70), (3, 3), (1, 2), (1, 1), (1, 1), 1),
}


def _layer(images, inputs, outputs, hw, kernel, stride, padding, dilation, groups):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, inputs, *hw, generator=generator)
    w = torch.randn(outputs, inputs // groups, *kernel, generator=generator)
    wd = w.double().requires_grad_()
    y = F.conv2d(x.double(), wd, None, stride, padding, dilation, groups)
    g = torch.randn(y.shape, generator=generator)
    (wanted,) = torch.autograd.grad(y, wd, g.double())
    return x, w, g, wanted


def _spec(case):
    stride, padding, dilation = map(list, case[5:8])
    return ConvSpec(stride, padding, dilation, False, [0, 0], case[8])


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_autograd(case, isa, threads):
    x, w, g, wanted = _layer(*case)
    torch.set_num_threads(threads)  # the folder's fixture restores it
    got = dense_wgrad(_spec(case), blocked(g), blocked(x), w, isa, amx=False)
    assert got.shape == w.shape
    assert error(got, wanted) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", [*CASES.values(), (53, 40, 70, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1)])
def test_matrix_units_are_as_exact_as_fp32(case, last, threads):
    if not load().sfx_amx():
        pytest.skip("this processor, or the library's compiler, has no AMX")
    x, w, g, wanted = _layer(*case)
    w = w.contiguous(memory_format=torch.channels_last) if last else w
    torch.set_num_threads(threads)
    units = dense_wgrad(_spec(case), blocked(g), blocked(x), w, amx=True)
    vectors = dense_wgrad(_spec(case), blocked(g), blocked(x), w, amx=False)
    assert units.stride() == w.stride()
    assert error(units, wanted) < 2 * error(vectors, wanted) + 1e-7


def test_matrix_units_take_numbers_of_any_size_and_none():
    if not load().sfx_amx():
        pytest.skip("this processor, or the library's compiler, has no AMX")
    case = (32, 16, 16, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, w, g, wanted = _layer(*case)
    scale = 2.0 ** torch.arange(-80, 80, 10).view(1, 16, 1, 1)
    got = dense_wgrad(_spec(case), blocked(g), blocked(x * scale), w, amx=True)
    for c in range(16):
        assert error(got[:, c], wanted[:, c] * scale[0, c]) < 1e-6
    for value in (float("inf"), float("nan")):
        x[3, 5, 2, 2] = value
        got = dense_wgrad(_spec(case), blocked(g), blocked(x), w, amx=True)
        assert not got[:, 5].isfinite().any()
        assert got[:, :5].isfinite().all()


@pytest.mark.parametrize("last", [False, True])
def test_dense_inside_a_region_takes_it_where_groups_are_wide(last, monkeypatch):
    case = (20, 4, 6, (5, 4), (3, 3), (2, 2), (1, 1), (1, 1), 2)
    x, w, g, wanted = _layer(*case)
    w = w.contiguous(memory_format=torch.channels_last) if last else w
    spec = ConvSpec([2, 2], [1, 1], [1, 1], False, [0, 0], 2, x.shape[0])
    calls = []
    real = module.dense_wgrad
    monkeypatch.setattr("sparsefx.kernels.blocked.dense_wgrad", lambda *args: calls.append(1) or real(*args))
    for outputs, count in ((4, 0), (3, 3)):
        monkeypatch.setattr(module, "FEW_OUTPUTS", outputs)
        with torch.no_grad():
            for_input, both = CONVERTED_DENSE.both(spec, blocked(g), blocked(x), w)
            alone = CONVERTED_DENSE.dense_wgrad(spec, blocked(g), blocked(x), w)
            mask = torch.rand(w.shape) < 0.5
            masked = CONVERTED_DENSE.wgrad(spec, blocked(g), blocked(x), w, mask)
        assert len(calls) == count
        assert error(both, wanted) < 1e-5
        assert error(alone, wanted) < 1e-5
        assert both.stride() == w.stride()
        assert torch.equal(masked != 0, mask)
        assert error(masked, wanted * mask) < 1e-5
        plain = DENSE.dgrad(spec._replace(images=0), g, x, w)
        assert error(for_input, blocked(plain).double()) < 1e-5


def test_a_gradient_of_the_gradient_goes_through_torch():
    """The kernel is opaque to autograd; with gradients enabled the differentiable way is taken."""
    x, w, g, _ = _layer(3, 4, 6, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1)
    spec = ConvSpec([1, 1], [0, 0], [1, 1], False, [0, 0], 1, x.shape[0])
    grad = blocked(g).requires_grad_()
    assert CONVERTED_DENSE.dense_wgrad(spec, grad, blocked(x), w).requires_grad


def test_tensors_of_another_layer_are_refused():
    case = CASES["plain"]
    x, w, g, _ = _layer(*case)
    for grad, weight in ((g[:, :, :7], w), (g, w[:, :5]), (g, w[:4])):
        with pytest.raises(ValueError, match=r"grad: expected .* got .*; pass the layer's own tensors"):
            dense_wgrad(_spec(case), blocked(grad), blocked(x), weight)
