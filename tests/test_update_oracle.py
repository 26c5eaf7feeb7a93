"""`scheduler.update()` against Algorithm 1 re-derived in NumPy (`tests/oracle.py`), on many random layer sets."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import DensityError
from tests import oracle


class Bank(nn.Module):
    """Layers side by side, each fed its own slice of one flat input."""

    def __init__(self, layers: list[nn.Module], shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shapes = shapes

    def forward(self, x: Tensor) -> Tensor:
        outputs, start = [], 0
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            size = int(np.prod(shape))
            outputs.append(layer(x[start : start + size].reshape(shape)).flatten())
            start += size
        return torch.cat(outputs)

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)


def random_layer(rng: np.random.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    kind = rng.choice(["linear", "conv", "grouped", "transposed", "one", "row"])
    a, b = (int(n) for n in rng.integers(1, 24, 2))
    if kind == "linear":
        return nn.Linear(a, b), (3, a)
    if kind == "conv":
        return nn.Conv2d(1 + a // 3, 1 + b // 3, 3, padding=1), (2, 1 + a // 3, 4, 4)
    if kind == "grouped":
        return nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 3, 3)
    if kind == "transposed":
        return nn.ConvTranspose2d(3, 5, 2), (2, 3, 3, 3)
    if kind == "one":
        return nn.Linear(1, 1), (3, 1)
    return nn.Linear(a, 1, bias=False), (3, a)


def random_bank(rng: np.random.Generator) -> Bank:
    layers, shapes = zip(*(random_layer(rng) for _ in range(rng.integers(1, 6))), strict=True)
    return Bank(list(layers), list(shapes)).to(torch.float64 if rng.random() < 0.5 else torch.float32)


def make_sparse(bank: Bank, rng: np.random.Generator, seed: int) -> bool:
    """Sparsify at a random density, some layers full where that leaves a density for the others."""
    density = float(rng.choice([0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95]))
    full = {f"layers.{i}": 1.0 for i in range(len(bank.layers)) if rng.random() < 0.3}
    config = sparsefx.SparseMomentum(prune_rate=float(rng.uniform(0.1, 0.9)), dense_grad_window="always")
    for distribution in (full, "uniform"):
        try:
            sparsefx.sparsify(bank, density, scheduler=config, distribution=distribution, seed=seed)
            return True
        except DensityError:
            continue
    return False


def craft_(bank: Bank, optimizer: torch.optim.SGD, rng: np.random.Generator) -> None:
    """Replace weights and momentum by values that reach the edge cases: unequal layers, ties, zeros."""
    style = rng.choice(["as trained", "unequal", "ties", "zero momentum", "zero weights"])
    for name, mask in sparsefx.masks(bank).items():
        weight = bank.get_parameter(name)
        moment = optimizer.state[weight]["momentum_buffer"]
        with torch.no_grad():
            if style == "unequal":
                moment.copy_(torch.from_numpy(rng.standard_normal(moment.shape) * 10 ** rng.uniform(-3, 3)))
            elif style == "ties":
                moment.copy_(torch.from_numpy(rng.integers(-2, 3, moment.shape)))
                weight.copy_(torch.from_numpy(rng.integers(-2, 3, weight.shape)) * mask)
            elif style == "zero momentum":
                moment.zero_()
            elif style == "zero weights":
                weight.zero_()


def snapshot(bank: Bank, optimizer: torch.optim.SGD) -> list[oracle.Layer]:
    return [
        oracle.Layer(
            bank.get_parameter(name).detach().numpy().copy(),
            mask.numpy().copy(),
            optimizer.state[bank.get_parameter(name)]["momentum_buffer"].numpy().copy(),
        )
        for name, mask in sparsefx.masks(bank).items()
    ]


def check_update(bank: Bank, optimizer: torch.optim.SGD, target: int) -> oracle.Update:
    """Run one update and compare masks, counts and what grew with the oracle's."""
    before = snapshot(bank, optimizer)
    expected = oracle.update(before, bank.scheduler.prune_rate, target)
    bank.scheduler.update()
    rows = bank.scheduler.history[-1]["layers"]
    for i, (name, mask) in enumerate(sparsefx.masks(bank).items()):
        np.testing.assert_array_equal(mask.numpy(), expected.masks[i], err_msg=name)
        assert (rows[name]["removed"], rows[name]["grown"]) == (expected.removed[i], expected.grown[i])
        assert rows[name]["nnz"] == expected.masks[i].sum()
        weight = bank.get_parameter(name).detach().numpy()
        pruned = oracle.prune(before[i], expected.removed[i])
        np.testing.assert_array_equal(weight, np.where(pruned & mask.numpy(), before[i].weight, 0), err_msg=name)
        moment = optimizer.state[bank.get_parameter(name)]["momentum_buffer"].numpy()
        np.testing.assert_array_equal(moment[mask.numpy()], before[i].moment[mask.numpy()], err_msg=name)
    assert sum(int(mask.sum()) for mask in sparsefx.masks(bank).values()) == target
    return expected


