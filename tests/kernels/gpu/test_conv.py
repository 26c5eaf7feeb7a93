"""The convolution kernels in Triton's interpreter against the dense convolution in float64."""

import pytest
import torch

from tests.kernels.gpu.helpers import ROWS_LAST, TOLERANCE, chwn, error, layer, nchw

CASES = {
    "plain": {},
    "one_image": {"images": 1, "inputs": 3, "outputs": 7, "hw": (5, 7)},
    "stride2": {"stride": (2, 2), "hw": (6, 7)},
    "stride_and_even_kernel": {"kernel": (2, 4), "stride": (3, 2), "padding": (0, 3), "dilation": (1, 2), "hw": (7, 8)},
    "stride_above_kernel": {"kernel": (2, 2), "stride": (4, 3), "padding": (0, 0), "hw": (9, 9)},
    "dilation2": {"padding": (2, 2), "dilation": (2, 2)},
    "no_padding": {"kernel": (3, 1), "padding": (0, 0)},
    "tiny_map": {"images": 16, "hw": (2, 2)},
    "one_pixel": {"images": 3, "hw": (1, 1)},
    "pointwise": {"kernel": (1, 1), "padding": (0, 0)},
    "pointwise_stride2": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
    "pointwise_padded": {"kernel": (1, 1), "padding": (1, 1), "hw": (3, 3)},
    "empty_mask": {"density": 0.0, "hw": (3, 3)},
    "full_mask": {"density": 1.0, "hw": (3, 3)},
    "single_weight": {"inputs": 1, "outputs": 1, "density": 1.0, "kernel": (1, 1), "padding": (0, 0), "hw": (2, 2)},
}


def check_passes(case, plan, tolerance):
    got = nchw(plan.fprop(chwn(case.x), case.w, case.b))
    assert got.dtype == case.x.dtype
    assert error(got, case.y) < tolerance
    assert error(nchw(plan.dgrad(chwn(case.g), case.w, case.x.shape[2:])), case.dx) < tolerance
    dw = plan.wgrad(chwn(case.g), chwn(case.x), case.w)
    assert error(dw, case.dw * case.mask) < tolerance
    assert not dw[~case.mask].any()


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_passes_equal_dense(shape):
    case = layer(**shape)
    check_passes(case, case.plan(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", ["plain", "stride2", "pointwise"])
def test_rows_on_the_narrow_side_of_the_product_equal_dense(shape):
    case = layer(**CASES[shape])
    check_passes(case, case.plan(ROWS_LAST), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", ["stride2", "pointwise"])
def test_half_precision_equals_dense(shape, dtype):
    case = layer(**CASES[shape], dtype=dtype)
    check_passes(case, case.plan(), TOLERANCE[dtype])


def test_a_mask_update_changes_results_in_place():
    case, other = layer(hw=(3, 3)), layer(hw=(3, 3), density=0.4)
    plan = case.plan()
    addresses = [t.data_ptr() for t in vars(plan.forward).values() if isinstance(t, torch.Tensor)]
    plan.update_(other.mask)
    assert addresses == [t.data_ptr() for t in vars(plan.forward).values() if isinstance(t, torch.Tensor)]
    check_passes(other, plan, TOLERANCE[torch.float32])


def test_units_of_ten_rows_lie_in_tiles_of_sixteen():
    case = layer(outputs=27, hw=(3, 3))
    plan = case.plan(unit=10)
    assert plan.forward.tiles == 3
    check_passes(case, plan, TOLERANCE[torch.float32])


def test_epilogue_adds_bias_and_residual_and_clamps():
    case = layer(hw=(3, 3))
    residual = torch.randn_like(case.y).float()
    got = case.plan().fprop(chwn(case.x), case.w, case.b, chwn(residual), relu=True)
    assert error(nchw(got), (case.y + residual).relu()) < 1e-5


def test_without_bias_an_empty_row_is_zero():
    case = layer(hw=(3, 3))
    got = nchw(case.plan().fprop(chwn(case.x), case.w))
    assert error(got, case.y - case.b.view(-1, 1, 1)) < 1e-5
    assert not got[:, 2].any()


def test_missing_weights_and_unread_channels_are_never_read():
    case = layer(hw=(3, 3))
    plan = case.plan()
    clean = plan.fprop(chwn(case.x), case.w)
    poisoned = case.x.clone()
    poisoned[:, 1] = torch.nan
    assert torch.equal(plan.fprop(chwn(poisoned), case.w), clean)


def test_channels_last_weights_give_channels_last_gradients():
    case = layer(hw=(3, 3))
    w = case.w.contiguous(memory_format=torch.channels_last)
    plan = case.plan()
    assert torch.equal(plan.fprop(chwn(case.x), w), plan.fprop(chwn(case.x), case.w))
    dw = plan.wgrad(chwn(case.g), chwn(case.x), w)
    assert dw.stride() == w.stride()
    assert error(dw, case.dw * case.mask) < 1e-5


def test_the_window_gradient_is_written_only_where_the_device_flag_is_set():
    case = layer(hw=(4, 3))
    plan, flag, out = case.plan(), torch.zeros(1, dtype=torch.int32), torch.full_like(case.w, 7)
    plan.dense_wgrad_(chwn(case.g), chwn(case.x), flag, out)
    assert (out == 7).all()
    flag.fill_(1)
    plan.dense_wgrad_(chwn(case.g), chwn(case.x), flag, out)
    assert error(out, case.dw) < 1e-5


def test_splits_of_the_weight_gradient_add_up(monkeypatch):
    monkeypatch.setattr("sparsefx.kernels.gpu.plan._SPLIT", 40)
    case = layer(images=7)
    plan = case.plan()
    first = plan.wgrad(chwn(case.g), chwn(case.x), case.w)
    assert error(first, case.dw * case.mask) < 1e-5
    assert torch.equal(first, plan.wgrad(chwn(case.g), chwn(case.x), case.w))


def test_positions_beyond_32_bits_are_refused():
    case = layer(hw=(3, 3))
    with pytest.raises(ValueError, match=r"2\^31 positions"):
        case.plan().fprop(torch.empty(6, 1 << 16, 1 << 15, 1, device="meta"), case.w)
