"""Contract 4: exact counts, whole units, exact zeros, the same masks on every rank."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sparsefx
from sparsefx.errors import DensityError, SparsefxError, TraceWarning
from tests.masked_dense import batches, loss_of, net
from tests.test_update_oracle import Bank, random_layer

GRANULARITIES = ["weight", ("column", 2), ("column", 5), "channel", ("channel", "in"), ("block", 2, 3), ("block", 4, 4)]


def counts(model: nn.Module) -> tuple[int, int]:
    masks = sparsefx.masks(model).values()
    return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)


def assert_exact(model: nn.Module, density: float) -> None:
    existing, total = counts(model)
    assert existing == round(density * total)
    assert_zero_missing(model)


def assert_zero_missing(model: nn.Module) -> None:
    for name, mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name)
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert not weight[~mask].any(), name


def attach(model: nn.Module, steps_per_update: int = 2, total_steps: int = 1000, **optimizer: Any) -> SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = SGD(parameters, **{"lr": 0.05, "momentum": 0.5, **optimizer})
    model.scheduler.attach(made, steps_per_update=steps_per_update, total_steps=total_steps)
    return made


def train(model: nn.Module, optimizer: SGD, size: int, steps: int, seed: int = 0) -> Iterator[int]:
    """Take steps with random gradients, handing over after each."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        out = model(torch.randn(size, generator=generator))
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def bank(seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layers, shapes = zip(*(random_layer(rng) for _ in range(rng.integers(2, 6))), strict=True)
    return Bank([nn.Linear(30, 20), *layers], [(3, 30), *shapes])


def unit_ids(weight: Tensor, granularity: Any, transposed: bool) -> Tensor:
    """Number the units of a weight from the definition in design section 1: one id per weight, weight-shaped."""
    matrix = weight.transpose(0, 1) if transposed else weight
    out, inputs, taps = matrix.shape[0], matrix.shape[1], math.prod(matrix.shape[2:])
    o = torch.arange(out)[:, None, None]
    i = torch.arange(inputs)[None, :, None]
    tap = torch.arange(taps)[None, None, :]
    column = i * taps + tap
    match granularity:
        case "weight":
            ids = o * 10**6 + column
        case ("column", h):
            ids = (o // h) * 10**6 + column
        case "channel":
            ids = o + 0 * column
        case ("channel", "in"):
            ids = i + 0 * o + 0 * tap
        case ("block", r, c):
            ids = (o // r) * 10**6 + column // c
        case _:
            raise AssertionError(granularity)
    ids = ids.reshape(matrix.shape)
    return ids.transpose(0, 1) if transposed else ids


def layer_units(model: nn.Module, granularity: Any) -> dict[str, Tensor]:
    return {
        name: unit_ids(mask, granularity, isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d))
        for name, mask in sparsefx.masks(model).items()
    }


def assert_whole_units(model: nn.Module, granularity: Any, density: float) -> None:
    """Masks consist of whole units, one a layer at least, and no missing unit would still fit under the target."""
    smallest_missing = math.inf
    for name, ids in layer_units(model, granularity).items():
        mask = sparsefx.masks(model)[name]
        assert mask.any(), name
        _, unit, size = ids.flatten().unique(return_inverse=True, return_counts=True)
        held = torch.zeros_like(size).index_add_(0, unit, mask.flatten().to(size.dtype))
        assert bool(((held == 0) | (held == size)).all()), f"{name}: a unit is broken"
        smallest_missing = min([smallest_missing, *size[held == 0].tolist()])
    existing, total = counts(model)
    target = round(density * total)
    assert existing <= target
    assert existing + smallest_missing > target
    assert_zero_missing(model)


@pytest.mark.parametrize("seed", range(12))
def test_weight_counts_are_exact_after_sparsify_and_every_update(seed: int) -> None:
    model = bank(seed)
    density = (0.05, 0.1, 0.37, 0.5, 0.8, 0.99)[seed % 6]
    sparsefx.sparsify(model, density, distribution="erk" if seed >= 6 else "uniform", seed=seed)
    assert_exact(model, density)
    optimizer = attach(model, weight_decay=1e-3, nesterov=True)
    for _ in train(model, optimizer, model.size, 12):
        assert_exact(model, density)
        assert all(mask.any() for mask in sparsefx.masks(model).values())
    assert len(model.scheduler.history) == 6


def test_uniform_gives_every_layer_the_density_to_within_one_weight() -> None:
    model = sparsefx.sparsify(net(), 0.13)
    for name, mask in sparsefx.masks(model).items():
        assert abs(int(mask.sum()) - 0.13 * mask.numel()) <= 1, name


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_erk_density_is_proportional_to_the_sum_over_the_product_of_dimensions(density: float) -> None:
    model = sparsefx.sparsify(net(), density, distribution="erk")
    masks = sparsefx.masks(model)
    raw = {name: sum(mask.shape) / mask.numel() for name, mask in masks.items()}
    partial = {name: int(mask.sum()) for name, mask in masks.items() if not mask.all()}
    scales = [(count - 0.5) / masks[name].numel() / raw[name] for name, count in partial.items()]
    upper = [(count + 1.5) / masks[name].numel() / raw[name] for name, count in partial.items()]
    assert max(scales) <= min(upper)  # one common scale explains every layer to within rounding
    assert all(raw[name] * max(scales) >= 0.9 for name in masks if name not in partial)
    assert_exact(model, density)


def test_a_dict_fixes_named_layers_and_the_rest_keeps_the_total() -> None:
    model = sparsefx.sparsify(net(), 0.2, distribution={"0": 1.0, "7": 0.5})
    masks = sparsefx.masks(model)
    assert masks["0.weight"].all()
    assert int(masks["7.weight"].sum()) == 40
    assert_exact(model, 0.2)
    rest = [masks[name] for name in ("2.weight", "5.weight")]
    share = (round(0.2 * sum(m.numel() for m in masks.values())) - 216 - 40) / sum(m.numel() for m in rest)
    for mask in rest:
        assert abs(int(mask.sum()) - share * mask.numel()) <= 1


@pytest.mark.parametrize(
    "distribution",
    [{"0": 1.0, "5": 1.0}, {"0": 0.2, "2": 0.2, "5": 0.2, "7": 0.3}, {"nope": 0.5}, {"0": 0.0}, {"0": 1.5}, "normal"],
)
def test_a_distribution_that_misses_the_density_raises_and_leaves_the_model(distribution: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DensityError):
        sparsefx.sparsify(model, 0.1, distribution=distribution)
    assert_untouched(model, state)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, 5, True, "0.1", None])
