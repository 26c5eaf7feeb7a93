"""Contract 6: the gradient of missing weights is collected beside `.grad`, exactly as the optimizer would have."""

import copy
import io
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.utils.checkpoint import checkpoint

import sparsefx
from sparsefx.errors import CheckpointError, SchedulerError, TraceWarning, UpdateWarning
from tests import oracle
from tests.masked_dense import Batch, MakeOptimizer, MaskedDense, batches, first_moment, loss_of, net

MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": MOMENTUM,
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "dampening": partial(SGD, lr=0.05, momentum=0.8, dampening=0.3),
    "sgd-maximize": partial(SGD, lr=0.01, momentum=0.9, maximize=True, weight_decay=1e-3),
    "sgd-foreach": partial(SGD, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=1e-3),
    "adam-decay": partial(Adam, lr=1e-3, weight_decay=0.01, betas=(0.8, 0.99)),
    "adam-amsgrad": partial(Adam, lr=1e-3, amsgrad=True),
    "adam-maximize": partial(Adam, lr=1e-3, maximize=True),
    "adam-fused": partial(Adam, lr=1e-3, fused=True),
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.1),
    "adamw-fused": partial(AdamW, lr=1e-3, fused=True),
    "nadam": partial(NAdam, lr=1e-3),
    "radam": partial(RAdam, lr=1e-3),
}
NEVER = {"steps_per_update": 10**6, "total_steps": 10**7}


def pair(
    make_optimizer: MakeOptimizer = MOMENTUM,
    window: Any = "always",
    dtype: torch.dtype = torch.float64,
    density: float = 0.2,
    steps_per_update: int = 10**6,
    total_steps: int = 10**7,
    **config: Any,
) -> tuple[nn.Module, Optimizer, MaskedDense]:
    """A sparse model with its optimizer attached, and the masked dense reference with the same masks."""
    model = net(dtype)
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, density, scheduler=sparsefx.SparseMomentum(dense_grad_window=window, **config))
    reference = MaskedDense(dense, sparsefx.masks(model), make_optimizer)
    optimizer = make_optimizer(model.parameters())
    model.scheduler.attach(optimizer, steps_per_update=steps_per_update, total_steps=total_steps)
    return model, optimizer, reference


def assert_same(model: nn.Module, optimizer: Optimizer, reference: MaskedDense, rtol: float = 1e-9) -> None:
    """Weights and first moments agree with the reference, at existing and at missing weights, layer by layer."""
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter,
            reference.model.get_parameter(name),
            rtol=rtol,
            atol=rtol * 0.1,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, mask in sparsefx.masks(model).items():
        assert_moment(name, first_moment(optimizer, model.get_parameter(name)), reference.moment(name), mask, rtol)


def assert_moment(name: str, ours: Tensor, expected: Tensor, mask: Tensor, rtol: float = 1e-9) -> None:
    for where, at in (("existing", mask), ("missing", ~mask)):
        error = torch.linalg.vector_norm((ours - expected)[at]) / torch.linalg.vector_norm(expected[at])
        assert error <= rtol, f"{name}: first moment at {where} weights is off by {error:.2e}"


def assert_zero_missing(model: nn.Module) -> None:
    for name, mask in sparsefx.masks(model).items():
        assert not model.get_parameter(name)[~mask].any(), name


def train_step(model: nn.Module, optimizer: Optimizer, batch: Batch, set_to_none: bool = True) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


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
        elif self.route == "function":
            return self.second(F.linear(x, self.first.weight).tanh())
        elif self.route.startswith("checkpoint"):
            return checkpoint(self._body, x, use_reentrant=self.route == "checkpoint-reentrant")
        return self._body(x)

    def _body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


ROUTES = ["twice", "shared", "attention", "tied", "function", "checkpoint", "checkpoint-reentrant"]


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


