"""Contract 6: the gradient of missing weights is collected beside `.grad`, exactly as the optimizer would have."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

import sparsefx
from sparsefx import specialize
from sparsefx.errors import TraceWarning
from tests.masked_dense import (
    MOMENTUM,
    NEVER,
    OPTIMIZERS,
    MakeOptimizer,
    MaskedDense,
    assert_moment,
    assert_same,
    assert_zero_missing,
    batches,
    first_moment,
    loss_of,
    net,
    pair,
    train_step,
)

pytestmark = pytest.mark.usefixtures("either_graph")


@pytest.mark.parametrize("window", ["always", "auto", 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_grad_is_zero_at_missing_weights_in_and_out_of_the_window(window: Any, set_to_none: bool) -> None:
    model, optimizer, _ = pair(partial(SGD, lr=0.05, momentum=0.3), window, steps_per_update=6, total_steps=20)
    for batch in batches(20):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, batch).backward()
        for name, mask in sparsefx.masks(model).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            assert grad[mask].any(), name
            assert not grad[~mask].any(), name
        optimizer.step()
        assert_zero_missing(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moment_at_missing_weights_is_that_of_the_dense_gradient(name: str) -> None:
    model, optimizer, reference = pair(OPTIMIZERS[name])
    for batch in batches(6):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step()
        assert_same(model, optimizer, reference)
        assert_zero_missing(model)


@pytest.mark.parametrize("name", ["dampening", "adam", "nadam"])
def test_moment_is_zero_before_the_window_and_dense_inside(name: str) -> None:
    model, optimizer, reference = pair(OPTIMIZERS[name], window=4, steps_per_update=9, total_steps=20)
    for step, batch in enumerate(batches(8), 1):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step(dense=step > 5)
        if step <= 5:
            for weight, mask in sparsefx.masks(model).items():
                assert not first_moment(optimizer, model.get_parameter(weight))[~mask].any(), weight
        else:
            assert_same(model, optimizer, reference)
        assert_zero_missing(model)


@pytest.mark.parametrize("backend", ["compaction", "sparse"])
def test_a_backend_that_skips_missing_weights_collects_their_gradient_all_the_same(
    backend: str, either_graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this density every layer has empty channels, so that both backends are candidates."""
    expected = backend if either_graph == "layers" else "dense"
    place = 1 if backend == "compaction" else -1
    monkeypatch.setattr(
        specialize, "interleaved", lambda calls, device: [float(call is not calls[place]) for call in calls]
    )
    model, optimizer, reference = pair(window=3, density=0.03, steps_per_update=8, total_steps=20, dtype=torch.float32)
    for step, batch in enumerate(batches(7, torch.float32), 1):
        loss_of(model, batch).backward()
        if step <= 5:
            rows = sparsefx.summary(model).rows
            assert {row.backends["wgrad"] for row in rows if row.name != "2"} == {expected}
        for name, mask in sparsefx.masks(model).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            assert not grad[~mask].any(), name
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(batch)
        reference.step(dense=step > 5)
        assert_zero_missing(model)
        if step > 5:
            assert_same(model, optimizer, reference, rtol=1e-4)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["sgd", "dampening", "adam"])
