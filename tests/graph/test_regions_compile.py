"""Regions under torch.compile: one graph, no recompilation, the same results (contract 8)."""

import pytest
import torch

from tests.graph.region_nets import assert_compiles_once, in_regions

__all__ = ["in_regions"]


@pytest.mark.usefixtures("in_regions")
@pytest.mark.parametrize("kind", ["resnet", "vgg"])
def test_a_region_compiles_whole_and_follows_its_masks(kind):
    assert_compiles_once(kind, torch.randn(6, 3, 12, 12))
