"""The loaded library beside torch: one OpenMP runtime, and forks that do not hang."""

import multiprocessing
import subprocess
import sys

import torch

from sparsefx.kernels.cpu import ConvPlan
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.cpu.build import supported_isas
from tests.kernels.cpu.helpers import blocked, error, images_of


def test_every_supported_library_has_its_width():
    lanes = {"avx512": 16, "avx2": 8, "portable": 4}
    assert {isa: load(isa).sfx_lanes() for isa in supported_isas()} == {isa: lanes[isa] for isa in supported_isas()}


def test_kernels_share_torchs_openmp():
    """In a process of its own: other packages bring an OpenMP library of their own."""
    code = """
import torch
from sparsefx.kernels.cpu.abi import load
load()
torch.ones(1 << 20).sum()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


class _Batches(torch.utils.data.Dataset):
    def __init__(self, plan, x, weight):
        self.plan, self.x, self.weight = plan, x, weight

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.plan.fprop(self.x, self.weight)


def test_forked_loader_worker_runs_the_layer():
    mask = torch.rand(16, 16, 3, 3) < 0.2
    plan, weight, x = ConvPlan(mask, padding=1), torch.randn(16, 16, 3, 3) * mask, torch.randn(32, 16, 8, 8)
    here = plan.fprop(blocked(x), weight)
    loader = torch.utils.data.DataLoader(
        _Batches(plan, blocked(x), weight), num_workers=1, batch_size=None, multiprocessing_context="fork", timeout=60
    )
    for there in loader:
        assert error(images_of(there), images_of(here).double()) < 1e-6


def test_forked_process_with_several_threads_does_not_hang():
    mask = torch.rand(16, 16, 3, 3) < 0.2
    plan, weight, x = ConvPlan(mask, padding=1), torch.randn(16, 16, 3, 3) * mask, blocked(torch.randn(32, 16, 8, 8))
    plan.fprop(x, weight)
    assert torch.get_num_threads() > 1
    process = multiprocessing.get_context("fork").Process(target=plan.fprop, args=(x, weight))
    process.start()
    process.join(60)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive
    assert process.exitcode == 0