def test_a_density_outside_0_to_1_raises_and_leaves_the_model(density: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DensityError, match="density"):
        sparsefx.sparsify(model, density)
    assert_untouched(model, state)


def assert_untouched(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert type(model) is nn.Sequential
    assert [type(m) for m in model] == [type(m) for m in net()]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "scheduler")


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_units_stay_whole_and_the_count_never_drifts(granularity: Any, density: float) -> None:
    torch.manual_seed(0)
    model = Bank(
        [nn.Linear(31, 17), nn.Conv2d(5, 11, 3, padding=1), nn.ConvTranspose2d(6, 7, 2), nn.Conv2d(4, 6, 3, groups=2)],
        [(3, 31), (2, 5, 4, 4), (2, 6, 3, 3), (2, 4, 3, 3)],
    )
    sparsefx.sparsify(model, density, granularity=granularity)
    assert_whole_units(model, granularity, density)
    optimizer = attach(model)
    moved = 0
    for step in train(model, optimizer, model.size, 16):
        assert_zero_missing(model)
        if step % 2 == 0:
            assert_whole_units(model, granularity, density)
            moved += sum(row["grown"] for row in model.scheduler.history[-1]["layers"].values())
    assert moved > 0


@pytest.mark.parametrize("granularity", ["channel", ("channel", "in"), ("column", 8), ("block", 8, 8)], ids=str)
def test_no_room_for_one_unit_a_layer_raises_and_leaves_the_model(granularity: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DensityError, match="density"):
        sparsefx.sparsify(model, 0.01, granularity=granularity)
    assert_untouched(model, state)


@pytest.mark.parametrize(
    "granularity",
    [
        "filter",
        "columns",
        ("column",),
        ("column", 0),
        ("column", 2.0),
        ("block", 2),
        ("block", -1, 2),
        ("channel", "x"),
        3,
    ],
    ids=str,
)
def test_an_unknown_granularity_raises_and_leaves_the_model(granularity: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsefxError, match="granularity"):
        sparsefx.sparsify(model, 0.2, granularity=granularity)
    assert_untouched(model, state)


def test_masks_are_the_same_without_a_seed_and_differ_between_seeds() -> None:
    def draw(seed: int | None) -> list[Tensor]:
        torch.manual_seed(torch.seed())
        torch.rand(int(torch.randint(1, 9, ())))
        return list(sparsefx.masks(sparsefx.sparsify(net(), 0.2, seed=seed)).values())

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(draw(None), draw(None))
    assert same(draw(3), draw(3))
    assert not same(draw(3), draw(4))


def test_sparsify_leaves_the_global_random_state() -> None:
    torch.manual_seed(0)
    model = net()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sparsefx.sparsify(model, 0.2)
    assert torch.equal(torch.get_rng_state(), before)