class Recorder:
    """A `grow` rule that notes the first moments it is shown, and grows like "momentum"."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, score: Tensor, mask: Tensor, k: int) -> Tensor:
        self.seen.append(score.clone())
        order = score.abs().masked_fill(mask, -1).argsort(descending=True, stable=True)
        grown = mask.clone()
        grown[order[:k]] = True
        return grown


@pytest.mark.parametrize(
    ("make_optimizer", "window"), [(MOMENTUM, 44), (partial(Adam, lr=1e-3, betas=(0.8, 0.99)), 21)]
)
def test_windowed_moment_is_within_a_hundredth_of_what_always_had_at_window_start(
    make_optimizer: MakeOptimizer, window: int
) -> None:
    assert 0.9**44 < 0.01 < 0.9**43
    assert 0.8**21 < 0.01 < 0.8**20
    steps = 60
    recorded = {}
    at_start: list[float] = []
    for kind in ("always", "auto"):
        recorded[kind] = Recorder()
        model, optimizer, _ = pair(
            make_optimizer,
            kind,
            steps_per_update=steps,
            total_steps=10 * steps,
            redistribute="none",
            grow=recorded[kind],
        )
        for step, batch in enumerate(batches(steps), 1):
            train_step(model, optimizer, batch)
            if kind == "always" and step == steps - window:
                weights = [model.get_parameter(name) for name in sparsefx.masks(model)]
                at_start = [float(torch.linalg.vector_norm(first_moment(optimizer, w))) for w in weights]
    for always, windowed, start in zip(recorded["always"].seen, recorded["auto"].seen, at_start, strict=True):
        difference = float(torch.linalg.vector_norm(always - windowed))
        assert 0 < difference <= 0.01 * start


def test_always_never_forgets_across_updates() -> None:
    """The moment that an update sees is that of every dense gradient since the start."""
    recorder = Recorder()
    model, optimizer, reference = pair(steps_per_update=4, total_steps=100, redistribute="none", grow=recorder)
    for step, batch in enumerate(batches(12), 1):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step()
        if step % 4 == 0:
            for (name, mask), seen in zip(reference.masks.items(), recorder.seen[-4:], strict=True):
                assert_moment(name, seen.view(mask.shape), reference.moment(name), mask)
            adopt_(reference, model, optimizer)
    assert len(recorder.seen) == 12
    assert_same(model, optimizer, reference)


@pytest.mark.parametrize("window", ["always", "auto"])
def test_pruned_weights_lose_their_moment_and_grown_ones_keep_what_was_collected(window: str) -> None:
    recorder = Recorder()
    model, optimizer, _ = pair(
        partial(SGD, lr=0.05, momentum=0.5),
        window,
        steps_per_update=8,
        total_steps=100,
        redistribute="none",
        grow=recorder,
    )
    before = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    for batch in batches(8):
        train_step(model, optimizer, batch)
    for (name, mask), seen in zip(sparsefx.masks(model).items(), recorder.seen, strict=True):
        moment = first_moment(optimizer, model.get_parameter(name))
        seen = seen.view(mask.shape)
        assert (mask & ~before[name]).any()
        assert (~mask & before[name]).any()
        assert torch.equal(moment[mask], seen[mask])
        assert seen[mask & ~before[name]].all()
        assert torch.equal(moment[~mask], seen[~mask] if window == "always" else torch.zeros_like(seen[~mask]))
    assert_zero_missing(model)


@pytest.mark.parametrize("window", ["always", "auto"])
@pytest.mark.parametrize("name", ["sgd", "dampening", "adam", "adamw-fused"])
def test_the_first_automatic_updates_are_those_of_algorithm_1_on_dense_moments(name: str, window: str) -> None:
    """End to end with the oracle: the reference's own moments decide the masks, for three updates in a row."""
    model, optimizer, reference = pair(OPTIMIZERS[name], window, steps_per_update=5, total_steps=100)
    target = sum(int(mask.sum()) for mask in reference.masks.values())
    for step, batch in enumerate(batches(15), 1):
        reference.backward(batch)
        reference.step()
        layers = [layer_of(reference, weight) for weight in reference.masks]
        train_step(model, optimizer, batch)
        if step % 5 == 0:
            rate = oracle.prune_rate_at("cosine", 0.5, step, 100)
            expected = oracle.update(layers, rate, target)
            for (weight, mask), wanted in zip(sparsefx.masks(model).items(), expected.masks, strict=True):
                np.testing.assert_array_equal(mask.numpy(), wanted, err_msg=f"step {step}: {weight}")
            adopt_(reference, model, optimizer, forget=window == "auto")
    assert len(model.scheduler.history) == 3


def layer_of(reference: MaskedDense, name: str) -> oracle.Layer:
    weight = reference.model.get_parameter(name)
    state = reference.optimizer.state[weight]
    scaled = None
    if "exp_avg_sq" in state:
        eps = reference.optimizer.param_groups[0]["eps"]
        scaled = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)).numpy().copy()
    return oracle.Layer(
        weight.detach().numpy().copy(), reference.masks[name].numpy(), reference.moment(name).numpy().copy(), scaled
    )


@torch.no_grad()
def adopt_(reference: MaskedDense, model: nn.Module, optimizer: Optimizer, forget: bool = False) -> None:
    """Go on from the sparse model's masks: grown weights at zero, with their second moments as it set them.

    With `forget` the first moment of missing weights starts again from zero, as it does unless "always".
    """
    for name, mask in sparsefx.masks(model).items():
        reference.masks[name] = mask.clone()
        ours, weight = model.get_parameter(name), reference.model.get_parameter(name)
        grown = mask & (ours == 0)
        weight.masked_fill_(grown, 0)
        if forget:
            reference.moment(name).masked_fill_(~mask, 0)
        if "exp_avg_sq" in optimizer.state[ours]:
            second = optimizer.state[ours]["exp_avg_sq"]
            reference.optimizer.state[weight]["exp_avg_sq"][grown] = second[grown]
    reference.project_()


