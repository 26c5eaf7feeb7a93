"""The operators as torch.library checks them: schema, fake results, autograd, ahead-of-time graphs, autocast."""

import pytest
import torch
from torch.library import opcheck

from sparsefx.kernels import ops
from sparsefx.kernels.cpu.linear import LinearPlan
from sparsefx.kernels.runtime import Runtime
from sparsefx.kernels.sparse_cpu import SparseCpu
from sparsefx.kernels.spec import ConvSpec

SPECS = {
    "plain": ConvSpec([1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    "stride2": ConvSpec([2, 2], [1, 1], [1, 1], False, [0, 0], 1),
    "groups": ConvSpec([1, 1], [1, 1], [2, 2], False, [0, 0], 2),
    "transposed": ConvSpec([2, 2], [1, 1], [1, 1], True, [1, 1], 1),
}
# opcheck itself reads `.grad` of tensors that it copied.
ignore_opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def runtime():
    return Runtime("layer")


def conv_arguments(spec, device, runtime):
    shape = (4, 6 // spec.groups, 3, 3) if not spec.transposed else (6, 4, 3, 3)
    mask = torch.rand(shape, device=device) < 0.3
    weight = (torch.randn(shape, device=device) * mask).requires_grad_()
    x = torch.randn(2, 6, 5, 5, device=device, requires_grad=True)
    bias = torch.randn(4, device=device, requires_grad=True)
    return x, weight, bias, mask, runtime.handle, *spec


def linear_arguments(device, runtime):
    mask = torch.rand(5, 6, device=device) < 0.3
    weight = (torch.randn(5, 6, device=device) * mask).requires_grad_()
    x = torch.randn(3, 6, device=device, requires_grad=True)
    return x, weight, torch.randn(5, device=device, requires_grad=True), mask, runtime.handle


@ignore_opcheck
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_convolution_passes_opcheck(spec, memory_format, device, runtime):
    x, *rest = conv_arguments(spec, device, runtime)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    opcheck(torch.ops.sparsefx.conv.default, (x, *rest))


@ignore_opcheck
@pytest.mark.parametrize("device", DEVICES)
def test_linear_passes_opcheck(device, runtime):
    opcheck(torch.ops.sparsefx.linear.default, linear_arguments(device, runtime))


@ignore_opcheck
@pytest.mark.parametrize("device", DEVICES)
def test_backward_operators_pass_opcheck(device, runtime):
    x, weight, _, mask, handle, *spec = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in conv_arguments(SPECS["stride2"], device, runtime)
    )
    grad = torch.randn_like(torch.ops.sparsefx.conv(x, weight, None, mask, handle, *spec))
    for wanted in ([True, True, True], [False, True, False]):
        opcheck(torch.ops.sparsefx.conv_backward.default, (grad, x, weight, mask, handle, *spec, wanted))
    x, weight, _, mask, handle = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in linear_arguments(device, runtime)
    )
    grad = torch.randn(3, 5, device=device)
    opcheck(torch.ops.sparsefx.linear_backward.default, (grad, x, weight, mask, handle, [True, True, True]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_operators_follow_autocast(dtype, device, runtime):
    conv, linear = conv_arguments(SPECS["plain"], device, runtime), linear_arguments(device, runtime)
    with torch.autocast(device, dtype):
        y, z = torch.ops.sparsefx.conv(*conv), torch.ops.sparsefx.linear(*linear)
    assert y.dtype == z.dtype == dtype
    assert torch.equal(z, torch.ops.sparsefx.linear(*(a.to(dtype) for a in linear[:3]), *linear[3:]))
    (y.sum() + z.sum()).backward()
    assert conv[0].grad.dtype == linear[1].grad.dtype == torch.float32
    assert not conv[1].grad.masked_select(~conv[3]).any()


def test_autocast_leaves_float64_alone(runtime):
    x, weight, bias, mask, handle = linear_arguments("cpu", runtime)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.sparsefx.linear(x.double(), weight.double(), bias.double(), mask, handle)
    assert y.dtype == torch.float64


def test_eager_path_and_operator_agree(runtime):
    arguments = conv_arguments(SPECS["stride2"], "cpu", runtime)
    spec = ConvSpec(*arguments[5:])
    assert torch.equal(ops.conv(*arguments[:5], spec), torch.ops.sparsefx.conv(*arguments))


@pytest.mark.parametrize("name", ["conv", "conv_backward", "linear", "linear_backward"])
def test_inductor_freezes_no_operator_in_a_cuda_graph(name):
    """A replayed graph would go on with an old window and an old choice of backend."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.sparsefx, name).default.tags


def test_the_input_gradient_takes_what_its_forward_pass_collected(runtime, monkeypatch):
    x, weight, _, mask, handle = linear_arguments("cpu", runtime)
    backend = SparseCpu(mask, None)
    runtime.choose = lambda *_: backend
    read = []
    real = LinearPlan.run
    monkeypatch.setattr(
        LinearPlan, "run", lambda self, kind, x, w, *args: read.append(w.dim()) or real(self, kind, x, w, *args)
    )
    outs = [ops.linear(x, weight, None, mask, handle) for _ in range(2)]
    assert runtime.carried is None
    assert backend.collected is None
    g = torch.randn(3, 5)
    (for_input,) = torch.autograd.grad(outs, x, [g, 2 * g])
    torch.testing.assert_close(for_input, 3 * g @ weight)
    assert read.count(2) == 2  # the weight by each forward pass alone


def test_a_backward_pass_with_another_plan_reads_the_weight(runtime):
    x, weight, _, mask, handle = linear_arguments("cpu", runtime)
    fewer = mask & (torch.rand(mask.shape) < 0.5)
    backends = {"fprop": SparseCpu(mask, None), "dgrad": SparseCpu(fewer, None)}
    runtime.choose = lambda kind, *_: backends.get(kind, backends["fprop"])
    g = torch.randn(3, 5)
    (for_input,) = torch.autograd.grad(ops.linear(x, weight, None, mask, handle), x, g)
    torch.testing.assert_close(for_input, g @ (weight * fewer))