def train_step(bank: Bank, optimizer: torch.optim.SGD, generator: torch.Generator) -> None:
    x = torch.randn(bank.size, generator=generator, dtype=next(bank.parameters()).dtype)
    out = bank(x)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def attach(bank: Bank) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.01, momentum=0.9)
    bank.scheduler.attach(optimizer, steps_per_update=10**6, total_steps=10**7)
    return optimizer


@pytest.mark.parametrize("seed", range(60))
def test_random_layer_sets_agree_with_algorithm_1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    bank = random_bank(rng)
    while not make_sparse(bank, rng, seed):
        bank = random_bank(rng)
    target = sum(int(mask.sum()) for mask in sparsefx.masks(bank).values())
    optimizer = attach(bank)
    for _ in range(4):
        train_step(bank, optimizer, generator)
        craft_(bank, optimizer, rng)
        check_update(bank, optimizer, target)


def two_layers(first: nn.Linear, second: nn.Linear, distribution: dict[str, float], density: float) -> Bank:
    bank = Bank([first, second], [(3, first.in_features), (3, second.in_features)]).double()
    config = sparsefx.SparseMomentum(prune_rate=0.5, dense_grad_window="always")
    return sparsefx.sparsify(bank, density, scheduler=config, distribution=distribution)


def set_moments_(bank: Bank, optimizer: torch.optim.SGD, *scales: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, scale in zip(sparsefx.masks(bank), scales, strict=True):
        moment = optimizer.state[bank.get_parameter(name)]["momentum_buffer"]
        moment.copy_(scale * torch.rand(moment.shape, generator=generator, dtype=moment.dtype).add_(0.5))


def test_what_exceeds_a_layers_room_goes_to_the_others() -> None:
    bank = two_layers(nn.Linear(4, 4), nn.Linear(20, 20), {"layers.0": 0.5}, 0.5)
    optimizer = attach(bank)
    train_step(bank, optimizer, torch.Generator().manual_seed(0))
    set_moments_(bank, optimizer, 1e6, 1.0)
    expected = check_update(bank, optimizer, 208)
    assert expected.removed == [4, 100]
    assert expected.grown == [12, 92]  # the first layer wants all 104 and has room for 12


def test_a_full_layer_that_grows_keeps_its_weights_and_passes_its_share_on() -> None:
    bank = two_layers(nn.Linear(5, 5), nn.Linear(20, 20), {"layers.0": 1.0}, 0.5)
    optimizer = attach(bank)
    train_step(bank, optimizer, torch.Generator().manual_seed(0))
    set_moments_(bank, optimizer, 10.0, 1.0)
    expected = check_update(bank, optimizer, round(0.5 * 425))
    assert expected.removed[0] == expected.grown[0] == 0


def test_a_full_layer_that_shrinks_is_pruned_like_any_other() -> None:
    bank = two_layers(nn.Linear(5, 5), nn.Linear(20, 20), {"layers.0": 1.0}, 0.5)
    optimizer = attach(bank)
    train_step(bank, optimizer, torch.Generator().manual_seed(0))
    set_moments_(bank, optimizer, 1e-9, 1.0)
    expected = check_update(bank, optimizer, round(0.5 * 425))
    assert expected.removed[0] == 12
    assert expected.grown[0] == 0


def test_exactly_a_fifth_missing_is_not_nearly_dense() -> None:
    bank = two_layers(nn.Linear(10, 10), nn.Linear(20, 20), {"layers.0": 0.8}, 0.5)
    optimizer = attach(bank)
    train_step(bank, optimizer, torch.Generator().manual_seed(0))
    set_moments_(bank, optimizer, 10.0, 1.0)
    assert check_update(bank, optimizer, 250).removed[0] == 40


def test_a_layer_of_one_weight_never_empties() -> None:
    bank = two_layers(nn.Linear(1, 1), nn.Linear(20, 20), {"layers.0": 1.0}, 0.1)
    optimizer = attach(bank)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        train_step(bank, optimizer, generator)
        set_moments_(bank, optimizer, 0.0, 1.0)
        assert check_update(bank, optimizer, 40).removed[0] == 0


def test_equal_magnitudes_go_and_come_by_row_major_index() -> None:
    bank = two_layers(nn.Linear(8, 8), nn.Linear(8, 8), {"layers.0": 0.5}, 0.5)
    optimizer = attach(bank)
    train_step(bank, optimizer, torch.Generator().manual_seed(0))
    for name, mask in sparsefx.masks(bank).items():
        optimizer.state[bank.get_parameter(name)]["momentum_buffer"].fill_(1.0)
        with torch.no_grad():
            bank.get_parameter(name).copy_(mask)
    check_update(bank, optimizer, 64)