@pytest.mark.parametrize("make_optimizer", [partial(Adam, lr=1e-3), partial(AdamW, lr=1e-3, amsgrad=True)])
def test_grown_weights_start_with_the_mean_second_moment_of_their_layer(make_optimizer: MakeOptimizer) -> None:
    model, optimizer, reference = pair(make_optimizer, steps_per_update=6, total_steps=100)
    for batch in batches(6):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step()
    for name, mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name)
        grown, kept = mask & (weight == 0), mask & (weight != 0)
        second = optimizer.state[model.get_parameter(name)]["exp_avg_sq"]
        expected = reference.optimizer.state[reference.model.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(second[kept], expected[kept], rtol=1e-9, atol=0)
        assert grown.any()
        torch.testing.assert_close(second[grown], expected[kept].mean().expand(int(grown.sum())), rtol=1e-9, atol=0)


def test_update_without_a_completed_window_raises_and_changes_nothing() -> None:
    model, optimizer, _ = pair(window="auto", steps_per_update=100, total_steps=1000)
    with pytest.raises(SchedulerError, match="attach"):
        sparsefx.sparsify(net(), 0.2).scheduler.update()
    for batch in [None, *batches(60)]:
        if batch is not None:
            train_step(model, optimizer, batch)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(SchedulerError, match="window"):
            model.scheduler.update()
        assert_equal_state(state, (model.state_dict(), optimizer.state_dict()))
    assert model.scheduler.history == []


def test_an_optimizer_without_a_first_moment_is_refused_with_help() -> None:
    for optimizer_class, kwargs, match in (
        (SGD, {}, "momentum"),
        (torch.optim.Adagrad, {}, "Adagrad"),
        (torch.optim.RMSprop, {}, "RMSprop"),
    ):
        model = sparsefx.sparsify(net(), 0.2)
        optimizer = optimizer_class(model.parameters(), lr=0.1, **kwargs)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(SchedulerError, match=match):
            model.scheduler.attach(optimizer, steps_per_update=5, total_steps=10)
        assert_equal_state(state, (model.state_dict(), optimizer.state_dict()))
        model.scheduler.attach(MOMENTUM(model.parameters()), steps_per_update=5, total_steps=10)


@pytest.mark.parametrize(
    "mistake",
    ["lacks the weights", "one of two lacks them", "none", "twice", "zero steps", "no total", "above total", "a float"],
)
def test_a_wrong_attach_raises_and_changes_nothing(mistake: str) -> None:
    model = sparsefx.sparsify(net(), 0.2)
    own = MOMENTUM(model.parameters())
    stranger = MOMENTUM(net().parameters())
    schedule: dict[str, Any] = {"steps_per_update": 5, "total_steps": 10}
    given: Any = own
    match mistake:
        case "lacks the weights":
            given = stranger
        case "one of two lacks them":
            given = [own, stranger]
        case "none":
            given = []
        case "twice":
            model.scheduler.attach(own, **schedule)
        case "zero steps":
            schedule["steps_per_update"] = 0
        case "no total":
            schedule["total_steps"] = 0
        case "above total":
            schedule["steps_per_update"] = 11
        case "a float":
            schedule["steps_per_update"] = 2.5
    hooks = len(own._optimizer_step_post_hooks)
    state = copy.deepcopy((model.state_dict(), own.state_dict(), model.scheduler.state_dict()))
    with pytest.raises(SchedulerError):
        model.scheduler.attach(given, **schedule)
    assert_equal_state(state, (model.state_dict(), own.state_dict(), model.scheduler.state_dict()))
    assert len(own._optimizer_step_post_hooks) == hooks
    if mistake != "twice":
        model.scheduler.attach(own, steps_per_update=5, total_steps=10)


@pytest.mark.parametrize("what", ["density", "granularity", "model"])
def test_a_state_of_another_run_is_refused_and_changes_nothing(what: str) -> None:
    model, optimizer, _ = pair(steps_per_update=3, total_steps=20)
    for batch in batches(4):
        train_step(model, optimizer, batch)
    other = net() if what != "model" else nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.Linear(7, 5)).double()
    sparsefx.sparsify(
        other, 0.3 if what == "density" else 0.2, granularity=("column", 2) if what == "granularity" else "weight"
    )
    other_optimizer = MOMENTUM(other.parameters())
    other.scheduler.attach(other_optimizer, steps_per_update=3, total_steps=20)
    for batch in batches(4):
        train_step(other, other_optimizer, batch)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), without_times(model.scheduler.history)))
    with pytest.raises(CheckpointError):
        model.scheduler.load_state_dict(other.scheduler.state_dict())
    if what == "model":
        with pytest.raises((CheckpointError, RuntimeError)):
            model.load_state_dict(other.state_dict())
    assert_equal_state(state, (model.state_dict(), optimizer.state_dict(), without_times(model.scheduler.history)))
    assert model.scheduler.step == 4


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "updates"), [(12, [5, 10]), (10, [5]), (11, [5, 10])])
def test_prune_rate_falls_to_zero_and_no_update_follows_the_last_step(
    decay: str, total: int, updates: list[int]
) -> None:
    model, optimizer, _ = pair(decay=decay, prune_rate=0.4, steps_per_update=5, total_steps=total)
    for step, batch in enumerate(batches(2 * total)):
        expected = oracle.prune_rate_at(decay, 0.4, min(step, total), total)
        assert math.isclose(model.scheduler.prune_rate, expected, rel_tol=1e-12, abs_tol=1e-15)
        train_step(model, optimizer, batch)
        assert_zero_missing(model)
    rows = model.scheduler.history
    assert [row["step"] for row in rows] == updates
    for row in rows:
        expected = oracle.prune_rate_at(decay, 0.4, row["step"], total)
        assert math.isclose(row["prune_rate"], expected, rel_tol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_moment_skips_the_update_with_one_warning(bad: float) -> None:
    model, optimizer, _ = pair(steps_per_update=4, total_steps=100)
    data = batches(8)
    for batch in data[:3]:
        train_step(model, optimizer, batch)
    weight, mask = model[0].weight, sparsefx.masks(model)["0.weight"]
    at = tuple(mask.nonzero()[0])
    masks = {name: m.clone() for name, m in sparsefx.masks(model).items()}
    first_moment(optimizer, weight)[at] = bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(model, optimizer, data[3])
    assert [w.category for w in caught] == [UpdateWarning]
    assert "0.weight" in str(caught[0].message)
    assert model.scheduler.history[-1]["skipped"]
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())
    with torch.no_grad():
        weight[at] = 0.1
        first_moment(optimizer, weight)[at] = 0.0
    for batch in data[4:]:
        train_step(model, optimizer, batch)
    assert model.scheduler.history[-1]["skipped"] is None
    assert any(not torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())


