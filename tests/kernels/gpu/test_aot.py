"""Some kernels compile ahead of time for Hopper as they must; `python -m sparsefx.kernels aot` does all."""

import json

import pytest
import torch
import triton

from sparsefx.kernels.gpu.aot import Report, cases, compile_case, matrix_case
from sparsefx.kernels.gpu.config import NARROWEST, default

HALF = {
    "pointwise_fwd_kernel": ("fprop", "pointwise", NARROWEST),
    "conv_dgrad_kernel": ("dgrad", "conv 3x3/2", 64),
    "conv_wgrad_kernel": ("wgrad", "conv 3x3", 16),
}


@pytest.mark.parametrize("name", HALF)
def test_bf16_kernels_use_wgmma_wide_loads_and_no_spills(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind, geometry, rows = HALF[name]
    report = compile_case(matrix_case(kind, "bf16", geometry, default(kind, torch.bfloat16, rows)), "sm_90")
    assert report.kernel == name
    assert report.wgmma
    assert report.spills == 0
    assert report.wide_loads > 0
    assert 0 < report.shared_bytes < 227 * 1024


def test_a_process_that_interprets_says_that_it_cannot_compile(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="expected TRITON_INTERPRET unset"):
        compile_case(next(cases()), "sm_90")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [({}, ""), ({"spills": 3}, "3 spills"), ({"wgmma": False}, "no wgmma"), ({"wide_loads": 0}, "no 16-byte loads")],
)
def test_what_must_not_ship(changed, fault):
    fields = {"kernel": "k", "label": "", "target": "sm_90", "config": "", "registers": 90, "spills": 0}
    fields |= {"shared_bytes": 1, "wgmma": True, "wide_loads": 4, "loads": 8}
    assert Report(**{**fields, **changed}).fault(matrix=True) == fault


def test_every_pass_type_and_tile_is_compiled():
    found = list(cases())
    names = {case.kernel.name(case.constants) for case in found}
    assert names >= {
        "conv_fwd_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel", "conv_dense_wgrad_kernel", "pointwise_fwd_kernel",
        "pack_kernel", "wgrad_sum_kernel", "dense_wgrad_sum_kernel", "transpose_kernel",
    }  # fmt: skip
    assert {case.constants.get("BLOCK_ROWS") for case in found} >= {NARROWEST, 16, 32, 64, 128}
    assert {case.label.split()[-1] for case in found if case.matrix} == {"bf16", "fp16"}


@pytest.mark.parametrize("name", ["aot.json", "aot_triton_3.6.json"])
def test_the_committed_reports_have_no_faults(root, name):
    rows = json.loads((root / "results" / name).read_text())["rows"]
    reports = [Report(**row) for row in rows]
    assert {r.target for r in reports} == {"sm_80", "sm_90"}
    compiled = {(r.kernel, r.label) for r in reports}
    assert compiled == {(case.kernel.name(case.constants), case.label) for case in cases()}
    for report in reports:
        assert not report.fault(matrix=report.label.endswith((" bf16", " fp16"))), report
