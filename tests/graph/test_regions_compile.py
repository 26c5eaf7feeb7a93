"""Regions under torch.compile: one graph, no recompilation, the same results (contract 8)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sparsefx
from tests.graph.region_nets import NETS, conversions, in_regions, pair, relative

__all__ = ["in_regions"]


@pytest.mark.usefixtures("in_regions")
@pytest.mark.parametrize("kind", ["resnet", "vgg"])
def test_a_region_compiles_whole_and_follows_its_masks(kind):
    torch._dynamo.reset()
    x = torch.randn(6, 3, 12, 12)
    model, twin = pair(NETS[kind](), x)
    assert conversions(model)[0] == 1
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()
        out, wanted = compiled(x), twin(x.double())
        out.square().sum().backward()
        wanted.square().sum().backward()
        assert relative(out, wanted) < 1e-5
        assert relative(model.stem.weight.grad, twin.stem.weight.grad * model.stem.weight_mask) < 1e-5
        layer = model.stem
        layer.set_mask_(torch.rand_like(layer.weight) < 0.5)
        with torch.no_grad():
            twin.stem.weight.copy_(layer.weight)
    assert counter.frame_count == 1
    assert sparsefx.masks(model)["stem.weight"] is layer.weight_mask
