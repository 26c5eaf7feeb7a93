"""Regions in the layout of CUDA, `[C, H, W, N]`, on CPU tensors: the Triton kernels run in the interpreter."""

import pytest
import torch

import sparsefx
from sparsefx import blocked, specialize
from sparsefx.kernels import blocked as kernels
from sparsefx.kernels import chwn
from sparsefx.kernels.runtime import Runtime
from tests.graph.region_nets import (
    NETS,
    assert_compiles_once,
    assert_drops_the_same_elements,
    assert_equals_twin,
    conversions,
    in_regions,
    pair,
    relative,
)

sparse_gpu = pytest.importorskip("sparsefx.kernels.sparse_gpu")
__all__ = ["in_regions"]


@pytest.fixture(autouse=True)
def as_on_cuda(in_regions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of `[C, H, W, N]` on any device, with Triton's kernels wherever they cover a call."""
    monkeypatch.setattr(kernels, "is_blocked", lambda device: False)
    monkeypatch.setattr(specialize, "sparse_kernels", lambda device: sparse_gpu.SparseGpu)


@pytest.mark.parametrize(("kind", "training"), [(kind, True) for kind in NETS if kind != "wrn"] + [("resnet", False)])
def test_equals_the_masked_dense_model(kind: str, training: bool) -> None:
    model = assert_equals_twin(kind, torch.randn(3, 3, 6, 6), training)
    assert conversions(model)[0] == 1


def test_one_region_converts_twice_and_no_layer_converts_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read and write the region's layout as it is."""
    x = torch.randn(3, 3, 6, 6)
    model, twin = pair(NETS["wrn"]().eval(), x)
    entered, left = [], []
    convert = sparse_gpu.to_chwn, sparse_gpu.from_chwn
    monkeypatch.setattr(sparse_gpu, "to_chwn", lambda t: entered.append(t) or convert[0](t))
    monkeypatch.setattr(sparse_gpu, "from_chwn", lambda *a: left.append(a) or convert[1](*a))
    with torch.no_grad():
        assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (1, 1)
    assert [node.target for node in model.graph.nodes].count(blocked.conv) == 5
    assert (entered, left) == ([], [])
    assert {row.backends["fprop"] for row in sparsefx.summary(model).rows} == {"sparse"}


def test_dropout_drops_the_same_elements() -> None:
    assert_drops_the_same_elements(torch.randn(3, 3, 6, 6))


def test_a_region_compiles_whole_and_follows_its_masks() -> None:
    assert_compiles_once("vgg", torch.randn(3, 3, 6, 6))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of opcheck itself
@pytest.mark.parametrize("last", [False, True])
def test_operators_pass_opcheck(last: bool) -> None:
    x = torch.randn(3, 5, 4, 2)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    torch.library.opcheck(torch.ops.sparsefx.to_chwn, (x,))
    torch.library.opcheck(torch.ops.sparsefx.from_chwn, (chwn.enter(x), last))
    assert torch.equal(chwn.leave(chwn.enter(x), last), x)
    spec = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, 3
    weight, runtime = torch.randn(4, 5, 3, 3, requires_grad=True), Runtime("conv")
    mask = torch.ones_like(weight, dtype=torch.bool)
    bias = torch.randn(4, requires_grad=True)
    operands = chwn.enter(x).detach().requires_grad_(), weight, bias, mask, runtime.handle, *spec
    torch.library.opcheck(torch.ops.sparsefx.conv, operands)
