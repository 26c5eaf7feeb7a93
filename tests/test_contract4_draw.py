"""Contract 4 at the start: densities and distributions are reached exactly, or refused; draws repeat."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsefx
from sparsefx.errors import DensityError
from tests.contract4 import (
    assert_exact,
    assert_untouched,
)
from tests.masked_dense import net


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
