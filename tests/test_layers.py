"""Every sparse layer equals the masked dense one, forward and backward, and survives copying."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import CheckpointError, MaskError
from sparsefx.kernels.runtime import Runtime
from sparsefx.layers import SPARSE, convert_, revert_, sparse_layers

CASES = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear_3d_no_bias": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2), (2, 4, 11, 9)),
    "conv2d_same_even": (lambda: nn.Conv2d(4, 6, 4, padding="same", bias=False), (2, 4, 9, 9)),
    "conv2d_same_uneven_axes": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), (2, 2, 5, 6)),
    "conv2d_valid": (lambda: nn.Conv2d(4, 6, (3, 1), padding="valid"), (1, 4, 5, 7)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 7)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    "conv2d_unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=(0, 1, 2)), (2, 2, 5, 4, 3)),
    "transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1), (2, 4, 5, 5)),
    "transpose2d_groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 5)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
}


def pair(case: str, density: float = 0.3):
    """A sparse layer, the dense layer with the same masked weight, and an input."""
    make, shape = CASES[case]
    layer = make().double()
    mask = torch.rand_like(layer.weight) < density
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return convert_(layer, mask, Runtime(case)), dense, torch.randn(shape, dtype=torch.float64)


def test_every_sparse_class_has_a_case():
    assert {type(CASES[c][0]()) for c in CASES} | {nn.modules.linear.NonDynamicallyQuantizableLinear} == set(SPARSE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of the dense layer
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_masked_dense(case, density):
    sparse, dense, x = pair(case, density)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outs = sparse(inputs[0]), dense(inputs[1])
    grad = torch.randn_like(outs[0])
    for out in outs:
        out.backward(grad)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad * sparse.weight_mask, rtol=1e-12, atol=1e-12)
    if sparse.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["linear", "conv2d", "transpose2d"])
def test_double_backward_equals_masked_dense(case):
    sparse, dense, x = pair(case)
    seconds = []
    for layer in (sparse, dense):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    torch.testing.assert_close(seconds[0], seconds[1] * sparse.weight_mask, rtol=1e-12, atol=1e-12)


def test_transposed_convolution_takes_an_output_size():
    sparse, dense, x = pair("transpose2d")
    for size in ([9, 10], [2, 6, 10, 9]):
        torch.testing.assert_close(sparse(x, output_size=size), dense(x, output_size=size))


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_channels_last_keeps_its_format(case):
    sparse, dense, x = pair("conv2d")
    x = x.contiguous(memory_format=torch.channels_last)
    sparse = sparse.to(memory_format=torch.channels_last)
    out = sparse(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, dense(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_its_own_layer(how):
    sparse, _, x = pair("conv2d")
    other = how(sparse)
    assert type(other) is type(sparse)
    assert other.handle != sparse.handle
    torch.testing.assert_close(other(x), sparse(x), rtol=0, atol=0)
    other.set_mask_(torch.zeros_like(other.weight_mask))
    assert sparse.weight_mask.any()
    assert not other.weight.any()


def test_copies_keep_a_shared_weight_shared():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    mask, runtime = torch.rand(4, 4) < 0.5, Runtime("first")
    model = nn.Sequential(convert_(first, mask, runtime), convert_(second, mask, runtime))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert other[0].weight is other[1].weight
        assert other[0].weight_mask is other[1].weight_mask
        assert [name for name, _ in sparse_layers(other)] == ["0"]
        other[1].set_mask_(~other[0].weight_mask)
        assert torch.equal(other[0].weight_mask, other[1].weight_mask)


def test_a_wrong_mask_is_an_error_and_changes_nothing():
    sparse, _, _ = pair("linear")
    before = sparse.weight_mask.clone()
    for wrong in (torch.ones(5, 7), torch.ones(7, 5, dtype=torch.bool)):
        with pytest.raises(MaskError, match="linear: expected a bool mask of shape"):
            sparse.set_mask_(wrong)
    assert torch.equal(sparse.weight_mask, before)


def test_a_dense_state_keeps_the_mask_and_zeroes_missing_weights():
    sparse, _, _ = pair("linear")
    mask = sparse.weight_mask.clone()
    dense = nn.Linear(7, 5).double()
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.weight_mask, mask)
    assert torch.equal(sparse.weight.detach(), dense.weight.detach() * mask)
    with pytest.raises(CheckpointError, match="weight_mask: expected a bool mask"):
        sparse.load_state_dict({**sparse.state_dict(), "weight_mask": torch.ones(7, 5)})


def test_reverted_layer_is_torchs_own():
    sparse, dense, x = pair("conv2d")
    plain = revert_(sparse)
    assert type(plain) is nn.Conv2d
    assert set(plain.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(plain(x), dense(x))
    plain(x).sum().backward()
    assert plain.weight.grad.count_nonzero() == plain.weight.numel()


def test_a_weight_used_without_its_module_gets_a_masked_gradient():
    sparse, dense, x = pair("linear")
    nn.functional.linear(x, sparse.weight).square().sum().backward()
    nn.functional.linear(x, dense.weight).square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad * sparse.weight_mask)


def test_a_function_may_return_no_gradient_of_a_weight():
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    sparse, _, x = pair("linear")
    x.requires_grad_()
    Constant.apply(x, sparse.weight).sum().backward()
    assert sparse.weight.grad is None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_autocast_computes_in_its_type(case):
    make, shape = CASES[case]
    layer = make()
    sparse = convert_(layer, torch.rand_like(layer.weight) < 0.5, Runtime(case))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse(torch.randn(shape))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert sparse.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own reading of it
def test_operators_pass_opcheck():
    for case in ("linear", "conv2d", "transpose2d"):
        sparse, _, x = pair(case)
        args = (x.requires_grad_(), sparse.weight, sparse.bias, sparse.weight_mask, sparse.handle)
        if case == "linear":
            torch.library.opcheck(torch.ops.sparsefx.linear.default, args)
        else:
            transposed = case == "transpose2d"
            extra = [1, 1] if transposed else [0, 0]
            geometry = (list(sparse.stride), list(sparse.padding), list(sparse.dilation), transposed, extra, 1, 0)
            torch.library.opcheck(torch.ops.sparsefx.conv.default, (*args, *geometry))


def test_masks_lie_in_memory_as_their_weights():
    """Side by side, kernels walk them in one pass; so does a gradient."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    model = sparsefx.sparsify(net, 0.3)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model(x).sum().backward()
    for layer in model:
        assert layer.weight_mask.stride() == layer.weight.stride() == layer.weight.grad.stride()
        assert layer.weight_mask.stride()[1] == 1
