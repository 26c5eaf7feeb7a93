"""LinearPlan against the dense linear layer in float64."""

from dataclasses import replace

import pytest
import torch

from sparsefx.kernels.cpu import LinearPlan
from tests.kernels.cpu.helpers import error

# rows, in, out, density
CASES = {
    "plain": (64, 48, 32, 0.1),
    "one_row": (1, 100, 10, 0.2),
    "few_rows": (3, 33, 65, 0.2),
    "primes": (37, 101, 53, 0.1),
    "single_weight": (20, 1, 1, 1.0),
    "empty_mask": (17, 20, 30, 0.0),
    "full_mask": (33, 20, 30, 1.0),
}


def _layer(case, dtype=torch.float32):
    rows, inputs, outputs, density = case
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(outputs, inputs, generator=generator) < density
    w = (torch.randn(mask.shape, generator=generator) * mask).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    g = torch.randn(rows, outputs, generator=generator).to(dtype)
    return mask, w, x, torch.randn(outputs, generator=generator), g


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_passes_equal_dense(case, dtype, bound, isa):
    mask, w, x, b, g = _layer(case, dtype)
    p = LinearPlan(mask, isa)
    assert error(p.fprop(x, w, b), x.double() @ w.double().T + b.double()) < bound
    assert error(p.fprop(x, w, b, relu=True), (x.double() @ w.double().T + b.double()).relu()) < bound
    assert error(p.dgrad(g, w), g.double() @ w.double()) < bound
    assert error(p.wgrad(g, x), (g.double().T @ x.double()) * mask) < bound


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 14, 20, 24, 28])
def test_outputs_of_any_number_of_weights(batch, isa):
    """None, each remainder of what shares a vector, and more than wait to be summed; tiles of few and many images."""
    if batch > {"avx512": 28, "avx2": 6, "portable": 3}[isa]:
        pytest.skip("such a tile has more vectors than there are registers")
    counts = [*range(11), 63, 64, 65, 66, 67, 131, 200]
    mask = torch.zeros(len(counts), 200, dtype=torch.bool)
    generator = torch.Generator().manual_seed(6)
    for row, n in zip(mask, counts, strict=True):
        row[torch.randperm(200, generator=generator)[:n]] = True
    x, g = (torch.randn(450, n, generator=generator) for n in (200, len(counts)))
    p = LinearPlan(mask, isa)
    for chunk in (200, 67, 9):
        p.tune("wgrad", replace(p.tiling("wgrad", 1, 1, 450)[0], batch=batch, chunk=chunk))
        assert error(p.wgrad(g, x), (g.double().T @ x.double()) * mask) < 1e-5


def test_a_weight_of_another_type_or_layout_and_collected_values_give_the_same():
    mask, w, x, b, g = _layer(CASES["primes"], torch.bfloat16)
    p = LinearPlan(mask)
    out, values = p.run("fprop", x, w, b.float())
    assert torch.equal(values, w[mask].float())
    for weight in (values, w.float(), w.T.contiguous().T):
        assert torch.equal(p.fprop(x, weight, b.float()), out)
    assert torch.equal(p.dgrad(g, values), p.dgrad(g, w))


@pytest.mark.parametrize("inputs", [9, 16, 37, 200])
@pytest.mark.parametrize("chunk", [1, 7, 103])
def test_features_that_no_weight_reads_lie_between_others(inputs, chunk, isa):
    """At the first and the last features too, where vectors of neighbours do not fit into a row."""
    generator = torch.Generator().manual_seed(8)
    mask = torch.rand(50, inputs, generator=generator) < 0.3
    mask[:, torch.rand(inputs, generator=generator) < 0.4] = False
    mask[:, inputs // 2] = True
    w, x, g = torch.randn(50, inputs) * mask, torch.randn(35, inputs), torch.randn(35, 50)
    p = LinearPlan(mask, isa)
    for kind in ("fprop", "wgrad"):
        p.tune(kind, replace(p.tiling(kind, 1, 1, 35)[0], chunk=chunk))
    assert error(p.fprop(x, w), x.double() @ w.double().T) < 1e-5
    assert error(p.dgrad(g, w), g.double() @ w.double()) < 1e-5
    assert error(p.wgrad(g, x), (g.double().T @ x.double()) * mask) < 1e-5


@pytest.mark.parametrize("rows", [16, 100])
def test_teams_share_a_small_weight_gradient(rows, monkeypatch):
    """Its rows fit one strip, so that threads share the weights; some get no chunk of inputs."""
    mask = torch.rand(300, 40) < 0.1
    g, x = torch.randn(rows, 300), torch.randn(rows, 40)
    want = (g.double().T @ x.double()) * mask
    for team in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda team=team: team)
        assert error(LinearPlan(mask).wgrad(g, x), want) < 1e-5


def test_wrong_features_raise():
    mask, w, x, *_ = _layer(CASES["plain"])
    with pytest.raises(ValueError, match="flatten"):
        LinearPlan(mask).fprop(x[:, :7].contiguous(), w)
    with pytest.raises(ValueError, match="from this layer's mask"):
        LinearPlan(mask).fprop(x, w[:7])
    with pytest.raises(ValueError, match="bool"):
        LinearPlan(w)
