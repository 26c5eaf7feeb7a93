"""Dense products of linear layers, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from sparsefx.kernels.cpu.build import supported_isas
from sparsefx.kernels.cpu.linear_dense import linear_dense_dgrad, linear_dense_fprop, linear_dense_wgrad

# rows, outputs, inputs
LINEAR = {
    "one": (1, 1, 1),
    "primes": (7, 13, 37),
    "no_rows": (0, 5, 9),
    "a_panel": (33, 12, 32),
    "several": (101, 131, 167),
    "few_inputs": (64, 259, 3),
    "few_outputs": (64, 2, 259),
    "past_the_caches": (5, 1025, 1024),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_a_linear_gradient_is_the_product_and_zero_where_no_weight_is(case, isa, threads, keep):
    rows, outputs, inputs = case
    generator = torch.Generator().manual_seed(3)
    g, x = (torch.randn(rows, n, generator=generator) for n in (outputs, inputs))
    mask = torch.rand(outputs, inputs, generator=generator) < 0.5
    torch.set_num_threads(threads)
    masked, dense = linear_dense_wgrad(g, x, mask, keep=keep, isa=isa)
    wanted = g.double().T @ x.double()
    assert (masked - wanted * mask).norm() <= 1e-6 * wanted.norm()
    assert not masked[~mask].any()
    assert (dense is not None) is keep
    if dense is not None:
        assert (dense - wanted).norm() <= 1e-6 * wanted.norm()
        assert torch.equal(masked[mask], dense[mask])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_outputs_and_input_gradients_are_the_products(case, isa, threads, relu):
    rows, outputs, inputs = case
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*size, generator=generator) for size in ((outputs, inputs), (outputs,)))
    g, x = (torch.randn(rows, n, generator=generator) for n in (outputs, inputs))
    torch.set_num_threads(threads)
    for given in (bias, None):
        wanted = F.linear(x.double(), weight.double(), None if given is None else given.double())
        out = linear_dense_fprop(x, weight, given, relu=relu, isa=isa)
        assert (out - (wanted.relu() if relu else wanted)).norm() <= 1e-6 * wanted.norm()
    wanted = g.double() @ weight.double()
    assert (linear_dense_dgrad(g, weight, isa=isa) - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_relu_passes_nan_on_as_torch_does():
    x = torch.tensor([[float("nan"), -1.0, -0.0, 2.0]])
    out = linear_dense_fprop(x.T.contiguous(), torch.ones(1, 1), relu=True)
    assert torch.equal(out.isnan(), x.T.isnan())
    assert torch.equal(out[1:], x.T[1:].relu())


def test_inputs_of_another_layer_are_refused():
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    for given, bias in ((x[:, :4].contiguous(), None), (x, torch.randn(4))):
        with pytest.raises(ValueError, match=r"x: expected .* got .*; pass the layer's own tensors"):
            linear_dense_fprop(given, weight, bias)
    with pytest.raises(ValueError, match=r"grad: expected .* got .*; pass the layer's own tensors"):
        linear_dense_dgrad(x, weight)


def test_rows_of_another_layer_are_refused():
    g, x, mask = torch.randn(4, 3), torch.randn(4, 5), torch.ones(3, 5, dtype=torch.bool)
    for grad, which in ((g[:3], mask), (g, mask[:2]), (g, torch.ones(5, 3, dtype=torch.bool).T)):
        with pytest.raises(ValueError, match=r"grad: expected .* got .*; pass the layer's own tensors"):
            linear_dense_wgrad(grad, x, which)
