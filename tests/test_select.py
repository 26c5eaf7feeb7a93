"""Selection of k entries, and the rules that use it."""

import pickle

import numpy as np
import pytest
import torch

from sparsefx.algorithms import resolve
from sparsefx.algorithms.registry import Rule
from sparsefx.algorithms.select import largest, smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_selection_is_that_of_a_stable_sort(dtype, seed):
    """Scores of a few distinct values, so that most of them are tied."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-3, 4, (97,), generator=generator).to(dtype)
    among = torch.rand(97, generator=generator) < 0.6
    open_to = among.nonzero().squeeze(1).numpy()
    for k in (0, 1, 7, 30, len(open_to) - 1, len(open_to), len(open_to) + 5):
        for select, sign in ((largest, -1), (smallest, 1)):
            order = np.argsort(sign * score.double().numpy()[open_to], kind="stable")
            expected = np.zeros(97, dtype=bool)
            expected[open_to[order[:k]]] = True
            assert np.array_equal(select(score, k, among).numpy(), expected)


def test_a_rule_that_has_run_can_be_pickled():
    """A model's scheduler carries its rules."""
    mask = torch.zeros(8, dtype=torch.bool)

    def draw(rule: Rule) -> torch.Tensor:
        return rule(mask, mask, 3, generator=torch.Generator().manual_seed(0))

    rule = resolve("grow", "random")
    first = draw(rule)
    assert int(first.sum()) == 3
    assert torch.equal(draw(pickle.loads(pickle.dumps(rule))), first)
