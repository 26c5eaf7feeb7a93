"""What masking computes in one pass equals torch's own operators to the bit, whatever the tensors look like."""

import pytest
import torch

from sparsefx.kernels import masking
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.cpu.build import supported_isas

SHAPES = {"odd": (4099,), "chunks": (7, 4681), "conv": (37, 19, 3, 3), "small": (5, 3)}


def tensors(shape, count, dtype=torch.float32, memory_format=torch.contiguous_format):
    mask = torch.rand(shape) < 0.3
    found = [torch.randn(shape).to(dtype) for _ in range(count)]
    for x in found:
        x.view(-1)[::97] = float("nan")
        x.view(-1)[::101] = float("inf")
    if len(shape) == 4:
        mask, *found = (t.contiguous(memory_format=memory_format) for t in (mask, *found))
    return mask, *found


def equal(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_masked(shape, dtype, threads):
    torch.set_num_threads(threads)
    mask, x = tensors(shape, 1, dtype)
    before = x.clone()
    assert equal(masking.masked(x, mask), x.masked_fill(~mask, 0))
    assert equal(x, before)
    version = x._version
    assert masking.masked_(x, mask) is x
    assert equal(x, before.masked_fill(~mask, 0))
    assert x._version == version + 1


@pytest.mark.parametrize("mask_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last(mask_format):
    mask, x = tensors(SHAPES["conv"], 1, memory_format=torch.channels_last)
    mask = mask.contiguous(memory_format=mask_format)
    expected = x.clone().masked_fill_(~mask, 0)
    assert torch.equal(masking.masked(x, mask).nan_to_num(7.5), expected.nan_to_num(7.5))
    assert equal(masking.masked_(x.clone(), mask), expected)


def test_a_1x1_convolution_in_channels_last_lies_as_its_mask():
    weight = torch.randn(37, 19, 1, 1)
    mask, last = weight < 0.3, weight.as_strided(weight.shape, (19, 1, 19, 19))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert masking._library(last, mask) is masking._library(weight, mask)
    assert torch.equal(masking.masked(last, mask), weight.masked_fill(~mask, 0))
    assert masking._library(weight.transpose(0, 1), mask.transpose(0, 1)) is None


def test_a_gradient_that_is_differentiated_again_stays_in_the_graph():
    mask, x = tensors((4099,), 1)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(masking.masked(x, mask).sum(), x)
    assert torch.equal(grad, mask.float())


@pytest.mark.parametrize("threads", [1, 3])
def test_fold(threads):
    """Several at once, one of them in double, which C++ does not take."""
    torch.set_num_threads(threads)
    folds, expected, versions = [], [], []
    for shape in SHAPES.values():
        mask, moment, collected = tensors(shape, 2, torch.float64 if shape == SHAPES["small"] else torch.float32)
        weight = torch.randn(shape, dtype=moment.dtype, requires_grad=True)
        seen, alpha = 0.25 / len(shape), 0.5
        folded = torch.where(mask, moment, moment + alpha * (collected * seen))
        expected.append((folded, torch.where(mask, weight.detach(), 0.0)))
        folds.append(masking.Fold(moment, collected, weight, mask, seen, alpha))
        versions.append((moment._version, weight._version))
    masking.fold_missing_(folds)
    for fold, (moment, kept), before in zip(folds, expected, versions, strict=True):
        finite = moment.isfinite()
        torch.testing.assert_close(fold.moment[finite], moment[finite], rtol=1e-6, atol=1e-6)
        assert torch.equal(fold.moment.isnan(), moment.isnan())
        assert torch.equal(fold.moment[fold.mask].nan_to_num(), moment[fold.mask].nan_to_num())
        assert torch.equal(fold.weight.detach(), kept)
        assert fold.moment._version > before[0]
        assert fold.weight._version > before[1]


def test_products_are_right_and_do_not_depend_on_threads_or_neighbours():
    pairs = [(torch.randn(n), torch.randn(n)) for n in (70_001, 5, 16_384, 40_000)]
    turned = torch.randn(300, 200).T, torch.randn(300, 200).T  # torch's own
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        together = masking.products([*pairs[:2], turned, *pairs[2:]])
        assert together.pop(2) == pytest.approx(
            (float((turned[0] * turned[1]).sum()), float(turned[1].norm()) ** 2), rel=1e-4, abs=0.1
        )
        found += together, [masking.products([pair])[0] for pair in pairs]
    assert all(one == found[0] for one in found)
    for (a, b), sums in zip(pairs, found[0], strict=True):
        assert sums == pytest.approx((float(a.double() @ b.double()), float(b.double() @ b.double())), rel=1e-12)
    assert masking.products([]) == []


def test_products_of_a_masked_gradient_with_its_dense_one_are_equal():
    mask = torch.rand(50_000) < 0.05
    dense = torch.randn(50_000)
    ((first, second),) = masking.products([(dense, masking.masked(dense, mask))])
    assert first == second


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("size", [10, 10_001])
def test_any_nonzero(value, size):
    x = torch.zeros(size)
    x[size // 2] = value
    assert masking.any_nonzero(x) == (value != 0)


def test_a_masked_product_of_any_tensors(monkeypatch):
    o, i = 111, 148
    mask = torch.rand(o, i) < 0.5
    cases = {
        "rows": (torch.randn(5, o), torch.randn(5, i)),
        "batches": (torch.randn(2, 3, o), torch.randn(2, 3, i)),
        "expanded": (torch.ones(1, 1).expand(5, o), torch.randn(i, 5).T),
        "deep": (torch.randn(1000, o), torch.randn(1000, i)),
        "float64": (torch.randn(5, o).double(), torch.randn(5, i).double()),
    }
    for compiler in (True, False):
        if not compiler:
            monkeypatch.setattr(masking, "_loaded", lambda: None)
        for name, (g, x) in cases.items():
            wanted = torch.einsum("no,ni->oi", g.double().reshape(-1, o), x.double().reshape(-1, i))
            for keep in (False, True):
                masked, dense = masking.masked_product(g, x, mask, keep=keep)
                torch.testing.assert_close(masked.double(), wanted * mask, rtol=1e-4, atol=1e-4, msg=name)
                assert (dense is not None) is keep
                if dense is not None:
                    torch.testing.assert_close(dense.double(), wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_a_masked_product_that_is_differentiated_again_stays_in_the_graph():
    mask = torch.rand(150, 130) < 0.5
    g, x = torch.randn(5, 150, requires_grad=True), torch.randn(5, 130)
    (grad,) = torch.autograd.grad(masking.masked_product(g, x, mask)[0].sum(), g)
    torch.testing.assert_close(grad, x @ mask.float().T)


@pytest.mark.parametrize("isa", [*supported_isas(), None])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200_003])
def test_bits_tell_a_mask_from_one_that_differs_anywhere(isa, n, monkeypatch):
    monkeypatch.setattr(masking, "_loaded", lambda: None if isa is None else load(isa))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.3
    bits = masking.MaskBits(mask)
    assert bits.same(mask.clone())
    for at in {0, n // 2, n - 1}:
        other = mask.clone()
        other[at] = ~other[at]
        assert not bits.same(other)


def test_one_of_many_masks_that_differs_is_found():
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.3 for n in (5, 64, 200_003)]
    pairs = [(masking.MaskBits(mask), mask) for mask in masks]
    together = masking.Masks(pairs)
    assert together.same()
    for mask in masks:
        mask[-1] = ~mask[-1]
        assert not together.same()
        mask[-1] = ~mask[-1]
    assert together.same()
