"""Averaged models hold averaged weights under the source's current masks."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsefx
from tests.masked_dense import MOMENTUM, assert_zero_missing, batches, net, train_step


def averaged(use_buffers: bool, kind: str, **config: Any) -> tuple[nn.Module, AveragedModel, dict]:
    """A model after three updates, its average over 12 steps, and that average computed by hand."""
    model = net(torch.float32)
    model.insert(1, nn.BatchNorm2d(8))
    sparsefx.sparsify(model, 0.2, scheduler=sparsefx.SparseMomentum(prune_rate=0.4), **config)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=4, total_steps=100)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    expected: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(batches(13, torch.float32)):
        train_step(model, optimizer, batch)
        ema.update_parameters(model)
        if kind == "read at each step":
            assert_holds(model, ema)
        for name, parameter in model.named_parameters():
            old = expected.get(name, parameter.detach())
            expected[name] = torch.lerp(old, parameter.detach(), 0.2) if step else parameter.detach().clone()
            if kind == "read at each step" and name in sparsefx.masks(model):
                expected[name] *= sparsefx.masks(model)[name]
    return model, ema, expected


def assert_holds(model: nn.Module, ema: AveragedModel) -> None:
    masks = sparsefx.masks(ema.module)
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(mask, masks[name]), name
    assert_zero_missing(ema.module)


@pytest.mark.parametrize("granularity", ["weight", ("column", 2)])
@pytest.mark.parametrize("kind", ["read once", "read at each step"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_holds_the_sources_masks_with_the_exact_count(
    use_buffers: bool, kind: str, granularity: Any
) -> None:
    model, ema, expected = averaged(use_buffers, kind, granularity=granularity)
    assert len(model.scheduler.history) == 3
    assert_holds(model, ema)
    masks = sparsefx.masks(model)
    assert sum(int(m.sum()) for m in sparsefx.masks(ema.module).values()) == sum(int(m.sum()) for m in masks.values())
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name] * masks.get(name, 1), msg=name)


@pytest.mark.parametrize("first", ["forward", "state_dict"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_whatever_is_asked_first_of_an_average_is_right(use_buffers: bool, first: str) -> None:
    model, ema, expected = averaged(use_buffers, "read once")
    masks = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    x = batches(1, torch.float32)[0][0]
    ema.eval()
    if first == "forward":
        with torch.no_grad():
            out = ema(x)
    else:
        state = ema.state_dict()
        for name, mask in masks.items():
            assert torch.equal(state[f"module.{name}_mask"], mask)
            assert not state[f"module.{name}"][~mask].any()
        with torch.no_grad():
            out = ema(x)
    dense = net(torch.float32)
    dense.insert(1, nn.BatchNorm2d(8))
    dense.load_state_dict({k: v for k, v in ema.module.state_dict().items() if "mask" not in k})
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(parameter, (expected[name] * masks.get(name, 1)).requires_grad_(), msg=name)
    with torch.no_grad():
        torch.testing.assert_close(out, dense.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_is_saved_and_goes_on(use_buffers: bool) -> None:
    model, ema, _ = averaged(use_buffers, "read once")
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    again = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    again.load_state_dict(torch.load(file, weights_only=True))
    optimizer = MOMENTUM(other.parameters())
    other.scheduler.attach(optimizer, steps_per_update=2, total_steps=100)
    for batch in batches(2, torch.float32):
        train_step(other, optimizer, batch)
        again.update_parameters(other)
    assert any(not torch.equal(mask, sparsefx.masks(model)[n]) for n, mask in sparsefx.masks(other).items())
    assert_holds(other, again)
