"""Every rule about shapes: where the channels are afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graph.nets import Net, check_claims, image, kill

MOVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flatten": lambda net, x: x.flatten(1),
    "flatten_module": lambda net, x: net.flat(x),
    "flatten_view": lambda net, x: x.view(x.size(0), -1),
    "flatten_reshape": lambda net, x: torch.reshape(x, (x.shape[0], -1)),
    "flatten_size": lambda net, x: x.view(x.size()[0], -1),
    "flatten_features": lambda net, x: torch.flatten(x.mean((2, 3)), 1),
    "flatten_permuted": lambda net, x: x.permute(0, 2, 1, 3).flatten(2),
    "permute": lambda net, x: x.permute(0, 2, 3, 1),
    "permute_function": lambda net, x: torch.permute(x, (1, 0, -1, 2)),
    "transpose": lambda net, x: x.transpose(1, -1),
    "transpose_space": lambda net, x: torch.transpose(x, 2, 3),
    "unsqueeze_behind": lambda net, x: x.unsqueeze(-1),
    "unsqueeze_between": lambda net, x: x.unsqueeze(2),
    "unsqueeze_before": lambda net, x: torch.unsqueeze(x, 1),
    "unsqueeze_next": lambda net, x: x.unsqueeze(-4),
    "index_step": lambda net, x: x[:, :, ::2, 1:],
    "index_item": lambda net, x: x[..., 0],
    "index_items": lambda net, x: x[:, :, 0, -1],
    "index_batch": lambda net, x: x[0],
    "index_new": lambda net, x: x.mean((2, 3))[:, :, None, None],
    "index_mixed": lambda net, x: x[:, None, ..., 0, None],
    "two": lambda net, x: x.permute(0, 2, 3, 1).unsqueeze(1)[:, 0].mean(1),
}


def model(run: Callable[[Any, Tensor], Any]) -> Net:
    conv = kill(nn.Conv2d(3, 6, 2), outs=[1, 4])
    return Net(lambda net, x: run(net, net.conv(x)), conv=conv, flat=nn.Flatten(), linear=nn.Linear(6, 2))


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("measured", [False, True])
def test_channels_move(name: str, measured: bool) -> None:
    flow, traced = check_claims(model(MOVES[name]), image(size=7), measured)
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    assert result in flow.channels
    assert flow.channels[result].const.isfinite().any()


@pytest.mark.parametrize("dim", [-1, 2])
def test_squeeze_needs_shapes(dim: int) -> None:
    net = model(lambda net, x: x.squeeze(dim))
    for size in (2, 3):
        flow, _ = check_claims(net, image(size=size), measured=True)
        assert len(flow.channels) == 2
    assert len(check_claims(net, image(size=2))[0].channels) == 1


BARRIERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "flatten_all": lambda net, x: x.flatten(),
    "flatten_space": lambda net, x: x.flatten(2),
    "flatten_behind": lambda net, x: x.permute(0, 2, 3, 1).flatten(1),
    "view_of_another": lambda net, x: x.view(x.mean(0).size(0), -1),
    "view_numbers": lambda net, x: x.view(-1, 6 * 36),
    "index_channels": lambda net, x: x[:, 2:],
    "index_channel": lambda net, x: x[:, 1],
    "index_mask": lambda net, x: x[x > 0],
    "chunk": lambda net, x: x.chunk(2, 1)[0].relu(),
    "number_of_channels": lambda net, x: x.sigmoid() * x.size(1),
    "number_of_channels_in_shape": lambda net, x: x.sigmoid() * x.shape[1],
    "whole_shape": lambda net, x: x.sigmoid() + torch.zeros(x.shape),
    "squeeze_all": lambda net, x: x.squeeze(),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_barrier_reads_every_channel(name: str) -> None:
    flow, traced = check_claims(model(BARRIERS[name]), image(size=7))
    conv = next(node for node in traced.graph.nodes if node.target == "conv")
    assert flow.needed[conv].all()


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: net.linear(x.mean((2, 3))[: x.size(0)]),
        lambda net, x: net.linear(x[:, :, : x.shape[-1]].mean((2, 3))),
        lambda net, x: net.linear(torch.nn.functional.interpolate(x, size=x.shape[-2:]).mean((2, 3))),
    ],
)
def test_sizes_of_other_dimensions_read_no_channel(run: Callable) -> None:
    net = model(run)
    kill(net.linear, ins=[0])
    flow, traced = check_claims(net, image(size=7))
    conv = next(node for node in traced.graph.nodes if node.target == "conv")
    assert flow.needed[conv].tolist() == [False, False, True, True, False, True]