class Shared(nn.Module):
    """Two layers with one weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.view(1, 12)).tanh()).tanh())


def test_shared_weights_have_one_mask_counted_once() -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(Shared(), 0.3)
    assert model.first.weight is model.second.weight
    assert counts(model) == (round(0.3 * (144 + 48)), 144 + 48)
    optimizer = attach(model)
    start = model.first.weight_mask.clone()
    for _ in train(model, optimizer, 12, 8):
        assert torch.equal(model.first.weight_mask, model.second.weight_mask)
        assert_exact(model, 0.3)
    assert not torch.equal(start, model.first.weight_mask)


def test_frozen_layers_keep_their_masks_and_the_rest_the_total() -> None:
    torch.manual_seed(0)
    model = net(torch.float32)
    model[2].weight.requires_grad_(False)
    sparsefx.sparsify(model, 0.2)
    before = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    weight = model[2].weight.detach().clone()
    optimizer = attach(model)
    for batch in batches(8, torch.float32):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, 0.2)
    moved = {name for name, mask in sparsefx.masks(model).items() if not torch.equal(mask, before[name])}
    assert moved == {"0.weight", "5.weight", "7.weight"}
    assert torch.equal(model[2].weight, weight)


def test_a_layer_frozen_during_training_and_thawed_again() -> None:
    model = sparsefx.sparsify(net(torch.float32), 0.2)
    optimizer = attach(model)
    for step, batch in enumerate(batches(12, torch.float32)):
        model[5].weight.requires_grad_(not 4 <= step < 8)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, 0.2)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(12, 12)
        self.unused = nn.Linear(12, 12)
        self.sometimes = nn.Linear(12, 12)
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.used(x.view(1, 12))
        return self.sometimes(y) if self.flag else y


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.filterwarnings("ignore::sparsefx.errors.SparsefxWarning")
def test_unused_layers_keep_their_masks_and_the_rest_the_total(set_to_none: bool) -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(Unused(), 0.3)
    before = model.unused.weight_mask.clone()
    optimizer = attach(model)
    for step in range(12):
        model.flag = step % 3 != 1
        model(torch.randn(12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert_exact(model, 0.3)
    assert torch.equal(model.unused.weight_mask, before)
    assert len(model.scheduler.history) == 6


@pytest.mark.parametrize("when", ["before", "after", "during"])
def test_channels_last_weights_keep_exact_counts(when: str) -> None:
    model = net(torch.float32)
    expected = sparsefx.masks(sparsefx.sparsify(net(torch.float32), 0.2))
    if when == "before":
        model.to(memory_format=torch.channels_last)
    sparsefx.sparsify(model, 0.2)
    if when == "after":
        model.to(memory_format=torch.channels_last)
    assert all(torch.equal(mask, expected[name]) for name, mask in sparsefx.masks(model).items())
    optimizer = attach(model)
    for step, batch in enumerate(batches(8, torch.float32)):
        if when == "during" and step == 3:
            model.to(memory_format=torch.channels_last)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, 0.2)


def test_updates_are_the_same_in_both_memory_formats() -> None:
    """Ties and order follow the weight's index, not its memory: equal values give equal masks."""
    results = []
    for channels_last in (False, True):
        model = sparsefx.sparsify(net(), 0.3, seed=1)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = attach(model, momentum=0.9)
        for batch in batches(6):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(sparsefx.masks(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_density_one_is_the_dense_model_with_no_hook() -> None:
    model, dense = net(), net()
    sparsefx.sparsify(model, 1.0)
    assert all(mask.all() for mask in sparsefx.masks(model).values())
    optimizers = [SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, dense)]
    model.scheduler.attach(optimizers[0], steps_per_update=2, total_steps=100)
    assert not optimizers[0]._optimizer_step_post_hooks
    assert all(not p._backward_hooks for p in model.parameters())
    for batch in batches(6):
        for each, optimizer in zip((model, dense), optimizers, strict=True):
            loss_of(each, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_where_almost_everything_exists_updates_still_keep_the_count() -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(net(torch.float32), 0.9995)
    existing, total = counts(model)
    assert total - existing == 1
    optimizer = attach(model)
    for batch in batches(10, torch.float32):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, 0.9995)


def test_one_weight_a_layer_is_the_least_and_stays() -> None:
    torch.manual_seed(0)
    model = Bank([nn.Linear(10, 10) for _ in range(4)], [(2, 10)] * 4)
    with pytest.raises(DensityError):
        sparsefx.sparsify(model, 0.0075)
    sparsefx.sparsify(model, 0.01)
    optimizer = attach(model)
    for _ in train(model, optimizer, model.size, 10):
        assert [int(mask.sum()) for mask in sparsefx.masks(model).values()] == [1, 1, 1, 1]


def test_an_untraceable_model_keeps_exact_counts() -> None:
    class Loop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.sum() > 0) + 1):
                x = self[0](x)
            return x

    torch.manual_seed(0)
    model = Loop(nn.Linear(12, 12), nn.Linear(12, 12))
    with pytest.warns(TraceWarning):
        sparsefx.sparsify(model, 0.25)(torch.randn(1, 12))
    optimizer = attach(model)
    for _ in range(6):
        model(torch.randn(1, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, 0.25)