def test_accumulated_and_clipped_gradients_are_folded_at_the_scale_of_the_step(
    name: str, clip: float | None, set_to_none: bool
) -> None:
    model, optimizer, reference = pair(OPTIMIZERS[name])
    data = batches(12)
    for micro_batches in (data[i : i + 3] for i in range(0, 12, 3)):
        for batch in micro_batches:
            (loss_of(model, batch) / 3).backward()
        reference.backward(*micro_batches)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip
            reference.clip_(clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        reference.step()
        assert_same(model, optimizer, reference)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_clipped_step_is_the_same_with_the_window_open_and_closed(name: str) -> None:
    open_, open_optimizer, _ = pair(OPTIMIZERS[name], "always")
    closed, closed_optimizer, _ = pair(OPTIMIZERS[name], 1)
    for batch in batches(5):
        norms = []
        for model, optimizer in ((open_, open_optimizer), (closed, closed_optimizer)):
            loss_of(model, batch).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-13, atol=0)
        for a, b in zip(open_.parameters(), closed.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("name", ["sgd", "dampening", "adam", "sgd-fused", "adam-fused"])
def test_a_step_that_grad_scaler_skips_counts_and_folds_nothing(name: str, unscale: bool) -> None:
    """Only a parameter beside the model overflows, so that a fold of the skipped step would not show as NaN."""
    model = net(torch.float32)
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    reference = MaskedDense(dense, sparsefx.masks(model), OPTIMIZERS[name])
    beside = nn.Parameter(torch.zeros(()))
    optimizer = OPTIMIZERS[name]([*model.parameters(), beside])
    model.scheduler.attach(optimizer, **NEVER)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6)
    for step, batch in enumerate(batches(8, torch.float32)):
        overflow = step in (
            (3, 4) if name == "sgd-fused" else (0, 3, 4)
        )  # torch's own starts with garbage if 0 is skipped
        taken = model.scheduler.step
        scaler.scale(loss_of(model, batch) + beside * (torch.inf if overflow else 0.0)).backward()
        reference.backward(batch)
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            reference.clip_(0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert model.scheduler.step == taken + (not overflow)
        if not overflow:
            reference.step()
            assert_same(model, optimizer, reference, rtol=2e-5)
        assert_zero_missing(model)


class Gated(nn.Module):
    """A layer whose existing weight gets no gradient in some steps, beside one that always does."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = nn.Linear(4, 1, bias=False)
        self.other = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.quiet(x) + self.other(z)


def gated(make_optimizer: MakeOptimizer) -> tuple[Gated, Optimizer, MaskedDense, Tensor]:
    torch.manual_seed(0)
    model = Gated().double()
    dense = copy.deepcopy(model)
    config = sparsefx.SparseMomentum(dense_grad_window="always")
    sparsefx.sparsify(model, 0.25, scheduler=config)
    reference = MaskedDense(dense, sparsefx.masks(model), make_optimizer)
    optimizer = make_optimizer(model.parameters())
    model.scheduler.attach(optimizer, **NEVER)
    return model, optimizer, reference, (~model.quiet.weight_mask[0]).double()


def test_loss_scale_is_removed_where_existing_weights_get_no_gradient() -> None:
    model, optimizer, reference, unread = gated(MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    x, z = torch.rand(3, 4, dtype=torch.float64) * unread, torch.rand(3, 4, dtype=torch.float64)
    for _ in range(3):
        scaler.scale(model(x, z).sum()).backward()
        reference.model(x, z).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        reference.step()
        reference.optimizer.zero_grad()
    torch.testing.assert_close(
        first_moment(optimizer, model.quiet.weight), reference.moment("quiet.weight"), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_micro_batch_without_gradient_at_existing_weights_is_summed_like_any_other(set_to_none: bool) -> None:
    model, optimizer, reference, unread = gated(MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for only_missing in (True, False, True):
            x, z = (torch.rand(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
            x = x * unread if only_missing else x
            model(x, z).sum().backward()
            reference.model(x, z).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        reference.step()
        reference.optimizer.zero_grad()
        assert_same(model, optimizer, reference)


def test_backward_without_a_step_leaves_nothing_behind() -> None:
    model, optimizer, reference = pair()
    for set_to_none, (discarded, used) in zip(
        (True, False), zip(batches(2), batches(2, seed=1), strict=True), strict=True
    ):
        loss_of(model, discarded).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        train_step(model, optimizer, used, set_to_none)
        reference.backward(used)
        reference.step()
        assert_same(model, optimizer, reference)


def test_autocast_collects_the_dense_gradient() -> None:
    model, optimizer, reference = pair(dtype=torch.float32)
    for batch in batches(4, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            reference.backward(batch)
        reference.step()
    assert_same(model, optimizer, reference, rtol=5e-2)


class Routes(nn.Module):
    """A weight that backward reaches by more than one plain call of its layer."""

    def __init__(self, route: str) -> None:
        super().__init__()
        self.route = route
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True) if route == "attention" else None
        if route == "shared":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            x = self.attention(x[None], x[None], x[None], need_weights=False)[0][0]
        elif self.route == "twice":
            x = self.first(x).tanh()
        elif self.route == "tied":
            return F.linear(self.second(self.first(x)).tanh(), self.first.weight.t())
        elif self.route == "tied-first":
            return self.second(self.first(F.linear(x, self.first.weight.t()).tanh()))
        elif self.route == "function":
            return self.second(F.linear(x, self.first.weight).tanh())
        elif self.route.startswith("checkpoint"):
            return checkpoint(self._body, x, use_reentrant=self.route == "checkpoint-reentrant")
        return self._body(x)

    def _body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


ROUTES = ["twice", "shared", "attention", "tied", "tied-first", "function", "checkpoint", "checkpoint-reentrant"]


def on_route(route: str) -> tuple[nn.Module, Optimizer, MaskedDense, list[Tensor]]:
    torch.manual_seed(0)
    model = Routes(route).double()
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        sparsefx.sparsify(model, 0.3, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
        model(torch.randn(3, 12, dtype=torch.float64, requires_grad=True))
    reference = MaskedDense(dense, sparsefx.masks(model), MOMENTUM)
    optimizer = MOMENTUM(model.parameters())
    model.scheduler.attach(optimizer, **NEVER)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 12, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(8)]
    return model, optimizer, reference, inputs


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_to_a_weight_is_masked_and_collected(route: str) -> None:
    model, optimizer, reference, inputs = on_route(route)
    for first, second in zip(inputs[::2], inputs[1::2], strict=True):
        for each in (model, reference.model):
            for x in (first, second):
                each(x).square().sum().backward()
        for name, mask in sparsefx.masks(model).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            assert grad[mask].any(), name
            assert not grad[~mask].any(), name
        optimizer.step()
        reference.step()
        model.zero_grad()
        reference.model.zero_grad()
        assert_same(model, optimizer, reference)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_gradients_that_do_not_enter_grad_are_not_collected(wanted: str, create_graph: bool) -> None:
    model, optimizer, reference, inputs = on_route("plain")
    for x in inputs:
        model(x).square().sum().backward()
        reference.model(x).square().sum().backward()
        target = inputs[0] if wanted == "input" else model.first.weight
        torch.autograd.grad(model(inputs[0]).square().sum(), target, create_graph=create_graph)
        optimizer.step()
        reference.step()
        model.zero_grad()
        reference.model.zero_grad()
        assert_same(model, optimizer, reference)


def test_a_gradient_penalty_is_that_of_the_masked_dense_model() -> None:
    model, optimizer, reference, inputs = on_route("plain")
    for each in (model, reference.model):
        (slope,) = torch.autograd.grad(each(inputs[0]).square().sum(), inputs[0], create_graph=True)
        slope.square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = reference.model.get_parameter(name).grad
        if parameter.grad is None:
            assert expected is None or not expected.any()
            continue
        assert expected is not None
        expected = expected * reference.masks.get(name, 1)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    optimizer.step()
    reference.step()
    assert_same(model, optimizer, reference)


def test_several_optimizers_fold_each_its_own_rule() -> None:
    model = net()
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, 0.2, scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
    references, optimizers = [], []
    for make, part in ((OPTIMIZERS["dampening"], slice(0, 4)), (OPTIMIZERS["adam"], slice(4, 8))):
        optimizers.append(make(model[part].parameters()))
        reference = MaskedDense(dense, sparsefx.masks(model), make)
        reference.optimizer = make(dense[part].parameters())
        references.append(reference)
    model.scheduler.attach(optimizers, **NEVER)
    for step, batch in enumerate(batches(5), 1):
        loss_of(model, batch).backward()
        dense.zero_grad()
        loss_of(dense, batch).backward()
        for optimizer, reference in zip(optimizers, references, strict=True):
            optimizer.step()
            reference.step()
        model.zero_grad()
        assert model.scheduler.step == step
    for name, mask in sparsefx.masks(model).items():
        which = 0 if int(name[0]) < 4 else 1
        ours = first_moment(optimizers[which], model.get_parameter(name))
        assert_moment(name, ours, references[which].moment(name), mask)
