"""Compaction equals masked dense for every pattern of live channels."""

import pytest
import torch

from sparsefx.kernels.compaction import Compaction, live_channels
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.spec import ConvSpec

SPECS = {
    "linear": (None, (3, 2, 8), (6, 8)),
    "conv": (ConvSpec([2, 1], [1, 0], [1, 2], False, [0, 0], 1), (2, 8, 7, 9), (6, 8, 3, 3)),
    "transposed": (ConvSpec([2, 2], [1, 1], [1, 1], True, [1, 0], 1), (2, 8, 4, 5), (8, 6, 3, 3)),
}
LIVE = {"some": ([0, 3, 7], [1, 2]), "all in": (range(8), [5]), "all out": ([2], range(6)), "one": ([4], [0])}


@pytest.mark.parametrize("live", [*LIVE, "none"])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_masked_dense(kind, live, bias):
    spec, x_shape, w_shape = SPECS[kind]
    ins, outs = (list(v) for v in LIVE.get(live, ([], [])))
    transposed = kind == "transposed"
    mask = torch.zeros(w_shape, dtype=torch.bool)
    for o in outs:
        mask[(ins, o) if transposed else (o, ins)] = True
    x, weight = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64) * mask
    b = torch.randn(6, dtype=torch.float64) if bias else None
    compact = Compaction(mask, spec)
    assert [c.tolist() for c in live_channels(mask, transposed)] == [ins, outs]

    y = DENSE.fprop(spec, x, weight, b)
    grad = torch.randn_like(y)
    torch.testing.assert_close(compact.fprop(spec, x, weight, b), y)
    torch.testing.assert_close(compact.dgrad(spec, grad, x, weight), DENSE.dgrad(spec, grad, x, weight))
    torch.testing.assert_close(compact.wgrad(spec, grad, x, weight, mask), DENSE.wgrad(spec, grad, x, weight, mask))


def test_channels_last_stays():
    spec, x_shape, w_shape = SPECS["conv"]
    mask = torch.zeros(w_shape, dtype=torch.bool)
    mask[1, 2] = True
    x = torch.randn(x_shape).contiguous(memory_format=torch.channels_last)
    out = Compaction(mask, spec).fprop(spec, x, torch.randn(w_shape) * mask, None)
    assert out.is_contiguous(memory_format=torch.channels_last)
