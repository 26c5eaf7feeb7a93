"""The backend that the specializer uses, in Triton's interpreter, against masked dense in float64."""

import pytest
import torch

from sparsefx.kernels.gpu.choose import choose, unit_rows
from sparsefx.kernels.gpu.config import NARROWEST, Config, Table, default, key
from sparsefx.kernels.gpu.plan import Geometry
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.sparse_gpu import SparseGpu
from sparsefx.kernels.spec import ConvSpec
from tests.kernels.gpu.helpers import error


def conv_spec(stride=1, padding=1, dilation=1, **changed):
    return ConvSpec([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1)._replace(**changed)


def check(mask, spec, x, tolerance=1e-5):
    w, b = torch.randn(mask.shape) * mask, torch.randn(len(mask))
    backend = SparseGpu(mask, spec)
    want = DENSE.fprop(spec, x.double(), w.double(), b.double())
    grad = torch.randn(want.shape).to(x.dtype)
    got = backend.fprop(spec, x, w.to(x.dtype), b)
    assert error(got, want) < tolerance
    if spec is not None:
        assert got.is_contiguous() == x.is_contiguous()
    assert error(backend.dgrad(spec, grad, x, w), DENSE.dgrad(spec, grad.double(), x.double(), w.double())) < tolerance
    dw = backend.wgrad(spec, grad, x, w, mask)
    assert error(dw, DENSE.wgrad(spec, grad.double(), x.double(), w.double(), mask)) < tolerance
    assert not dw[~mask].any()
    return backend


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_equals_masked_dense(stride, memory_format):
    x = torch.randn(3, 5, 4, 5).contiguous(memory_format=memory_format)
    check(torch.rand(10, 5, 3, 3) < 0.2, conv_spec(stride), x)


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 1, 6)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_linear_equals_masked_dense(shape, density):
    check(torch.rand(11, 6) < density, None, torch.randn(shape))


@pytest.mark.parametrize("h", sorted({NARROWEST, 16, 64}))
def test_aligned_units_give_tiles_of_their_size(h):
    mask = (torch.rand(2, 6) < 0.4).repeat_interleave(h, 0)
    mask[0] = ~mask[h]  # the first two units differ
    mask[:h] = mask[:1]
    backend = check(mask, None, torch.randn(9, 6))
    plan = backend.plan(torch.float32, (1, 1), 9)
    assert plan.configs["fprop"].rows == plan.configs["wgrad"].rows == h
    assert plan.forward.column_density == mask.float().mean()


def test_the_table_decides_the_configuration():
    h = NARROWEST
    mask = (torch.rand(1, 6) < 0.5).repeat(2 * h, 1)
    mask[h:] = ~mask[:1]
    geometry, density = Geometry.of(mask, None), mask.float().mean().item()
    tuned = Config(h, 32, 64, False, 2, 4)
    name = key("fprop", (2 * h, 6), (1, 1, 1, 9), torch.float32, h, density)
    configs = choose(mask, geometry, (1, 1), 9, torch.float32, h, Table({"cpu": {name: tuned}}))
    assert unit_rows(mask) == h
    assert configs["fprop"] == tuned
    assert configs["wgrad"] == default("wgrad", torch.float32, h)


def test_a_new_mask_keeps_the_plan_and_its_addresses():
    spec, x = conv_spec(), torch.randn(2, 4, 3, 3)
    backend = SparseGpu(torch.rand(9, 4, 3, 3) < 0.3, spec)
    w = torch.randn(9, 4, 3, 3)
    backend.fprop(spec, x, w * backend.mask, None)
    plan = backend.plan(torch.float32, (3, 3), 2)
    address = plan.forward.columns.data_ptr()
    mask = torch.rand(9, 4, 3, 3) < 0.3
    backend.update_(mask)
    assert backend.plan(torch.float32, (3, 3), 2) is plan
    assert plan.forward.columns.data_ptr() == address
    want = DENSE.fprop(spec, x.double(), (w * mask).double(), None)
    assert error(backend.fprop(spec, x, w * mask, None), want) < 1e-5


@pytest.mark.parametrize(
    ("spec", "x", "mask"),
    [
        (conv_spec(groups=2), torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3)),
        (conv_spec(transposed=True), torch.ones(1, 4, 3, 3), torch.ones(4, 4, 3, 3)),
        (conv_spec(), torch.ones(1, 4, 3, 3, dtype=torch.float64), torch.ones(4, 4, 3, 3)),
        (conv_spec(), torch.ones(0, 4, 3, 3), torch.ones(4, 4, 3, 3)),
        (ConvSpec([1], [0], [1], False, [0], 1), torch.ones(1, 4, 3), torch.ones(4, 4, 1)),
    ],
    ids=["groups", "transposed", "float64", "no_images", "one_dimension"],
)
def test_what_the_kernels_do_not_cover(spec, x, mask):
    assert not SparseGpu.supports(spec, x, mask.bool())


def test_units_of_eight_half_fill_tiles_of_sixteen_where_triton_needs_them(monkeypatch):
    monkeypatch.setattr("sparsefx.kernels.gpu.choose.NARROWEST", 16)
    mask = (torch.rand(2, 6) < 0.4).repeat_interleave(8, 0)
    mask[8:] = ~mask[:1]
    plan = check(mask, None, torch.randn(9, 6)).plan(torch.float32, (1, 1), 9)
    assert plan.configs["fprop"].rows == 16
    assert plan.forward.tiling.unit == 8
    assert plan.forward.column_density == mask.float().mean()
