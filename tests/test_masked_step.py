"""The optimizer's share: layers large enough for the one-pass kernels train to the bit as masked dense ones."""

import copy

import pytest
import torch
from torch import nn

import sparsefx

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
MOMENTS = ("momentum_buffer", "exp_avg")

pytestmark = pytest.mark.usefixtures("either_graph")


def pair(window, memory_format=torch.contiguous_format):
    """A sparse network whose layers run masked dense, and its dense twin."""
    net = nn.Sequential(nn.Conv2d(24, 40, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 16, 16))
    net = net.to(memory_format=memory_format)
    twin = copy.deepcopy(net)
    model = sparsefx.sparsify(net, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window=window))
    for layer in model.scheduler.layers.values():
        layer.runtime.choose = None
    project_(twin, model)
    return model, twin


@torch.no_grad()
def project_(twin, model):
    for name, mask in sparsefx.masks(model).items():
        twin.get_parameter(name).masked_fill_(~mask, 0)


def backward(network, x):
    network(x).square().mean().backward()


@torch.no_grad()
def give_gradients_(twin, model):
    """Give the twin the gradients of the model, those of missing weights included where they are collected.

    Its own, which other kernels summed in another order, have to agree to rounding.
    """
    for name, parameter in model.named_parameters():
        own, grad = twin.get_parameter(name).grad, parameter.grad.clone()
        if name in sparsefx.masks(model):
            layer = model.scheduler.layers[name]
            if layer.runtime.collecting:
                grad = torch.where(layer.weight_mask, grad, layer.runtime.collected)
            else:
                own.masked_fill_(~layer.weight_mask, 0)
        assert (grad - own).norm() <= 1e-5 * own.norm()
        own.copy_(grad)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", ["always", 3], ids=["inside", "outside"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_existing_weights_move_to_the_bit_as_in_a_dense_network(name, window, set_to_none, memory_format):
    model, twin = pair(window, memory_format)
    one, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    model.scheduler.attach(one, steps_per_update=1000, total_steps=5000)
    kept = []
    for _ in range(4):
        for micro in torch.randn(2, 8, 24, 4, 4).contiguous():
            backward(model, micro.contiguous(memory_format=memory_format))
            backward(twin, micro.contiguous(memory_format=memory_format))
        if set_to_none:
            kept += [(p.grad, p.grad.clone()) for p in model.parameters()]
        give_gradients_(twin, model)
        one.step()
        other.step()
        project_(twin, model)
        for optimizer in (one, other):
            optimizer.zero_grad(set_to_none=set_to_none)
    for key, mask in sparsefx.masks(model).items():
        weight, expected = model.get_parameter(key), twin.get_parameter(key)
        assert torch.equal(weight, expected)
        (moment,) = (one.state[weight][k] for k in MOMENTS if k in one.state[weight])
        (wanted,) = (other.state[expected][k] for k in MOMENTS if k in other.state[expected])
        assert torch.equal(moment[mask], wanted[mask])
        if window == "always":
            assert (moment - wanted).norm() <= 1e-6 * wanted.norm()
        else:
            assert not moment[~mask].any()
            assert not wanted[~mask].any()
    for grad, copied in kept:
        assert torch.equal(grad, copied)


def test_a_weight_used_twice_collects_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(80, 80)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    net = Twice()
    twin = copy.deepcopy(net)
    model = sparsefx.sparsify(net, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    project_(twin, model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=10, total_steps=50)
    x = torch.randn(16, 80)
    backward(model, x)
    backward(twin, x)
    assert (model.fc.runtime.collected - twin.fc.weight.grad).norm() <= 1e-5 * twin.fc.weight.grad.norm()
    assert not model.fc.weight.grad.masked_fill(model.fc.weight_mask, 0).any()
