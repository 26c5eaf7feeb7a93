"""Units, densities and allotments."""

import math

import pytest
import torch

from sparsefx.algorithms.place import magnitude_masks, place, random_masks
from sparsefx.config import Granularity
from sparsefx.errors import DensityError, GranularityError
from sparsefx.masks import Units, allot, density_erk, density_fixed, largest_remainder, target_count

SHAPES = [torch.Size(s) for s in [(7, 5), (6, 4, 3, 3), (1, 9), (10, 3, 5)]]
GRANULARITIES = ["weight", ("column", 4), "channel", ("channel", "in"), ("block", 2, 3)]


@pytest.mark.parametrize("spec", GRANULARITIES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_units_cover_every_weight_once(shape, spec, transposed):
    units = Units.of(shape, Granularity.parse(spec), transposed)
    number = units.expand(torch.arange(units.count))
    assert number.shape == shape
    assert torch.equal(torch.bincount(number.flatten(), minlength=units.count), units.sizes())
    weight = torch.rand(shape, dtype=torch.float64)
    sums = torch.zeros(units.count, dtype=torch.float64).index_add_(0, number.flatten(), weight.flatten())
    torch.testing.assert_close(units.reduce(weight), sums)


def test_channel_units_are_output_and_input_channels():
    shape = torch.Size((6, 4, 3, 3))
    out = Units.of(shape, Granularity.parse("channel")).expand(torch.arange(6))
    assert torch.equal(out, torch.arange(6).view(6, 1, 1, 1).expand(shape))
    ins = Units.of(shape, Granularity.parse(("channel", "in"))).expand(torch.arange(4))
    assert torch.equal(ins, torch.arange(4).view(1, 4, 1, 1).expand(shape))
    turned = Units.of(shape, Granularity.parse("channel"), transposed=True).expand(torch.arange(4))
    assert torch.equal(turned, torch.arange(4).view(1, 4, 1, 1).expand(shape))


@pytest.mark.parametrize("bad", ["weights", ("column",), ("column", 0), ("block", 2), 3, None, ("column", 2.0)])
def test_unknown_granularity_is_an_error(bad):
    with pytest.raises(GranularityError, match="granularity: expected"):
        Granularity.parse(bad)


def test_largest_remainder_is_exact_and_prefers_earlier_on_ties():
    assert largest_remainder([1, 1, 1], 5) == [2, 2, 1]
    assert largest_remainder([0.5, 0.25, 0.25], 4) == [2, 1, 1]
    assert largest_remainder([0, 0], 3) == [2, 1]
    assert sum(largest_remainder([math.pi, math.e, 1e-9], 10**9 + 7)) == 10**9 + 7


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 1.0])
def test_erk_keeps_the_overall_density_and_caps_layers_at_one(density):
    shapes = [torch.Size(s) for s in [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 1, 1), (10, 128)]]
    densities = density_erk(shapes, density)
    sizes = [s.numel() for s in shapes]
    assert all(0 < d <= 1 for d in densities)
    assert sum(d * s for d, s in zip(densities, sizes, strict=True)) == pytest.approx(density * sum(sizes))


def test_erk_is_proportional_to_the_papers_rule():
    shapes = [torch.Size((64, 32, 3, 3)), torch.Size((256, 128))]
    first, second = density_erk(shapes, 0.01)
    rule = [(64 + 32 + 3 + 3) / (64 * 32 * 3 * 3), (256 + 128) / (256 * 128)]
    assert first / second == pytest.approx(rule[0] / rule[1])


def test_fixed_densities_share_what_is_left():
    assert density_fixed(["a", "b"], [100, 300], 0.1, {"a": 0.25}) == [0.25, pytest.approx(0.05)]
    with pytest.raises(DensityError, match="unknown|names of sparse layers"):
        density_fixed(["a"], [100], 0.1, {"c": 0.5})
    with pytest.raises(DensityError, match="room"):
        density_fixed(["a", "b"], [100, 300], 0.1, {"a": 0.9})
    with pytest.raises(DensityError, match="pass density=0.25"):
        density_fixed(["a"], [100], 0.1, {"a": 0.25})


@pytest.mark.parametrize("spec", GRANULARITIES)
@pytest.mark.parametrize("density", [0.2, 0.37, 0.8, 1.0])
def test_random_masks_hold_whole_units_up_to_the_target(spec, density):
    units = [Units.of(s, Granularity.parse(spec)) for s in SHAPES]
    try:
        counts = allot(units, [density] * len(units), density)
    except DensityError:
        assert sum(u.whole for u in units) > density * sum(s.numel() for s in SHAPES)
        return
    masks = random_masks(units, counts, seed=3)
    target = target_count(density, sum(s.numel() for s in SHAPES))
    total = sum(int(m.sum()) for m in masks)
    missing = [u.sizes()[~u.of_mask(m)] for u, m in zip(units, masks, strict=True)]
    smallest = min((int(m.min()) for m in missing if len(m)), default=0)
    assert total <= target
    assert total == target if spec == "weight" else smallest == 0 or target - total < smallest
    for unit, mask in zip(units, masks, strict=True):
        assert mask.any()
        assert torch.equal(unit.expand(unit.of_mask(mask)), mask)


def test_random_masks_repeat_by_seed():
    units = [Units.of(s, Granularity.parse("weight")) for s in SHAPES]
    counts = allot(units, [0.3] * len(units), 0.3)
    first, same, other = (random_masks(units, counts, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_low_a_density_is_an_error():
    units = [Units.of(s, Granularity.parse("channel")) for s in SHAPES]
    with pytest.raises(DensityError, match="one unit in each of 4 layers"):
        allot(units, [0.01] * 4, 0.01)


def test_magnitude_masks_take_the_largest():
    weight = torch.tensor([[0.1, -3.0, 0.2], [2.0, 0.0, -1.0]])
    (mask,) = magnitude_masks([Units.of(weight.shape, Granularity.parse("weight"))], [weight], [3])
    assert mask.tolist() == [[False, True, False], [True, False, True]]


def test_place_gives_what_does_not_fit_to_layers_where_it_does():
    units = [
        Units.of(torch.Size((4, 5)), Granularity.parse("channel")),
        Units.of(torch.Size((6, 2)), Granularity.parse("channel")),
    ]

    scores = [torch.rand(4), torch.rand(6)]

    def grow(layer, mask, k):
        new = mask.clone()
        new[torch.where(mask, -1.0, scores[layer]).topk(k).indices] = True
        return new

    masks = [torch.zeros(4, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)]
    grown = place(grow, units, masks, [8, 3])
    assert [int(g.sum()) for g in grown] == [1, 3]