def assert_equal_state(a: Any, b: Any) -> None:
    """Two nested states are equal to the bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_state(x, y)
    else:
        assert a == b


def fresh(name: str, window: Any) -> tuple[nn.Module, Optimizer]:
    """At this density every channel is live, so no backend is chosen by timing."""
    model = net(seed=1)
    sparsefx.sparsify(model, 0.5, scheduler=sparsefx.SparseMomentum(dense_grad_window=window))
    return model, OPTIMIZERS[name](model.parameters())


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in history]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize(("name", "window"), [("sgd", 3), ("adam", "always"), ("dampening", "auto")])
def test_a_run_resumed_at_any_step_continues_bit_exactly(name: str, window: Any, attach_first: bool) -> None:
    schedule = {"steps_per_update": 5, "total_steps": 14}
    data = batches(14)
    model, optimizer = fresh(name, window)
    model.scheduler.attach(optimizer, **schedule)
    saved = []
    for batch in data:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict(), model.scheduler.state_dict()), file)
        saved.append(file)
        train_step(model, optimizer, batch)
    assert [row["step"] for row in model.scheduler.history] == [5, 10]
    for start, file in enumerate(saved):
        if name != "sgd" and start not in (0, 2, 5, 9):
            continue
        file.seek(0)
        of_model, of_optimizer, of_scheduler = torch.load(file, weights_only=True)
        again, optimizer_again = fresh(name, window)
        if attach_first:
            again.scheduler.attach(optimizer_again, **schedule)
        again.load_state_dict(of_model)
        optimizer_again.load_state_dict(of_optimizer)
        if not attach_first:
            again.scheduler.attach(optimizer_again, **schedule)
        again.scheduler.load_state_dict(of_scheduler)
        for batch in data[start:]:
            train_step(again, optimizer_again, batch)
        assert_equal_state(again.state_dict(), model.state_dict())
        assert_equal_state(optimizer_again.state_dict(), optimizer.state_dict())
        assert again.scheduler.step == model.scheduler.step
        assert again.scheduler.prune_rate == model.scheduler.prune_rate
        assert without_times(again.scheduler.history) == without_times(model.scheduler.history)
