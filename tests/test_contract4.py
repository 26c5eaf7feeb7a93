"""Contract 4 in training: exact counts and zeros after every update, whatever the layers are."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sparsefx
from sparsefx.errors import DensityError, TraceWarning
from tests.contract4 import assert_exact, attach, bank, counts, train
from tests.masked_dense import batches, loss_of, net
from tests.test_update_oracle import Bank


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


def test_density_one_runs_the_models_own_forward_and_nothing_else() -> None:
    shapes = []

    class Watched(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            shapes.append(tuple(input.shape))
            return super().forward(input)

    model = sparsefx.sparsify(Watched(nn.Linear(8, 4), nn.ReLU()), 1.0, example_inputs=torch.ones(2, 8))
    assert not shapes
    for n in (1, 2, 3):
        model(torch.ones(n, 8))
    assert shapes == [(1, 8), (2, 8), (3, 8)]


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
